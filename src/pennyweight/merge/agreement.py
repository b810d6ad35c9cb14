"""How close the merged model is to the attached one, on rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.config import BaseConfig
from pennyweight.model import BaseModel, load_base

__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How close two models' logits are on the same rows: largest difference, KL (nats a token), top-1 share."""

    tokens: int
    max_logit_difference: float
    mean_kl: float
    top1_agreement: float


def agreement(
    base: BaseModel, folder: Path | str, rows: Sequence[Sequence[int]], *, name: str | None
) -> Agreement:
    """Compare the attached model's logits with those of a merged folder, on rows of token ids.

    Both compute in the base's type. The merged model stands beside the base on its device, or on
    the CPU where the two do not fit.
    """
    rows = [row for row in rows if len(row)]
    assert rows, "rows of token ids to compare on"
    merged = _resident_beside(base, folder)
    tokens, worst, divergence, agreed = 0, 0.0, 0.0, 0
    for row in rows:
        attached, folded = _logits(base, row, name).cpu(), _logits(merged, row, None).cpu()
        worst = max(worst, float((attached - folded).abs().max()))
        p, q = attached.log_softmax(-1), folded.log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        agreed += int((attached.argmax(-1) == folded.argmax(-1)).sum())
        tokens += len(row)
    return Agreement(tokens, worst, divergence / tokens, agreed / tokens)


def _resident_beside(base: BaseModel, folder: Path | str) -> BaseModel:
    config = BaseConfig.model_validate(
        {
            "model": str(folder),
            "quantization": "none",
            "dtype": str(base.dtype).removeprefix("torch."),
            "device": str(base.device),
        }
    )
    try:
        return load_base(config)
    except torch.OutOfMemoryError:
        return load_base(config.model_copy(update={"device": "cpu"}))


def _logits(model: BaseModel, row: Sequence[int], name: str | None) -> Tensor:
    ids = torch.tensor(list(row), device=model.device)
    positions = torch.arange(len(ids), device=model.device)
    with torch.inference_mode(), model.route.over((0, len(ids)), (name,)):
        return model.logits(model.hidden(ids, positions))
