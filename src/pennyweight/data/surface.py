"""How messages look as text: a tokenizer's chat template, or one of three written here.

`plain`: texts and nothing else, each answer ended by the stop token. `turns`: labelled turns made
of ordinary text, for chat on a tokenizer that knows no chat. `chatml`: the format of that name.
What a template does with a system message, with content, and after an answer is found by rendering
small conversations once, when the surface is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pennyweight.data.codec import Codec
from pennyweight.data.conversation import Kind, Message
from pennyweight.data.sandbox import ChatTemplate, TemplateRefusedError
from pennyweight.errors import DataError

__all__ = ["Plain", "Surface", "TurnRefusedError", "arguments_as_text", "surfaces"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "{% for message in messages %}{{ message.role | capitalize }}:\n{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
_QUESTION, _ANSWER, _SYSTEM = "question 7341", "answer 2896", "system 5178"
_REASON = "reason 6025"
_NO_SWITCH: Mapping[str, bool] = MappingProxyType({})


class TurnRefusedError(ValueError):
    """One conversation that this surface cannot print; the message says why."""


def surfaces(
    tokenizer: Any,
    codec: Codec,
    *,
    template: str,
    prompt_suffix: str,
    stop_id: int | None,
    thinking: bool,
    now: datetime,
) -> dict[Kind, Surface]:
    """The surface of each kind of row; text is always plain. `now`: what templates take for the clock."""
    stop = codec.eos_id if stop_id is None else stop_id
    plain = Plain(codec, prompt_suffix=prompt_suffix, stop_id=stop)
    if template == "plain":
        return {"chat": plain, "prompt": plain, "text": plain}
    own = getattr(tokenizer, "chat_template", None)
    if template in {"auto", "tokenizer"} and own:
        named = own if isinstance(own, dict) else {"default": own}
        chat: Surface = Templated(
            tokenizer, codec, named, name="tokenizer", stop_id=stop, thinking=thinking, now=now
        )
        return {"chat": chat, "prompt": chat, "text": plain}
    if template == "tokenizer":
        raise DataError("data.template: the tokenizer has no chat template; set auto or chatml")
    source = _source(template, codec)
    chat = Templated(
        tokenizer,
        codec,
        {"default": source},
        name="turns" if template == "auto" else template,
        stop_id=stop,
        thinking=thinking,
        now=now,
    )
    return {"chat": chat, "prompt": plain if template == "auto" else chat, "text": plain}


def _source(template: str, codec: Codec) -> str:
    if template in {"auto", "turns"}:
        return TURNS
    if template == "chatml":
        if len(codec.ids("<|im_end|>")) != 1:
            raise DataError(
                "data.template: chatml needs the token <|im_end|>, which this tokenizer does not "
                "have; set data.template: auto"
            )
        return CHATML
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.template: {template!r} is not auto, plain, turns or chatml, and cannot be read "
            f"as a file: {getattr(error, 'strerror', None) or error}"
        ) from error


class _Ending:
    """What stands after an answer."""

    closers: tuple[str, ...] = ()

    def end_of_answer(self, text: str) -> int | None:
        """Where the first of the tokens that close the text ends; None where none closes it.

        `hello<|end|>\n<|endoftext|>` ends after `<|end|>`: white space and further tokens are what
        a template prints behind an answer, and nobody generates them.
        """
        end, rest = None, text.rstrip()
        while closer := next((c for c in self.closers if rest.endswith(c)), None):
            end = len(rest)
            rest = rest[: -len(closer)].rstrip()
        return end


class Plain(_Ending):
    """BOS, prompt, suffix, completion, stop; nothing else is printed."""

    name = "plain"
    prints_stop = True
    reads_clock = False
    notes: tuple[str, ...] = ()

    def __init__(self, codec: Codec, *, prompt_suffix: str, stop_id: int | None) -> None:
        self.stop_id, self.stop_text = _stop(codec, stop_id)
        self.stop_ids = frozenset({self.stop_id})
        self.closers = (self.stop_text,)
        self.adds_bos = codec.bos_id is not None
        self.suffix = prompt_suffix
        self.identity = f"plain {prompt_suffix!r} {self.stop_id}"

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        generation: bool,
    ) -> str:
        if tools or any("tool_calls" in message.extra for message in messages):
            raise TurnRefusedError("plain rendering has no place for tools; set a data.template")
        parts = []
        following = [*messages[1:], Message("assistant" if generation else "end", "")]
        for message, after in zip(messages, following, strict=True):
            if message.role in {"assistant", "text"}:
                tail = self.stop_text
            elif after.role == "assistant":
                tail = self.suffix
            else:
                tail = "\n\n"
            parts.append(message.content + tail)
        return "".join(parts)

    def is_closed_aside(self, text: str) -> bool:
        return False


class Templated(_Ending):
    """A Jinja chat template, run within bounds.

    `stop_id` and `stop_text` end an answer; `prints_stop`: whether the template prints them.
    """

    def __init__(
        self,
        tokenizer: Any,
        codec: Codec,
        sources: Mapping[str, str],
        *,
        name: str,
        stop_id: int | None,
        thinking: bool,
        now: datetime,
    ) -> None:
        self.name, self._codec, self._thinking = name, codec, thinking
        self.sources = dict(sources)
        self.switches: dict[str, bool] = {}
        self.eos_text: str | None = None
        shown = "the tokenizer's chat template" if name == "tokenizer" else name
        self._templates = {
            key: ChatTemplate(source, name=shown, now=now) for key, source in sources.items()
        }
        if "default" not in self._templates:
            self._templates["default"] = next(iter(self._templates.values()))
        fallback_id, fallback_text = _stop(codec, stop_id)
        self._variables: dict[str, Any] = {
            key: str(token) for key, token in tokenizer.special_tokens_map.items()
        }
        if name in {"turns", "chatml"}:
            self._variables["eos_token"] = self.eos_text = fallback_text
        # A template of the tokenizer's prints BOS itself, or leaves it to the tokenizer.
        self.adds_bos = codec.bos_id is not None if name == "turns" else codec.adds_bos
        self.content_is_parts = self.folds_system = False
        self._probe_content()
        self._probe_thinking()
        self._probe_system()
        printed = self._probe_stop()
        self.prints_stop = bool(printed)
        self.stop_id, self.stop_text = printed[0] if printed else (fallback_id, fallback_text)
        self.stop_ids = frozenset({self.stop_id, fallback_id})
        self.closers = tuple(dict.fromkeys([*(text for _, text in printed), fallback_text]))
        self.reads_clock = any(t.reads_clock for t in self._templates.values())
        self.notes = self._notes(now)
        clock = now.date() if self.reads_clock else ""
        self.identity = json.dumps([sorted(sources.items()), self._variables, str(clock), stop_id])

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        generation: bool,
    ) -> str:
        folded = _fold_system(messages) if self.folds_system else messages
        rows = [self._row(message) for message in folded]
        try:
            return self._run(rows, tools, generation)
        except TurnRefusedError:
            # Some templates print a call's arguments with tojson, some expect them as JSON text.
            as_text = [arguments_as_text(row) for row in rows]
            if as_text == rows:
                raise
            return self._run(as_text, tools, generation)

    def is_closed_aside(self, text: str) -> bool:
        """Whether the text opens something and closes it, each with an added token."""
        ids = self._codec.ids(text)
        marks = [i in self._codec.added_ids for i in ids]
        return sum(marks) >= 2 and marks[-1]

    def _run(
        self,
        rows: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        generation: bool,
        switch: Mapping[str, bool] = _NO_SWITCH,
    ) -> str:
        template = self._templates["default"]
        if tools and "tool_use" in self._templates:
            template = self._templates["tool_use"]
        variables = {
            "messages": rows,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": generation,
            **self._variables,
            **switch,
        }
        try:
            return template.render(variables)
        except TemplateRefusedError:
            raise
        except ValueError as error:
            raise TurnRefusedError(f"the chat template refuses it: {error}") from error

    def _row(self, message: Message) -> dict[str, Any]:
        row = message.for_template()
        if self.content_is_parts:
            row["content"] = [{"type": "text", "text": message.content}]
        return row

    def _probe_content(self) -> None:
        probe = (Message("user", _QUESTION), Message("assistant", _ANSWER))
        for as_parts in (False, True):
            self.content_is_parts = as_parts
            try:
                text = self.text(probe, None, generation=False)
            except TurnRefusedError:
                continue
            if _QUESTION in text and _ANSWER in text:
                return
        self.content_is_parts = False
        try:
            self.text(probe, None, generation=False)
        except TurnRefusedError as refused:
            raise DataError(
                f"data.template: {self.name} cannot print a question and its answer: {refused}"
            ) from refused
        raise DataError(
            f"data.template: {self.name} leaves out what was said: a question and its answer do "
            "not both appear in the text; set another data.template"
        )

    def _probe_thinking(self) -> None:
        """Reasoning models ask in one of two ways; take the one that this data's answers follow."""
        extra = {"reasoning_content": _REASON, "thinking": _REASON} if self._thinking else {}
        question, answer = Message("user", _QUESTION), Message("assistant", _ANSWER, None, extra)
        for switch in ({}, {"enable_thinking": self._thinking}):
            try:
                prompt = self._run([self._row(question)], None, True, switch)
                own = self._run([self._row(question), self._row(answer)], None, False, switch)
            except TurnRefusedError:
                continue
            if own.startswith(prompt):
                self.switches = dict(switch)
                self._variables |= switch
                return

    def _probe_system(self) -> None:
        """Fold system messages where the template refuses, forgets or moves them."""
        probe = (Message("system", _SYSTEM), Message("user", _QUESTION))
        answered = (*probe, Message("assistant", _ANSWER))
        for fold in (False, True):
            self.folds_system = fold
            try:
                asked = self.text(probe, None, generation=True)
                if _SYSTEM in asked and _SYSTEM in self.text(answered, None, generation=False):
                    return
            except TurnRefusedError:
                continue
        self.folds_system = False

    def _probe_stop(self) -> list[tuple[int, str]]:
        """The added tokens printed after an answer, as (id, text), first the one that ends it."""
        text = self.text(
            (Message("user", _QUESTION), Message("assistant", _ANSWER)), None, generation=False
        )
        tail = self._codec.ids(text[text.rindex(_ANSWER) + len(_ANSWER) :])
        added = [(i, self._codec.text_of(i)) for i in tail if i in self._codec.added_ids]
        return [(i, text) for i, text in added if text is not None]

    def _notes(self, now: datetime) -> tuple[str, ...]:
        notes = []
        if self.folds_system:
            notes.append("system messages are put before the first user message")
        if not self.prints_stop:
            notes.append(f"the template prints no stop token; {self.stop_text} is put after it")
        if self.reads_clock:
            notes.append(f"the template prints the date; it is told {now.date()}")
        if "enable_thinking" in self._variables:
            notes.append(f"enable_thinking is {self._variables['enable_thinking']}")
        return tuple(notes)


Surface = Plain | Templated


def _stop(codec: Codec, stop_id: int | None) -> tuple[int, str]:
    if stop_id is None:
        raise DataError("the tokenizer has no EOS token, so no answer could end; name a stop token")
    text = codec.text_of(stop_id)
    if text is None:
        raise DataError(f"the stop token {stop_id} is not one of the tokenizer's added tokens")
    return stop_id, text


def _fold_system(messages: Sequence[Message]) -> Sequence[Message]:
    if len(messages) < 2 or messages[0].role != "system":
        return messages
    first = messages[1]
    folded = Message(
        first.role, f"{messages[0].content}\n\n{first.content}", first.train, first.extra
    )
    return (folded, *messages[2:])


def arguments_as_text(row: Mapping[str, Any]) -> dict[str, Any]:
    calls = []
    for call in row.get("tool_calls", ()):
        function = call.get("function", {})
        if isinstance(function.get("arguments"), Mapping):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": text}}
        calls.append(call)
    return {**row, "tool_calls": calls} if calls else dict(row)
