"""A comparison on the tiny model, its parts run in this process; and what it came to, once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pennyweight.compare import Comparison, compare, run_part
from pennyweight.config import RunConfig, load_run
from pennyweight.finetune import finetune
from pennyweight.report import plain


@dataclass
class Launched:
    """What was asked of other processes, done here; `before` may answer or refuse in their place."""

    before: Callable[[Sequence[str]], None] = lambda arguments: None
    after: Callable[[Sequence[str], dict[str, Any]], None] = lambda arguments, answer: None
    asked: list[str] = field(default_factory=list)

    def __call__(self, arguments: Sequence[str], job: Mapping[str, Any] | None) -> dict[str, Any]:
        named = "/".join(Path(arguments[-1]).with_suffix("").parts[-2:])
        self.asked.append(named)
        self.before(arguments)
        if arguments[0] == "train":
            loaded = load_run(arguments[1])
            answer = finetune(loaded.config, origin=loaded.origin, text=loaded.text).to_dict()
        else:
            answer = run_part(arguments[1], json.loads(json.dumps(job)))
        told = json.loads(json.dumps(plain(answer)))
        self.after(arguments, told)
        return told


@pytest.fixture(scope="session")
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The general text is the same in every test, and takes a second to render."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _quickly(one_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache, and no loss curve of four steps: that alone is a second a run."""
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(one_cache))
    monkeypatch.setattr("pennyweight.finetune.run.plot_losses", lambda *_, **__: None)


@pytest.fixture(scope="session")
def description(
    tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    pairs = [{"prompt": f"say {a} {b}", "completion": f"{b} {a}"} for a in words for b in words]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def make(folder: Path, **told: Any) -> RunConfig:
        settings = {"arms": ["full", "lora", "qlora"], "seeds": [0], "general_rows": 6}
        short = {"range_from": 1e-3, "range_to": 1e-2, "range_points": 2, "range_steps": 2}
        return RunConfig.model_validate(
            {
                "base": {"model": str(tiny_llama_folder), "device": "cpu", "dtype": "float32"},
                "adapter": {"r": 4, "lora_alpha": 8},
                "data": {"train": str(rows), "eval_fraction": 0.2, "max_length": 64},
                "train": {"max_steps": 4, "batch_size": 4, **told.pop("train", {})},
                "evaluate": {"generate_rows": 2, "max_new_tokens": 4},
                "compare": {**settings, **short, **told},
                "output_dir": str(folder),
            }
        )

    return make


@dataclass(frozen=True)
class Done:
    found: Comparison
    config: RunConfig
    launched: Launched
    folder: Path


@pytest.fixture(scope="session")
def done(description: Any, one_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Full, LoRA of two ranks and QLoRA of two, range tests and all; not to be written to."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENNYWEIGHT_CACHE", str(one_cache))
        patch.setattr("pennyweight.finetune.run.plot_losses", lambda *_, **__: None)
        told = {"ranks": [2, 4], "learning_rates": {"qlora": 1e-2}}
        config = description(folder / "out", train={"learning_rate": 5e-4}, **told)
        launched = Launched()
        found = compare(config, launch=launched, say=lambda text: None)
    return Done(found, config, launched, folder / "out")
