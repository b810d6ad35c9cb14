"""`pennyweight adapters ...`: one story from a folder to a pulled copy, as people and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.registry.conftest import adapter_at  # noqa: F401 - a fixture

from pennyweight import cli

VERBS = [
    "list",
    "add",
    "show",
    "tag",
    "untag",
    "diff",
    "lineage",
    "uniform",
    "push",
    "pull",
    "remove",
]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`run("list")` is what is printed; with `--json`, the value of its last line."""
    monkeypatch.setenv("PENNYWEIGHT_REGISTRY", str(tmp_path / "registry"))

    def run(*arguments: str, code: int = 0) -> Any:
        with pytest.raises(SystemExit) as ended:
            cli.main(["adapters", *arguments])
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.err
        return json.loads(said.out.splitlines()[-1]) if "--json" in arguments else said.out

    return run


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(run: Any, verb: str) -> None:
    assert "--json" in run(verb, "--help")


def test_the_story(run: Any, adapter_at: Any, tmp_path: Path) -> None:  # noqa: F811
    assert "none kept" in run("list")
    one, two = adapter_at("one", seed=1), adapter_at("two", seed=2, loss=1.2, lora_alpha=64.0)
    added = run("add", str(one), "--name", "sql", "--tag", "prod", "--json")
    assert added["names"] == ["sql@latest", "sql@prod"]
    told = run("add", str(two), "--name", "sql", "--parent", "sql@prod")
    assert "loads as it is in  PEFT, vLLM, LoRAX, SGLang, llama.cpp" in told
    assert [row["tags"] for row in run("list", "sql", "--json")["adapters"]] == [
        ["latest"],
        ["prod"],
    ]
    assert run("list").count("sql") == 1
    line = run("lineage", "sql", "--json")["lineage"]
    assert [row["names"] for row in line] == [["sql@latest"], ["sql@prod"]]
    assert "loss after" in run("diff", "sql@prod", "sql")
    assert run("diff", "sql@prod", "sql", "--json")["figures"]["loss_after"] == [1.5, 1.2]
    assert "sql@prod is" in run("tag", "sql", "prod")
    place = str(tmp_path / "place")
    pushed = run("push", "sql@prod", place)
    assert f"pennyweight adapters pull {place} --name sql --expect " in pushed
    back = run("pull", place, "--name", "copy", "--json")
    assert back["version"] == run("show", "sql@prod", "--json")["version"]
    run("untag", "sql", "prod")
    assert run("remove", "copy", "--json")["deleted"] == []
    assert len(run("remove", "sql", "--json")["deleted"]) == 2
    assert run("show", "sql", "--json", code=2)["error"]["kind"] == "AdapterError"
