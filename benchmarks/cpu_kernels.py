"""Quantize, dequantize and the frozen linear layer on a CPU, beside bitsandbytes, in turn in one process.

    python -m benchmarks.cpu_kernels [--results FOLDER] [--quick]

Each case runs A B B A A B ... after a warm-up of both; medians, with half the distance between the
fastest and the slowest. Values and gradients are held together first: without parity no row is
written. Beside each row stands its floor, measured in the same minute: what filling memory, reading
it, or torch's products of the dense weight in the same type took. Beside each goal stands what that
floor allows, the peer's time over the floor's: where the goal is higher, no program that multiplies
at torch's rate could reach it. Products of bf16 are left out where the processor has none: torch and
the peer take seconds for each there. `--quick` is a trial with a small matrix.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.in_turn import median, spread, turns
from benchmarks.machine import circumstances, in_words
from benchmarks.steps.cases import multiplies_bf16
from pennyweight.quant import Quantized4Bit, QuantizedLinear, dequantize_4bit, quantize_4bit
from pennyweight.quant.kernels.cpu.library import chosen, why_none

__all__ = ["Row", "main", "rows"]

PACKAGES = ("pennyweight", "torch", "bitsandbytes")
OURS, PEER = "pennyweight", "bitsandbytes"
TOKENS = (16, 256, 1024)
GOALS = {16: 3.0, 256: 1.6, 1024: 1.15}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Work = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One case: seconds of either side, of the floor, and the goal for their ratio (0: none)."""

    case: str
    ours_s: float
    ours_spread: float
    peer_s: float
    peer_spread: float
    floor_s: float
    floor: str
    goal: float = 0.0

    @property
    def ratio(self) -> float:
        return self.peer_s / self.ours_s

    @property
    def allowed(self) -> float:
        """How many times faster than the peer the floor is."""
        return self.peer_s / self.floor_s


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Every case as it is measured; RuntimeError where a value differs from the peer's."""
    size, rounds = (512, 3) if quick else (4096, 12)
    torch.manual_seed(0)
    weight = torch.randn(size, size)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        peer = _peer(weight)
        codes, state = peer.weight.data, peer.weight.quant_state
        ours = quantize_4bit(weight)
        _refuse_other_values(ours, codes, state)
        yield from _storage(weight, ours, codes, state, rounds)
        for dtype in SHORT:
            if dtype == torch.float32 or multiplies_bf16():
                yield from _linear(weight.to(dtype), rounds)


def _storage(
    weight: torch.Tensor, ours: Quantized4Bit, codes: Any, state: Any, rounds: int
) -> Iterator[Row]:
    import bitsandbytes.functional as theirs

    how = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
    for dtype, short in SHORT.items():
        given, out = weight.to(dtype), torch.empty_like(weight, dtype=dtype)
        yield _row(
            f"quantize from {short}, NF4 + double quantization",
            lambda given=given: quantize_4bit(given),
            lambda given=given: theirs.quantize_4bit(given, **how),
            max(2, rounds // 3),
            (lambda given=given: given.view(-1).view(torch.float32).sum(), "read once"),
            20.0,
        )
        state.dtype = dtype
        fill = (lambda out=out: out.fill_(1.0), "memory fill")
        # The peer fills fresh memory, which on a CPU it cannot help; a layer here never does.
        yield _row(
            f"dequantize to {short}, here into a buffer",
            lambda out=out: dequantize_4bit(ours, out=out),
            lambda: theirs.dequantize_4bit(codes, state),
            rounds,
            fill,
            8.0,
        )
        yield _row(
            f"dequantize to {short}, both into fresh memory",
            lambda dtype=dtype: dequantize_4bit(ours, dtype),
            lambda: theirs.dequantize_4bit(codes, state),
            rounds,
            (lambda dtype=dtype: torch.ones_like(weight, dtype=dtype), "fill of fresh memory"),
        )


def _linear(weight: torch.Tensor, rounds: int) -> Iterator[Row]:
    size, dtype = len(weight), weight.dtype
    ours, peer = QuantizedLinear(quantize_4bit(weight)), _peer(weight)
    exact = ours.dequantize(torch.float32).double()
    for tokens in TOKENS:
        x = torch.randn(tokens, size).to(dtype)
        grad = torch.randn(tokens, size).to(dtype)
        _refuse_worse_products(ours, peer, exact, x, grad)
        dense = ours.dequantize(dtype)
        yield _row(
            f"linear, forward + input gradient, {SHORT[dtype]}, {tokens} tokens",
            lambda x=x, grad=grad: _both(ours, x, grad),
            lambda x=x, grad=grad: _both(peer, x, grad),
            max(3, rounds * 16 // max(32, tokens // 4)),
            (lambda x=x, grad=grad, w=dense: (x @ w.T, grad @ w), "plain products"),
            GOALS[tokens],
        )
    x = torch.randn(1, size).to(dtype)
    with torch.inference_mode():
        yield _row(
            f"linear, one row, inference, {SHORT[dtype]}",
            lambda: ours(x),
            lambda: peer(x),
            rounds,
            (lambda: x @ dense.T, "plain product"),
        )


def _both(layer: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[Any, Any]:
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad


def _row(
    case: str, ours: Work, peer: Work, rounds: int, floor: tuple[Work, str], goal: float = 0.0
) -> Row:
    work = {OURS: ours, PEER: peer}
    seconds: dict[str, list[float]] = {OURS: [], PEER: [], "floor": []}
    for each in work.values():
        each()
    with torch.inference_mode(torch.is_inference_mode_enabled()):
        for side in turns([OURS, PEER], max(2, rounds)):
            seconds[side].append(_timed(work[side]))
    floor[0]()
    seconds["floor"] = [_timed(floor[0]) for _ in range(5)]
    return Row(
        case,
        median(seconds[OURS]),
        spread(seconds[OURS]),
        median(seconds[PEER]),
        spread(seconds[PEER]),
        median(seconds["floor"]),
        floor[1],
        goal,
    )


def _timed(work: Work) -> float:
    began = time.perf_counter()
    result = work()
    took = time.perf_counter() - began
    del result
    return took


def _peer(weight: torch.Tensor) -> Any:
    import bitsandbytes as peer

    size = len(weight)
    layer = peer.nn.Linear4bit(size, size, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = peer.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return layer.to("cpu")


def _refuse_other_values(ours: Quantized4Bit, codes: torch.Tensor, state: Any) -> None:
    import bitsandbytes.functional as theirs

    same = torch.equal(ours.codes, codes.view(-1)) and torch.equal(ours.absmax.codes, state.absmax)
    apart = (dequantize_4bit(ours) - theirs.dequantize_4bit(codes, state)).abs().max().item()
    if not same or apart > 2.0**-20:
        raise RuntimeError(f"codes or values differ from {PEER}'s (values by {apart:.3g})")


def _refuse_worse_products(
    ours: Any, peer: Any, exact: torch.Tensor, x: torch.Tensor, grad: torch.Tensor
) -> None:
    """A result may be no further from float64 than twice the peer's."""
    wanted = x.double() @ exact.T, grad.double() @ exact
    errors = [
        [
            (one.double() - right).norm().item()
            for one, right in zip(_both(layer, x, grad), wanted, strict=True)
        ]
        for layer in (ours, peer)
    ]
    if any(mine > 2 * theirs for mine, theirs in zip(*errors, strict=True)):
        raise RuntimeError(f"products are further from float64 than {PEER}'s: {errors}")


def page(found: Sequence[Row], facts: dict[str, object]) -> str:
    lines = [
        "# CPU kernels beside bitsandbytes",
        "",
        "| 4096 x 4096 | Pennyweight, ms | bitsandbytes, ms | times faster | goal | the floor allows | floor, ms | of the floor |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        cells = [
            row.case,
            f"{1e3 * row.ours_s:.2f} ± {row.ours_spread:.0%}",
            f"{1e3 * row.peer_s:.2f} ± {row.peer_spread:.0%}",
            f"{row.ratio:.2f}",
            f"{row.goal:g}" if row.goal else "",
            f"{row.allowed:.2f}",
            f"{1e3 * row.floor_s:.2f} ({row.floor})",
            f"{row.floor_s / row.ours_s:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    serving = chosen()
    if not multiplies_bf16():
        lines += [
            "",
            "Products of bf16 are left out: this processor has none, and float32 computes.",
        ]
    lines += [
        "",
        f"Kernels: {serving.variant if serving else why_none()}. `python -m benchmarks.cpu_kernels`, "
        f"in turn in one process. {in_words(facts)}",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print each row as it comes, and write `cpu_kernels.md` and `.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_kernels")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="a small matrix; says nothing")
    asked = parser.parse_args(arguments)
    facts, found = circumstances(PACKAGES), []
    asked.results.mkdir(parents=True, exist_ok=True)
    for row in rows(quick=asked.quick):
        found.append(row)
        goal = f", goal {row.goal:g}" if row.goal else ""
        print(
            f"{row.case}: {1e3 * row.ours_s:.2f} ms, {row.ratio:.2f} times faster{goal}, "
            f"the floor allows {row.allowed:.2f}",
            flush=True,
        )
        stored = {"circumstances": facts, "rows": [asdict(each) for each in found]}
        (asked.results / "cpu_kernels.json").write_text(json.dumps(stored, indent=1) + "\n")
        (asked.results / "cpu_kernels.md").write_text(page(found, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
