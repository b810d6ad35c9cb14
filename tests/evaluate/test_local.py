"""Benchmark rows are found where people put them, and what is wrong with them is named by line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pennyweight.errors import DataError
from pennyweight.evaluate.tasks.local import BENCHMARKS, read_local

MMLU, GSM8K, HUMANEVAL = (
    BENCHMARKS[name] for name in ("cais/mmlu", "openai/gsm8k", "openai/openai_humaneval")
)
SUM = {"question": "1 + 1?", "answer": "It is two.\n#### 2"}


def written(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("path", "given", "split"),
    [
        ("gsm8k/test.jsonl", ".", "test"),
        ("eval/gsm8k/main/train-00000-of-00001.jsonl.gz", ".", "train"),
        ("GSM-8K.json", ".", "test"),
        ("gsm8k_val.jsonl", "gsm8k_val.jsonl", "validation"),
        ("gsm8k/train/a.jsonl", "gsm8k", "train"),
    ],
)
def test_files_are_found_by_name_and_split(
    tmp_path: Path, path: str, given: str, split: str
) -> None:
    written(tmp_path / path, SUM, SUM)
    written(tmp_path / "other" / "test.jsonl", {"question": "no", "answer": "no"})
    found = read_local(GSM8K, [tmp_path / given])
    assert {name: len(rows) for name, rows in found.splits.items()} == {split: 2}
    assert found.files == (Path(path).name,)


def test_the_first_folder_that_has_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty" / "gsm8k").mkdir(parents=True)
    written(tmp_path / "full" / "gsm8k" / "test.jsonl", SUM)
    assert read_local(GSM8K, [tmp_path / "empty", tmp_path / "full"]).splits == {"test": [SUM]}


def test_both_forms_of_mmlu_are_one(tmp_path: Path) -> None:
    choices = ["a b", "c", "d\ne", "f"]
    plain = {"subject": "astronomy", "question": "Which?\nSay.", "choices": choices, "answer": 2}
    text = "The following are multiple choice questions (with answers) about  astronomy.\n\n"
    text += "Which?\nSay.\nA. a b\nB. c\nC. d\ne\nD. f\nAnswer:"
    rendered = {"subject": "astronomy", "input": text, "output": "C"}
    written(tmp_path / "mmlu" / "test.jsonl", plain, rendered, {**plain, "answer": "C"})
    assert read_local(MMLU, [tmp_path]).splits == {"test": [plain] * 3}


def test_rows_of_one_subject(tmp_path: Path) -> None:
    row = {"question": "?", "choices": list("wxyz"), "answer": 0}
    for split, subject in (("test", "law"), ("test", "art"), ("dev", "law")):
        path = tmp_path / "mmlu" / f"{subject}_{split}.jsonl"
        written(path, {**row, "subject": subject})
    found = read_local(MMLU, [tmp_path])
    assert {s: len(rows) for s, rows in found.of_subject("law").splits.items()} == {
        "dev": 1,
        "test": 1,
    }
    assert list(found.of_subject("art").splits) == ["test"]
    assert not found.of_subject("music").splits
    assert found.of_subject(None) is found


def test_what_is_wrong_is_named_by_line(tmp_path: Path) -> None:
    good = {"subject": "law", "question": "?", "choices": list("wxyz"), "answer": 0}
    written(
        tmp_path / "mmlu.jsonl",
        good,
        {**good, "answer": 4},
        {**good, "choices": list("xyz")},
        {**good, "subject": None},
        {"subject": "law", "input": "Which?\nA. 1\nB. 2\nAnswer:", "output": "A"},
        [1],
    )
    with pytest.raises(DataError) as caught:
        read_local(MMLU, [tmp_path])
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[:2] for line in lines[:4]] == [
        ["mmlu.jsonl:2", "answer"],
        ["mmlu.jsonl:3", "choices"],
        ["mmlu.jsonl:4", "subject"],
        ["mmlu.jsonl:5", "input"],
    ]
    assert "mmlu.jsonl:6: expected an object" in lines[4]
    written(tmp_path / "gsm8k.jsonl", {"question": "?", "answer": "2"})
    with pytest.raises(DataError, match=r"gsm8k.jsonl:1: answer: no `#### `"):
        read_local(GSM8K, [tmp_path])


def test_where_it_was_looked_for_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"humaneval: no file of rows in .*expected a file with"):
        read_local(HUMANEVAL, [tmp_path])
    with pytest.raises(DataError, match="no such folder"):
        read_local(HUMANEVAL, [tmp_path / "nowhere"])


def test_real_files(shared_data: Path) -> None:
    mmlu = read_local(MMLU, [shared_data / "eval"])
    assert len(mmlu.splits["validation"]) == 1531
    assert len({row["subject"] for row in mmlu.splits["validation"]}) == 57
    assert len(read_local(HUMANEVAL, [shared_data]).splits["test"]) == 164
    assert len(read_local(GSM8K, [shared_data]).splits["train"]) == 7473
