"""The one thread that owns the model: turns of questions and of training, piece by piece.

Others give it orders, which it takes up between two pieces of work; nobody else touches the model.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, runtime_checkable

from pennyweight.errors import MemoryExhausted
from pennyweight.lora import check_fit
from pennyweight.model import BaseModel, is_out_of_memory, release_cached
from pennyweight.serve.answering import Answering, Ask
from pennyweight.serve.beside import Beside
from pennyweight.serve.memory import Memory, Need
from pennyweight.serve.refusals import Refused, busy, invalid
from pennyweight.serve.settings import ServeSettings
from pennyweight.serve.turns import Turns
from pennyweight.serve.versions import Versions

__all__ = ["Engine", "Training"]

log = logging.getLogger("pennyweight.serve")

Answer = TypeVar("Answer")


@runtime_checkable
class Training(Protocol):
    """A job's lane: `work` does one piece and gives its tokens, until `busy` is false. The memory
    that was admitted under its name is given back then."""

    weight: float
    name: str

    @property
    def busy(self) -> bool: ...

    def work(self) -> float: ...


class Engine:
    """Sole owner of a resident base from `start` on."""

    def __init__(
        self, base: BaseModel, versions: Versions, memory: Memory, settings: ServeSettings
    ) -> None:
        self._base, self._versions, self._memory = base, versions, memory
        self._limits = settings.chat
        budget, most = memory.budget, settings.chat.resident_adapters
        self._beside = Beside(base, versions, budget=budget, most=most)
        self._answering = Answering(
            base, self._beside, rows=settings.chat.rows, budget=budget, weight=settings.chat_weight
        )
        self.most_tokens = self._answering.most_tokens
        """Of a prompt and its answer together, as far as memory goes."""
        self._trainings: list[Training] = []
        self._turns = Turns()
        self._orders: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._asked = 0  # answers promised and not ended
        self._lock = threading.Lock()
        self._ending = self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the model has somebody who works with it."""
        return self._thread.is_alive()

    @property
    def asked(self) -> int:
        """Answers under way or waiting."""
        return self._asked

    def ask(self, asks: list[Ask]) -> None:
        """Let these be answered, all or none. Refused where too many wait (429), or where they are
        more than may ever wait (400)."""
        with self._lock:
            if self._ending or self._ended:
                raise _ends()
            most = self._limits.rows + self._limits.waiting
            if len(asks) > most:
                raise invalid(
                    f"{len(asks)} answers at once: {most} at the most here, prompts times n",
                    param="n",
                    code="too_many_choices",
                )
            if len(asks) > most - self._asked:
                raise busy(
                    f"{self._asked} answers are under way or waiting, and {self._limits.waiting} may "
                    "wait: come again in a moment"
                )
            self._asked += len(asks)
        self._order(lambda: self._answering.add(asks))

    def done(self, ask: Ask) -> None:
        """Once for each ask: its answer has ended, or nobody wants it any more."""
        with self._lock:
            self._asked -= 1
        self._order(lambda: self._answering.drop(ask))

    def admit(self, name: str, need: Need) -> bool:
        """Reserve a job's memory; False: it waits, and nobody gets before it what others give back."""
        return self.call(lambda _: self._memory.admit(name, need, self._beside.make_room))

    def leave(self, name: str) -> None:
        """A job that was admitted does not train after all."""
        self.call(lambda _: self._memory.leave(name))

    def nobody_waits(self) -> None:
        """The job that waited for memory has ended, or another's turn has come."""
        self.call(lambda _: self._memory.nobody_waits())

    def train(self, training: Training) -> None:
        """Give a job its turns."""
        self._order(lambda: self._trainings.append(training))

    def call(self, act: Callable[[BaseModel], Answer]) -> Answer:
        """What this gives, done between two pieces of work."""
        answer: Future[Answer] = Future()

        def order() -> None:
            try:
                answer.set_result(act(self._base))
            except BaseException as fault:
                answer.set_exception(fault)

        mine = threading.current_thread() is self._thread or not self._thread.is_alive()
        if mine or not self._order(order):
            order()
        return answer.result()

    def require_fit(self, version: str) -> None:
        """AdapterError where the version is not of this base, or too large to stand beside it."""
        adapter = self._versions.load(version)
        self._memory.require_room(adapter.parameters)
        self.call(lambda base: check_fit(base, adapter))

    def nudge(self) -> None:
        """Look again at who has work."""
        self._order(lambda: None)

    def end(self, timeout_s: float) -> bool:
        """Stop once trainings have none left; answers that are still under way are cut off."""
        with self._lock:
            self._ending = True
        self.nudge()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _order(self, act: Callable[[], object]) -> bool:
        """False where nobody will take it up any more."""
        with self._lock:
            if not self._ended:
                self._orders.put(act)
            return not self._ended

    def _run(self) -> None:
        try:
            while self._piece():
                pass
        finally:
            with self._lock:
                self._ended = True
            self._take_orders()

    def _piece(self) -> bool:
        """One piece of work; False where the end has come."""
        self._take_orders()
        if self._ending and not self._trainings:
            self._answering.fail(_ends())
            self._beside.clear()
            return False
        lane: Any = self._turns.next([self._answering, *self._trainings])
        if lane is None:
            self._orders.get()()
            return True
        tokens = 0.0
        try:
            tokens = lane.work()
        except Exception as fault:
            # Only answers end with what went wrong; a job tells of its own faults itself.
            log.exception("a piece of work failed inside")
            if lane is self._answering:
                self._answering.fail(self._told(fault))
            else:
                self._let_go(lane)
        self._turns.charge(lane, tokens)
        if lane in self._trainings and not lane.busy:
            self._let_go(lane)
        return True

    def _let_go(self, training: Training) -> None:
        self._trainings.remove(training)
        self._memory.leave(training.name)

    def _told(self, fault: Exception) -> Exception:
        """What answers end with; memory that did not do after all is said as that."""
        if not is_out_of_memory(fault):
            return fault
        release_cached(self._base.device)
        return MemoryExhausted("the answers under way did not fit in memory; ask again")

    def _take_orders(self) -> None:
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return
            order()


def _ends() -> Refused:
    return Refused(
        503,
        "the server is ending; what was acknowledged is kept",
        kind="server_error",
        code="shutting_down",
        retry_after_s=5,
    )
