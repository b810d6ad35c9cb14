"""Who goes next where requests wait: round robin between users, by the tokens each has had.

A user's tokens are counted as they are read and drawn, and the one with the fewest goes next
(deficit round robin, Shreedhar and Varghese 1995, with a quantum of one token). Who comes while
others are served begins level with the least served of them: an absence saves nothing up (Sheng
et al. 2024, "Fairness in Serving Large Language Models", section 4).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from pennyweight.generate.request import Request

__all__ = ["Row", "Turns"]


@dataclass(slots=True, eq=False)
class Row:
    """A request waiting or under way: what it has drawn, and what is still to be read.

    `twin`: an earlier request with the same prompt and adapter, whose reading serves both.
    """

    number: int
    request: Request
    stop_ids: frozenset[int]
    pending: tuple[int, ...]
    twin: Row | None = None
    drawn: int = field(default=0)


class Turns:
    """Rows that wait, one queue a user, and the tokens of every user who has a row anywhere."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Row]] = {}
        self._had: dict[str, int] = {}
        self._under_way: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Row]:
        for rows in self._waiting.values():
            yield from rows

    def add(self, row: Row) -> None:
        """Let a row wait behind its user's others, before those of lower priority."""
        user = row.request.user
        if user not in self._waiting and not self._under_way[user]:
            active = self._waiting.keys() | {u for u, rows in self._under_way.items() if rows}
            if not active:
                self._had.clear()
            level = min((self._had[other] for other in active), default=0)
            self._had[user] = max(self._had.get(user, 0), level)
        queue = self._waiting.setdefault(user, deque())
        at = len(queue)
        while at and queue[at - 1].request.priority < row.request.priority:
            at -= 1
        queue.insert(at, row)

    def first(self, passed_over: Collection[str] = ()) -> Row | None:
        """The row whose turn it is, still waiting; users `passed_over` cannot go now."""
        heads = [rows[0] for user, rows in self._waiting.items() if user not in passed_over]
        order = lambda row: (-row.request.priority, self._had[row.request.user], row.number)  # noqa: E731
        return min(heads, key=order, default=None)

    def take(self, row: Row) -> None:
        """A row's turn has come; its prompt counts from now on."""
        self.forget(row)
        self._under_way[row.request.user] += 1
        self.count(row.request.user, len(row.pending))

    def count(self, user: str, tokens: int) -> None:
        self._had[user] += tokens

    def end(self, row: Row) -> None:
        """A row taken is done."""
        self._under_way[row.request.user] -= 1

    def forget(self, row: Row) -> None:
        """Take a row from those that wait."""
        queue = self._waiting[row.request.user]
        queue.remove(row)
        if not queue:
            del self._waiting[row.request.user]
