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
        3,
        "campaigns.kill_points:run",
    ),
    Campaign(
        "random-kills",
        "a kill at any instant of a run: the same command resumes, to the bit",
        200,
        3,
        "campaigns.random_kills:run",
    ),
    Campaign(
        "resume",
        "every cut, accumulation 1, 2, 4, packing on and off, 8-bit and paged, chained: the same bits",
        64,
        2,
        "campaigns.resume:run",
    ),
    Campaign(
        "signals",
        "SIGTERM or Ctrl-C at any instant: 75, resumable, within a step and a second",
        50,
        4,
        "campaigns.signals:run",
    ),
    Campaign(
        "second-signal",
        "a second signal: 130 at once, the last checkpoint whole",
        50,
        2,
        "campaigns.signals:twice",
    ),
    Campaign(
        "corruption",
        "damaged checkpoints are passed over and said, the one before is used",
        2000,
        30,
        "campaigns.corruption:run",
    ),
    Campaign(
        "full-disk",
        "no space left, at any call: nothing lost, no litter, said, resumed when space is freed",
        150,
        3,
        "campaigns.full_disk:at_every_call",
    ),
    Campaign(
        "filling-disk",
        "a small file system that fills up and stays full: the same",
        60,
        2,
        "campaigns.full_disk:filling_up",
    ),
    Campaign(
        "non-finite",
        "a loss or gradient that is not finite: no step, nothing of it saved, the row named",
        100,
        2,
        "campaigns.injected:non_finite",
    ),
    Campaign(
        "out-of-memory",
        "smaller parts, the same step: losses within 1e-6, the plan corrected and said",
        24,
        2,
        "campaigns.injected:out_of_memory",
    ),
    Campaign(
        "changed-run",
        "data, base, adapter or schedule changed before a resume: refused with the difference",
        15,
        4,
        "campaigns.mishaps:changed",
    ),
    Campaign(
        "mishaps",
        "no rights, vanished or changed data, a clock that goes back, two runs in one folder",
        14,
        5,
        "campaigns.mishaps:run",
    ),
    Campaign(
        "same-command",
        "the true command, stopped in every way, is given again until it is done",
        6,
        2,
        "campaigns.random_kills:same_command",
    ),
    Campaign(
        "hostile-adapters",
        "damaged, absurd and malicious adapters: a refusal of ours within a second, nothing run or written",
        200,
        20,
        "campaigns.untrusted.adapters:run",
    ),
    Campaign(
        "wrong-base",
        "another base of the same shapes: refused, in under 2 s for 1 GB",
        21,
        2,
        "campaigns.untrusted.bases:run",
    ),
    Campaign(
        "hostile-rows",
        "lines gone wrong in every format: rows, or faults named by file and line",
        100000,
        2400,
        "campaigns.untrusted.rows:run",
    ),
    Campaign(
        "flat-memory",
        "memory while rows are read does not grow with the file",
        4,
        4,
        "campaigns.untrusted.rows:flat",
    ),
    Campaign(
        "hostile-templates",
        "chat templates that loop, swell or reach for Python: refused within 1.5 s",
        500,
        120,
        "campaigns.untrusted.templates:run",
    ),
    Campaign(
        "hostile-models",
        "model folders that ask for code, absurd memory or files elsewhere: refused by load and plan",
        200,
        10,
        "campaigns.untrusted.models:run",
    ),
    Campaign(
        "hostile-configs",
        "descriptions gone wrong: every fault with its line, exit code 2",
        100,
        24,
        "campaigns.untrusted.configs:run",
    ),
    Campaign(
        "names",
        "names that could become paths: [a-z0-9][a-z0-9._-]{0,63}, and nothing leaves its folder",
        10000,
        300,
        "campaigns.untrusted.names:run",
    ),
    Campaign(
        "server-kills",
        "a server killed at any instant during two jobs and chat: nothing acknowledged is lost, the same bits, billed once",
        200,
        1,
        "campaigns.server_kills:run",
    ),
    Campaign(
        "server-cancels",
        "a cancelled job trains no further than the step under way or two seconds, and pays for its steps; SIGTERM ends a server within 30 s",
        101,
        1,
        "campaigns.server_ends:run",
    ),
    Campaign(
        "idempotency",
        "the same request with one Idempotency-Key, fifty at once: one job",
        20,
        1,
        "campaigns.served:idempotency",
    ),
    Campaign(
        "isolation",
        "adapters loaded, unloaded and asked by several keys: each answers as alone, another's is 404",
        2000,
        30,
        "campaigns.isolation:run",
    ),
    Campaign(
        "hostile-requests",
        "requests made of the API's own description, valid or not: no 5xx, no answer that it does not name",
        3000,
        60,
        "campaigns.requests:run",
    ),
)


def named(name: str) -> Campaign:
    """KeyError lists the names there are."""
    for campaign in CAMPAIGNS:
        if campaign.name == name:
            return campaign
    raise KeyError(f"{name}: no such campaign; there are {', '.join(c.name for c in CAMPAIGNS)}")
