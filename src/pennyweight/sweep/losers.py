"""Which adapters lose their place, by held-out loss at equal counts of evaluations.

Nobody is judged before all that are left have made as many evaluations, and only those count, so
who is stopped does not depend on whose turn it was, nor on where a sweep was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pennyweight.config import AdaptersConfig

__all__ = ["losers", "next_rung"]


def next_rung(settings: AdaptersConfig, passed: int) -> int | None:
    """The count of evaluations at which is judged next, after `passed`; None: never.

    Halving after 2: 2, 4, 8 and so on. A margin from 2 on: 2, 3, 4.
    """
    if settings.stop == "none":
        return None
    if passed < settings.stop_after:
        return settings.stop_after
    return 2 * passed if settings.stop == "halving" else passed + 1


def losers(
    settings: AdaptersConfig, losses: Mapping[str, Sequence[float]], rung: int
) -> dict[str, str]:
    """Names that go at this rung, each with the reason; `losses` of all that are left, in order.

    Of equals the one that was described first stays. Somebody always stays.
    """
    best = {name: min(seen[:rung], default=math.inf) for name, seen in losses.items()}
    ranked = sorted(best, key=lambda name: best[name])
    if len(ranked) < 2:
        return {}
    first = ranked[0]
    if settings.stop == "halving":
        gone = ranked[math.ceil(len(ranked) / 2) :]
    else:
        gone = [name for name in ranked[1:] if best[name] > best[first] + settings.stop_margin]
    return {
        name: f"{best[name]:.4f} after {rung} evaluations, {first} {best[first]:.4f}"
        for name in gone
    }
