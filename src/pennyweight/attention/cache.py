"""Keys and values of the tokens so far, one row for each text being generated.

Rows have their own lengths and stand without gaps from 0 on, so that a step over all of them
reads views and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["KVCache"]

FIRST_CAPACITY_TOKENS = 64


@dataclass(frozen=True, slots=True)
class _Reading:
    """The pass under way: new tokens of which rows, and where in them."""

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    longest: int
    one_each: bool
    """Every row is read, and gets one token."""
    places: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict)
    seen: dict[int | None, Tensor | None] = field(default_factory=dict)

    @property
    def fresh(self) -> bool:
        """All rows begin in this pass."""
        return not any(self.starts)

    @property
    def stops(self) -> tuple[int, ...]:
        return tuple(a + b for a, b in zip(self.starts, self.counts, strict=True))


class KVCache:
    """What up to `most_rows` rows remember, in every layer.

    `extend` before each pass says whose tokens it brings; the pass then writes them. Tensors are
    made at the first write and doubled when a row outgrows them.
    """

    def __init__(self, most_rows: int) -> None:
        self.most_rows = most_rows
        self.lengths: list[int] = []
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._reading: _Reading | None = None

    @property
    def reading(self) -> _Reading:
        assert self._reading is not None, "`extend` comes before the pass"
        return self._reading

    def extend(self, rows: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
        """Announce `counts` new tokens for `rows`, in the order the flat row will hold them.

        A row that is next after the last is begun. Returns how many tokens each row had.
        With lengths [5, 3], `extend([1, 2], [1, 4])` returns (3, 0) and leaves [5, 4, 4].
        """
        assert len(set(rows)) == len(rows), "a row is continued once in a pass"
        self.lengths += [0] * (max(rows) + 1 - len(self.lengths))
        assert len(self.lengths) <= self.most_rows, "more rows than the cache was made for"
        starts = tuple(self.lengths[row] for row in rows)
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
        one_each = set(counts) == {1} and len(rows) == len(self.lengths)
        self._reading = _Reading(tuple(rows), tuple(counts), starts, max(self.lengths), one_each)
        return starts

    @torch.inference_mode()
    def fork(self, row: int, tokens: int) -> int:
        """Begin a new last row that remembers the first `tokens` of `row`; gives its number."""
        assert 0 < tokens <= self.lengths[row], "a fork remembers what its row has read"
        new = len(self.lengths)
        assert new < self.most_rows, "more rows than the cache was made for"
        self.lengths.append(tokens)
        for keys, values in self._layers.values():
            keys[new, :, :tokens] = keys[row, :, :tokens]
            values[new, :, :tokens] = values[row, :, :tokens]
        return new

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """Forget a row. The last row takes its number."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if row == last:
            return
        self.lengths[row] = length
        for keys, values in self._layers.values():
            keys[row, :, :length] = keys[last, :, :length]
            values[row, :, :length] = values[last, :, :length]

    def write(
        self,
        layer: int,
        key: Float[Tensor, "1 kv_heads tokens head_dim"],
        value: Float[Tensor, "1 kv_heads tokens value_dim"],
    ) -> tuple[
        Float[Tensor, "rows kv_heads all head_dim"], Float[Tensor, "rows kv_heads all value_dim"]
    ]:
        """Put the new tokens of the pass into a layer; views of all that its rows remember."""
        assert not key.requires_grad, "generation runs without gradients"
        now = self.reading
        pair = self._layers.get(layer)
        if pair is None or pair[0].shape[2] < now.longest:
            pair = self._layers[layer] = self._room(key, pair, 0), self._room(value, pair, 1)
        row, column, _, _ = self.places(key.device)
        views = []
        for held, new in zip(pair, (key, value), strict=True):
            held[row, :, column] = new[0].transpose(0, 1)
            views.append(held[: len(self.lengths), :, : now.longest])
        return views[0], views[1]

    def _room(self, new: Tensor, pair: tuple[Tensor, Tensor] | None, which: int) -> Tensor:
        """Room for the longest row and as much again, with what was held copied over."""
        held = None if pair is None else pair[which]
        capacity = FIRST_CAPACITY_TOKENS if held is None else 2 * held.shape[2]
        capacity = max(capacity, self.reading.longest)
        # Zeros: what no row has written yet is masked, and 0 times NaN would still be NaN.
        room = new.new_zeros(self.most_rows, new.shape[1], capacity, new.shape[3])
        if held is not None:
            room[:, :, : held.shape[2]] = held
        return room

    def places(self, device: torch.device) -> tuple[Int[Tensor, " n"], ...]:
        """Of each new token its row and column here; then, for a pass of one token each, the
        place in the flat row of each row, and the row of each place."""
        now = self.reading
        if device not in now.places:
            rows = [
                row for row, count in zip(now.rows, now.counts, strict=True) for _ in range(count)
            ]
            columns = [c for a, b in zip(now.starts, now.stops, strict=True) for c in range(a, b)]
            by_row = sorted(range(len(now.rows)), key=lambda place: now.rows[place])
            lists = (rows, columns, by_row, now.rows)
            now.places[device] = tuple(torch.tensor(each, device=device) for each in lists)
        return now.places[device]

    def visible(
        self, window: int | None, device: torch.device
    ) -> Bool[Tensor, "rows 1 1 all"] | None:
        """What the newest token of each row sees; None where each sees all there is."""
        now = self.reading
        if window is not None and window >= now.longest:
            window = None
        if window not in now.seen:
            if window is None and min(self.lengths) == now.longest:
                now.seen[window] = None
            else:
                lengths = torch.tensor(self.lengths, device=device)[:, None, None, None]
                columns = torch.arange(now.longest, device=device)
                seen = columns < lengths
                # The newest token stands at length - 1 and counts in its own window.
                now.seen[window] = seen if window is None else seen & (columns >= lengths - window)
        return now.seen[window]
