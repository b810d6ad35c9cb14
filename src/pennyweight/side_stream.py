"""Copies between a card and pinned host memory, on a stream of their own beside the computation.

On a CPU the same calls copy there and then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SideStream"]


class SideStream:
    """One stream for copies to and from `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def host_buffer(self, shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros in host memory, pinned where a card will read or write them."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self.stream is not None)

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Copies asked for within begin once what was asked of the device before is done."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def reached(self) -> Any:
        """What `wait` waits for: all copies asked for so far. None where they are done."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Let computation that is asked for from now on wait for an event of `reached`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def reads(self, tensor: Tensor) -> None:
        """Let a device tensor's memory be used again only after the copies that read it."""
        if self.stream is not None:
            tensor.record_stream(self.stream)

    def settle(self) -> None:
        """Wait until every copy is done."""
        if self.stream is not None:
            self.stream.synchronize()
