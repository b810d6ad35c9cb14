"""Answers as the API gives them: whole or as server-sent events, and ended where nobody reads them."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pennyweight.serve.questions import Answer, Likely, Part
from pennyweight.serve.refusals import Refused

__all__ = ["Chat", "Shape", "Telling", "Text", "answered"]

Telling = Literal["whole", "streamed", "streamed with usage"]


async def answered(request: Request, answer: Answer, shape: Shape, told: Telling) -> Response:
    """What goes back; a client that leaves ends what is under way for it."""
    if told == "whole":
        return await _whole(request, answer, shape)
    return _Stream(answer, _events(answer, shape, with_usage=told == "streamed with usage"))


async def _whole(request: Request, answer: Answer, shape: Shape) -> Response:
    reading = asyncio.ensure_future(_read(answer, shape))
    # The body is here, so all that comes now is word that the client has left.
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(await reading)
    finally:
        for waiting in (reading, leaving):
            waiting.cancel()
        answer.abandon()


async def _read(answer: Answer, shape: Shape) -> dict[str, Any]:
    texts: dict[int, list[str]] = {at: [] for at in range(len(answer.question.requests))}
    tokens: dict[int, list[Likely]] = {at: [] for at in texts}
    finish: dict[int, str] = {}
    async for part in answer.parts():
        texts[part.index].append(part.text)
        tokens[part.index] += part.tokens
        if part.finish is not None:
            finish[part.index] = part.finish
    await answer.close()
    logprobs = answer.question.how.logprobs
    choices = [
        shape.choice(at, "".join(texts[at]), tokens[at] if logprobs else None, finish[at])
        for at in texts
    ]
    return {**shape.head(False), "choices": choices, "usage": _usage(answer)}


class _Stream(StreamingResponse):
    """Events, after which the answer is let go of, also where none of them was asked for."""

    def __init__(self, answer: Answer, events: AsyncIterator[str]) -> None:
        head = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=head)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.abandon()


async def _events(answer: Answer, shape: Shape, *, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events; a failure on the way is one too, for the status is gone by then."""
    head = shape.head(True) | ({"usage": None} if with_usage else {})
    try:
        for at in range(len(answer.question.requests)):
            if first := shape.first(at):
                yield _event({**head, "choices": [first]})
        async for part in answer.parts():
            yield _event({**head, "choices": [shape.delta(part, answer.question.how.logprobs)]})
        await answer.close()
        if with_usage:
            yield _event({**head, "choices": [], "usage": _usage(answer)})
        yield "data: [DONE]\n\n"
    except Refused as refused:
        yield _event(refused.body())


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    prompt, new = answer.question.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class Shape(ABC):
    """How one kind of completion is written."""

    prefix, whole, streamed = "", "", ""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def head(self, stream: bool) -> dict[str, Any]:
        kind = self.streamed if stream else self.whole
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def first(self, at: int) -> dict[str, Any] | None:
        return None

    @abstractmethod
    def choice(
        self, at: int, text: str, tokens: list[Likely] | None, finish: str
    ) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def delta(self, part: Part, logprobs: bool) -> dict[str, Any]:
        """A piece of one."""


class Chat(Shape):
    prefix, whole, streamed = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, at: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": at, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(
        self, at: int, text: str, tokens: list[Likely] | None, finish: str
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        told = self._logprobs(tokens) if tokens is not None else None
        return {"index": at, "message": message, "logprobs": told, "finish_reason": finish}

    def delta(self, part: Part, logprobs: bool) -> dict[str, Any]:
        return {
            "index": part.index,
            "delta": {"content": part.text} if part.text else {},
            "logprobs": self._logprobs(part.tokens) if logprobs else None,
            "finish_reason": part.finish,
        }

    def _logprobs(self, tokens: Any) -> dict[str, Any]:
        content = [
            {
                **_likely(each.text, each.logprob),
                "top_logprobs": [_likely(text, logprob) for text, logprob in each.top],
            }
            for each in tokens
        ]
        return {"content": content, "refusal": None}


class Text(Shape):
    prefix, whole, streamed = "cmpl", "text_completion", "text_completion"

    def choice(
        self, at: int, text: str, tokens: list[Likely] | None, finish: str
    ) -> dict[str, Any]:
        told = self._logprobs(tokens) if tokens is not None else None
        return {"index": at, "text": text, "logprobs": told, "finish_reason": finish}

    def delta(self, part: Part, logprobs: bool) -> dict[str, Any]:
        told = self._logprobs(part.tokens) if logprobs else None
        return {
            "index": part.index,
            "text": part.text,
            "logprobs": told,
            "finish_reason": part.finish,
        }

    def _logprobs(self, tokens: Any) -> dict[str, Any]:
        return {
            "tokens": [each.text for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [dict(each.top) for each in tokens],
            "text_offset": [],
        }


def _likely(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
