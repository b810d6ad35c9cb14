"""Loss curves beside PEFT + bitsandbytes: same rows in the same order, same initial A and B.

    python -m benchmarks.parity_peft --data PATH [--steps 200] [--quantization none nf4]

Training magnifies rounding, so no two programs agree to the last bit. How far apart equal
arithmetic drifts is measured on PEFT itself: with the rows of each batch in reverse, and in
float64. Weights of QLoRA are compared layer by layer first.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.e2e import described_run, write_first_references
from benchmarks.parity_report import KERNEL_ROUNDING, Side, WeightCheck, write
from benchmarks.peft_oracle import (
    Curve,
    dense_model,
    four_bit_model,
    four_bit_weights,
    padded,
    their_curve,
    their_loss,
    with_adapter,
)
from pennyweight.config import RunConfig
from pennyweight.data.batch import collate, order
from pennyweight.data.conversation import Example
from pennyweight.data.prepare import prepare
from pennyweight.evaluate import evaluate_loss, in_batches
from pennyweight.lora import adapter_of, attach, described, trained_parameters
from pennyweight.model import BaseModel, load_base
from pennyweight.optim import adamw, lr_at
from pennyweight.quant import QuantizedLinear
from pennyweight.train import Trainee

__all__ = ["batches_of", "main", "our_curve", "save_fresh_adapter"]

RESULTS = Path(__file__).parent / "results"
METHODS = {"none": "lora", "nf4": "qlora"}
Rows = Sequence[Sequence[Example]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare each quantization asked for, then write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity_peft")
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and sft/")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quantization", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        write_first_references(asked.data, Path(work))
        sides = [_compare(q, asked.data, Path(work), asked.steps) for q in asked.quantization]
    write(sides, asked.results)
    return 0


def batches_of(examples: Sequence[Example], *, seed: int, rows: int, steps: int) -> Rows:
    """The rows of each step, as a run with this seed takes them, epoch after epoch."""
    lengths = [len(example.ids) for example in examples]
    taken: list[tuple[int, ...]] = []
    epoch = 0
    while len(taken) < steps:
        taken += order(lengths, seed=seed, epoch=epoch, budget_tokens=None, rows=rows)
        epoch += 1
    return [[examples[index] for index in batch] for batch in taken[:steps]]


def our_curve(
    base: BaseModel,
    steps: Rows,
    *,
    learning_rate_at: Callable[[int], float],
    max_grad_norm: float,
) -> Curve:
    """Train the attached adapter `default`, one optimizer step for each batch of rows."""
    parameters = trained_parameters(base, "default")
    trainee = Trainee(
        base,
        parameters,
        adamw(parameters),
        learning_rate_at=learning_rate_at,
        max_grad_norm=max_grad_norm,
    )
    taken = []
    for rows in steps:
        trainee.forward_backward(collate(rows))
        taken.append(trainee.optim_step())
    tokens = sum(step.tokens for step in taken)
    return Curve(
        tuple(step.loss for step in taken), tuple(step.seconds for step in taken), tokens, tokens
    )


def save_fresh_adapter(base: BaseModel, config: RunConfig, folder: Path) -> Path:
    """Attach a fresh adapter as a run does, and write it down for PEFT."""
    attach(base, config.adapter, seed=config.seed)
    return described(adapter_of(base, "default", config.adapter), base).save(folder)


def _compare(quantization: str, data: Path, work: Path, steps: int) -> Side:
    config = described_run(METHODS[quantization], data, work, seed=0).config
    base = load_base(config.base)
    prepared = prepare(
        config.data, base.tokenizer, seed=0, stop_id=base.stop_ids[0], cache_dir=work / "cache"
    )
    rows = batches_of(prepared.train, seed=0, rows=config.train.batch_size, steps=steps)
    assert config.train.learning_rate is not None
    assert config.train.max_grad_norm is not None
    settings: dict[str, Any] = {
        "learning_rate_at": partial(
            lr_at,
            peak=config.train.learning_rate,
            total_steps=steps,
            warmup_steps=min(config.train.warmup_steps or 0, steps // 2),
            kind=config.train.lr_scheduler_type,
        ),
        "max_grad_norm": config.train.max_grad_norm,
    }
    adapter = save_fresh_adapter(base, config, work / quantization)
    folder = Path(config.base.model)
    model, dense, checks = _peers(quantization, folder, base)
    theirs, exact = partial(with_adapter, model, adapter), partial(with_adapter, dense, adapter)
    curves = {
        "Pennyweight": our_curve(base, rows, **settings),
        "PEFT": their_curve(tuned := theirs(), rows, **settings),
        "PEFT, rows of each batch reversed": their_curve(
            theirs(), [batch[::-1] for batch in rows], **settings
        ),
        "PEFT in float64": their_curve(exact().double(), rows, **settings),
    }
    held = list(prepared.eval)
    after = evaluate_loss(base, in_batches(held)).loss, their_loss(tuned, held)
    first = _first_logits(base, theirs(), rows[0])
    return Side(quantization, steps, curves, checks, first, after)


def _peers(
    quantization: str, folder: Path, base: BaseModel
) -> tuple[nn.Module, nn.Module, list[WeightCheck]]:
    """The peer's base as it is used, the same held dense, and what was found of its weights.

    bitsandbytes' kernel for AVX-512 takes wrong scales for some shapes; where it does, the peer is
    the dense model, for the comparison is of training, not of that.
    """
    if quantization == "none":
        dense = dense_model(folder)
        return dense, dense, []
    native = four_bit_model(folder)
    pairs = four_bit_weights(native)
    checks = [_check(base, path, *pair) for path, pair in pairs.items()]
    dense = dense_model(folder, {path: defined for path, (defined, _) in pairs.items()})
    right = all(check.kernel_apart <= KERNEL_ROUNDING for check in checks)
    return native if right else dense, dense, checks


def _check(base: BaseModel, path: str, defined: torch.Tensor, kernel: torch.Tensor) -> WeightCheck:
    """Our dequantized weight of a layer against bitsandbytes' stored one, and its own kernel's."""
    layer = base.module.get_submodule(path).base_layer
    assert isinstance(layer, QuantizedLinear)
    apart = (kernel.float() - defined).abs()
    return WeightCheck(
        path=path,
        shape=(defined.shape[0], defined.shape[1]),
        equal=torch.equal(layer.dequantize(torch.float32), defined),
        kernel_wrong=float((apart > 0).float().mean()),
        kernel_apart=float(apart.max() / defined.abs().max()),
    )


def _first_logits(base: BaseModel, model: nn.Module, rows: Sequence[Example]) -> float:
    """Largest difference of a logit on the first batch, as a share of the largest logit.

    `base` has been trained by now; the fresh adapter changes nothing, so the bare base is read.
    """
    batch = collate(rows, None)
    ids, mask, _ = padded(rows)
    with torch.inference_mode(), base.route.over(batch.boundaries, batch.adapters):
        ours = base.logits(base.hidden(batch.ids, batch.positions))
    theirs = model.train()(input_ids=ids, attention_mask=mask).logits[mask.bool()].detach()
    return float((ours - theirs).abs().max() / theirs.abs().max())


if __name__ == "__main__":
    raise SystemExit(main())
