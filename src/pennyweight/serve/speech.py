"""Generated ids to text as it may be told: whole characters, up to a stop text, and never past it."""

from __future__ import annotations

from collections.abc import Sequence

from pennyweight.data.chat import Renderer

__all__ = ["Speech"]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 4  # ids before a piece that its text depends on (a leading space, say)


class Speech:
    """One answer's text. `add` gives what can be told now; `stopped` once a stop text came."""

    def __init__(self, renderer: Renderer, stops: Sequence[str] = ()) -> None:
        self._renderer, self._stops = renderer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        # What is decoded is ids[from:], and the text of ids[from:told] is told.
        self._from, self._told = 0, 0
        self._held = ""
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        """Text that these ids complete."""
        if self.stopped:
            return ""
        self._ids += ids
        before = self._renderer.decode(self._ids[self._from : self._told])
        whole = self._renderer.decode(self._ids[self._from :])
        # A character of several tokens shows as a replacement until its last one is here.
        if whole.endswith(UNFINISHED) or len(whole) <= len(before):
            return ""
        piece = whole[len(before) :]
        self._from, self._told = max(self._from, len(self._ids) - _CONTEXT), len(self._ids)
        if self._from and self._renderer.decode(self._ids[self._from :]).startswith(UNFINISHED):
            self._from = 0  # no clean place to begin: decode it whole
        return self._through_stops(piece)

    def end(self) -> str:
        """What was held back, when nothing more comes."""
        if self.stopped:
            return ""
        before = self._renderer.decode(self._ids[self._from : self._told])
        rest = self._renderer.decode(self._ids[self._from :])[len(before) :]
        self._told = len(self._ids)
        text = self._through_stops(rest)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _through_stops(self, piece: str) -> str:
        """The text without what might be the beginning of a stop text.

        The stop that is whole first ends it, and of those that end together the longest, so that
        how the text came in pieces does not matter.
        """
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        kept = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]
