"""Memory by part and by moment: the peak is the fullest of loading, loss, backward and step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pennyweight.plan.activations import kept_bytes, rebuilt_bytes, transient_bytes
from pennyweight.plan.setting import Recompute, Setting

__all__ = ["Moment", "Part", "held_weights", "parts", "peak", "peak_bytes"]

Moment = Literal["load", "loss", "backward", "step"]
ALWAYS: tuple[Moment, ...] = get_args(Moment)
TRAINING: tuple[Moment, ...] = ("loss", "backward", "step")
PASS: tuple[Moment, ...] = ("loss", "backward")

CHUNK_TOKENS = 1024
MIB = 2**20
# Resident before a model is: interpreter, torch, transformers (measured on Linux); context and
# cuBLAS workspaces on a card.
PROCESS_BYTES = {"cpu": 520 * MIB, "cuda": 600 * MIB, "mps": 520 * MIB}


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes held for one purpose, and when. `allocated` is False for what no tensor accounts for."""

    name: str
    bytes: int
    note: str = ""
    moments: tuple[Moment, ...] = ALWAYS
    allocated: bool = True


def held_weights(setting: Setting) -> tuple[int, int]:
    """Bytes of the linear weights as stored, and of everything else in the base."""
    linear = other = 0
    for parameter in setting.shapes.parameters:
        if parameter.tied_to:
            continue
        if parameter.kind == "linear" and setting.storage != "none":
            from pennyweight.quant import storage_bytes

            linear += storage_bytes(
                parameter.shape, setting.storage, setting.config.base.double_quantization
            )
        elif parameter.kind == "linear":
            linear += parameter.elements * setting.weight_bytes
        else:
            other += parameter.elements * setting.weight_bytes
    return linear, other


def parts(setting: Setting, policy: Recompute) -> tuple[Part, ...]:
    """Every part of the memory that a run under this recompute policy takes."""
    tokens = setting.micro_tokens
    linear, other = held_weights(setting)
    trained = setting.trained_elements
    return (
        Part("linear weights", linear, _stored_as(setting)),
        Part("embeddings, head, norms", other, setting.dtype if not setting.full else "float32"),
        *_while_loading(setting),
        *_trained(setting, trained),
        Part(
            "activations",
            math.ceil(kept_bytes(setting, policy) * tokens),
            f"{tokens:,} tokens, recompute {policy}",
            PASS,
        ),
        Part("loss", _loss_bytes(setting), "one chunk of logits, gradient of hidden", ("loss",)),
        Part(
            "backward",
            math.ceil((rebuilt_bytes(setting, policy) + transient_bytes(setting)) * tokens),
            "one layer's gradients" + ("" if policy == "none" else " and recomputed tensors"),
            ("backward",),
        ),
        *_dense_copies(setting),
        Part("process", PROCESS_BYTES[setting.device.kind], "interpreter, torch, kernels", ALWAYS, False),
    )


def peak(rows: Iterable[Part], *, allocated: bool = False) -> tuple[int, Moment]:
    """The fullest moment and its bytes; with `allocated` tensors alone, as a card counts them."""
    held: Sequence[Part] = [r for r in rows if r.allocated or not allocated]
    sums = {moment: sum(r.bytes for r in held if moment in r.moments) for moment in ALWAYS}
    fullest = max(ALWAYS, key=lambda moment: sums[moment])
    return sums[fullest], fullest


def peak_bytes(setting: Setting, policy: Recompute) -> int:
    """Bytes at the fullest moment, the process included."""
    return peak(parts(setting, policy))[0]


def _stored_as(setting: Setting) -> str:
    if setting.storage == "none":
        return "float32" if setting.full else setting.dtype
    nested = setting.config.base.double_quantization and setting.storage in ("nf4", "fp4")
    return f"{setting.storage}{' + double quantization' if nested else ''}"


def _while_loading(setting: Setting) -> tuple[Part, ...]:
    """One weight in full beside the quantized ones while it is turned."""
    if setting.storage == "none":
        return ()
    largest = max((p.elements for p in setting.shapes.linears), default=0)
    return (Part("quantizing", largest * 4 * 3, "one weight at a time", ("load",)),)


def _trained(setting: Setting, trained: int) -> tuple[Part, ...]:
    master = () if setting.full else (Part("adapter", 4 * trained, "float32"),)
    copies = (
        (Part("16-bit copies", 2 * trained, f"{setting.dtype} for the products", PASS),)
        if setting.mixed
        else ()
    )
    return (
        *master,
        *copies,
        Part("gradients", 4 * trained, "float32", TRAINING),
        Part("optimizer", 8 * trained, "AdamW's two moments, float32", TRAINING),
    )


def _loss_bytes(setting: Setting) -> int:
    shapes, tokens = setting.shapes, setting.micro_tokens
    chunk = min(CHUNK_TOKENS, tokens) * shapes.vocab * 4 * 2
    return chunk + tokens * shapes.hidden * 4


def _dense_copies(setting: Setting) -> tuple[Part, ...]:
    """The weight that is being multiplied, dense for as long as its product takes."""
    if setting.storage == "none":
        return ()
    largest = max((p.elements for p in setting.shapes.linears), default=0)
    size = largest * setting.product_bytes
    return (Part("dequantization", size, "the largest weight, dense", PASS),)
