"""Results as text for people: tables and coloured rows. Rich is imported when first needed."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.errors import ConfigError
from pennyweight.report import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Unicode's directional embeddings, overrides and isolates (UAX 9, section 2).
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

__all__ = [
    "Printer",
    "adapters",
    "benchmarks",
    "checks",
    "comparison",
    "converse",
    "evaluation",
    "facts",
    "imported",
    "merged",
    "parity",
    "plain_fields",
    "plan",
    "preview",
    "refuse_stray",
    "table",
    "visible",
]


class Printer:
    """Where a verb's answer goes.

    People read it on stdout. With `--json` whatever is printed while the verb works goes to stderr,
    and stdout gets one object, in one line.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._stdout = sys.stdout

    def __enter__(self) -> Printer:
        if self.as_json:
            sys.stdout = sys.stderr
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._stdout

    def aside(self, shown: Any) -> None:
        """Print on stderr, where it is no part of the answer."""
        _console(sys.stderr).print(shown)

    def give(self, answer: Mapping[str, Any], text: Callable[[], Any]) -> None:
        """Print the verb's answer: `answer` as JSON, or what `text` makes for people."""
        if self.as_json:
            line = json.dumps(plain(answer), allow_nan=False)
            print(line, file=self._stdout, flush=True)
            return
        shown = text()
        if isinstance(shown, str):
            print(visible(shown), end="\n" if shown else "")
        else:
            _console().print(shown)


def _console(file: Any = None) -> Console:
    from rich.console import Console

    # A table that goes to a file keeps its words whole.
    width = None if (file or sys.stdout).isatty() else 140
    return Console(file=file, highlight=False, width=width)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, figures: Iterable[int] = ()
) -> Table:
    """Rows of text under their columns; the columns in `figures` are aligned for numbers."""
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        drawn.add_column(name, justify="right" if i in figures else "left", no_wrap=i in figures)
    for row in rows:
        drawn.add_row(*(_escaped(cell) for cell in row))
    return drawn


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(visible(text))


def visible(text: str) -> str:
    """Text for a terminal, which a stranger may have written: what would move the cursor, colour
    or turn round what is there is spelled out (`\\x1b`), all but line ends and tabs."""
    return "".join(_spelled(c) if _commands(c) else c for c in text)


def _commands(character: str) -> bool:
    # Of the format characters only those that reorder text; others join letters and emoji.
    kind = unicodedata.category(character)
    return (kind == "Cc" and character not in "\n\t") or character in _TURNING


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def facts(answer: Mapping[str, Any]) -> str:
    """`name   value`, one a line; what is not known is left out."""
    known = {
        name.removesuffix("_bytes").replace("_", " "): _said(name, value)
        for name, value in plain_fields(answer).items()
        if value not in (None, "", [], {})
    }
    width = max(map(len, known), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in known.items())


def _said(name: str, value: Any) -> str:
    """A plain value in words; `name` tells its unit."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and name.endswith("_bytes"):
        return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(_said("", each) for each in value)
    if isinstance(value, dict):
        if "interval_95" in value:
            between = _between(value["interval_95"])
            return f"{_said('', value['difference'])}{between}, {value['rows']:,} rows"
        return ", ".join(f"{key.replace('_', ' ')} {_said(key, value[key])}" for key in value)
    return str(value)


def _between(interval: Any) -> str:
    """A 95 % interval in brackets, or nothing where too few rows gave none."""
    return f"  [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""


def evaluation(answer: Mapping[str, Any]) -> Any:
    """One row a measure, one column a model; below them what changed, with its interval."""
    from rich.console import Group

    answer = plain_fields(answer)
    arms = {name: value for name, value in answer.items() if "loss" in value}
    rows = [
        (measure.replace("_", " "), *(_with_interval(arm, measure) for arm in arms.values()))
        for measure in dict.fromkeys(name for arm in arms.values() for name in arm)
        if not measure.endswith("_interval_95")
    ]
    changes = {name: value for name, value in answer.items() if name not in arms}
    return Group(table(("", *arms), rows, figures=range(1, 1 + len(arms))), facts(changes))


def merged(answer: Mapping[str, Any]) -> Any:
    """One row a model: the unmerged adapter, what was merged, the bare base; then what was kept."""
    from rich.console import Group

    answer = plain_fields(answer)
    rows = []
    for arm in answer["models"]:
        if "loss" not in arm:
            rows.append((arm["name"], "refused", "", "", "", "", ""))
            continue
        itself = arm["name"] == "adapter"
        change = arm["loss_difference"]
        name = {"adapter": "adapter, unmerged", "base": "base, bare"}.get(arm["name"], arm["name"])
        told = (
            _said("", change["difference"]) + _between(change["interval_95"]),
            "" if arm["tuning_kept"] is None else f"{arm['tuning_kept']:.1%}",
            f"{arm['mean_kl']:.3g}",
            f"{arm['top1_agreement']:.2%}",
            f"{arm['max_logit_difference']:.3g}",
        )
        marks = "  refused" if arm.get("refused") else "  written" * (arm["name"] == answer["onto"])
        rows.append((name + marks, f"{arm['loss']:.4g}", *(("",) * 5 if itself else told)))
    columns = ("", "loss", "minus adapter's", "gain kept", "KL", "same top token", "largest logit")
    written = {
        "written": answer["folder"],
        "onto": f"{answer['onto']}: {answer['why']}",
        "dtype": answer["dtype"],
        "update_kept": answer["update_kept"],
        "compared_on": f"{answer['rows']:,} {answer['measured_on']}, "
        f"{answer['agreement']['tokens']:,} tokens",
    }
    lines = [f"note: {notice}" for notice in answer["notices"]]
    return Group(table(columns, rows, figures=range(1, 7)), facts(written), *lines)


def _with_interval(arm: Mapping[str, Any], measure: str) -> str:
    if arm.get(measure) is None:
        return ""
    return _said(measure, arm[measure]) + _between(arm.get(f"{measure}_interval_95"))


def benchmarks(answer: Mapping[str, Any]) -> Any:
    """A line a figure, an arm a column; below them what was measured, and where it is written."""
    from rich.console import Group

    from pennyweight.evaluate.tasks.table import about, columns, rows

    head = columns(answer)
    lines = about(answer)
    if "written_to" in answer:
        lines.append(f"results, samples and picture: {answer['written_to']}")
    return Group(table(head, rows(answer), figures=range(2, len(head))), "\n".join(lines))


def refuse_stray(given: Mapping[str, Any], *, needs: str) -> None:
    """Options that would be passed over in silence."""
    if stray := [option for option, value in given.items() if value]:
        raise ConfigError(f"{', '.join(stray)}: only with {needs}")


def checks(found: Iterable[Any]) -> Any:
    """One line a check: whether it holds, what was found, the mend."""
    rows = [("ok" if each.ok else "MEND", each.name, each.found, each.mend) for each in found]
    return table(("", "what", "found", "what to do"), rows)


def imported(found: Any, name: str, out: Path | None) -> Any:
    """What became of every key of another tool's file: what was lost comes last, to be read."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    def inset(text: str, by: int) -> Any:
        return Padding(Text(text), (0, 0, 0, by))

    whose = f" (told by {', '.join(found.known_by)})" if found.known_by else ""
    parts: list[Any] = [Text(f"{name}: {found.tool}{whose}", style="bold"), Text()]
    for fate in ("carried", "its default there", "the same here", "not needed here"):
        rows = [
            (
                str(each.line or ""),
                each.key + (f": {each.value}" if each.value else ""),
                "; ".join(said for said in (_setting(each), each.said) if said),
            )
            for each in found.entries
            if each.fate == fate
        ]
        if rows:
            parts.append(table(("line", f"{fate} ({len(rows)})", ""), rows, figures=(0,)))
    lost = [each for each in found.entries if each.fate in ("NOT carried", "unknown")]
    if lost:
        parts.append(Text(f"NOT carried ({len(lost)})", style="bold red"))
    for each in lost:
        where = f"{name}:{each.line}: " if each.line else ""
        parts += [inset(f"{where}{each.key}: {each.value}", 2), inset(each.said, 6)]
    parts += [Text(), Text("What else differs", style="bold")]
    parts += [inset(said, 2) for said in found.differences]
    then = f"written to {out}; next: pennyweight preview {out}" if out else ""
    return Group(*parts, Text(), Text(then))


def _setting(entry: Any) -> str:
    return f"{entry.to}: {entry.becomes}" if entry.becomes else entry.to


def parity(found: Any) -> Any:
    """A row a way, a column a check; below them the rows, what is to be known, and every fault."""
    from rich.console import Group
    from rich.text import Text

    marks = {True: "✓", False: "✗", None: "-"}
    checks = list(next(iter(found.ways.values())))
    rows = [(way, *(marks[held[check]] for check in checks)) for way, held in found.ways.items()]
    lines = [f"{source}: {', '.join(shape) or 'plain'}" for source, shape in found.rows.items()]
    lines += ["", *found.notes, *map(str, found.faults), found.sentence()]
    return Group(table(("", *checks), rows), *(Text(line) for line in lines))


def preview(shown: Iterable[Any], lines: Iterable[str]) -> Any:
    """Rows as the model reads them: what is trained in green, what is cut off in red, the rest dim.

    Where there is no colour, trained text stands between ⟦ and ⟧, and what is cut off follows ✂.
    """
    from rich.console import Group
    from rich.text import Text

    marked = _console().color_system is None
    parts: list[Any] = []
    for row in shown:
        text = Text()
        for segment in row.segments:
            style = "green" if segment.trained else "dim"
            before, after = ("⟦", "⟧") if marked and segment.trained else ("", "")
            if marked and segment.cut:
                before = "✂" + before
            text.append(
                before + visible(segment.text) + after, style="red" if segment.cut else style
            )
        parts += [Text(visible(_headline(row)), style="bold"), text, Text()]
    return Group(*parts, *(Text(visible(line)) for line in lines))


def _headline(row: Any) -> str:
    held = " (held out)" if row.part == "eval" else ""
    if row.dropped:
        return f"{row.source}{held}: left out: {row.dropped}"
    cut = row.length_before_cut - row.tokens
    told = f"{row.source}{held}: {row.tokens:,} tokens, {row.trained_tokens:,} trained"
    return told + (f", {cut:,} cut off" if cut > 0 else "")


def plan(said: Any) -> Any:
    """The plan as a table, and its verdict in words."""
    from rich.console import Group

    rows = table(("", "size", ""), said.table_rows(), figures=(1,))
    return Group(rows, said.sentence())


def adapters(found: Any) -> Any:
    """The adapters of a sweep, best first, and what they took together."""
    from rich.console import Group

    columns, rows = found.table()
    took = f"{len(found.adapters)} adapters in {found.seconds:,.0f} s, mode {found.mode}"
    if found.peak_memory_bytes is not None:
        peak, planned = (
            _said("_bytes", each) for each in (found.peak_memory_bytes, found.planned_peak_bytes)
        )
        took += f", peak memory {peak}, planned {planned}"
    return Group(table(columns, rows, figures=range(1, len(columns) - 1)), took)


def comparison(found: Any) -> Any:
    """The comparison's tables under their titles, and how to read them."""
    from rich.console import Group
    from rich.text import Text

    from pennyweight.compare import notes, tables

    parts: list[Any] = []
    for each in tables(found):
        parts.append(Text(each.title, style="bold"))
        parts.append(table(each.columns, each.rows, figures=range(1, len(each.columns))))
    return Group(*parts, *(Text(note) for note in notes(found)))


def plain_fields(value: Any) -> dict[str, Any]:
    """A frozen dataclass, or a table, as plain values."""
    fields = plain(value)
    assert isinstance(fields, dict), "what has named fields"
    return fields


def converse(session: Any) -> None:
    """Read lines until the end of input, and stream each answer."""
    print("Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return
        if not said.strip():
            continue
        for piece in session.send(said):
            print(visible(piece), end="", flush=True)
        print()
