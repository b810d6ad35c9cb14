"""A conversation with a tuned model, or with its base, rendered as its training data was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pennyweight.data.chat import Renderer
from pennyweight.errors import ConfigError
from pennyweight.generate import Request, stream
from pennyweight.model import BaseModel
from pennyweight.runs.asking import Asking
from pennyweight.runs.folder import RunFolder, adapter_slot

__all__ = ["ChatSession", "open_chat"]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class ChatSession:
    """Messages so far, and the model that answers them."""

    def __init__(
        self,
        base: BaseModel,
        renderer: Renderer,
        *,
        adapter: str | None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.base, self.renderer, self.adapter = base, renderer, adapter
        self.asking = Asking.of(base, renderer)
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.messages: list[dict[str, Any]] = []

    def send(self, text: str) -> Iterator[str]:
        """Pieces of the answer as they come; the turn is remembered when it is whole."""
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces = []
        for piece in self._pieces(self.asking.request(asked, like=self._like)):
            pieces.append(piece)
            yield piece
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "".join(pieces)},
        ]

    def answer(self, prompt_ids: Sequence[int]) -> str:
        """The answer to a rendered prompt, outside the conversation."""
        return "".join(self._pieces(self.asking.continuing(prompt_ids, self._like)))

    @property
    def _like(self) -> Request:
        return Request(
            prompt_ids=(),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            adapter=self.adapter,
        )

    def _pieces(self, request: Request) -> Iterator[str]:
        ids: list[int] = []
        said = ""
        for token in stream(self.base, request):
            ids.append(token)
            whole = self.renderer.decode(ids)
            # A character of several tokens shows as a replacement until its last one is here.
            if not whole.endswith(UNFINISHED) and len(whole) > len(said):
                yield whole[len(said) :]
                said = whole
        if rest := self.renderer.decode(ids)[len(said) :]:
            yield rest


def open_chat(
    folder: Path | str,
    adapter: str | None = "default",
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
) -> ChatSession:
    """A session with the run's tuned model, or with its bare base where `adapter` is None."""
    if adapter not in (None, "default"):
        raise ConfigError(f"adapter {adapter!r}: a run has one, named default; none is the base")
    run = RunFolder(Path(folder))
    config, base = run.open(adapter=adapter is not None)
    return ChatSession(
        base,
        run.renderer(base.tokenizer),
        adapter=adapter_slot(config) if adapter else None,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )
