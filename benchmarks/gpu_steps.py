"""Training steps on one GPU beside the peers, the most telling first, until the time is over.

    python -m benchmarks.gpu_steps [--deadline 400] [--results FOLDER]
    python -m benchmarks.gpu_steps --device cpu --tiny    # the same code on a toy; its figures say nothing

Random weights of Llama shapes; a process holds one side and one shape and measures its cases, each
written as soon as it is there (`gpu-steps.jsonl`, `gpu-steps.md`). A peer that is not installed is
left out, and the page says so. Those with Liger and Unsloth have only been read against their sources
so far, for neither imports without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.in_turn import ask
from benchmarks.machine import circumstances
from benchmarks.random_llama import SHAPES, write_hollow
from benchmarks.steps import page

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("pennyweight", "torch", "triton", "transformers", "peft", "bitsandbytes", "trl"),
    *("liger-kernel", "torchao", "unsloth"),
)
NEEDS: dict[str, tuple[str, ...]] = {
    "pennyweight": (),
    "peft": ("peft", "bitsandbytes"),
    "peft liger": ("peft", "bitsandbytes", "liger_kernel"),
    "trl liger": ("trl", "datasets", "peft", "bitsandbytes", "liger_kernel"),
    "torchao": ("peft", "torchao"),
    "unsloth": ("unsloth", "unsloth_zoo", "bitsandbytes"),
}
# Shape and side, in the order of what is worth knowing: there and back, then the other sizes.
ORDER = (
    ("8B", "pennyweight"),
    ("8B", "peft"),
    ("70B", "pennyweight"),
    ("8B", "peft liger"),
    ("8B", "unsloth"),
    ("8B", "torchao"),
    ("8B", "trl liger"),
    ("13B", "pennyweight"),
    ("13B", "peft"),
    ("8B", "peft"),
    ("8B", "pennyweight"),
    ("1B", "pennyweight"),
    ("1B", "peft"),
    ("70B", "peft"),
)
TOY = (("tiny", "pennyweight"), ("tiny", "peft"), ("tiny", "torchao"))
LEAST_S = 20.0  # a process that would get less is not begun


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2: no GPU is here, nothing was done; 1: a process failed."""
    asked = _parser().parse_args(arguments)
    if asked.device == "cpu" and not asked.tiny:
        print(
            "gpu_steps: on a CPU only --tiny: the shapes of a GPU would take hours", file=sys.stderr
        )
        return 2
    if asked.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("gpu_steps: no CUDA device is here; nothing was done", file=sys.stderr)
            return 2
    return _measured(asked, time.monotonic() + asked.deadline)


def _measured(asked: argparse.Namespace, until: float) -> int:
    facts: dict[str, Any] = {
        "title": "Steps on a GPU, beside the peers",
        "made_by": "python -m benchmarks.gpu_steps",
        "product": "bf16" if asked.device == "cuda" else "float32",
        "quick": asked.tiny,
        "circumstances": circumstances(PACKAGES),
        **{name: [] for name in ("gate", "steps", "notes", "failed")},
    }
    asked.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for shape, side in TOY if asked.tiny else ORDER:
            missing = [name for name in NEEDS[side] if importlib.util.find_spec(name) is None]
            left = until - time.monotonic()
            if missing:
                facts["notes"].append(f"{side} at {shape}: {', '.join(missing)} not installed")
            elif left < LEAST_S:
                facts["notes"].append(f"{side} at {shape}: no time left")
            else:
                _one(asked, facts, Path(work), shape, side, left)
            _write(asked.results, facts)
    print(page.written(facts))
    return 1 if facts["failed"] else 0


def _one(
    asked: argparse.Namespace, facts: dict[str, Any], work: Path, shape: str, side: str, left: float
) -> None:
    folder = work / shape
    if not folder.exists():
        write_hollow(SHAPES[shape], folder)
    out = work / "cases.jsonl"
    out.unlink(missing_ok=True)
    words = ["--side", side, "--shape", shape, "--model", str(folder), "--hollow"]
    answer = ask(
        "benchmarks.steps.side",
        [*words, "--device", asked.device, "--out", str(out)],
        timeout_s=left,
    )
    lines = out.read_text().splitlines() if out.exists() else []
    facts["steps"] += [json.loads(line) for line in lines]
    print(f"{shape:5} {side:12} {len(lines)} cases, {answer.seconds:.0f} s", flush=True)
    if answer.fault.startswith("stopped after"):
        facts["notes"].append(f"{side} at {shape}: the time was over")
    elif answer.fault:
        facts["failed"].append(f"{side} at {shape}: {answer.fault}")


def _write(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "gpu-steps.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "gpu-steps.md").write_text(page.written(facts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_steps")
    parser.add_argument("--deadline", type=float, default=400.0, help="seconds for all of it")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
