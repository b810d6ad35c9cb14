"""Rows of every shape, asked in every way: the same ids, or the first token that differs is named."""

# ruff: noqa: F811 - fixtures of another file are arguments here
from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pennyweight.config import DataConfig
from pennyweight.data.chat import Renderer
from pennyweight.data.conversation import Conversation, Message
from pennyweight.data.prepare import Prepared, prepare
from pennyweight.data.specimens import Specimen
from pennyweight.errors import ConfigError, DataError
from pennyweight.finetune import finetune, parity
from pennyweight.generate import Request
from pennyweight.runs import RunFolder, open_chat, parity_of_run
from pennyweight.runs.asking import Asking
from pennyweight.runs.dressing import dress
from pennyweight.runs.parity import Parity, compared, generation_eos, prepared_ways
from pennyweight.runs.parity.run import as_it_would_be_merged, as_opened
from tests.test_finetune import description, rows  # noqa: F401 - fixtures

CALL = {"id": "1", "type": "function", "function": {"name": "sky", "arguments": '{"at": "noon"}'}}
TALKS: list[dict[str, Any]] = [
    {"messages": [("user", "say red"), ("assistant", "red")]},
    {"messages": [("system", "Be brief."), ("user", "say blue"), ("assistant", "blue")]},
    {"messages": [("user", "a"), ("assistant", "b"), ("user", "c\n"), ("assistant", "\nd ")]},
    {"messages": [("user", "sag grün ☂"), ("assistant", "grün 😀")]},
    {"messages": [("user", "say <|im_end|> or <s>"), ("assistant", "no")]},
    {"messages": [("user", "say two"), ("assistant", "one two three " * 4)]},
]


def row(turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.fixture
def prepared(tiny_tokenizer, tmp_path):
    """`prepared(**settings)`: rows of every shape, twelve of each, rendered by the tiny tokenizer."""

    def make(extra: list[dict[str, Any]] | None = None, **settings: Any) -> Prepared:
        path = tmp_path / "talks.jsonl"
        several = [row([*t["messages"][:-1], ("assistant", f"{t['messages'][-1][1]}{n}")])
                   for n in range(12) for t in TALKS]  # fmt: skip
        several += extra or []
        path.write_text("".join(json.dumps(each) + "\n" for each in several))
        config = DataConfig.model_validate(
            {"train": str(path), "max_length": 256, "max_dropped_share": 1, **settings}
        )
        return prepare(config, tiny_tokenizer, seed=0, cache_dir=tmp_path / "cache")

    return make


def everyone(data: Prepared, tokenizer: Any, folder: Path) -> Parity:
    asking = Asking(data.renderer, "tiny", (), 2**31)
    ways = [
        *prepared_ways(asking, data.questions, mend="mend"),
        as_it_would_be_merged(data.renderer, tokenizer, folder),
    ]
    return compared(data.specimens, data.renderer, ways, mend="mend")


def test_every_shape_in_every_way(prepared, tiny_tokenizer, tiny_llama_folder) -> None:
    found = everyone(prepared(), tiny_tokenizer, tiny_llama_folder)
    assert found.ok
    assert list(found.ways) == ["training", "chat", "server", "evaluation", "transformers"]
    assert all(found.ways["server"].values())
    shapes = {shape for shapes in found.rows.values() for shape in shapes}
    assert {"system", "2 answers", "not ASCII", "special token in the text"} <= shapes
    assert "the same ids" in found.sentence()
    assert json.loads(json.dumps(found.to_dict()))["ok"]
    found.refuse()


@pytest.mark.parametrize("template", ["auto", "plain", "turns", "chatml"])
@pytest.mark.parametrize("system", [None, 'Sei "kurz" ☂😀\n\\n {{ not }} {% jinja %}'])
def test_every_template_and_a_default_system_message(
    prepared, tiny_tokenizer, tiny_llama_folder, template, system
) -> None:
    data = prepared(template=template, system=system)
    found = everyone(data, tiny_tokenizer, tiny_llama_folder)
    assert found.ok, "\n".join(map(str, found.faults))
    assert found.ways["transformers"]["same ids"]


def test_tools_go_through_json_and_back(tiny_llama_folder, tmp_path) -> None:
    """What a server is sent is text: calls with their arguments as JSON, tools as schemas."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
        "{% for call in m.tool_calls %}{{ call.function.name }}"
        "{{ call.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tools = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]
    talk = {
        "tools": tools,
        "messages": [
            {"role": "user", "content": "Is it blue?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "blue", "tool_call_id": "1", "name": "sky"},
            {"role": "assistant", "content": "It is."},
        ],
    }
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps({**talk, "number": n}) + "\n" for n in range(3)))
    config = DataConfig(train=str(path), eval_fraction=0.0, max_duplicate_share=1.0)
    data = prepare(config, tokenizer, seed=0, cache_dir=tmp_path)
    found = everyone(data, tokenizer, tiny_llama_folder)
    assert found.ok, "\n".join(map(str, found.faults))
    assert found.answers == 2 * len(found.rows)
    assert found.ways["chat"]["same ids"] is None  # nobody types a call
    assert found.ways["server"]["same ids"] is True
    assert set(next(iter(found.rows.values()))) == {
        "2 answers",
        "tool call",
        "tool result",
        "tools",
    }


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("max_length", [40, 256])
def test_cut_rows_and_other_masks(
    prepared, tiny_tokenizer, tiny_llama_folder, train_on, max_length
) -> None:
    data = prepared(
        train_on=train_on,
        max_length=max_length,
        max_cut_share=1,
        max_leaked_share=1,
        max_duplicate_share=1,
    )
    found = everyone(data, tiny_tokenizer, tiny_llama_folder)
    assert found.ok, "\n".join(map(str, found.faults))
    assert (found.answers == 0) == (train_on == "all")


def test_documents_have_no_prompt(prepared, tiny_tokenizer, tiny_llama_folder, tmp_path) -> None:
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"chapter {n}"}) + "\n" for n in range(9))
    )
    config = DataConfig(train=str(tmp_path / "text.jsonl"), min_trained_share=0.0)
    data = prepare(config, tiny_tokenizer, seed=0, cache_dir=tmp_path / "cache")
    found = everyone(data, tiny_tokenizer, tiny_llama_folder)
    assert found.ok
    assert found.ways["training"]["stop token"]
    assert found.ways["server"]["same ids"] is None


def test_the_first_token_that_differs_is_shown(prepared, tiny_tokenizer) -> None:
    data = prepared()
    other = Renderer(tiny_tokenizer, template="turns", max_length=256)
    found = compared(data.specimens, other, (), mend="put it back")
    (fault,) = found.faults
    assert (fault.way, fault.check) == ("training", "same ids")
    assert fault.rows == len(data.specimens)
    at = fault.position
    assert at is not None
    expected = data.specimens[0].examples[0].ids[at]
    assert fault.trained[[t.startswith("[") for t in fault.trained].index(True)] == (
        f"[{other.decode_all([int(expected)])!r}]"
    )
    assert f"the first difference is token {at}" in str(fault)
    assert "put it back" in str(fault)
    with pytest.raises(ConfigError, match=r"and \d+ more rows"):
        found.refuse()


def masked(specimen: Specimen, keep: Any) -> Specimen:
    (example,) = specimen.examples
    return replace(specimen, examples=(replace(example, trained=example.trained & keep(example)),))


def test_what_is_not_trained_is_the_datas_fault(prepared) -> None:
    data = prepared()
    first = data.specimens[0]
    unstopped = masked(first, lambda e: e.ids != e.ids[e.trained][-1])
    nothing = masked(first, lambda e: np.zeros(len(e.ids), bool))
    for specimen, words in ((unstopped, "is not trained: the trained part"), (nothing, "no token")):
        found = compared([specimen], data.renderer, (), mend="")
        assert any(words in fault.what for fault in found.faults)
        only = replace(found, faults=tuple(f for f in found.faults if f.check == "stop token"))
        assert only.exit_code == 65
        with pytest.raises(DataError, match="never learn to stop"):
            only.refuse()


def test_a_stop_token_inside_an_answer_is_noted(
    prepared, tiny_tokenizer, tiny_llama_folder
) -> None:
    data = prepared([row([("user", "say it"), ("assistant", "it is <|im_end|> here")])])
    found = everyone(data, tiny_tokenizer, tiny_llama_folder)
    assert found.ok
    assert any("an answer holds <|im_end|> before its end" in note for note in found.notes)


def test_a_template_that_asks_otherwise_is_found_in_the_way_that_uses_it(
    prepared, tiny_tokenizer, tiny_llama_folder
) -> None:
    data = prepared()
    way = as_it_would_be_merged(data.renderer, tiny_tokenizer, tiny_llama_folder)
    shifted = replace(way, prompt=lambda row, place: [1, *(way.prompt(row, place) or ())])
    deaf = replace(way, name="deaf", stop_ids=frozenset({2}))
    reads = replace(way, name="reads otherwise", decode=lambda ids: "?")
    found = compared(data.specimens, data.renderer, (shifted, deaf, reads), mend="")
    assert {(f.way, f.check) for f in found.faults} == {
        ("transformers", "same ids"), ("transformers", "one BOS"),
        ("deaf", "stop token"), ("reads otherwise", "same ids"),
    }  # fmt: skip
    assert found.exit_code == 2
    assert found.ways["transformers"]["special text"] is False


def test_an_endless_template_is_stopped(prepared, tiny_llama_folder, tmp_path) -> None:
    data = prepared()
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "stranger"))
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    source = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(loop + source)
    found = compared(
        data.specimens, data.renderer, [as_opened("x", folder, data.renderer)], mend=""
    )
    assert re.search(r"ran longer than|builds more than", found.faults[0].what)
    hidden = "{% if messages[0].content == 'say red' %}" + loop + "{% endif %}"
    (folder / "chat_template.jinja").write_text(hidden + source)
    found = compared(
        data.specimens, data.renderer, [as_opened("x", folder, data.renderer)], mend=""
    )
    assert re.search(r"ran longer than|builds more than", found.faults[0].what)


def test_one_place_asks(description) -> None:
    """Chat and the server's function make the same request, adapter, stops and room included."""
    result = finetune(description())
    session = open_chat(result.output_dir)
    asked = session.asking.request(
        [{"role": "user", "content": "say red"}],
        like=Request((), max_new_tokens=9, adapter="default"),
    )
    assert asked.adapter == "default"
    assert asked.max_new_tokens == 9
    assert set(asked.stop_ids or ()) == {*session.renderer.stop_ids, *session.base.stop_ids}
    assert asked.prompt_ids == tuple(
        session.renderer.prompt([{"role": "user", "content": "say red"}])
    )
    long = session.asking.request([{"role": "user", "content": "red " * 40}])
    assert long.max_new_tokens <= session.base.max_positions - len(long.prompt_ids)
    with pytest.raises(ConfigError, match="knows 256 positions: start a new one"):
        session.asking.request([{"role": "user", "content": "red " * 400}])
    with pytest.raises(DataError, match=r"messages\[0\]\.role"):
        session.asking.request([{"role": "usr", "content": "hi"}])
    with pytest.raises(DataError, match="tools: text that is not JSON"):
        session.asking.request([{"role": "user", "content": "hi"}], tools="sky")


def test_a_run_and_what_is_made_of_it(description, rows, tmp_path, monkeypatch) -> None:
    config = description()
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"template": "turns", "system": "Be kind."})}
    )
    result = finetune(config)
    rows.unlink()
    found = parity_of_run(result.output_dir)
    assert found.ok
    assert list(found.ways)[-2:] == ["adapter folder", "transformers"]
    exported = Path(result.output_dir) / "adapter" / "chat_template.jinja"
    exported.write_text(exported.read_text().replace("Be kind.", "Be rude."))
    found = parity(result.output_dir)
    assert [fault.way for fault in found.faults] == ["adapter folder"]
    with pytest.raises(ConfigError, match="is as it was trained"):
        parity(result.output_dir, ["seed=1"])
    held = RunFolder.read_held_out
    monkeypatch.setattr(RunFolder, "read_held_out", lambda run: replace(held(run), specimens=()))
    with pytest.raises(ConfigError, match="kept no rows to compare"):
        parity_of_run(result.output_dir)


def test_a_whole_tuned_model_speaks_as_it_was_trained(description, tmp_path) -> None:
    config = description(method="full")
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"template": "turns"})}
    )
    result = finetune(config)
    found = parity_of_run(result.output_dir)
    assert found.ok, "\n".join(map(str, found.faults))
    assert list(found.ways)[-1] == "model folder"
    session = open_chat(result.output_dir)
    session.max_new_tokens = 2
    assert isinstance("".join(session.send("say red")), str)
    tokenizer = AutoTokenizer.from_pretrained(Path(result.output_dir) / "model")
    asked = [{"role": "user", "content": "say red"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert ids == session.renderer.prompt(asked)


def test_dressing_writes_only_what_is_missing(tiny_tokenizer, tmp_path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.5}')
    own = Renderer(tiny_tokenizer)
    assert dress(tmp_path, own) == ["generation_config.json"]
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [2, 4], "top_p": 0.5}
    assert generation_eos(tmp_path) == {2, 4}
    assert dress(tmp_path, own) == []
    assert dress(tmp_path, Renderer(tiny_tokenizer, template="plain")) == ["chat_template.jinja"]


@pytest.mark.parametrize("written", ["[]", "{", '{"eos_token_id": null}', "{}"])
def test_a_folder_that_stops_on_nothing(tmp_path, written) -> None:
    assert generation_eos(tmp_path) == frozenset()
    (tmp_path / "generation_config.json").write_text(written)
    assert generation_eos(tmp_path) == frozenset()


def test_a_specimen_is_written_and_read_back(prepared) -> None:
    for specimen in prepared().specimens:
        again = Specimen.of(json.loads(json.dumps(specimen.values())))
        assert again.conversation == specimen.conversation
        for one, two in zip(again.examples, specimen.examples, strict=True):
            assert (one.ids == two.ids).all()
            assert (one.trained == two.trained).all()
            assert (one.source, one.length_before_cut) == (two.source, two.length_before_cut)


def test_the_shared_story_model(shared_data, tmp_path, monkeypatch) -> None:
    """Real rows, a SentencePiece vocabulary that puts BOS first by itself, and no chat template."""
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run.yaml"
    run.write_text(
        f"base: {{model: {shared_data}/models/stories260k}}\n"
        f"data: {{train: {shared_data}/sft/e2e-nlg/devset.csv, prompt_suffix: ' :', max_length: 256,"
        " columns: {prompt: mr, completion: ref}}\n"
    )
    found = parity(run)
    assert found.ok, "\n".join(map(str, found.faults))
    assert all(value is not False for held in found.ways.values() for value in held.values())
    assert found.ways["transformers"]["same ids"]


def test_a_conversation_is_written_and_read_back() -> None:
    talk = Conversation(
        (Message("user", "hi", None, {"name": "x"}), Message("assistant", "ho", True)),
        "a:1", "chat", ({"type": "function", "function": {"name": "f"}},),
    )  # fmt: skip
    assert Conversation.of(json.loads(json.dumps(talk.values()))) == talk
