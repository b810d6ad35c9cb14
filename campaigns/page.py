"""`benchmarks/results/reliability.md`: one row a campaign, each replaced by its latest full run."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.machine import commit

from campaigns.catalogue import CAMPAIGNS, Campaign
from campaigns.tally import Tally

__all__ = ["PAGE", "replaced"]

PAGE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "reliability.md"

_HEAD = """# Reliability: what was tried, what survived

Each row is the latest full run of `scripts/campaign NAME`; what is promised, and what is not, is in [docs/reliability.md](../../docs/reliability.md).

| campaign | promise | tried | survived | date | versions | seconds | seen |
|---|---|---|---|---|---|---|---|
"""


def replaced(page: str, campaign: Campaign, tally: Tally) -> str:
    """The page with this campaign's row put in or replaced, rows in the catalogue's order."""
    rows = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "campaign":
            rows[cells[0]] = line
    rows[campaign.name] = _row(campaign, tally)
    order = [c.name for c in CAMPAIGNS]
    known = sorted((name for name in rows if name in order), key=order.index)
    return _HEAD + "".join(rows[name] + "\n" for name in known)


def _row(campaign: Campaign, tally: Tally) -> str:
    cells = [
        campaign.name,
        campaign.promise,
        f"{tally.tried:,}",
        f"{tally.survived:,}",
        datetime.now(UTC).date().isoformat(),
        _versions(),
        f"{tally.seconds:,.0f}",
        "; ".join(tally.remarks),
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _versions() -> str:
    names = ("torch", "transformers", "safetensors")
    return ", ".join(
        [
            f"pennyweight {version('pennyweight')} ({commit()})",
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in names),
            platform.system(),
        ]
    )
