"""Questions on their way through the model, and what each of them cost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from pennyweight.budget import MemoryBudget
from pennyweight.errors import DivergedError, PennyweightError
from pennyweight.generate import Decoding, Request, Token
from pennyweight.model import BaseModel
from pennyweight.serve.beside import Beside
from pennyweight.serve.turns import QUANTUM_TOKENS

__all__ = ["Answering", "Ask"]


@dataclass(slots=True, eq=False)
class Ask:
    """One answer that is wanted. `deliver` gets each token, or the fault that ended it, in the
    engine's thread; `seconds` of the device went into it so far. `slot`: its adapter's, once that
    stands beside the base.
    """

    request: Request
    version: str | None
    deliver: Callable[[Token | Exception], object]
    seconds: float = 0.0
    slot: str | None = None


class Answering:
    """The lane of all questions; only the owner of the model calls it.

    Those that wait for a row take turns by the tokens their owners have had (`generate.turns`);
    before that, those whose adapter has to wait for memory wait in the order they came.
    """

    def __init__(
        self,
        base: BaseModel,
        beside: Beside,
        *,
        rows: int,
        budget: MemoryBudget,
        weight: float = 1.0,
    ) -> None:
        self.weight = weight
        self._beside = beside
        self._decoding = Decoding(base, batch_size=rows, budget=budget)
        self._asks: dict[int, Ask] = {}
        self._outside: deque[list[Ask]] = deque()
        self._look_again = False

    @property
    def busy(self) -> bool:
        return bool(self._asks or self._outside)

    @property
    def most_tokens(self) -> int:
        """Of prompt and answer together, bar the last, which is never read."""
        assert self._decoding.most_tokens is not None
        return self._decoding.most_tokens

    def add(self, asks: list[Ask]) -> None:
        """Let these wait for their turn; of one prompt several are read once."""
        self._outside.append(asks)
        self._let_in()

    def drop(self, ask: Ask) -> None:
        """Forget a question, wherever it stands; nothing where it was answered."""
        for asks in self._outside:
            if ask in asks:
                asks.remove(ask)
        self._outside = deque(asks for asks in self._outside if asks)
        for number, known in list(self._asks.items()):
            if known is ask:
                self._decoding.drop(number)
                self._release(self._asks.pop(number))

    def work(self) -> float:
        """One step of all that is under way; the tokens that were read."""
        if self._look_again:
            self._let_in()
        if not self._decoding.busy:
            return QUANTUM_TOKENS  # all wait for memory: the turn is over
        began = time.perf_counter()
        tokens = self._decoding.step()
        seconds = time.perf_counter() - began
        read = self._decoding.last_read
        total = sum(read.values())
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
        return float(total) or QUANTUM_TOKENS

    def fail(self, fault: Exception) -> None:
        """End all questions with this fault, and begin with nothing under way."""
        asks = [*self._asks.values(), *(ask for some in self._outside for ask in some)]
        self._asks, self._outside = {}, deque()
        self._decoding.clear()
        for ask in asks:
            self._release(ask)
            ask.deliver(fault)

    def _let_in(self) -> None:
        """Hand on, in their order, those whose adapter is beside the base; of those behind one that
        waits for memory only who asks the base itself, or the last could wait for ever."""
        self._look_again = False
        left: deque[list[Ask]] = deque()
        for asks in self._outside:
            wants = any(ask.version is not None for ask in asks)
            if (wants and left) or not self._seated(asks):
                left.append(asks)
        self._outside = left

    def _seated(self, asks: list[Ask]) -> bool:
        """Whether they need not wait outside any longer: handed on, or ended with their fault."""
        try:
            for ask in asks:
                if ask.version is not None:
                    ask.slot = self._beside.hold(ask.version)
                    if ask.slot is None:
                        self._release(*asks)
                        return False
            requests = [replace(ask.request, adapter=ask.slot) for ask in asks]
            self._asks |= dict(zip(self._decoding.add(requests), asks, strict=True))
        except PennyweightError as fault:
            self._release(*asks)
            for ask in asks:
                ask.deliver(fault)
        return True

    def _release(self, *asks: Ask) -> None:
        for ask in asks:
            if ask.slot is not None:
                self._beside.release(ask.slot)
                ask.slot, self._look_again = None, True
