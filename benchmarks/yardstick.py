"""Full, LoRA and QLoRA from YAML on the E2E task, beside PEFT's losses.

    python -m benchmarks.yardstick --data PATH [--seeds 0 1 2] [--methods full lora qlora]

Each arm (method and seed) is a process of its own; an arm that has its result in the work folder
is not run again, and one that was stopped resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.e2e import METHODS, described_run, write_first_references
from benchmarks.machine import circumstances

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("pennyweight", "torch", "transformers", "tokenizers", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the tables over all arms that have a result."""
    asked = _parser().parse_args(arguments)
    if asked.arm is not None:
        _run_arm(asked)
        return 0
    write_first_references(asked.data, asked.work)
    arms = [(method, seed) for seed in asked.seeds for method in asked.methods]
    waiting = [arm for arm in arms if not _result_path(asked.work, *arm).is_file()]
    with ThreadPoolExecutor(asked.jobs) as pool:
        failed = sum(pool.map(lambda arm: _in_a_process(asked, *arm), waiting))
    from benchmarks.yardstick_report import write

    write(read_results(asked.work, "*-seed*"), read_results(asked.work, "peer-*"), asked.results)
    return 1 if failed else 0


def read_results(work: Path, pattern: str) -> list[dict[str, Any]]:
    """Results of the arms that are done, by method and seed."""
    found = [json.loads(path.read_text()) for path in work.glob(f"{pattern}.json")]
    return sorted(found, key=lambda arm: (METHODS.index(arm["method"]), arm["seed"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yardstick")
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and sft/")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/yardstick"), help="runs and results"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each arm")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="for a short trial"
    )
    parser.add_argument("--arm", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    return parser


def _result_path(work: Path, method: str, seed: int) -> Path:
    return work / f"{method}-seed{seed}.json"


def _in_a_process(asked: argparse.Namespace, method: str, seed: int) -> bool:
    """Run one arm, its output to a log; whether it failed."""
    threads = str(asked.threads)
    command = [sys.executable, "-m", "benchmarks.yardstick", "--data", asked.data]
    command += ["--work", asked.work, "--arm", method, str(seed)]
    command += ["--set", *asked.set] if asked.set else []
    cache = str((asked.work / "cache").resolve())
    environment = {"PENNYWEIGHT_CACHE": cache, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    with (asked.work / f"{method}-seed{seed}.log").open("w") as log:
        done = subprocess.run(
            [str(word) for word in command],
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    print(f"{method} seed {seed}: {'done' if not done.returncode else log.name}", flush=True)
    return done.returncode != 0


def _run_arm(asked: argparse.Namespace) -> None:
    """Train one arm, measure it again from its folder alone, and write its result whole."""
    from pennyweight.finetune import finetune
    from pennyweight.report import read_events
    from pennyweight.runs import RunFolder

    method, seed = asked.arm[0], int(asked.arm[1])
    run = described_run(method, asked.data, asked.work, seed=seed, settings=asked.set)
    result = finetune(run.config, origin=run.origin, text=run.text)
    folder = RunFolder(Path(result.output_dir))
    steps = [event for event in read_events(folder.events) if event["kind"] == "step"]
    seconds = sum(step["seconds"] for step in steps)
    answer = {
        "method": method,
        "seed": seed,
        "steps": result.steps,
        "before": result.loss_before,
        "after": result.loss_after,
        **_measured_again(folder),
        "trained_parameters": result.trained_parameters,
        "train_seconds": seconds,
        "tokens_per_second": sum(step["tokens"] for step in steps) / seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "notices": list(result.notices),
        "losses": [round(step["loss"], 6) for step in steps],
        "circumstances": circumstances(PACKAGES),
    }
    path = _result_path(asked.work, method, seed)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(answer) + "\n")
    partial.replace(path)


def _measured_again(folder: Any) -> dict[str, float]:
    """Losses of the run as reopened, of base and tuned: with the stop token, and without it."""
    from pennyweight.evaluate import evaluate_loss, in_batches, read_by
    from pennyweight.runs import adapter_slot

    rows = list(folder.read_held_out().rows)
    answer: dict[str, float] = {}
    for name, tuned in (("before", False), ("after", True)):
        config, base = folder.open(adapter=tuned)
        slot = adapter_slot(config) if tuned else None
        for suffix, examples in (("", rows), ("_without_stop", [_without_stop(r) for r in rows])):
            report = evaluate_loss(base, read_by(in_batches(examples), slot))
            answer[f"{name}{suffix}_reopened"] = report.loss
            answer[f"tokens{suffix}"] = report.count
    return answer


def _without_stop(example: Any) -> Any:
    """The same row with its last token, the end of the response, not counted."""
    trained = example.trained.copy()
    trained[-1] = False
    return replace(example, trained=trained)


if __name__ == "__main__":
    raise SystemExit(main())
