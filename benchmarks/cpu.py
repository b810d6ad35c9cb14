"""This project and its peers on one CPU, in turn in one run: gate, kernels, training steps, data.

    python -m benchmarks cpu [--minutes 20] [--rounds 3] [--only gate steps] [--quick]

Every process's results are written as they come (`cpu.jsonl`), and the page after each of them, so
a run that is stopped leaves what it measured. What there is no time for is said, not guessed.
`--quick` takes a toy through all of it in a few minutes; its figures say nothing. A peer that is
not installed is left out, and the page says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.in_turn import ask, turns
from benchmarks.machine import circumstances
from benchmarks.steps import page

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("pennyweight", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets")
SECTIONS = ("gate", "kernels", "data", "steps")
# Sides of each shape, and the package each needs.
SIDES = {"pennyweight": "", "peft": "peft", "trl": "trl", "peft compiled": "peft"}
OF_SHAPE = {
    "512x8": tuple(SIDES),
    "1024x12": ("pennyweight", "peft"),
    "quick": tuple(SIDES),
}
# Of a run's whole time, what the sections beside the steps may take at most, in seconds.
MOST_S = {"gate": 200.0, "kernels": 120.0, "data": 200.0}
DATA_ROWS = 20_000
# Before a process of a side has run once, how long it may take.
GUESS_S = 150.0
MOST_PROCESS_S = 240.0  # what hangs costs the others no more than this


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that are asked for; exit code 1 where the gate is shut or one failed."""
    asked = _parser().parse_args(arguments)
    until = time.monotonic() + 60 * asked.minutes
    asked.results.mkdir(parents=True, exist_ok=True)
    found = Found(asked.results, quick=asked.quick)
    for section in SECTIONS:
        if section in asked.only:
            print(f"── {section}", flush=True)
            _SECTION[section](asked, found, until)
    page.draw(found.facts, asked.results / "cpu.png")
    print(found.page())
    return 1 if found.facts["failed"] or page.shut(found.facts) else 0


class Found:
    """What was measured so far, on the disk as it comes."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self._folder = folder
        self.facts: dict[str, Any] = {
            "quick": quick,
            "circumstances": circumstances(PACKAGES),
            "gate": [],
            "steps": [],
            "notes": [],
            "failed": [],
        }
        self._log = folder / "cpu.jsonl"
        self._log.write_text(json.dumps(self.facts["circumstances"]) + "\n")

    def add(self, kind: str, results: Sequence[dict[str, Any]]) -> None:
        self.facts[kind] += results
        with self._log.open("a") as file:
            for result in results:
                file.write(json.dumps({"kind": kind, **result}) + "\n")
        self._write()

    def say(self, note: str, *, failed: bool = False) -> None:
        print(note, flush=True)
        self.facts["failed" if failed else "notes"].append(note)
        self._write()

    def page(self) -> str:
        return page.written(self.facts)

    def _write(self) -> None:
        (self._folder / "cpu.json").write_text(json.dumps(self.facts, indent=1) + "\n")
        (self._folder / "cpu.md").write_text(self.page())


def _gate(asked: argparse.Namespace, found: Found, until: float) -> None:
    if missing := [name for name in ("peft", "bitsandbytes") if not _has(name)]:
        found.say(f"gate: {', '.join(missing)} not installed; no speed here counts", failed=True)
        return
    steps = "10" if asked.quick else "100"
    answer = ask("benchmarks.steps.gate", ["--steps", steps], timeout_s=MOST_S["gate"])
    if answer.fault:
        found.say(f"gate: {answer.fault}", failed=True)
        return
    found.add("gate", answer.said["checks"])


def _kernels(asked: argparse.Namespace, found: Found, until: float) -> None:
    if not _has("benchmarks.cpu_kernels"):
        found.say("kernels: this checkout has no benchmark of them")
        return
    words = ["--results", str(asked.results), *(["--quick"] if asked.quick else [])]
    answer = ask("benchmarks.cpu_kernels", words, timeout_s=MOST_S["kernels"], answers=False)
    _told(found, "kernels", answer.fault)


def _data(asked: argparse.Namespace, found: Found, until: float) -> None:
    if not _has("trl"):
        found.say("data: trl is not installed; left out")
        return
    few = ["--rows", "500", "--rounds", "1"]
    if not asked.quick:
        few = ["--rows", str(DATA_ROWS), "--rounds", str(asked.rounds)]
    words = ["--results", str(asked.results), *few, "--seconds", str(MOST_S["data"] - 40)]
    answer = ask("benchmarks.data_preparation", words, timeout_s=MOST_S["data"], answers=False)
    _told(found, "data", answer.fault)


def _told(found: Found, section: str, fault: str) -> None:
    if fault:
        found.say(f"{section}: {fault}", failed=True)


def _steps(asked: argparse.Namespace, found: Found, until: float) -> None:
    shapes = ["quick"] if asked.quick else asked.shapes
    with tempfile.TemporaryDirectory() as work:
        models = {shape: _model(shape, Path(work) / shape) for shape in shapes}
        took: dict[tuple[str, str], float] = {}
        for shape, side in _order(shapes, 1 if asked.quick else asked.rounds, found):
            left = until - time.monotonic()
            if left < 1.1 * took.get((side, shape), GUESS_S):
                found.say(f"steps: no time for one more process of {side} at {shape}")
                continue
            out = Path(work) / "cases.jsonl"
            out.unlink(missing_ok=True)
            words = ["--side", side, "--shape", shape, "--model", str(models[shape])]
            # Compiled code is kept for the next process, so that only the first pays for it.
            cache = str(Path(work) / "inductor")
            answer = ask(
                "benchmarks.steps.side",
                [*words, "--out", str(out)],
                timeout_s=min(max(30.0, left), MOST_PROCESS_S),
                TORCHINDUCTOR_CACHE_DIR=cache,
            )
            took[side, shape] = answer.seconds
            lines = out.read_text().splitlines() if out.exists() else []
            found.add("steps", [json.loads(line) for line in lines])
            print(f"{shape:9} {side:14} {len(lines)} cases, {answer.seconds:.0f} s", flush=True)
            _told(found, f"steps: {side} at {shape}", answer.fault)


def _order(shapes: Sequence[str], rounds: int, found: Found) -> list[tuple[str, str]]:
    """Shape and side of each process: one round of all shapes after the other, forth and back."""
    planned = {}
    for shape in shapes:
        present = [side for side in OF_SHAPE[shape] if not SIDES[side] or _has(SIDES[side])]
        for side in set(OF_SHAPE[shape]) - set(present):
            found.say(f"steps: {SIDES[side]} is not installed; {side} is left out")
        planned[shape] = turns(present, rounds), len(present)
    return [
        (shape, side)
        for _ in range(rounds)
        for shape, (each, count) in planned.items()
        for side in islice(each, count)
    ]


def _model(shape: str, folder: Path) -> Path:
    from benchmarks.steps.cases import SHAPES, write_model

    return write_model(SHAPES[shape], folder)


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cpu", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="begin nothing that ends later")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--shapes", nargs="+", choices=("512x8", "1024x12"), default=["512x8", "1024x12"]
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a toy, one process of each side")
    return parser


_SECTION = {"gate": _gate, "kernels": _kernels, "data": _data, "steps": _steps}


if __name__ == "__main__":
    sys.exit(main())
