"""A full disk, at every call that can find one and for as long as it takes.

`at_every_call`: strace lets each call that writes, makes, syncs or renames, from the command's
first to its last, fail once with "no space left". `filling_up`: the run's folder is a small file
system, too small from the start or filled up by another process on the way, and stays full until
space is freed. Each time no
checkpoint is lost, nothing half written is left over, the message names the file, and the same
command ends with the bits of the uninterrupted run.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from campaigns.children import (
    Call,
    Child,
    Strace,
    calls_of,
    need_strace,
    stop_before,
    wait_for_tracer,
)
from campaigns.small_world import World
from campaigns.tally import Absent, Tally

__all__ = ["at_every_call", "filling_up"]

WRITES = (
    "mkdir,openat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,ftruncate,link"
)
FULL = "No space left on device"
DISK, DONE = 74, 0
TRIES = 3
SMALLEST_KB, STEP_KB, SIZES, ROOMY_KB = 4, 16, 60, 8192


def at_every_call(tally: Tally, cases: int | None) -> None:
    need_strace()
    world = World.made(tally.folder)
    expected = world.whole(world.describe("whole"))
    description = world.describe("filled")
    points = _points(world, description)
    tally.remark(f"{len(points)} calls that write, from the command's first to its last")
    if cases is not None:
        points = random.Random(0).sample(points, min(cases, len(points)))
    for point in points:
        child = _refused(world, description, point)
        tally.case(
            str(point),
            _kept(world, description, child) or world.ends_the_same(description, expected),
        )


def filling_up(tally: Tally, cases: int | None) -> None:
    world = World.made(tally.folder)
    expected = world.whole(world.describe("whole"))
    description = world.describe("small")
    draw = random.Random(0)
    chosen: list[tuple[str, int, int]] = [
        ("at the start", 0, SMALLEST_KB + STEP_KB * i) for i in range(SIZES // 3)
    ]
    chosen += [
        (name, nth, draw.choice((0, 4, 8, 12, 16, 24, 32)))
        for name, nth in (*((w, n) for w in ("save", "step") for n in range(1, 6)), ("finish", 1))
        for _ in range(SIZES // 15)
    ]
    if cases is not None:
        chosen = draw.sample(chosen, min(cases, len(chosen)))
    refused = Counter[str]()
    for name, nth, left_kb in chosen:
        with _small_disk(world.folder / "small", left_kb if name == "at the start" else ROOMY_KB):
            child = _filled_by_another(world, description, name, nth, left_kb)
            refused[name] += child.wait() == DISK
            fault = _kept(world, description, child)
            (world.folder / "small" / "hog").unlink(missing_ok=True)
            _mount("-o", f"remount,size={ROOMY_KB}k", str(world.folder / "small"))
            fault = fault or world.ends_the_same(description, expected)
            tally.case(f"{name} {nth}, {left_kb} KB left", fault)
    told = ", ".join(f"{count} {name}" for name, count in refused.items())
    tally.remark(f"ended by the full disk: {told}")


def _refused(world: World, description: Path, point: Call) -> Child:
    """The command, this call of it refused.

    Files are opened for reading in between, now and then one more or less, and are counted too: a
    run whose refused call only reads met what no full disk does, and is made again.
    """
    inject = f"inject={point.name}:error=ENOSPC:when={point.number}"
    log = world.folder / "calls.log"
    for _ in range(TRIES):
        _forget(world, description)
        child = world.train(description, before=partial(_fresh, world))
        assert child.until(child.stopped), child.said
        strace = Strace(child, log, "-e", f"trace={WRITES}", "-e", inject)
        child.wait()
        strace.end()
        if all(_writes(call) for call in calls_of(log) if "(INJECTED)" in call.text):
            break
    return child


def _writes(call: Call) -> bool:
    return call.name != "openat" or "O_CREAT" in call.text


def _filled_by_another(world: World, description: Path, name: str, nth: int, left_kb: int) -> Child:
    """The command, and at the n-th call of `name` a file beside it that leaves so many KB."""
    if name == "at the start":
        return world.train(description)
    from pennyweight.finetune.run import Run
    from pennyweight.report import Report

    code = {"save": Run.save, "step": Report.step, "finish": Run.finish}[name].__code__
    child = world.train(description, before=partial(stop_before, code, nth))
    if child.until(child.stopped):
        place = world.folder / "small"
        room = shutil.disk_usage(place).free - left_kb * 1024
        (place / "hog").write_bytes(bytes(max(0, room)))
        child.send(signal.SIGCONT)
    return child


def _fresh(world: World) -> None:
    """In the child: a data cache of its own, and the tracer is waited for."""
    os.environ["PENNYWEIGHT_CACHE"] = str(world.folder / "filled-cache")
    wait_for_tracer()


def _forget(world: World, description: Path) -> None:
    shutil.rmtree(description.with_suffix(""), ignore_errors=True)
    shutil.rmtree(world.folder / "filled-cache", ignore_errors=True)


def _points(world: World, description: Path) -> list[Call]:
    """The calls of a whole run that a full disk can refuse."""
    _forget(world, description)
    child = world.train(description, before=partial(_fresh, world))
    assert child.until(child.stopped), child.said
    log = world.folder / "calls.log"
    strace = Strace(child, log, "-e", f"trace={WRITES}")
    assert child.wait() == DONE, child.said
    strace.end()
    return [call for call in calls_of(log) if _writes(call) and " = -1 " not in call.text]


def _kept(world: World, description: Path, child: Child) -> str | None:
    """The command ended as promised, and what it left is whole."""
    run = description.with_suffix("")
    if child.code not in (DISK, DONE):
        return f"ended with {child.code}: {child.said[-400:]}"
    if child.code == DISK and not re.search(
        rf"({FULL}|MB are free).*free some", child.said, re.S | re.I
    ):
        return f"the message does not say it: {child.said[-400:]}"
    places = (run, world.folder / "filled-cache")
    litter = [p.name for place in places for p in place.rglob(".*")]
    if litter:
        return f"left over: {', '.join(litter[:4])}"
    return _all_whole(run / "checkpoints")


def _all_whole(checkpoints: Path) -> str | None:
    from pennyweight.errors import DiskError
    from pennyweight.train import load_step
    from pennyweight.train.checkpoint import steps_in

    for step in steps_in(checkpoints):
        try:
            load_step(checkpoints, step)
        except DiskError as fault:
            return str(fault)
    return None


@contextmanager
def _small_disk(place: Path, size_kb: int) -> Iterator[None]:
    """A file system of so many KB at `place`; Absent where this user may not mount."""
    place.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size_kb}k,nr_inodes=4k", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _mount(*arguments: str) -> None:
    if shutil.which("mount") is None or os.name == "nt":
        raise Absent("no `mount` here")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Absent(f"a small file system cannot be mounted: {done.stderr.strip()} (needs root)")
