"""Small benchmarks in files of their own, in the layouts the Hub has them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PROBLEM = {
    "task_id": "Own/0",
    "prompt": 'def twice(x):\n    """Twice x."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('a') == 'aa'\n",
}


@pytest.fixture
def problem() -> dict[str, Any]:
    return dict(PROBLEM)


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three subjects of MMLU (test and dev), gsm8k (test and train) and humaneval."""
    folder = tmp_path_factory.mktemp("benchmarks")
    mmlu: dict[str, list[Any]] = {"test": [], "dev": []}
    for subject in ("anatomy", "astronomy", "philosophy"):
        for split, count in (("test", 5), ("dev", 3)):
            for i in range(count):
                mmlu[split].append(
                    {
                        "subject": subject,
                        "question": f"What of {subject} has number {i}?",
                        "choices": [f"the {word} {i}" for word in ("red", "old", "far", "new")],
                        "answer": (i * 7 + len(subject)) % 4,
                    }
                )
    sums = {
        split: [
            {
                "question": f"{a} and {a + 1} apples?",
                "answer": f"They are {2 * a + 1}.\n#### {2 * a + 1}",
            }
            for a in numbers
        ]
        for split, numbers in (("test", range(4)), ("train", range(10, 16)))
    }
    for name, splits in (("mmlu", mmlu), ("gsm8k", sums), ("humaneval", {"test": [PROBLEM] * 2})):
        for split, rows in splits.items():
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
