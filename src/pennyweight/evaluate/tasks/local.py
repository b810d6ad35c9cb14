"""Benchmark rows from local files: found in a folder, held against what the task reads, named by line.

A benchmark's files are those below a folder, or the file, whose name holds the benchmark's own
(`mmlu`, `gsm8k`, `humaneval`): the folder given, or one at most two levels below it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.data.read import Faults, data_files, read_rows, suffix_of
from pennyweight.errors import DataError

__all__ = ["BENCHMARKS", "Benchmark", "LocalRows", "read_local"]

SPLITS = {
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "dev",
    "train": "train",
}
ROW_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
LEVELS_BELOW = 2


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`dataset`: the Hub id lm-eval's tasks name; `fields`: what a row must hold, for messages;
    `parse`: a row as the task reads it, or a ValueError that says what is wrong."""

    name: str
    dataset: str
    fields: str
    parse: Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class LocalRows:
    """Rows by split (`test`, `validation`, `dev`, `train`), and the files they came from."""

    splits: Mapping[str, list[dict[str, Any]]]
    files: tuple[str, ...]

    def of_subject(self, subject: str | None) -> LocalRows:
        """The rows of one subject, where rows have subjects; else all."""
        if subject in (None, "all") or not any(
            "subject" in rows[0] for rows in self.splits.values()
        ):
            return self
        kept = {
            split: [row for row in rows if row["subject"] == subject]
            for split, rows in self.splits.items()
        }
        return LocalRows({split: rows for split, rows in kept.items() if rows}, self.files)


def _texts(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    for name in names:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name}: found {row.get(name)!r:.60}, expected text")
    return {name: row[name] for name in names}


def _gsm8k(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = _texts(row, ("question", "answer"))
    if "####" not in kept["answer"]:
        raise ValueError("answer: no `#### ` before the final number")
    return kept


def _humaneval(row: Mapping[str, Any]) -> dict[str, Any]:
    return _texts(row, ("task_id", "prompt", "entry_point", "canonical_solution", "test"))


LETTERS = "ABCD"
_RENDERED = re.compile(
    r"(?:The following are multiple choice questions.*?\n\n)?"
    r"(?P<question>.*)\nA\. (?P<A>.*)\nB\. (?P<B>.*)\nC\. (?P<C>.*)\nD\. (?P<D>.*)\nAnswer:\s*",
    re.DOTALL,
)


def _mmlu(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rows as the Hub has them, or prompts already rendered with the letter of the answer."""
    subject = _texts(row, ("subject",))["subject"]
    choices: Any
    answer: Any
    if "input" in row:
        kept = _texts(row, ("input", "output"))
        found = _RENDERED.fullmatch(kept["input"])
        if found is None:
            raise ValueError(
                "input: not a question, the lines `A. ` to `D. ` and `Answer:` at the end"
            )
        question, answer = found["question"], kept["output"].strip()
        choices = [found[letter] for letter in LETTERS]
    else:
        question = _texts(row, ("question",))["question"]
        choices, answer = row.get("choices"), row.get("answer")
    if not (isinstance(choices, list) and len(choices) == len(LETTERS)):
        raise ValueError(f"choices: found {choices!r:.60}, expected a list of four texts")
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        answer = LETTERS.index(answer)
    if not (isinstance(answer, int) and 0 <= answer < len(LETTERS)):
        raise ValueError(f"answer: found {answer!r:.60}, expected 0 to 3 or A to D")
    return {
        "subject": subject.replace(" ", "_"),
        "question": question,
        "choices": [str(choice) for choice in choices],
        "answer": answer,
    }


BENCHMARKS = {
    benchmark.dataset: benchmark
    for benchmark in (
        Benchmark(
            "mmlu",
            "cais/mmlu",
            "subject, question, choices, answer; or subject, input, output",
            _mmlu,
        ),
        Benchmark("gsm8k", "openai/gsm8k", "question, answer", _gsm8k),
        Benchmark(
            "humaneval",
            "openai/openai_humaneval",
            "task_id, prompt, entry_point, canonical_solution, test",
            _humaneval,
        ),
    )
}


def read_local(benchmark: Benchmark, folders: Iterable[Path]) -> LocalRows:
    """Rows of the first folder that has the benchmark; DataError names every bad line, or says where
    files were looked for."""
    folders = list(folders)
    for folder in folders:
        if not folder.exists():
            raise DataError(f"--data-dir {folder}: no such folder")
        if files := _files(benchmark, folder):
            return _read(benchmark, files)
    looked = ", ".join(map(str, folders))
    raise DataError(
        f"{benchmark.name}: no file of rows in {looked}; expected a file with {benchmark.name!r} in its "
        f"name, or in that of its folder ({' '.join(ROW_FILES)}, .gz too), with {benchmark.fields}"
    )


def _files(benchmark: Benchmark, folder: Path) -> list[Path]:
    for place in _places(folder):
        if benchmark.name not in re.sub(r"[^a-z0-9]", "", place.name.lower()):
            continue
        found = [place] if place.is_file() else _below(place)
        if found := [path for path in found if suffix_of(path) in ROW_FILES]:
            return found
    return []


def _places(folder: Path) -> Iterator[Path]:
    """The folder itself, then what is in it, level by level."""
    level = [folder.resolve()]
    for _ in range(LEVELS_BELOW + 1):
        yield from level
        level = [
            below
            for place in level
            if place.is_dir()
            for below in sorted(place.iterdir())
            if not below.name.startswith(".")
        ]


def _below(folder: Path) -> list[Path]:
    try:
        return data_files(folder)
    except DataError:  # a folder of that name with other things in it
        return []


def _read(benchmark: Benchmark, files: list[Path]) -> LocalRows:
    faults = Faults()
    splits: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        rows = splits.setdefault(_split_of(path), [])
        for row in read_rows(path, faults):
            if not isinstance(row.value, Mapping):
                faults.add(row.source, f"expected an object with {benchmark.fields}")
                continue
            try:
                rows.append(benchmark.parse(row.value))
            except ValueError as wrong:
                faults.add(row.source, f"{wrong}; {benchmark.name} rows hold {benchmark.fields}")
    faults.raise_any()
    found = {split: rows for split, rows in splits.items() if rows}
    if not found:
        raise DataError(f"{files[0]}: no row in it; {benchmark.name} reads {benchmark.fields}")
    return LocalRows(found, tuple(path.name for path in files))


def _split_of(path: Path) -> str:
    """By the words of the file's name, then of its folder's; a file that names none is the test."""
    for name in (path.name.lower(), path.parent.name.lower()):
        for word in re.split(r"[^a-z]+", name):
            if word in SPLITS:
                return SPLITS[word]
    return "test"
