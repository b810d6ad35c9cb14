"""What a sweep came to: an entry for each adapter, `adapters.json`, and one picture of all losses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pennyweight.files import whole
from pennyweight.report import plain, plot_many, read_events

__all__ = ["Sweep", "Trained", "draw", "keep", "stopped_before"]

Status = Literal["finished", "stopped", "failed", "unfinished"]
FILE, PICTURE = "adapters.json", "adapters.png"


@dataclass(frozen=True, slots=True)
class Trained:
    """One adapter: what differed, where it stands, and what its run came to, losses in nats a token.

    `stopped`: it lost its place early, `why` says against whom; the folder has its last checkpoint.
    `failed`: its run ended with the error in `why`, and `exit_code`. `unfinished`: the same command
    goes on with it.
    """

    name: str
    changes: Mapping[str, Any]
    output_dir: str
    status: Status
    steps: int
    loss_before: float | None
    loss_after: float | None
    best_step: int | None
    trained_parameters: int | None
    why: str | None = None
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """All of them, in the order they were described, and what the process took; `shared_passes`:
    those of this call that several adapters went through together (`fast`)."""

    output_dir: str
    mode: str
    adapters: tuple[Trained, ...]
    seconds: float
    peak_memory_bytes: int | None
    planned_peak_bytes: int
    shared_passes: int = 0

    @property
    def exit_code(self) -> int:
        """That of the first run that failed, 0 where none did."""
        return next((each.exit_code for each in self.adapters if each.exit_code), 0)

    def best_first(self) -> tuple[Trained, ...]:
        """By held-out loss; finished ones first, and those without a loss last."""

        def place(each: Trained) -> tuple[bool, bool, float]:
            loss = each.loss_after
            return each.status != "finished", loss is None, loss if loss is not None else 0.0

        return tuple(sorted(self.adapters, key=place))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "best": self.best_first()[0].name if self.adapters else None}

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns and rows for people, best first; settings that differ have columns of their own."""
        keys = list(dict.fromkeys(key for each in self.adapters for key in each.changes))
        columns = ("", *keys, "steps", "best step", "loss before", "loss after", "")
        rows = [
            (
                each.name,
                *(_cell(each.changes.get(key)) for key in keys),
                f"{each.steps:,}",
                "" if each.best_step is None else f"{each.best_step:,}",
                _loss(each.loss_before),
                _loss(each.loss_after),
                each.status if each.why is None else f"{each.status}: {each.why}",
            )
            for each in self.best_first()
        ]
        return columns, rows


def keep(found: Sweep) -> None:
    """Write `adapters.json`; whole, so that a kill leaves the one before."""
    with whole(Path(found.output_dir) / FILE) as partial:
        partial.write_text(json.dumps(plain(found.to_dict()), indent=1) + "\n", encoding="utf-8")


def stopped_before(folder: Path) -> dict[str, str]:
    """Adapters that an earlier call of the same sweep stopped early, and why."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {e["name"]: str(e["why"]) for e in found["adapters"] if e["status"] == "stopped"}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def draw(found: Sweep) -> str | None:
    """One picture of all held-out and training losses; why not, where there is none."""
    logs = dict(_logs(found))
    if not logs:
        return "no picture: no adapter has taken a step"
    return plot_many(logs, Path(found.output_dir) / PICTURE)


def _logs(found: Sweep) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for each in found.best_first():
        path = Path(each.output_dir) / "events.jsonl"
        if path.is_file() and each.steps:
            yield each.name, list(read_events(path))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(plain(value))


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
