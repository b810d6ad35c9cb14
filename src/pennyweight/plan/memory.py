"""Memory by part and by moment: the peak is the fullest of loading, loss, backward and step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pennyweight.allocator import TUNABLES, glibc, tuned
from pennyweight.plan.activations import kept_bytes, largest_linear, transient_bytes
from pennyweight.plan.setting import Recompute, Setting

__all__ = [
    "FIRST_USE_BYTES",
    "Moment",
    "Part",
    "base_bytes",
    "beside",
    "parts",
    "peak",
    "peak_bytes",
    "recompute_in_words",
]

Moment = Literal["load", "loss", "backward", "step"]
# Parts of the base and the process, and what a run holds beside them also between its passes.
_OF_THE_BASE = ("linear weights", "embeddings, head, norms", "process")
_STANDING = ("adapter", "gradients", "optimizer")
ALWAYS: tuple[Moment, ...] = get_args(Moment)
TRAINING: tuple[Moment, ...] = ("loss", "backward", "step")
PASS: tuple[Moment, ...] = ("loss", "backward")

MIB = 2**20
# Bytes of one chunk of float32 logits; the same as in `pennyweight.loss`.
CHUNK_BYTES = {"cpu": 64 * MIB}
CHUNK_BYTES_DEVICE = 512 * MIB
CHUNK_BYTES_SPARING = 128 * MIB
CHUNK_BYTES_CACHED = 4 * MIB
LEAST_CACHED_ROWS = 256
# A page of optimizer state; the same as in `pennyweight.optim`.
PAGE_BYTES = 32 * MIB
# Freed blocks that glibc 2.36 holds at the peak where it was left as it is, as a share of what a
# pass keeps without recompute: with adapters 0.5 to 1.1, recomputing 0.7 to 0.8, in full 0.3.
_UNTUNED = 0.8
_UNTUNED_RECOMPUTING = 0.75
_UNTUNED_IN_FULL = 0.3
# Under its tunables: rows of hidden width that a layer leaves, 2 to 8 by shape and by chance.
_LEFT_BY_A_LAYER = 5.5
_LEFT_RECOMPUTING = 7
# glibc maps larger blocks for themselves, and gives them back.
_LARGEST_KEPT = 32 * MIB
# Resident beside all tensors: interpreter, torch, transformers, threads (440 to 520 MiB on Linux,
# by how much of the libraries the kernel has mapped); context and cuBLAS workspaces on a card.
# What libraries take of a process once a run uses them, beside what they took when imported:
# kernels, threads, model classes, tokenizer, the index of rows.
FIRST_USE_BYTES = 64 * MIB
PROCESS_BYTES = {"cpu": 500 * MIB, "cuda": 600 * MIB, "mps": 500 * MIB}


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes held for one purpose, and when. `allocated` is False for what no tensor accounts for."""

    name: str
    bytes: int
    note: str = ""
    moments: tuple[Moment, ...] = ALWAYS
    allocated: bool = True


def parts(setting: Setting, policy: Recompute) -> tuple[Part, ...]:
    """Every part of the memory that a run under this recompute policy takes."""
    tokens = setting.micro_tokens
    linear, other = setting.held_weights
    elsewhere = ", embeddings on the host" if setting.embedding_on_host else ""
    return (
        Part("linear weights", linear, _stored_as(setting)),
        Part(
            "embeddings, head, norms",
            other,
            "float32" if setting.full else f"{setting.dtype}{elsewhere}",
        ),
        *_while_loading(setting),
        *_trained(setting, policy),
        Part(
            "activations",
            math.ceil(kept_bytes(setting, policy) * tokens),
            f"{tokens:,} tokens, {recompute_in_words(setting, policy)}",
            PASS,
        ),
        Part(
            "loss",
            _loss_bytes(setting, policy),
            "one chunk of logits, gradient of hidden",
            ("loss",),
        ),
        Part(
            "workspace",
            math.ceil(transient_bytes(setting, policy)),
            _workspace_note(setting, policy),
            ("backward",),
        ),
        *_allocator(setting, policy),
        _process(setting),
    )


def _process(setting: Setting) -> Part:
    """What no tensor accounts for: as it was measured, else what is usual."""
    measured = setting.device.process_bytes
    size = PROCESS_BYTES[setting.device.kind] if measured is None else measured
    note = "interpreter, torch, kernels" + ("" if measured is None else ", measured here")
    return Part("process", size, note, ALWAYS, False)


def recompute_in_words(setting: Setting, policy: Recompute) -> str:
    """`recompute minimal in 12 of 32 layers`."""
    layers = setting.shapes.layers
    if policy == "none" or setting.recomputed_layers == layers:
        return f"recompute {policy}"
    return f"recompute {policy} in {setting.recomputed_layers} of {layers} layers"


def peak(rows: Iterable[Part], *, allocated: bool = False) -> tuple[int, Moment]:
    """The fullest moment and its bytes; with `allocated` tensors alone, as a card counts them."""
    held: Sequence[Part] = [r for r in rows if r.allocated or not allocated]
    sums = {moment: sum(r.bytes for r in held if moment in r.moments) for moment in ALWAYS}
    fullest = max(ALWAYS, key=lambda moment: sums[moment])
    return sums[fullest], fullest


def peak_bytes(setting: Setting, policy: Recompute) -> int:
    """Bytes at the fullest moment, the process included."""
    return peak(parts(setting, policy))[0]


def base_bytes(rows: Iterable[Part]) -> int:
    """What base and process hold, whoever trains."""
    return sum(row.bytes for row in rows if row.name in _OF_THE_BASE)


def beside(rows: Iterable[Part]) -> tuple[int, int]:
    """Beside a base that is there already: what the run holds between its passes, and what its
    largest pass takes on top of that."""
    own = [row for row in rows if row.name not in _OF_THE_BASE]
    standing = sum(row.bytes for row in own if row.name in _STANDING)
    return standing, max(0, peak(own)[0] - standing)


def _stored_as(setting: Setting) -> str:
    if setting.storage == "none":
        return "float32" if setting.full else setting.dtype
    nested = setting.config.base.double_quantization and setting.storage in ("nf4", "fp4")
    return f"{setting.storage}{' + double quantization' if nested else ''}"


def _while_loading(setting: Setting) -> tuple[Part, ...]:
    """One weight in full beside the quantized ones while it is turned."""
    if setting.storage == "none" or setting.resident:
        return ()
    return (Part("quantizing", largest_linear(setting) * 4 * 3, "one weight at a time", ("load",)),)


def _trained(setting: Setting, policy: Recompute) -> tuple[Part, ...]:
    """Masters, gradients and moments. Gradients are dropped after each step, so without
    accumulation the first of a step's passes begins without them, and recompute meets them only
    as layer after layer is done."""
    trained = setting.trained_elements
    rows = [Part("adapter", 4 * trained, "float32")] if not setting.full else []
    if setting.mixed:
        rows.append(Part("16-bit copies", 2 * trained, f"{setting.dtype}, for the products", PASS))
    moments: tuple[Moment, ...] = ("step",)
    if setting.config.train.gradient_accumulation_steps > 1:
        moments = TRAINING
    rows.append(Part("gradients", 4 * trained, "float32", moments))
    rows.append(_optimizer(setting))
    if policy != "none" and moments == ("step",):
        done = 1 - 1 / setting.shapes.layers  # when the first layer is recomputed
        rows.append(Part("gradients so far", int(4 * trained * done), "float32", ("backward",)))
    if setting.full and moments == ("step",):
        head = 4 * setting.shapes.head_elements
        rows.append(Part("head gradient", head, "made with the loss", PASS))
    return tuple(rows)


def _optimizer(setting: Setting) -> Part:
    """Both moments; of those in host memory two pages stand on the device, and only in the step."""
    state = setting.optimizer_bytes
    held = "8 bits" if setting.config.train.optim.endswith("8bit") else "float32"
    if not setting.optimizer_on_host:
        return Part("optimizer", state, f"AdamW's two moments, {held}", TRAINING)
    note = f"two pages of AdamW's moments, {held}; {state / 1e6:,.1f} MB in host memory"
    return Part("optimizer", min(state, 2 * PAGE_BYTES), note, ("step",))


def _loss_bytes(setting: Setting, policy: Recompute) -> int:
    """One chunk of float32 logits and the gradient of the hidden rows.

    In 16 bits a product or error of that size stands beside it on a card; on a CPU its kernel
    needs neither. Where layer inputs are offloaded memory is dear, and chunks are smaller.
    """
    shapes, tokens = setting.shapes, setting.micro_tokens
    limit = CHUNK_BYTES.get(setting.device.kind, CHUNK_BYTES_DEVICE)
    if policy == "offloaded":
        limit = min(limit, CHUNK_BYTES_SPARING)
    chunk = max(16, limit // (4 * shapes.vocab))
    each = 4 if setting.product_bytes == 4 else 6
    if setting.device.kind == "cpu" and each == 6 and not setting.full and not shapes.softcap:
        # the kernel takes the error in place, a few rows at a time (not where logits are capped)
        chunk = min(chunk, max(LEAST_CACHED_ROWS, CHUNK_BYTES_CACHED // (2 * shapes.vocab)))
        each = 2
    logits = min(chunk, tokens) * shapes.vocab * each
    return logits + tokens * shapes.hidden * setting.product_bytes


def _allocator(setting: Setting, policy: Recompute) -> tuple[Part, ...]:
    """Freed blocks that glibc keeps on a CPU.

    Under `allocator.TUNABLES` most of what is freed grows together and is used again, but beside
    what a layer keeps lie blocks it has used, which small objects cut too short for the next
    layer's. Untuned it is much more, and differs more from run to run.
    """
    shapes, row = setting.shapes, setting.micro_tokens * setting.product_bytes
    given_back = "MALLOC_MMAP_THRESHOLD_" in os.environ or not glibc()
    if setting.device.kind != "cpu" or given_back:
        return ()
    if tuned():
        if setting.full or row * shapes.hidden >= _LARGEST_KEPT:
            return ()
        again = policy != "none"
        rows = _LEFT_RECOMPUTING if again else _LEFT_BY_A_LAYER
        size = math.ceil(rows * shapes.layers * row * shapes.hidden)
        moments: tuple[Moment, ...] = ("backward",) if again else PASS
        return (Part("allocator", size, "freed blocks beside what layers keep", moments, False),)
    if row * shapes.intermediate >= _LARGEST_KEPT:
        return ()
    share = _UNTUNED if policy == "none" else _UNTUNED_RECOMPUTING
    if setting.full:
        share = _UNTUNED_IN_FULL
    size = math.ceil(share * kept_bytes(setting, "none") * setting.micro_tokens)
    note = f"freed blocks glibc keeps; GLIBC_TUNABLES={TUNABLES} has most of them used again"
    return (Part("allocator", size, note, PASS, False),)


def _workspace_note(setting: Setting, policy: Recompute) -> str:
    note = (
        "gradients under way" if policy == "none" else "one layer recomputed, gradients under way"
    )
    if setting.storage == "none":
        return note
    dense = largest_linear(setting) * setting.product_bytes
    return f"{note}, one weight dense ({dense / 1e6:.1f} MB)"
