"""Requests under way on one base, moved on together: continuous batching with mixed adapters.

A step is one pass: a token of every row that is drawing, and beside them a bounded piece of the
prompts being read, so that a long prompt stalls nobody (chunked prefill, Agrawal et al. 2024,
"Sarathi-Serve", section 4). A row is begun only when the keys and values of its longest possible
text are reserved: what has begun always ends, and is never thrown out to be read again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pennyweight.attention import KEYS_AND_VALUES, KVCache, shelf_tokens
from pennyweight.budget import MemoryBudget
from pennyweight.errors import ConfigError
from pennyweight.generate.draw import draw_each
from pennyweight.generate.request import Likely, Request, Token, refuse_unanswerable
from pennyweight.generate.turns import Row, Turns
from pennyweight.model import BaseModel

__all__ = ["CHUNK_TOKENS", "Decoding", "kv_bytes_per_token"]

CHUNK_TOKENS = 512


class Decoding:
    """Requests on one base: some under way in the cache, the rest waiting for their turn.

    At most `batch_size` rows are under way, of one user at most `rows_per_user`; a step reads at
    most `chunk_tokens` of prompts. With a `budget`, keys and values are reserved there, and
    `most_tokens` is the longest text whose reservation is sure to be had in the end.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        batch_size: int = 16,
        chunk_tokens: int = CHUNK_TOKENS,
        budget: MemoryBudget | None = None,
        rows_per_user: int | None = None,
    ) -> None:
        numbers = {"batch_size": batch_size, "chunk_tokens": chunk_tokens}
        numbers |= {} if rows_per_user is None else {"rows_per_user": rows_per_user}
        if faults := [f"{name} {n}: it must be at least 1" for name, n in numbers.items() if n < 1]:
            raise ConfigError.all(faults)
        self._base, self._batch_size, self._chunk_tokens = base, batch_size, chunk_tokens
        self._rows_per_user = rows_per_user or batch_size
        self.most_tokens: int | None = None
        self._budget = budget
        per_token = 0
        if budget is not None:
            per_token = kv_bytes_per_token(base)
            self.most_tokens = _most_tokens(budget.sure_bytes(KEYS_AND_VALUES) // per_token)
        self._cache = KVCache(batch_size, budget=budget, bytes_per_token=per_token)
        self._rows: list[Row] = []
        self._turns = Turns()
        self._added = 0
        self.last_read: dict[int, int] = {}
        """Tokens that the last step ran through the model, by request."""

    @property
    def busy(self) -> bool:
        return bool(self._rows or len(self._turns))

    @property
    def under_way(self) -> int:
        """Requests that have begun."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._turns)

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values in memory."""
        return self._cache.held_bytes

    def adapters(self) -> set[str]:
        """Adapters that a request under way or waiting reads: they must stay attached."""
        rows = [*self._rows, *self._turns]
        return {row.request.adapter for row in rows if row.request.adapter is not None}

    def add(self, requests: Sequence[Request]) -> list[int]:
        """Let requests wait for their turn; the numbers their tokens will carry.

        Those of one call that share prompt and adapter have the prompt read once.
        """
        refuse_unanswerable(self._base, requests, most_tokens=self.most_tokens)
        numbers = list(range(self._added, self._added + len(requests)))
        self._added += len(requests)
        rows: list[Row] = []
        twins: dict[tuple[tuple[int, ...], str | None], Row] = {}
        for number, request in zip(numbers, requests, strict=True):
            stops = self._base.stop_ids if request.stop_ids is None else request.stop_ids
            row = Row(number, request, frozenset(stops), request.prompt_ids)
            row.twin = twins.setdefault((request.prompt_ids, request.adapter), row)
            rows.append(row)
        # The longest first, so that the short ones fill the places they leave.
        for row in sorted(rows, key=lambda row: -len(row.pending)):
            row.twin = None if row.twin is row else row.twin
            self._turns.add(row)
        return numbers

    def drop(self, number: int) -> None:
        """Forget a request, wherever it stands; nothing happens when it is done already."""
        for row in self._turns:
            if row.number == number:
                self._turns.forget(row)
                return
        for at, row in enumerate(self._rows):
            if row.number == number:
                self._retire(at)
                return

    def clear(self) -> None:
        """Forget every request, after a fault inside, and give back the memory."""
        self._cache.clear()
        self._rows, self._turns, self.last_read = [], Turns(), {}

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One pass over all rows under way: a token of each whose prompt is read.

        An empty list where only prompts were read, or where memory that others hold in the
        budget keeps every request waiting.
        """
        assert self.busy, "no request is under way or waiting"
        self._begin()
        counts = self._counts()
        self.last_read = {self._rows[at].number: count for at, count in counts.items()}
        if not counts:
            return []
        # Rows that read one adapter stand together, so that it is applied once.
        rows = sorted(counts, key=lambda at: (self._rows[at].request.adapter or "", at))
        done = [at for at in rows if counts[at] == len(self._rows[at].pending)]
        logits = self._read(rows, [counts[at] for at in rows], done)
        tokens = self._draw(done, logits) if logits is not None else []
        ended = [at for at, token in zip(done, tokens, strict=True) if token.stop_reason]
        for at in sorted(ended, reverse=True):
            self._retire(at)
        return tokens

    def _begin(self) -> None:
        """Move waiting requests into free rows, in their turn, while memory can be reserved, and
        nobody else waits for what the rows hold beyond their floor: a shelf is given back whole."""
        if self._budget is not None and self._budget.is_beyond(KEYS_AND_VALUES):
            return
        passed_over: set[str] = set()
        mine = Counter(row.request.user for row in self._rows)
        while len(self._rows) < self._batch_size:
            row = self._turns.first(passed_over)
            if row is None:
                return
            user, twin = row.request.user, row.twin
            reading = twin in self._rows and twin is not None and not twin.drawn
            if mine[user] >= self._rows_per_user or reading:
                passed_over.add(user)
            elif self._seat(row):
                self._turns.take(row)
                self._rows.append(row)
                mine[user] += 1
            else:
                # Nobody overtakes who waits for memory, or the largest would wait for ever.
                return

    def _seat(self, row: Row) -> bool:
        """Reserve a row of the cache; what a twin has read is copied."""
        new = self._cache.begin(row.request.most_read_tokens)
        if new is None:
            return False
        known = len(row.request.prompt_ids) - 1
        if row.twin in self._rows and row.twin is not None and known:
            self._cache.recall(new, self._rows.index(row.twin), known)
            row.pending = row.pending[known:]
        return True

    def _counts(self) -> dict[int, int]:
        """How many tokens each row reads in the next pass.

        Of a piece of prompts, half is for the oldest; then the shortest go first.
        """
        pending = {at: len(row.pending) for at, row in enumerate(self._rows)}
        counts = {at: 1 for at, tokens in pending.items() if tokens == 1}
        reading = sorted(
            (at for at in pending if at not in counts), key=lambda at: self._rows[at].number
        )
        left = self._chunk_tokens
        if reading:
            oldest = reading.pop(0)
            counts[oldest] = min(pending[oldest], -(-left // 2) if reading else left)
            left -= counts[oldest]
            for at in sorted(reading, key=lambda at: pending[at]):
                if take := min(pending[at], left):
                    counts[at] = take
                    left -= take
            counts[oldest] += min(pending[oldest] - counts[oldest], left)
        return counts

    def _read(
        self, rows: list[int], counts: list[int], done: list[int]
    ) -> Float[Tensor, "rows vocab"] | None:
        """Read the next tokens of these rows; the logits after those that are `done` with theirs."""
        starts = self._cache.extend(rows, counts)
        boundaries, lasts = [0], []
        ids: list[int] = []
        positions: list[int] = []
        for at, count, start in zip(rows, counts, starts, strict=True):
            row = self._rows[at]
            ids += row.pending[:count]
            row.pending = row.pending[count:]
            positions += range(start, start + count)
            boundaries.append(len(ids))
            if not row.pending:
                lasts.append(len(ids) - 1)
        device = self._base.device
        adapters = [self._rows[at].request.adapter for at in rows]
        with self._base.route.over(boundaries, adapters, cache=self._cache):
            hidden = self._base.hidden(
                torch.tensor(ids, device=device), torch.tensor(positions, device=device)
            )
        if not done:
            return None
        # The head may carry an adapter or a trained copy: its rows are documents of one token.
        adapters = [self._rows[at].request.adapter for at in done]
        with self._base.route.over(range(len(done) + 1), adapters):
            if len(lasts) < len(ids):
                hidden = hidden[torch.tensor(lasts, device=device)]
            return self._base.logits(hidden)

    def _draw(self, rows: list[int], logits: Float[Tensor, "rows vocab"]) -> list[Token]:
        """The next token of each row, and whether it is the row's last."""
        ids = logits.argmax(-1)
        sampled = [place for place, at in enumerate(rows) if self._rows[at].request.temperature > 0]
        if sampled:
            drawing = [self._rows[rows[place]] for place in sampled]
            where = torch.tensor(sampled, device=ids.device)
            ids[where] = draw_each(
                logits[where], [row.request for row in drawing], [row.drawn for row in drawing]
            ).to(ids.device)
        total = logits.logsumexp(-1)
        known = logits.gather(1, ids[:, None]).squeeze(1) - total
        tops = self._tops(rows, logits, total)
        return [
            self._token(self._rows[at], token, logprob, top)
            for at, token, logprob, top in zip(
                rows, ids.tolist(), known.tolist(), tops, strict=True
            )
        ]

    def _token(self, row: Row, token: int, logprob: float, top: tuple[Likely, ...]) -> Token:
        """Write a drawn token into its row, where it is read next."""
        row.drawn += 1
        row.pending = (token,)
        self._turns.count(row.request.user, 1)
        reason: Literal["stop", "length", "diverged"] | None = None
        if not math.isfinite(logprob):
            reason = "diverged"
        elif token in row.stop_ids:
            reason = "stop"
        elif row.drawn == row.request.max_new_tokens:
            reason = "length"
        return Token(row.number, token, logprob, reason, top)

    def _tops(self, rows: list[int], logits: Tensor, total: Tensor) -> list[tuple[Likely, ...]]:
        """The likeliest tokens of each row, as many as its request asks for."""
        wanted = [self._rows[at].request.top_logprobs for at in rows]
        most = min(max(wanted), logits.shape[1])
        if not most:
            return [()] * len(rows)
        values, ids = logits.topk(most)
        told = zip(wanted, ids.tolist(), (values - total[:, None]).tolist(), strict=True)
        return [
            tuple(Likely(*pair) for pair in zip(some[:count], known[:count], strict=True))
            for count, some, known in told
        ]

    def _retire(self, at: int) -> None:
        """Free a row; the last one moves into its place, here as in the cache."""
        self._cache.drop(at)
        self._turns.end(self._rows[at])
        last = self._rows.pop()
        if at < len(self._rows):
            self._rows[at] = last


def kv_bytes_per_token(base: BaseModel) -> int:
    """Bytes of keys and values that a token leaves behind, in all layers: a pass of one token
    shows it, whatever the family."""
    cache = KVCache(1)
    cache.extend([0], [1])
    first = torch.zeros(1, dtype=torch.int64, device=base.device)
    with torch.inference_mode(), base.route.over((0, 1), (None,), cache=cache):
        base.hidden(first, first)
    return cache.held_bytes // shelf_tokens(1)


def _most_tokens(fit: int) -> int:
    """Of a row alone, where `fit` tokens fit: the widest shelf that is no wider."""
    return 0 if fit < shelf_tokens(1) else 1 << (fit.bit_length() - 1)
