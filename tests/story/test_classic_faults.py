"""A catalogue of the classic faults of fine-tuning: each is planted, and what a person reads is held.

Everywhere else these cost days, since nothing says a word: the model never stops, learned nothing,
was served with other tokens than it was trained on, or was the base all along. Every one is planted
on a tiny random model, on the model that ships here, and on a real one where there is one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from pennyweight import cli
from pennyweight.builtin import model_folder
from pennyweight.data.examples import ExamplesWriter
from pennyweight.data.prepare import making
from pennyweight.report import read_events
from tests.conftest import CHAT_TEMPLATE

USAGE, DATA = 2, 65


@dataclass(frozen=True)
class Base:
    """A model to plant faults on. `named`: as a run's description names it; a copy of `folder`, to
    tamper with, is always `model`. `length`: tokens that each of the tests' rows has room in."""

    folder: Path
    named: str
    bos: str
    stop: str
    stop_id: int
    length: int = 96


@pytest.fixture(scope="module", params=["tiny", "builtin", "stories260k"])
def base(request, tiny_llama_folder) -> Base:
    if request.param == "tiny":
        return Base(tiny_llama_folder, "model", "<s>", "<|im_end|>", 4)
    if request.param == "builtin":
        return Base(model_folder(), "builtin", "<|bos|>", "<|im_end|>", 3)
    real = request.getfixturevalue("shared_data") / "models" / "stories260k"
    return Base(real, "model", "<s>", "<s>", 1, length=320)  # one token begins and ends a text


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def pennyweight(capsys, monkeypatch, tmp_path) -> Callable[..., Ended]:
    """`pennyweight("train", "run.yaml")`: the command line, in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return run


def talk(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_run(
    home: Path, base: Base, rows: list[dict[str, Any]] | None = None, **settings: Any
) -> Path:
    """A run.yaml with these settings (`train.max_steps`) beside its rows, 24 short chats."""
    words = ["red", "green", "blue", "one", "two", "three"]
    answers = (" ".join([words[n % 6], *words[: n % 5], words[n // 4]]) for n in range(24))
    chats = rows or [{"messages": talk(f"say {answer}", answer)} for answer in answers]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    run: dict[str, Any] = {
        "base": {"model": base.named, "device": "cpu"},
        "adapter": {"r": 4},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.2, "max_length": base.length},
        "train": {"max_steps": 3, "learning_rate": 0.05, "batch_size": 4},
        "evaluate": {"generate_rows": 2, "max_new_tokens": 4},
        "output_dir": "run",
    }
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        (run[group] if group else run)[name] = value
    path = home / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture
def model(base, tmp_path) -> Path:
    """A base of one's own to tamper with."""
    return Path(shutil.copytree(base.folder, tmp_path / "model", dirs_exist_ok=True))


@pytest.fixture
def described(base, model, tmp_path) -> Callable[..., Path]:
    return partial(write_run, tmp_path, base)


def losses(folder: str) -> list[float]:
    return [e["loss"] for e in read_events(Path(folder) / "events.jsonl") if e["kind"] == "step"]


# pad = eos, and padding masked by its id: the model never learns to stop


def test_pad_is_eos_and_the_stop_token_is_trained_all_the_same(pennyweight, base, described, model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["pad_token"] = settings["eos_token"] = base.stop
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    path = described(**{"base.model": "model"})
    shown = pennyweight("preview", path, "--json").json["shown"]
    assert all(
        [s["text"] for s in row["segments"] if s["trained"]][-1].endswith(base.stop)
        for row in shown
    )
    assert pennyweight("parity", path).code == 0


def test_masked_by_id(pennyweight, base, described, monkeypatch):
    """What a collator does that labels every pad token -100 after pad was set to eos."""

    class MaskedById(ExamplesWriter):
        def add(self, example):
            example.trained[example.ids == base.stop_id] = False
            super().add(example)

    monkeypatch.setattr(making, "ExamplesWriter", MaskedById)
    ended = pennyweight("train", described())
    assert ended.code == USAGE
    assert f"the stop token {base.stop} is not trained" in ended.err
    assert "the model would never learn to stop" in ended.err
    assert not Path("run/adapter").exists()


# the stop token cut off


def test_every_answer_cut_before_its_end(pennyweight, described):
    """`data.max_length` takes the end of each row away, and the stop token is the end."""
    answer = " ".join(["red green blue one two three"] * 6)
    rows = [{"messages": talk(f"say {n}", answer)} for n in range(9)]
    ended = pennyweight("train", described(rows, **{"data.max_length": 48}))
    assert ended.code == DATA
    assert "data.max_cut_share" in ended.err
    assert "longer than data.max_length 48" in ended.err
    assert "loses the end of its answer, and never trains the stop token" in ended.err


def test_a_template_that_prints_no_stop_gets_one(pennyweight, base, described, tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "t.jinja").write_text(
        template + "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    path = described(**{"data.template": "t.jinja"})
    shown = pennyweight("preview", path, "--json").json
    assert shown["shown"][0]["segments"][-1]["text"].endswith(base.stop)
    assert "the template prints no stop token" in " ".join(shown["lines"])
    assert pennyweight("parity", path).code == 0


# an empty mask: nothing is trained, the loss is a fine 0.0


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([{"role": "user", "content": "alone"}], "no assistant turn"),
        (
            [
                {"role": "user", "content": "say red"},
                {"role": "assistant", "content": "red", "weight": 0},
            ],
            "sets every assistant turn's weight to 0",
        ),
        (talk("say red", "  "), "the answer is empty"),
    ],
)
def test_an_empty_mask(pennyweight, described, row, why):
    ended = pennyweight("train", described([{"messages": row}] * 3))
    assert ended.code == DATA
    assert "none of 3 rows can be trained on" in ended.err or "none of 2 rows" in ended.err
    assert why in ended.err


# two BOS tokens: one from the template, one from the tokenizer


def test_a_template_that_prints_bos_twice(pennyweight, base, described, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ bos_token }}" + CHAT_TEMPLATE)
    path = described(**{"data.template": "t.jinja"})
    ended = pennyweight("train", path)
    assert ended.code == USAGE
    assert "rows.jsonl:1" in ended.err
    assert f"it begins with 2 BOS tokens ({base.bos}), where one belongs" in ended.err
    assert f"data.template prints {base.bos} more than once" in ended.err
    table = pennyweight("parity", path, "--json")
    assert table.code == USAGE
    assert table.json["ways"]["training"]["one BOS"] is False


def test_text_that_brings_its_own_bos_gets_no_second(pennyweight, base, described):
    rows = [{"prompt": f"{base.bos}say {n}", "completion": str(n)} for n in range(9)]
    path = described(rows, **{"data.template": "plain"})
    shown = pennyweight("preview", path, "--json").json["shown"]
    text = "".join(s["text"] for s in shown[0]["segments"])
    assert text.removesuffix(base.stop).count(base.bos) == 1
    found = pennyweight("parity", path, "--json").json
    assert found["ok"]
    assert all(found["ways"]["transformers"].values())
    assert "its text holds a special token" in found["notes"][0]


# template drift: trained on one template, served with another


@pytest.fixture(scope="module")
def ended_well(base, tmp_path_factory) -> Path:
    """A folder with a model, a run of it and the run's merged folder, all of which agree."""
    home = tmp_path_factory.mktemp("ended-well")
    shutil.copytree(base.folder, home / "model")
    if base.named != "builtin":  # a template that can drift
        (home / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_run(home, base, **{"base.model": "model"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("PENNYWEIGHT_CACHE", str(home / "cache"))
        merge = ["merge", "run", "--out", "run/merged", "--dtype", "float32"]
        for arguments in (["train", "run.yaml"], merge, ["parity", "run"]):
            with pytest.raises(SystemExit) as ended:
                cli.main(arguments)
            assert not ended.value.code
    return home


@pytest.fixture
def finished(ended_well, tmp_path) -> Path:
    """A copy of it to tamper with."""
    shutil.copytree(ended_well, tmp_path, dirs_exist_ok=True)
    return Path("run")


OTHER = CHAT_TEMPLATE.replace("'\\n' + message['content']", "': ' + message['content']").replace(
    "assistant\\n'", "assistant: '"
)


@pytest.mark.parametrize(
    "command",
    [("chat", "run", "-m", "say red"), ("evaluate", "run"), ("parity", "run"),
     ("merge", "run", "--out", "again")],
    ids=lambda command: command[0],
)  # fmt: skip
def test_the_bases_template_changed_after_training(pennyweight, finished, model, command):
    (model / "chat_template.jinja").write_text(OTHER)
    ended = pennyweight(*command)
    assert ended.code == USAGE
    said = ended.out + ended.err
    assert "the first difference is token" in said
    assert "changed since the run was trained: restore it, or train again" in " ".join(said.split())
    assert not Path("again").exists()


def test_the_adapters_folder_speaks_another_template(pennyweight, finished, model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, finished / "adapter")
    (finished / "adapter" / "chat_template.jinja").write_text(OTHER)
    ended = pennyweight("parity", "run", "--json")
    assert ended.code == USAGE
    (fault,) = ended.json["faults"]
    assert (fault["way"], fault["check"]) == ("adapter folder", "same ids")
    assert fault["position"] > 0
    assert "delete the tokenizer files" in fault["mend"]


def test_a_merged_folder_speaks_another_template(pennyweight, finished):
    (finished / "merged" / "chat_template.jinja").write_text("{{ bos_token }}" + CHAT_TEMPLATE)
    ended = pennyweight("parity", "run", "--json")
    assert ended.code == USAGE
    faults = {fault["check"]: fault for fault in ended.json["faults"]}
    assert faults["same ids"]["way"] == "merged folder"
    assert faults["same ids"]["position"] == 1
    assert "2 BOS tokens" in faults["one BOS"]["what"]


def test_a_merged_folder_that_would_not_stop(pennyweight, base, finished):
    path = finished / "merged" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 2}))
    ended = pennyweight("parity", "run")
    assert ended.code == USAGE
    assert f"answers are trained to end with {base.stop}, generation stops on " in ended.out


# a typo in a key: a default is used, and nobody hears of it


def test_a_typo_in_a_key(pennyweight, described):
    path = described(**{"train.leraning_rate": 1e-4})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "leraning" in text)
    ended = pennyweight("train", path)
    assert ended.code == USAGE
    assert f"run.yaml:{line}" in ended.err
    assert "learning_rate" in ended.err
    assert not Path("run").exists()


# mean of means: micro-batches of few tokens count as much as those of many


def test_accumulated_micro_batches_are_no_mean_of_means(pennyweight, described):
    """Four micro-batches of one ragged row are one batch of four, and a mean of means is not."""
    together = {"data.packing": False, "train.max_steps": 3, "train.learning_rate": 5e-3}
    apart = together | {"train.batch_size": 1, "train.gradient_accumulation_steps": 4}
    single = together | {"train.batch_size": 1, "train.max_steps": 4, "train.learning_rate": 1e-12}
    for name, settings in (("one", together), ("four", apart), ("rows", single)):
        assert pennyweight("train", described(output_dir=name, **settings)).code == 0
    assert losses("four") == pytest.approx(losses("one"), rel=1e-5)
    one, four = (load_file(f"{name}/adapter/adapter_model.safetensors") for name in ("one", "four"))
    apart_by = sum(float((one[key] - four[key]).square().sum()) for key in one)
    assert apart_by < 1e-6 * sum(float(one[key].square().sum()) for key in one)
    steps = [e for e in read_events("rows/events.jsonl") if e["kind"] == "step"]
    counts = [step["trained_tokens"] for step in steps]
    assert len(set(counts)) > 1
    of_means = float(np.mean([step["loss"] for step in steps]))
    of_tokens = float(np.average([step["loss"] for step in steps], weights=counts))
    assert losses("one")[0] == pytest.approx(of_tokens, rel=1e-5)
    assert losses("one")[0] != pytest.approx(of_means, rel=1e-3)


# an adapter that binds to nothing


def test_a_target_that_matches_nothing(pennyweight, described):
    ended = pennyweight("train", described(**{"adapter.target_modules": ["q_porj", "v_proj"]}))
    assert ended.code == USAGE
    assert "'q_porj' matches no linear module of this base; did you mean q_proj" in ended.err


def test_an_adapter_whose_keys_match_nothing(pennyweight, finished):
    path = finished / "adapter" / "adapter_model.safetensors"
    save_file({k.replace("q_proj", "query"): t for k, t in load_file(path).items()}, path)
    ended = pennyweight("chat", "run", "-m", "say red")
    assert ended.code == USAGE
    assert "query" in ended.err
    assert "which is no linear module of this base" in ended.err
    assert "the config targets it, the file has no factors for it" in ended.err


# the wrong base: shapes agree, the weights are of another model


def test_the_wrong_base(pennyweight, finished, model):
    path = model / "model.safetensors"
    save_file({key: weight.flip(0).contiguous() for key, weight in load_file(path).items()}, path)
    ended = pennyweight("chat", "run", "-m", "say red")
    assert ended.code == USAGE
    assert "the adapter was trained beside model (fingerprint" in ended.err
    assert "load the base it was trained beside" in ended.err


# a merge that changed nothing


def test_a_merge_that_would_change_nothing(pennyweight, finished):
    path = finished / "adapter" / "adapter_model.safetensors"
    save_file({k: t * ("lora_A" in k) for k, t in load_file(path).items()}, path)
    ended = pennyweight("merge", "run", "--out", "nothing")
    assert ended.code == USAGE
    assert "merging it would change nothing; was it trained?" in ended.err
    assert not Path("nothing").exists()
