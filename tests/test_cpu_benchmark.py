"""The benchmark of a CPU in its short form: our side's steps, the page, the order of turns; no peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])
    import benchmarks.in_turn
    import benchmarks.steps.cases
    import benchmarks.steps.page

    return benchmarks


def test_sides_take_turns_forth_and_back(rooms: Any) -> None:
    assert list(rooms.in_turn.turns("AB", 3)) == list("ABBAAB")


def test_rows_are_the_same_for_every_side_and_make_the_tokens(rooms: Any) -> None:
    cases = rooms.steps.cases
    for shape in cases.CASES_OF:
        for side in ("pennyweight", "peft", "trl", "peft compiled"):
            for case in cases.cases_of(side, shape):
                rows = cases.rows_of(case, 1000)
                assert sum(len(row.ids) for row in rows) == case.tokens, case
                assert all(not row.trained[0] and row.trained.any() for row in rows)
    one, other = (
        cases.rows_of(cases.Case("qlora", 2048, f"ragged {how}"), 1000)
        for how in ("packed", "padded")
    )
    assert [row.ids.tolist() for row in one] == [row.ids.tolist() for row in other]
    assert len({len(row.ids) for row in one}) > 5


def test_the_floor_counts_what_a_step_must_compute(rooms: Any) -> None:
    """By hand, for one layer of width 8, ff 16, 2 heads of 4, vocabulary 32, three tokens."""
    shape = rooms.random_llama.LlamaShape(8, 16, 1, 2, 2, 32)
    linear, head = 4 * 64 + 3 * 128, 256
    attention = 7 * 8 * 9
    full = rooms.steps.cases.flops(shape, "full", [3])
    assert full == 6 * (linear + head) * 3 + attention
    adapters = 16 * (4 * 16 + 3 * 24)
    lora = rooms.steps.cases.flops(shape, "lora", [3])
    assert lora == (4 * (linear + head) + 6 * adapters) * 3 + attention


@pytest.mark.parametrize("mode", ["qlora", "adapters", "full"])
def test_our_side_takes_steps(rooms: Any, tmp_path: Path, mode: str) -> None:
    from benchmarks.steps.ours import Ours

    cases = rooms.steps.cases
    case = cases.Case(mode, 64, steps=2)
    model = cases.write_model(rooms.random_llama.LlamaShape(32, 64, 1, 2, 2, 4096), tmp_path)
    side, warmed = Ours(), []
    side.load(model, mode)
    taken = side.take(cases.rows_of(case, 4096), case, warmed.append)
    losses = [loss for _, loss in taken]
    assert warmed == [1, 2, 3]
    assert losses[2] < losses[0]
    assert all(seconds > 0 for seconds, _ in taken)


def test_the_page_says_what_was_measured_and_what_was_not(rooms: Any) -> None:
    def one(side: str, step_s: float) -> dict[str, Any]:
        return {
            "side": side, "shape": "512x8", "mode": "qlora", "tokens": 64, "layout": "even",
            "step_s": step_s, "real_tokens": 64, "trained_tokens": 63, "floor_s": 0.05,
            "product_flops": 1e11, "peak_bytes": 6e8, "rest_bytes": 5e8, "load_s": 1.0,
            "import_s": 2.0, "first_step_s": 0.5, "losses": [9.0], "threads": 2,
        }  # fmt: skip

    failed = {"side": "trl", "shape": "512x8", "mode": "qlora", "tokens": 64, "layout": "even"}
    versions = {"versions": {}, "date": "d", "commit": "c", "cpu": "p", "cores": 2, "threads": 2}
    facts: dict[str, Any] = {
        "quick": False, "notes": ["no time for more"], "failed": [],
        "gate": [{"what": "codes", "found": 1, "bound": 0, "holds": False}],
        "circumstances": versions | {"system": "Linux"},
        "steps": [
            *(one("pennyweight", s) for s in (0.1, 0.11, 0.09)),
            *(one("peft", s) for s in (0.2, 0.25, 0.2)),
            failed | {"fault": "ValueError: no"},
        ],
    }  # fmt: skip
    page = rooms.steps.page.written(facts)
    assert "The gate is shut" in page
    assert (
        "| pennyweight | 100 ± 10% | 640 | 630 | 50% | 2.00 | 600 | 100 | 1.0 | 3.5 | 3 |" in page
    )
    assert "| peft | 200 ± 12% | 320 |" in page
    assert "ValueError: no" in page
    assert "- no time for more" in page
