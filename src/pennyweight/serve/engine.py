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

from pennyweight.lora import check_fit
from pennyweight.model import BaseModel
from pennyweight.serve.answering import Answering, Ask
from pennyweight.serve.beside import Beside
from pennyweight.serve.refusals import Refused, busy
from pennyweight.serve.settings import ServeSettings
from pennyweight.serve.turns import Turns
from pennyweight.serve.versions import Versions

__all__ = ["Engine", "Training"]

log = logging.getLogger("pennyweight.serve")

Answer = TypeVar("Answer")


@runtime_checkable
class Training(Protocol):
    """A job's lane: `work` does one piece and gives its tokens, until `busy` is false."""

    weight: float

    @property
    def busy(self) -> bool: ...

    def work(self) -> float: ...


class Engine:
    """Sole owner of a resident base from `start` on."""

    def __init__(self, base: BaseModel, versions: Versions, settings: ServeSettings) -> None:
        self._base, self._versions = base, versions
        self._limits = settings.chat
        self._beside = Beside(base, versions, settings.chat.resident_adapters)
        self._answering = Answering(
            base,
            self._beside,
            rows=settings.chat.rows,
            kv_bytes=settings.chat.kv_bytes,
            weight=settings.chat_weight,
        )
        self._trainings: list[Training] = []
        self._turns = Turns()
        self._orders: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._asked = 0  # answers promised and not ended
        self._lock = threading.Lock()
        self._ending = False
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
        """Let these be answered, all or none. Refused (429) where too many wait."""
        with self._lock:
            if self._ending:
                raise _ends()
            room = self._limits.rows + self._limits.waiting - self._asked
            if len(asks) > room:
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

        if threading.current_thread() is self._thread or not self._thread.is_alive():
            order()
        else:
            self._order(order)
        return answer.result()

    def require_fit(self, version: str) -> None:
        """AdapterError where the version is not of this base."""
        adapter = self._versions.load(version)
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

    def _order(self, act: Callable[[], object]) -> None:
        self._orders.put(act)

    def _run(self) -> None:
        while True:
            self._take_orders()
            self._trainings = [each for each in self._trainings if each.busy]
            if self._ending and not self._trainings:
                self._answering.fail(_ends())
                self._beside.clear()
                return
            lane: Any = self._turns.next([self._answering, *self._trainings])
            if lane is None:
                self._orders.get()()
                continue
            try:
                tokens = lane.work()
            except Exception as fault:
                # Only answers end with what went wrong; a job tells of its own faults itself.
                log.exception("a piece of work failed inside")
                if lane is self._answering:
                    self._answering.fail(fault)
                else:
                    self._trainings.remove(lane)
                tokens = 0.0
            self._turns.charge(lane, tokens)

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
