"""A plan as rows of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pennyweight.plan import Plan

__all__ = ["as_duration", "as_size", "disk_of", "memory_of", "rows_of", "sentence_of", "wanting_of"]


def as_size(size: float) -> str:
    """Bytes as people read them: 1 GB = 1e9 bytes.

    >>> as_size(5_300_000_000), as_size(999), as_size(2_500_000)
    ('5.30 GB', '999 B', '2.5 MB')
    """
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if abs(size) >= unit:
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size:.0f} B"


def as_duration(seconds: float) -> str:
    """Seconds as people read them.

    >>> as_duration(42), as_duration(600), as_duration(7300)
    ('42 s', '10 min', '2 h 2 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"


def rows_of(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, how much, remark): the parts, the peak, the work, the disk."""
    return memory_of(plan) + _work(plan) + disk_of(plan)


def memory_of(plan: Plan) -> list[tuple[str, str, str]]:
    """The parts, the peak, and what it would be under each policy."""
    rows = []
    for part in plan.parts:
        remark = part.note
        if plan.moment not in part.moments:
            remark += f"; {'/'.join(part.moments)} only, not at the peak"
        rows.append((part.name, as_size(part.bytes), remark))
    rows.append(("peak", as_size(plan.peak_bytes), f"during {plan.moment}"))
    rows.append(("memory", as_size(plan.budget_bytes), plan.device.name))
    if plan.host_bytes:
        rows.append(("host memory", as_size(plan.host_bytes), "pinned, beside the device"))
    for policy, size in plan.peak_by_policy.items():
        rows.append((f"peak, recompute {policy}", as_size(size), ""))
    return rows


def sentence_of(plan: Plan) -> str:
    """The verdict in words, with what to paste; and what the disk has no room for."""
    return "\n".join([_of_memory(plan), *wanting_of(plan)])


def wanting_of(plan: Plan) -> list[str]:
    """A line for each disk that has too little room."""
    mends = {
        "output": ("checkpoints and result need", "free some, or name another output_dir"),
        "download": ("the download needs", "free some, or set HF_HOME to a larger disk"),
    }
    return [
        f"Not enough disk: {mends[name][0]} {as_size(needed)}, {as_size(free)} are free there; "
        f"{mends[name][1]}."
        for name, (needed, free) in plan.disk.wanting.items()
    ]


def _of_memory(plan: Plan) -> str:
    needs = (
        f"needs {as_size(plan.peak_bytes)} of {as_size(plan.budget_bytes)} on {plan.device.name}"
    )
    if plan.verdict == "fits":
        again = "" if plan.recompute == "none" else f", {plan.recompute_in_words}"
        return f"Fits: {needs}{again}."
    if plan.verdict == "cannot":
        return (
            f"Cannot: {needs}, and no shorter rows, smaller batch or 4-bit base makes it fit; "
            "take a smaller model or a larger device."
        )
    assert plan.peak_after_changes is not None
    return (
        f"Fits with changes: as written it {needs}; with these it needs "
        f"{as_size(plan.peak_after_changes)}:\n  {' '.join(plan.changes)}"
    )


def _work(plan: Plan) -> list[tuple[str, str, str]]:
    cost = plan.cost
    share = 100 * plan.trained_parameters / plan.parameters
    measured = plan.device.launch_s is not None
    told = "estimate" + (", from steps measured here" if measured else ", idle device")
    rows = [
        ("parameters", f"{plan.parameters:,}", ""),
        ("trained parameters", f"{plan.trained_parameters:,}", f"{share:.2f} %"),
        ("operations a token", f"{cost.flops_a_token / 1e9:.3g} GFLOP", ""),
        ("speed", f"{cost.tokens_a_second:,.0f} tokens/s", told),
        ("optimizer step", as_duration(cost.step_seconds), "estimate"),
    ]
    if cost.steps is None or cost.tokens is None or cost.seconds is None:
        return [*rows, ("steps", "unknown", "give rows, or train.max_steps")]
    counted = "counted" if plan.rows and plan.rows.exact else "estimate"
    return [
        *rows,
        ("steps", f"{cost.steps:,}", counted),
        ("tokens", f"{cost.tokens:,}", counted),
        ("training time", as_duration(cost.seconds), "estimate"),
    ]


def disk_of(plan: Plan) -> list[tuple[str, str, str]]:
    name = "model" if plan.method == "full" else "adapter"
    rows = [
        (f"disk: {name}", as_size(plan.disk.output), ""),
        ("disk: checkpoints", as_size(plan.disk.checkpoints), "weights and optimizer state"),
    ]
    if plan.disk.download:
        free = plan.disk.download_free
        remark = "estimate, 16-bit weights"
        remark += "" if free is None else f"; {as_size(free)} free there"
        rows.append(("download", as_size(plan.disk.download), remark))
    return rows
