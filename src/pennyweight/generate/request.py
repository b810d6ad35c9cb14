"""What can be asked of generation and what it answers: values only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pennyweight.errors import ConfigError
from pennyweight.lora import attached, is_attached
from pennyweight.model import BaseModel

__all__ = ["MOST_TOP_LOGPROBS", "Completion", "Likely", "Request", "Token", "refuse_unanswerable"]

MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue, and how.

    `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 leave the distribution
    whole. A token drawn depends on `seed`, its number and the logits alone. `stop_ids` end the
    text; None stands for the base's own. `top_logprobs` of the likeliest tokens are told beside
    each new one. Where requests wait, a higher `priority` goes first, and among equals the `user`
    who has had the fewest tokens.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None
    adapter: str | None = None
    top_logprobs: int = 0
    user: str = ""
    priority: int = 0

    @property
    def most_read_tokens(self) -> int:
        """Tokens read at most: the last new one is drawn and never read."""
        return len(self.prompt_ids) + self.max_new_tokens - 1


@dataclass(frozen=True, slots=True)
class Likely:
    """One of the likeliest tokens at a place, and the natural logarithm of its probability."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Completion:
    """What followed a prompt, without the stop token.

    `logprobs`: of each id the natural logarithm of the probability that the model itself gave
    it, before temperature and truncation. `top_logprobs`: at each id's place the likeliest ones.
    """

    ids: tuple[int, ...]
    stop_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[Likely, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One token of request `number`; `stop_reason` is set on the last, and a stop token is one.

    `diverged`: the logits were not finite; the id means nothing, and only this request ends.
    """

    number: int
    id: int
    logprob: float
    stop_reason: Literal["stop", "length", "diverged"] | None
    top: tuple[Likely, ...] = ()


def refuse_unanswerable(
    base: BaseModel, requests: Sequence[Request], *, most_tokens: int | None = None
) -> None:
    """ConfigError with every fault of every request; `most_tokens`: what memory holds of one."""
    faults: list[str] = []
    asked = {request.adapter for request in requests if request.adapter is not None}
    strange = {name for name in asked if not is_attached(base, name)}
    for at, request in enumerate(requests):
        found = list(_faults(base, request))
        if request.adapter in strange:
            named = ", ".join(map(repr, attached(base))) or "none"
            found.append(f"adapter {request.adapter!r} is not attached; attached: {named}")
        if most_tokens is not None and request.most_read_tokens > most_tokens:
            found.append(
                f"{len(request.prompt_ids)} prompt tokens and {request.max_new_tokens} new ones "
                f"need more memory than there is: it holds keys and values of {most_tokens} "
                "tokens; shorten the prompt or lower max_new_tokens"
            )
        faults += [f"request {at}: {fault}" for fault in found]
    if faults:
        raise ConfigError.all(faults)


def _faults(base: BaseModel, request: Request) -> Iterator[str]:
    # The head is looked up once, and not once an id, which took 1.6 ms of a prompt of 64 tokens.
    prompt, vocabulary = len(request.prompt_ids), base.vocab_size
    strange = [i for i in request.prompt_ids if not 0 <= i < vocabulary]
    if not prompt:
        yield "the prompt is empty; begin with at least one token, such as the beginning of text"
    if strange:
        yield f"prompt id {strange[0]} is outside the vocabulary of {vocabulary}; encode the prompt with the base's own tokenizer"
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
    if not 0 <= request.top_logprobs <= MOST_TOP_LOGPROBS:
        yield f"top_logprobs {request.top_logprobs}; use 0 to {MOST_TOP_LOGPROBS}"
