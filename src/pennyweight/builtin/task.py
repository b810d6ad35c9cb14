"""A task anyone can check: read a Python function, answer with its signature as JSON.

Rows are built when asked for, from the standard library of the Python that runs; `ast` gives the
answers. The rows held out for evaluation come from modules (`HELD_OUT`) that the shipped base model
never saw, neither in pretraining nor as training rows.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pennyweight.errors import DataError

__all__ = ["HELD_OUT", "INSTRUCTION", "Function", "functions", "is_correct", "modules", "rows"]

INSTRUCTION = "Give the signature of this function as JSON."

# Top-level modules and packages whose functions are for evaluation only.
HELD_OUT = frozenset(
    {
        "argparse",
        "bz2",
        "calendar",
        "configparser",
        "csv",
        "difflib",
        "filecmp",
        "fileinput",
        "fractions",
        "ftplib",
        "getopt",
        "glob",
        "gzip",
        "heapq",
        "lzma",
        "mailbox",
        "platform",
        "pprint",
        "queue",
        "sched",
        "shutil",
        "statistics",
        "tarfile",
        "tempfile",
        "textwrap",
        "uuid",
        "wsgiref",
        "xmlrpc",
        "zipfile",
    }
)

# Not installed everywhere, generated, or the same few lines many times over.
LEFT_OUT = frozenset(
    {
        "__pycache__",
        "__phello__",
        "config",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "msilib",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    }
)

MAX_SOURCE_CHARS = 320  # keeps prompt and answer of a row near 200 tokens of the shipped model


@dataclass(frozen=True, slots=True)
class Function:
    """One function as it stands in a module, moved to the left margin."""

    source: str
    where: str
    answer: dict[str, Any]


def rows(split: Literal["train", "eval"]) -> Iterator[dict[str, Any]]:
    """Chat rows of one split in a fixed shuffled order; a source occurs once, in one split only.

    Each row is `{"messages": [user, assistant], "source": "module.py:line"}`.
    """
    if split not in ("train", "eval"):
        raise DataError(f'split "{split}" is unknown; use "train" or "eval"')
    for function in _splits(_stdlib())[split]:
        yield {
            "messages": [
                {"role": "user", "content": f"{INSTRUCTION}\n\n{function.source}"},
                {"role": "assistant", "content": json.dumps(function.answer)},
            ],
            "source": function.where,
        }


@cache
def _splits(library: Path) -> dict[str, tuple[Function, ...]]:
    """Both splits of this library, each ordered by digest, so that its first N rows are a fair sample of all
    modules. The library is parsed once a process: it takes some seconds."""
    seen: set[str] = set()
    found: dict[str, list[Function]] = {"train": [], "eval": []}
    # Training modules first: a held-out function that also stands in one of them is dropped.
    for split, held_out in (("train", False), ("eval", True)):
        for path in modules(held_out=held_out):
            for function in functions(path):
                if function.source not in seen:
                    seen.add(function.source)
                    found[split].append(function)
    return {
        split: tuple(sorted(several, key=lambda f: hashlib.sha256(f.source.encode()).digest()))
        for split, several in found.items()
    }


def is_correct(answer: str, expected: str) -> bool:
    """Whether two answers are the same JSON value; what is not JSON is wrong."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return bool(found == json.loads(expected))


def modules(*, held_out: bool) -> list[Path]:
    """Source files of one side of the split, sorted; raises DataError where none are installed."""
    root = _stdlib()
    chosen = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT.isdisjoint(part.split("-")[0] for part in parts) and LEFT_OUT.isdisjoint(parts):
            top = parts[0].removesuffix(".py")
            if (top in HELD_OUT) == held_out:
                chosen.append(path)
    if not chosen:
        raise DataError(
            f"{root}: no standard library source files; the built-in task is made from them. "
            "Use a Python installed with its .py files (not zipped or stripped)"
        )
    return chosen


def functions(path: Path) -> Iterator[Function]:
    """Every short function and method of a file that still parses alone, in order of its lines."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    name = path.relative_to(_stdlib()).as_posix()
    for node in _definitions(ast.parse(text)):
        block = lines[node.lineno - 1 : node.end_lineno]
        if len(block) > MAX_SOURCE_CHARS // 2 or block[0][: node.col_offset].strip():
            continue  # too long, or another statement shares the line
        source = textwrap.dedent("\n".join(block)).rstrip()
        if len(source) > MAX_SOURCE_CHARS:
            continue
        try:
            alone = ast.parse(source).body
        except SyntaxError:
            continue
        if len(alone) == 1 and isinstance(alone[0], ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(source, f"{name}:{node.lineno}", _signature(alone[0]))


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All definitions under a node, at any depth of statements, in order of their lines."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        below = [
            n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr | ast.arguments)
        ]
        waiting += reversed(below)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Any]:
    """Name, parameters a caller must give, parameters a caller may leave out, each in order."""
    spec = node.args
    positional = [arg.arg for arg in (*spec.posonlyargs, *spec.args)]
    first_default = len(positional) - len(spec.defaults)
    required, optional = positional[:first_default], positional[first_default:]
    if spec.vararg:
        optional.append(f"*{spec.vararg.arg}")
    for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        (required if default is None else optional).append(arg.arg)
    if spec.kwarg:
        optional.append(f"**{spec.kwarg.arg}")
    return {"name": node.name, "required": required, "optional": optional}


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))
