"""SIGKILL at random instants of a run, from its first import to its last file, then the same command.

A run is killed, resumed, killed again until it ends by itself; then it must have ended with the
bits of the uninterrupted one, and the next one begins from nothing, its data cache too. One kill in
ten goes to the true `python -m pennyweight train`, interpreter start included.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from campaigns.small_run import bits
from campaigns.small_world import World
from campaigns.tally import Tally

__all__ = ["run", "same_command"]

KILLS, TRUE_SHARE = 200, 0.1


def run(tally: Tally, cases: int | None) -> None:
    wanted = cases or KILLS
    world = World.made(tally.folder)
    expected = world.whole(world.describe("whole"))
    draw = random.Random(0)
    true_ones = round(wanted * TRUE_SHARE)
    _chains(world, tally, expected, draw, kills=wanted - true_ones, forked=True)
    if true_ones:  # the short form is spared the start of an interpreter
        _chains(world, tally, expected, draw, kills=true_ones, forked=False)


def _chains(
    world: World, tally: Tally, expected: str, draw: random.Random, *, kills: int, forked: bool
) -> None:
    description = world.describe("killed")
    start = _Forked(world, description) if forked else _True(description)
    start.forget()
    longest_s, done, ends = 0.0, 0, 0
    while done < kills:
        begun = time.monotonic()
        ended = start.killed_after(draw.uniform(0, 0.8 * longest_s) if longest_s else None)
        took_s = time.monotonic() - begun
        if ended is None:
            done += 1
            tally.case(f"{start.kind} kill {done} after {took_s:.2f} s", None)
            continue
        fault = None if ended == 0 else f"the same command again ended with {ended}: {start.said()}"
        if fault is None and bits(description.with_suffix("")) != expected:
            fault = "the resumed run ended with other bits"
        if litter := [p.name for p in description.with_suffix("").rglob(".*")]:
            fault = f"left over: {', '.join(litter[:4])}"
        if fault:
            tally.survived -= 1  # the kill before it
            tally.tried -= 1
            tally.case(f"{start.kind} kill {done}", fault)
        longest_s, ends = max(longest_s, took_s), ends + 1
        start.forget()
    ended = start.killed_after(None)
    if ended != 0 or bits(description.with_suffix("")) != expected:
        tally.survived -= 1
        tally.tried -= 1
        tally.case(f"{start.kind} kill {done}", f"the last run ended with {ended}: {start.said()}")
    tally.remark(f"{kills} kills of {ends + 1} {start.kind} runs")


class _Forked:
    """The command in a forked child, with a data cache of the chain's own."""

    kind = "forked"

    def __init__(self, world: World, description: Path) -> None:
        self._world, self._description = world, description
        self._cache = world.folder / "chain-cache"

    def killed_after(self, seconds: float | None) -> int | None:
        """None where the kill met it; else the code it ended with."""
        child = self._world.train(
            self._description,
            before=lambda: os.environ.update({"PENNYWEIGHT_CACHE": str(self._cache)}),
        )
        if seconds is not None:
            until = time.monotonic() + seconds
            child.until(lambda: time.monotonic() >= until)
            child.send(signal.SIGKILL)
        code = child.wait()
        return None if code == -signal.SIGKILL else code

    def said(self) -> str:
        return self._description.with_suffix(".said").read_text()[-300:]

    def forget(self) -> None:
        shutil.rmtree(self._description.with_suffix(""), ignore_errors=True)
        shutil.rmtree(self._cache, ignore_errors=True)


class _True:
    """`python -m pennyweight train`, as anybody starts it."""

    kind = "true"

    def __init__(self, description: Path) -> None:
        self._description = description
        self._said = description.with_suffix(".said")

    def start(self) -> subprocess.Popen[bytes]:
        with self._said.open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "pennyweight", "train", str(self._description)],
                stdout=said,
                stderr=said,
            )

    def killed_after(self, seconds: float | None) -> int | None:
        process = self.start()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        return None if code == -signal.SIGKILL else code

    def said(self) -> str:
        return self._said.read_text()[-300:]

    def forget(self) -> None:
        shutil.rmtree(self._description.with_suffix(""), ignore_errors=True)


def same_command(tally: Tally, cases: int | None) -> None:
    """The true command, stopped in every way there is, and given again after it was done."""
    world = World.made(tally.folder)
    expected = world.whole(world.describe("whole"))
    description = world.describe("again")
    command = _True(description)
    events = description.with_suffix("") / "events.jsonl"
    # (signal, after so many steps, exit code); None: left alone.
    story = [
        (signal.SIGTERM, 1, 75),
        (signal.SIGKILL, 3, -signal.SIGKILL),
        (signal.SIGINT, 5, 75),
        (signal.SIGKILL, 7, -signal.SIGKILL),
        (None, 8, 0),
        (None, 8, 0),
    ]
    short = [(signal.SIGTERM, 3, 75), (None, 8, 0)]
    for number, steps, code in story if cases is None else short:
        process = command.start()
        while number and process.poll() is None and _steps_in(events) < steps:
            time.sleep(0.002)
        if number and process.poll() is None:
            process.send_signal(number)
        ended = process.wait(300)
        label = f"{number.name if number else 'left alone'} after step {steps}"
        fault = None if ended == code else f"ended with {ended}: {command.said()}"
        if ended == 75 and f"train {description}" not in command.said():
            fault = f"the command to resume was not printed: {command.said()}"
        if ended == 0 and bits(description.with_suffix("")) != expected:
            fault = "ended with other bits"
        tally.case(label, fault)


def _steps_in(events: Path) -> int:
    return events.read_text().count('"kind": "step"') if events.exists() else 0
