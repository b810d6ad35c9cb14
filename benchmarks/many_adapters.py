"""The same adapters trained one after another and all at once, beside PEFT + bitsandbytes.

    python -m benchmarks.many_adapters --case 4x128 --case 4x512

A case is adapters x tokens a step, on a random Llama of hidden size 512 and 8 layers in NF4, 8 steps
each. Ways: a `pennyweight train` process for each adapter; one process for all, `exact` and `fast`;
a PEFT + bitsandbytes process for each. Whole processes are timed, imports and loading included, for
that is what a person waits for. Gate: every adapter's last loss is the same in all ways within
2 %. A case is appended to results/many_adapters.md as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import circumstances, in_words

RESULTS = Path(__file__).parent / "results" / "many_adapters.md"
STEPS, RANK, LAYERS, HIDDEN = 8, 8, 8, 512
BOUND = 0.02
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="adapters x tokens: 4x128")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peer is not None:
        print(json.dumps(_peer(asked.peer)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _build(folder)
        for case in asked.case or ["2x128", "4x128", "4x512"]:
            adapters, tokens = map(int, case.split("x"))
            _append(_measured(folder, adapters, tokens), asked.results)


def _build(folder: Path) -> None:
    """The model and its rows."""
    import torch
    from campaigns.small_run import write_rows
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from pennyweight.builtin import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", 2000)


def _described(folder: Path, tokens: int) -> dict[str, Any]:
    return {
        "base": {"model": str(folder / "model"), "quantization": "nf4", "device": "cpu"},
        "adapter": {"r": RANK, "lora_alpha": 16},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "eval_fraction": 0.0,
            "max_length": 64,
            "max_duplicate_share": 1.0,
        },
        "train": {
            "max_steps": STEPS,
            "tokens_per_step": tokens,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
    }


def _measured(folder: Path, adapters: int, tokens: int) -> dict[str, Any]:
    place = folder / f"{adapters}x{tokens}"
    place.mkdir()
    shared = _described(folder, tokens)
    ways: dict[str, Any] = {}
    alone = []
    for seed in range(adapters):
        path = place / f"alone-{seed}.yaml"
        out = place / f"alone-{seed}"
        path.write_text(json.dumps(shared | {"seed": seed, "output_dir": str(out)}))
        alone.append(_run(["-m", "pennyweight", "train", str(path)]) | {"loss": _last_loss(out)})
    ways["one after another"] = alone
    grid = {"grid": {"seed": list(range(adapters))}}
    for mode in ("exact", "fast") if adapters > 1 else ():
        path, out = place / f"{mode}.yaml", place / mode
        described = shared | {"output_dir": str(out), "adapters": grid | {"mode": mode}}
        path.write_text(json.dumps(described))
        told = _run(["-m", "pennyweight", "train", str(path)])
        losses = [_last_loss(out / f"seed-{seed}") for seed in range(adapters)]
        ways[f"at once, {mode}"] = [told | {"loss": losses}]
    peers = []
    for seed in range(adapters):
        told = _run(["-m", "benchmarks.many_adapters", "--peer", str(place / f"alone-{seed}.yaml")])
        peers.append(told | {"loss": json.loads(told["said"].splitlines()[-1])["loss"]})
    ways["PEFT + bitsandbytes, one after another"] = peers
    return {"adapters": adapters, "tokens": tokens, "ways": ways}


def _run(arguments: Sequence[str]) -> dict[str, Any]:
    """Seconds and highest resident bytes of a process, from the system's own account of it."""
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{arguments} ended with {os.waitstatus_to_exitcode(status)}: {said}")
    return {"seconds": time.perf_counter() - began, "peak": used.ru_maxrss * 1024, "said": said}


def _last_loss(run: Path) -> float:
    from pennyweight.report import read_events

    return float([e["loss"] for e in read_events(run / "events.jsonl") if e["kind"] == "step"][-1])


def _peer(description: Path) -> dict[str, Any]:
    """PEFT and bitsandbytes on the same rows in the same order, from the same A and B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from benchmarks.peft_oracle import their_curve
    from pennyweight.config import load_run
    from pennyweight.finetune import prepared
    from pennyweight.finetune.learner import micro_batches

    config = load_run(description).config
    data = prepared(config)
    steps: list[list[Any]] = []
    epoch = 0
    while len(steps) < STEPS:
        batches = micro_batches(config, data.train.lengths, epoch)
        steps += [[data.train[i] for i in batch] for batch in batches]
        epoch += 1
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        config.base.model, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    torch.manual_seed(config.seed)
    adapted = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    curve = their_curve(adapted, steps[:STEPS], learning_rate_at=lambda _: 2e-3, max_grad_norm=1.0)
    return {"loss": curve.losses[-1]}


def _append(found: dict[str, Any], results: Path) -> None:
    """The case's table under what is there; refused where the losses are not the same."""
    ways, lines = found["ways"], []
    first = [each["loss"] for each in ways["one after another"]]
    slow = sum(each["seconds"] for each in ways["one after another"])
    for way, runs in ways.items():
        losses = [
            x for e in runs for x in (e["loss"] if isinstance(e["loss"], list) else [e["loss"]])
        ]
        apart = max(abs(a - b) / b for a, b in zip(losses, first, strict=True))
        if apart > BOUND:
            raise SystemExit(f"{way}: last losses {losses}, alone {first}: not the same training")
        seconds, peak = sum(e["seconds"] for e in runs), max(e["peak"] for e in runs)
        lines.append(
            f"| {way} | {seconds:.1f} | {slow / seconds:.2f} | {peak / 1e6:,.0f} | {apart:.1e} |"
        )
    title = f"## {found['adapters']} adapters, {found['tokens']:,} tokens a step"
    head = ["| | seconds in all | times as fast | highest resident MB | losses apart |"]
    head += ["|---|---:|---:|---:|---:|"]
    text = results.read_text(encoding="utf-8") if results.is_file() else "# Many adapters\n"
    made = f"{in_words(circumstances(PACKAGES))} `python -m benchmarks.many_adapters`"
    body = "\n".join([text.rstrip(), "", title, "", *head, *lines, "", made, ""])
    results.write_text(body, encoding="utf-8")
    print("\n".join([title, *head, *lines]), flush=True)


if __name__ == "__main__":
    main()
