"""Questions on their way through the model, and what each of them cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from pennyweight.budget import MemoryBudget
from pennyweight.errors import DivergedError, PennyweightError
from pennyweight.generate import Decoding, Request, Token
from pennyweight.model import BaseModel
from pennyweight.serve.beside import Beside

__all__ = ["Answering", "Ask"]


@dataclass(slots=True, eq=False)
class Ask:
    """One answer that is wanted. `deliver` gets each token, or the fault that ended it, in the
    engine's thread; `seconds` of the device went into it so far.
    """

    request: Request
    version: str | None
    deliver: Callable[[Token | Exception], object]
    seconds: float = 0.0


class Answering:
    """The lane of all questions; only the owner of the model calls it.

    Those that wait take turns by the tokens their owners have had (`generate.turns`).
    """

    def __init__(
        self,
        base: BaseModel,
        beside: Beside,
        *,
        rows: int,
        kv_bytes: int | None = None,
        weight: float = 1.0,
    ) -> None:
        self.weight = weight
        self._beside = beside
        self._base, self._rows, self._kv_bytes = base, rows, kv_bytes
        self._decoding = self._begun()
        self._asks: dict[int, Ask] = {}

    def _begun(self) -> Decoding:
        budget = None if self._kv_bytes is None else MemoryBudget(self._kv_bytes)
        return Decoding(self._base, batch_size=self._rows, budget=budget)

    @property
    def busy(self) -> bool:
        return bool(self._asks)

    def add(self, asks: list[Ask]) -> None:
        """Let these wait for their turn; of one prompt several are read once."""
        held: list[Ask] = []
        try:
            for ask in asks:
                if ask.version is not None:
                    self._beside.hold(ask.version)
                held.append(ask)
            requests = [replace(ask.request, adapter=ask.version) for ask in asks]
            self._asks |= dict(zip(self._decoding.add(requests), asks, strict=True))
        except PennyweightError as fault:
            for ask in held:
                self._release(ask)
            for ask in asks:
                ask.deliver(fault)

    def drop(self, ask: Ask) -> None:
        """Forget a question, wherever it stands; nothing where it was answered."""
        for number, known in list(self._asks.items()):
            if known is ask:
                self._decoding.drop(number)
                self._release(self._asks.pop(number))

    def work(self) -> float:
        """One step of all that is under way; the tokens that were read."""
        began = time.perf_counter()
        tokens = self._decoding.step()
        seconds = time.perf_counter() - began
        read = self._decoding.last_read
        total = max(1, sum(read.values()))
        for number, count in read.items():
            self._asks[number].seconds += seconds * count / total
        for token in tokens:
            ask = self._asks[token.number]
            if token.stop_reason is not None:
                self._release(self._asks.pop(token.number))
            if token.stop_reason == "diverged":
                ask.deliver(DivergedError(f"adapter {ask.version}: the logits are not finite"))
            else:
                ask.deliver(token)
        return float(total)

    def fail(self, fault: Exception) -> None:
        """End all questions with this fault, and begin with nothing under way."""
        asks, self._asks = self._asks, {}
        self._decoding = self._begun()
        for ask in asks.values():
            self._release(ask)
            ask.deliver(fault)

    def _release(self, ask: Ask) -> None:
        if ask.version is not None:
            self._beside.release(ask.version)
