"""The peer: PEFT, with bitsandbytes under QLoRA, trained by a plain loop on the same rows.

Rows are padded at the right to the longest of their batch; the loss of a step is summed over its
response tokens and divided once.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pennyweight.data.conversation import Example

__all__ = [
    "Curve",
    "dense_model",
    "four_bit_model",
    "four_bit_weights",
    "padded",
    "their_curve",
    "their_loss",
    "with_adapter",
]

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Curve:
    """Loss of each step in nats per trained token; what the steps took, padding included in
    `positions` and not in `tokens`."""

    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    tokens: int
    positions: int


def dense_model(folder: Path, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """The model in float32, its linear weights replaced by `weights` where given."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        for path, weight in (weights or {}).items():
            model.get_submodule(path).weight.copy_(weight)
    return model


def four_bit_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model as bitsandbytes holds it: NF4 with double quantization, products and the rest in
    `dtype`."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=settings, device_map="cpu"
    )


def four_bit_weights(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each 4-bit layer: the weight its codes and scales stand for, and what bitsandbytes'
    kernel for this processor makes of them.

    The first is the definition in plain torch (QLoRA, equations 5 and 6), from bitsandbytes' own
    codes, levels and scales.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    found = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        stored: Any = layer.weight
        state = stored.quant_state
        nested = state.state2
        scales = nested.code[state.absmax.long()]
        blocks = nested.absmax.repeat_interleave(nested.blocksize)[: scales.numel()]
        scales = scales * blocks + state.offset
        packed = stored.data.flatten().view(torch.uint8)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
        codes = codes[: state.shape.numel()]
        each = scales.repeat_interleave(state.blocksize)[: codes.numel()]
        defined = (state.code[codes] * each).reshape(state.shape)
        found[path] = (defined, dequantize_4bit(stored.data, state))
    return found


def with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    """The same model, copied, with the saved adapter beside it, ready to train."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which are not adapted here
        return PeftModel.from_pretrained(copy.deepcopy(model), adapter, is_trainable=True)


def their_curve(
    model: nn.Module,
    steps: Sequence[Sequence[Example]],
    *,
    learning_rate_at: Callable[[int], float],
    max_grad_norm: float,
) -> Curve:
    """Train what `model` lets train, one optimizer step for each batch of rows."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    model.train()
    losses, seconds, tokens, positions = [], [], 0, 0
    for number, rows in enumerate(steps):
        began = time.perf_counter()
        ids, mask, labels = padded(rows)
        total, count = _summed_loss(model, ids, mask, labels)
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(number)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        tokens, positions = tokens + int(mask.sum()), positions + mask.numel()
    return Curve(tuple(losses), tuple(seconds), tokens, positions)


def their_loss(model: nn.Module, rows: Sequence[Example]) -> float:
    """Nats per trained token of rows, sixteen at a time.

    In training mode, which without dropout is the same arithmetic: in evaluation mode bitsandbytes
    repacks weights for bfloat16 products, and refuses layers whose size is no multiple of 32.
    """
    model.train()
    sums = []
    for start in range(0, len(rows), 16):
        total, count = _summed_loss(model, *padded(rows[start : start + 16]))
        sums.append((total.item(), count))
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _summed_loss(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    wanted = labels[:, 1:]
    total = F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total, int((wanted != IGNORED).sum())


def padded(rows: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels, each int64 `[rows, longest]`; label -100 is not trained."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        length = len(row.ids)
        ids[number, :length] = torch.from_numpy(row.ids.astype("int64"))
        mask[number, :length] = 1
        kept = torch.from_numpy(row.trained.copy())
        labels[number, :length][kept] = ids[number, :length][kept]
    return ids, mask, labels
