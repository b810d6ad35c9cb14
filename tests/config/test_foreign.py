"""Another tool's file becomes a run, and nothing in it is dropped in silence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pennyweight.config import RunConfig, load_run
from pennyweight.config.document import read_document
from pennyweight.config.explain import value_at
from pennyweight.config.foreign import TOOLS, Fate, Imported, import_run, trl, write_run
from pennyweight.config.foreign.account import Account
from pennyweight.config.foreign.trainer import UNREAD
from pennyweight.errors import ConfigError

AXOLOTL = """
base_model: Qwen/Qwen2.5-1.5B-Instruct
revision_of_model: 989aa79
model_type: AutoModelForCausalLM
trust_remote_code: no

adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_modules_to_save: [embed_tokens, lm_head]
peft_use_rslora: yes

datasets:
  - path: data/tickets.jsonl
    type: chat_template
    field_messages: dialogue
    message_property_mappings: {role: role, content: content}
    roles_to_train: [assistant]
    train_on_eos: turn
  - path: data/faq.json
    ds_type: json
    type: alpaca
  - path: json
    data_files: [data/notes.jsonl]
    type: completion
    field: body
val_set_size: 0.04
chat_template: chatml

sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
flash_attention: true

micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 2e-4
warmup_steps: 20
weight_decay: 0.01
max_grad_norm: 0.5
neftune_noise_alpha: 5
bf16: auto
fp16:
tf32: yes
gradient_checkpointing: true

eval_steps: 50
save_steps: 100
save_total_limit: 3
early_stopping_patience: 3
logging_steps: 1
wandb_project: tickets
seed: 7
output_dir: ./out/tickets
sample_pakcing_bin_size: 10
"""

LLAMA_FACTORY = """
model_name_or_path: meta-llama/Llama-3.1-8B-Instruct
stage: sft
finetuning_type: lora
quantization_bit: 4
lora_rank: 16
lora_target: q_proj,v_proj
dataset: refunds,greetings
dataset_dir: sets
template: llama3
cutoff_len: 1024
mask_history: true
packing: true
max_samples: 500
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: constant_with_warmup
warmup_ratio: 0.05
bf16: true
optim: adafactor
val_size: 0.1
eval_strategy: steps
eval_steps: 100
output_dir: saves/refunds
report_to: none
"""

DATASET_INFO = {
    "refunds": {
        "file_name": "refunds.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    },
    "greetings": {
        "file_name": "greet.json",
        "columns": {"prompt": "question", "response": "reply"},
    },
}

TRL = """
model_name_or_path: HuggingFaceTB/SmolLM2-360M
dataset_name: rows.jsonl
eval_strategy: "no"
use_peft: true
lora_target_modules: q_proj v_proj
load_in_4bit: true
learning_rate: 1e-4
max_length: 512
packing: true
num_train_epochs: 1
per_device_train_batch_size: 4
warmup_steps: 0.1
max_grad_norm: 0
push_to_hub: true
hub_token: hf_thisIsASecret
output_dir: out
""".replace("q_proj v_proj", "[q_proj, v_proj]")

ADAPTER = {
    "base_model_name_or_path": "Qwen/Qwen2.5-0.5B",
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
    "layers_to_transform": [0, 1],
    "rank_pattern": {"q_proj": 4},
    "use_dora": True,
    "init_lora_weights": True,
}


def imported(folder: Path, text: str, name: str = "theirs.yml", **how: Any) -> Imported:
    (folder / name).write_text(text)
    return import_run(folder / name, **how)


def loaded(folder: Path, found: Imported) -> RunConfig:
    (folder / "loaded.yaml").write_text(found.text)
    return load_run(folder / "loaded.yaml").config


def told(found: Imported, key: str) -> list[Fate]:
    return [entry.fate for entry in found.entries if entry.key == key]


def check(run: RunConfig, expected: dict[str, Any]) -> None:
    found = {key: value_at(run, key) for key in expected}
    assert {
        k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in found.items()
    } == expected


def test_axolotl(tmp_path: Path) -> None:
    found = imported(tmp_path, AXOLOTL)
    assert found.tool == "axolotl"
    assert "base_model" in found.known_by
    run = loaded(tmp_path, found)
    check(
        run,
        {
            "base.model": "Qwen/Qwen2.5-1.5B-Instruct@989aa79",
            "base.quantization": "nf4",
            "base.double_quantization": True,
            "base.dtype": "auto",
            "adapter.r": 32,
            "adapter.lora_alpha": 16,
            "adapter.lora_dropout": 0.05,
            "adapter.target_modules": "all-linear",
            "adapter.use_rslora": True,
            "adapter.modules_to_save": ("embed_tokens", "lm_head"),
            "data.eval_fraction": 0.04,
            "data.max_length": 4096,
            "data.overlong": "drop",
            "data.packing": True,
            "data.template": "chatml",
            "train.method": "qlora",
            "train.batch_size": 2,
            "train.gradient_accumulation_steps": 4,
            "train.epochs": 3,
            "train.learning_rate": 2e-4,
            "train.lr_scheduler_type": "cosine",
            "train.min_lr_ratio": 0.1,
            "train.warmup_steps": 20,
            "train.weight_decay": 0.01,
            "train.max_grad_norm": 0.5,
            "train.gradient_checkpointing": True,
            "train.optim": "paged_adamw_8bit",
            "train.eval_steps": 50,
            "train.save_steps": 100,
            "train.save_total_limit": 3,
            "train.early_stopping_patience": 3,
            "train.report_to": ("wandb",),
            "seed": 7,
            "output_dir": "./out/tickets",
        },
    )
    assert isinstance(run.data.train, tuple)
    sources = [(s.path, s.format, s.columns) for s in run.data.train if not isinstance(s, str)]
    assert sources == [
        ("data/tickets.jsonl", "chat", {"messages": "dialogue"}),
        ("data/faq.json", "alpaca", {}),
        ("data/notes.jsonl", "text", {"text": "body"}),
    ]
    lost = {e.key: e.said for e in found.entries if e.fate == Fate.LOST}
    assert set(lost) == {"datasets[1].type", "neftune_noise_alpha"}
    assert "preamble" in lost["datasets[1].type"]
    (unknown,) = (e for e in found.entries if e.fate == Fate.UNKNOWN)
    assert unknown.key == "sample_pakcing_bin_size"
    assert "did you mean sample_packing_bin_size?" in unknown.said
    assert told(found, "fp16") == [Fate.SAME]
    assert told(found, "trust_remote_code") == [Fate.SAME]
    assert any("16 / sqrt 32 = 2.828" in said for said in found.differences)


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    found = imported(tmp_path, LLAMA_FACTORY)
    assert found.tool == "llama-factory"
    run = loaded(tmp_path, found)
    check(
        run,
        {
            "base.quantization": "nf4",
            "base.double_quantization": True,
            "train.method": "qlora",
            "adapter.r": 16,
            "adapter.lora_alpha": 32,  # twice the rank where the file says nothing
            "adapter.lora_dropout": 0.0,
            "adapter.target_modules": ("q_proj", "v_proj"),
            "data.max_length": 1024,
            "data.train_on": "last",
            "data.packing": True,
            "data.template": "auto",
            "data.eval_fraction": 0.1,
            "train.batch_size": 2,
            "train.gradient_accumulation_steps": 8,
            "train.epochs": 2.0,
            "train.lr_scheduler_type": "constant",
            "train.warmup_ratio": 0.05,
            "train.eval_steps": 100,
            "seed": 42,
        },
    )
    assert isinstance(run.data.train, tuple)
    folder = tmp_path / "sets"
    assert [(s.path, s.format, s.columns) for s in run.data.train if not isinstance(s, str)] == [
        (str(folder / "refunds.jsonl"), "chat", {}),
        (str(folder / "greet.json"), "alpaca", {"instruction": "question", "output": "reply"}),
    ]
    lost = {e.key for e in found.entries if e.fate == Fate.LOST}
    assert lost == {"optim", "max_samples"}
    assert any("neat_packing" in said for said in found.differences)
    (cut,) = (said for said in found.differences if "cutoff_len" in said)
    assert "refused (data.max_cut_share)" in cut
    assert "data.overlong: drop" in cut


def test_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    found = imported(tmp_path, TRL)
    assert found.tool == "trl"
    run = loaded(tmp_path, found)
    check(
        run,
        {
            "train.method": "qlora",
            "base.quantization": "nf4",
            "base.double_quantization": False,
            "adapter.r": 16,
            "adapter.lora_alpha": 32,
            "adapter.lora_dropout": 0.05,
            "adapter.target_modules": ("q_proj", "v_proj"),
            "data.train": "rows.jsonl",
            "data.train_on": "all",  # conversations, and assistant_only_loss is not asked for
            "data.eval_fraction": 0.0,
            "data.max_length": 512,
            "train.lr_scheduler_type": "linear",
            "train.warmup_ratio": 0.1,
            "train.max_grad_norm": None,
        },
    )
    assert "thisIsASecret" not in found.text + repr(found.entries)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert loaded(tmp_path, imported(tmp_path, TRL)).data.train_on == "assistant"
    # Rows that are not at hand: said, not guessed.
    (tmp_path / "rows.jsonl").unlink()
    found = imported(tmp_path, TRL)
    assert loaded(tmp_path, found).data.train_on == "assistant"
    assert any("data.train_on: all" in said for said in found.differences)


def test_trl_without_peft_trains_every_weight(tmp_path: Path) -> None:
    found = imported(tmp_path, TRL.replace("use_peft: true", "lora_r: 8"), tool="trl")
    run = loaded(tmp_path, found)
    assert (run.train.method, run.base.quantization) == ("full", "none")
    assert told(found, "lora_r") == told(found, "load_in_4bit") == [Fate.UNNEEDED]


def test_an_adapter_alone(tmp_path: Path) -> None:
    text = json.dumps(ADAPTER, indent="\t")
    found = imported(tmp_path, text, "adapter_config.json")
    run = loaded(tmp_path, found)
    assert found.tool == "peft"
    assert (run.adapter.r, run.adapter.lora_alpha) == (8, 16)
    assert run.adapter.rank_pattern == {"q_proj": 4}
    import re

    assert isinstance(run.adapter.target_modules, str)
    pattern = re.compile(run.adapter.target_modules)
    assert pattern.fullmatch("model.layers.1.self_attn.q_proj")
    assert not pattern.fullmatch("model.layers.11.self_attn.q_proj")
    assert not pattern.fullmatch("model.layers.1.mlp.up_proj")
    assert told(found, "use_dora") == [Fate.LOST]


FILES = {
    "axolotl": AXOLOTL,
    "llama-factory": LLAMA_FACTORY,
    "trl": TRL,
    "peft": json.dumps(ADAPTER),
}


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of a tree that has no keys below it."""
    if isinstance(tree, dict) and tree:
        return [p for key, value in tree.items() for p in paths(value, (*path, key))]
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return [p for i, value in enumerate(tree) for p in paths(value, (*path, i))]
    return [path]


def unaccounted(text: str, found: Imported) -> list[str]:
    """Keys of the file that no entry names, and no entry stands for whole."""
    from pennyweight.config.document import spell

    named = {entry.key for entry in found.entries}
    return [
        spell(path)
        for path in paths(read_document(text).tree)
        if not any(spell(path[:n]) in named for n in range(1, len(path) + 1))
    ]


@pytest.mark.parametrize("tool", FILES)
def test_every_key_is_accounted_for(tool: str, tmp_path: Path) -> None:
    found = imported(tmp_path, FILES[tool], "theirs.json")
    assert unaccounted(FILES[tool], found) == []
    assert all(entry.said for entry in found.entries if entry.fate in (Fate.LOST, Fate.UNNEEDED))
    for entry in found.entries:
        if entry.fate is Fate.LOST and entry.line:
            assert f"#   {entry.key}: " in found.text
    # What came from where stands beside each setting.
    carried = [e for e in found.entries if e.fate is Fate.CARRIED and e.becomes]
    assert carried
    for setting in {e.to for e in carried}:
        lines = [e.line for e in carried if e.to == setting]
        assert any(f"# theirs.json:{line} " in found.text for line in lines)


@pytest.mark.parametrize("tool", FILES)
def test_what_was_imported_says_where_each_value_came_from(tool: str, tmp_path: Path) -> None:
    found = imported(tmp_path, FILES[tool])
    (tmp_path / "run.yaml").write_text(found.text)
    origin = load_run(tmp_path / "run.yaml").origin
    for entry in found.entries:
        if entry.fate is Fate.ASSUMED:
            assert origin[entry.to].startswith("run.yaml:"), "an assumed value is written out"


def test_all_faults_come_at_once_with_their_lines(tmp_path: Path) -> None:
    text = "base_model: a/b\nadapter: ia3\nrl: dpo\nlora_r: many\nlearning_rate: -1\nmicro_batch_size: 1\n"
    with pytest.raises(ConfigError) as refused:
        imported(tmp_path, text, tool="axolotl")
    said = str(refused.value)
    assert "theirs.yml:2: adapter: ia3 is not here" in said
    assert "theirs.yml:3: rl: trains on preferences" in said
    assert "theirs.yml:4: lora_r: found 'many', expected a number" in said
    assert "theirs.yml:5 learning_rate: " in said
    assert "theirs.yml: datasets: missing" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: {model: x}\ntrain: {epochs: 1}", "a Pennyweight run already"),
        ("flavour: vanilla", "cannot tell whose file it is .* --from axolotl"),
        ("- a\n- b", "no table of settings"),
        ("a: 1\na: 2", "theirs.yml:2: a is given twice"),
        ("base_model: [", "not YAML"),
    ],
)
def test_what_is_no_such_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        imported(tmp_path, text)


def test_settings_that_break_a_rule_are_named_by_their_source(tmp_path: Path) -> None:
    text = AXOLOTL.replace("val_set_size: 0.04", "val_set_size: 0")
    with pytest.raises(ConfigError) as refused:
        imported(tmp_path, text)
    assert "early_stopping_patience" in str(refused.value)
    assert "stopping early needs held-out rows" in str(refused.value)


def test_a_template_written_in_the_file_is_written_beside_the_run(tmp_path: Path) -> None:
    text = AXOLOTL.replace(
        "chat_template: chatml",
        "chat_template: jinja\nchat_template_jinja: '{% for m in messages %}{{ m.content }}{% endfor %}'",
    )
    with pytest.raises(ConfigError, match="--out"):
        imported(tmp_path, text)
    out = tmp_path / "here" / "run.yaml"
    found = imported(tmp_path, text, beside=out.parent)
    write_run(found, out)
    named = load_run(out).config.data.template
    assert Path(named).read_text().startswith("{% for m in messages")
    with pytest.raises(ConfigError, match="exists"):
        write_run(found, out)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lr_scheduler: constant\nwarmup_steps: 9", {"train.warmup_steps": 0}),
        ("lr_scheduler: rex", {"train.lr_scheduler_type": "linear"}),
        ("lr_scheduler: constant_with_warmup\nwarmup_steps: 9", {"train.warmup_steps": 9}),
        ("max_steps: 200\neval_steps: 0.25\nval_set_size: 0.1", {"train.eval_steps": 50}),
        ("batch_size: 12\nmicro_batch_size: 3", {"train.gradient_accumulation_steps": 4}),
        ("adapter: lora\nload_in_8bit: true", {"base.quantization": "int8"}),
        ("adapter: lora", {"train.method": "lora", "base.quantization": "none"}),
        (
            "adapter: qlora\nload_in_4bit: true\nbnb_config_kwargs: "
            "{bnb_4bit_use_double_quant: false, bnb_4bit_quant_type: fp4}",
            {"base.quantization": "fp4", "base.double_quantization": False},
        ),
        ("train_on_inputs: true", {"data.train_on": "all"}),
        ("excess_length_strategy: truncate", {"data.overlong": "cut"}),
        ("excess_length_strategy: raise", {"data.max_dropped_share": 0.0}),
        ("val_set_size: 200", {"data.eval_fraction": 0.05}),
        ("chat_template: tokenizer_default", {"data.template": "auto"}),
        ("chat_template: alpaca", {"data.template": "auto"}),
        (
            "adapter: lora\nlora_target_modules: '.*(q|v)_proj'",
            {"adapter.target_modules": ".*(q|v)_proj"},
        ),
        ("gradient_checkpointing: offload", {"train.gradient_checkpointing": "offloaded"}),
    ],
)
def test_single_settings_of_axolotl(line: str, expected: dict[str, Any], tmp_path: Path) -> None:
    text = f"base_model: a/b\ndatasets: [{{path: x.jsonl, type: completion}}]\n{line}\n"
    if "learning_rate" not in text:
        text += "learning_rate: 1e-4\n"
    found = imported(tmp_path, text, tool="axolotl")
    check(loaded(tmp_path, found), expected)
    assert unaccounted(text, found) == []


def test_types_of_rows(tmp_path: Path) -> None:
    text = """
base_model: a/b
learning_rate: 1e-4
datasets:
  - {path: s.jsonl, type: sharegpt, conversation: vicuna}
  - path: c.jsonl
    type:
      field_instruction: ask
      field_output: say
      format: "[INST] {instruction} [/INST]"
      system_prompt: ""
  - {path: org/set, type: input_output, split: "train[:5%]", name: small}
test_datasets:
  - {path: t.jsonl, type: chat_template, field_messages: conversations, split: test,
     message_field_role: from, message_field_content: value}
"""
    found = imported(tmp_path, text, tool="axolotl")
    run = loaded(tmp_path, found)
    assert isinstance(run.data.train, tuple)
    sources = [(s.path, s.format, s.columns) for s in run.data.train if not isinstance(s, str)]
    assert sources[:2] == [
        ("s.jsonl", "sharegpt", {}),
        ("c.jsonl", "prompt_completion", {"prompt": "ask", "completion": "say"}),
    ]
    assert run.data.train[2] == "org/set"
    assert not isinstance(run.data.eval, str | None | tuple)
    assert (run.data.eval.path, run.data.eval.format) == ("t.jsonl", "sharegpt")
    lost = {e.key for e in found.entries if e.fate is Fate.LOST}
    assert {
        "datasets[0].conversation",
        "datasets[1].type.format",
        "datasets[2].type",
        "datasets[2].split",
        "datasets[2].name",
    } == lost
    assert unaccounted(text, found) == []


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(allow_nan=False, allow_infinity=False, width=16),
    st.sampled_from(["auto", "linear", "yes", "steps", "a/b", "x.jsonl", "q_proj,v_proj", ""]),
    st.just([]),
    st.just({}),
    st.lists(st.sampled_from(["a", "b"]), max_size=2),
    st.dictionaries(
        st.sampled_from(["path", "type", "k"]), st.sampled_from(["p", "chat"]), max_size=2
    ),
    st.lists(st.fixed_dictionaries({"path": st.just("x.jsonl")}), max_size=2),
)
NEEDED = {
    "axolotl": {"base_model": "a/b", "datasets": [{"path": "x.jsonl"}], "learning_rate": 1e-4},
    "llama-factory": {"model_name_or_path": "a/b", "dataset": "x"},
    "trl": {"model_name_or_path": "a/b", "dataset_name": "x.jsonl"},
    "peft": {"base_model_name_or_path": "a/b", "peft_type": "LORA"},
}


@pytest.mark.parametrize("tool", TOOLS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_stands_in_a_file_is_refused_or_accounted_for(
    tool: str, data: st.DataObject, tmp_path: Path
) -> None:
    keys = st.one_of(st.sampled_from(sorted(TOOLS[tool][1])), st.sampled_from(["lora_rr", "x"]))
    drawn = data.draw(st.dictionaries(keys, VALUES, max_size=12))
    text = json.dumps({**drawn, **NEEDED[tool]}, indent=1)
    try:
        found = imported(tmp_path, text, "theirs.json", tool=tool)
    except ConfigError:
        return
    assert unaccounted(text, found) == []
    assert [e.key for e in found.entries if e.said == UNREAD] == []
    loaded(tmp_path, found)


def test_every_argument_of_trl_is_known() -> None:
    """Against the TRL that is installed: its arguments, and the defaults that are written out."""
    pytest.importorskip("trl", reason="TRL is not installed, so its arguments cannot be listed")
    from trl import ModelConfig, ScriptArguments, SFTConfig
    from trl.scripts.utils import DatasetMixtureConfig

    fields = {
        f.name: f.default
        for kind in (ModelConfig, ScriptArguments, SFTConfig, DatasetMixtureConfig)
        for f in dataclasses.fields(kind)
    }
    assert set(fields) - set(TOOLS["trl"][1]) == set()
    account = Account.of_file(
        "a.yaml",
        "trl",
        {"model_name_or_path": "a/b", "dataset_name": "x", "use_peft": True, "load_in_4bit": True},
        {},
    )
    trl.translate(account, Path())
    assumed = {e.key: e.to for e in account.entries if e.fate is Fate.ASSUMED}
    same = {
        key: (account.run[to], fields[key])
        for key, to in assumed.items()
        if key not in ("lora_target_modules", "eval_strategy", "output_dir")
    }
    assert len(same) >= 10
    assert all(ours == theirs for ours, theirs in same.values()), same


def test_every_argument_of_the_trainer_is_known() -> None:
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

    trainer = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert trainer - set(TOOLS["trl"][1]) == set()
    both = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)}
    known = set(TOOLS["llama-factory"][1])
    assert both - known - {"sortish_sampler", "generation_config"} == set()


def test_every_setting_of_peft_is_known() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    assert set(peft.LoraConfig(r=8).to_dict()) - set(TOOLS["peft"][1]) == set()
