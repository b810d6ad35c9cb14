"""What would make a run fit: changes in order of what they cost, and the most that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from pennyweight.config import RunConfig
from pennyweight.plan.cost import cost, flops_a_token
from pennyweight.plan.memory import peak_bytes
from pennyweight.plan.setting import POLICIES, Recompute, Setting

__all__ = ["RUNNABLE", "Fit", "asked_policy", "chosen_policy", "largest_fit", "mends", "sized"]

RUNNABLE: tuple[Recompute, ...] = POLICIES
"""Policies that `train.gradient_checkpointing` can ask for, fastest first."""

_SHORTEST = 128
_IN_SOME_LAYERS: tuple[Recompute, ...] = ("minimal", "full")


@dataclass(frozen=True, slots=True)
class Fit:
    """The most a budget holds: longest row, rows in a micro-batch, fastest policy for them."""

    max_length: int
    batch_size: int
    recompute: Recompute
    peak_bytes: int
    longest_by_policy: dict[Recompute, int]
    overrides: tuple[str, ...]


def asked_policy(config: RunConfig) -> Recompute | None:
    """The policy that the run asks for; None where the choice is the plan's."""
    asked = config.train.gradient_checkpointing
    if isinstance(asked, bool):
        return "full" if asked else "none"
    return None if asked == "auto" else asked


def chosen_policy(setting: Setting, budget_bytes: int) -> tuple[Setting, Recompute]:
    """The policy the run asks for; with `auto` the fastest that fits, else the most sparing.

    The setting says for how many layers: `minimal` and `full` hold for as few of the first ones as
    must be, and the one with less to compute again is taken. Full frees more of a layer, minimal
    spares it attention; which counts for more is a matter of the documents' length.
    """
    asked = asked_policy(setting.config)
    # A copy to host memory and back costs less than computing a layer again.
    if setting.can_page and peak_bytes(setting, asked or "none") > budget_bytes:
        setting = setting.paging()
    if asked is not None:
        return setting, asked
    peaks = {p: peak_bytes(setting, p) for p in RUNNABLE}
    if peaks["none"] <= budget_bytes:
        return setting, "none"
    mixed = [
        (_in_few_layers(setting, p, budget_bytes), p)
        for p in _IN_SOME_LAYERS
        if peaks[p] <= budget_bytes
    ]
    if mixed:
        return min(mixed, key=lambda each: flops_a_token(*each))
    return setting, min(RUNNABLE, key=lambda p: peaks[p])


def _in_few_layers(setting: Setting, policy: Recompute, budget_bytes: int) -> Setting:
    """The setting with as many layers as fit that keep their inside."""
    layers = setting.shapes.layers

    def fits(kept: int) -> bool:
        return peak_bytes(setting.recomputing(layers - kept), policy) <= budget_bytes

    return setting.recomputing(layers - _most(layers - 1, fits))


def mends(setting: Setting, budget_bytes: int) -> tuple[tuple[str, ...], int] | None:
    """The cheapest overrides with which the run fits, and its peak then; None if none does.

    First what changes only the speed (recompute, then smaller micro-batches of the same step),
    then the base's storage, then what changes the training: length, then rank.
    """
    for group in _candidates(setting):
        fitting: list[tuple[float, tuple[str, ...], int]] = []
        for overrides in group:
            trial = setting.again(_with(setting.config, overrides))
            trial, policy = chosen_policy(trial, budget_bytes)
            used = peak_bytes(trial, policy)
            if used <= budget_bytes:
                fitting.append((cost(trial, policy).tokens_a_second, overrides, used))
        if fitting:
            _, overrides, used = max(fitting, key=lambda row: (row[0], -len(row[1])))
            return overrides, used
    return None


def largest_fit(setting: Setting, budget_bytes: int) -> Fit | None:
    """Longest sequence, then fastest policy, then largest batch that the budget holds."""
    limit = setting.counted.longest if setting.counted else setting.shapes.max_positions
    limit = min(limit, setting.shapes.max_positions)

    def fits(batch: int, policy: Recompute, length: int) -> bool:
        return peak_bytes(sized(setting, length, batch), policy) <= budget_bytes

    longest = {p: _most(limit, partial(fits, 1, p)) for p in RUNNABLE}
    length = max(longest.values())
    if length < 8:
        return None
    length = length if length == limit or length < 64 else length // 64 * 64
    policy = next(p for p in RUNNABLE if longest[p] >= length)
    most_rows = max(1, setting.counted.tokens // length) if setting.counted else 4096
    batch = _most(most_rows, lambda n: fits(n, policy, length))
    chosen = sized(setting, length, batch)
    return Fit(
        max_length=length,
        batch_size=batch,
        recompute=policy,
        peak_bytes=peak_bytes(chosen, policy),
        longest_by_policy=dict(longest),
        overrides=(
            f"data.max_length={length}",
            f"train.batch_size={batch}",
            f"train.gradient_checkpointing={policy}",
        ),
    )


def _candidates(setting: Setting) -> Iterator[list[tuple[str, ...]]]:
    """Overrides in groups: within a group only the speed differs, later groups change more."""
    train, length, rank = (
        setting.config.train,
        setting.config.data.max_length,
        setting.config.adapter.r,
    )
    stores: list[tuple[str, ...]] = [()]
    if setting.full:
        stores.append(("train.method=lora",))
    if setting.storage not in ("nf4", "fp4"):
        stores.append(("train.method=qlora", "base.quantization=nf4"))
    recompute: list[tuple[str, ...]] = [()]
    asked = asked_policy(setting.config)
    if asked is not None:
        slower = RUNNABLE[RUNNABLE.index(asked) + 1 :]
        recompute += [(f"train.gradient_checkpointing={policy}",) for policy in slower]
    for smaller in [rank] if setting.full else _halves(rank, 4):
        for shorter in _halves(length, _SHORTEST):
            for store in stores:
                rest = (
                    *_changed("data.max_length", length, shorter),
                    *_changed("adapter.r", rank, smaller),
                )
                yield [
                    (*store, *policy, *_batch(setting, rows), *rest)
                    for policy in recompute
                    for rows in _halves(train.batch_size, 1)
                ]


def _changed(key: str, before: int, after: int) -> tuple[str, ...]:
    return () if before == after else (f"{key}={after}",)


def _batch(setting: Setting, batch: int) -> tuple[str, ...]:
    train = setting.config.train
    if batch == train.batch_size:
        return ()
    steps = train.gradient_accumulation_steps * math.ceil(train.batch_size / batch)
    return f"train.batch_size={batch}", f"train.gradient_accumulation_steps={steps}"


def _halves(start: int, least: int) -> list[int]:
    sizes = [start]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes


def _with(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """The config with each `group.key=value` put in."""
    words: dict[str, object] = {"true": True, "false": False}
    groups: dict[str, dict[str, object]] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        group, _, name = key.partition(".")
        plain = int(value) if value.isdigit() else words.get(value, value)
        groups.setdefault(group, {})[name] = plain
    return config.model_copy(
        update={g: getattr(config, g).model_copy(update=new) for g, new in groups.items()}
    )


def sized(setting: Setting, length: int, batch: int) -> Setting:
    given = setting.config
    data = given.data.model_copy(update={"max_length": length})
    train = given.train.model_copy(update={"batch_size": batch, "tokens_per_step": None})
    config = given.model_copy(update={"data": data, "train": train})
    return setting.again(config)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 1..limit for which `fits(n)`, which holds up to some n; 0 if none."""
    if not fits(1):
        return 0
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
