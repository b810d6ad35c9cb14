"""`python -m campaigns list`, `python -m campaigns NAME ...`, `python -m campaigns all`.

Exit code 0: every case survived, and as many were tried as are promised. 1: not so. 3: what the
campaign needs is absent here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from campaigns.catalogue import CAMPAIGNS, Campaign, named
from campaigns.page import PAGE, replaced
from campaigns.tally import Absent, Enough, Tally

__all__ = ["main"]

KEPT, BROKEN, ABSENT = 0, 1, 3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/campaign", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="list, all, or names")
    parser.add_argument("--short", action="store_true", help="the tests' form: few cases, no row")
    parser.add_argument("--cases", type=int, help="about so many cases, no row")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="the longest for each; the row says so"
    )
    parser.add_argument("--results", type=Path, default=PAGE, help="the page whose row is replaced")
    parser.add_argument("--json", action="store_true", help="one JSON object a campaign on stdout")
    asked = parser.parse_args(arguments)
    if asked.names == ["list"]:
        for each in CAMPAIGNS:
            print(f"{each.name:<18} {each.least:>7,}  {each.promise}")
        return KEPT
    try:
        chosen = CAMPAIGNS if asked.names == ["all"] else [named(name) for name in asked.names]
    except KeyError as unknown:
        parser.error(unknown.args[0])
    codes = [_run(each, asked) for each in chosen]
    return BROKEN if BROKEN in codes else max(codes, default=KEPT)


def _run(campaign: Campaign, asked: argparse.Namespace) -> int:
    full = not asked.short and asked.cases is None
    cases = None if full else asked.cases or campaign.short
    with tempfile.TemporaryDirectory(prefix=f"campaign-{campaign.name}-") as folder:
        tally = Tally(campaign.name, Path(folder).resolve(), 60 * asked.minutes)
        tally.say(campaign.promise)
        try:
            campaign.run(tally, cases)
        except Enough:
            tally.remark(f"stopped after {asked.minutes:g} minutes, as asked")
        except Absent as absent:
            tally.say(f"skipped: {absent}")
            _tell(asked, {"name": campaign.name, "absent": str(absent)})
            return ABSENT
    tally.say(
        f"{tally.survived:,} of {tally.tried:,} survived (at least {campaign.least:,} in full), "
        f"{tally.seconds:,.0f} s"
    )
    if full:
        old = asked.results.read_text(encoding="utf-8") if asked.results.is_file() else ""
        asked.results.write_text(replaced(old, campaign, tally), encoding="utf-8")
    _tell(
        asked,
        {
            "name": campaign.name,
            "tried": tally.tried,
            "survived": tally.survived,
            "faults": tally.faults,
            "remarks": tally.remarks,
            "seconds": tally.seconds,
        },
    )
    enough = tally.tried >= campaign.least or not full
    return KEPT if enough and tally.tried and tally.survived == tally.tried else BROKEN


def _tell(asked: argparse.Namespace, facts: dict[str, object]) -> None:
    if asked.json:
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
