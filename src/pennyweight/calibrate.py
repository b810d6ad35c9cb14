"""What this machine takes and gives a run, measured on the built-in model, for `plan`; once, unless
other work disturbed it.

Products, dequantization and two training steps, a short and a long one, are timed in a process of
its own, which also tells what it holds beside tensors. The two steps give what a plan cannot know
of a processor: seconds an operation costs however small it is, and bytes a second that everything
between the products sweeps.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pennyweight.allocator import tuned
from pennyweight.config import BaseConfig, DataConfig, Method, RunConfig, TrainConfig, resolve
from pennyweight.files import whole
from pennyweight.plan import Device, Setting, named_device, paced, resident_bytes, shapes_of

__all__ = ["Measured", "calibrated", "remembered"]

SHORT, LONG = 64, 1024
LONGEST_S = 180.0
# Of the time that threads ran, how much they may have waited for a processor: 0 on an idle machine.
MOST_WAITED = 0.1


@dataclass(frozen=True, slots=True)
class Measured:
    """`process_bytes`: resident beside tensors. `flops`, `dequantized`: float32 operations and
    weights a second. `short_s`, `long_s`: a step of SHORT and of LONG tokens, built-in model.
    `waited`: seconds its threads waited for a processor, over those they ran."""

    process_bytes: int | None
    flops: float
    dequantized: float
    short_s: float
    long_s: float
    waited: float = 0.0


def calibrated(device: Device, config: RunConfig, *, cache: Path | None = None) -> Device:
    """The processor of this machine with what was measured of it, now or earlier.

    What was measured while the machine was busy counts this time, and is measured again the next.

    Other devices, and a machine on which nothing could be measured, are given back as they are.
    `cache`: default `$PENNYWEIGHT_CACHE`, else `~/.cache/pennyweight`.
    """
    if device.kind != "cpu":
        return device
    file, method = _file(cache), config.train.method
    key, known = _key(method), _read(file)
    if key not in known:
        found = _in_a_process(method)
        if found is None:
            return device
        known[key] = asdict(found)
        if found.waited <= MOST_WAITED:
            _keep(file, known)
    return _told(device, Measured(**known[key]), method)


def remembered(config: RunConfig, *, cache: Path | None = None) -> Device | None:
    """This machine's processor as it was measured earlier; None where it was not, or a run on
    another device is described. Nothing is measured now."""
    method = config.train.method
    known = _read(_file(cache)).get(_key(method))
    if known is None or config.base.device not in ("auto", "cpu"):
        return None
    device = named_device(config.base.device)
    return _told(device, Measured(**known), method) if device.kind == "cpu" else None


def _told(device: Device, measured: Measured, method: Method) -> Device:
    told = replace(
        device,
        fp32=measured.flops,
        dequantized=measured.dequantized,
        process_bytes=measured.process_bytes,
        launch_s=0.0,  # until the steps tell
    )
    shapes, builtin = shapes_of("builtin"), _described(method)
    return paced(
        told,
        [
            (Setting(_of_tokens(builtin, tokens), shapes, told), seconds)
            for tokens, seconds in ((SHORT, measured.short_s), (LONG, measured.long_s))
        ],
    )


def _file(cache: Path | None) -> Path:
    named = os.environ.get("PENNYWEIGHT_CACHE")
    folder = cache or (Path(named) if named else Path.home() / ".cache" / "pennyweight")
    return folder / "machine.json"


def _key(method: Method) -> str:
    return json.dumps([method, _circumstances()])


def _circumstances() -> list[str]:
    """What the figures hold for: a machine as it is set up, and an environment: which packages are
    there decides what transformers imports, a hundred megabytes more or less."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = ("pennyweight", "torch", "transformers")
    return [
        platform.node(),
        platform.python_version(),
        f"{threads} of {cores}",
        *map(version, names),
        _packages(),
        "tuned" if tuned() else "",
    ]


def _packages() -> str:
    """A digest of what is installed where Python looks."""
    installed = {
        entry.name for place in sys.path for entry in Path(place or ".").glob("*.dist-info")
    }
    return hashlib.sha256("\n".join(sorted(installed)).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for told in found.values():
            Measured(**told)
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return dict(found)


def _keep(file: Path, known: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as partial:
            partial.write_text(json.dumps(known, indent=1), encoding="utf-8")
    except OSError:
        return  # it is measured again next time


def _in_a_process(method: Method) -> Measured | None:
    command = [sys.executable, "-m", "pennyweight.calibrate", method]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=LONGEST_S
        )
        return Measured(**json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError):
        return None


def _described(method: Method) -> RunConfig:
    """The built-in model trained by this method."""
    return resolve(
        RunConfig(
            base=BaseConfig(model="builtin", device="cpu", dtype="float32"),
            data=DataConfig(train="builtin", packing=False),
            train=TrainConfig(
                method=method, batch_size=1, max_steps=8, gradient_checkpointing=False
            ),
        )
    )


def _of_tokens(config: RunConfig, tokens: int) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"max_length": tokens})})


def measure(method: Method) -> Measured:
    """Measure it in this process, which should have done nothing else yet."""
    import torch

    from pennyweight.data.batch import Batch
    from pennyweight.finetune.learner import trainee, what_learns
    from pennyweight.model import load_base

    config = _described(method)
    base = load_base(config.base, trainable=method == "full")
    parameters = what_learns(base, config)
    learner = trainee(base, config, parameters, total_steps=8)

    def step(tokens: int) -> None:
        batch = Batch(
            ids=torch.arange(tokens) % 256,
            trained=torch.ones(tokens, dtype=torch.bool),
            positions=torch.arange(tokens),
            boundaries=(0, tokens),
            adapters=(None if method == "full" else "default",),
            sources=("calibration",),
        )
        learner.forward_backward(batch)
        learner.optim_step()

    step(SHORT)
    held = [*base.module.parameters(), *base.module.buffers()]
    held += [t for state in learner.optimizer.state.values() for t in state.values()]
    resident = resident_bytes()
    short_s = _fastest(lambda: step(SHORT), 3)
    left, right = torch.randn(512, 1024), torch.randn(1024, 1024)
    product_s = _fastest(lambda: left @ right, 5)
    return Measured(
        process_bytes=None if resident is None else resident - sum(t.nbytes for t in held),
        flops=2.0 * left.numel() * right.shape[1] / product_s,
        dequantized=_dequantized(right),
        short_s=short_s,
        long_s=_fastest(lambda: step(LONG), 2),
        waited=_waited(),
    )


def _waited() -> float:
    """Of this process's threads so far, on Linux; 0 where the system does not tell."""
    ran = waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        on_it, for_it, _ = map(int, thread.read_text().split())
        ran, waited = ran + on_it, waited + for_it
    return waited / ran if ran else 0.0


def _dequantized(weight: Any) -> float:
    """Weights a second that NF4 with nested scales is turned back into."""
    from pennyweight.quant import dequantize_4bit, quantize_4bit

    stored = quantize_4bit(weight)
    return float(weight.numel() / _fastest(lambda: dequantize_4bit(stored), 5))


def _fastest(act: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of so many."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return min(taken)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1]))))  # type: ignore[arg-type]
