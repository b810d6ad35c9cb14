"""The experiment's order: ground, then arm by arm the range test, the runs and the measuring.

What is finished is recognised by its files and not done again: a run by its receipt and an equal
description, a range test and a measuring by what they were made with. A description that has
changed is refused with the difference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pennyweight.compare.arms import (
    Arm,
    arms_of,
    differences,
    refuse_useless,
    run_of,
    unquantized,
)
from pennyweight.compare.findings import Findings
from pennyweight.compare.folder import ComparisonFolder, read_answer, write_answer
from pennyweight.compare.launch import in_a_process
from pennyweight.compare.outcome import Comparison
from pennyweight.compare.page import write_page
from pennyweight.config import RunConfig, origins, resolve, to_yaml
from pennyweight.errors import ConfigError, DivergedError, Interrupted, MemoryExhausted
from pennyweight.files import disk_faults
from pennyweight.finetune import AGAIN
from pennyweight.runs import RunFolder
from pennyweight.train import RunLock, StopRequest

__all__ = ["Launch", "compare"]

Launch = Callable[[Sequence[str], Mapping[str, Any] | None], dict[str, Any]]
"""Runs `pennyweight ARGUMENTS --json` with a job on its stdin; gives the object it prints."""


def compare(
    config: RunConfig,
    *,
    origin: Mapping[str, str] | None = None,
    launch: Launch | None = None,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Train and measure every arm that `config` describes, or go on where it was left.

    Everything is in `config.output_dir`: `compare.json`, `compare.md`, pictures, and a folder for
    each arm with an ordinary run for each seed. `origin` says where each value came from.
    Interrupted after a signal.
    """
    origin = origin or origins(config)
    config = resolve(config)
    refuse_useless(config)
    say = say or partial(print, file=sys.stderr, flush=True)
    folder = Path(config.output_dir)
    with disk_faults(folder, AGAIN), RunLock(folder), StopRequest() as stop:
        made = Experiment(config, launch or partial(in_a_process, stop=stop), say, stop)
        made.tell_unused(origin)
        return made.whole()


class Experiment:
    """One comparison under way."""

    def __init__(
        self,
        config: RunConfig,
        launch: Launch,
        say: Callable[[str], None],
        stop: Callable[[], str | None],
    ) -> None:
        self.config, self.launch, self.say, self.stop = config, launch, say, stop
        self.folder = ComparisonFolder(Path(config.output_dir))
        self.arms = arms_of(config)
        self.seeds = tuple(dict.fromkeys(config.compare.seeds))
        self.found = Findings(config)
        self.ground: dict[str, Any] = {}

    def tell_unused(self, origin: Mapping[str, str]) -> None:
        """One learning rate for arms that want different ones would decide the experiment, so what
        the description gives for its own run is left alone, and that is said."""
        told, rates = origin["train.learning_rate"], self.config.compare.learning_rates
        tuned = [arm for arm in self.arms if arm.given_rate(rates) is None]
        if not tuned or told == "default" or told.startswith("follows from"):
            return
        rate, names = self.config.train.learning_rate, ", ".join(arm.label for arm in tuned)
        self.found.notices.append(
            f"train.learning_rate {rate:g} ({told}) is not used: the rate of {names} is tuned; "
            f"compare.learning_rates={{{tuned[0].method}: {rate:g}}} gives one"
        )
        self.say(self.found.notices[-1])

    def whole(self) -> Comparison:
        """Every arm in turn; the page is written anew after each."""
        self._heading("what all arms share")
        runs = {arm.name: self._run(arm, self.seeds[0], None) for arm in self.arms}
        self.ground = self._part(
            "groundwork",
            config=self.config.model_dump(mode="json"),
            arms={name: run.model_dump(mode="json") for name, run in runs.items()},
            folder=str(self.folder.base),
        )
        self.found.ground = self.ground
        for line in self.ground["lines"]:
            self.say(line)
        self._refuse_changes()
        self._measure_base()
        for arm in self.arms:
            try:
                self._arm(arm)
            except (MemoryExhausted, DivergedError) as failed:
                self._leave_out(arm, str(failed))
            write_page(self.found.tallied(), self.folder.path)
        found = self.found.tallied()
        for told in write_page(found, self.folder.path, pictures=True):
            self.say(told)
        return found

    def _arm(self, arm: Arm) -> None:
        said = self.ground["plans"][arm.name]
        if not said["fits"]:
            self._leave_out(arm, said["sentence"])
            return
        rate = arm.given_rate(self.config.compare.learning_rates)
        if rate is None:
            rate = self._tuned(arm)
        if rate is None:
            self._leave_out(
                arm, "no learning rate of the range test was stable; give compare.learning_rates"
            )
            return
        for seed in self.seeds:
            self.found.results[arm, seed] = self._trained(arm, seed, rate)
        self._measure(arm)
        self.found.rates[arm] = rate

    def _tuned(self, arm: Arm) -> float | None:
        """The arm's learning rate by the range test. Its seed is the description's own, so that
        other `seeds` leave the rate as it is."""
        told = self.config.compare
        run = self._run(arm, self.config.seed, None)
        identity = {
            "run": run.model_dump(mode="json", exclude={"compare", "output_dir", "evaluate"}),
            "steps": told.range_steps,
            "rows": told.range_rows,
            **self._shared("data", "base"),
        }
        asked = {"from": told.range_from, "to": told.range_to, "points": told.range_points}
        file = self.folder.range_test(arm)
        found = read_answer(file, identity | asked)
        if found is None or "chosen" not in found:
            self._heading(f"{arm.label}: range test")
            found = self._part(
                "range_test",
                config=run.model_dump(mode="json"),
                steps=told.range_steps,
                rows=told.range_rows,
                recompute=self._recompute(arm),
                file=str(file),
                identity=identity | asked,
                **asked,
            )
        self.found.ranges[arm] = found
        rate: float | None = found["chosen"]
        return rate

    def _trained(self, arm: Arm, seed: int, rate: float) -> dict[str, Any]:
        """The run of this arm and seed, trained now unless it is finished; its result."""
        run = self._run(arm, seed, rate)
        folder = self.folder.run(arm, seed)
        result = self._finished(folder, run)
        if result is None:
            number = 1 + self.arms.index(arm) * len(self.seeds) + self.seeds.index(seed)
            of = len(self.arms) * len(self.seeds)
            self._heading(f"run {number} of {of}: {arm.label}, seed {seed}, learning rate {rate:g}")
            file = self.folder.describe(arm, seed, to_yaml(run, commented=False))
            self._launched(["train", str(file)], None)
            result = self._finished(folder, run)
            assert result is not None, "train wrote a receipt"
        return result

    def _measure(self, arm: Arm) -> None:
        """Measure what is not measured yet, and the arm's own base where it is a quantized one."""
        run, own = self._run(arm, self.seeds[0], 1.0), self._measured_as()
        storage, base_file = run.base.quantization, self.folder.measured_base(run.base)
        base = self.found.bases.get(storage) or read_answer(base_file, own)
        missing: list[int] = []
        for seed in self.seeds:
            answer = read_answer(self.folder.measured(arm, seed), self._run_measured_as(arm, seed))
            if answer is None:
                missing.append(seed)
            else:
                self.found.measured[arm, seed] = answer
        if missing or base is None:
            self._heading(f"{arm.label}: measuring")
            answers = self._part(
                "measured",
                config=run.model_dump(mode="json"),
                runs=[str(self.folder.run(arm, seed)) for seed in missing],
                folder=str(self.folder.base),
                base=base is None,
            )
            for seed in missing:
                answer = answers[str(self.folder.run(arm, seed))]
                identity = self._run_measured_as(arm, seed)
                write_answer(self.folder.measured(arm, seed), answer, identity)
                self.found.measured[arm, seed] = answer
            if base is None:
                base = answers["base"]
                write_answer(base_file, base, own)
        self.found.bases[storage] = base

    def _measure_base(self) -> None:
        """The model as it is stored. Where even that does not fit, quantized arms go on alone."""
        run = unquantized(self.config)
        file = self.folder.measured_base(run.base)
        found = read_answer(file, self._measured_as())
        if found is None:
            self._heading("the base, untuned")
            try:
                job = {"runs": [], "folder": str(self.folder.base), "base": True}
                found = self._part("measured", config=run.model_dump(mode="json"), **job)["base"]
            except MemoryExhausted as failed:
                self._say_left_out("base", str(failed))
                return
            write_answer(file, found, self._measured_as())
        self.found.bases["none"] = found

    def _refuse_changes(self) -> None:
        """All finished or begun runs whose description or data is no longer this one, at once."""
        faults = []
        for arm in self.arms:
            for seed in self.seeds:
                folder = self.folder.run(arm, seed)
                if (folder / "config.json").is_file():
                    then = RunFolder(folder).config()
                    rate = arm.given_rate(self.config.compare.learning_rates)
                    now = self._run(arm, seed, rate or then.train.learning_rate)
                    faults += [f"{folder}: {told}" for told in differences(then, now)]
                    faults += self._other_content(folder)
        if faults:
            raise ConfigError.all(
                [*faults, "name another output_dir, or remove these folders to make them again"]
            )

    def _other_content(self, folder: Path) -> list[str]:
        receipt = self.folder.receipt(folder)
        if receipt is None:
            return []
        now = self._shared("data", "base")
        then = {part: receipt[part]["fingerprint"] for part in ("data", "base")}
        return [
            f"{folder}: {name}: the content is another than when it was trained"
            for name in now
            if now[name] != then[name]
        ]

    def _finished(self, folder: Path, run: RunConfig) -> dict[str, Any] | None:
        """The result of a run that has its receipt; ConfigError where it is of another description."""
        receipt = self.folder.receipt(folder)
        if receipt is None:
            return None
        if changed := differences(RunFolder(folder).config(), run):
            raise ConfigError.all([f"{folder}: {told}" for told in changed])
        result: dict[str, Any] = receipt["result"]
        return result

    def _run(self, arm: Arm, seed: int, rate: float | None) -> RunConfig:
        folder = str(self.folder.run(arm, seed))
        return run_of(self.config, arm, seed=seed, learning_rate=rate, output_dir=folder)

    def _recompute(self, arm: Arm) -> str:
        policy: str = self.ground["plans"][arm.name]["recompute"]
        return policy

    def _measured_as(self) -> dict[str, Any]:
        return {
            **self._shared("data", "base", "general", "test_rows"),
            "evaluate": self.config.evaluate.model_dump(mode="json"),
        }

    def _run_measured_as(self, arm: Arm, seed: int) -> dict[str, Any]:
        sha256 = self.folder.receipt_sha256(self.folder.run(arm, seed))
        return self._measured_as() | {"run": sha256}

    def _shared(self, *names: str) -> dict[str, Any]:
        return {name: self.ground[name] for name in names}

    def _part(self, name: str, **job: Any) -> dict[str, Any]:
        return self._launched(["compare-part", name], job)

    def _launched(self, arguments: Sequence[str], job: Mapping[str, Any] | None) -> dict[str, Any]:
        if asked := self.stop():
            raise Interrupted(f"{asked}: what is done is kept, and the same command resumes")
        return self.launch(arguments, job)

    def _leave_out(self, arm: Arm, why: str) -> None:
        self._say_left_out(arm.label, why)

    def _say_left_out(self, label: str, why: str) -> None:
        self.found.left_out[label] = why
        self.say(f"{label} is left out: {why}")

    def _heading(self, text: str) -> None:
        self.say(f"── {text} " + "─" * max(0, 76 - len(text)))
