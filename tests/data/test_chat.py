from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pennyweight.data.chat import Conversation, Dropped, Example, Message, Renderer
from pennyweight.errors import DataError
from tests.data.conftest import dressed


def row(*turns: tuple[str, str], kind: Any = "chat", **weights: bool) -> Conversation:
    messages = [
        Message(role, text, weights.get(f"turn{i}")) for i, (role, text) in enumerate(turns)
    ]
    return Conversation(tuple(messages), "a.jsonl:1", kind)


TALK = row(("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "No"))


def only(outcome: tuple[Example, ...] | Dropped) -> Example:
    assert not isinstance(outcome, Dropped), outcome
    (example,) = outcome
    return example


def spoken(renderer: Renderer, example: Example) -> str:
    return renderer.decode(example.ids[example.trained], skip_special_tokens=False)


def test_plain_is_bos_prompt_suffix_completion_stop(stories_tokenizer: Any) -> None:
    """In stories260k BOS (1) also ends a document."""
    renderer = Renderer(stories_tokenizer, template="plain", prompt_suffix="\n", stop_id=1)
    example = only(renderer.render(row(("user", "a cat"), ("assistant", "sat"), kind="prompt")))
    assert example.ids[0] == 1
    assert example.ids[-1] == 1
    assert renderer.decode(example.ids) == "a cat\nsat"
    assert spoken(renderer, example) == "sat<s>"
    assert renderer.stop_ids == (1,)
    text = only(renderer.render(Conversation((Message("text", "a cat sat"),), "a:1", "text")))
    assert text.trained.tolist() == [False] + [True] * (len(text.ids) - 1)


def test_policies(tiny_tokenizer: Any) -> None:
    def trained(policy: Any, conversation: Conversation = TALK) -> str:
        renderer = Renderer(tiny_tokenizer, train_on=policy)
        return spoken(renderer, only(renderer.render(conversation)))

    stop = Renderer(tiny_tokenizer).describe()["stop_text"]
    assert trained("assistant") == f"Hello{stop}No{stop}"
    assert trained("last") == f"No{stop}"
    assert "And?" in trained("all")
    weighted = row(*((m.role, m.content) for m in TALK.messages), turn1=False)
    assert trained("assistant", weighted) == f"No{stop}"


def test_exactly_one_bos(stories_tokenizer: Any, tiny_tokenizer: Any) -> None:
    """Printed by the template, added by the tokenizer, or both: one in the end."""
    for prefix in ("", "{{ bos_token }}"):
        stories_tokenizer.chat_template = prefix + (
            "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        )
        renderer = Renderer(stories_tokenizer)
        example = only(renderer.render(row(("user", "Hi "), ("assistant", "you"))))
        assert (example.ids == 1).sum() == 1
        assert example.ids[0] == 1
    stories_tokenizer.chat_template = None
    example = only(Renderer(tiny_tokenizer).render(TALK))
    assert (example.ids == tiny_tokenizer.bos_token_id).sum() == 1


def test_pad_equal_to_eos_is_trained(gpt2_tokenizer: Any) -> None:
    renderer = Renderer(gpt2_tokenizer)
    assert renderer.template == "turns"
    example = only(renderer.render(TALK))
    assert example.ids[-1] == gpt2_tokenizer.pad_token_id
    assert example.trained[-1]
    assert renderer.decode(example.ids, skip_special_tokens=False).startswith(
        "<|endoftext|>User:\nHi\n\nAssistant:\nHello<|endoftext|>"
    )


def test_cut_and_drop(tiny_tokenizer: Any) -> None:
    long = row(("user", "question"), ("assistant", "word " * 30))
    whole = only(Renderer(tiny_tokenizer).render(long))
    cut = only(Renderer(tiny_tokenizer, max_length=len(whole.ids) - 1).render(long))
    assert (cut.length_before_cut, len(cut.ids)) == (len(whole.ids), len(whole.ids) - 1)
    assert cut.was_cut
    assert np.array_equal(cut.ids, whole.ids[:-1])
    dropped = Renderer(tiny_tokenizer, max_length=20, overlong="drop").render(long)
    assert isinstance(dropped, Dropped)
    assert "over data.max_length 20" in dropped.reason
    nothing = Renderer(tiny_tokenizer, max_length=8).render(
        row(("user", "q" * 99), ("assistant", "a"))
    )
    assert isinstance(nothing, Dropped)
    assert nothing.reason.startswith("no trained token in the first 8 of")


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (row(("user", "Hi")), "no assistant turn"),
        (row(("user", "Hi"), ("assistant", " ")), "the answer is empty"),
        (row(("assistant", "Hi")), "nothing before it"),
        (row(("user", "Hi"), ("assistant", "a"), turn1=False), "weight to 0"),
    ],
)
def test_rows_that_train_nothing_say_why(
    conversation: Conversation, reason: str, tiny_tokenizer: Any
) -> None:
    outcome = Renderer(tiny_tokenizer).render(conversation)
    assert isinstance(outcome, Dropped)
    assert reason in outcome.reason


def test_a_template_that_prints_no_stop(tiny_tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        tiny_tokenizer,
        "chat_template",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    renderer = Renderer(tiny_tokenizer)
    outcome = renderer.render(TALK)
    assert not isinstance(outcome, Dropped)
    assert [example.ids[-1] for example in outcome] == [tiny_tokenizer.eos_token_id] * 2
    assert "prints no stop token" in renderer.describe()["notes"][0]


def test_a_template_that_forgets_what_was_said(tiny_tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{% for m in messages %}hm{% endfor %}")
    with pytest.raises(DataError, match="leaves out what was said"):
        Renderer(tiny_tokenizer)


def test_settings_that_cannot_be(gpt2_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="chatml needs the token"):
        Renderer(gpt2_tokenizer, template="chatml")
    with pytest.raises(DataError, match="cannot be read as a file"):
        Renderer(gpt2_tokenizer, template="no-such.jinja")
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}\n{% endfo %}")
    with pytest.raises(DataError, match=r"own\.jinja:2: not a Jinja template"):
        Renderer(gpt2_tokenizer, template=str(file))


def test_a_hostile_template_stops_the_run(tiny_tokenizer: Any, monkeypatch: Any) -> None:
    loop = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", loop)
    with pytest.raises(DataError, match="ran longer than"):
        Renderer(tiny_tokenizer)


def test_tools_reach_the_template(shared_data: Path) -> None:
    tokenizer = dressed(
        [shared_data / "templates" / "trl" / "qwen2_5.jinja"],
        shared_data / "tokenizers" / "gpt2" / "tokenizer.json",
    )
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"a": 1}}}
    tools = ({"type": "function", "function": {"name": "look_up", "parameters": {}}},)
    messages = (
        Message("user", "Hi"),
        Message("assistant", "", None, {"tool_calls": [call]}),
        Message("tool", "2"),
        Message("assistant", "Two."),
    )
    renderer = Renderer(tokenizer)
    example = only(renderer.render(Conversation(messages, "a:1", "chat", tools)))
    trained = spoken(renderer, example)
    assert '{"name": "look_up", "arguments": {"a": 1}}' in trained
    assert trained.endswith("Two.<|im_end|>")
    assert '"look_up", "parameters"' in renderer.decode(example.ids[~example.trained])
    plain = Renderer(tokenizer, template="plain").render(
        Conversation(messages, "a:1", "chat", tools)
    )
    assert isinstance(plain, Dropped)
    assert "no place for tools" in plain.reason


def test_a_system_message_for_rows_without(tiny_tokenizer: Any) -> None:
    renderer = Renderer(tiny_tokenizer, system="Be brief.")
    assert "Be brief." in renderer.decode(only(renderer.render(TALK)).ids)
    assert "Be brief." in renderer.decode(renderer.prompt([{"role": "user", "content": "Hi"}]))
    own = row(("system", "Be long."), ("user", "Hi"), ("assistant", "a"))
    assert "brief" not in renderer.decode(only(renderer.render(own)).ids)


def test_prompt_refuses_what_is_no_conversation(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match='did you mean "user"'):
        Renderer(tiny_tokenizer).prompt([{"role": "usr", "content": "Hi"}])


def test_many_are_rendered_as_one_by_one(tiny_tokenizer: Any) -> None:
    renderer = Renderer(tiny_tokenizer)
    rows = [TALK, row(("user", "Hi")), row(("user", "x"), ("assistant", "y\n"))]
    together = renderer.render_many(rows)
    for conversation, outcome in zip(rows, together, strict=True):
        alone = renderer.render(conversation)
        if isinstance(outcome, Dropped):
            assert outcome == alone
        else:
            assert [e.ids.tolist() for e in outcome] == [e.ids.tolist() for e in alone]  # type: ignore[union-attr]
