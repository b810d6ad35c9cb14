"""What has been found so far, arm by arm, and the figures it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pennyweight.compare.arms import Arm, arms_of, run_of
from pennyweight.compare.folder import ComparisonFolder
from pennyweight.compare.outcome import ArmOutcome, BaseOutcome, Comparison, RangeCurve
from pennyweight.compare.spectrum import effective_rank
from pennyweight.compare.tally import Figure, answered, forgotten, kept, loss, over_seeds
from pennyweight.config import RunConfig
from pennyweight.report import read_events
from pennyweight.runs import versions

__all__ = ["Findings"]

Answer = Mapping[str, Any]


@dataclass(slots=True)
class Findings:
    """Raw answers of the parts; `rates` has the arms that are done."""

    config: RunConfig
    ground: dict[str, Any] = field(default_factory=dict)
    bases: dict[str, Answer] = field(default_factory=dict)
    ranges: dict[Arm, Answer] = field(default_factory=dict)
    rates: dict[Arm, float] = field(default_factory=dict)
    results: dict[tuple[Arm, int], Answer] = field(default_factory=dict)
    measured: dict[tuple[Arm, int], Answer] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.config.compare.seeds))

    def tallied(self) -> Comparison:
        """The figures of what is done."""
        done = [arm for arm in arms_of(self.config) if arm in self.rates]
        answers = [found["answers"] for found in (*self.bases.values(), *self.measured.values())]
        judged = next((answer["judged"] for answer in answers if answer is not None), None)
        return Comparison(
            model=self.config.base.model,
            output_dir=self.config.output_dir,
            seeds=self.seeds,
            train_rows=self.ground["train_rows"],
            test_rows=self.ground["test_rows"],
            general_text=self.config.compare.general_text,
            general_documents=self.ground["general_documents"],
            bases=tuple(_base(storage, found) for storage, found in self.bases.items()),
            arms=tuple(self._arm(arm) for arm in done),
            ranges=tuple(_curve(arm, found) for arm, found in self.ranges.items()),
            left_out=dict(self.left_out),
            notices=(*self.notices, *self._unequal(done)),
            judged=judged,
            versions=versions(),
        )

    def _arm(self, arm: Arm) -> ArmOutcome:
        found = {seed: self.measured[arm, seed] for seed in self.seeds}
        results = [self.results[arm, seed] for seed in self.seeds]
        run = run_of(self.config, arm, seed=0, learning_rate=self.rates[arm], output_dir=".")
        storage = run.base.quantization
        peaks = [r["peak_memory_bytes"] for r in results if r["peak_memory_bytes"] is not None]
        folder = ComparisonFolder(Path(self.config.output_dir))
        tests = {seed: each["test"] for seed, each in found.items()}
        general = [each["general"] for each in found.values()]
        untuned = self.bases.get("none", self.bases[storage])["test"]
        return ArmOutcome(
            name=arm.name,
            label=arm.label,
            method=arm.method,
            rank=arm.rank,
            storage=storage,
            seeds=self.seeds,
            learning_rate=self.rates[arm],
            rate_from="range test" if arm in self.ranges else "given",
            loss=loss(list(tests.values())),
            kept=kept(untuned, tests, self._full()),
            general=loss(general),
            forgotten=forgotten(self.bases[storage]["general"], general),
            answers=answered([each["answers"] for each in found.values()]),
            trained_parameters=results[0]["trained_parameters"],
            bytes=found[self.seeds[0]]["bytes"],
            peak_memory_bytes=max(peaks) if peaks else None,
            planned_peak_bytes=max(result["planned_peak_bytes"] for result in results),
            tokens_per_second=_speed([folder.run(arm, seed) for seed in self.seeds]),
            train_seconds=sum(result["train_seconds"] for result in results) / len(results),
            steps=results[0]["steps"],
            trained_tokens=tuple(result["trained_tokens"] for result in results),
            effective_rank=_ranks([each.get("spectra") for each in found.values()]),
        )

    def _full(self) -> dict[int, Answer]:
        full = Arm("full", None)
        return {
            seed: self.measured[full, seed]["test"]
            for seed in self.seeds
            if (full, seed) in self.measured
        }

    def _unequal(self, done: Sequence[Arm]) -> list[str]:
        """Said where arms of one seed did not see the same tokens, as after skipped steps."""
        notices = []
        for seed in self.seeds:
            seen = {arm.label: self.results[arm, seed]["trained_tokens"] for arm in done}
            if len(set(seen.values())) > 1:
                told = ", ".join(f"{label} {tokens:,}" for label, tokens in seen.items())
                notices.append(f"seed {seed}: arms trained on unequal numbers of tokens: {told}")
        return notices


def _base(storage: str, found: Answer) -> BaseOutcome:
    return BaseOutcome(
        storage, loss([found["test"]]), loss([found["general"]]), answered([found["answers"]])
    )


def _curve(arm: Arm, found: Answer) -> RangeCurve:
    points = sorted(found["tried"].values(), key=lambda point: point["learning_rate"])
    return RangeCurve(
        label=arm.label,
        steps=found["steps"],
        rows=found["rows"],
        before=found["before"],
        rates=tuple(point["learning_rate"] for point in points),
        losses=tuple(point["loss"] for point in points),
        stable=tuple(point["stable"] for point in points),
        chosen=found["chosen"],
    )


def _speed(runs: Sequence[Path]) -> float:
    """Tokens a second inside optimizer steps, all runs of an arm together."""
    steps = [e for run in runs for e in read_events(run / "events.jsonl") if e["kind"] == "step"]
    return sum(step["tokens"] for step in steps) / max(1e-9, sum(s["seconds"] for s in steps))


def _ranks(spectra: Sequence[Mapping[str, list[float]] | None]) -> dict[str, Figure] | None:
    told = [each for each in spectra if each]
    if not told:
        return None
    return {
        module: over_seeds([effective_rank(each[module]) for each in told]) for module in told[0]
    }
