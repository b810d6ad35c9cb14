"""The serving benchmark in its short form, and that the peer writes what is written here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("peft")


# What the peer and its libraries warn of is theirs.
@pytest.mark.filterwarnings("ignore")
def test_every_case_is_measured_beside_the_peer_and_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])
    from benchmarks import serving

    assert serving.main(["--quick", "--results", str(tmp_path)]) == 0
    page = (tmp_path / "serving.md").read_text(encoding="utf-8")
    lines = (tmp_path / "serving.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [json.loads(line) for line in lines]
    cases = [(fact["who"], fact["requests"], fact["adapters"]) for fact in facts]
    assert cases == [
        (who, requests, adapters)
        for who in (serving.OURS, serving.PEER)
        for requests in (1, 4)
        for adapters in (0, 4)
    ]
    assert all(speed > 0 for fact in facts for speed in fact["tokens_per_s"])
    assert page.count("| builtin |") == len(facts)
    assert "Of 40 greedy tokens, 100.0% come before any difference from the peer's." in page
