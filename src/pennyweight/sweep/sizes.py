"""Memory of many adapters over one base: the base once, the largest pass, and what every other keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pennyweight.config import RunConfig
from pennyweight.plan import DataSize, Plan, batch_peaks, plan

__all__ = ["Sizes", "sizes"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """`largest`: the adapter whose run alone takes most, with its plan. `standing_bytes`: what the
    others keep meanwhile. `pass_tokens`: tokens that a shared pass may hold (`fast`)."""

    largest: str
    plan: Plan
    standing_bytes: int
    pass_tokens: int

    @property
    def peak_bytes(self) -> int:
        return self.plan.counted_peak_bytes + self.standing_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.plan.budget_bytes

    def sentence(self) -> str:
        found = "Fits" if self.fits else "Does not fit"
        return (
            f"{found}: {self.largest} alone {_mb(self.plan.counted_peak_bytes)}, base included, "
            f"and {_mb(self.standing_bytes)} for the others: {_mb(self.peak_bytes)} of "
            f"{_mb(self.plan.budget_bytes)} on {self.plan.device.name}"
            + ("" if self.fits else "; describe fewer adapters, or lower adapter.r")
        )

    def table_rows(self) -> list[tuple[str, str, str]]:
        return [
            *self.plan.table_rows(),
            ("other adapters", _mb(self.standing_bytes), "masters, gradients, moments"),
            ("peak of all", _mb(self.peak_bytes), f"{self.largest} at work"),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "largest": self.largest,
            "standing_bytes": self.standing_bytes,
            "pass_tokens": self.pass_tokens,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "plan": self.plan.to_dict(),
        }


def sizes(runs: Mapping[str, RunConfig], *, shared: bool = False, **options: Any) -> Sizes:
    """Of all runs over one base; `shared` passes take together what fits. `options` as for `plan`."""
    plans = {name: plan(config, **options) for name, config in runs.items()}
    largest = max(plans, key=lambda name: plans[name].counted_peak_bytes)
    standing = sum(said.standing_bytes for name, said in plans.items() if name != largest)
    most = plans[largest]
    tokens = most.micro_batch_tokens
    if shared:
        together = sum(said.micro_batch_tokens for said in plans.values())
        while together > tokens:
            size = DataSize(rows=together, tokens=together, longest=most.longest_row)
            (peak,) = batch_peaks(runs[largest], [size], device=most.device, policy=most.recompute)
            if peak + standing <= most.budget_bytes:
                break
            together = max(tokens, together * 3 // 4)
        tokens = together
    return Sizes(largest, most, standing, tokens)


def _mb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
