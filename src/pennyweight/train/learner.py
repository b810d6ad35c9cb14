"""What learns as a description has it: its optimizer, schedule, clip norm and seed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pennyweight.config import TrainConfig
from pennyweight.model import BaseModel
from pennyweight.optim import adamw, lr_at
from pennyweight.train.recompute import Recompute
from pennyweight.train.trainee import Trainee

__all__ = ["learner", "warmup_steps"]


def warmup_steps(train: TrainConfig, total_steps: int) -> int:
    """Steps of linear warm-up: as many as given, else a share of all."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return round(train.warmup_ratio * total_steps)


def learner(
    base: BaseModel,
    parameters: Mapping[str, nn.Parameter],
    train: TrainConfig,
    *,
    total_steps: int,
    seed: int = 0,
    loraplus_lr_ratio: float | None = None,
    resident_bytes: int | None = None,
    recompute: Recompute = "none",
    recomputed_layers: int | None = None,
) -> Trainee:
    """These parameters with all of their own that `train` describes; its learning rate is given."""
    assert train.learning_rate is not None, "resolve() fills it"
    warmup = warmup_steps(train, total_steps)
    peak, kind, floor = train.learning_rate, train.lr_scheduler_type, train.min_lr_ratio
    return Trainee(
        base,
        parameters,
        adamw(
            parameters,
            weight_decay=train.weight_decay,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            loraplus_lr_ratio=loraplus_lr_ratio,
            kind=train.optim,
            resident_bytes=resident_bytes,
        ),
        learning_rate_at=lambda step: lr_at(
            step,
            peak=peak,
            total_steps=total_steps,
            warmup_steps=warmup,
            kind=kind,
            min_ratio=floor,
        ),
        max_grad_norm=train.max_grad_norm,
        seed=seed,
        recompute=recompute,
        recomputed_layers=recomputed_layers,
    )
