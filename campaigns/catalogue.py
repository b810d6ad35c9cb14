"""Every campaign: its name, what is promised, how often it is tried, and the function that tries.

A campaign is a function `run(tally, cases)`: it makes its cases in `tally.folder`, counts each with
`tally.case`, and tries about `cases` of them, spread over all kinds, where that is not None (the
short form). It is imported only when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from campaigns.tally import Tally

__all__ = ["CAMPAIGNS", "Campaign", "named"]


@dataclass(frozen=True, slots=True)
class Campaign:
    """`least`: how many cases the full campaign must try. `short`: how many the tests try."""

    name: str
    promise: str
    least: int
    short: int
    address: str  # "campaigns.module:function"

    def run(self, tally: Tally, cases: int | None) -> None:
        module, _, function = self.address.partition(":")
        act: Callable[[Tally, int | None], None] = getattr(import_module(module), function)
        act(tally, cases)


# In the order of the results' table.
CAMPAIGNS: tuple[Campaign, ...] = (
    Campaign(
        "kill-points",
        "a kill in any file system call of a save: the same command resumes, to the bit",
        130,
        6,
        "campaigns.kill_points:run",
    ),
)


def named(name: str) -> Campaign:
    """KeyError lists the names there are."""
    for campaign in CAMPAIGNS:
        if campaign.name == name:
            return campaign
    raise KeyError(f"{name}: no such campaign; there are {', '.join(c.name for c in CAMPAIGNS)}")
