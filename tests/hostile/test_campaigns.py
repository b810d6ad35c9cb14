"""The campaigns over untrusted input in their short form; `scripts/campaign NAME` is the full one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

NAMES = [
    "hostile-adapters",
    "wrong-base",
    "hostile-rows",
    "flat-memory",
    "hostile-templates",
    "hostile-models",
    "hostile-configs",
    "names",
]


@pytest.mark.parametrize("name", NAMES)
def test_short_form(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)
    from campaigns.catalogue import named
    from campaigns.tally import Tally

    campaign: Any = named(name)
    tally = Tally(name, tmp_path)
    campaign.run(tally, campaign.short)
    assert tally.faults == []
    assert tally.tried >= campaign.short // 2
