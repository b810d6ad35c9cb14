"""Optimizer state in pages: runs of bytes that lie on the device or in host memory.

On a card host pages are pinned, and copies run on a stream of their own while the step of the page
before computes; nothing is left to the driver's paging. On a CPU the same code moves between two
buffers of the same memory. What a page holds never depends on where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.side_stream import SideStream

__all__ = ["Page", "Pager", "Slot"]

_ALIGNED = 256


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor's place in a page."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    bytes: int


class Page:
    """Named tensors in one run of bytes, zeros at first."""

    def __init__(self, tensors: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.slots: list[Slot] = []
        end = 0
        for shape, dtype in tensors:
            count = 1
            for size in shape:
                count *= size
            self.slots.append(Slot(shape, dtype, end, count * dtype.itemsize))
            end += -(-count * dtype.itemsize // _ALIGNED) * _ALIGNED
        self.bytes = end
        self.here: Tensor | None = None
        self.host: Tensor | None = None
        self.arrived: Any = None

    def tensors(self) -> list[Tensor]:
        """Its tensors where they lie now: views, in the order given."""
        data = self.here if self.here is not None else self.host
        assert data is not None
        return [data[s.start : s.start + s.bytes].view(s.dtype).view(s.shape) for s in self.slots]


class Pager:
    """Moves pages so that between uses at most `resident_bytes` of them lie on the device.

    Pages are used in the same order step after step, so the first ones that fit stay, and the rest
    pass through: the next one comes while one is in use, and goes back when it was used.
    """

    def __init__(
        self, pages: Sequence[Page], device: torch.device, resident_bytes: int | None
    ) -> None:
        self.pages, self.device = list(pages), device
        self.resident_bytes = resident_bytes
        self.moved_bytes = 0
        self._side = SideStream(device)
        staying = 0
        for page in self.pages:
            staying += page.bytes
            if resident_bytes is None or staying <= resident_bytes:
                page.here = torch.zeros(page.bytes, dtype=torch.uint8, device=device)
            else:
                page.host = self._host_buffer(page)

    @property
    def here_bytes(self) -> int:
        """Bytes of state on the device now."""
        return sum(page.bytes for page in self.pages if page.here is not None)

    def fetch(self, place: int) -> None:
        """Begin to bring the page to the device, if there is one and it is not there."""
        if place >= len(self.pages) or self.pages[place].here is not None:
            return
        page = self.pages[place]
        assert page.host is not None
        with self._side.copying():
            page.here = torch.empty(page.bytes, dtype=torch.uint8, device=self.device)
            page.here.copy_(page.host, non_blocking=True)
        self.moved_bytes += page.bytes
        page.arrived = self._side.reached()

    def using(self, place: int) -> Page:
        """The page, on the device and ready, with the one after it on its way."""
        self.fetch(place)
        self.fetch(place + 1)
        page = self.pages[place]
        self._side.wait(page.arrived)
        page.arrived = None
        return page

    def used(self, place: int) -> None:
        """Let the page go back to host memory if it is not one of those that stay."""
        stays = self.resident_bytes is None or (
            sum(page.bytes for page in self.pages[: place + 1]) <= self.resident_bytes
        )
        if not stays:
            self._leave(self.pages[place])

    def relieve(self) -> int:
        """Move every page off the device, for good; gives the bytes that are free now.

        MemoryError where host memory does not do either.
        """
        freed = self.here_bytes
        self.resident_bytes = 0
        for page in self.pages:
            if page.here is not None:
                self._leave(page)
        self.settle()
        return freed

    def _leave(self, page: Page) -> None:
        assert page.here is not None
        if page.host is None:
            page.host = self._host_buffer(page)
        with self._side.copying():
            page.host.copy_(page.here, non_blocking=True)
        self._side.reads(page.here)
        self.moved_bytes += page.bytes
        page.here, page.arrived = None, None

    def settle(self) -> None:
        """Wait until what lies in host memory can be read there."""
        self._side.settle()

    def _host_buffer(self, page: Page) -> Tensor:
        return self._side.host_buffer(page.bytes, torch.uint8)
