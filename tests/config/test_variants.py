"""`adapters:` as it is written: every run it describes, and every fault with its line and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from pennyweight.config import RunConfig, explain, load_run, starter, variants
from pennyweight.errors import ConfigError


def loaded(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_run(path).config


def test_a_list_and_a_grid_are_every_entry_in_every_combination(tmp_path: Path) -> None:
    run = loaded(
        tmp_path,
        """
output_dir: runs/many
adapters:
  list:
    - {name: sql, data.train: sql.jsonl, adapter: {r: 4}}
    - {name: chat, data.train: chat.jsonl}
  grid: {train.learning_rate: [1e-4, 3e-4], seed: [0, 1]}
""",
    )
    made = variants(run)
    assert list(made)[:2] == ["sql_learning_rate-1e-4_seed-0", "sql_learning_rate-1e-4_seed-1"]
    assert len(made) == 8
    last = made["chat_learning_rate-3e-4_seed-1"]
    assert (last.data.train, last.train.learning_rate, last.seed) == ("chat.jsonl", 3e-4, 1)
    assert last.output_dir == str(Path("runs/many/chat_learning_rate-3e-4_seed-1"))
    assert (made["sql_learning_rate-1e-4_seed-0"].adapter.r, last.adapter.r) == (4, 16)
    assert not last.adapters.grid
    assert variants(RunConfig()) == {}


def test_every_fault_has_its_line_and_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(
            tmp_path,
            """adapters:
  list:
    - {name: a, adapter.rr: 4}
    - {name: b, base.model: other}
    - {adapter.r: 3}
  grid:
    train.lerning_rate: [1]
""",
        )
    said = str(caught.value).splitlines()
    assert "run.yaml:3: adapters.list[0].adapter.rr: unknown key; did you mean adapter.r?" in said
    assert any(
        line.startswith("run.yaml:4: adapters.list[1].base.model: is the same for all adapters")
        for line in said
    )
    assert any(line.startswith("run.yaml:5: adapters.list[2]: needs a name") for line in said)
    assert any("run.yaml:7" in line and "train.learning_rate?" in line for line in said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "adapters:\n  grid:\n    adapter.r: [4, 0]\n",
            r"run\.yaml:3: .*found 0, expected a whole",
        ),
        ("adapters:\n  grid:\n    adapter.r: [4, 4]\n", "a second adapter named 'r-4'"),
        ("adapters:\n  list:\n    - {name: A b}\n", r"run\.yaml:3: .*names start with a-z"),
        ("adapters:\n  grids: {}\n", r"unknown key; did you mean adapters\.grid"),
        (
            "train: {max_steps: 5}\nadapters:\n  list:\n    - {name: a, train.epochs: 2}\n",
            r"run\.yaml:4: .*max_steps decides the length",
        ),
        ("adapters:\n  stop_margin: 0.2\n", "read only where adapters.stop is margin"),
        (
            "train: {method: full}\nadapters:\n  list:\n    - {name: a}\n",
            "method full trains the base itself",
        ),
        ("adapters:\n  grid: {seed: [" + ", ".join(map(str, range(300))) + "]}\n", "256 at most"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, text)


def test_the_starter_with_a_sweep_reads_back_and_explains_itself(tmp_path: Path) -> None:
    text = starter(model="m", data="d.jsonl", method="qlora", output_dir="runs/x", sweep=True)
    made = variants(loaded(tmp_path, text))
    assert next(iter(made)) == "r-8_learning_rate-1e-4"
    assert len(made) == 4
    assert "successive halving" in explain("adapters.stop")
