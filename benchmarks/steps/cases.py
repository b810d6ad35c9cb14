"""What is measured: shapes, modes, tokens a step, and how documents are laid out; the same rows for
every side, drawn by a seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks import random_llama
from benchmarks.random_llama import LlamaShape
from pennyweight.data.conversation import Example

__all__ = [
    "CASES_OF",
    "SHAPES",
    "Case",
    "cases_of",
    "flops",
    "multiplies_bf16",
    "rows_of",
    "write_model",
]

SHAPES = {
    "512x8": LlamaShape(512, 1408, 8, 8, 8, 8192),
    "1024x12": LlamaShape(1024, 2816, 12, 16, 8, 16_384),
    # For a trial in seconds; its figures say nothing.
    "quick": LlamaShape(128, 352, 2, 4, 2, 1024),
    **random_llama.SHAPES,
}
RANK, ALPHA = 16, 32
ADAPTERS = 4


@dataclass(frozen=True, slots=True)
class Case:
    """`mode`: full, lora, lora16 (lora in bf16 on a GPU), qlora (NF4, double quantization) or adapters
    (four at once over NF4). `dtype`: on a CPU, of products and of weights that are not quantized. `layout`: `even` documents of equal length, or `ragged` ones of
    an Alpaca-like spread, `packed` or `padded`. `steps` are timed, after `warm` that are not.
    `document`: tokens of an even document, and the most of a ragged one. `recompute`: every layer's
    activations again in backward.
    """

    mode: str
    tokens: int
    layout: str = "even"
    steps: int = 3
    warm: int = 1
    document: int = 512
    recompute: bool = False
    dtype: str = "float32"

    def values(self) -> dict[str, object]:
        return asdict(self)


def cases_of(side: str, shape: str) -> list[Case]:
    """What one process of a side measures, in this order, what is left out last."""
    return [c for c in CASES_OF[shape](side) if c.dtype == "float32" or multiplies_bf16()]


@cache
def multiplies_bf16() -> bool:
    """Whether this processor has products of bf16: without, they take minutes in place of seconds."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _small(side: str) -> Iterator[Case]:
    """Each in float32 and in bf16, so that every side's best is there."""
    if side == "trl":  # even rows alone: its packs are of other lengths from step to step
        for mode in ("qlora", "lora"):
            yield Case(mode, 2048, steps=1, dtype=_best())
        return
    if side == "peft compiled":
        for mode in ("qlora", "lora"):
            yield Case(mode, 256, steps=6, warm=2, dtype=_best())
        return
    for mode, dtype in product(("qlora", "lora"), ("bfloat16", "float32")):
        fast = dtype == "bfloat16"
        yield Case(mode, 64, steps=16 if fast else 6, warm=4, dtype=dtype)
        yield Case(mode, 256, steps=8 if fast else 3, warm=2, dtype=dtype)
        yield Case(mode, 2048, steps=3 if fast else 1, dtype=dtype)
        if mode == "qlora" and dtype == _best():
            yield Case("qlora", 2048, "ragged packed", steps=1, dtype=dtype)
            if side != "pennyweight":  # which pads nothing
                yield Case("qlora", 2048, "ragged padded", steps=1, dtype=dtype)
    yield Case("adapters", 256, steps=5, warm=2, dtype=_best())
    for tokens in (64, 256, 2048):
        yield Case("full", tokens, steps=max(1, 256 // tokens))


def _best() -> str:
    return "bfloat16" if multiplies_bf16() else "float32"


def _large(side: str) -> Iterator[Case]:
    for mode in ("qlora", "lora"):
        yield Case(mode, 64, steps=4, dtype=_best())
        yield Case(mode, 256, steps=2, dtype=_best())
    yield Case("qlora", 2048, steps=1, dtype=_best())
    yield Case("qlora", 256, steps=1)
    yield Case("full", 256, steps=1)


def _quick(side: str) -> Iterator[Case]:
    modes = {"trl": ("qlora",), "peft compiled": ("lora",)}
    for mode in modes.get(side, ("qlora", "lora", "full", "adapters")):
        yield Case(mode, 64, steps=2)
        if mode != "full":
            yield Case(mode, 64, steps=2, dtype="bfloat16")
    if side not in modes:
        yield Case("qlora", 128, "ragged packed", steps=2)
    if side == "peft":
        yield Case("qlora", 128, "ragged padded", steps=2)


def _on_a_gpu(side: str) -> Iterator[Case]:
    """The lean and the fast way of each; peers recompute as their guides say, and without it where
    it fits. What fails for want of memory is a row that says so."""
    whole = side in {"pennyweight", "peft"}
    for mode in ("qlora", "lora16") if whole else ("qlora",):
        for tokens in (4096, 16_384, 32_768):
            for recompute in (True, False):
                yield Case(mode, tokens, "even", 10, 3, 2048, recompute)
    if not side.startswith("trl"):  # whose packs are of other lengths from step to step
        yield Case("qlora", 16_384, "ragged packed", 10, 3, 2048, True)
    if side == "peft":
        yield Case("qlora", 16_384, "ragged padded", 10, 3, 2048, True)
    if whole:
        yield Case("adapters", 16_384, "even", 10, 3, 2048, True)


def _on_a_gpu_lean(side: str) -> Iterator[Case]:
    yield Case("qlora", 4096, "even", 5, 2, 2048, True)
    if side == "pennyweight":
        yield Case("qlora", 2048, "even", 5, 2, 2048, True)


def _toy(side: str) -> Iterator[Case]:
    yield Case("qlora", 128, "even", 2, 1, 64, True)
    if side in {"pennyweight", "peft"}:
        yield Case("lora16", 128, "even", 2, 1, 64)


CASES_OF = {
    "512x8": _small,
    "1024x12": _large,
    "quick": _quick,
    "1B": _on_a_gpu,
    "8B": _on_a_gpu,
    "13B": _on_a_gpu_lean,
    "70B": _on_a_gpu_lean,
    "tiny": _toy,
}


def rows_of(case: Case, vocab: int, *, seed: int = 0) -> list[Example]:
    """The documents of one step, `case.tokens` in all, of ids without meaning."""
    drawn = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(_lengths(case, drawn)):
        ids = drawn.integers(5, vocab, length).astype(np.int32)
        first = length // 3 if case.layout.startswith("ragged") else 1
        rows.append(Example(ids, np.arange(length) >= max(1, first), f"row:{number}", length))
    return rows


def _lengths(case: Case, drawn: np.random.Generator) -> list[int]:
    """Ragged documents have a spread like instruction data's."""
    if case.mode == "adapters":
        return [case.tokens // ADAPTERS] * ADAPTERS
    if not case.layout.startswith("ragged"):
        return [min(case.document, case.tokens)] * max(1, case.tokens // case.document)
    found: list[int] = []
    while (left := case.tokens - sum(found)) > 0:
        length = int(np.clip(drawn.lognormal(4.9, 0.7), 16, case.document))
        found.append(length if left - length >= 16 else left)
    return found


def flops(shape: LlamaShape, mode: str, lengths: Sequence[int]) -> float:
    """Of one step (docs/performance.md): forward, input gradients, attention's backward, and weight
    gradients or adapters."""
    d, layers = shape.hidden_size, shape.num_hidden_layers
    kv = d * shape.num_key_value_heads // shape.num_attention_heads
    sizes = [(d, d), (d, kv), (d, kv), (d, d), *[(d, shape.intermediate_size)] * 3]
    linear = layers * sum(a * b for a, b in sizes)
    head = d * shape.vocab_size
    adapters = layers * RANK * sum(a + b for a, b in sizes)
    tokens = sum(lengths)
    attention = (2 + 5) * d * layers * sum(n * n for n in lengths)
    each = 4 * linear + 4 * head + (2 * (linear + head) if mode == "full" else 6 * adapters)
    return float(each * tokens + attention)


def write_model(shape: LlamaShape, folder: Path) -> Path:
    """A folder with random weights in bf16, as models are published."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from pennyweight.builtin import model_folder

    torch.manual_seed(0)
    settings = shape.config()
    for name in ("model_type", "architectures", "dtype"):
        settings.pop(name)
    LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))
    return folder
