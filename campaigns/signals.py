"""SIGTERM and Ctrl-C at any instant: 75, durable, resumable, within one optimizer step and a second.

Half of the signals come at random times of the command, half at the first instruction of a named
piece of work: reading the base, preparing data, a micro-step, an optimizer step, an evaluation,
a save, the last writing. The clock runs from the signal to the end of the process.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from inspect import unwrap
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from campaigns.children import Child, stop_before
from campaigns.small_world import World
from campaigns.tally import Tally

__all__ = ["run", "twice"]

SIGNALS = 50
GRACE_S = 1.0


def run(tally: Tally, cases: int | None) -> None:
    """One signal."""
    world = World.made(tally.folder)
    begun = time.monotonic()
    expected = world.whole(world.describe("whole"))
    whole_s = time.monotonic() - begun
    description = world.describe("stopped")
    draw = random.Random(0)
    slowest_s, wanted = 0.0, (cases or 2 * SIGNALS) // 2
    for i in range(wanted):
        label, fault, seconds = _at_random(world, description, draw, whole_s)
        slowest_s = max(slowest_s, seconds)
        tally.case(f"random {i}, {label}", fault or world.ends_the_same(description, expected))
    chosen = [(name, code, nth) for name, code, counts in _works() for nth in counts]
    for i in range(wanted):
        name, code, nth = chosen[i % len(chosen)] if cases is None else draw.choice(chosen)
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        fault, seconds = _in_the_work(world, description, code, nth, number)
        slowest_s = max(slowest_s, seconds)
        label = f"{number.name} in {name} {nth}"
        tally.case(label, fault or world.ends_the_same(description, expected))
    tally.remark(f"slowest {slowest_s:.2f} s from signal to end")


def twice(tally: Tally, cases: int | None) -> None:
    """A second signal, while the first one's step, evaluation or save goes on."""
    world = World.made(tally.folder)
    expected = world.whole(world.describe("whole"))
    description = world.describe("stopped")
    works = {name: code for name, code, _ in _works()}
    saving = ("save", "writing", "retirement")
    pairs = [
        (first, nth, second)
        for first, nth, seconds in (
            *(
                ("micro-step", nth, ("micro-step", "optimizer step", *saving))
                for nth in _followed_by_another(world, description, works)
            ),
            ("optimizer step", 4, saving),
            ("evaluation", 2, saving),
        )
        for second in seconds
    ]
    slowest_s = 0.0
    for i in range(cases or SIGNALS):
        first, nth, second = pairs[i % len(pairs)]
        shutil.rmtree(description.with_suffix(""), ignore_errors=True)
        sent = world.folder / "sent"
        sent.unlink(missing_ok=True)

        again = partial(_ask_and_send, works[second], sent)
        before = partial(stop_before, works[first], nth, then=again)
        if first == "evaluation":
            before = partial(_in_an_evaluation, nth, again)
        child = world.train(description, before=before)
        code = child.wait()
        seconds = _since(sent)
        slowest_s = max(slowest_s, seconds)
        fault = None if code == 130 else f"ended with {code}: {child.said[-300:]}"
        fault = fault or _last_is_whole(description)
        label = f"{second} after a signal in {first} {nth}"
        tally.case(f"{i}, {label}", fault or world.ends_the_same(description, expected))
    tally.remark(f"slowest {slowest_s:.2f} s from the second signal to the end")


def _followed_by_another(
    world: World, description: Path, works: dict[str, CodeType]
) -> tuple[int, ...]:
    """Two micro-steps, by their number, that another of the same optimizer step follows."""
    names = {works[name]: name for name in ("micro-step", "optimizer step")}
    order = world.folder / "order"
    order.unlink(missing_ok=True)

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in names:
            with order.open("a") as file:
                file.write(names[frame.f_code] + "\n")

    world.train(description, before=partial(sys.setprofile, note)).wait()
    done = order.read_text().splitlines()
    steps = [i for i, name in enumerate(done) if name == "micro-step"]
    followed = [n for n, i in enumerate(steps, 1) if done[i + 1] == "micro-step"]
    return followed[len(followed) // 3], followed[2 * len(followed) // 3]


def _ask_and_send(code: CodeType, sent: Path) -> None:
    """In the child: the first signal now, the second at the next call of this code."""
    stop_before(code, 1, then=partial(_send, signal.SIGINT, sent))
    os.kill(os.getpid(), signal.SIGTERM)


def _in_an_evaluation(nth: int, then: Callable[[], object]) -> None:
    """In the child: `then` at the run's n-th evaluation, which a signal ends by an exception; one
    that is raised in a profiler would end the profiler too."""
    from pennyweight.finetune import run

    measured, left = run.loss_by_batch, nth

    def asked(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            then()
        return measured(*arguments)

    run.loss_by_batch = asked


def _works() -> list[tuple[str, CodeType, tuple[int, ...]]]:
    """Pieces of work: their name, their function, and at which of their calls a signal comes."""
    import pennyweight.finetune as page
    from pennyweight.evaluate import losses
    from pennyweight.finetune.run import Run
    from pennyweight.runs import RunFolder
    from pennyweight.train import Trainee, checkpoint

    def code(function: Callable[..., object]) -> CodeType:
        return unwrap(function).__code__

    return [
        ("loading", code(page.load_base), (1,)),
        ("preparing", code(page.prepare), (1,)),
        ("planning", code(page.plan), (1,)),
        ("describing", code(RunFolder.keep_held_out), (1,)),
        ("micro-step", code(Trainee.forward_backward), (1, 2, 3, 6, 9, 12)),
        ("optimizer step", code(Trainee.optim_step), (1, 4, 8)),
        ("evaluation", code(losses._document_losses), (1, 2, 3, 4, 5)),
        ("save", code(Run.save), (1, 2, 4)),
        ("writing", code(checkpoint._write), (1, 3)),
        ("retirement", code(checkpoint.retire), (1, 3)),
        ("finish", code(Run.finish), (1,)),
        ("weights", code(RunFolder.keep_weights), (1,)),
    ]


def _at_random(
    world: World, description: Path, draw: random.Random, whole_s: float
) -> tuple[str, str | None, float]:
    """A signal at a random time, in a run that was not done by then: label, fault, seconds to the end."""
    while True:
        shutil.rmtree(description.with_suffix(""), ignore_errors=True)
        number = draw.choice((signal.SIGTERM, signal.SIGINT))
        child = world.train(description)
        if not child.until(child.listens):
            return "start", f"ended with {child.code} before it listened: {child.said}", 0.0
        wait_s = draw.uniform(0, whole_s)
        until = time.monotonic() + wait_s
        if not child.until(lambda until=until: time.monotonic() >= until):  # type: ignore[misc]
            continue
        sent = time.monotonic()
        child.send(number)
        code = child.wait()
        seconds = time.monotonic() - sent
        if code != 0:  # else it was done before the signal reached it
            label = f"{number.name} after {wait_s:.2f} s"
            return label, _ended_well(child, code, description, seconds), seconds


def _in_the_work(
    world: World, description: Path, code: CodeType, nth: int, number: signal.Signals
) -> tuple[str | None, float]:
    shutil.rmtree(description.with_suffix(""), ignore_errors=True)
    sent = world.folder / "sent"
    sent.unlink(missing_ok=True)
    child = world.train(
        description, before=partial(stop_before, code, nth, then=partial(_send, number, sent))
    )
    ended = child.wait()
    seconds = _since(sent)
    return _ended_well(child, ended, description, seconds), seconds


def _send(number: signal.Signals, sent: Path) -> None:
    sent.write_text(repr(time.monotonic()))
    os.kill(os.getpid(), number)


def _since(sent: Path) -> float:
    return time.monotonic() - float(sent.read_text()) if sent.exists() else 0.0


def _ended_well(child: Child, code: int, description: Path, seconds: float) -> str | None:
    if code != 75:
        return f"ended with {code}: {child.said[-300:]}"
    if f"resume: pennyweight train {description}" not in child.said:
        return f"the command to resume was not printed: {child.said[-300:]}"
    allowed_s = _longest_step_s(description) + GRACE_S
    if seconds > allowed_s:
        return f"took {seconds:.2f} s, a step and a second are {allowed_s:.2f} s"
    return _last_is_whole(description)


def _longest_step_s(description: Path) -> float:
    from pennyweight.report import read_events

    log = description.with_suffix("") / "events.jsonl"
    steps = [e["seconds"] for e in read_events(log) if e["kind"] == "step"] if log.exists() else []
    return max(steps, default=0.0)


def _last_is_whole(description: Path) -> str | None:
    """What the rule of loading says against the newest checkpoint."""
    from pennyweight.errors import DiskError
    from pennyweight.train import load_latest

    try:
        found = load_latest(description.with_suffix("") / "checkpoints")
    except DiskError as fault:
        return str(fault)
    return f"passed over: {found[1]}" if found and found[1] else None
