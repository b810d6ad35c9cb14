"""Examples become batches: whole documents packed back to back, in an order that is a pure function.

Packing is best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling",
section 3), over windows of a seeded shuffle, so that which documents share a batch changes from
epoch to epoch while few tokens of the budget are wasted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pennyweight.data.conversation import Example

__all__ = ["Batch", "collate", "efficiency", "joined", "order", "parts"]

_WINDOW_DOCUMENTS = 4096  # packed together; large enough that best fit wastes under 1 %


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Documents back to back in one flat row; nothing is padded.

    `ids`: int64 `[tokens]`. `trained`: bool `[tokens]`. `positions`: int64 `[tokens]`, from 0 in
    each document. `boundaries`: `[documents + 1]` offsets. `adapters`, `sources`: `[documents]`.
    """

    ids: Tensor
    trained: Tensor
    positions: Tensor
    boundaries: tuple[int, ...]
    adapters: tuple[str | None, ...]
    sources: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.boundaries[-1]

    @property
    def trained_tokens(self) -> int:
        """Targets; the first token of a document has no predictor and is never one."""
        firsts = torch.tensor(self.boundaries[:-1], device=self.trained.device)
        return int(self.trained.sum()) - int(self.trained[firsts].sum())

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=True),
            trained=self.trained.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
        )


def collate(examples: Sequence[Example], adapter: str | None = "default") -> Batch:
    """Lay examples back to back. Lengths 3 and 2 give boundaries (0, 3, 5), positions 0 1 2 0 1."""
    assert examples, "a batch holds at least one document"
    lengths = np.array([len(example.ids) for example in examples])
    assert lengths.all(), "a document holds at least one token"
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return Batch(
        ids=torch.from_numpy(np.concatenate([e.ids for e in examples]).astype(np.int64)),
        trained=torch.from_numpy(np.concatenate([e.trained for e in examples]).astype(bool)),
        positions=torch.from_numpy(positions.astype(np.int64)),
        boundaries=(0, *map(int, ends)),
        adapters=(adapter,) * len(examples),
        sources=tuple(example.source for example in examples),
    )


def parts(batch: Batch, limit_tokens: int | None) -> list[Batch]:
    """The batch as runs of whole documents of at most `limit_tokens`; a longer document stands alone.

    Documents of 3, 3, 5 tokens under a limit of 6 give two parts: 3 + 3, and 5.
    """
    if limit_tokens is None or batch.tokens <= limit_tokens:
        return [batch]
    cuts = [0]
    for document in range(len(batch.sources)):
        long = batch.boundaries[document + 1] - batch.boundaries[cuts[-1]] > limit_tokens
        if long and document > cuts[-1]:
            cuts.append(document)
    cuts.append(len(batch.sources))
    return [_documents(batch, a, b) for a, b in pairwise(cuts)]


def _documents(batch: Batch, first: int, last: int) -> Batch:
    """Documents first..last-1 as a batch of their own."""
    start, stop = batch.boundaries[first], batch.boundaries[last]
    return Batch(
        ids=batch.ids[start:stop],
        trained=batch.trained[start:stop],
        positions=batch.positions[start:stop],
        boundaries=tuple(offset - start for offset in batch.boundaries[first : last + 1]),
        adapters=batch.adapters[first:last],
        sources=batch.sources[first:last],
    )


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches back to back as one; every document keeps its adapter and its own positions."""
    boundaries = [0]
    for batch in batches:
        boundaries += [boundaries[-1] + offset for offset in batch.boundaries[1:]]
    return Batch(
        ids=torch.cat([batch.ids for batch in batches]),
        trained=torch.cat([batch.trained for batch in batches]),
        positions=torch.cat([batch.positions for batch in batches]),
        boundaries=tuple(boundaries),
        adapters=tuple(name for batch in batches for name in batch.adapters),
        sources=tuple(source for batch in batches for source in batch.sources),
    )


def order(
    lengths: Sequence[int] | np.ndarray,
    *,
    seed: int,
    epoch: int,
    budget_tokens: int | None,
    rows: int | None,
) -> list[tuple[int, ...]]:
    """The micro-batches of one epoch, as tuples of example indices; every index occurs once.

    `budget_tokens` packs whole documents up to that many tokens; a document longer than the budget
    stands alone, never split. `rows` takes a fixed count in place of packing. Give one of them.
    """
    assert (budget_tokens is None) != (rows is None), "give budget_tokens or rows, not both"
    shuffled = _permutation(len(lengths), seed, epoch, stream=0)
    if rows is not None:
        assert rows > 0
        return [tuple(chunk.tolist()) for chunk in _chunks(shuffled, rows)]
    assert budget_tokens is not None
    assert budget_tokens > 0
    sizes = np.asarray(lengths, dtype=np.int64)
    batches: list[tuple[int, ...]] = []
    for window in _chunks(shuffled, _WINDOW_DOCUMENTS):
        batches += _best_fit(window, sizes[window], budget_tokens)
    return [batches[i] for i in _permutation(len(batches), seed, epoch, stream=1).tolist()]


def efficiency(
    lengths: Sequence[int] | np.ndarray, batches: Sequence[Sequence[int]], budget_tokens: int
) -> float:
    """Share of the token budget that holds tokens; 1.0 is a perfect packing."""
    used = int(sum(lengths[i] for batch in batches for i in batch))
    return used / max(1, len(batches) * budget_tokens)


def _best_fit(indices: np.ndarray, sizes: np.ndarray, budget: int) -> list[tuple[int, ...]]:
    """Longest first, each into the fullest bin that still has room for it."""
    bins: list[list[int]] = []
    by_room = _BinsByRoom(budget)
    longest_first = np.argsort(-sizes, kind="stable")
    for index, size in zip(
        indices[longest_first].tolist(), sizes[longest_first].tolist(), strict=True
    ):
        if size >= budget:
            bins.append([index])
            continue
        room, number = by_room.tightest(size)
        if number is None:
            number = len(bins)
            bins.append([])
        bins[number].append(index)
        by_room.add(room - size, number)
    return [tuple(content) for content in bins]


class _BinsByRoom:
    """Bins grouped by the tokens they still have room for.

    A room that holds a bin is a set bit of one integer per 64 rooms, so the tightest fit is found
    in a few machine words; packing n documents costs O(n * budget / 64) at the very worst.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._rooms: dict[int, list[int]] = {}
        self._words = [0] * (budget // 64 + 1)

    def add(self, room: int, number: int) -> None:
        if room:
            self._rooms.setdefault(room, []).append(number)
            self._words[room >> 6] |= 1 << (room & 63)

    def tightest(self, size: int) -> tuple[int, int | None]:
        """Takes out the bin with the least room >= size; a fresh bin's room where there is none."""
        word = size >> 6
        bits = self._words[word] >> (size & 63) << (size & 63)
        while not bits:
            word += 1
            if word == len(self._words):
                return self._budget, None
            bits = self._words[word]
        room = (word << 6) + (bits & -bits).bit_length() - 1
        number = self._rooms[room].pop()
        if not self._rooms[room]:
            self._words[word] &= ~(1 << (room & 63))
        return room, number


def _chunks(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _permutation(count: int, seed: int, epoch: int, *, stream: int) -> np.ndarray:
    """A shuffle of range(count) that no library version can change: sort by splitmix64 of the index."""
    key = _splitmix64(np.array([seed, epoch, stream], dtype=np.uint64))
    salt = _splitmix64(_splitmix64(_splitmix64(key[:1]) ^ key[1:2]) ^ key[2:3])
    return np.argsort(_splitmix64(np.arange(count, dtype=np.uint64) ^ salt), kind="stable")


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014), on uint64 arrays."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
