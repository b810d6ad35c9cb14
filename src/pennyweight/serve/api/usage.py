"""`/v1/usage`: tokens and device time by hour, key, model and job, with their cost."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from pennyweight.serve.api.caller import Asks
from pennyweight.serve.api.wire import UsageRow
from pennyweight.serve.metering import GROUPS, cost_of, grouped
from pennyweight.serve.records import Usage
from pennyweight.serve.refusals import Refused, invalid
from pennyweight.serve.service import Service

__all__ = ["router"]

router = APIRouter(tags=["usage"])
LAST = 2**53
Time = Annotated[int, Query(ge=0, le=LAST)]


class MemoryNow(BaseModel):
    """The device's memory beside the base: all of it, what is free, and who holds how much."""

    total_bytes: int
    free_bytes: int
    held_bytes: dict[str, int]


class UsageList(BaseModel):
    object: str = "list"
    currency: str
    data: list[UsageRow]
    total: UsageRow
    memory: MemoryNow | None = None


@router.get("/usage")
def usage(
    request: Request,
    caller: Asks,
    start_time: Time = 0,
    end_time: Time = LAST,
    key: str | None = None,
    model: str | None = None,
    job: str | None = None,
    group_by: Annotated[str, Query(max_length=64)] = "",
) -> UsageList:
    """What the key used, from `start_time` on and before `end_time` (seconds since 1970).

    `group_by`: any of hour, key, model, job, joined by commas. An admin's key sees everybody's, and
    how the memory stands at this moment.
    """
    service: Service = request.app.state.service
    by = [name for name in group_by.split(",") if name]
    if strange := [name for name in by if name not in GROUPS]:
        raise invalid(
            f"group_by: {strange[0][:40]!r} is none of {', '.join(GROUPS)}", param="group_by"
        )
    if key not in (None, caller.name) and not caller.admin:
        raise Refused(
            403, "key: only an admin's key sees others", kind="permission_error", param="key"
        )
    asked = {"owner": key if caller.admin else caller.name, "model": model, "job_id": job}
    where = {name: value for name, value in asked.items() if value is not None}
    rows = service.store.usage(where, since=start_time, until=end_time)
    data = [_row(service, each, by) for each in grouped(rows, by)] if by else []
    total = _row(service, next(iter(grouped(rows, [])), Usage()), [])
    budget, currency = service.memory.budget, service.settings.prices.currency
    now = MemoryNow(
        total_bytes=budget.total_bytes, free_bytes=budget.free_bytes, held_bytes=budget.held()
    )
    return UsageList(
        currency=currency,
        data=data or [total],
        total=total,
        memory=now if caller.admin else None,
    )


def _row(service: Service, used: Usage, by: list[str]) -> UsageRow:
    told: dict[str, Any] = {"start_time": None, "key": None, "model": None, "job": None}
    names = {"hour": "start_time", "key": "key", "model": "model", "job": "job"}
    told |= {names[name]: getattr(used, GROUPS[name]) for name in by}
    return UsageRow(
        **told,
        tokens_trained=used.tokens_trained,
        tokens_evaluated=used.tokens_evaluated,
        tokens_in=used.tokens_in,
        tokens_out=used.tokens_out,
        requests=used.requests,
        device_seconds=round(used.device_seconds, 6),
        cost=round(cost_of(used, service.settings.prices), 9),
    )
