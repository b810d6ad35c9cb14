"""Texts that go on from prompts until one of their stop strings, many under way at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pennyweight.generate import Decoding, Request, refuse_diverged
from pennyweight.model import BaseModel

__all__ = ["Asked", "answers"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the strings that end its text; the text stands before the first of them."""

    request: Request
    until: tuple[str, ...]


def answers(
    base: BaseModel,
    asked: Sequence[Asked],
    *,
    batch_size: int = 16,
    done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The text of each answer, in their order, without special tokens and without its stop string.

    A row is freed as soon as its text holds a stop string; `done` is told of each that ended.
    """
    decoding = Decoding(base, batch_size=batch_size)
    decoding.add([each.request for each in asked])
    ids: list[list[int]] = [[] for _ in asked]
    while decoding.busy:
        for token in decoding.step():
            refuse_diverged(token, len(ids[token.number]), asked[token.number].request)
            if token.stop_reason != "stop":
                ids[token.number].append(token.id)
            if token.stop_reason is not None:
                done(1)
            elif _ended(base, ids[token.number], asked[token.number].until):
                decoding.drop(token.number)
                done(1)
    return [_before(_text(base, row), each.until) for row, each in zip(ids, asked, strict=True)]


def _ended(base: BaseModel, ids: list[int], until: tuple[str, ...]) -> bool:
    """Whether the text holds a stop string; most steps are decided by its last tokens alone."""
    # A character may take four tokens of one byte each.
    reach = 4 * max((len(stop) for stop in until), default=0) + 4
    tail = _text(base, ids[-reach:])
    if not any(stop in tail for stop in until):
        return False
    text = _text(base, ids)
    return any(stop in text for stop in until)


def _text(base: BaseModel, ids: list[int]) -> str:
    return str(base.tokenizer.decode(ids, skip_special_tokens=True))


def _before(text: str, until: tuple[str, ...]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text
