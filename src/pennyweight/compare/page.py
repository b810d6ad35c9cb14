"""A comparison as tables for people, and `compare.md`, `compare.json` and pictures in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pennyweight.compare.draw import draw
from pennyweight.compare.folder import write_text
from pennyweight.compare.outcome import ArmOutcome, Comparison
from pennyweight.compare.tally import Figure
from pennyweight.evaluate import Interval

__all__ = ["Table", "notes", "tables", "write_page"]

STORED_AS = {
    "none": "as stored",
    "nf4": "NF4",
    "fp4": "FP4",
    "int8": "8-bit",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under their columns, the first of which is no figure."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(found: Comparison) -> list[Table]:
    """What the tuning was worth, what it forgot and took, and how learning rates were found."""
    made = [_worth(found), _forgetting(found), _cost(found)]
    return [*made, _rates(found)] if found.ranges else made


def write_page(found: Comparison, folder: Path, *, pictures: bool = False) -> list[str]:
    """Write all there is to a folder; gives lines that say where, and what could not be drawn."""
    write_text(folder / "compare.json", json.dumps(found.to_dict(), indent=1) + "\n")
    drawn, why_not = draw(found, folder) if pictures else ([], None)
    write_text(folder / "compare.md", _page(found, drawn))
    told = [f"written: {folder / 'compare.md'}, {folder / 'compare.json'}"]
    told += [f"drawn: {', '.join(str(folder / name) for name in drawn)}"] if drawn else []
    return [*told, why_not] if why_not else told


def notes(found: Comparison) -> list[str]:
    """How to read the tables; what was left out."""
    said = [
        f"Figures are means over seeds {', '.join(map(str, found.seeds))}; 95 % intervals in "
        "brackets. Beside a figure: over documents, would other rows say the same of these very "
        "models (paired bootstrap)? In a column of its own: over seeds, would other trainings "
        "(Student's t, wide for few seeds)?",
        "Quality kept: (base loss - arm loss) / (base loss - full loss), seed by seed, against the "
        "base as stored.",
        f"General text is {_general(found)}; the change is against the arm's own base, above 0 is "
        "forgetting.",
    ]
    said += [f"Left out: {label}. {why}" for label, why in found.left_out.items()]
    if not any(arm.method == "full" for arm in found.arms):
        said.append("Without full fine-tuning there is nothing to measure quality kept against.")
    return [*said, *found.notices]


def _worth(found: Comparison) -> Table:
    columns = ["", "loss", "over seeds", "quality kept", "over seeds"]
    columns += [found.judged, "over seeds"] if found.judged else []
    rows = []
    for base in found.bases:
        cells = [f"base, {STORED_AS[base.storage]}", _loss(base.loss), "", "", ""]
        rows.append([*cells, *_answers(base.answers)] if found.judged else cells)
    for arm in found.arms:
        cells = [arm.label, _loss(arm.loss), _between(arm.loss.seeds, "{:.3f}"), *_kept(arm)]
        rows.append([*cells, *_answers(arm.answers)] if found.judged else cells)
    title = f"What it was worth: {found.test_rows:,} held-out rows, nats a token"
    return Table(title, tuple(columns), tuple(map(tuple, rows)))


def _forgetting(found: Comparison) -> Table:
    columns = ("", "before", "after", "change", "over seeds")
    before = {base.storage: base.general.mean for base in found.bases}
    rows = [
        (
            arm.label,
            f"{before[arm.storage]:.3f}",
            f"{arm.general.mean:.3f}",
            f"{arm.forgotten.mean:+.3f} {_between(arm.forgotten.documents, '{:+.3f}')}".strip(),
            _between(arm.forgotten.seeds, "{:+.3f}"),
        )
        for arm in found.arms
    ]
    title = f"What was forgotten: {found.general_documents:,} documents of general text"
    return Table(f"{title}, nats a token", columns, tuple(rows))


def _cost(found: Comparison) -> Table:
    columns = ("", "learning rate", "trained parameters", "size", "peak memory", "planned")
    rows = [
        (
            arm.label,
            f"{arm.learning_rate:.2g}" + ("" if arm.rate_from == "given" else ", tuned"),
            f"{arm.trained_parameters:,}",
            _bytes(arm.bytes),
            "unknown" if arm.peak_memory_bytes is None else _bytes(arm.peak_memory_bytes),
            _bytes(arm.planned_peak_bytes),
            f"{arm.tokens_per_second:,.0f}",
            f"{arm.train_seconds:,.0f} s",
        )
        for arm in found.arms
    ]
    return Table("What it took", (*columns, "tokens/s", "training"), tuple(rows))


def _rates(found: Comparison) -> Table:
    """Losses of the range tests by rate; the chosen one is marked."""
    rates = sorted({rate for curve in found.ranges for rate in curve.rates})
    rows = []
    for curve in found.ranges:
        losses = dict(zip(curve.rates, zip(curve.losses, curve.stable, strict=True), strict=True))
        cells = [curve.label]
        for rate in rates:
            loss, stable = losses.get(rate, (None, True))
            if rate not in losses:
                cells.append("")
            elif loss is None:
                cells.append("diverged")
            else:
                mark = "*" if rate == curve.chosen else "" if stable else " unstable"
                cells.append(f"{loss:.3f}{mark}")
        rows.append(tuple(cells))
    steps, judged = found.ranges[0].steps, found.ranges[0].rows
    title = f"Range test: loss after {steps} steps on {judged} training rows set apart (* chosen)"
    return Table(title, ("", *(f"{rate:.2g}" for rate in rates)), tuple(rows))


def _page(found: Comparison, drawn: Sequence[str]) -> str:
    parts = [f"# Comparison on {_named(found.model)}"]
    for table in tables(found):
        parts += [f"## {table.title}", _markdown(table)]
    parts += ["## How to read it", "\n".join(f"- {note}" for note in notes(found))]
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in drawn]
    told = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return "\n\n".join([*parts, f"Made by `pennyweight compare`; {told}."]) + "\n"


def _markdown(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (table.columns, rule, *table.rows))


def _kept(arm: ArmOutcome) -> list[str]:
    if arm.kept is None:
        return ["", ""]
    if arm.method == "full":
        return ["100 %", ""]
    hundredfold = _between(_percent(arm.kept.documents), "{:.1f}")
    over_seeds = _between(_percent(arm.kept.seeds), "{:.1f}")
    return [f"{100 * arm.kept.mean:.1f} % {hundredfold}".strip(), over_seeds]


def _percent(between: Interval | None) -> Interval | None:
    return None if between is None else (100 * between[0], 100 * between[1])


def _loss(figure: Figure) -> str:
    return f"{figure.mean:.3f} {_between(figure.documents, '{:.3f}')}".strip()


def _answers(figure: Figure | None) -> list[str]:
    if figure is None:
        return ["", ""]
    documents = _between(_percent(figure.documents), "{:.1f}")
    return [
        f"{100 * figure.mean:.1f} % {documents}".strip(),
        _between(_percent(figure.seeds), "{:.1f}"),
    ]


def _between(between: Interval | None, form: str) -> str:
    if between is None:
        return ""
    return f"[{form.format(between[0])}, {form.format(between[1])}]"


def _bytes(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def _general(found: Comparison) -> str:
    if found.general_text == "builtin":
        return "Python's own reference (`pydoc_data`)"
    return _named(found.general_text)


def _named(given: str) -> str:
    """A Hub id as it is, a path by its last name."""
    return Path(given).name if Path(given).exists() else given
