"""100,000 lines of data gone wrong, in every format: rows, or faults named by file and line."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import tracemalloc
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from campaigns.tally import Tally
from campaigns.untrusted.watch import watching
from pennyweight.data.formats import RowRefusedError, as_conversation, detect
from pennyweight.data.read import Faults, Row, read_rows
from pennyweight.data.trees import grown
from pennyweight.errors import DataError

__all__ = ["flat", "run"]

LINES, LINES_A_FILE = 100_000, 200
MUST_BE_NAMED = (b"NaN", b"-Infinity", b'"\\ud800"', b'{"a": 1, "a": 2}', b"\xff", b"1e", b"'a'")

GOOD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("chat", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Yo"}], "weight": 1}], "tools": [{"name": "f"}]}),
    ("alpaca", {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]}),
    ("openassistant", {"message_id": "a", "parent_id": None, "role": "prompter", "text": "a", "rank": None}),
    ("openassistant", {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": "b", "rank": 0, "replies": []}]}}),
    ("prompt_completion", {"prompt": "a", "completion": "b", "system": "c"}),
    ("text", {"text": "once"}),
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "a",
    [],
    [[]],
    [1],
    {},
    {"a": 1},
    "\x1b[2J",
    "\u2028",
)
_ODD_CELLS: tuple[Any, ...] = (
    b"\xff\x00",
    math.nan,
    -math.inf,
    2**63 - 1,
    "\x1b[2J\u2028",
    Decimal("1e30"),
    datetime.max.replace(microsecond=0),
    [None],
    [[1.5]],
    {"a": None},
)


def run(tally: Tally, cases: int | None) -> None:
    lines = cases or LINES
    dice, kinds = random.Random(0), [".jsonl", ".json", ".csv", ".tsv", ".txt", "array"]
    if find_spec("pyarrow") is None:
        tally.remark("no Parquet: pyarrow is not installed")
    else:
        kinds.append(".parquet")
    done = 0
    while done < lines:
        kind = kinds[(done // LINES_A_FILE) % len(kinds)]
        number = min(LINES_A_FILE, lines - done)
        path = tally.folder / f"rows{'.json' if kind == 'array' else kind}"
        planted = _write(path, kind, number, dice)
        fault = _judge(path, planted)
        for line in range(number):
            tally.case(f"{path.name} line {done + line}", fault if line == 0 else None)
        done += number


def _write(path: Path, kind: str, number: int, dice: random.Random) -> set[int]:
    """Lines of one file; gives the numbers of JSON lines that have to be refused by name."""
    planted: set[int] = set()
    if kind == ".parquet":
        _write_parquet(path, number, dice)
        return planted
    lines: list[bytes] = []
    for at in range(1, number + 1):
        if kind == ".jsonl" and dice.random() < 0.02:
            planted.add(at)
            lines.append(b'{"text": ' + dice.choice(MUST_BE_NAMED) + b"}")
        else:
            lines.append(_mutated(_row(dice), dice).replace(b"\n", b" ").replace(b"\r", b" "))
    if kind == "array":
        path.write_bytes(b"[\n" + b",\n".join(lines) + b"\n]")
    elif kind in (".csv", ".tsv"):
        path.write_bytes(b"prompt,completion\n" + b"\n".join(lines))
    else:
        path.write_bytes(b"\n".join(lines))
    return planted


def _write_parquet(path: Path, number: int, dice: random.Random) -> None:
    """A table some of whose columns are of another type than they should be, with values left out;
    the bytes of every other one are damaged."""
    import pyarrow
    from pyarrow.parquet import write_table

    _, row = dice.choice(GOOD)
    columns = {}
    for name, value in row.items():
        odd = dice.choice(_ODD_CELLS) if dice.random() < 0.3 else value
        cells = [None if dice.random() < 0.1 else odd for _ in range(number)]
        try:
            columns[name] = pyarrow.array(cells)
        except (pyarrow.ArrowException, TypeError):  # lists beside texts make no column
            columns[name] = pyarrow.array([json.dumps(cell) for cell in cells])
    write_table(pyarrow.table(columns), path)
    if dice.random() < 0.5:
        held = bytearray(path.read_bytes())
        for _ in range(dice.randrange(1, 6)):
            at = dice.randrange(len(held))
            held[at : at + dice.randrange(3)] = dice.randbytes(dice.randrange(3))
        path.write_bytes(held)


def _row(dice: random.Random) -> bytes:
    _, row = dice.choice(GOOD)
    row = json.loads(json.dumps(row))
    for _ in range(dice.randrange(3)):
        _change(row, dice)
    return json.dumps(row, ensure_ascii=dice.random() < 0.5).encode()


def _change(value: Any, dice: random.Random) -> None:
    """Replace, drop or double something somewhere in a row."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = dice.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and dice.random() < 0.6:
            value = value[key]
            continue
        if dice.random() < 0.2 and isinstance(value, dict):
            del value[key]
        else:
            value[key] = copy.deepcopy(dice.choice(_VALUES))
        return


def _mutated(line: bytes, dice: random.Random) -> bytes:
    for _ in range(dice.randrange(3)):
        at, cut = dice.randrange(len(line) + 1), dice.randrange(4)
        line = line[:at] + dice.randbytes(dice.randrange(3)) + line[at + cut :]
    return line


def _judge(path: Path, planted: set[int]) -> str | None:
    faults, said = Faults(), ""
    with watching(path.parent) as watched:
        try:
            for row in _flat_and_whole(read_rows(path, faults), faults):
                try:
                    as_conversation(row.value, row.source, detect(row.value))
                except RowRefusedError as refused:
                    faults.add(row.source, str(refused))
            faults.raise_any()
        except DataError as error:
            said = str(error)
        except Exception as error:
            return f"{path.suffix}: {type(error).__name__}: {str(error)[:200]}"
    if watched.seen:
        return "; ".join(watched.seen[:3])
    for line in said.splitlines():
        if not re.match(
            rf"{re.escape(path.name)}(:\d+)?: |and [\d,]+ more",
            line.removeprefix(f"{path.parent}/"),
        ):
            return f"a fault without its place: {line[:120]!r}"
    if planted:
        alone = Faults()
        read = {row.source for row in read_rows(path, alone)}
        if missed := [n for n in planted if f"{path.name}:{n}" in read]:
            return f"line {missed[0]} was taken and should have been refused"
    return None


def _flat_and_whole(rows: Iterator[Row], faults: Faults) -> Iterator[Row]:
    """Rows as they are, and messages that name a parent grown into trees at the end."""
    flat_rows = []
    for row in rows:
        if isinstance(row.value, dict) and "parent_id" in row.value and "replies" not in row.value:
            flat_rows.append(row)
        else:
            yield row
    yield from grown(flat_rows, faults)


def flat(tally: Tally, cases: int | None) -> None:
    """Memory while files of growing size are read: the same, within a few megabytes."""
    sizes = (3, 6) if cases is not None else (8, 64)
    row = json.dumps({"prompt": "word " * 400, "completion": "word " * 400}).encode()
    makers = {
        ".jsonl": (b"", row + b"\n", b""),
        ".json": (b"[", row + b",\n", row + b"]"),
        ".csv": (b"prompt,completion\n", b'"' + b"word " * 800 + b'","c d"\n', b""),
        ".txt": (b"", b"word " * 800 + b"\nword\n\n", b""),
    }
    for suffix, (head, body, tail) in makers.items():
        peaks = []
        for megabytes in sizes:
            path = tally.folder / f"rows{suffix}"
            with path.open("wb") as file:
                file.write(head)
                block = body * (2**20 // len(body))
                for _ in range(megabytes):
                    file.write(block)
                file.write(tail)
            peaks.append(_peak_bytes(path))
            path.unlink()
        grew = (peaks[-1] - peaks[0]) / 2**20
        tally.case(suffix, None if grew < 2 else f"{grew:.1f} MB more for {sizes[-1]} MB")
        tally.remark(
            f"{suffix}: {peaks[0] / 2**20:.1f} MB for {sizes[0]} MB, {peaks[-1] / 2**20:.1f} MB for {sizes[-1]} MB"
        )


def _peak_bytes(path: Path) -> int:
    """The most that reading holds at once, as Python counts it."""
    tracemalloc.start()
    try:
        faults = Faults()
        for _ in read_rows(path, faults):
            pass
        faults.raise_any()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
