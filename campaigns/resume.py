"""Resumed = uninterrupted, to the bit: adapter, optimizer, metric log.

Every cut of a run of several epochs, with accumulation 1, 2 and 4, with packing and without, with
moments in 32 and in 8 bits, paged too, and one chain of resumes through all cuts. Each leg is a
process of its own.
"""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path

from campaigns.children import stop_before
from campaigns.small_run import STEPS
from campaigns.small_world import World
from campaigns.tally import Tally

__all__ = ["run"]

Setting = tuple[str, bool, int]
SETTINGS: list[Setting] = [
    *(("adamw_torch", packing, count) for packing in (True, False) for count in (1, 2, 4)),
    ("adamw_8bit", True, 2),
    ("paged_adamw_8bit", False, 2),
]


def run(tally: Tally, cases: int | None) -> None:
    world = World.made(tally.folder)
    cuts = {(setting, step) for setting in SETTINGS for step in range(1, STEPS)}
    if cases is not None:
        cuts = set(random.Random(0).sample(sorted(cuts), min(cases, len(cuts))))
    for setting in SETTINGS:
        optim, packing, accumulation = setting
        name = f"{optim}-{'packed' if packing else 'unpacked'}-{accumulation}"
        shape: dict[str, object] = {
            "data__packing": packing,
            "train__gradient_accumulation_steps": accumulation,
            "train__optim": optim,
        }
        if "8bit" in optim:
            # So wide that its moments are held in 8 bits.
            shape["adapter"] = {"r": 128, "lora_dropout": 0.1}
        if not packing:
            shape |= {"train__tokens_per_step": None, "train__batch_size": 3}
        chained = cases is None or setting == ("adamw_torch", True, 2)
        mine = [step for cut, step in sorted(cuts) if cut == setting]
        if not mine and not chained:
            continue
        expected = world.whole(world.describe(f"{name}-whole", **shape))
        for step in mine:
            description = world.describe(f"{name}-cut-{step}", **shape)
            fault = _interrupted(world, description, 1, step)
            fault = fault or world.ends_the_same(description, expected)
            tally.case(f"{name}, cut after step {step}", fault)
        if chained:
            _chain(world, tally, world.describe(f"{name}-chain", **shape), expected)
    tally.remark(f"{STEPS} steps, up to {_epochs(world):.1f} epochs")


def _interrupted(world: World, description: Path, first: int, step: int) -> str | None:
    """A run that goes on at step `first` gets a SIGTERM in `step`, which it finishes and saves."""
    from pennyweight.train import Trainee

    def before() -> None:
        ask = partial(os.kill, os.getpid(), signal.SIGTERM)
        stop_before(Trainee.optim_step.__code__, step - first + 1, then=ask)

    child = world.train(description, before=before)
    code = child.wait()
    saved = (description.with_suffix("") / "checkpoints" / f"step-{step:06d}").is_dir()
    return None if code == 75 and saved else f"ended with {code}: {child.said[-300:]}"


def _chain(world: World, tally: Tally, description: Path, expected: str) -> None:
    """A resume for every step."""
    for step in range(1, STEPS):
        fault = _interrupted(world, description, step, step)
        if fault is not None:
            tally.case(f"{description.stem}, at step {step}", fault)
            return
    tally.case(
        f"{description.stem}, {STEPS - 1} resumes", world.ends_the_same(description, expected)
    )


def _epochs(world: World) -> float:
    """Passes over the data that the longest of the runs made."""
    from pennyweight.report import read_events

    logs = world.folder.glob("*-whole/events.jsonl")
    return max(e["epoch"] for log in logs for e in read_events(log) if e["kind"] == "step")
