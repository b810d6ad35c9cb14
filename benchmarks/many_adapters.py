"""The same adapters trained one after another and all at once, beside PEFT + bitsandbytes.

    python -m benchmarks.many_adapters                  # all twelve cases; those measured are passed over
    python -m benchmarks.many_adapters --case 2x128     # one of them, again
    python -m benchmarks.many_adapters --again          # all of them, again, each in place of what was

A case is adapters x tokens of a job's step, on a random Llama of hidden size 512 and 4 layers in
NF4. Ways: a `pennyweight train` process for each adapter; one process for all, `exact` and `fast`; a
PEFT + bitsandbytes process for each. Whole processes are timed, imports and loading included, for
that is what a person waits for, and beside that the steps alone; Python's bytecode is there from an
untimed process of each kind. Of those that run one after another two are measured, and count for all.
PEFT begins from the same A and B. A case is told only where `exact` ended with the bits of alone,
`fast` within the bound of law 7 and in shared passes throughout, and the last losses of all ways are
the same within 1e-4; it is appended to results/many_adapters.md as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import circumstances, in_words
from pennyweight.sweep import WORTH_SHARING

RESULTS = Path(__file__).parent / "results" / "many_adapters.md"
ADAPTERS, TOKENS = (2, 4, 8), (128, 512, 2048, 4096)
STEPS = {128: 8, 512: 4, 2048: 2, 4096: 2}
RANK, LAYERS, HIDDEN = 8, 4, 512
MEASURED_ALONE = 2
LOSS_BOUND, WEIGHTS_BOUND = 1e-4, 1e-3
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
ALONE, EXACT, FAST = "one after another", "at once, exact", "at once, fast"
PEER = "PEFT + bitsandbytes, one after another"


@dataclass(frozen=True, slots=True)
class Way:
    """One way of training a case's adapters: seconds of whole processes and of their steps, the
    highest resident bytes, each measured adapter's last loss, how far weights are from alone, and the
    seconds of the steps of each process that was measured."""

    name: str
    seconds: float
    step_seconds: float
    peak_bytes: int
    losses: tuple[float, ...]
    weights_apart: float | None = None
    measured: tuple[float, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="adapters x tokens: 4x128")
    parser.add_argument("--again", action="store_true", help="those measured too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.build is not None:
        _build(asked.build)
        return
    if asked.peer is not None:
        print(json.dumps(_peer(asked.peer)))
        return
    cases = [tuple(map(int, case.split("x"))) for case in asked.case]
    known = asked.results.read_text(encoding="utf-8") if asked.results.is_file() else ""
    if not cases:
        every = [(adapters, tokens) for tokens in TOKENS for adapters in ADAPTERS]
        cases = [case for case in every if asked.again or f"{_title(*case)}\n" not in known]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # Apart, for a child's highest resident bytes are counted from those of whoever begets it.
        _run(["-m", "benchmarks.many_adapters", "--build", str(folder)], folder)
        _alone(folder, min(TOKENS), seeds=1)
        _peers(folder, min(TOKENS), seeds=1)
        alone: dict[int, tuple[Way, Way]] = {}
        for adapters, tokens in cases:
            if tokens not in alone:
                alone[tokens] = _alone(folder, tokens), _peers(folder, tokens)
            ways = _measured(folder, adapters, tokens, *alone[tokens])
            append(adapters, tokens, ways, asked.results)


def _build(folder: Path) -> None:
    """The model, its rows, and the fresh adapters of the seeds that are measured alone."""
    import torch
    from campaigns.small_run import write_rows
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from pennyweight.builtin import model_folder
    from pennyweight.config import BaseConfig, LoraConfig
    from pennyweight.lora import adapter_of, attach, described
    from pennyweight.model import load_base

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
    base = load_base(BaseConfig.model_validate(_described(folder, TOKENS[0])["base"]))
    adapter = LoraConfig.model_validate(_described(folder, TOKENS[0])["adapter"])
    for seed in range(MEASURED_ALONE):
        attach(base, adapter, name=f"seed-{seed}", seed=seed)
        fresh = described(adapter_of(base, f"seed-{seed}", adapter), base)
        fresh.save(_fresh(folder, seed))


def _fresh(folder: Path, seed: int) -> Path:
    return folder / f"fresh-{seed}"


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
            "max_steps": STEPS.get(tokens, 4),
            "tokens_per_step": tokens,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
    }


def _alone(folder: Path, tokens: int, seeds: int = MEASURED_ALONE) -> Way:
    """Seeds 0 and 1, a process each; seconds and peak are those of one, on average and at most."""
    told = []
    for seed in range(seeds):
        path, out = _place(folder, tokens, seed)
        described = _described(folder, tokens) | {"seed": seed, "output_dir": str(out)}
        path.write_text(json.dumps(described))
        shutil.rmtree(out, ignore_errors=True)  # or the run of before would be found finished
        process = _run(["-m", "pennyweight", "train", str(path)], folder)
        told.append(process | {"loss": _last_loss(out), "steps": _step_seconds(out)})
    return _of_one(ALONE, told)


def _peers(folder: Path, tokens: int, seeds: int = MEASURED_ALONE) -> Way:
    told = []
    for seed in range(seeds):
        path, _ = _place(folder, tokens, seed)
        process = _run(["-m", "benchmarks.many_adapters", "--peer", str(path)], folder)
        told.append(process | json.loads(process["said"].splitlines()[-1]))
    return _of_one(PEER, told)


def _place(folder: Path, tokens: int, seed: int) -> tuple[Path, Path]:
    return folder / f"alone-{tokens}-{seed}.yaml", folder / f"alone-{tokens}-{seed}"


def _of_one(name: str, told: Sequence[dict[str, Any]]) -> Way:
    return Way(
        name,
        sum(each["seconds"] for each in told) / len(told),
        sum(each["steps"] for each in told) / len(told),
        max(each["peak"] for each in told),
        tuple(each["loss"] for each in told),
        measured=tuple(each["steps"] for each in told),
    )


def _measured(folder: Path, adapters: int, tokens: int, alone: Way, peer: Way) -> list[Way]:
    """All ways of one case; `alone` and `peer` are of one adapter."""
    at_once = []
    for name, mode in ((EXACT, "exact"), (FAST, "fast")):
        path, out = folder / f"{mode}.yaml", folder / f"{mode}-{adapters}x{tokens}"
        grid = {"grid": {"seed": list(range(adapters))}, "mode": mode}
        described = _described(folder, tokens) | {"output_dir": str(out), "adapters": grid}
        path.write_text(json.dumps(described))
        told = _run(["-m", "pennyweight", "train", str(path)], folder)
        if mode == "fast":
            _require_shared(out, STEPS.get(tokens, 4), 2 * tokens <= WORTH_SHARING["cpu"])
        runs = [out / f"seed-{seed}" for seed in range(adapters)]
        first = range(min(adapters, MEASURED_ALONE))
        apart = max(_apart(runs[seed], _place(folder, tokens, seed)[1]) for seed in first)
        losses = tuple(_last_loss(runs[seed]) for seed in first)
        seconds = sum(map(_step_seconds, runs))
        at_once.append(Way(name, told["seconds"], seconds, told["peak"], losses, apart))
    return [_times(alone, adapters), *at_once, _times(peer, adapters)]


def _times(one: Way, adapters: int) -> Way:
    seconds, steps = adapters * one.seconds, adapters * one.step_seconds
    return replace(one, seconds=seconds, step_seconds=steps)


def _require_shared(sweep: Path, steps: int, worth: bool) -> None:
    """Every step of `fast` shared passes where two of its micro-batches are `worth` sharing one, or
    it would be `exact` under another name; where they are not, none did."""
    made = json.loads((sweep / "adapters.json").read_text(encoding="utf-8"))["shared_passes"]
    if made < steps if worth else made:
        raise SystemExit(f"{sweep.name}: {made} shared passes in {steps} steps")


def _run(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Seconds and highest resident bytes of a process, from the system's own account of it.

    Its bytecode is kept in `folder`, whatever the environment says of bytecode: without, half the
    seconds of a short run are those of Python compiling its libraries.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as aside:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=aside,
            text=True,
        )
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        if status:
            aside.seek(0)
            end = aside.read()[-2000:]
            raise RuntimeError(f"{arguments}: exit {os.waitstatus_to_exitcode(status)}: {end}")
    return {"seconds": time.perf_counter() - began, "peak": used.ru_maxrss * 1024, "said": said}


def _steps_of(run: Path) -> list[dict[str, Any]]:
    from pennyweight.report import read_events

    return [event for event in read_events(run / "events.jsonl") if event["kind"] == "step"]


def _last_loss(run: Path) -> float:
    return float(_steps_of(run)[-1]["loss"])


def _step_seconds(run: Path) -> float:
    return sum(float(step["seconds"]) for step in _steps_of(run))


def _apart(one: Path, other: Path) -> float:
    """Largest difference of a trained weight, against the largest weight of its tensor."""
    from safetensors.torch import load_file

    name = "adapter/adapter_model.safetensors"
    ours, theirs = load_file(one / name), load_file(other / name)
    return max(
        float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in theirs
    )


def _peer(description: Path) -> dict[str, Any]:
    """PEFT and bitsandbytes on the same rows in the same order, from the same A and B.

    A of another draw would do as well, but not as soon: after two steps the losses of two draws are
    2 % apart.
    """
    from peft import PeftModel

    from benchmarks.peft_oracle import four_bit_model, their_curve
    from pennyweight.config import load_run
    from pennyweight.finetune import prepared
    from pennyweight.finetune.learner import micro_batches

    config = load_run(description).config
    data = prepared(config)
    wanted = config.train.max_steps or 0
    steps: list[list[Any]] = []
    epoch = 0
    while len(steps) < wanted:
        batches = micro_batches(config, data.train.lengths, epoch)
        steps += [[data.train[i] for i in batch] for batch in batches]
        epoch += 1
    fresh = _fresh(description.parent, config.seed)
    model: Any = four_bit_model(Path(config.base.model))
    adapted = PeftModel.from_pretrained(model, fresh, is_trainable=True)
    curve = their_curve(adapted, steps[:wanted], learning_rate_at=lambda _: 2e-3, max_grad_norm=1.0)
    return {"loss": curve.losses[-1], "steps": sum(curve.seconds)}


def _title(adapters: int, tokens: int) -> str:
    return f"## {adapters} adapters, {tokens:,} tokens a step"


def append(adapters: int, tokens: int, ways: Sequence[Way], results: Path) -> None:
    """The case's table under what is there, or in place of an earlier one of it; refused where it is
    not the same training."""
    first, lines = ways[0], []
    for way in ways:
        pairs = zip(way.losses, first.losses, strict=True)
        apart = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
        bound = {EXACT: 0.0, FAST: WEIGHTS_BOUND}.get(way.name)
        moved = way.weights_apart
        if apart > LOSS_BOUND or (bound is not None and (moved is None or moved > bound)):
            raise SystemExit(
                f"{way.name}: last losses {way.losses}, alone {first.losses}, weights {moved} apart: "
                "not the same training"
            )
        lines.append(
            f"| {way.name} | {way.seconds:.1f} | {first.seconds / way.seconds:.2f} "
            f"| {way.step_seconds:.1f} | {first.step_seconds / way.step_seconds:.2f} "
            f"| {way.peak_bytes / 1e6:,.0f} | {apart:.1e} | {'' if moved is None else f'{moved:.1e}'} |"
        )
    spread = "; ".join(
        f"{' and '.join(f'{each:.1f}' for each in way.measured)} s ({way.name.split(',')[0]})"
        for way in ways
        if way.measured
    )
    head = [
        "| | seconds in all | times as fast | in steps | times as fast | highest resident MB "
        "| last loss apart | weights apart |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    text = results.read_text(encoding="utf-8") if results.is_file() else "# Many adapters\n"
    before, title, after = text.partition(f"{_title(adapters, tokens)}\n")
    if title:
        _, mark, others = after.partition("\n## ")
        text = before + (mark + others).lstrip("\n")
    made = (
        f"{STEPS.get(tokens, 4)} steps; in each process alone they took {spread}. {in_words(circumstances(PACKAGES))} "
        f"`python -m benchmarks.many_adapters --case {adapters}x{tokens}`"
    )
    body = "\n".join([text.rstrip(), "", _title(adapters, tokens), "", *head, *lines, "", made, ""])
    results.write_text(body, encoding="utf-8")
    print("\n".join([_title(adapters, tokens), *head, *lines]), flush=True)


if __name__ == "__main__":
    main()
