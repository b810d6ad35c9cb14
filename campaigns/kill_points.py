"""Every file system call of a save: killed in it by strace, then the same command again.

The run is QLoRA with packing and accumulation, stopped just before a save: one that retires an
older checkpoint, and one that replaces the checkpoint of the same step, whose evaluation a signal
had put off. From there each case resumes, is killed in the n-th call of one kind between the
start of the save and the end of the retirement, resumes by itself, and must end with the bits of
the run that was never stopped.
"""

from __future__ import annotations

import inspect
import os
import random
import shutil
import signal
import sys
from functools import partial
from types import FrameType
from typing import Any

from campaigns.children import Call, Strace, calls_of, need_strace, stop_before, wait_for_tracer
from campaigns.small_world import World
from campaigns.tally import Tally

__all__ = ["run"]

TRACED = "trace=%file,%desc"
END = "/end-of-the-save"
SAVES = {"retires": ("optim_step", 5), "replaces": ("evaluation", 2)}
"""What a SIGTERM comes before, so that the next save is of this kind."""


def run(tally: Tally, cases: int | None) -> None:
    need_strace()
    world = World.made(tally.folder)
    expected = world.whole(world.describe("whole"))
    killed = world.describe("killed")
    points = []
    for kind in SAVES:
        _stopped_before_the_save(world, kind)
        found = _points(world, kind)
        tally.remark(f"{len(found)} calls in a save that {kind}")
        points += [(kind, point) for point in found]
    if cases is not None:
        points = random.Random(0).sample(points, min(cases, len(points)))
    for kind, point in points:
        world.copy(tally.folder / kind, tally.folder / "killed")
        fault = _killed_in(world, point) or world.ends_the_same(killed, expected)
        tally.case(f"{kind}, {point}", fault)


def _stopped_before_the_save(world: World, kind: str) -> None:
    """Leaves the run's folder as a SIGTERM before the save does, under the name of the kind."""
    from pennyweight.evaluate import losses
    from pennyweight.train import Trainee

    name, nth = SAVES[kind]
    works = {"optim_step": Trainee.optim_step, "evaluation": losses._document_losses}
    code = inspect.unwrap(works[name])

    def stop() -> None:
        ask = partial(os.kill, os.getpid(), signal.SIGTERM)
        stop_before(code.__code__, nth, then=ask)

    shutil.rmtree(world.folder / "killed", ignore_errors=True)
    child = world.train(world.folder / "killed.yaml", before=stop)
    ended = child.wait()
    assert ended == 75, (ended, child.said)
    (world.folder / "killed").rename(world.folder / kind)


def _points(world: World, kind: str) -> list[Call]:
    """Every call from the start of the save to the end of the retirement."""
    world.copy(world.folder / kind, world.folder / "killed")
    child = world.train(world.folder / "killed.yaml", before=_stop_at_the_save(mark_end=True))
    assert child.until(child.stopped), child.said
    log = world.folder / "calls.log"
    strace = Strace(child, log, "-e", TRACED)
    assert child.wait() == 0, child.said
    strace.end()
    calls = calls_of(log)
    ends = [i for i, call in enumerate(calls) if END in call.text]
    assert ends, "the end of the save was not seen"
    return calls[: ends[0]]


def _stop_at_the_save(*, mark_end: bool = False) -> Any:
    from pennyweight.finetune.run import Run
    from pennyweight.train import checkpoint

    def mark(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is checkpoint.retire.__code__:
            sys.setprofile(None)
            os.access(END, os.F_OK)

    def stop() -> None:
        wait_for_tracer()
        if mark_end:
            sys.setprofile(mark)

    return lambda: stop_before(Run.save.__code__, 1, then=stop)


def _killed_in(world: World, point: Call) -> str | None:
    child = world.train(world.folder / "killed.yaml", before=_stop_at_the_save())
    if not child.until(child.stopped):
        return f"never came to the save: {child.said[-300:]}"
    inject = f"inject={point.name}:signal=KILL:when={point.number}"
    strace = Strace(child, world.folder / "kill.log", "-e", TRACED, "-e", inject)
    code = child.wait()
    strace.end()
    return None if code == -signal.SIGKILL else f"was not killed: it ended with {code}"
