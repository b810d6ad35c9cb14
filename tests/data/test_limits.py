"""Data that would go wrong in silence is refused, by settings that say how much is too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pennyweight.config import DataConfig
from pennyweight.data.limits import LIMITS, past_limits
from pennyweight.data.prepare import Prepared, prepare
from pennyweight.errors import DataError

Run = Callable[..., Prepared]
Rows = list[dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer: Any) -> Run:
    def made(rows: Rows, held: Rows | None = None, **settings: Any) -> Prepared:
        def file(name: str, content: Rows) -> str:
            path = tmp_path / name
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
            return str(path)

        more = {"eval_fraction": 0} if held is None else {"eval": file("dev.jsonl", held)}
        config = DataConfig(train=file("my.jsonl", rows), **more, **settings)
        return prepare(config, tiny_tokenizer, seed=0, cache_dir=tmp_path / "cache")

    return made


def pairs(count: int, answer: str = "answer") -> Rows:
    return [{"prompt": f"question {i}", "completion": f"{answer} {i}"} for i in range(count)]


LONG = {"prompt": "q", "completion": "b" * 400}

FAULTY: list[tuple[str, Rows, dict[str, Any], list[str]]] = [
    (
        "max_dropped_share",
        [*pairs(16), *[{"prompt": f"x{i}", "completion": " "} for i in range(4)]],
        {},
        ["4 of 20 rows (20.00%)", "over 10.00%", "4 rows: the answer is empty", "my.jsonl:17"],
    ),
    (
        "max_dropped_share",
        [*pairs(16), *[{**LONG, "prompt": f"x{i}"} for i in range(4)]],
        {"max_length": 100, "overlong": "drop"},
        ["4 of 20 rows", "over data.max_length 100", "raise data.max_length"],
    ),
    (
        "max_cut_share",
        [*pairs(16), *[{**LONG, "prompt": f"x{i}"} for i in range(4)]],
        {"max_length": 100},
        ["4 of 20 rows (20.00%)", "data.max_length 100", "stop token", "my.jsonl:17 (", "lost"],
    ),
    (
        "max_duplicate_share",
        [*pairs(5), *pairs(5)],
        {},
        ["5 of 10 rows (50.00%)", "my.jsonl:1 (2 times)", "weight: 2"],
    ),
    (
        "min_trained_share",
        [{"prompt": f"{i} " + "long " * 900, "completion": "a"} for i in range(4)],
        {"max_length": 8000},
        ["are trained, under 0.200%", "my.jsonl:1 (", "data.columns"],
    ),
]


@pytest.mark.parametrize(("key", "rows", "settings", "said"), FAULTY)
def test_past_a_limit_a_run_is_refused_with_numbers_rows_and_mend(
    run: Run, key: str, rows: Rows, settings: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(DataError) as refused:
        run(rows, **settings)
    message = str(refused.value)
    assert message.startswith(f"data.{key}: ")
    for part in said:
        assert part in message
    # The setting that is named lets it pass, and the cached data are asked again.
    off = 0.0 if key.startswith("min") else 1.0
    assert len(run(rows, **settings, **{key: off}).train)
    with pytest.raises(DataError):
        run(rows, **settings)


def test_rows_held_out_and_trained_on_are_refused(run: Run) -> None:
    rows = pairs(30)
    with pytest.raises(DataError, match=r"data.max_leaked_share: 3 of 8 rows .*37\.50%") as refused:
        run(rows, rows[:3] + pairs(5, "another"))
    assert "dev.jsonl:1 (the same as my.jsonl:1)" in str(refused.value)
    assert len(run(rows, rows[:3] + pairs(5, "another"), max_leaked_share=0.4).eval) == 8


def test_text_without_a_token_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", *["what", "is", "the", "answer", "so"]]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    file = tmp_path / "my.jsonl"
    rows = [
        {"prompt": "what is", "completion": f"the {'answer' if i % 2 else 'Ответ'}"}
        for i in range(8)
    ]
    rows = [{**row, "prompt": row["prompt"] + " so" * i} for i, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prepared(**settings: Any) -> Prepared:
        config = DataConfig(train=str(file), eval_fraction=0, **settings)
        return prepare(config, tokenizer, seed=0, cache_dir=tmp_path / "cache")

    with pytest.raises(
        DataError, match=r"(?s)data.max_unknown_share: 4 of .* my.jsonl:1 \(1 of 5"
    ) as no:
        prepared()
    assert "whose tokenizer knows this script" in str(no.value)
    assert prepared(max_unknown_share=0.5).ledger.summary()["unknown_tokens"] == 4
    # Where the unknown token also ends documents, as GPT-2's does, it says nothing.
    tokenizer.eos_token = "<unk>"
    assert prepared(max_length=64).ledger.summary()["unknown_tokens"] == 0


def test_every_limit_past_is_named_at_once(run: Run) -> None:
    empty = [{"prompt": f"x{i}", "completion": ""} for i in range(9)]
    with pytest.raises(DataError) as refused:
        run([*pairs(3), *pairs(3), LONG, LONG, *empty], max_length=100)
    heads = [line.split(":")[0] for line in str(refused.value).splitlines() if line[0] != " "]
    assert heads == ["data.max_dropped_share", "data.max_cut_share", "data.max_duplicate_share"]


def test_one_row_never_refuses_a_run(run: Run) -> None:
    assert len(run([{"prompt": "a", "completion": "b"}] * 2).train) == 2
    assert len(run([*pairs(2), {"prompt": "a", "completion": ""}]).train) == 2


def test_held_out_rows_that_would_be_left_out_are_refused(run: Run) -> None:
    with pytest.raises(DataError, match=r"2 of 4 rows .* of data.eval would be left out"):
        run(pairs(20), [*pairs(2, "b"), *[{"prompt": "a", "completion": ""}] * 2])


def test_a_limit_changes_nothing_that_is_learned(run: Run) -> None:
    marks = {
        run(pairs(9), **{limit: 0.5 if "max" in limit else 0.0}).fingerprint for limit in LIMITS
    }
    assert marks == {run(pairs(9)).fingerprint}


def test_good_data_is_past_no_limit(run: Run) -> None:
    prepared = run(pairs(50))
    assert past_limits(prepared.ledger, DataConfig()) == []
