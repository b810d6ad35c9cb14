"""What one rendering has used of its time and size, and the refusal when it asks for more."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.runtime import Macro
from jinja2.utils import Cycler, Joiner, Namespace

from pennyweight.errors import DataError

__all__ = [
    "DEADLINE_S",
    "OUTPUT_LIMIT_CHARS",
    "Meter",
    "TemplateRefusedError",
    "bounded",
    "is_rendering",
    "joined",
    "metered",
    "metering",
    "printable",
    "the_meter",
    "too_large",
    "written",
]

DEADLINE_S = 0.5
OUTPUT_LIMIT_CHARS = 8_000_000
ITEMS_LIMIT = 50_000
_STEPS_BETWEEN_CLOCKS = 64
_OTHER = "use another template (data.template: plain, chatml or a Jinja file)"


class TemplateRefusedError(DataError):
    """The template broke a bound; no row can be rendered with it."""


class Meter:
    """What one rendering has used. Thread time, so that a busy machine refuses nobody; it runs from
    the first look at the clock, which most templates end without.
    """

    __slots__ = ("chars", "deadline", "steps")

    def __init__(self) -> None:
        self.steps, self.chars = 0, 0
        self.deadline: float | None = None

    def step(self) -> None:
        self.steps += 1
        if self.steps % _STEPS_BETWEEN_CLOCKS == 0:
            self.check_clock()

    def check_clock(self) -> None:
        now = time.thread_time()
        if self.deadline is None:
            self.deadline = now + DEADLINE_S
        elif now > self.deadline:
            raise TemplateRefusedError(
                f"chat template: ran longer than {DEADLINE_S:g} s and was stopped; {_OTHER}"
            )

    def write(self, chars: int) -> None:
        self.chars += chars
        if self.chars > OUTPUT_LIMIT_CHARS:
            raise too_large()


_meter: ContextVar[Meter] = ContextVar("meter of the rendering under way")


@contextmanager
def metering() -> Iterator[Meter]:
    """A new meter for what is rendered inside."""
    token = _meter.set(meter := Meter())
    try:
        yield meter
    finally:
        _meter.reset(token)


def the_meter() -> Meter:
    return _meter.get()


def is_rendering() -> bool:
    """False while Jinja folds constants at compile time, where nothing is counted."""
    return _meter.get(None) is not None


def too_large() -> TemplateRefusedError:
    return TemplateRefusedError(
        f"chat template: builds more than {OUTPUT_LIMIT_CHARS:,} characters for one row; {_OTHER}"
    )


def metered(values: Iterable[Any]) -> Iterator[Any]:
    """The same values, each a step."""
    meter = the_meter()
    for value in values:
        meter.step()
        yield value


def bounded(value: Any) -> Any:
    """Count a value a template has just built; refuse one that holds too much.

    A list that holds the same list or the same long text twice grows twofold with each step and
    only shows it when printed or compared, so what is counted is what a walk through the value
    would meet.
    """
    if isinstance(value, str):
        the_meter().write(len(value))
    elif isinstance(value, list | tuple | dict):
        items, chars, waiting = 0, 0, [value]
        while waiting:
            held = waiting.pop()
            items += len(held)
            inner = [*held, *held.values()] if isinstance(held, dict) else held
            if items > ITEMS_LIMIT:
                raise too_large()
            for each in inner:
                if isinstance(each, str):
                    chars += len(each)
                elif isinstance(each, list | tuple | dict):
                    waiting.append(each)
            if chars > OUTPUT_LIMIT_CHARS:
                raise too_large()
    return value


def printable(value: Any) -> Any:
    if isinstance(value, Namespace | Macro | Cycler | Joiner):
        raise ValueError(f"prints a {type(value).__name__}, which is not text")
    return value


def joined(*values: Any) -> str:
    """`a ~ b`."""
    parts = [str(printable(value)) for value in values]
    the_meter().write(sum(map(len, parts)))
    return "".join(parts)


def written(value: Any) -> Any:
    """Called by Jinja on each value a template prints, also inside macros and set blocks."""
    if is_rendering():
        chars = len(value) if isinstance(value, str) else len(str(printable(value)))
        the_meter().write(chars)
    return value
