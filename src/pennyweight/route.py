"""What one forward pass is about: where documents end, which adapter each reads, what is remembered.

Models from transformers take token ids; they have no argument for "these tokens belong to
document 3, which reads adapter `sql`". A `Route` is that argument. One stands beside each
resident base; attention and adapter layers hold a reference to it and read it, and only the
callers of a pass set it (`with route.over(...)`). Tokens always travel as one flat row
`[1, tokens]`, so nothing is ever padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from pennyweight.attention import KVCache

__all__ = ["Mixture", "Route"]

# Up to so many tokens a pass costs by its kernels' starts rather than by its tokens.
MOST_MIXED_TOKENS = 256
# A product of its own costs an adapter about as much as so many places filled up in vain.
MOST_FILLED_PLACES = 32


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """The tokens of a short pass, gathered by adapter: `[groups, most]`, shorter groups filled up.

    Tokens before `bare` read none. `gather`: the token at each place; `back`: the place of each
    token from `bare` on; both None where the tokens stand so already.
    """

    names: tuple[str, ...]
    bare: int
    most: int
    gather: Int[Tensor, " places"] | None
    back: Int[Tensor, " tokens"] | None


class Route:
    """The documents of the pass under way.

    `boundaries`: `[documents + 1]` offsets into the flat row, from 0 to the token count.
    `adapters`: for each document the adapter it reads, or None for the bare base.
    `cache`: keys and values of earlier tokens while generating, else None.
    `backend`: how attention keeps documents apart (`BaseConfig.attention`); set once at load.
    `dropout_seed`: what adapter dropout is drawn from, by adapter where several train in one pass,
    or None for no dropout.
    `recomputing`: a layer is computed again for backward alone, and its output has no reader.
    """

    def __init__(self) -> None:
        self.backend: str = "auto"
        self.boundaries: tuple[int, ...] = ()
        self.adapters: tuple[str | None, ...] = ()
        self.cache: KVCache | None = None
        self.dropout_seed: int | Mapping[str, int] | None = None
        self._names: tuple[str, ...] = ()
        # What `mixture` found for the pass under way, in a list so that None is an answer too.
        self._mixture: list[Mixture | None] = []
        self.recomputing = False

    @contextmanager
    def over(
        self,
        boundaries: Sequence[int],
        adapters: Sequence[str | None],
        *,
        cache: KVCache | None = None,
        dropout_seed: int | Mapping[str, int] | None = None,
    ) -> Iterator[None]:
        """Set the route for one pass, its backward included (recomputation reads it again)."""
        assert len(adapters) == len(boundaries) - 1, "one adapter for each document"
        before = (self.boundaries, self.adapters, self.cache, self.dropout_seed, self._mixture)
        self.boundaries, self.adapters, self._mixture = tuple(boundaries), tuple(adapters), []
        self.cache, self.dropout_seed = cache, dropout_seed
        try:
            yield
        finally:
            self.boundaries, self.adapters, self.cache, self.dropout_seed, self._mixture = before

    def dropout_seed_of(self, adapter: str) -> int | None:
        """What this adapter's dropout is drawn from: nothing that another adapter could change."""
        if isinstance(self.dropout_seed, Mapping):
            return self.dropout_seed.get(adapter)
        return self.dropout_seed

    def segments(self) -> tuple[tuple[str | None, int, int], ...]:
        """Runs of neighbouring documents that read the same adapter: `(adapter, start, stop)`.

        Boundaries 0, 3, 5, 9 with adapters a, a, b give `(("a", 0, 5), ("b", 5, 9))`.
        """
        return _segments(self.boundaries, self.adapters)

    def mixture(self, device: torch.device) -> Mixture | None:
        """The pass by adapter; None where it is long or bare, or where documents without an
        adapter do not come first: then `segments` serves."""
        if not self._mixture:
            self._mixture.append(self._gathered(device))
        return self._mixture[0]

    def _gathered(self, device: torch.device) -> Mixture | None:
        named = frozenset(name for name in self.adapters if name is not None)
        if not named or self.boundaries[-1] > MOST_MIXED_TOKENS:
            return None
        if len(named) == 1:  # as alone, to the bit, whoever was read before
            return _mixture(self.boundaries, self.adapters, tuple(named), device)
        if not named.issubset(self._names) or len(self._names) > 2 * len(named):
            # A name that was just read is likely back soon: what was stacked for it stays, as long
            # as half of the groups are in use.
            both = named.union(self._names)
            self._names = tuple(sorted(both if len(both) <= 2 * len(named) else named))
        return _mixture(self.boundaries, self.adapters, self._names, device)


# These depend on their arguments alone, and every layer of a pass asks for them.
@lru_cache(maxsize=16)
def _segments(
    boundaries: tuple[int, ...], adapters: tuple[str | None, ...]
) -> tuple[tuple[str | None, int, int], ...]:
    runs: list[tuple[str | None, int, int]] = []
    for name, (start, stop) in zip(adapters, pairwise(boundaries), strict=True):
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1], stop)
        else:
            runs.append((name, start, stop))
    return tuple(runs)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _mixture(
    boundaries: tuple[int, ...],
    adapters: tuple[str | None, ...],
    names: tuple[str, ...],
    device: torch.device,
) -> Mixture | None:
    reads = [
        name
        for name, (a, b) in zip(adapters, pairwise(boundaries), strict=True)
        for _ in range(a, b)
    ]
    bare = next(at for at, name in enumerate(reads) if name is not None)
    counts = Counter(reads[bare:])
    most = max(counts.values())
    filled = len(names) * most - len(reads) + bare
    if None in counts or filled > MOST_FILLED_PLACES * len(counts):
        return None
    if reads[bare:] == [name for name in names for _ in range(most)]:
        return Mixture(names, bare, most, None, None)
    group = {name: at for at, name in enumerate(names)}
    taken = [0] * len(names)
    gather = [bare] * (len(names) * most)
    back = []
    for token, name in enumerate(reads[bare:], bare):
        assert name is not None
        at = group[name]
        back.append(at * most + taken[at])
        gather[back[-1]] = token
        taken[at] += 1
    return Mixture(
        names, bare, most, torch.tensor(gather, device=device), torch.tensor(back, device=device)
    )
