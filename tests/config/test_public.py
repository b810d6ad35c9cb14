"""What may be shown of a run: names in place of paths, and no secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pennyweight.config import RunConfig, named_paths, public, public_config, public_name

HUGGING_FACE = "hf_" + "aB3" * 10
WANDB = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/jane/secret/rows.jsonl: 12 rows", "rows.jsonl: 12 rows"),
        ("read ~/work/acme/rows.jsonl, then stop", "read rows.jsonl, then stop"),
        (r"C:\Users\jane\rows.csv", "rows.csv"),
        ("'/mnt/data/a b.txt'", "'a b.txt'"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", None),
        ("https://jane:pass@host/x", "https://host/x"),
        ("Qwen/Qwen3-0.6B and tokens/s, and/or", None),
        ("</s> <|im_end|> 1/2/3", None),
        (r".*\.(q_proj|v_proj)|layers\.\d+\.mlp\.\w+", None),
        ("[^/]*/self_attn/(?:q|k)", None),
        (f"token {HUGGING_FACE}.", "token [removed]."),
        (f"key={WANDB};", "key=[removed];"),
        (f"acme/model@{WANDB}", None),
        ("a" * 64, None),
    ],
)
def test_texts(text: str, shown: str | None) -> None:
    assert public(text) == (text if shown is None else shown)


def test_what_the_environment_calls_a_secret_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_API_KEY", "correct horse")
    monkeypatch.setenv("ACME_TOKEN", "no")  # too short to be one
    told = {"a": ["correct horse battery", 3, None], "correct horse": ("no", 1.5, True)}
    assert public(told) == {
        "a": ["[removed] battery", 3, None],
        "[removed]": ["no", 1.5, True],
    }


def test_this_folder_and_home_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "jane doe"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert public(f"{folder / 'rows.jsonl'}: read") == "rows.jsonl: read"
    monkeypatch.chdir(os.sep)
    monkeypatch.setenv("HOME", str(folder))
    assert public(f"{folder / 'rows.jsonl'}: read") == "rows.jsonl: read"


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_name("builtin") == "builtin"
    assert public_name("Qwen/Qwen3-0.6B@main") == "Qwen/Qwen3-0.6B@main"
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients/acme").write_text("")
    assert public_name("clients/acme") == "acme"
    assert public_name("/a/b/") == "b"


def test_a_description_keeps_its_meaning_and_loses_its_paths() -> None:
    run = RunConfig.model_validate(
        {
            "base": {"model": "/models/jane/tiny"},
            "data": {
                "train": ["/home/jane/a.jsonl", {"path": "acme/rows", "weight": 2}],
                "eval": "../held/b.jsonl",
                "template": "/home/jane/chat.jinja",
                "system": "You work for ACME.",
            },
            "output_dir": "/runs/jane/one",
        }
    )
    shown = public_config(run)
    assert shown.base.model == "tiny"
    assert shown.data.train[0] == "a.jsonl"
    assert shown.data.train[1].path == "acme/rows"
    assert shown.data.train[1].weight == 2
    assert (shown.data.eval, shown.data.template, shown.output_dir) == (
        "b.jsonl",
        "chat.jinja",
        "one",
    )
    assert "ACME" not in shown.model_dump_json()
    known = named_paths(run)
    assert known["../held/b.jsonl"] == "b.jsonl"
    assert "acme/rows" not in known
    assert public("../held/b.jsonl: 3 rows", known) == "b.jsonl: 3 rows"
