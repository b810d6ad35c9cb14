"""Law 5: the ids trained up to an answer equal the ids the server sends; the stop token is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.conftest import dressed, gpt2, stories, templates

from pennyweight.data.chat import Conversation, Dropped, Example, Message, Renderer

REFUSED = {
    # They ask with an open <think> and print answers without one; no answer could close it.
    "trl/deepseekv3.jinja",
    "trl/deepseekv3_training.jinja",
}

U, A, S = "user", "assistant", "system"
TALKS = {
    "one turn": [(U, "What is 2+2?"), (A, "It is four.")],
    "answers with line ends around them": [
        (U, "Hi there"),
        (A, "Hello!"),
        (U, "And?\n"),
        (A, "\nNothing  more.\n\nBye "),
    ],
    "system and three turns": [
        (S, "Be brief."),
        (U, "Hi"),
        (A, "Hello!"),
        (U, "你好 ☂"),
        (A, "好"),
        (U, "x"),
        (A, "y"),
    ],
}


def talk(name: str) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in TALKS[name]), f"{name}:1")


def prompts_seen(examples: tuple[Example, ...]) -> list[list[int]]:
    """The ids before each trained span."""
    starts = [
        (example, i)
        for example in examples
        for i in np.flatnonzero(np.diff(example.trained.astype(int)) == 1) + 1
    ]
    return [example.ids[:start].tolist() for example, start in starts]


def span_ends(examples: tuple[Example, ...]) -> list[int]:
    """The last id of each trained span."""
    return [
        int(example.ids[i])
        for example in examples
        for i in np.flatnonzero(np.diff([*example.trained.astype(int), 0]) == -1)
    ]


def require_law(renderer: Renderer, conversation: Conversation) -> None:
    examples = renderer.render(conversation)
    assert not isinstance(examples, Dropped), examples
    kind = "prompt" if conversation.kind == "prompt" else "chat"
    answers = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    served = [renderer.prompt(conversation.messages[:i], kind=kind) for i in answers]
    assert prompts_seen(examples) == served
    ends = span_ends(examples)
    assert len(ends) == len(answers)
    assert set(ends) <= set(renderer.stop_ids)


@pytest.mark.parametrize("name", TALKS)
def test_own_templates(name: str, tiny_tokenizer: Any) -> None:
    for template in ("auto", "plain", "turns", "chatml"):
        if template == "chatml" and len(tiny_tokenizer.encode("<|im_end|>")) > 2:
            continue
        require_law(Renderer(tiny_tokenizer, template=template), talk(name))


@pytest.mark.parametrize("vocabulary", ["tokenizers/gpt2", "models/stories260k"])
def test_real_templates(vocabulary: str, shared_data: Path) -> None:
    """Every real template, with a byte-level and with a SentencePiece vocabulary."""
    seen = set()
    tokenizer = dressed(templates(shared_data), shared_data / vocabulary / "tokenizer.json")
    for path in templates(shared_data):
        name = f"{path.parent.name}/{path.name}"
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        renderer = Renderer(tokenizer, max_length=100_000)
        outcome = renderer.render(talk("one turn"))
        if isinstance(outcome, Dropped):
            assert "asks" in outcome.reason, outcome
            seen.add(name)
            continue
        for each in TALKS if "gpt2" in vocabulary else ["system and three turns"]:
            require_law(renderer, talk(each))
    assert seen == REFUSED


def test_reasoning_models_learn_each_turn_as_it_was_asked(shared_data: Path) -> None:
    """Qwen3 strips thoughts from history, so every turn becomes an example of its own."""
    tokenizer = dressed(
        [shared_data / "templates" / "trl" / "qwen3.jinja"],
        shared_data / "tokenizers" / "gpt2" / "tokenizer.json",
    )
    thought = {"reasoning_content": "hm", "thinking": "hm"}
    messages = (
        Message("user", "Hi"),
        Message("assistant", "Hello!", None, thought),
        Message("user", "And?"),
        Message("assistant", "No.", None, thought),
    )
    renderer = Renderer(tokenizer, thinking=True)
    conversation = Conversation(messages, "a:1")
    examples = renderer.render(conversation)
    assert not isinstance(examples, Dropped)
    assert [example.source for example in examples] == ["a:1#1", "a:1#2"]
    assert "hm" not in renderer.decode(examples[1].ids[: list(examples[1].trained).index(True)])
    require_law(renderer, conversation)


def test_prompt_and_completion_that_merge(shared_data: Path) -> None:
    """`a\\n\\n` + `b` is other tokens than `a\\n\\nb`; the answer is then tokenized as generated."""
    for tokenizer in (gpt2(shared_data), stories(shared_data)):
        renderer = Renderer(tokenizer, template="plain")
        for prompt, answer in [
            ("a\n\n", "b"),
            ("a ", "b"),
            ("a", "b"),
            ("x =", "= y"),
            ("a\n", "\nb"),
        ]:
            row = Conversation(
                (Message("user", prompt), Message("assistant", answer)), "a:1", "prompt"
            )
            require_law(renderer, row)
            (example,) = renderer.render(row)  # type: ignore[misc]
            spoken = example.ids[example.trained].tolist()
            assert renderer.decode(
                [*renderer.prompt(row.messages[:1], kind="prompt"), *spoken]
            ) in {prompt + answer}
