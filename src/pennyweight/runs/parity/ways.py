"""Who asks a tuned model, each as a function from a row and the place of an answer to prompt ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.data.chat import Renderer
from pennyweight.data.conversation import Conversation
from pennyweight.data.messages import wire_message
from pennyweight.data.prepare import Question
from pennyweight.data.sandbox import TemplateRefusedError
from pennyweight.data.surface import arguments_as_text
from pennyweight.errors import DataError
from pennyweight.runs.asking import Asking

__all__ = [
    "Way",
    "WayRefusedError",
    "generation_eos",
    "prepared_ways",
    "through_transformers",
]

Prompt = Callable[[Conversation, int], Sequence[int] | None]


class WayRefusedError(ValueError):
    """A way that cannot ask what was trained; the message says why."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to ask: prompt ids for the answer at a place (None: not asked this way), the ids on
    which its generation stops, and how it reads an answer's ids. `mend`: what to do where it fails.
    """

    name: str
    prompt: Prompt
    stop_ids: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    mend: str


def prepared_ways(
    asking: Asking, questions: Sequence[Question], *, mend: str
) -> tuple[Way, Way, Way]:
    """Chat, a server and the questions of an evaluation, all as they are in this program."""
    renderer, stops = asking.renderer, frozenset(asking.stop_ids)
    by_source = {question.source: question.prompt_ids for question in questions}

    def chat(row: Conversation, place: int) -> Sequence[int] | None:
        before = row.messages[:place]
        spoken = all(m.role in ("system", "user", "assistant") and not m.extra for m in before)
        if not (renderer.as_chat(row.kind) and spoken and before[-1].role == "user") or row.tools:
            return None  # nobody can type it
        told = [{"role": m.role, "content": m.content} for m in before]
        return asking.request(told).prompt_ids

    def server(row: Conversation, place: int) -> Sequence[int]:
        sent = {"messages": [wire_message(m) for m in row.messages[:place]], "tools": row.tools}
        read: Mapping[str, Any] = json.loads(json.dumps(sent))
        return asking.request(read["messages"], tools=read["tools"], kind=row.kind).prompt_ids

    def evaluation(row: Conversation, place: int) -> Sequence[int] | None:
        last = max(i for i, m in enumerate(row.messages) if m.role == "assistant")
        return by_source.get(row.source) if place == last else None

    def read(ids: Sequence[int]) -> str:
        return renderer.decode(ids)

    return (
        Way("chat", chat, stops, read, mend),
        Way("server", server, stops, read, mend),
        Way("evaluation", evaluation, stops, read, mend),
    )


def through_transformers(
    name: str,
    tokenizer: Any,
    renderer: Renderer,
    *,
    template: str | None = None,
    stop_ids: frozenset[int],
    mend: str,
    bounded: Renderer | None = None,
) -> Way:
    """As `apply_chat_template` of transformers asks; `template` in place of the tokenizer's own.

    `bounded` renders a stranger's template first, within bounds that transformers does not set.
    """
    from jinja2 import TemplateError

    def prompt(row: Conversation, place: int) -> Sequence[int] | None:
        if not renderer.as_chat(row.kind):
            return None  # chat is rendered otherwise than rows of this kind
        if bounded is not None:
            _refuse_endless(bounded, row, place)
        sent = [message.for_template() for message in row.messages[:place]]
        try:
            return _applied(tokenizer, sent, row.tools, template)
        except (TemplateError, ValueError, TypeError, KeyError) as refused:
            first = refused
        try:  # as is done here: some templates want a call's arguments as text
            return _applied(tokenizer, [arguments_as_text(m) for m in sent], row.tools, template)
        except (TemplateError, ValueError, TypeError, KeyError):
            said = next(iter(str(first).splitlines()), type(first).__name__)
            raise WayRefusedError(f"apply_chat_template refuses it: {said}") from first

    def read(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return Way(name, prompt, stop_ids, read, mend)


def _refuse_endless(bounded: Renderer, row: Conversation, place: int) -> None:
    try:
        bounded.prompt(row.messages[:place], tools=row.tools)
    except TemplateRefusedError as refused:
        raise WayRefusedError(str(refused)) from refused
    except DataError:
        pass  # transformers will say what it refuses


def _applied(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template: str | None,
) -> list[int]:
    ids = tokenizer.apply_chat_template(
        messages,
        tools=None if tools is None else [dict(tool) for tool in tools],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return [int(i) for i in ids]


def generation_eos(folder: Path) -> frozenset[int]:
    """Ids on which transformers' `generate` stops: generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            try:
                eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (ValueError, AttributeError):
                return frozenset()
            return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset()
