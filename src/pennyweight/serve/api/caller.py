"""Who asks, as a dependency of a route; the guard has found out before."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from pennyweight.serve.keys import Caller
from pennyweight.serve.refusals import Refused

__all__ = ["Asks", "require_key"]


async def require_key(request: Request) -> Caller:
    """The caller, by the `Authorization` header or by the session cookie; else Refused (401).

    A request with the cookie that changes something comes from our own pages, or was refused (403).
    """
    caller: Caller | None = getattr(request.state, "caller", None)
    if caller is None:
        raise Refused(
            401,
            "no valid key: send `Authorization: Bearer KEY`",
            kind="authentication_error",
            code="invalid_api_key",
        )
    return caller


Asks = Annotated[Caller, Depends(require_key)]
