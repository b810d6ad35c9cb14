"""What was used and what it costs: hours of the store added up as somebody wants to see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

from pennyweight.serve.records import Usage
from pennyweight.serve.settings import Prices

__all__ = ["GROUPS", "cost_of", "grouped"]

# What usage may be told apart by, and the field that holds it.
GROUPS = {"hour": "hour", "key": "owner", "model": "model", "job": "job_id"}
_USED = [f.name for f in fields(Usage) if f.name not in GROUPS.values()]


def grouped(used: Iterable[Usage], by: Sequence[str]) -> list[Usage]:
    """Added up over all that `by` does not tell apart, in the order in which it comes."""
    kept = {GROUPS[name] for name in by}
    sums: dict[tuple[object, ...], Usage] = {}
    for each in used:
        known = {name: getattr(each, name) for name in GROUPS.values() if name in kept}
        before = sums.get(tuple(known.values()), Usage(**known))
        more = {name: getattr(before, name) + getattr(each, name) for name in _USED}
        sums[tuple(known.values())] = replace(before, **more)
    return list(sums.values())


def cost_of(used: Usage, prices: Prices) -> float:
    """In the prices' currency."""
    million = 1e6
    return (
        used.tokens_trained / million * prices.trained_per_million
        + used.tokens_evaluated / million * prices.evaluated_per_million
        + used.tokens_in / million * prices.input_per_million
        + used.tokens_out / million * prices.output_per_million
        + used.device_seconds / 3600 * prices.device_hour
    )
