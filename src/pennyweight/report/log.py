"""`events.jsonl`: one JSON object a line, appended and never rewritten but for a resume.

    {"time": "2026-01-31T12:00:00.123Z", "kind": "step", "number": 10, "loss": 1.25, ...}

A checkpoint records the log's length in bytes. Resuming cuts the log back to it, so that steps
taken after the checkpoint, and lost, are not told twice: apart from the clock the resumed log
equals the log of a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pennyweight.errors import DiskError
from pennyweight.report.progress import Pace, progress_line
from pennyweight.report.sinks import Sink, open_sinks

__all__ = ["CLOCK_FIELDS", "Report", "metrics_of", "plain", "read_events"]

CLOCK_FIELDS = frozenset({"time", "seconds", "tokens_per_second", "eta_seconds"})
"""Fields that depend on the clock; everything else of a run is the same again."""


class Report:
    """The log of one run, its progress lines and its sinks.

    `sinks`: names of `train.report_to`, or sinks. `label` stands before every line it prints. A run that is under way again calls `begin` or
    `resume` before its first step; until then its events wait behind those of the earlier one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        sinks: Sequence[str | Sink] = (),
        label: str = "",
    ) -> None:
        self._label = f"{label}: " if label else ""
        self.path = Path(folder) / "events.jsonl"
        names = [sink for sink in sinks if isinstance(sink, str)]
        ready = [sink for sink in sinks if not isinstance(sink, str)]
        self._sinks = (*open_sinks(names, folder), *ready)
        self._pace = Pace()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            how = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._file = os.open(self.path, how, 0o644)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._opened_at = _cut_torn_line(self._file)

    def begin(self) -> None:
        """Forget the events of an earlier run of this folder that left no checkpoint."""
        self._keep(0)

    def resume(self, at_offset: int) -> None:
        """Forget the events after `at_offset`, the bytes that the run's checkpoint recorded.

        A log that is shorter, or has no line ending there, was changed by somebody; it is kept as
        it is, and the event `log_changed` says so: training goes on.
        """
        ends_a_line = at_offset == 0 or (
            at_offset <= self._opened_at and _read_at(self._file, 1, at_offset - 1) == b"\n"
        )
        if ends_a_line:
            self._keep(at_offset)
        else:
            self.event("log_changed", recorded_bytes=at_offset, found_bytes=self._opened_at)

    def _keep(self, offset: int) -> None:
        """Cut what an earlier run logged after `offset`; what was logged since opening moves up."""
        length = os.fstat(self._file).st_size
        since = _read_at(self._file, length - self._opened_at, self._opened_at)
        os.ftruncate(self._file, offset)
        self._append(since)
        self._opened_at = offset

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line. Numbers that are not finite are written as the texts nan, inf, -inf."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps(
            {"time": now, "kind": kind, **{name: plain(fields[name]) for name in fields}},
            ensure_ascii=False,
            allow_nan=False,
        )
        self._append(line.encode("utf-8", "backslashreplace") + b"\n")
        if self._sinks and isinstance(number := fields.get("number"), int):
            values = {
                f"{kind}/{name}": float(value)
                for name, value in fields.items()
                if name != "number" and isinstance(value, int | float)
            }
            for sink in self._sinks:
                sink.write(number, values)

    def step(self, step: Any, *, total_steps: int, every: int = 10) -> None:
        """Log a training step, and print a line for the first, the last and each `every`th.

        `step` is a dataclass with number, loss, learning_rate, tokens and seconds.
        """
        self.event("step", **_fields_of(step))
        self._pace.add(tokens=step.tokens, seconds=step.seconds)
        if step.number in (1, total_steps) or step.number % every == 0:
            self.say(
                progress_line(
                    step.number,
                    total_steps,
                    loss=step.loss,
                    learning_rate=step.learning_rate,
                    tokens_per_second=self._pace.tokens_per_second,
                    eta_seconds=self._pace.seconds_a_step * (total_steps - step.number),
                )
            )

    def evaluation(self, number: int, loss: float, **fields: Any) -> None:
        """Log the held-out loss after step `number`, in nats per trained token, and print it."""
        self.event("evaluation", number=number, loss=loss, **fields)
        self.say(f"  held out after step {number}: loss {loss:.4f}")

    def say(self, text: str) -> None:
        """A line for the person at the terminal. That stderr is closed, or its disk full, is no
        reason to end a run: its figures stand in the log.
        """
        with contextlib.suppress(OSError):
            print(self._label + text, file=sys.stderr, flush=True)

    @property
    def offset(self) -> int:
        """The log's length in bytes once all of it is on the disk, for a checkpoint to record."""
        try:
            os.fsync(self._file)
            return os.fstat(self._file).st_size
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        """Write the line whole, or leave the log as it was."""
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise _unwritable(self.path, error) from error


def _cut_torn_line(file: int) -> int:
    """Remove what follows the last line end, a line cut short by a kill; gives the length."""
    length = end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - 65536)
        newline = _read_at(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end != length:
        os.ftruncate(file, end)
    return end


def _read_at(file: int, count: int, offset: int) -> bytes:
    """As os.pread, which Windows lacks; writing appends wherever reading left off."""
    os.lseek(file, offset, os.SEEK_SET)
    return os.read(file, count)


def _unwritable(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"{path}: could not be written: {error.strerror}; free some space or mend its rights, "
        "then run the same command again"
    )


def _fields_of(step: Any) -> Mapping[str, Any]:
    return {each.name: getattr(step, each.name) for each in dataclasses.fields(step)}


def plain(value: Any) -> Any:
    """A value as JSON has it; tensors and arrays of one number become that number."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(_fields_of(value))
    if isinstance(value, Mapping):
        return {str(name): plain(inside) for name, inside in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(inside) for inside in value]
    return str(value)


def read_events(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The events of a log, oldest first; a torn last line is left out."""
    with Path(path).open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)


def metrics_of(
    events: Iterable[Mapping[str, Any]], kinds: Sequence[str] = ("step", "evaluation")
) -> list[dict[str, Any]]:
    """Events of these kinds without their clock fields: equal for a resumed and a whole run."""
    return [
        {name: value for name, value in event.items() if name not in CLOCK_FIELDS}
        for event in events
        if event["kind"] in kinds
    ]
