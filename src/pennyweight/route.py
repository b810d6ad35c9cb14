"""What one forward pass is about: where documents end, which adapter each reads, what is remembered.

Models from transformers take token ids; they have no argument for "these tokens belong to
document 3, which reads adapter `sql`". A `Route` is that argument. One stands beside each
resident base; attention and adapter layers hold a reference to it and read it, and only the
callers of a pass set it (`with route.over(...)`). Tokens always travel as one flat row
`[1, tokens]`, so nothing is ever padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pennyweight.attention import KVCache

__all__ = ["Route"]


class Route:
    """The documents of the pass under way.

    `boundaries`: `[documents + 1]` offsets into the flat row, from 0 to the token count.
    `adapters`: for each document the adapter it reads, or None for the bare base.
    `cache`: keys and values of earlier tokens while generating, else None.
    `backend`: how attention keeps documents apart (`BaseConfig.attention`); set once at load.
    `dropout_seed`: what adapter dropout is drawn from, or None for no dropout.
    """

    def __init__(self) -> None:
        self.backend: str = "auto"
        self.boundaries: tuple[int, ...] = ()
        self.adapters: tuple[str | None, ...] = ()
        self.cache: KVCache | None = None
        self.dropout_seed: int | None = None

    @contextmanager
    def over(
        self,
        boundaries: Sequence[int],
        adapters: Sequence[str | None],
        *,
        cache: KVCache | None = None,
        dropout_seed: int | None = None,
    ) -> Iterator[None]:
        """Set the route for one pass, its backward included (recomputation reads it again)."""
        assert len(adapters) == len(boundaries) - 1, "one adapter for each document"
        before = (self.boundaries, self.adapters, self.cache, self.dropout_seed)
        self.boundaries, self.adapters = tuple(boundaries), tuple(adapters)
        self.cache, self.dropout_seed = cache, dropout_seed
        try:
            yield
        finally:
            self.boundaries, self.adapters, self.cache, self.dropout_seed = before

    def segments(self) -> list[tuple[str | None, int, int]]:
        """Runs of neighbouring documents that read the same adapter: `(adapter, start, stop)`.

        Boundaries 0, 3, 5, 9 with adapters a, a, b give `[("a", 0, 5), ("b", 5, 9)]`.
        """
        runs: list[tuple[str | None, int, int]] = []
        spans = zip(self.boundaries, self.boundaries[1:], strict=False)
        for name, (start, stop) in zip(self.adapters, spans, strict=True):
            if runs and runs[-1][0] == name:
                runs[-1] = (name, runs[-1][1], stop)
            else:
                runs.append((name, start, stop))
        return runs
