"""What two versions do not have in common: settings, origins, and their held-out figures side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pennyweight.registry.record import Version

__all__ = ["Difference", "difference"]


@dataclass(frozen=True, slots=True)
class Difference:
    """`settings`: name to the pair of values, where they differ. `figures`: each side's held-out
    numbers by name. `notes` say what stands in the way of comparing them."""

    settings: Mapping[str, tuple[Any, Any]]
    figures: Mapping[str, tuple[Any, Any]]
    notes: tuple[str, ...]


def difference(one: Version, other: Version) -> Difference:
    """Compare two versions by their records and receipts; no tensor is read."""
    pairs = {key: (left, right) for key, left, right in _paired(_settings(one), _settings(other))}
    measured = (one.held_out(), other.held_out())
    figures = {key: (left, right) for key, left, right in _paired(*(m or {} for m in measured))}
    notes = []
    if one.hash == other.hash:
        notes.append("both are the same version")
    if None in measured:
        notes.append("one of them has no held-out figures")
    elif one.data != other.data:
        notes.append(
            "trained and measured on other rows: the figures do not compare; "
            "`pennyweight evaluate` measures both on the same"
        )
    if one.base.get("fingerprint") != other.base.get("fingerprint"):
        notes.append("they stand beside different bases")
    return Difference(
        {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}, figures, tuple(notes)
    )


def _paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, one.get(key), other.get(key)) for key in dict.fromkeys((*one, *other))]


def _settings(version: Version) -> dict[str, Any]:
    """Every setting known of a version: where it comes from, then the run's, or PEFT's where no run is known."""
    found: dict[str, Any] = {
        "base": version.base.get("name"),
        "base fingerprint": _short(version.base.get("fingerprint")),
        "data": _short(version.data),
        "parent": _short(version.parent),
    }
    told = (version.receipt() or {}).get("configuration")
    if not isinstance(told, Mapping):
        settings = version.settings()
        return found | {key: settings[key] for key in sorted(settings)}
    for key, setting in told.items():
        if isinstance(setting, Mapping) and key != "output_dir":
            found[str(key)[:80]] = setting.get("became", setting.get("value"))
    return found


def _short(mark: Any) -> str | None:
    return mark[:12] if isinstance(mark, str) else None
