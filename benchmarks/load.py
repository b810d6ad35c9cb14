"""Reading and quantizing a base against a plain read of its files, and the second start from the cache.

    python -m benchmarks.load [--results FOLDER] [--gigabytes 1] [--rounds 3]

A Llama of random bfloat16 weights of that size is written to a temporary folder. Each start is a
process of its own, timed after imports and after a tiny model has been loaded once. `cold` files
were dropped from the page cache before (a disk's speed); the others are in it (memory's speed).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.in_turn import ask, median
from benchmarks.machine import circumstances, in_words

__all__ = ["main", "write_random"]

KINDS = ("plain read", "read and quantized", "kept from before")
_CHUNK_BYTES = 1 << 22


def write_random(folder: Path, size_bytes: int) -> Path:
    """A Llama of hidden 2048, as many layers as it takes, its weights random."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.random_llama import LlamaShape, write_hollow

    def shape(layers: int) -> LlamaShape:
        return LlamaShape(2048, 5632, layers, 16, 16, 4096, tie_word_embeddings=True)

    layer_bytes = 2 * (4 * 2048 * 2048 + 3 * 2048 * 5632)
    write_hollow(shape(max(1, round(size_bytes / layer_bytes))), folder)
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(0)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    tensors = {
        key: (torch.randn(size, generator=generator) * 0.02).bfloat16()
        for key, size in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def start(kind: str, folder: Path, *, cold: bool) -> dict[str, float]:
    """Seconds of one start of this kind, and the bytes of the base."""
    from pennyweight.config import BaseConfig
    from pennyweight.model import load_base, weight_files
    from pennyweight.model.cache import cache_folder

    files = weight_files(folder)
    load_base(BaseConfig(model="builtin", device="cpu"))
    if cold:
        kept = cache_folder().glob("*/*.safetensors")
        for path in (*files, *kept):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    if kind == "plain read":
        buffer = bytearray(_CHUNK_BYTES)
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    else:
        load_base(BaseConfig(model=str(folder), device="cpu", dtype="bfloat16"))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": sum(path.stat().st_size for path in files)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every kind, warm and cold, in turn; write `load.md` and `load.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start", nargs=3, metavar=("KIND", "FOLDER", "COLD"))
    asked = parser.parse_args(arguments)
    if asked.start:
        kind, folder, cold = asked.start
        print(json.dumps(start(kind, Path(folder), cold=cold == "cold")))
        return 0
    seconds: dict[str, list[float]] = {}
    size = 0.0
    with tempfile.TemporaryDirectory() as work:
        folder = write_random(Path(work) / "base", int(asked.gigabytes * 1e9))
        turns = [(KINDS[-1], "warm", 0)]  # this one fills the cache
        for number in range(asked.rounds):
            order = KINDS if number % 2 == 0 else KINDS[::-1]
            turns += [(kind, cold, number + 1) for cold in ("warm", "cold") for kind in order]
        for kind, cold, number in turns:
            answer = ask(
                "benchmarks.load",
                ["--start", kind, str(folder), cold],
                timeout_s=200,
                PENNYWEIGHT_CACHE=str(Path(work) / "cache"),
                PENNYWEIGHT_BASE_CACHE="off" if kind == KINDS[1] else "20",
            )
            if answer.fault:
                print(f"{kind}, {cold}: {answer.fault}", file=sys.stderr)
                return 1
            if number:
                seconds.setdefault(f"{kind}, {cold}", []).append(answer.said["seconds"])
            size = answer.said["bytes"]
    _write(asked.results, {key: median(found) for key, found in seconds.items()}, size)
    return 0


def _write(results: Path, seconds: dict[str, float], size: float) -> None:
    facts = circumstances(("pennyweight", "torch", "transformers", "safetensors"))
    lines = [
        "# Starting from a base's files",
        "",
        f"A Llama of random bfloat16 weights, {size / 1e9:.2f} GB, to NF4 with double quantization.",
        "",
        "| | seconds | GB of the base a second | of the plain read |",
        "|---|---:|---:|---:|",
    ]
    for key in sorted(seconds, key=lambda key: (key.endswith("cold"), key)):
        plain = seconds[f"plain read, {key.rpartition(' ')[2]}"]
        each = seconds[key]
        lines.append(f"| {key} | {each:.2f} | {size / 1e9 / each:.2f} | {plain / each:.0%} |")
    lines += ["", f"`python -m benchmarks.load`; medians. {in_words(facts)}"]
    page = "\n".join(lines) + "\n"
    results.mkdir(parents=True, exist_ok=True)
    (results / "load.md").write_text(page)
    (results / "load.json").write_text(
        json.dumps({"circumstances": facts, "bytes": size, "seconds": seconds}, indent=1) + "\n"
    )
    print(page)


if __name__ == "__main__":
    sys.exit(main())
