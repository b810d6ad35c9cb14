"""Questions to a model: rendered as its training rendered rows, asked of the engine, told as text.

Renderers are kept by version, never by name.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pennyweight.data.chat import Renderer
from pennyweight.errors import ConfigError, DataError, DivergedError, MemoryExhausted
from pennyweight.generate import Request, Token
from pennyweight.model import BaseModel
from pennyweight.runs.asking import Asking
from pennyweight.serve.answering import Ask
from pennyweight.serve.catalogue import Served
from pennyweight.serve.engine import Engine
from pennyweight.serve.records import Usage
from pennyweight.serve.refusals import Refused, invalid, one_line
from pennyweight.serve.settings import ChatLimits
from pennyweight.serve.speech import Speech
from pennyweight.serve.store import Store
from pennyweight.serve.versions import Versions

__all__ = ["Answer", "How", "Likely", "Part", "Question", "Questions"]

KEPT_RENDERERS = 256
HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class How:
    """How to answer. `choices` are drawn with seeds that follow one another."""

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    choices: int = 1
    stops: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of one model by one key, ready for the engine."""

    owner: str
    model: Served
    renderer: Renderer
    requests: tuple[Request, ...]
    prompt_tokens: int
    how: How


@dataclass(frozen=True, slots=True)
class Likely:
    """A token of an answer and the logarithm of its probability; beside it the likeliest ones."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """What is new of choice `index`; `finish` is set on the last."""

    index: int
    text: str
    tokens: tuple[Likely, ...] = ()
    finish: Literal["stop", "length"] | None = None


class Questions:
    """Renders, asks and bills."""

    def __init__(
        self,
        base: BaseModel,
        versions: Versions,
        engine: Engine,
        store: Store,
        limits: ChatLimits,
        cashier: Executor,
    ) -> None:
        self._versions, self._engine, self._store = versions, engine, store
        self._limits, self._cashier = limits, cashier
        self._tokenizer, self._stop_ids = base.tokenizer, base.stop_ids
        self._asking = (base.name, base.stop_ids, base.max_positions)
        self._renderers: OrderedDict[tuple[str | None, str], tuple[Renderer, bool]] = OrderedDict()

    def chat(
        self, owner: str, model: Served, messages: Sequence[Mapping[str, Any]], tools: Any, how: How
    ) -> Question:
        """A question by messages. Refused (400) names the field that cannot be read."""
        renderer, _ = self._renderer(model.version)
        self._refuse_control(renderer, {"messages": list(messages), "tools": tools})
        try:
            asking = Asking(renderer, *self._asking)
            request = asking.request(messages, tools=tools, like=self._like(how))
        except DataError as fault:
            raise invalid(one_line(str(fault)), param="messages") from None
        except ConfigError as fault:
            raise _too_long(fault, "messages") from None
        return self._question(owner, model, renderer, [request], how)

    def completion(
        self, owner: str, model: Served, prompts: Sequence[str | Sequence[int]], how: How
    ) -> Question:
        """A question by prompts: text as it stands, or ids. An adapter that was trained on prompts
        and completions is asked as it was trained.
        """
        renderer, completions = self._renderer(model.version)
        asking = Asking(renderer, *self._asking)
        requests = []
        for prompt in prompts:
            try:
                if not isinstance(prompt, str):
                    request = asking.continuing(list(prompt), self._like(how))
                elif completions:
                    turn = [{"role": "user", "content": prompt}]
                    request = asking.request(turn, kind="prompt", like=self._like(how))
                else:
                    request = asking.continuing(renderer.ids(prompt), self._like(how))
            except DataError as fault:
                raise invalid(one_line(str(fault)), param="prompt") from None
            except ConfigError as fault:
                raise _too_long(fault, "prompt") from None
            requests.append(request)
        return self._question(owner, model, renderer, requests, how)

    def ask(self, question: Question) -> Answer:
        """Begin to answer. Refused (429) where too many wait."""
        return Answer(question, self._engine, lambda used: self._cashier.submit(self._bill, used))

    def _question(
        self,
        owner: str,
        model: Served,
        renderer: Renderer,
        prompts: Sequence[Request],
        how: How,
    ) -> Question:
        seed = secrets.randbelow(2**31) if how.seed is None else how.seed
        for request in prompts:
            if not request.prompt_ids:
                raise invalid("the prompt is empty", param="prompt")
        requests = tuple(
            replace(request, seed=seed + i, user=owner)
            for request in map(self._within_memory, prompts)
            for i in range(how.choices)
        )
        tokens = sum(len(request.prompt_ids) for request in prompts)
        return Question(owner, model, renderer, requests, tokens, how)

    def _within_memory(self, request: Request) -> Request:
        """With no longer an answer than the memory kept for keys and values is sure to hold."""
        room = 1 + self._engine.most_tokens - len(request.prompt_ids)
        if room < 1:
            raise invalid(
                f"the prompt has {len(request.prompt_ids):,} tokens, and the memory kept for answers "
                f"holds {self._engine.most_tokens:,}: shorten it, or let the operator raise "
                "memory.limit or memory.answers",
                param="prompt",
                code="context_length_exceeded",
            )
        return replace(request, max_new_tokens=min(request.max_new_tokens, room))

    def _like(self, how: How) -> Request:
        most = self._limits.max_new_tokens
        return Request(
            prompt_ids=(),
            max_new_tokens=most if how.max_new_tokens is None else min(most, how.max_new_tokens),
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            top_logprobs=how.top_logprobs,
        )

    def _renderer(self, version: str | None) -> tuple[Renderer, bool]:
        """The renderer of a version, and whether it was trained on prompts and completions."""
        day = date.today().isoformat()
        key = (version, day if version is None else "")
        if (known := self._renderers.get(key)) is None:
            if version is None:
                stop = self._stop_ids[0] if self._stop_ids else None
                known = Renderer(self._tokenizer, stop_id=stop, day=day), False
            else:
                rendering = self._versions.rendering(version)
                path: Path = self._versions.path(version)
                known = rendering.renderer(self._tokenizer, path), rendering.completions
            self._renderers[key] = known
            while len(self._renderers) > KEPT_RENDERERS:
                self._renderers.popitem(last=False)
        return known

    def _refuse_control(self, renderer: Renderer, asked: Mapping[str, Any]) -> None:
        if self._limits.control_tokens == "allow":
            return
        for where, text in _texts(asked, ""):
            for special in renderer.special_texts:
                if special in text:
                    raise invalid(
                        f"{where}: {special!r} is a control token of this model and would not be read "
                        "as text: write it another way, or let the operator set "
                        "chat.control_tokens: allow",
                        param=where,
                        code="control_token_in_message",
                    )

    def _bill(self, used: Usage) -> None:
        self._store.bill([used])


class Answer:
    """An answer under way: parts as they come. Whoever has it closes it."""

    def __init__(self, question: Question, engine: Engine, bill: Callable[[Usage], Any]) -> None:
        self.question = question
        self.completion_tokens = 0
        self._engine, self._bill = engine, bill
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[int, Token | Exception]] = asyncio.Queue()
        how = question.how
        self._speeches = [Speech(question.renderer, how.stops) for _ in question.requests]
        self._asks = [
            Ask(request, question.model.version, self._hear(at))
            for at, request in enumerate(question.requests)
        ]
        self._open = dict(enumerate(self._asks))
        engine.ask(self._asks)

    async def parts(self) -> AsyncIterator[Part]:
        """Each choice's text as it becomes known. Refused where the answer failed."""
        while self._open:
            at, heard = await self._heard.get()
            if at not in self._open:
                continue
            if isinstance(heard, Exception):
                raise _failed(heard)
            part = self._part(at, heard)
            if part.finish is not None:
                self._engine.done(self._open.pop(at))
            if part.text or part.tokens or part.finish is not None:
                yield part

    async def close(self) -> None:
        """Let go of what is still under way, and bill what was made; durable when this returns."""
        waiting = self.abandon()
        if waiting is not None:
            await asyncio.wrap_future(waiting)

    def abandon(self) -> Any:
        """The same without waiting, for a client that has left."""
        for ask in self._open.values():
            self._engine.done(ask)
        self._open = {}
        if self._bill is None:
            return None
        bill, self._bill = self._bill, None  # type: ignore[assignment]
        return bill(
            Usage(
                hour=int(time.time()) // HOUR_S * HOUR_S,
                owner=self.question.owner,
                model=self.question.model.id,
                tokens_in=self.question.prompt_tokens,
                tokens_out=self.completion_tokens,
                requests=1,
                device_seconds=sum(ask.seconds for ask in self._asks),
            )
        )

    def _hear(self, at: int) -> Callable[[Token | Exception], object]:
        def heard(item: Token | Exception) -> None:
            with suppress(RuntimeError):  # the loop is gone where a server is torn down
                self._loop.call_soon_threadsafe(self._heard.put_nowait, (at, item))

        return heard

    def _part(self, at: int, token: Token) -> Part:
        self.completion_tokens += 1
        speech = self._speeches[at]
        last = token.stop_reason is not None
        ended = token.stop_reason == "stop"
        text = "" if ended else speech.add([token.id])
        likely: tuple[Likely, ...] = ()
        if self.question.how.logprobs and not ended:
            text_of = self.question.renderer.decode_all
            top = tuple((text_of([each.id]), each.logprob) for each in token.top)
            likely = (Likely(text_of([token.id]), token.logprob, top),)
        if last and not speech.stopped:
            text += speech.end()
        if speech.stopped:
            return Part(at, text, likely, "stop")
        assert token.stop_reason != "diverged", "the lane makes a fault of it"
        return Part(at, text, likely, token.stop_reason)


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every text inside, keys too, with its place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield where or "body", str(key)
            yield from _texts(inside, f"{where}.{key}" if where else str(key))
    elif isinstance(value, Sequence):
        for at, inside in enumerate(value):
            yield from _texts(inside, f"{where}[{at}]")


def _too_long(fault: ConfigError, param: str) -> Refused:
    return invalid(one_line(str(fault)), param=param, code="context_length_exceeded")


def _failed(fault: Exception) -> Refused:
    if isinstance(fault, Refused):
        return fault
    if isinstance(fault, DivergedError):
        return Refused(
            500,
            "this adapter gives numbers that are not finite: ask another of its checkpoints",
            kind="server_error",
            code="not_finite",
        )
    if isinstance(fault, MemoryExhausted):
        return Refused(
            503,
            one_line(str(fault)),
            kind="server_error",
            code="out_of_memory",
            retry_after_s=1,
        )
    if isinstance(fault, ValueError):
        return Refused(400, one_line(str(fault)), code="invalid_value")
    return Refused(500, "the answer failed inside", kind="server_error", code="internal_error")
