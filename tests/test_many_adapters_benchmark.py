"""The benchmark of many adapters: its table is told only of what is the same training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest


def test_a_case_is_told_once_and_only_where_all_ways_trained_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])
    from benchmarks.many_adapters import ALONE, EXACT, FAST, PEER, Way, append

    one = Way(ALONE, 20.0, 4.0, 10**9, (2.0, 3.0))
    exact = replace(one, name=EXACT, seconds=12.0, weights_apart=0.0)
    fast = replace(exact, name=FAST, seconds=10.0, step_seconds=2.0, weights_apart=1e-4)
    peer = Way(PEER, 40.0, 8.0, 10**9, (2.0001, 3.0))
    results = tmp_path / "many.md"
    for tokens in (128, 512, 128):
        append(2, tokens, [one, exact, fast, peer], results)
    text = results.read_text(encoding="utf-8")
    assert text.count("## 2 adapters, 128 tokens a step") == 1
    assert text.index("512 tokens") < text.index("128 tokens")
    assert f"| {FAST} | 10.0 | 2.00 | 2.0 | 2.00 | 1,000 | 0.0e+00 | 1.0e-04 |" in text
    assert f"| {PEER} | 40.0 | 0.50 | 8.0 | 0.50 | 1,000 | 5.0e-05 |  |" in text
    for wrong in (
        [one, replace(exact, weights_apart=1e-9), fast, peer],
        [one, exact, replace(fast, weights_apart=2e-3), peer],
        [one, exact, fast, replace(peer, losses=(2.001, 3.0))],
    ):
        with pytest.raises(SystemExit, match="not the same training"):
            append(2, 2048, wrong, results)
    assert results.read_text(encoding="utf-8") == text
