"""Where each thing of a comparison stands, and how it is read back.

compare.json, compare.md, *.png   what it came to      base/         what all arms are judged by
lora-r16/range_test.json          its learning rate    lora-r16/seed-0/       an ordinary run
lora-r16/seed-0.yaml              its description      lora-r16/seed-0.json   what it is worth
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.compare.arms import Arm
from pennyweight.config import BaseConfig
from pennyweight.files import make_folder, whole
from pennyweight.report import plain

__all__ = ["ComparisonFolder", "read_answer", "write_answer", "write_text"]


@dataclass(frozen=True, slots=True)
class ComparisonFolder:
    """The paths of one comparison."""

    path: Path

    @property
    def base(self) -> Path:
        return self.path / "base"

    def run(self, arm: Arm, seed: int) -> Path:
        return self.path / arm.name / f"seed-{seed}"

    def range_test(self, arm: Arm) -> Path:
        return self.path / arm.name / "range_test.json"

    def measured(self, arm: Arm, seed: int) -> Path:
        return self.path / arm.name / f"seed-{seed}.json"

    def measured_base(self, base: BaseConfig) -> Path:
        return self.base / f"{base.quantization}.json"

    def describe(self, arm: Arm, seed: int, text: str) -> Path:
        """Write the YAML of one run; gives its path."""
        path = self.path / arm.name / f"seed-{seed}.yaml"
        write_text(path, text)
        return path

    def receipt(self, run: Path) -> dict[str, Any] | None:
        """The receipt of a finished run, None where there is none yet."""
        return _read_json(run / "receipt.json")

    def receipt_sha256(self, run: Path) -> str:
        return hashlib.sha256((run / "receipt.json").read_bytes()).hexdigest()


def read_answer(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `write_answer` wrote, if it was made with the same `identity`; else None."""
    found = _read_json(path)
    if found is None or found.get("identity") != plain(identity):
        return None
    answer = found.get("answer")
    return answer if isinstance(answer, dict) else None


def write_answer(path: Path, answer: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Keep an answer with what it was made with."""
    write_text(path, json.dumps(plain({"identity": identity, "answer": answer})) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, and its folder where there is none."""
    make_folder(path.parent)
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
