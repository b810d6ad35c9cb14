"""Every setting explains itself."""

import json
from pathlib import Path

import pytest

from pennyweight.config import RunConfig, explain, json_schema, resolve, to_yaml, write_schema
from pennyweight.config.keys import GROUPS, KEYS, accepts, names_in
from pennyweight.config.sources import SOURCES
from pennyweight.errors import ConfigError


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_setting_says_what_it_does_and_takes(key: str) -> None:
    said = explain(key)
    assert KEYS[key].description
    assert "accepts" in said
    assert "default" in said


@pytest.mark.parametrize("group", ["", *GROUPS])
def test_a_group_lists_its_settings(group: str) -> None:
    said = explain(group)
    assert names_in(group)
    assert all(name in said for name in names_in(group))


def test_what_a_setting_needs_is_said() -> None:
    assert "filled by packing" in explain("train.tokens_per_step")
    assert "number above 0 and below 10, or null" in explain("learning_rate")


@pytest.mark.parametrize(
    ("key", "meant"),
    [("train.learnin_rate", "train.learning_rate"), ("lora_r", "adapter.r"), ("path", "groups")],
)
def test_a_mistyped_key_is_answered_with_the_nearest(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=meant):
        explain(key)


def test_the_words_for_what_is_accepted() -> None:
    assert accepts(KEYS["adapter.r"]) == "a whole number of 1 or more and at most 4096"
    assert accepts(KEYS["data.packing"]) == "true or false"
    assert (
        accepts(KEYS["train.gradient_checkpointing"])
        == "true or false, or one of auto, none, minimal, full, offloaded"
    )
    assert accepts(KEYS["data.columns"]) == "a table of names, each with text"


def test_the_schema_names_every_setting_with_its_explanation() -> None:
    schema = json_schema()
    train = schema["$defs"]["TrainConfig"]
    assert schema["additionalProperties"] is False
    assert set(train["properties"]) == {key[6:] for key in KEYS if key.startswith("train.")}
    assert all(each["description"] for each in train["properties"].values())


def test_init_writes_the_numbers_as_people_do() -> None:
    text = to_yaml(resolve(RunConfig()))
    assert "learning_rate: 2e-4\n" in text
    assert "  # Rank of the update.\n  r: 16\n" in text
    assert max(len(line) for line in text.splitlines()) <= 96


def test_a_source_of_rows_explains_its_settings_too() -> None:
    for key in ("data.train.weight", "data.train[].weight", "data.eval.weight"):
        assert "relative to its size" in explain(key)
    with pytest.raises(ConfigError):
        explain("data.train.wait")


# Settings that are this project's own arrangement, or name places, counts and services.
OWN = """
base.model base.device base.embedding_device data.train data.eval data.eval_fraction
data.split_seed data.format
data.columns data.template data.prompt_suffix data.system data.max_length data.overlong
data.max_dropped_share data.max_unknown_share data.min_trained_share train.epochs train.max_steps
train.batch_size train.gradient_accumulation_steps train.logging_steps train.eval_steps
train.save_steps train.save_total_limit train.report_to evaluate.max_new_tokens output_dir seed
"""


def test_what_has_a_source_names_it() -> None:
    assert set(SOURCES) <= set(KEYS)
    own = set(OWN.split()) | {
        key for key in KEYS if key.startswith(("compare.", "merge.", "adapters."))
    }
    assert set(KEYS) - own == set(SOURCES)
    assert "source   Hu et al. 2021, LoRA, section 4.1" in explain("adapter.lora_alpha")


def test_a_schema_is_written_and_nothing_else_written_over(tmp_path: Path) -> None:
    file = tmp_path / "run.schema.json"
    write_schema(file)
    write_schema(file)
    assert json.loads(file.read_text()) == json_schema()
    file.write_text("mine")
    with pytest.raises(ConfigError, match="no schema of a run"):
        write_schema(file)
