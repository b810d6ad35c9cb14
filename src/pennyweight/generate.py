"""Prefill, decode, sample: token ids in, token ids out; rows may read different adapters.

`Decoding` holds the requests under way and moves all of them on by one token a step; `generate`
and `stream` drive it. Text and HTTP are other rooms' business.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pennyweight.attention import KVCache
from pennyweight.errors import ConfigError, DivergedError
from pennyweight.lora import attached
from pennyweight.model import BaseModel

__all__ = ["Completion", "Decoding", "Request", "Token", "draw", "generate", "stream"]

# Prompts prefilled in one flat row; one longer prompt goes alone.
MOST_PREFILL_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue, and how.

    `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 leave the distribution
    whole. A token drawn depends on `seed`, its number and the logits alone. `stop_ids` end the
    text; None stands for the base's own.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What followed a prompt, without the stop token.

    `logprobs`: of each id the natural logarithm of the probability that the model itself gave
    it, before temperature and truncation.
    """

    ids: tuple[int, ...]
    stop_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of request `number`; `stop_reason` is set on the last, and a stop token is one."""

    number: int
    id: int
    logprob: float
    stop_reason: Literal["stop", "length"] | None


@dataclass(slots=True)
class _Row:
    """A request under way: what it has drawn, and what the next pass must read."""

    number: int
    request: Request
    stop_ids: frozenset[int]
    pending: tuple[int, ...]
    drawn: int = field(default=0)


def generate(
    base: BaseModel, requests: Sequence[Request], *, batch_size: int = 16
) -> list[Completion]:
    """Answer all requests, in their order, with at most `batch_size` rows under way.

    ConfigError names every request that cannot be answered, before anything is computed.
    """
    decoding = Decoding(base, batch_size=batch_size)
    decoding.add(requests)
    ids: list[list[int]] = [[] for _ in requests]
    logprobs: list[list[float]] = [[] for _ in requests]
    reasons: list[Literal["stop", "length"]] = ["length" for _ in requests]
    while decoding.busy:
        for token in decoding.step():
            if token.stop_reason != "stop":
                ids[token.number].append(token.id)
                logprobs[token.number].append(token.logprob)
            if token.stop_reason is not None:
                reasons[token.number] = token.stop_reason
    return [
        Completion(tuple(row), reason, tuple(known))
        for row, reason, known in zip(ids, reasons, logprobs, strict=True)
    ]


def stream(base: BaseModel, request: Request) -> Iterator[int]:
    """The ids of one answer, each as soon as it is drawn; the stop token is not yielded."""
    decoding = Decoding(base, batch_size=1)
    decoding.add([request])
    while decoding.busy:
        for token in decoding.step():
            if token.stop_reason != "stop":
                yield token.id


class Decoding:
    """Requests on one base: some under way in the cache, the rest waiting for a free row."""

    def __init__(self, base: BaseModel, *, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: at least one row must be under way")
        self._base = base
        self._batch_size = batch_size
        self._cache = KVCache(batch_size)
        self._rows: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._added = 0

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._waiting)

    def add(self, requests: Sequence[Request]) -> list[int]:
        """Let requests wait for their turn; the numbers their tokens will carry."""
        refuse_unanswerable(self._base, requests)
        numbers = list(range(self._added, self._added + len(requests)))
        self._added += len(requests)
        rows = []
        for number, request in zip(numbers, requests, strict=True):
            stops = self._base.stop_ids if request.stop_ids is None else request.stop_ids
            rows.append(_Row(number, request, frozenset(stops), request.prompt_ids))
        # The longest first, so that rows of like length stand together.
        self._waiting += sorted(rows, key=lambda row: -len(row.pending))
        return numbers

    def drop(self, number: int) -> None:
        """Forget a request, wherever it stands; nothing happens when it is done already."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        for at, row in enumerate(self._rows):
            if row.number == number:
                self._retire(at)
                return

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One token each: for rows newly begun if any could be, else for all under way."""
        assert self.busy, "no request is under way or waiting"
        rows = self._begin() or list(range(len(self._rows)))
        logits = self._read(rows)
        tokens = self._draw(rows, logits)
        ended = [at for at, token in zip(rows, tokens, strict=True) if token.stop_reason]
        for at in sorted(ended, reverse=True):
            self._retire(at)
        return tokens

    def _begin(self) -> list[int]:
        """Move waiting requests into free rows, as many prompts as fit in one pass."""
        begun: list[int] = []
        tokens = 0
        while self._waiting and len(self._rows) < self._batch_size:
            tokens += len(self._waiting[0].pending)
            if begun and tokens > MOST_PREFILL_TOKENS:
                break
            begun.append(len(self._rows))
            self._rows.append(self._waiting.popleft())
        return begun

    def _read(self, rows: list[int]) -> Float[Tensor, "rows vocab"]:
        """Read what is pending in these rows; the logits after each row's last token."""
        # Rows that read one adapter stand together, so that it is applied once.
        rows.sort(key=lambda at: (self._rows[at].request.adapter or "", at))
        pending = [self._rows[at].pending for at in rows]
        counts = [len(ids) for ids in pending]
        starts = self._cache.extend(rows, counts)
        boundaries = [0]
        for count in counts:
            boundaries.append(boundaries[-1] + count)
        ids = [token for part in pending for token in part]
        positions = [p for a, n in zip(starts, counts, strict=True) for p in range(a, a + n)]
        device = self._base.device
        adapters = [self._rows[at].request.adapter for at in rows]
        with self._base.route.over(boundaries, adapters, cache=self._cache):
            hidden = self._base.hidden(
                torch.tensor(ids, device=device), torch.tensor(positions, device=device)
            )
            last = torch.tensor(boundaries[1:], device=device) - 1
            # The head may carry an adapter or a trained copy: its rows are documents of one token.
            with self._base.route.over(range(len(rows) + 1), adapters):
                return self._base.logits(hidden[last])

    def _draw(self, rows: list[int], logits: Float[Tensor, "rows vocab"]) -> list[Token]:
        """The next token of each row, and whether it is the row's last."""
        best = logits.argmax(-1)
        for place, at in enumerate(rows):
            row = self._rows[at]
            if row.request.temperature > 0:
                best[place] = draw(logits[place], row.request, row.drawn)
        known = logits.gather(1, best[:, None]).squeeze(1) - logits.logsumexp(-1)
        tokens = []
        for at, token, logprob in zip(rows, best.tolist(), known.tolist(), strict=True):
            row = self._rows[at]
            if not math.isfinite(logprob):
                raise DivergedError(
                    f"request {row.number}, new token {row.drawn}, adapter {row.request.adapter}: the "
                    f"logits are not finite; use another checkpoint of the adapter, or dtype float32"
                )
            row.drawn += 1
            row.pending = (token,)
            full = row.drawn == row.request.max_new_tokens
            reason: Literal["stop", "length"] | None = "length" if full else None
            reason = "stop" if token in row.stop_ids else reason
            tokens.append(Token(row.number, token, logprob, reason))
        return tokens

    def _retire(self, at: int) -> None:
        """Free a row; the last one moves into its place, here as in the cache."""
        self._cache.drop(at)
        last = self._rows.pop()
        if at < len(self._rows):
            self._rows[at] = last


def draw(logits: Float[Tensor, " vocab"], request: Request, number: int) -> Tensor:
    """Id of the request's `number`-th new token: one uniform number through the inverse of the
    cumulative distribution, after temperature, then top-k, then top-p (nucleus sampling, Holtzman
    et al. 2020, section 3.1: the smallest set of likeliest tokens whose mass reaches `top_p`).
    """
    if logits.device.type == "mps":  # it has no float64
        logits = logits.cpu()
    scaled = logits.double() / request.temperature
    ids = None
    if 0 < request.top_k < scaled.numel():
        scaled, ids = scaled.topk(request.top_k)
    elif request.top_p < 1:
        scaled, ids = scaled.sort(descending=True, stable=True)
    mass = scaled.softmax(-1).cumsum(-1)
    if request.top_p < 1:
        reach = request.top_p * mass[-1]
        mass = mass[: int((mass < reach).sum()) + 1]
    at = torch.searchsorted(mass, uniform(request.seed, number) * mass[-1:], right=True)
    at = at.clamp(max=mass.numel() - 1)[0]
    return at if ids is None else ids[at]


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) that depends on these two alone (53 bits of BLAKE2b)."""
    digest = blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def refuse_unanswerable(base: BaseModel, requests: Sequence[Request]) -> None:
    """ConfigError with every fault of every request."""
    faults: list[str] = []
    names = attached(base)
    for at, request in enumerate(requests):
        faults += [f"request {at}: {fault}" for fault in _faults(base, names, request)]
    if faults:
        raise ConfigError.all(faults)


def _faults(base: BaseModel, names: Sequence[str], request: Request) -> Iterator[str]:
    prompt = len(request.prompt_ids)
    strange = [i for i in request.prompt_ids if not 0 <= i < base.vocab_size]
    if not prompt:
        yield "the prompt is empty; begin with at least one token, such as the beginning of text"
    if strange:
        yield f"prompt id {strange[0]} is outside the vocabulary of {base.vocab_size}; encode the prompt with the base's own tokenizer"
    if request.max_new_tokens < 1:
        yield f"max_new_tokens {request.max_new_tokens}; ask for at least 1"
    elif prompt + request.max_new_tokens > base.max_positions:
        yield (
            f"{prompt} prompt tokens and {request.max_new_tokens} new ones exceed the base's "
            f"{base.max_positions} positions; shorten the prompt or lower max_new_tokens"
        )
    if not 0 <= request.temperature < math.inf:
        yield f"temperature {request.temperature}; use 0 (greedy) or a positive number"
    if not 0 < request.top_p <= 1:
        yield f"top_p {request.top_p}; use more than 0 and at most 1"
    if request.top_k < 0:
        yield f"top_k {request.top_k}; use 0 (all tokens) or a positive number"
    if request.adapter is not None and request.adapter not in names:
        named = ", ".join(map(repr, names)) or "none"
        yield f"adapter {request.adapter!r} is not attached; attached: {named}"
