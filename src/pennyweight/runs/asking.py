"""Messages to a `Request`: the one way in which chat, an evaluation and a server ask a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pennyweight.data.chat import Message, Renderer
from pennyweight.data.conversation import Kind
from pennyweight.data.messages import RowRefusedError, parsed_tools
from pennyweight.errors import ConfigError, DataError
from pennyweight.generate import Request
from pennyweight.model import BaseModel

__all__ = ["Asking"]

GREEDY = Request(())


@dataclass(frozen=True, slots=True)
class Asking:
    """How a tuned model is asked: with the renderer of its training, within its positions.

    `model_stop_ids` end an answer beside those that training knows.
    """

    renderer: Renderer
    model_name: str
    model_stop_ids: tuple[int, ...]
    max_positions: int

    @classmethod
    def of(cls, base: BaseModel, renderer: Renderer) -> Asking:
        """To ask this resident base, or an adapter beside it."""
        return cls(renderer, base.name, base.stop_ids, base.max_positions)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids on which generation stops."""
        return tuple(dict.fromkeys([*self.renderer.stop_ids, *self.model_stop_ids]))

    def request(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Any = None,
        kind: Kind = "chat",
        like: Request = GREEDY,
    ) -> Request:
        """A request for the answer to messages as the OpenAI API writes them, read from JSON.

        `kind` prompt is for rows that were trained as prompt and completion. `like` says how to
        continue. DataError names the field of the first fault; ConfigError: too long.
        """
        try:
            schemas = parsed_tools({"tools": tools})
        except RowRefusedError as refused:
            raise DataError(str(refused)) from refused
        assert kind != "text", "a document has no prompt"
        return self.continuing(self.renderer.prompt(messages, tools=schemas, kind=kind), like)

    def continuing(self, prompt_ids: Sequence[int], like: Request = GREEDY) -> Request:
        """A request to continue a rendered prompt, as far as the model's positions go."""
        room = self.max_positions - len(prompt_ids)
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(prompt_ids):,} tokens, {self.model_name} knows "
                f"{self.max_positions:,} positions: start a new one"
            )
        return replace(
            like,
            prompt_ids=tuple(prompt_ids),
            max_new_tokens=min(like.max_new_tokens, room),
            stop_ids=self.stop_ids,
        )
