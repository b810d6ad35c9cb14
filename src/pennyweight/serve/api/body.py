"""A JSON body as a value: strictly read, then checked against a pydantic model."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from pennyweight.data.read import nearest
from pennyweight.serve.guard import strict_json
from pennyweight.serve.refusals import Refused

__all__ = ["body_of", "described_by", "first_fault"]

Body = TypeVar("Body", bound=BaseModel)
LARGE = 1 << 16


async def body_of(request: Request, kind: type[Body], nesting: int) -> Body:
    """The request's body as a `kind`; Refused (400) names the field."""
    body = await request.body() or b"{}"
    if len(body) > LARGE:  # others are served while it is read
        return await run_in_threadpool(_read, body, kind, nesting)
    return _read(body, kind, nesting)


def _read(body: bytes, kind: type[Body], nesting: int) -> Body:
    value = strict_json(body, nesting)
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise first_fault(error, kind) from None


def first_fault(error: ValidationError, kind: type[BaseModel]) -> Refused:
    """What is wrong, as one refusal: every fault in the message, the first one's field as `param`."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    said, params = [], []
    for fault in faults[:8]:
        # Of a choice between types pydantic names the one it tried, too.
        where = [str(part) for part in fault["loc"] if _is_name(str(part))] or ["body"]
        params.append(".".join(where)[:120])
        message = fault["msg"]
        if fault["type"] == "extra_forbidden":
            known = list(kind.model_fields) if len(where) == 1 else []
            message = f"not a parameter of this route{nearest(where[-1], known)}"
        said.append(f"{params[-1]}: {message}"[:300])
    code = "missing_required_parameter" if faults[0]["type"] == "missing" else "invalid_value"
    if faults[0]["type"] == "extra_forbidden":
        code = "unknown_parameter"
    return Refused(400, "; ".join(said), param=params[0] or None, code=code)


def _is_name(part: str) -> bool:
    tried = {"str", "int", "float", "bool"}
    return part.isdigit() or (part.isidentifier() and part not in tried)


def described_by(kind: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: the body that `body_of` reads."""
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": kind.model_json_schema(ref_template="#/components/schemas/{model}")
                }
            },
        }
    }
