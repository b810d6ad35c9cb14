"""Memory, work and disk of many adapters over one base: the base once, the largest pass, what every
other keeps meanwhile, and the sums of what all of them do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pennyweight.config import RunConfig
from pennyweight.plan import DataSize, Plan, as_size, batch_peaks, plan
from pennyweight.plan.table import as_duration, disk_of, memory_of, wanting_of

__all__ = ["WORTH_SHARING", "Sizes", "sizes"]

# Tokens up to which a shared pass takes less time than passes apart. On a CPU measured
# (benchmarks/results/many_adapters.md): beyond, it only takes more memory. Elsewhere assumed.
WORTH_SHARING = {"cpu": 1024}
_WORTH_SHARING_ELSEWHERE = 16_384


@dataclass(frozen=True, slots=True)
class Sizes:
    """`plans`: each adapter's run alone. `largest`: the one that takes most, `standing_bytes` what the
    others keep meanwhile. `pass_tokens`: tokens that a pass holds, of several where they share it
    (`fast`), and `pass_bytes` how much more that takes than the largest alone."""

    plans: Mapping[str, Plan]
    largest: str
    standing_bytes: int
    pass_tokens: int
    pass_bytes: int = 0

    @property
    def plan(self) -> Plan:
        return self.plans[self.largest]

    @property
    def peak_bytes(self) -> int:
        return self.plan.counted_peak_bytes + self.pass_bytes + self.standing_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.plan.budget_bytes

    @property
    def steps(self) -> int | None:
        """Of all; None where one's are unknown. `tokens` and `seconds` likewise."""
        return _sum(said.cost.steps for said in self.plans.values())

    @property
    def tokens(self) -> int | None:
        return _sum(said.cost.tokens for said in self.plans.values())

    @property
    def seconds(self) -> float | None:
        return _sum(said.cost.seconds for said in self.plans.values())

    def sentence(self) -> str:
        """The verdict in words, with what to paste where the largest does not fit by itself."""
        if not self.plan.fits:
            return f"{self.largest}, alone already: {self.plan.sentence()}"
        found = "Fits" if self.fits else "Does not fit"
        shared = f" {as_size(self.pass_bytes)} for shared passes," if self.pass_bytes else ""
        told = (
            f"{found}: {self.largest} alone {as_size(self.plan.counted_peak_bytes)}, base included,"
            f"{shared} and {as_size(self.standing_bytes)} for the others: "
            f"{as_size(self.peak_bytes)} of {as_size(self.plan.budget_bytes)} on "
            f"{self.plan.device.name}"
            + ("" if self.fits else "; describe fewer adapters, or lower adapter.r")
        )
        return "\n".join([told, *wanting_of(self._written())])

    def table_rows(self) -> list[tuple[str, str, str]]:
        """Memory while the largest is at work, then a row for each adapter, then the sums."""
        memory = [
            ("shared passes", as_size(self.pass_bytes), f"{self.pass_tokens:,} tokens of several"),
            ("other adapters", as_size(self.standing_bytes), "masters, gradients, moments"),
            ("peak of all", as_size(self.peak_bytes), f"{self.largest} at work, as above"),
        ]
        each = [
            (
                f"adapter {name}",
                as_size(said.counted_peak_bytes),
                f"alone; {said.trained_parameters:,} trained parameters, {_work(said)}",
            )
            for name, said in self.plans.items()
        ]
        sums = [
            ("steps of all", _told(self.steps, ","), "give rows, or train.max_steps"),
            ("tokens of all", _told(self.tokens, ","), ""),
        ]
        if self.seconds is not None:
            sums = [(what, size, "estimate") for what, size, _ in sums]
            sums.append(("training time of all", as_duration(self.seconds), "estimate, in turn"))
        shared = memory if self.pass_bytes else memory[1:]
        return memory_of(self.plan) + shared + each + sums + disk_of(self._written())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `plan` is that of the largest."""
        written = self._written().disk
        return {
            "adapters": [
                {
                    "name": name,
                    "peak_bytes": said.counted_peak_bytes,
                    "trained_parameters": said.trained_parameters,
                    "recompute": said.recompute,
                    "steps": said.cost.steps,
                    "tokens": said.cost.tokens,
                    "seconds": said.cost.seconds,
                }
                for name, said in self.plans.items()
            ],
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "disk": {"output": written.output, "checkpoints": written.checkpoints},
            "largest": self.largest,
            "standing_bytes": self.standing_bytes,
            "pass_tokens": self.pass_tokens,
            "pass_bytes": self.pass_bytes,
            "peak_bytes": self.peak_bytes,
            "budget_bytes": self.plan.budget_bytes,
            "fits": self.fits,
            "plan": self.plan.to_dict(),
        }

    def _written(self) -> Plan:
        """The largest's plan with what all of them write."""
        disks = [said.disk for said in self.plans.values()]
        output, checkpoints = sum(d.output for d in disks), sum(d.checkpoints for d in disks)
        disk = replace(self.plan.disk, output=output, checkpoints=checkpoints)
        return replace(self.plan, disk=disk)


def sizes(runs: Mapping[str, RunConfig], *, shared: bool = False, **options: Any) -> Sizes:
    """Of all runs over one base; `shared` passes take together what fits and is worth sharing.
    `options` as for `plan`."""
    plans = {name: plan(config, **options) for name, config in runs.items()}
    largest = max(plans, key=lambda name: plans[name].counted_peak_bytes)
    standing = sum(said.standing_bytes for name, said in plans.items() if name != largest)
    most = plans[largest]
    tokens, more = most.micro_batch_tokens, 0
    if shared:
        worth = WORTH_SHARING.get(most.device.kind, _WORTH_SHARING_ELSEWHERE)
        together = min(worth, sum(said.micro_batch_tokens for said in plans.values()))
        while together > tokens:
            size = DataSize(rows=together, tokens=together, longest=most.longest_row)
            wide = _holding(runs[largest], together)
            (peak,) = batch_peaks(wide, [size], device=most.device, policy=most.recompute)
            if peak + standing <= most.budget_bytes:
                more = max(0, peak - most.peak_bytes)
                break
            together = max(tokens, together * 3 // 4)
        tokens = max(tokens, together)
    return Sizes(plans, largest, standing, tokens, more)


def _holding(run: RunConfig, tokens: int) -> RunConfig:
    """The same run with micro-batches that hold so many tokens."""
    train = run.train.model_copy(update={"batch_size": tokens, "tokens_per_step": None})
    return run.model_copy(update={"train": train})


def _sum(each: Any) -> Any:
    known = list(each)
    return None if None in known else sum(known)


def _told(count: int | None, how: str) -> str:
    return "unknown" if count is None else format(count, how)


def _work(said: Plan) -> str:
    if said.cost.steps is None or said.cost.seconds is None:
        return "steps unknown"
    return f"{said.cost.steps:,} steps, {as_duration(said.cost.seconds)}"
