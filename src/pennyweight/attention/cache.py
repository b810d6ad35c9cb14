"""Keys and values of the tokens so far, one row for each text being generated.

Rows that will be of like length stand side by side on a shelf, each from its slot's start and
without gaps, so that a step over all of them reads views and copies nothing, and a long row costs
the short ones neither memory nor time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pennyweight.budget import MemoryBudget

__all__ = ["KEYS_AND_VALUES", "KVCache", "shelf_tokens"]

LEAST_SHELF_TOKENS = 64
KEYS_AND_VALUES = "keys and values"


def shelf_tokens(tokens: int) -> int:
    """Tokens that a row of at most `tokens` is given room for: the next power of two, from 64."""
    return max(LEAST_SHELF_TOKENS, 1 << (tokens - 1).bit_length())


@dataclass(slots=True, eq=False)
class _Shelf:
    """In every layer one rectangle of keys and one of values, `[slots, kv_heads, capacity, dim]`."""

    capacity: int
    slots: int = 0
    rows: list[int] = field(default_factory=list)
    """The row in each slot that is taken."""
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Remembered:
    """A document of the pass that goes on by several tokens: its place there, and in its row."""

    first: int
    count: int
    shelf: _Shelf
    slot: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.count


@dataclass(slots=True, eq=False)
class Abreast:
    """The documents of one token whose rows share a shelf: one attention over a rectangle."""

    shelf: _Shelf
    places: list[int]
    slots: list[int]
    starts: list[int]
    written: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict)
    seen: dict[int | None, Tensor | None] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return max(self.starts) + 1

    @property
    def tall(self) -> int:
        """Slots from the first to the last that is read."""
        return max(self.slots) + 1

    def indices(self, device: torch.device) -> tuple[Int[Tensor, " n"], ...]:
        """Of each document its place in the pass, its slot and its column; then the place that
        each slot reads. A slot whose row is not in the pass reads another's, for nothing."""
        if device not in self.written:
            by_slot = [self.places[0]] * self.tall
            for place, slot in zip(self.places, self.slots, strict=True):
                by_slot[slot] = place
            lists = (self.places, self.slots, self.starts, by_slot)
            self.written[device] = tuple(torch.tensor(each, device=device) for each in lists)
        return self.written[device]

    def visible(
        self, window: int | None, device: torch.device
    ) -> Bool[Tensor, "slots 1 1 longest"] | None:
        """What the newest token of each slot sees; None where each sees all there is."""
        longest = self.longest
        if window is not None and window >= longest:
            window = None
        if window not in self.seen:
            even = min(self.starts) + 1 == longest
            if window is None and even and len(self.slots) == self.tall:
                self.seen[window] = None
            else:
                # A slot that is read for nothing sees one column, so that its softmax is finite.
                last = [0] * self.tall
                for slot, start in zip(self.slots, self.starts, strict=True):
                    last[slot] = start
                newest = torch.tensor(last, device=device)[:, None, None, None]
                columns = torch.arange(longest, device=device)
                seen = columns <= newest
                # The newest token counts in its own window.
                self.seen[window] = seen if window is None else seen & (columns > newest - window)
        return self.seen[window]


@dataclass(frozen=True, slots=True)
class _Reading:
    """The pass under way."""

    fresh: bool
    """All rows begin in this pass."""
    abreast: tuple[Abreast, ...]
    longer: tuple[Remembered, ...]
    tokens: int
    orders: dict[torch.device, Tensor] = field(default_factory=dict)

    def order(self, device: torch.device) -> Int[Tensor, " tokens"]:
        """Where each token of the pass stands when all `abreast` come first and `longer` follow."""
        if device not in self.orders:
            stand = [place for group in self.abreast for place in group.places]
            stand += [p for one in self.longer for p in range(one.first, one.first + one.count)]
            order = torch.empty(self.tokens, dtype=torch.int64)
            order[torch.tensor(stand)] = torch.arange(self.tokens)
            self.orders[device] = order.to(device)
        return self.orders[device]


class KVCache:
    """What up to `most_rows` rows remember, in every layer.

    `extend` before each pass says whose tokens it brings; the pass then writes them. Given a
    `budget`, and what a token takes over all layers, every byte held is reserved there first.
    """

    def __init__(
        self, most_rows: int, *, budget: MemoryBudget | None = None, bytes_per_token: int = 0
    ) -> None:
        assert budget is None or bytes_per_token, "a budget is kept in bytes"
        self.most_rows = most_rows
        self.lengths: list[int] = []
        self._budget, self._bytes_per_token = budget, bytes_per_token
        self._shelves: dict[int, _Shelf] = {}
        self._places: list[tuple[_Shelf, int]] = []
        self._reading: _Reading | None = None

    @property
    def reading(self) -> _Reading:
        assert self._reading is not None, "`extend` comes before the pass"
        return self._reading

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values in memory, empty slots included."""
        return sum(
            part.nbytes
            for shelf in self._shelves.values()
            for pair in shelf.layers.values()
            for part in pair
        )

    def begin(self, tokens: int) -> int | None:
        """Begin a new last row with room for `tokens`; its number, or None where the budget has
        too little left."""
        new = len(self.lengths)
        assert new < self.most_rows, "more rows than the cache was made for"
        place = self._place(new, tokens)
        if place is not None:
            self.lengths.append(0)
            self._places.append(place)
        return None if place is None else new

    def extend(self, rows: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
        """Announce `counts` new tokens for `rows`, in the order the flat row will hold them.

        A row that is next after the last is begun. Returns how many tokens each row had.
        With lengths [5, 3], `extend([1, 2], [1, 4])` returns (3, 0) and leaves [5, 4, 4].
        """
        assert len(set(rows)) == len(rows), "a row is continued once in a pass"
        coming = dict(zip(rows, counts, strict=True))
        for new in range(len(self.lengths), max(rows) + 1):
            begun = self.begin(coming[new])
            assert begun is not None, "with a budget, `begin` comes before `extend`"
        starts = tuple(self.lengths[row] for row in rows)
        abreast: dict[int, Abreast] = {}
        longer: list[Remembered] = []
        first = 0
        for row, count, start in zip(rows, counts, starts, strict=True):
            if start + count > self._places[row][0].capacity:
                self._move(row, start + count)
            shelf, slot = self._places[row]
            if count == 1:
                group = abreast.setdefault(shelf.capacity, Abreast(shelf, [], [], []))
                group.places.append(first)
                group.slots.append(slot)
                group.starts.append(start)
            else:
                longer.append(Remembered(first, count, shelf, slot, start))
            self.lengths[row] += count
            first += count
        fresh = not any(starts)
        self._reading = _Reading(fresh, tuple(abreast.values()), tuple(longer), first)
        return starts

    def fork(self, row: int, tokens: int) -> int:
        """Begin a new last row that remembers the first `tokens` of `row`; gives its number."""
        new = self.begin(self._places[row][0].capacity)
        assert new is not None, "with a budget, `begin` and `recall`"
        self.recall(new, row, tokens)
        return new

    @torch.inference_mode()
    def recall(self, new: int, row: int, tokens: int) -> None:
        """Let a row just begun remember the first `tokens` of another."""
        assert self.lengths[new] == 0 < tokens <= self.lengths[row], "a row recalls what was read"
        self.lengths[new] = tokens
        self._copy(self._places[row], self._places[new], tokens)

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """Forget a row and free its memory. The last row takes its number."""
        self._vacate(*self._places[row])
        last = len(self.lengths) - 1
        if row != last:
            shelf, slot = self._places[last]
            self._places[row], self.lengths[row] = (shelf, slot), self.lengths[last]
            shelf.rows[slot] = row
        self._places.pop()
        self.lengths.pop()

    def clear(self) -> None:
        """Forget every row at once, and give back what was reserved."""
        if self._budget is not None:
            tokens = sum(shelf.slots * shelf.capacity for shelf in self._shelves.values())
            self._budget.release(KEYS_AND_VALUES, tokens * self._bytes_per_token)
        self.lengths, self._shelves, self._places, self._reading = [], {}, [], None

    def write(
        self,
        layer: int,
        key: Float[Tensor, "1 kv_heads tokens head_dim"],
        value: Float[Tensor, "1 kv_heads tokens value_dim"],
    ) -> None:
        """Put the new tokens of the pass into a layer."""
        assert not key.requires_grad, "generation runs without gradients"
        for group in self.reading.abreast:
            held = self._rectangles(group.shelf, layer, key, value)
            place, slot, column, _ = group.indices(key.device)
            for kept, new in zip(held, (key, value), strict=True):
                moved = new[0].transpose(0, 1)
                if len(group.places) < self.reading.tokens:
                    moved = moved[place]
                kept[slot, :, column] = moved
        for one in self.reading.longer:
            held = self._rectangles(one.shelf, layer, key, value)
            for kept, new in zip(held, (key, value), strict=True):
                kept[one.slot, :, one.start : one.stop] = new[0, :, one.first :][:, : one.count]

    def _rectangles(
        self, shelf: _Shelf, layer: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A layer's two on this shelf, made or widened to the shelf's slots."""
        held = shelf.layers.get(layer)
        if held is None or held[0].shape[0] < shelf.slots:
            made = []
            for which, new in enumerate((key, value)):
                # Zeros: what no row has written yet is masked, and 0 times NaN would still be NaN.
                room = new.new_zeros(shelf.slots, new.shape[1], shelf.capacity, new.shape[3])
                if held is not None:
                    room[: len(held[which])] = held[which]
                made.append(room)
            held = shelf.layers[layer] = made[0], made[1]
        return held

    def _place(self, row: int, tokens: int) -> tuple[_Shelf, int] | None:
        """A slot for a row of so many tokens, new slots reserved where none is free."""
        capacity = shelf_tokens(tokens)
        shelf = self._shelves.get(capacity) or _Shelf(capacity)
        if len(shelf.rows) == shelf.slots and not self._widen(shelf):
            return None
        self._shelves[capacity] = shelf
        shelf.rows.append(row)
        return shelf, len(shelf.rows) - 1

    def _widen(self, shelf: _Shelf) -> bool:
        """Twice as many slots, so that few widenings copy; one more where the budget has no more."""
        double = max(1, min(shelf.slots, self.most_rows - shelf.slots))
        for more in (double, 1):
            wanted = more * shelf.capacity * self._bytes_per_token
            if self._budget is None or self._budget.reserve(KEYS_AND_VALUES, wanted):
                shelf.slots += more
                return True
        return False

    def _vacate(self, shelf: _Shelf, slot: int) -> None:
        """Free a slot: the shelf's last row moves there; a shelf mostly empty gives memory back."""
        leaving, last = shelf.rows[slot], shelf.rows.pop()
        self._wipe(shelf, slot, self.lengths[leaving])
        if slot < len(shelf.rows):
            self._copy((shelf, len(shelf.rows)), (shelf, slot), self.lengths[last])
            self._wipe(shelf, len(shelf.rows), self.lengths[last])
            shelf.rows[slot] = last
            self._places[last] = shelf, slot
        slots = shelf.slots
        if not shelf.rows:
            shelf.slots = 0
            del self._shelves[shelf.capacity]
        elif len(shelf.rows) <= slots // 4:
            half = slots // 2
            for layer, pair in shelf.layers.items():
                shelf.layers[layer] = pair[0][:half].clone(), pair[1][:half].clone()
            shelf.slots = half
        if self._budget is not None:
            freed = (slots - shelf.slots) * shelf.capacity * self._bytes_per_token
            self._budget.release(KEYS_AND_VALUES, freed)

    def _wipe(self, shelf: _Shelf, slot: int, tokens: int) -> None:
        """Zeros again: a row that diverged must leave no NaN to the next."""
        for pair in shelf.layers.values():
            for kept in pair:
                kept[slot : slot + 1, :, :tokens] = 0

    @torch.inference_mode()
    def _move(self, row: int, tokens: int) -> None:
        """Give a row that outgrows its shelf a slot on a wider one."""
        before = self._places[row]
        after = self._place(row, tokens)
        assert after is not None, "with a budget, `begin` is told how long a row may become"
        self._copy(before, after, self.lengths[row])
        self._places[row] = after
        self._vacate(*before)

    def _copy(self, source: tuple[_Shelf, int], target: tuple[_Shelf, int], tokens: int) -> None:
        (here, slot), (there, at) = source, target
        for layer, pair in here.layers.items():
            held = self._rectangles(there, layer, pair[0], pair[1])
            for kept, old in zip(held, pair, strict=True):
                kept[at, :, :tokens] = old[slot, :, :tokens]
