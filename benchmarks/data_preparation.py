"""Alpaca-like rows from a file to packed, masked tokens: this project and TRL's SFTTrainer in turn.

    python -m benchmarks.data_preparation [--rows 50000] [--rounds 3] [--tokenizer FOLDER]

Rows are sentences of Python's own manual, drawn by a seed. TRL gets them already as conversational
prompt and completion, in two processes and as it does by default, and the quicker of these counts;
here they are read as Alpaca rows, hashed, rendered, checked row by row and stored as well. Both begin with an empty cache. The gate: of 300
rows, the ids here are TRL's without what its template prints after the stop token, and the same of
them are trained.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.in_turn import Answer, ask, median, peak_bytes, spread, turns
from benchmarks.machine import circumstances, in_words

__all__ = ["gate", "main", "write_rows"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("pennyweight", "trl", "datasets", "transformers", "tokenizers", "torch")
LENGTH = 1024
GATE_ROWS = 300
SIDES = {
    "Pennyweight": ("ours",),
    "TRL, 2 processes": ("trl", "--processes", "2"),
    "TRL, as it comes": ("trl",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure in turn and write the page; exit code 1 where the gate or a side failed."""
    asked = _parser().parse_args(arguments)
    if asked.side:
        print(json.dumps(_measured(asked)))
        return 0
    asked.results.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "rows": asked.rows,
        "length": LENGTH,
        "tokenizer": asked.tokenizer or "builtin",
        "circumstances": circumstances(PACKAGES),
        "sides": {name: [] for name in SIDES},
        "a_tenth_of_the_rows": None,
        "notes": [],
    }
    with tempfile.TemporaryDirectory() as work:
        facts["gate"] = gate(Path(work), asked.tokenizer)
        print(f"gate: {facts['gate'] or 'open'}", flush=True)
        if not facts["gate"]:
            _in_turn(asked, Path(work), facts)
    print(_written(asked.results, facts))
    failed = any(run["fault"] for side in facts["sides"].values() for run in side)
    return 1 if facts["gate"] or failed else 0


def write_rows(folder: Path, count: int, *, seed: int = 0) -> tuple[Path, Path]:
    """The rows as Alpaca, and as TRL takes them: conversational prompt and completion."""
    draw, texts = random.Random(seed), _sentences()
    alpaca, conversational = folder / f"alpaca-{count}.jsonl", folder / f"trl-{count}.jsonl"
    with alpaca.open("w") as ours, conversational.open("w") as theirs:
        for number in range(count):
            words = draw.choice(texts).split()[: draw.randint(6, 16)]
            row = {
                "instruction": f"{' '.join(words)} ({number})",
                "input": draw.choice(texts) if draw.random() < 0.4 else "",
                "output": " ".join(
                    draw.choice(texts) for _ in range(max(1, int(draw.lognormvariate(0.8, 0.7))))
                ),
            }
            ours.write(json.dumps(row) + "\n")
            question = (
                f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
            )
            pair = {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
            theirs.write(json.dumps(pair) + "\n")
    return alpaca, conversational


def gate(folder: Path, tokenizer: str) -> str:
    """Why the two sides do not make the same tokens; empty where they do."""
    write_rows(folder, GATE_ROWS)
    words = ["--rows", str(GATE_ROWS), "--work", str(folder), "--tokenizer", tokenizer, "--ids"]
    ours, theirs = (
        ask("benchmarks.data_preparation", ["--side", side, *words], timeout_s=300)
        for side in ("ours", "trl")
    )
    if ours.fault or theirs.fault:
        return ours.fault or theirs.fault
    pairs = list(zip(ours.said["examples"], theirs.said["examples"], strict=True))
    for number, ((ids, trained), (their_ids, their_trained)) in enumerate(pairs):
        length = len(ids)
        if their_ids[:length] != ids or their_trained[:length] != trained:
            return f"row {number + 1}: other ids or another mask"
        if len(their_ids) - length > 1:
            return f"row {number + 1}: {len(their_ids) - length} more tokens in TRL's"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_preparation")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--tokenizer", default="", help="a folder; default the built-in model's")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds of one process")
    parser.add_argument("--seconds", type=float, default=600.0, help="of all that is measured")
    for word in ("--side", "--work"):
        parser.add_argument(word, default="", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--ids", action="store_true", help=argparse.SUPPRESS)
    return parser


def _in_turn(asked: argparse.Namespace, folder: Path, facts: dict[str, Any]) -> None:
    until, took = time.monotonic() + asked.seconds, dict.fromkeys(SIDES, 0.0)
    write_rows(folder, asked.rows)
    few = _ask(asked, "ours", folder=folder, rows=asked.rows // 10)
    facts["a_tenth_of_the_rows"] = _values(few)
    for name in turns(list(SIDES), asked.rounds):
        if until - time.monotonic() < 1.1 * took[name]:
            facts["notes"].append(f"no time for one more process of {name}")
            continue
        answer = _ask(asked, *SIDES[name], folder=folder, rows=asked.rows)
        took[name] = answer.seconds
        facts["sides"][name].append(_values(answer))
        said = answer.fault or f"{answer.said['seconds']:.2f} s, {answer.peak_bytes / 1e6:,.0f} MB"
        print(f"{name:18} {said}", flush=True)
        _written(asked.results, facts)


def _written(folder: Path, facts: dict[str, Any]) -> str:
    (folder / "data_preparation.json").write_text(json.dumps(facts, indent=1) + "\n")
    page = _page(facts)
    (folder / "data_preparation.md").write_text(page)
    return page


def _ask(asked: argparse.Namespace, side: str, *words: str, folder: Path, rows: int) -> Answer:
    if not (folder / f"alpaca-{rows}.jsonl").exists():
        write_rows(folder, rows)
    told = ["--side", side, *words, "--rows", str(rows), "--work", str(folder)]
    told += ["--tokenizer", asked.tokenizer]
    return ask("benchmarks.data_preparation", told, timeout_s=asked.timeout)


def _values(answer: Answer) -> dict[str, Any]:
    return {**answer.said, "tree_bytes": answer.peak_bytes, "fault": answer.fault}


def _measured(asked: argparse.Namespace) -> dict[str, Any]:
    """In the child: one preparation, from the file to packed tokens."""
    work, name = Path(asked.work), asked.tokenizer
    tokenizer = _tokenizer(name)
    with tempfile.TemporaryDirectory(dir=work) as cache:
        if asked.side == "ours":
            return _ours(work / f"alpaca-{asked.rows}.jsonl", tokenizer, Path(cache), ids=asked.ids)
        rows = work / f"trl-{asked.rows}.jsonl"
        return _theirs(rows, tokenizer, Path(cache), processes=asked.processes, ids=asked.ids)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from pennyweight.builtin import model_folder
    from pennyweight.data.surface import TURNS

    tokenizer = AutoTokenizer.from_pretrained(name or model_folder())
    if not tokenizer.chat_template:
        tokenizer.chat_template = TURNS
    return tokenizer


def _ours(rows: Path, tokenizer: Any, cache: Path, *, ids: bool) -> dict[str, Any]:
    from pennyweight.config import DataConfig
    from pennyweight.data.batch import order
    from pennyweight.data.prepare import prepare

    config = DataConfig(
        train=str(rows), max_length=LENGTH, eval_fraction=0, max_duplicate_share=1.0
    )
    before, began = peak_bytes(), time.perf_counter()
    prepared = prepare(config, tokenizer, seed=0, cache_dir=cache)
    lengths = prepared.train.lengths
    batches = order(lengths, seed=0, epoch=0, budget_tokens=LENGTH, rows=None)
    seconds = time.perf_counter() - began
    if ids:
        return {"examples": [[e.ids.tolist(), e.trained.tolist()] for e in prepared.train]}
    return {
        "seconds": seconds,
        "tokens": int(lengths.sum()),
        "trained_tokens": prepared.train.trained_tokens,
        "batches": len(batches),
        "before_bytes": before,
        "peak_bytes": peak_bytes(),
    }


def _theirs(
    rows: Path, tokenizer: Any, cache: Path, *, processes: int | None, ids: bool
) -> dict[str, Any]:
    import datasets
    import torch
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, vocab_size=len(tokenizer),
        )
    )  # fmt: skip
    settings = SFTConfig(
        output_dir=str(cache / "out"), max_length=LENGTH, packing=not ids, use_cpu=True, bf16=False,
        dataset_num_proc=processes, report_to="none",
    )  # fmt: skip
    before, began = peak_bytes(), time.perf_counter()
    loaded = load_dataset(
        "json", data_files=str(rows), split="train", cache_dir=str(cache / "datasets")
    )
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=loaded, processing_class=tokenizer
    )
    seconds, packed = time.perf_counter() - began, trainer.train_dataset
    if ids:
        return {
            "examples": [
                [row["input_ids"], [label != -100 for label in row["labels"]]] for row in packed
            ]
        }
    tokens = trained = 0
    for batch in packed.with_format("arrow").iter(1000):
        tokens += len(batch["input_ids"].combine_chunks().flatten())
        labels = batch["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        trained += int((torch.tensor(labels) != -100).sum())
    return {
        "seconds": seconds,
        "tokens": tokens,
        "trained_tokens": trained,
        "batches": len(packed),
        "before_bytes": before,
        "peak_bytes": peak_bytes(),
    }


def _sentences() -> list[str]:
    from pydoc_data.topics import topics

    text = re.sub(r"\s+", " ", " ".join(topics.values()))
    return [s for s in re.split(r"(?<=[.!?])\s+", text) if 20 <= len(s) <= 300]


def _page(facts: dict[str, Any]) -> str:
    lines = ["# Data preparation", "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    if facts["gate"]:
        lines += [f"The gate is shut, so nothing was measured: {facts['gate']}", ""]
    else:
        lines += _table(facts)
    lines += [f"- {note}" for note in facts["notes"]] + [""] * bool(facts["notes"])
    return "\n".join([*lines, in_words(facts["circumstances"]), ""])


def _table(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{facts['rows']:,} rows, at most {LENGTH:,} tokens each and packed to {LENGTH:,}; median of "
        "the processes and half their spread. Memory: what the process held more at its peak than "
        "before it began, and at the peak of all its processes together.",
        "",
        "| | s | rows/s | against TRL's best | tokens | trained | added MB | all processes MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    medians = {
        name: median([run["seconds"] for run in runs if not run["fault"]])
        for name, runs in facts["sides"].items()
        if any(not run["fault"] for run in runs)
    }
    best = min((s for name, s in medians.items() if name.startswith("TRL")), default=float("nan"))
    for name, seconds in medians.items():
        runs = [run for run in facts["sides"][name] if not run["fault"]]
        added = median([run["peak_bytes"] - run["before_bytes"] for run in runs])
        tree = median([run["tree_bytes"] for run in runs])
        ratio = f"{best / seconds:.2f} x" if name == "Pennyweight" else ""
        apart = spread([run["seconds"] for run in runs])
        lines.append(
            f"| {name} | {seconds:.2f} ± {apart:.0%} | {facts['rows'] / seconds:,.0f} | {ratio} "
            f"| {runs[0]['tokens']:,} | {runs[0]['trained_tokens']:,} | {added / 1e6:,.0f} "
            f"| {tree / 1e6:,.0f} |"
        )
    few = facts["a_tenth_of_the_rows"]
    if few and not few["fault"]:
        added = (few["peak_bytes"] - few["before_bytes"]) / 1e6
        lines += ["", f"With a tenth of the rows this project adds {added:,.0f} MB."]
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
