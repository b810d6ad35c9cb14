"""What was used, by day and model, and what it costs where prices are set."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from pennyweight.serve.api.caller import Asks
from pennyweight.serve.metering import cost_of
from pennyweight.serve.records import Usage
from pennyweight.serve.service import Service
from pennyweight.serve.settings import Prices
from pennyweight.serve.web.routing import Page, show

__all__ = ["router"]

router = APIRouter(route_class=Page)
DAY_S = 86_400
_COUNTED = (
    "tokens_trained",
    "tokens_evaluated",
    "tokens_in",
    "tokens_out",
    "requests",
    "device_seconds",
    "cost",
)


@router.get("/usage")
def usage(
    request: Request, caller: Asks, days: Annotated[int, Query(ge=1, le=3660)] = 30
) -> Response:
    """The key's own usage; an admin's page shows everybody's."""
    service: Service = request.app.state.service
    now = int(time.time())
    where = {} if caller.admin else {"owner": caller.name}
    found = service.store.usage(where, since=now - days * DAY_S, until=now + DAY_S)
    prices = service.settings.prices
    rows = _by_day(found, prices)
    total = dict.fromkeys(_COUNTED, 0) | {name: sum(row[name] for row in rows) for name in _COUNTED}
    owners = {row["owner"] for row in rows}
    return show(
        request,
        "usage.html",
        here="Usage",
        days=days,
        rows=rows,
        total=total,
        many=len(owners) > 1,
        whose="All keys" if caller.admin else f"Key {caller.name}",
        currency=prices.currency,
        priced=any(value for value in prices.model_dump().values() if not isinstance(value, str)),
    )


def _by_day(found: Iterable[Usage], prices: Prices) -> list[dict[str, Any]]:
    """Hours taken together by day, model and key, the newest day first."""
    days: dict[tuple[str, str, str], dict[str, Any]] = {}
    for hour in found:
        day = f"{datetime.fromtimestamp(hour.hour, UTC):%Y-%m-%d}"
        key = (day, hour.model, hour.owner)
        row = days.setdefault(
            key,
            {"day": day, "model": hour.model, "owner": hour.owner, **dict.fromkeys(_COUNTED, 0)},
        )
        used = {**asdict(hour), "cost": cost_of(hour, prices)}
        for name in _COUNTED:
            row[name] += used[name]
    return [days[key] for key in sorted(days, reverse=True)]
