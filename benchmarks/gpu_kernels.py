"""Kernels on one GPU beside their floors and their rivals, a row at a time.

    python -m benchmarks.gpu_kernels [--results FOLDER]
    python -m benchmarks.gpu_kernels --device cpu --tiny   # pure torch on a toy; its figures say nothing

Dequantization against a copy of as many bytes; a quantized product with the weight whole and in
parts that stay in the second-level cache; base and adapter as one product (`lora/extended`) or
apart; norms, gates and rotary positions in the ways there are (`gpu_elementwise`). Each figure is the
best of several after warming up, with random data.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import gpu_elementwise
from benchmarks.machine import circumstances, in_words
from benchmarks.steps.side import synchronize
from pennyweight.lora.extended import extended_product
from pennyweight.lora.layer import lora_delta
from pennyweight.quant import (
    Quantized4Bit,
    dequantize_4bit,
    dequantize_4bit_part,
    quantize_4bit,
)

__all__ = ["main", "rows"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("pennyweight", "torch", "triton", "bitsandbytes", "liger-kernel")
RANK, TOKENS = 16, 4096
PART_BYTES = 30 << 20
SHAPES = ((4096, 4096), (14_336, 4096), (4096, 14_336))
TOY = ((256, 128), (128, 256))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2: no GPU is here, nothing was done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("gpu_kernels: no CUDA device is here; nothing was done", file=sys.stderr)
        return 2
    asked.results.mkdir(parents=True, exist_ok=True)
    path = asked.results / "gpu-kernels.md"
    with path.open("a") as page:
        page.write(
            f"\n{in_words(circumstances(PACKAGES))}\n\n| what | of | us | |\n|---|---|---:|---|\n"
        )
        for what, size, seconds, said in _all_rows(asked.device, tiny=asked.tiny):
            line = f"| {what} | {size} | {seconds * 1e6:,.1f} | {said} |\n"
            print(line, end="", flush=True)
            page.write(line)
            page.flush()
    return 0


def _all_rows(device: str, *, tiny: bool) -> Iterator[tuple[str, str, float, str]]:
    """What was timed, the size it was timed on, seconds, and what to hold it against."""
    for shape in TOY if tiny else SHAPES:
        for what, seconds, said in rows(shape, device, tokens=64 if tiny else TOKENS):
            yield what, f"{shape[0]:,} x {shape[1]:,}", seconds, said
    layer = gpu_elementwise.Shape(8, 64, 96, 4, 2, 16) if tiny else gpu_elementwise.Shape(TOKENS)
    for what, seconds, said in gpu_elementwise.rows(layer, device, best):
        yield what, f"{layer.tokens:,} tokens", seconds, said


def rows(shape: tuple[int, int], device: str, *, tokens: int) -> Iterator[tuple[str, float, str]]:
    """What was timed, seconds, and what to hold it against."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype) * scale

    weight = drawn(*shape)
    q = quantize_4bit(weight)
    out, other = torch.empty_like(weight), torch.empty_like(weight)
    moved = out.nbytes + q.stored_bytes
    flat = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    into = torch.empty_like(flat)
    copied = best(lambda: into.copy_(flat), device)
    yield "copy of as many bytes", copied, f"{moved / copied / 1e9:,.0f} GB/s"
    filled = best(lambda: dequantize_4bit(q, out=out), device)
    yield "dequantize", filled, f"{copied / filled:.0%} of the copy's speed"

    x = drawn(tokens, shape[1])
    y = torch.empty(tokens, shape[0], device=device, dtype=dtype)
    plain = best(lambda: torch.mm(x, weight.T, out=y), device)
    yield (
        "product, weight dense",
        plain,
        f"{2 * tokens * weight.numel() / plain / 1e12:.2f} TFLOP/s",
    )
    whole = best(lambda: torch.mm(x, dequantize_4bit(q, out=out).T, out=y), device)
    yield "product, dequantized whole", whole, f"{whole / plain - 1:+.1%} on the dense one"
    parted = best(lambda: _in_parts(q, x, other, y), device)
    yield "product, dequantized in parts", parted, f"{parted / plain - 1:+.1%} on the dense one"

    a, b = drawn(RANK, shape[1], scale=0.02), drawn(shape[0], RANK, scale=0.02)
    x, a, b = (each.requires_grad_() for each in (x, a, b))
    grad = drawn(tokens, shape[0])

    def apart() -> None:
        _Apart.run(q, x, a, b, grad)

    def together() -> None:
        extended_product(x, q, a, b, 2.0).backward(grad)

    two, one = best(apart, device), best(together, device)
    yield "base and adapter apart, forward and backward", two, ""
    yield "the same as one product each way", one, f"{one / two - 1:+.1%} on apart"


class _Apart:
    """The layer as it is: a frozen product, and the adapter's two beside it."""

    @staticmethod
    def run(q: Quantized4Bit, x: Tensor, a: Tensor, b: Tensor, grad: Tensor) -> None:
        from pennyweight.quant.linear import QuantizedLinear

        y = QuantizedLinear(q)(x) + lora_delta(x, a, b, scaling=2.0)
        y.backward(grad)


def _in_parts(q: Quantized4Bit, x: Tensor, buffer: Tensor, y: Tensor) -> None:
    """x W^T, whole rows of W at a time, as many as stay in the cache."""
    d_out, d_in = q.shape
    step = max(1, PART_BYTES // (buffer.element_size() * d_in))
    for row in range(0, d_out, step):
        part = buffer[row : row + step]
        dequantize_4bit_part(q, part, row=row)
        torch.mm(x, part.T, out=y[:, row : row + step])


def best(run: Callable[[], object], device: str, *, seconds: float = 0.2) -> float:
    """Of as many runs as fit in the time, after three that are not counted."""
    for _ in range(3):
        run()
    shortest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


if __name__ == "__main__":
    sys.exit(main())
