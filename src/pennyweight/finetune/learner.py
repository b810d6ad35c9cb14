"""What learns, in what order and by what steps: a description's trainee, and its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from pennyweight.config import RunConfig
from pennyweight.data.batch import order
from pennyweight.errors import ConfigError
from pennyweight.lora import attach, trained_parameters
from pennyweight.model import BaseModel
from pennyweight.plan import Plan
from pennyweight.train import Trainee, learner, warmup_steps

__all__ = [
    "budget_tokens",
    "micro_batches",
    "require_this_base",
    "trainee",
    "warmup_steps",
    "what_learns",
]


def require_this_base(config: RunConfig, base: BaseModel) -> None:
    """ConfigError where a resident base is not the one that `config`, resolved, describes, or the
    run would change it under whoever else reads it."""
    asked = config.base
    faults = [
        f"{key}: the run asks for {wanted}, the resident base is {found}; change it, or run alone"
        for key, wanted, found in (
            ("base.model", asked.model, base.name),
            ("base.quantization", asked.quantization, base.quantization),
            ("base.dtype", asked.dtype, str(base.dtype).removeprefix("torch.")),
        )
        if wanted not in ("auto", found)
    ]
    if config.train.method == "full":
        faults.insert(
            0,
            "train.method: full changes the base itself, which others read; set it to lora or "
            "qlora, or run alone",
        )
    if faults:
        raise ConfigError.all(faults)


def micro_batches(config: RunConfig, lengths: np.ndarray, epoch: int) -> list[tuple[int, ...]]:
    """The epoch's micro-batches as indices of examples; a pure function of lengths, seed and epoch."""
    budget = budget_tokens(config)
    return order(
        lengths,
        seed=config.seed,
        epoch=epoch,
        budget_tokens=budget,
        rows=config.train.batch_size if budget is None else None,
    )


def budget_tokens(config: RunConfig) -> int | None:
    """Tokens that a micro-batch is packed to; None where it is a fixed number of rows."""
    train = config.train
    if not config.data.packing:
        return None
    if train.tokens_per_step is not None:
        return max(1, train.tokens_per_step // train.gradient_accumulation_steps)
    return train.batch_size * config.data.max_length


def what_learns(
    base: BaseModel, config: RunConfig, name: str = "default"
) -> dict[str, nn.Parameter]:
    """Parameters by name: those of a fresh adapter, attached as `name`, or the whole model's."""
    if config.train.method != "full":
        attach(base, config.adapter, name=name, seed=config.seed)
        return trained_parameters(base, name)
    if base.quantization != "none":
        raise ConfigError("train.method full needs base.quantization none")
    return {name: p for name, p in base.module.named_parameters() if p.requires_grad}


def trainee(
    base: BaseModel,
    config: RunConfig,
    parameters: Mapping[str, nn.Parameter],
    total_steps: int,
    predicted: Plan | None = None,
) -> Trainee:
    """These parameters with the optimizer, schedule and clip norm that `config`, resolved, describes."""
    return learner(
        base,
        parameters,
        config.train,
        total_steps=total_steps,
        seed=config.seed,
        loraplus_lr_ratio=config.adapter.loraplus_lr_ratio,
        resident_bytes=0 if predicted is not None and predicted.optimizer_on_host else None,
        recompute="none" if predicted is None else predicted.recompute,
        recomputed_layers=None if predicted is None else predicted.recomputed_layers,
    )
