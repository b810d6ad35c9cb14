"""One process of one side: every case in turn, each result a line in a file as soon as it is there.

    python -m benchmarks.steps.side --side peft --shape 512x8 --model FOLDER --out FILE

Times are of one whole step: forward, backward, clip, optimizer. The rate of a plain product as
large as the model's, in the case's type, is measured after each case, for the floor.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

BEGAN = time.perf_counter()

__all__ = ["Program", "main"]


class Program(Protocol):
    """A side's way to hold a model and take steps."""

    def load(self, model: Path, mode: str, *, dtype: str, hollow: bool) -> None: ...
    def drop(self) -> None: ...
    def take(
        self, rows: Sequence[Any], case: Any, warmed: Callable[[int], None]
    ) -> list[tuple[float, float]]:
        """Seconds and loss of each of the case's steps, those not timed first; `warmed(n)` is called
        after the n-th."""
        ...


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps.side")
    for word in ("--side", "--shape", "--model", "--out"):
        parser.add_argument(word, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--hollow", action="store_true", help="weights without bytes; noise takes their place"
    )
    asked = parser.parse_args(arguments)
    program = _program(asked.side, asked.device)
    from benchmarks.steps.cases import cases_of

    imported, held, load_s = time.perf_counter() - BEGAN, ("", ""), 0.0
    for case in cases_of(asked.side, asked.shape):
        facts = {"side": asked.side, "shape": asked.shape, **case.values()}
        try:
            if held != (case.mode, case.dtype):
                program.drop()
                gc.collect()
                began = time.perf_counter()
                folder = Path(asked.model)
                program.load(folder, case.mode, dtype=case.dtype, hollow=asked.hollow)
                held, load_s = (case.mode, case.dtype), time.perf_counter() - began
            facts |= _measured(program, case, asked.shape, asked.device) | {
                "load_s": load_s,
                "import_s": imported,
            }
        except Exception as fault:  # the next case may well do; why this one does not is a result
            facts["fault"] = f"{type(fault).__name__}: {str(fault).strip().splitlines()[0][:150]}"
            held = "", ""
        with Path(asked.out).open("a") as file:
            file.write(json.dumps(facts) + "\n")
    print(json.dumps({"import_s": imported}))


def _program(side: str, device: str) -> Program:
    if side == "pennyweight":
        from benchmarks.steps.ours import Ours

        return Ours(device)
    if side == "unsloth":
        import unsloth  # noqa: F401  it rewrites transformers, so it comes before that
    from benchmarks.steps.peers import Peft, Trl

    name, _, way = side.rpartition(" ")
    if "trl" in (name, way):
        return Trl(device, liger=way == "liger")
    return Peft(device, "" if side == "peft" else way)  # type: ignore[arg-type]


def _measured(program: Program, case: Any, shape_name: str, device: str) -> dict[str, Any]:
    from benchmarks.steps.cases import SHAPES, flops, rows_of

    shape = SHAPES[shape_name]
    rows = rows_of(case, shape.vocab_size)
    rest = 0

    def warmed(number: int) -> None:
        nonlocal rest
        if number == case.warm:
            gc.collect()
            rest = _restart_peak(device)

    taken = program.take(rows, case, warmed)
    peak, seconds = _peak(device), [each for each, _ in taken[case.warm :]]
    tokens = sum(len(row.ids) for row in rows)
    dtype = case.dtype if device == "cpu" else "bfloat16"
    rate = product_flops(shape.hidden_size, shape.intermediate_size, tokens, device, dtype)
    return {
        "step_s": statistics.median(seconds),
        "steps_s": seconds,
        "first_step_s": taken[0][0],
        "real_tokens": tokens,
        "trained_tokens": sum(int(row.trained.sum()) for row in rows),
        "losses": [loss for _, loss in taken],
        "rest_bytes": rest,
        "peak_bytes": peak,
        "product_flops": rate,
        "floor_s": flops(shape, case.mode, [len(row.ids) for row in rows]) / rate,
        "threads": _threads(),
    }


def product_flops(
    d_in: int, d_out: int, rows: int, device: str = "cpu", dtype: str = "float32"
) -> float:
    """FLOP/s of a product `[rows, d_in] @ [d_in, d_out]` here and now: the best of several."""
    import torch

    of = {"device": device, "dtype": getattr(torch, dtype)}
    generator = torch.Generator(device).manual_seed(0)
    x, w = (
        torch.randn(shape, generator=generator, **of) for shape in ((rows, d_in), (d_in, d_out))
    )
    out = torch.empty(rows, d_out, **of)
    best, until = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < until or best == float("inf"):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(x, w, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * rows * d_in * d_out / best


def synchronize(device: str) -> None:
    """Wait for what a GPU still does; a CPU has done it."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _restart_peak(device: str) -> int:
    """Begin the high-water mark anew; what is held now, in bytes: of the device, or resident."""
    import torch

    from pennyweight.allocator import give_back
    from pennyweight.train import restart_peak

    if device == "cpu":
        give_back()  # or what the next step takes would not show
    restart_peak(torch.device(device))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return _peak(device)


def _peak(device: str) -> int:
    import torch

    from benchmarks.in_turn import peak_bytes

    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()


def _threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main()
