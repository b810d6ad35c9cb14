"""Tables and pictures of what a comparison came to, whole or in part."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pennyweight.compare import notes, tables
from pennyweight.compare.page import write_page
from tests.compare.conftest import Done


def test_base_full_lora_qlora_with_intervals(done: Done) -> None:
    worth, forgetting, cost, rates = tables(done.found)
    names = [row[0] for row in worth.rows]
    assert names[:3] == ["base, as stored", "base, NF4", "full"]
    assert names[3:] == ["LoRA r 2", "LoRA r 4", "QLoRA r 2", "QLoRA r 4"]
    assert worth.rows[2][3] == "100 %"
    assert all(" %" in row[3] and "[" in row[3] for row in worth.rows[3:])
    assert [row[0] for row in cost.rows] == [row[0] for row in forgetting.rows] == names[2:]
    assert all(row[3][0] in "+-" for row in forgetting.rows)
    assert sum("*" in cell for row in rates.rows for cell in row) == 3
    for table in (worth, forgetting, cost, rates):
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_what_is_missing_is_said(done: Done) -> None:
    only = tuple(arm for arm in done.found.arms if arm.method != "full")
    said = notes(replace(done.found, arms=only, left_out={"full": "Cannot: needs 56 GB."}))
    assert "Left out: full. Cannot: needs 56 GB." in said
    assert any("nothing to measure quality kept against" in note for note in said)


@pytest.mark.parametrize("seeds", [1, 3])
def test_all_pictures_are_drawn(done: Done, tmp_path: Path, seeds: int) -> None:
    pytest.importorskip("matplotlib")
    found = done.found
    if seeds == 3:
        arms = [
            replace(arm, loss=replace(arm.loss, by_seed=(1.0, 2.0, 3.0), seeds=(0.5, 3.5)))
            for arm in found.arms
        ]
        found = replace(found, arms=tuple(arms), seeds=(0, 1, 2))
    told = write_page(found, tmp_path, pictures=True)
    assert len(told) == 2
    for name in ("compare", "range_test", "ranks", "effective_rank"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in (tmp_path / "compare.md").read_text()


def test_one_rank_without_range_tests_draws_what_there_is(done: Done, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = replace(done.found, arms=done.found.arms[:1], ranges=())
    write_page(found, tmp_path, pictures=True)
    assert [path.name for path in tmp_path.glob("*.png")] == ["compare.png"]


def test_without_matplotlib_the_tables_stand(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pennyweight[plots]" in write_page(done.found, tmp_path, pictures=True)[-1]
    assert (tmp_path / "compare.md").is_file()


def test_the_terminal_shows_every_table(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from pennyweight.cli import show

    console: Any = Console(width=140, highlight=False)
    console.print(show.comparison(done.found))
    text = capsys.readouterr().out
    assert "…" not in text
    for table in tables(done.found):
        assert all(cell in text for row in table.rows for cell in row)
