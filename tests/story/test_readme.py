"""What the README shows is what happens: its tree, its Python page and its six commands, run for real."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

from pennyweight.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SOURCE = REPOSITORY / "src" / "pennyweight"


def block(language: str, containing: str) -> str:
    """The fenced block of this language that holds this text."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    found = [text for kind, text in blocks if kind == language and containing in text]
    assert len(found) == 1, f"{len(found)} blocks of {language} hold {containing!r}"
    return found[0]


def command(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code in (0, None), arguments


def test_the_tree_is_the_house():
    shown = re.findall(r"^  (\w+)(?:\.py|/)", block("", "src/pennyweight/"), re.M)
    rooms = {p.stem for p in SOURCE.iterdir() if p.is_dir() or p.suffix == ".py"}
    rooms = {room for room in rooms if not room.startswith("__")}
    assert sorted(shown) == sorted(rooms)


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_python_page_runs(in_an_empty_folder):
    code = block("python", "pw.load_base")
    exec(compile(textwrap.dedent(code), "README.md", "exec"), {})
    assert Path("runs/python/receipt.json").is_file()


def test_the_six_commands(in_an_empty_folder, capsys):
    """With the built-in model and a small file in place of a download."""
    verbs = re.findall(r"^pennyweight (\w+)", block("", "pennyweight init"), re.M)
    assert verbs == ["init", "preview", "train", "evaluate", "chat", "merge"]
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"{q}!"}]}
        for n in ("a", "the", "this")
        for q in (
            f"{n} {word}"
            for word in ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon"]
        )
    ]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("init", "--model", "builtin", "--data", "my.jsonl")
    Path("run.yaml").write_text(capsys.readouterr().out)
    few = [
        "train.max_steps=2",
        "train.batch_size=2",
        "data.max_length=64",
        "evaluate.max_new_tokens=8",
    ]
    text = Path("run.yaml").read_text().replace("  epochs: 1.0\n", "")
    Path("run.yaml").write_text(text)
    command("preview", "run.yaml", *few)
    assert "red" in capsys.readouterr().out
    command("train", "run.yaml", *few, "data.eval_fraction=0.2")
    command("evaluate", "runs/my", "--json")
    measured = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert measured["tuned"]["documents"] > 0
    command("chat", "runs/my", "-m", "red", "--max-new-tokens", "9")
    command("chat", "runs/my", "--adapter", "none", "-m", "red", "--max-new-tokens", "9")
    command("merge", "runs/my", "--out", "merged")
    assert (Path("merged") / "model.safetensors").is_file()
