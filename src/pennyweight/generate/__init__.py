"""Prefill, decode, sample: token ids in, token ids out; rows may read different adapters.

`Decoding` holds the requests under way and moves all of them on by one token a step; `generate`
and `stream` drive it. Text and HTTP are other rooms' business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pennyweight.errors import DivergedError
from pennyweight.generate.decoding import CHUNK_TOKENS, Decoding, kv_bytes_per_token
from pennyweight.generate.draw import draw, uniform
from pennyweight.generate.request import Completion, Likely, Request, Token, refuse_unanswerable
from pennyweight.model import BaseModel

__all__ = [
    "CHUNK_TOKENS",
    "Completion",
    "Decoding",
    "Likely",
    "Request",
    "Token",
    "draw",
    "generate",
    "kv_bytes_per_token",
    "refuse_diverged",
    "refuse_unanswerable",
    "stream",
    "uniform",
]

# Where nobody watches, longer pieces of prompts are read at once.
UNWATCHED_CHUNK_TOKENS = 4096


def generate(
    base: BaseModel, requests: Sequence[Request], *, batch_size: int = 16
) -> list[Completion]:
    """Answer all requests, in their order, with at most `batch_size` rows under way.

    ConfigError names every request that cannot be answered, before anything is computed.
    """
    decoding = Decoding(base, batch_size=batch_size, chunk_tokens=UNWATCHED_CHUNK_TOKENS)
    decoding.add(requests)
    tokens: list[list[Token]] = [[] for _ in requests]
    reasons: list[Literal["stop", "length"]] = ["length" for _ in requests]
    while decoding.busy:
        for token in decoding.step():
            refuse_diverged(token, len(tokens[token.number]), requests[token.number])
            if token.stop_reason != "stop":
                tokens[token.number].append(token)
            else:
                reasons[token.number] = "stop"
    return [
        Completion(
            tuple(token.id for token in row),
            reason,
            tuple(token.logprob for token in row),
            tuple(token.top for token in row) if request.top_logprobs else (),
        )
        for row, reason, request in zip(tokens, reasons, requests, strict=True)
    ]


def stream(base: BaseModel, request: Request) -> Iterator[int]:
    """The ids of one answer, each as soon as it is drawn; the stop token is not yielded."""
    decoding = Decoding(base, batch_size=1)
    decoding.add([request])
    drawn = 0
    while decoding.busy:
        for token in decoding.step():
            refuse_diverged(token, drawn, request)
            drawn += 1
            if token.stop_reason != "stop":
                yield token.id


def refuse_diverged(token: Token, number: int, request: Request) -> None:
    """DivergedError for a token, the `number`-th new one, whose logits were not finite."""
    if token.stop_reason == "diverged":
        raise DivergedError(
            f"request {token.number}, new token {number}, adapter {request.adapter}: the logits "
            "are not finite; use another checkpoint of the adapter, or dtype float32"
        )
