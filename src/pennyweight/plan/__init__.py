"""Memory, time and disk of a run, predicted from its config and the model's shapes alone.

No weight is read. The arithmetic is in `activations` and `memory` (bytes), `cost` (operations,
seconds, disk) and `search` (what to change when it does not fit).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pennyweight.config import RunConfig
from pennyweight.errors import ConfigError
from pennyweight.plan.activations import forward_bytes, host_bytes
from pennyweight.plan.batches import batch_peaks
from pennyweight.plan.cost import Cost, Disk, cost, disk, paced
from pennyweight.plan.devices import (
    DEVICES,
    Device,
    named_device,
    parse_memory,
    resident_bytes,
)
from pennyweight.plan.guess import guess_rows
from pennyweight.plan.memory import (
    FIRST_USE_BYTES,
    Moment,
    Part,
    base_bytes,
    beside,
    parts,
    peak,
    recompute_in_words,
)
from pennyweight.plan.outline import shapes_of
from pennyweight.plan.search import Fit, chosen_policy, largest_fit, mends, sized
from pennyweight.plan.setting import POLICIES, DataSize, Recompute, Setting
from pennyweight.plan.table import as_size
from pennyweight.shapes import Shapes

__all__ = [
    "DEVICES",
    "FIRST_USE_BYTES",
    "DataSize",
    "Device",
    "Fit",
    "Part",
    "Plan",
    "Setting",
    "as_size",
    "batch_peaks",
    "fit",
    "forward_bytes",
    "named_device",
    "of_batch",
    "paced",
    "parse_memory",
    "plan",
    "resident_bytes",
    "shapes_of",
]

Verdict = Literal["fits", "fits with changes", "cannot"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take. Sizes in bytes, times in seconds.

    `peak_bytes` includes the process, as resident memory does; `allocated_bytes` is tensors
    alone, as `torch.cuda.max_memory_allocated` counts them. `moment` is when the peak falls.
    `recomputed_layers` go by `recompute`, the others keep all; `host_bytes` is what a card's run
    holds in host memory for it and for an optimizer that lies there between steps.
    """

    model: str
    method: str
    storage: str
    dtype: str
    device: Device
    parameters: int
    trained_parameters: int
    micro_batch_tokens: int
    longest_row: int
    recompute: Recompute
    recomputed_layers: int
    recompute_in_words: str
    optimizer_on_host: bool
    host_bytes: int
    parts: tuple[Part, ...]
    moment: Moment
    peak_bytes: int
    allocated_bytes: int
    budget_bytes: int
    peak_by_policy: dict[str, int]
    verdict: Verdict
    changes: tuple[str, ...]
    peak_after_changes: int | None
    cost: Cost
    disk: Disk
    rows: DataSize | None

    @property
    def counted_peak_bytes(self) -> int:
        """The peak as this device's own counter shows it: allocations on a card, else resident."""
        return self.allocated_bytes if self.device.kind == "cuda" else self.peak_bytes

    @property
    def standing_bytes(self) -> int:
        """What the run holds beside a resident base also between its passes."""
        return beside(self.parts)[0]

    @property
    def pass_bytes(self) -> int:
        """What its largest pass takes on top of that, while it lasts."""
        return beside(self.parts)[1]

    @property
    def fits(self) -> bool:
        """The run fits as it is written."""
        return self.verdict == "fits"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the verdict last."""
        plain = asdict(self)
        plain["counted_peak_bytes"] = self.counted_peak_bytes
        plain["fits"] = self.fits
        plain["verdict"] = plain.pop("verdict")
        return plain

    def table_rows(self) -> list[tuple[str, str, str]]:
        """Rows of (what, how much, remark) for a person: memory, then work, then disk."""
        from pennyweight.plan.table import rows_of

        return rows_of(self)

    def sentence(self) -> str:
        """The verdict in words, with what to paste."""
        from pennyweight.plan.table import sentence_of

        return sentence_of(self)


def plan(
    config: RunConfig,
    shapes: Shapes | None = None,
    *,
    device: Device | None = None,
    budget_bytes: int | None = None,
    beside_bytes: int | None = None,
    rows: DataSize | None = None,
) -> Plan:
    """Predict the run that `config` describes, on a device (this machine's by default).

    `budget_bytes` replaces the device's memory; `beside_bytes` says instead what is left beside a
    base that is resident already. `rows` says how much data there is; without it, it is guessed
    from local files, and else steps are known only by `train.max_steps`.
    """
    setting, budget = _setting(config, shapes, device, budget_bytes, rows)
    if beside_bytes is not None:
        setting = replace(setting, resident=True)
        budget = beside_bytes + base_bytes(parts(setting, "none"))
        setting = replace(setting, device=replace(setting.device, memory_bytes=budget))
    setting, policy = chosen_policy(setting, budget)
    held = parts(setting, policy)
    total, moment = peak(held)
    verdict: Verdict = "fits"
    changes: tuple[str, ...] = ()
    after: int | None = None
    if total > budget:
        found = mends(setting, budget)
        verdict = "fits with changes" if found else "cannot"
        changes, after = found or ((), None)
    return Plan(
        model=config.base.model,
        method=setting.method,
        storage=setting.storage,
        dtype=setting.dtype,
        device=setting.device,
        parameters=setting.shapes.count,
        trained_parameters=setting.trained_elements,
        micro_batch_tokens=setting.micro_tokens,
        longest_row=setting.longest,
        recompute=policy,
        recomputed_layers=setting.recomputed_layers if policy != "none" else 0,
        recompute_in_words=recompute_in_words(setting, policy),
        optimizer_on_host=setting.optimizer_on_host,
        host_bytes=math.ceil(host_bytes(setting, policy) * setting.micro_tokens)
        + (setting.optimizer_bytes if setting.optimizer_on_host else 0),
        parts=held,
        moment=moment,
        peak_bytes=total,
        allocated_bytes=peak(held, allocated=True)[0],
        budget_bytes=budget,
        peak_by_policy={p: peak(parts(replace(setting, recomputed=None), p))[0] for p in POLICIES},
        verdict=verdict,
        changes=changes,
        peak_after_changes=after,
        cost=cost(setting, policy),
        disk=disk(setting),
        rows=setting.rows,
    )


def of_batch(predicted: Plan, config: RunConfig, batch: DataSize) -> Plan:
    """The same plan with the memory that this micro-batch takes, under the policy it has chosen."""
    shapes, policy = shapes_of(config.base.model), predicted.recompute
    setting = Setting(
        config,
        shapes,
        predicted.device,
        batch,
        recomputed=None if policy == "none" else predicted.recomputed_layers,
        optimizer_on_host=predicted.optimizer_on_host,
    )
    held = parts(setting, policy)
    total, moment = peak(held)
    return replace(
        predicted,
        micro_batch_tokens=setting.micro_tokens,
        longest_row=setting.longest,
        parts=held,
        moment=moment,
        peak_bytes=total,
        allocated_bytes=peak(held, allocated=True)[0],
        peak_by_policy={p: peak(parts(replace(setting, recomputed=None), p))[0] for p in POLICIES},
    )


def fit(
    config: RunConfig,
    shapes: Shapes | None = None,
    *,
    device: Device | None = None,
    budget_bytes: int | None = None,
    rows: DataSize | None = None,
) -> Fit:
    """Longest sequence, largest batch and fastest recompute policy that the budget holds.

    ConfigError if not even a row of 8 tokens fits; it says how much would be needed.
    """
    setting, budget = _setting(config, shapes, device, budget_bytes, rows)
    found = largest_fit(setting, budget)
    if found is None:
        least = _least(setting)
        raise ConfigError(
            f"{config.base.model} with method {setting.method} needs {least / 1e9:.1f} GB for the "
            f"shortest row, the budget is {budget / 1e9:.1f} GB; "
            + (
                "take a larger device"
                if setting.storage in ("nf4", "fp4")
                else "train.method=qlora base.quantization=nf4 needs least"
            )
        )
    return found


def _least(setting: Setting) -> int:
    shortest = sized(setting, 8, 1)
    return min(peak(parts(shortest, policy))[0] for policy in POLICIES)


def _setting(
    config: RunConfig,
    shapes: Shapes | None,
    device: Device | None,
    budget_bytes: int | None,
    rows: DataSize | None,
) -> tuple[Setting, int]:
    if device is None:
        device = named_device(config.base.device)
    if shapes is None:
        shapes = shapes_of(config.base.model)
    if budget_bytes is not None:
        device = replace(device, memory_bytes=budget_bytes)
    if rows is None:
        rows = guess_rows(config.data, shapes.vocab)
    return Setting(config, shapes, device, rows), device.memory_bytes
