"""The E2E task on stories260k (Novikova et al. 2017): its runs as YAML, its held-out rows as a file.

The facts of a restaurant and a newline are the prompt, a sentence about it the response.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from pennyweight.config import LoadedRun, load_run

__all__ = ["DISTINCT_INPUTS", "METHODS", "described_run", "write_first_references"]

METHODS = ("full", "lora", "qlora")
DISTINCT_INPUTS = 630
DESCRIPTIONS = Path(__file__).parent / "yardstick"


def write_first_references(data: Path, work: Path) -> Path:
    """Write the first reference of each distinct test input, in the file's order; gives the CSV."""
    path = work / "first_references.csv"
    first: dict[str, str] = {}
    with (data / "sft/e2e-nlg/testset_w_refs.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            first.setdefault(row["mr"], row["ref"])
    assert len(first) == DISTINCT_INPUTS, f"{len(first)} distinct inputs"
    work.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        writer.writerows(first.items())
    return path


def described_run(
    method: str, data: Path, work: Path, *, seed: int, settings: Sequence[str] = ()
) -> LoadedRun:
    """One arm of the yardstick: its YAML with this machine's paths and this seed.

    `settings` are further `key=value` overrides.
    """
    places = {
        "base.model": data / "models/stories260k",
        "data.train": data / "sft/e2e-nlg/devset.csv",
        "data.eval": work / "first_references.csv",
        "output_dir": work / f"{method}-seed{seed}",
    }
    overrides = [f"{key}={json.dumps(str(path.resolve()))}" for key, path in places.items()]
    return load_run(DESCRIPTIONS / f"{method}.yaml", [*overrides, f"seed={seed}", *settings])
