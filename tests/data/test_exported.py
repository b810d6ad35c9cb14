"""A template written for transformers: it renders and tokenizes as chat is rendered here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pennyweight.data.chat import Renderer
from pennyweight.data.conversation import Conversation, Message
from pennyweight.data.messages import parsed_message, wire_message
from pennyweight.data.specimens import MOST_SPECIMENS, Shapes, shape_of
from tests.data.conftest import dressed, gpt2, stories, templates
from tests.laws.test_law_05_token_parity import REFUSED, TALKS, talk

AWKWARD = 'Sei "kurz" ☂😀\n\\n {{ not }} {% jinja %}'


def require_the_same(renderer: Renderer, tokenizer: Any) -> None:
    template = renderer.exported_template()
    for name in TALKS:
        messages = talk(name).messages
        for place in (i for i, m in enumerate(messages) if m.role == "assistant"):
            before = messages[:place]
            asked = tokenizer.apply_chat_template(
                [message.for_template() for message in before],
                chat_template=template,
                add_generation_prompt=True,
                return_dict=False,
            )
            assert asked == renderer.prompt(before)


@pytest.mark.parametrize("system", [None, AWKWARD])
@pytest.mark.parametrize("vocabulary", ["tokenizers/gpt2", "models/stories260k"])
def test_every_real_template(vocabulary: str, system: str | None, shared_data: Path) -> None:
    tokenizer = dressed(templates(shared_data), shared_data / vocabulary / "tokenizer.json")
    exported = 0
    for path in templates(shared_data):
        if f"{path.parent.name}/{path.name}" in REFUSED:
            continue
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        renderer = Renderer(tokenizer, max_length=100_000, system=system)
        exported += renderer.exported_template() is not None
        require_the_same(renderer, tokenizer)
    assert exported > 10


@pytest.mark.parametrize("template", ["auto", "plain", "turns"])
@pytest.mark.parametrize("system", [None, AWKWARD])
def test_tokenizers_without_a_template(
    template: str, system: str | None, shared_data: Path
) -> None:
    for tokenizer in (gpt2(shared_data), stories(shared_data)):
        suffix = "\n" if template == "plain" else ""
        renderer = Renderer(tokenizer, template=template, system=system, prompt_suffix=suffix)
        require_the_same(renderer, tokenizer)


def test_a_tokenizers_own_template_stays_where_it_suffices(tiny_tokenizer: Any) -> None:
    assert Renderer(tiny_tokenizer).exported_template() is None
    assert Renderer(tiny_tokenizer, system="Hi").exported_template() is not None


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, "é"]}}}


@pytest.mark.parametrize(
    "message",
    [
        Message("user", "hi"),
        Message("tool", "12", None, {"name": "f", "tool_call_id": "1"}),
        Message("assistant", "", None, {"tool_calls": [CALL]}),
        Message("assistant", "so", None, {"reasoning_content": "hm", "thinking": "hm"}),
    ],
)
def test_a_message_on_the_wire_is_read_back(message: Message) -> None:
    assert parsed_message(wire_message(message), "messages[0]") == message
    for call in wire_message(message).get("tool_calls", ()):
        assert isinstance(call["function"]["arguments"], str)


def conversation(number: int, *turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in turns), f"rows:{number}")


def test_specimens_show_every_shape_first() -> None:
    ask = ("user", "x")
    rows = [conversation(n, ask, ("assistant", "y")) for n in range(400)]
    rows[77] = conversation(77, ask, ("assistant", "y" * 999))
    rows[333] = conversation(333, ask, ("assistant", "é"), ask, ("assistant", "z"))
    rows[390] = conversation(390, ("user", "<s>"), ("assistant", "z"))
    rows[399] = conversation(399, ("system", "s"), ask, ("assistant", "z"))
    shapes, every = Shapes(("<s>", "</s>")), np.arange(400)
    assert list(shapes.passing(rows)) == rows
    chosen = shapes.chosen(every)
    assert chosen[:5] == [0, 77, 333, 390, 399]
    assert len(set(chosen)) == len(chosen) == 8
    assert shapes.chosen(every, most=2) == [0, 77]
    assert shapes.chosen(np.array([5, 6, 7])) == [5, 6, 7]
    assert shapes.chosen(every[:0]) == []
    assert len(chosen) <= MOST_SPECIMENS
    assert shape_of(rows[333], ()) == ("2 answers", "not ASCII")
    assert shape_of(rows[390], ("<s>",)) == ("special token in the text",)
