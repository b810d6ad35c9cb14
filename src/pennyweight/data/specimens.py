"""Rows that stand for all others: one of each shape that conversations of a data set have."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pennyweight.data.conversation import Conversation, Example
from pennyweight.data.examples import Examples

__all__ = ["MOST_SPECIMENS", "SPECIAL_TEXT", "Shapes", "Specimen", "as_trained", "shape_of"]

MOST_SPECIMENS = 16
_FEW = 8
SPECIAL_TEXT = "special token in the text"


@dataclass(frozen=True, slots=True, eq=False)
class Specimen:
    """A row as it was read, and the examples it became, as they are trained."""

    conversation: Conversation
    examples: tuple[Example, ...]

    def values(self) -> dict[str, Any]:
        """Plain values, as JSON has them; `of` makes an equal specimen of them."""
        return {
            "conversation": self.conversation.values(),
            "examples": [
                {
                    "ids": example.ids.tolist(),
                    "trained": np.flatnonzero(example.trained).tolist(),
                    "source": example.source,
                    "length_before_cut": example.length_before_cut,
                }
                for example in self.examples
            ],
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Specimen:
        examples = []
        for each in values["examples"]:
            ids = np.array(each["ids"], dtype=np.int32)
            trained = np.zeros(len(ids), dtype=bool)
            trained[each["trained"]] = True
            examples.append(Example(ids, trained, each["source"], each["length_before_cut"]))
        return cls(Conversation.of(values["conversation"]), tuple(examples))


def as_trained(rows: Sequence[Conversation], *parts: Examples) -> tuple[Specimen, ...]:
    """The rows beside the examples that these parts of the data hold of them."""
    found: dict[str, list[Example]] = {row.source: [] for row in rows}
    for part in parts:
        for number in range(len(part)):
            source = part.source(number)
            of_row = found.get(source.split("#")[0])
            if of_row is not None and source not in {example.source for example in of_row}:
                of_row.append(part[number])
    return tuple(Specimen(row, tuple(found[row.source])) for row in rows)


class Shapes:
    """What each of many rows shows, noted as they go by, so that none is read for it again.

    `special_texts` are those that a tokenizer reads as one token.
    """

    def __init__(self, special_texts: Sequence[str]) -> None:
        self._special = special_texts
        self._starts = {text[0] for text in special_texts if text}
        self._known: dict[frozenset[str], int] = {}
        self._shapes, self._chars = array("q"), array("q")

    def passing(self, rows: Iterable[Conversation]) -> Iterator[Conversation]:
        for row in rows:
            features = _features(row, self._special, self._starts)
            self._shapes.append(self._known.setdefault(features, len(self._known)))
            self._chars.append(sum(len(message.content) for message in row.messages))
            yield row

    def chosen(self, rows: np.ndarray, *, most: int = MOST_SPECIMENS) -> list[int]:
        """Of these rows, by number, the first, the longest, the first of each further shape, and
        some more, at most so many.

        Shapes that show something new come before combinations of what was seen.
        """
        if not len(rows):
            return []
        shapes = np.array(self._shapes, np.int64)[rows]
        longest = int(np.array(self._chars, np.int64)[rows].argmax())
        of_number = list(self._known)
        firsts = {of_number[shapes[at]]: int(at) for at in _first_of_each(shapes)}
        chosen = dict.fromkeys((0, longest))
        seen = {feature for at in chosen for feature in of_number[shapes[at]]}
        for features, at in firsts.items():
            if not features <= seen:
                chosen[at], seen = None, seen | features
        chosen |= dict.fromkeys(firsts.values())
        few = max(0, min(_FEW, len(rows)) - len(chosen))  # alike, and yet not the same
        chosen |= dict.fromkeys(len(rows) * (i + 1) // (few + 1) for i in range(few))
        return [int(rows[at]) for at in list(chosen)[:most]]


def _first_of_each(shapes: np.ndarray) -> np.ndarray:
    places: np.ndarray = np.unique(shapes, return_index=True)[1]
    return np.sort(places)


def shape_of(row: Conversation, special_texts: Sequence[str]) -> tuple[str, ...]:
    """What is particular about a row, in words: `system`, `3 answers`, `tools`, `not ASCII`."""
    starts = {text[0] for text in special_texts if text}
    answers = sum(message.role == "assistant" for message in row.messages)
    several = (f"{answers} answers",) if answers > 1 else ()
    return (
        *several,
        *sorted(_features(row, special_texts, starts) - {row.kind, "several answers"}),
    )


def _features(row: Conversation, special_texts: Sequence[str], starts: set[str]) -> frozenset[str]:
    found: set[str] = {row.kind}
    answers = 0
    for message in row.messages:
        answers += message.role == "assistant"
        if message.role in {"system", "developer"}:
            found.add("system")
        if message.role in {"tool", "function"}:
            found.add("tool result")
        found |= {
            word
            for key, word in (("tool_calls", "tool call"), ("reasoning_content", "reasoning"))
            if key in message.extra
        }
        text = message.content
        if not text.isascii():
            found.add("not ASCII")
        if any(start in text for start in starts) and any(s in text for s in special_texts):
            found.add(SPECIAL_TEXT)
            if message.role == "assistant":
                found.add("in an answer")
    if answers > 1:
        found.add("several answers")
    if row.tools:
        found.add("tools")
    return frozenset(found)
