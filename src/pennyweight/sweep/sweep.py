"""Trains every adapter that `adapters:` describes over one resident base, beat by beat in turn.

Each is the ordinary run of its description, with its own folder, log, checkpoints and receipt; in
`exact` it ends with the bits that it would end with alone. The same call again resumes all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pennyweight.config import RunConfig, resolve, variants
from pennyweight.config.keys import KEYS, value_at
from pennyweight.data.prepare import Prepared
from pennyweight.errors import ConfigError, Interrupted, PennyweightError
from pennyweight.files import disk_faults
from pennyweight.finetune import AGAIN, Beat, Beats, RunResult, prepared, underway
from pennyweight.model import BaseModel, load_base
from pennyweight.report import Report, read_events
from pennyweight.runs import RunFolder
from pennyweight.sweep.losers import losers, next_rung
from pennyweight.sweep.outcome import Status, Sweep, Trained, draw, keep, stopped_before
from pennyweight.sweep.sizes import Sizes, sizes
from pennyweight.train import (
    Due,
    RunLock,
    StopRequest,
    forward_backward_together,
    peak_memory_bytes,
    restart_peak,
)

__all__ = ["sweep"]


def sweep(
    config: RunConfig, *, origin: Mapping[str, str] | None = None, text: str | None = None
) -> Sweep:
    """Train all adapters of `config`; what one fails of is its entry, and the others go on.

    Interrupted (exit code 75) after a signal: all are saved, and the same call resumes.
    """
    began = time.perf_counter()
    config = resolve(config)
    runs = variants(config)
    if not runs:
        raise ConfigError("adapters: describes none; give a list or a grid")
    folder = Path(config.output_dir)
    with (
        StopRequest() as stop,
        disk_faults(folder, AGAIN),
        RunLock(folder),
        Report(folder) as report,
    ):
        if text is not None:
            (folder / "run.yaml").write_text(text, encoding="utf-8")
        predicted = sizes(runs, shared=config.adapters.mode == "fast")
        report.say(f"{len(runs)} adapters: {', '.join(runs)}")
        report.say(predicted.sentence())
        report.event("began", adapters=list(runs), planned_peak_bytes=predicted.peak_bytes)
        with stop.at_once("nothing was begun, so nothing is lost"):
            base = load_base(config.base)
            restart_peak(base.device)
        all_of_them = _Sweep(config, runs, base, report, stop, predicted, origin or {})
        with all_of_them:
            all_of_them.run()
        found = all_of_them.outcome(time.perf_counter() - began)
        keep(found)
        if stop():
            left = sum(member.living for member in all_of_them.members)
            raise Interrupted(
                f"{stop()}: {left} of {len(runs)} adapters are not finished; everything is saved, "
                "and the same command resumes"
            )
        report.event("ended", **found.to_dict())
        if why := draw(found):
            report.say(why)
        return found


class _Member:
    """One adapter's run: its beats, and how far it is."""

    def __init__(self, name: str, config: RunConfig, changes: Mapping[str, Any]) -> None:
        self.name, self.config, self.changes = name, config, changes
        self.folder = RunFolder(Path(config.output_dir))
        self.stop = StopRequest()
        self.beats: Beats[RunResult] | None = None
        self.begun = False
        self.due: Due | None = None
        self.result: RunResult | None = None
        self.lost: str | None = None
        self.fault: PennyweightError | None = None
        self.interrupted = False
        self._losses: list[float] | None = None

    @property
    def living(self) -> bool:
        """Whether there is more for it to do, in this call or the next."""
        return self.result is None and self.lost is None and self.fault is None

    def losses(self) -> list[float]:
        """Held-out losses after its steps so far, from its log, which outlives this process."""
        if self._losses is None:
            events = read_events(self.folder.events) if self.folder.events.is_file() else ()
            self._losses = [
                float(event["loss"])
                for event in events
                if event["kind"] == "evaluation" and event["number"] > 0
            ]
        return self._losses

    def went_on(self, beat: Beat | None) -> None:
        """Take note of a piece of its work; its log is read again where it may have grown."""
        if beat is None or beat.kind not in ("due", "micro_batch"):
            self._losses = None
        self.begun = self.begun or (beat is not None and beat.kind in ("due", "micro_batch"))
        self.due = beat.due if beat is not None else None

    @property
    def status(self) -> Status:
        if self.result is not None:
            return "finished"
        if self.fault is not None:
            return "failed"
        return "stopped" if self.lost is not None else "unfinished"

    def finished_before(self) -> bool:
        """Whether an earlier call finished this very run; then its result is that of the receipt."""
        receipt = self.folder.receipt()
        if receipt is None or not (self.folder.path / "config.json").is_file():
            return False
        if self.folder.config() != self.config:
            return False
        told = receipt["result"]
        known = {name: told[name] for name in RunResult.__slots__ if name in told}
        if len(known) < len(RunResult.__slots__):
            return False
        self.result = RunResult(**{**known, "output_dir": str(self.folder.path)})
        return True


class _Sweep:
    """All members, and whose turn it is."""

    def __init__(
        self,
        config: RunConfig,
        runs: Mapping[str, RunConfig],
        base: BaseModel,
        report: Report,
        stop: StopRequest,
        predicted: Sizes,
        origin: Mapping[str, str],
    ) -> None:
        self.settings, self.base, self.report, self.stop = config.adapters, base, report, stop
        self.predicted = predicted
        self.folder = Path(config.output_dir)
        self.members = [
            _Member(name, run, changes)
            for (name, run), changes in zip(runs.items(), _differences(runs), strict=True)
        ]
        self.gone: set[str] = set()  # at a rung that was passed, in this call or an earlier one
        self.origin = origin
        self.shared_passes = 0
        self._prepared: dict[str, Prepared] = {}

    def __enter__(self) -> _Sweep:
        gone = stopped_before(self.folder) if self.settings.stop != "none" else {}
        for member in self.members:
            if member.name in gone:
                member.lost = gone[member.name]
            elif not member.finished_before():
                member.beats = self._underway(member)
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever is still under way is left with its last checkpoint, and its adapter taken off."""
        with ExitStack() as closing:
            for member in self.members:
                if member.beats is not None:
                    closing.callback(member.beats.close)

    def run(self) -> None:
        """Turn by turn until nobody has more to do; a signal saves everyone."""
        rung = next_rung(self.settings, 0)
        while active := [m for m in self.members if m.living and not m.interrupted]:
            if why := self.stop():
                for member in active:
                    member.stop.ask(why)
            waiting = self._at_the_rung(active, rung)
            turn = [member for member in active if member not in waiting]
            if not turn and rung is not None:
                self._judge(rung)
                rung = next_rung(self.settings, rung)
                continue
            if self.settings.mode == "fast":
                self._together(turn)
            else:
                for member in turn:
                    self._advance(member)

    def outcome(self, seconds: float) -> Sweep:
        return Sweep(
            output_dir=str(self.folder),
            mode=self.settings.mode,
            adapters=tuple(self._told(member) for member in self.members),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(self.base.device),
            planned_peak_bytes=self.predicted.peak_bytes,
            shared_passes=self.shared_passes,
        )

    def _underway(self, member: _Member) -> Beats[RunResult]:
        origin = {**self.origin, **dict.fromkeys(member.changes, f"adapters, {member.name}")}
        return underway(
            member.config,
            base=self.base,
            name=member.name,
            data=self._data(member),
            origin={key: origin.get(key, "Python") for key in KEYS},
            stop=member.stop,
            ahead=self.settings.mode == "fast",
        )

    def _data(self, member: _Member) -> Prepared | None:
        """Rows that several share are in memory once; a fault in them is told by the run itself."""
        config = member.config
        key = f"{config.data!r} {config.seed if config.data.split_seed is None else ''}"
        if key not in self._prepared:
            try:
                with self.stop.at_once("nothing was begun, so nothing is lost"):
                    self._prepared[key] = prepared(config)
            except Interrupted:
                raise
            except PennyweightError:
                return None
        return self._prepared[key]

    def _advance(self, member: _Member) -> Beat | None:
        """One piece of its work; None where it ended, and why is noted."""
        assert member.beats is not None
        try:
            with self._promptly(member):
                beat = next(member.beats)
        except StopIteration as done:
            member.result = done.value
        except Interrupted:
            member.interrupted = True
        except PennyweightError as fault:
            member.fault = fault
            self.report.say(f"{member.name} failed, the others go on: {fault}")
        else:
            member.went_on(beat)
            return beat
        member.went_on(None)
        self.report.event("run_ended", adapter=member.name, status=self._told(member).status)
        return None

    @contextmanager
    def _promptly(self, member: _Member) -> Iterator[None]:
        """Before its first step a signal ends a run's work there and then, as it would alone."""
        if member.begun:
            yield
        else:
            with self.stop.at_once("no step was taken, so nothing is lost"):
                yield

    def _together(self, turn: Sequence[_Member]) -> None:
        """Everyone goes on to the next micro-batch, and those share passes."""
        for member in turn:
            if member.due is not None or member.beats is None:
                continue
            self._advance(member)
        ready = [m for m in turn if m.due is not None]
        if len(ready) < len([m for m in turn if m.living and not m.interrupted]):
            return  # somebody evaluates or saves yet
        for group in _groups([m.due for m in ready if m.due], self.predicted.pass_tokens):
            made = forward_backward_together([(due.trainee, due.batch) for due in group])
            self.shared_passes += made.shared
        for member in ready:
            self._advance(member)

    def _at_the_rung(self, active: Sequence[_Member], rung: int | None) -> list[_Member]:
        """Those that have made the evaluations at which is judged next, and wait for the others."""
        if rung is None:
            return []
        return [m for m in active if m.begun and len(m.losses()) >= rung and not m.stop()]

    def _judge(self, rung: int) -> None:
        """Stop the losers: each is saved, and keeps its folder."""
        standing = {
            m.name: m.losses()
            for m in self.members
            if m.name not in self.gone and m.fault is None and len(m.losses()) >= rung
        }
        for name, why in losers(self.settings, standing, rung).items():
            self.gone.add(name)
            member = next(m for m in self.members if m.name == name)
            if not member.living:
                continue
            member.stop.ask(f"stopped early ({why})")
            while not member.interrupted and member.living:
                self._advance(member)
            member.lost = why
            self.report.event("stopped", adapter=name, rung=rung, why=why)
            self.report.say(f"{name} is stopped: {why}")
        keep(self.outcome(0.0))

    def _told(self, member: _Member) -> Trained:
        result, losses = member.result, member.losses()
        steps = result.steps if result else _steps_in(member.folder)
        return Trained(
            name=member.name,
            changes=member.changes,
            output_dir=str(member.folder.path),
            status=member.status,
            steps=steps,
            loss_before=result.loss_before if result else None,
            loss_after=result.loss_after if result else min(losses, default=None),
            best_step=result.best_step if result else None,
            trained_parameters=result.trained_parameters if result else None,
            why=member.lost or (str(member.fault).splitlines()[0] if member.fault else None),
            exit_code=member.fault.exit_code if member.fault else 0,
        )


def _steps_in(folder: RunFolder) -> int:
    if not folder.events.is_file():
        return 0
    numbers = (int(e["number"]) for e in read_events(folder.events) if e["kind"] == "step")
    return max(numbers, default=0)


def _groups(dues: Sequence[Due], most_tokens: int) -> list[list[Due]]:
    """Micro-batches in order, as many to a pass as it may hold; one at the least."""
    groups: list[list[Due]] = []
    tokens = 0
    for due in dues:
        if groups and tokens + due.batch.tokens <= most_tokens:
            groups[-1].append(due)
            tokens += due.batch.tokens
        else:
            groups.append([due])
            tokens = due.batch.tokens
    return groups


def _differences(runs: Mapping[str, RunConfig]) -> list[dict[str, Any]]:
    """Of each run its values of the settings in which any two differ."""
    keys = [
        key
        for key in KEYS
        if key != "output_dir" and len({repr(value_at(run, key)) for run in runs.values()}) > 1
    ]
    return [{key: value_at(run, key) for key in keys} for run in runs.values()]
