"""A run's description is read whole: every fault at once, each with its line and its mend."""

from pathlib import Path

import pytest

from pennyweight.config import LoraConfig, RunConfig, load_run, origins, read_resolved, resolve
from pennyweight.config.rules import RULES, broken_rules
from pennyweight.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def test_every_fault_is_said_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
base:
  model: Qwen/Qwen3-0.6B
  quantisation: nf4
adapter:
  r: true
  lora_alpha: "32"
learning_rate: 1e-5
data:
  train:
    - my.jsonl
    - {path: b.jsonl, wieght: 2, format: alpacca}
    - {split: x}
  packing: maybe
train:
  method: qlra
  epochs: -1
""",
    )
    assert faults_of(path, "train.lr=3", "seed=-1") == [
        "run.yaml:3: base.quantisation: unknown key; did you mean base.quantization?",
        "run.yaml:5: adapter.r: found true, expected a whole number of 1 or more and at most 4096",
        "run.yaml:6: adapter.lora_alpha: found the text '32', expected a number above 0",
        "run.yaml:7: learning_rate: unknown key; did you mean train.learning_rate?",
        "run.yaml:11: data.train[1].wieght: unknown key; did you mean data.train[1].weight?",
        "run.yaml:11: data.train[1].format: found the text 'alpacca', expected one of auto, chat, "
        "alpaca, sharegpt, openassistant, prompt_completion, text, or null; did you mean alpaca?",
        "run.yaml:12: data.train[2].path: missing; every source needs one",
        "run.yaml:13: data.packing: found the text 'maybe', expected true or false",
        "run.yaml:15: train.method: found the text 'qlra', expected one of qlora, lora, full; "
        "did you mean qlora?",
        "run.yaml:16: train.epochs: found -1, expected a number above 0",
        "command line: train.lr: unknown key; did you mean train.learning_rate?",
        "command line: seed: found -1, expected a whole number of 0 or more and below 4294967296",
    ]


def test_every_value_has_an_origin(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  method: lora\n  epochs: 2\nseed: 4\n")
    run = load_run(path, ["train.learning_rate=1e-4", "adapter.target_modules=[q_proj, v_proj]"])
    assert run.config.train.learning_rate == 1e-4
    assert run.config.adapter.target_modules == ("q_proj", "v_proj")
    told = {key: where for key, where in run.origin.items() if where != "default"}
    assert told == {
        "train.method": "run.yaml:2",
        "train.epochs": "run.yaml:3",
        "seed": "run.yaml:4",
        "train.learning_rate": "command line",
        "adapter.target_modules": "command line",
        "base.quantization": "follows from train.method",
        "base.double_quantization": "follows from base.quantization",
    }
    assert run.text.startswith("train:")


def test_a_run_made_in_python_has_origins_too() -> None:
    run = RunConfig.model_validate({"train": {"method": "full"}, "data": {"max_length": 64}})
    told = {key: where for key, where in origins(run).items() if where != "default"}
    assert told == {
        "train.method": "Python",
        "data.max_length": "Python",
        "base.quantization": "follows from train.method",
        "base.double_quantization": "follows from base.quantization",
        "train.learning_rate": "follows from train.method",
    }


def test_an_empty_file_is_the_default_run(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "base:\ndata:\n"):
        assert load_run(write(tmp_path, text)).config == resolve(RunConfig())


def test_no_is_false_only_where_a_truth_value_belongs(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, "data: {packing: no, system: no}\n")).config
    assert run.data.packing is False
    assert run.data.system == "no"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train"], "write it as key=value"),
        (["train={}"], "name a setting in it, such as train.method=qlora"),
        (["seed=1", "seed=2"], "given twice"),
        (["seed=[1"], "not YAML"),
        (["adapter.rnak=8"], "did you mean adapter.r"),
        (["adapter.rank=8"], "did you mean adapter.r"),
        (["=8"], "unknown key"),
        (["data.columns.prompt=8"], "expected in data.columns"),
        (["base.device=gpu"], "base.device"),
    ],
)
def test_overrides_are_held_to_the_same_rules(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    (fault,) = faults_of(write(tmp_path, ""), *overrides)
    assert fault.startswith("command line: ")
    assert said in fault


def test_an_override_does_not_hide_a_fault_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "train: 3\n")
    assert faults_of(path, "train.epochs=2") == [
        "run.yaml:1: train: found 3; write its settings under it"
    ]


def test_an_override_takes_the_place_of_what_it_excludes(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  epochs: 2\n  batch_size: 4\n")
    shorter = load_run(path, ["train.max_steps=5", "train.tokens_per_step=4096"])
    assert (shorter.config.train.max_steps, shorter.config.train.tokens_per_step) == (5, 4096)
    assert shorter.origin["train.epochs"] == shorter.origin["train.batch_size"] == "default"
    same = load_run(path, ["train.max_steps=null"])
    assert (same.config.train.epochs, same.config.train.max_steps) == (2.0, None)
    (fault,) = faults_of(path, "train.max_steps=5", "train.epochs=1")
    assert "remove one of the two" in fault
    by_steps = write(tmp_path, "train: {max_steps: 7}\n")
    assert load_run(by_steps, ["train.epochs=3"]).config.train.max_steps is None


def test_a_table_can_be_filled_from_the_command_line(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, "data: {columns: {prompt: a}}"), ["data.columns.completion=b"])
    assert run.config.data.columns == {"prompt": "a", "completion": "b"}
    run = load_run(write(tmp_path, ""), ["adapter.rank_pattern.model.layers.0=4"])
    assert run.config.adapter.rank_pattern == {"model.layers.0": 4}


BROKEN = {
    "many adapters share it": "train: {method: full}\nadapters: {grid: {seed: [1]}}",
    "losers are told": "adapters: {stop: halving}\ndata: {eval_fraction: 0}",
    "a margin is read": "adapters: {stop_margin: 0.2}",
    "method qlora": "train: {method: qlora}\nbase: {quantization: none}",
    "method lora keeps": "train: {method: lora}\nbase: {quantization: nf4}",
    "quantized one cannot": "train: {method: full}\nbase: {quantization: int8}",
    "double quantization": "base: {quantization: int8, double_quantization: true}",
    "no adapter": "train: {method: full}\nadapter: {r: 8}",
    "regular expression": "adapter: {target_modules: '(q_proj'}",
    "looked up, not trained": "base: {embedding_device: host}\ntrain: {method: full}",
    "not be trained on": "data: {train: [a.jsonl, b.jsonl], eval: b.jsonl}",
    "set apart only": "data: {eval: b.jsonl, eval_fraction: 0.1}",
    "no turns": "data: {format: text, train_on: last}",
    "no turns for a template": "data: {format: text, template: chatml}",
    "no conversation": "data: {format: text, system: Be brief.}",
    "own separators": "data: {template: chatml, prompt_suffix: x}",
    "epochs would be ignored": "train: {epochs: 2, max_steps: 5}",
    "filled by packing": "train: {tokens_per_step: 4096}\ndata: {packing: false}",
    "replaces batch_size": "train: {tokens_per_step: 4096, batch_size: 8}",
    "hold the longest": "train: {tokens_per_step: 512}",
    "replaces warmup_ratio": "train: {warmup_steps: 5, warmup_ratio: 0.1}",
    "warm-up must end": "train: {warmup_steps: 5, max_steps: 5}",
    "never comes down": "train: {lr_scheduler_type: constant, min_lr_ratio: 0.1}",
    "stopping early": "train: {early_stopping_patience: 3}\ndata: {eval_fraction: 0}",
    "evaluating needs": "train: {eval_steps: 3}\ndata: {eval_fraction: 0}",
    "each name is an arm": "compare: {learning_rates: {lora: 2e-4, qlroa: 1e-3}}",
    "same in every arm": "compare: {ranks: [4]}\nadapter: {rank_pattern: {q_proj: 2}}",
    "goes upwards": "compare: {range_from: 0.1}",
}


@pytest.mark.parametrize("said", BROKEN)
def test_settings_that_do_not_go_together_are_refused_with_the_mend(
    tmp_path: Path, said: str
) -> None:
    (fault,) = faults_of(write(tmp_path, BROKEN[said]))
    assert said in fault
    assert fault.startswith("run.yaml:")


def test_every_rule_has_a_run_that_breaks_it() -> None:
    for rule in RULES:
        assert any(said in rule.needs for said in BROKEN), rule.needs


def test_defaults_never_break_a_rule() -> None:
    assert broken_rules(RunConfig()) == []


@pytest.mark.parametrize(
    ("method", "quantization", "double", "rate"),
    [
        ("qlora", "nf4", True, 2e-4),
        ("lora", "none", False, 2e-4),
        ("full", "none", False, 2e-5),
    ],
)
def test_what_is_not_given_follows_from_the_method(
    method: str, quantization: str, double: bool, rate: float
) -> None:
    run = resolve(RunConfig.model_validate({"train": {"method": method}}))
    assert run.base.quantization == quantization
    assert run.base.double_quantization is double
    assert run.train.learning_rate == rate
    assert resolve(run) == run


def test_a_run_from_python_is_held_to_the_same_rules() -> None:
    run = RunConfig.model_validate({"train": {"epochs": 1, "max_steps": 5}})
    with pytest.raises(ConfigError, match=r"train\.epochs: max_steps decides"):
        resolve(run)


def test_an_adapter_is_described_from_python_in_one_line() -> None:
    adapter = LoraConfig(r=8, target_modules=["q_proj"])  # type: ignore[arg-type]
    assert adapter.target_modules == ("q_proj",)
    for wrong in ({"r": True}, {"r": "8"}, {"r": 0}, {"rank": 8}, {"lora_alpha": float("nan")}):
        with pytest.raises(ValueError, match="LoraConfig"):
            LoraConfig.model_validate(wrong)


def test_a_resolved_run_is_read_back(tmp_path: Path) -> None:
    run = resolve(RunConfig.model_validate({"train": {"max_steps": 5}}))
    path = tmp_path / "config.json"
    path.write_text(run.model_dump_json(), encoding="utf-8")
    assert read_resolved(path) == run
    path.write_text('{"train": {"methd": "lora"}}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train\.methd"):
        read_resolved(path)


def test_what_cannot_be_opened_is_a_config_error(tmp_path: Path) -> None:
    assert "pennyweight init" in faults_of(tmp_path / "none.yaml")[0]
    assert "a folder" in faults_of(tmp_path)[0]
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in faults_of(tmp_path / "run.yaml")[0]


def test_wrong_values_and_broken_rules_come_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "adapter: {r: many}\n"
        "data: {format: text, template: chatml}\n"
        "train:\n  method: lora\n  epochs: 2\n  max_steps: 10\n  min_lr_ratio: 7\n"
        "  lr_scheduler_type: constant\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_run(file)
    said = str(refused.value)
    assert "run.yaml:1: adapter.r: found the text 'many'" in said
    assert "run.yaml:2: data.template: plain text has no turns" in said
    assert "run.yaml:5: train.epochs: max_steps decides" in said
    assert "run.yaml:7: train.min_lr_ratio: found 7" in said
    # A rule is not held against a value that is wrong in itself.
    assert "never comes down" not in said
