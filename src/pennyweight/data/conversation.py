"""The values that travel from files to tokens: a message, a conversation, and one rendered example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

__all__ = ["Conversation", "Dropped", "Example", "Kind", "Message"]

Kind = Literal["chat", "prompt", "text"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `train` is what the row itself says (weight 0 or 1), None where it says nothing.

    `extra` holds what chat templates read beside role and content: `tool_calls`, `name`,
    `tool_call_id`, `reasoning_content`.
    """

    role: str
    content: str
    train: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def for_template(self) -> dict[str, Any]:
        """The form chat templates read."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of data before it becomes tokens.

    `kind` says how the row was written: `chat` (roles), `prompt` (one prompt, one completion) or
    `text` (a document: one message of role `text`). `tools` are JSON schemas for the template.
    """

    messages: tuple[Message, ...]
    source: str
    kind: Kind = "chat"
    tools: tuple[Mapping[str, Any], ...] | None = None

    def values(self) -> dict[str, Any]:
        """Plain values, as JSON has them; `of` makes an equal conversation of them."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Conversation:
        tools = values["tools"]
        return cls(
            messages=tuple(Message(**message) for message in values["messages"]),
            source=values["source"],
            kind=values["kind"],
            tools=None if tools is None else tuple(tools),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One document as tokens.

    `ids`: int32 `[length]`. `trained`: bool `[length]`, True where the token is a target, that is,
    predicted from the token before it; never at index 0. `source`: where the row came from, such as
    `my.jsonl:17`. `length_before_cut`: tokens of the whole document before `max_length` cut it.
    """

    ids: np.ndarray
    trained: np.ndarray
    source: str
    length_before_cut: int

    @property
    def was_cut(self) -> bool:
        return self.length_before_cut > len(self.ids)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that gives no example, and why."""

    source: str
    reason: str
