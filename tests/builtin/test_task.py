"""The built-in task: same rows each time, a clean split, and answers that a second reader confirms."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pennyweight.builtin import task
from pennyweight.errors import DataError

Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def splits() -> Rows:
    return {"train": list(task.rows("train")), "eval": list(task.rows("eval"))}


def _source(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"].removeprefix(task.INSTRUCTION + "\n\n"))


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(row["messages"][1]["content"]))


def test_there_are_thousands_to_train_on_and_hundreds_held_out(splits: Rows) -> None:
    assert len(splits["train"]) >= 4000
    assert len(splits["eval"]) >= 300


def test_the_same_rows_in_the_same_order_in_another_process(splits: Rows) -> None:
    code = (
        "import hashlib, json; from pennyweight.builtin import task;"
        "print(hashlib.sha256(json.dumps(list(task.rows('train'))).encode()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = hashlib.sha256(json.dumps(splits["train"]).encode()).hexdigest()
    assert out.stdout.strip() == here


def test_no_module_and_no_source_stands_on_both_sides(splits: Rows) -> None:
    def tops(rows: list[dict[str, Any]]) -> set[str]:
        return {row["source"].split(":")[0].split("/")[0].removesuffix(".py") for row in rows}

    assert tops(splits["eval"]) <= task.HELD_OUT
    assert tops(splits["train"]).isdisjoint(task.HELD_OUT)
    sources = [_source(row) for rows in splits.values() for row in rows]
    assert len(sources) == len(set(sources))


def test_every_answer_agrees_with_the_ast_of_its_prompt(splits: Rows) -> None:
    for row in splits["train"] + splits["eval"]:
        source, answer = _source(row), _answer(row)
        node = ast.parse(source).body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        every = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
        named = [name.lstrip("*") for name in answer["required"] + answer["optional"]]
        assert answer["name"] == node.name
        # A default may be a lambda, whose own parameters are no parameters of the function.
        assert set(named) <= every
        assert len(named) == len(set(named))
        assert len(source) <= task.MAX_SOURCE_CHARS


@pytest.mark.parametrize("module", ["shutil", "fileinput", "statistics", "calendar"])
def test_answers_agree_with_inspect_on_live_functions(splits: Rows, module: str) -> None:
    live = importlib.import_module(module)
    checked = 0
    for row in splits["eval"]:
        file, line = row["source"].split(":")
        function = getattr(live, _answer(row)["name"], None)
        if file != f"{module}.py" or not inspect.isfunction(function):
            continue
        if function.__code__.co_filename != live.__file__:
            continue
        if function.__code__.co_firstlineno != int(line):
            continue  # a decorator above it, or another function of that name
        required, optional = [], []
        for name, parameter in inspect.signature(function).parameters.items():
            stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
            mark = stars.get(parameter.kind, "")
            bare = not mark and parameter.default is parameter.empty
            (required if bare else optional).append(mark + name)
        assert _answer(row) == {
            "name": function.__name__,
            "required": required,
            "optional": optional,
        }
        checked += 1
    assert checked


@pytest.mark.parametrize(
    ("source", "required", "optional"),
    [
        ("def f(): pass", [], []),
        ("def f(a, /, b, c=1): pass", ["a", "b"], ["c"]),
        ("def f(a, *, b, c=None): pass", ["a", "b"], ["c"]),
        ("async def f(self, *args, key=1, **kw): pass", ["self"], ["*args", "key", "**kw"]),
    ],
)
def test_what_may_be_left_out_is_optional(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    required: list[str],
    optional: list[str],
) -> None:
    monkeypatch.setattr(task, "_stdlib", lambda: tmp_path)
    (tmp_path / "one.py").write_text(source)
    (found,) = task.functions(tmp_path / "one.py")
    assert found.answer == {"name": "f", "required": required, "optional": optional}
    assert found.where == "one.py:1"


def test_methods_move_to_the_left_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "_stdlib", lambda: tmp_path)
    (tmp_path / "two.py").write_text("class A:\n    def f(self):\n        return 1\n")
    (found,) = task.functions(tmp_path / "two.py")
    assert found.source == "def f(self):\n    return 1"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"b": [], "a": 1}', True),
        ('  {"a":1,"b":[]}\n', True),
        ('{"a": 1}', False),
        ('{"a": 1, "b": []} and more', False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_an_answer_is_judged_as_json(answer: str, right: bool) -> None:
    assert task.is_correct(answer, '{"a": 1, "b": []}') is right


def test_a_python_without_its_source_is_refused_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "_stdlib", lambda: tmp_path)
    with pytest.raises(DataError, match=r"no standard library source.*Use a Python installed"):
        next(task.rows("train"))


def test_an_unknown_split_is_refused() -> None:
    unchecked = inspect.unwrap(task.rows)
    with pytest.raises(DataError, match='use "train" or "eval"'):
        next(unchecked("test"))  # type: ignore[arg-type]


def test_importing_the_task_loads_nothing_heavy() -> None:
    code = "import sys, pennyweight.builtin.task; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
