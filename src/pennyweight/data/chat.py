"""Messages to token ids and the trained mask, born together; one rendering for training and serving.

Every trained answer is rendered after the very prompt the server would send for it: the chat
template is applied to the growing conversation, and the answer is what it adds. Law 5: the ids
before an answer are `prompt(messages before it)`, and the answer ends with a trained stop token.
Where a template rewrites earlier turns (reasoning models strip their thoughts from history), or a
prompt's last characters merge with the answer's first, one conversation becomes one example for
each trained turn, so that the law still holds.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from datetime import datetime
from itertools import islice
from typing import Any, Literal

import numpy as np

from pennyweight.data.codec import Codec, Tokens
from pennyweight.data.conversation import Conversation, Dropped, Example, Kind, Message
from pennyweight.data.exported import exported
from pennyweight.data.messages import chat_messages
from pennyweight.data.surface import Surface, TurnRefusedError, surfaces
from pennyweight.data.turns import Piece, pieces
from pennyweight.errors import DataError

__all__ = ["Conversation", "Dropped", "Example", "Message", "Renderer"]

_ROWS_AT_ONCE = 512  # their encodings take about 120 bytes a token until their ids are read
_GROUPS_AHEAD = 2  # being tokenized, so that the next one waits for nobody
_Cut = tuple[str, list[Piece] | Dropped]


class Renderer:
    """Renders conversations for one tokenizer, template and policy.

    `template`: `auto`, `plain`, `turns`, `chatml` or a Jinja file. `stop_id`: the token that ends a
    document where the template names none; default the tokenizer's EOS. `thinking`: answers carry
    their reasoning, so reasoning templates ask for it. `day`: the date that templates print, as
    `2026-01-31`; default today. `settings` make an equal renderer again.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str = "auto",
        train_on: Literal["assistant", "last", "all"] = "assistant",
        max_length: int = 1024,
        overlong: Literal["cut", "drop"] = "cut",
        prompt_suffix: str = "",
        system: str | None = None,
        stop_id: int | None = None,
        thinking: bool = False,
        day: str | None = None,
    ) -> None:
        self.train_on, self.max_length, self.overlong = train_on, max_length, overlong
        self._system = system
        now = datetime.now() if day is None else datetime.fromisoformat(day)
        self.settings: dict[str, Any] = {
            "template": template,
            "train_on": train_on,
            "max_length": max_length,
            "overlong": overlong,
            "prompt_suffix": prompt_suffix,
            "system": system,
            "stop_id": stop_id,
            "thinking": thinking,
            "day": now.date().isoformat(),
        }
        self._codec = Codec(tokenizer)
        self._surfaces = surfaces(
            tokenizer,
            self._codec,
            template=template,
            prompt_suffix=prompt_suffix,
            stop_id=stop_id,
            thinking=thinking,
            now=now,
        )

    @property
    def template(self) -> str:
        """What chat is rendered with: `tokenizer`, `plain`, `turns`, `chatml` or the file's name."""
        return self._surfaces["chat"].name

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids on which generation must stop."""
        return tuple(sorted({i for s in self._surfaces.values() for i in s.stop_ids}))

    @property
    def unknown_id(self) -> int | None:
        """What stands for text without a token; None where that id has another meaning too."""
        return None if self._codec.unknown_id in self.stop_ids else self._codec.unknown_id

    def uncut(self) -> Renderer:
        """The same for rows of any length, to look at what a cut would take."""
        whole = copy(self)
        whole.max_length = sys.maxsize
        return whole

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts that the tokenizer reads as one special token, wherever they stand."""
        return self._codec.special_texts

    @property
    def reads_clock(self) -> bool:
        """Whether ids depend on the day they are made."""
        return any(surface.reads_clock for surface in self._surfaces.values())

    @property
    def bos_id(self) -> int | None:
        return self._codec.bos_id

    def adds_bos(self, kind: Kind) -> bool:
        """Whether BOS is put before rows of this kind where their text does not begin with it."""
        return self._surfaces[kind].adds_bos

    def as_chat(self, kind: Kind) -> bool:
        """Whether rows of this kind are rendered as a chat is."""
        return self._surfaces[kind] is self._surfaces["chat"]

    def exported_template(self) -> str | None:
        """A chat template with which transformers alone gives the ids that chat is rendered to here.

        None where the tokenizer's own does so as it stands.
        """
        return exported(self._surfaces["chat"], self._codec, system=self._system)

    def describe(self) -> dict[str, Any]:
        """What a report says of the rendering; plain JSON."""
        chat = self._surfaces["chat"]
        return {
            "template": chat.name,
            "prompt_template": self._surfaces["prompt"].name,
            "train_on": self.train_on,
            "max_length": self.max_length,
            "overlong": self.overlong,
            "bos_id": self._codec.bos_id if chat.adds_bos else None,
            "stop_ids": list(self.stop_ids),
            "stop_text": chat.stop_text,
            "notes": list(chat.notes),
        }

    def identity(self) -> str:
        """All of the rendering that shapes ids and is not the tokenizer, as text to hash."""
        parts = [f"{kind}:{s.identity}" for kind, s in sorted(self._surfaces.items())]
        policy = f"{self.train_on} {self.max_length} {self.overlong} {self._system!r}"
        return "\n".join([*parts, policy])

    def prompt(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kind: Literal["chat", "prompt"] = "chat",
    ) -> list[int]:
        """The ids to generate an answer from: what training saw before an answer to these messages."""
        return self.ids(self.prompt_text(messages, tools=tools, kind=kind), kind=kind)

    def prompt_text(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kind: Literal["chat", "prompt"] = "chat",
    ) -> str:
        """The same prompt as text; `ids` of it, and of what is put after it, begin with one BOS."""
        parsed = self._with_system(chat_messages(messages, where="messages"))
        try:
            return self._surfaces[kind].text(parsed, tools, generation=True)
        except TurnRefusedError as refused:
            raise DataError(str(refused)) from refused

    def ids(self, rendered: str, *, kind: Literal["chat", "prompt"] = "chat") -> list[int]:
        """The ids of text that stands as a template printed it."""
        found = self._codec.ids(rendered)
        if not self._lacks_bos(self._surfaces[kind], found):
            return found
        assert self._codec.bos_id is not None
        return [self._codec.bos_id, *found]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of generated ids."""
        return self._codec.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of ids with special tokens in it."""
        return self.decode(ids, skip_special_tokens=False)

    def render(self, conversation: Conversation) -> tuple[Example, ...] | Dropped:
        """One example in most cases; one for each trained turn where the turns cannot share one."""
        return self.render_many([conversation])[0]

    def render_many(
        self, conversations: Sequence[Conversation]
    ) -> list[tuple[Example, ...] | Dropped]:
        """The same for many, tokenized together; far faster."""
        return [outcome for _, outcome in self.render_stream(conversations)]

    def render_stream(
        self, conversations: Iterable[Conversation]
    ) -> Iterator[tuple[str, tuple[Example, ...] | Dropped]]:
        """The source of each conversation and what it is rendered to, in order, without end.

        Texts are tokenized in a thread beside this one (the tokenizer lets go of Python's lock and
        uses all cores), so that templates of the next rows run meanwhile.
        """
        with ThreadPoolExecutor(1) as beside:
            waiting: deque[tuple[list[_Cut], Future[list[Tokens]]]] = deque()
            for several in _in_groups(conversations, _ROWS_AT_ONCE):
                cut = [(row.source, self._pieces(row)) for row in several]
                texts = [p.text for _, row in cut if not isinstance(row, Dropped) for p in row]
                waiting.append((cut, beside.submit(self._codec.encode_batch, texts)))
                if len(waiting) > _GROUPS_AHEAD:
                    yield from self._outcomes(*waiting.popleft())
            while waiting:
                yield from self._outcomes(*waiting.popleft())

    def _outcomes(
        self, cut: Sequence[_Cut], encoded: Future[list[Tokens]]
    ) -> Iterator[tuple[str, tuple[Example, ...] | Dropped]]:
        each = iter(encoded.result())
        for source, row in cut:
            if isinstance(row, Dropped):
                yield source, row
                continue
            examples = [one for piece in row for one in self._examples(piece, next(each))]
            yield source, self._kept(source, examples)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        has_one = any(message.role in {"system", "developer", "text"} for message in messages)
        if self._system is None or has_one:
            return messages
        return (Message("system", self._system), *messages)

    def _lacks_bos(self, surface: Surface, ids: list[int] | np.ndarray) -> bool:
        """Whether BOS comes before: where the tokenizer would add it and the template has not."""
        return surface.adds_bos and (len(ids) == 0 or ids[0] != self._codec.bos_id)

    def _pieces(self, conversation: Conversation) -> list[Piece] | Dropped:
        messages = self._with_system(conversation.messages)
        surface = self._surfaces[conversation.kind]
        try:
            return pieces(surface, messages, conversation.tools, train_on=self.train_on)
        except TurnRefusedError as refused:
            return Dropped(conversation.source, str(refused))

    def _examples(self, piece: Piece, tokens: Tokens) -> list[_Tokens]:
        ids = tokens.ids
        trained = np.zeros(len(ids), dtype=bool)
        if piece.everything:
            trained[:] = True
        for turn in piece.turns:
            after_prompt = tokens.seam(turn.prompt_chars)
            if piece.append_stop is None:
                stop = tokens.ending(turn.end_chars)
                closed = stop is not None and ids[stop] in piece.surface.stop_ids
            else:
                stop, closed = len(ids) - 1, True
            if after_prompt is None or stop is None or not closed:
                return [self._apart(p) for p in piece.apart()]
            trained[after_prompt : stop + 1] = True
        return [self._finished(piece, ids, trained)]

    def _apart(self, piece: Piece) -> _Tokens:
        """Prompt and answer tokenized one after the other, as generation will meet them."""
        (turn,) = piece.turns
        prompt = self._codec.ids(piece.text[: turn.prompt_chars])
        answer = self._codec.continuation(piece.text[turn.prompt_chars : turn.end_chars])
        if answer is None:
            return _Tokens(np.zeros(0, np.int32), np.zeros(0, bool), stopped=False)
        trained = np.arange(len(prompt) + len(answer)) >= len(prompt)
        return self._finished(piece, np.array(prompt + answer, np.int32), trained)

    def _finished(self, piece: Piece, ids: np.ndarray, trained: np.ndarray) -> _Tokens:
        if piece.append_stop is not None:
            ids, trained = _joined(ids, [piece.append_stop]), np.append(trained, True)
        if self._lacks_bos(piece.surface, ids):
            ids, trained = _joined([self._codec.bos_id], ids), np.append(False, trained)
        if len(trained):
            trained[0] = False
        targets = np.flatnonzero(trained)
        stopped = len(targets) > 0 and ids[targets[-1]] in piece.surface.stop_ids
        return _Tokens(ids, trained, stopped)

    def _kept(self, source: str, rows: list[_Tokens]) -> tuple[Example, ...] | Dropped:
        examples = []
        reason = "no assistant turn is trained"
        for number, row in enumerate(rows):
            length = len(row.ids)
            if not length:
                reason = "the answer's first characters merge with every text before them"
            elif not row.stopped:
                reason = "no stop token after the answer"
            elif length > self.max_length and self.overlong == "drop":
                reason = f"{length} tokens, over data.max_length {self.max_length}"
            elif not row.trained[: self.max_length].any():
                reason = (
                    f"no trained token in the first {self.max_length} of {length} (data.max_length)"
                )
            else:
                examples.append(
                    Example(
                        ids=row.ids[: self.max_length],
                        trained=row.trained[: self.max_length],
                        source=source if len(rows) == 1 else f"{source}#{number + 1}",
                        length_before_cut=length,
                    )
                )
        return tuple(examples) if examples else Dropped(source, reason)


class _Tokens:
    """Ids and mask before the cut; `stopped` where the last trained token is a stop token."""

    __slots__ = ("ids", "stopped", "trained")

    def __init__(self, ids: np.ndarray, trained: np.ndarray, stopped: bool) -> None:
        self.ids, self.trained, self.stopped = ids, trained, stopped


def _joined(*parts: Any) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _in_groups(rows: Iterable[Conversation], size: int) -> Iterator[list[Conversation]]:
    each = iter(rows)
    while several := list(islice(each, size)):
        yield several
