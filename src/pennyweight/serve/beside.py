"""Adapters that stand beside the base: versions of the data folder as versions of the bank.

What is idle makes room for what is asked: on a card it rests in host memory, and where the base
itself stands in host memory it is forgotten, for its folder holds it.
"""

from __future__ import annotations

from collections import Counter

from pennyweight.budget import MemoryBudget
from pennyweight.errors import MemoryExhausted
from pennyweight.lora.bank import ADAPTERS, MASTER_BYTES, AdapterBank
from pennyweight.model import BaseModel
from pennyweight.serve.versions import Versions

__all__ = ["Beside"]


class Beside:
    """Versions held under their slots in the bank; only the owner of the model calls this.

    At most `most` are in memory, those included that rest.
    """

    def __init__(
        self, base: BaseModel, versions: Versions, *, budget: MemoryBudget, most: int
    ) -> None:
        self._versions, self._budget, self._most = versions, budget, most
        self._held: Counter[str] = Counter()
        self._slots: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        on_host = base.device.type == "cpu"
        self._bank = AdapterBank(base, budget, in_use=self._held.keys, resting=not on_host)
        self.make_room = self._bank.make_room

    def hold(self, version: str) -> str | None:
        """Its slot, where it stays until it is let go; None: it has to wait for memory.

        AdapterError: it is not of this base.
        """
        if self._budget.is_beyond(ADAPTERS):  # a job waits for what idle ones take
            self._bank.make_room(1)
            if self._budget.is_beyond(ADAPTERS):
                return None
        try:
            slot = self._slot(version)
        except MemoryExhausted:
            return None
        if slot is not None:
            self._held[slot] += 1
        return slot

    def release(self, slot: str) -> None:
        self._held[slot] -= 1
        if not self._held[slot]:
            del self._held[slot]

    def clear(self) -> None:
        """Leave the base bare."""
        self._held.clear()
        for slot in self._bank.versions():
            self._bank.unload(slot)

    def _slot(self, version: str) -> str | None:
        slot = self._slots.get(version)
        if slot is not None and slot in self._bank.versions():
            return self._bank.slot(slot)
        room = self._bank.room_bytes
        if room is not None and self._sizes.get(version, 0) > room:
            return None  # not read from the disk again until there is
        adapter = self._versions.load(version)
        self._sizes[version] = MASTER_BYTES * adapter.parameters
        idle = [slot for slot in self._bank.versions() if slot not in self._held]
        for slot in idle[: max(0, 1 + len(self._bank.versions()) - self._most)]:
            self._bank.unload(slot)
        self._slots[version] = self._bank.load(adapter)
        return self._bank.slot(self._slots[version])
