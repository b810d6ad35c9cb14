"""Requests of every kind that the API's own description allows, and many that it does not.

schemathesis makes them of the OpenAPI document, valid and invalid; every answer must be one that the
document names, in its shape, and none may be the server's fault.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from campaigns.small_run import build_model
from campaigns.tally import Absent, Tally

__all__ = ["run", "served"]

CASES = 3000
KEY = "hostile-key-0123456789"


def served(folder: Path) -> Any:
    """A service over a small model, its rows and answers kept short."""
    from pennyweight.config import BaseConfig
    from pennyweight.model import load_base
    from pennyweight.serve.keys import Keys
    from pennyweight.serve.service import Service
    from pennyweight.serve.settings import ServeSettings
    from pennyweight.serve.store import SqliteDatabase, Store

    build_model(folder / "model")
    base = load_base(BaseConfig(model=str(folder / "model"), device="cpu"))
    settings = ServeSettings.model_validate(
        {
            "base": {"model": str(folder / "model"), "device": "cpu"},
            "model_name": "base",
            "data_dir": str(folder / "data"),
            "chat": {"max_new_tokens": 4},
            "jobs": {"live_per_key": 3},
        }
    )
    settings.data_path.mkdir(parents=True)
    keys = Keys({"default": KEY}, admins=("default",))
    store = Store(SqliteDatabase(settings.data_path / "server.sqlite"))
    service = Service(settings, keys, store, base)
    service.start()
    return service


def run(tally: Tally, cases: int | None) -> None:
    """About as many cases of every operation."""
    if find_spec("schemathesis") is None or find_spec("fastapi") is None:
        raise Absent("pip install -e .[clients-test,serve]")
    import schemathesis

    from pennyweight.serve.api import create_app

    service = served(tally.folder)
    head = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_asgi("/v1/openapi.json", create_app(service), headers=head)
    operations = [found.ok() for found in schema.get_all_operations()]
    each = -(-(cases or CASES * 11 // 10) // len(operations))
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            strategy = operation.as_strategy(generation_mode=mode)
            try:
                _try(tally, operation.label, strategy, max(1, each // 2), head)
            except Exception as fault:
                # Of a route that takes nothing there is nothing that is invalid.
                if "Unsatisfiable" not in type(fault).__name__:
                    tally.case(operation.label, f"{type(fault).__name__}: {fault}"[:300])
    assert service.end(30)


def _try(tally: Tally, label: str, strategy: Any, count: int, head: dict[str, str]) -> None:
    from hypothesis import HealthCheck, Phase, given, settings

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def each(case: Any) -> None:
        tally.case(label, _fault(case, head))

    each()


def _fault(case: Any, head: dict[str, str]) -> str | None:
    from schemathesis import checks
    from schemathesis.core.failures import FailureGroup

    wanted = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    try:
        case.validate_response(case.call(headers=head), checks=wanted)
    except (Exception, FailureGroup) as fault:  # a group of anything is no Exception
        return f"{type(fault).__name__}: {fault}"[:600].replace("\n", " ")
    return None
