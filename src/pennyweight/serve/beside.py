"""Adapters that stand beside the base at this moment; the one longest unused makes room."""

from __future__ import annotations

from collections import Counter, OrderedDict

from pennyweight.lora import attach, detach
from pennyweight.model import BaseModel
from pennyweight.serve.versions import Versions

__all__ = ["Beside"]


class Beside:
    """Versions attached under their own hash; only the owner of the model calls this."""

    def __init__(self, base: BaseModel, versions: Versions, most: int) -> None:
        self._base, self._versions, self._most = base, versions, most
        self._attached: OrderedDict[str, None] = OrderedDict()
        self._held: Counter[str] = Counter()

    def hold(self, version: str) -> None:
        """Have it attached until it is let go. AdapterError: it is not of this base."""
        if version not in self._attached:
            self._make_room()
            attach(self._base, self._versions.load(version), name=version, trainable=False)
            self._attached[version] = None
        self._attached.move_to_end(version)
        self._held[version] += 1

    def release(self, version: str) -> None:
        self._held[version] -= 1
        if not self._held[version]:
            del self._held[version]

    def clear(self) -> None:
        """Leave the base bare."""
        for version in self._attached:
            detach(self._base, version)
        self._attached.clear()
        self._held.clear()

    def _make_room(self) -> None:
        idle = [version for version in self._attached if version not in self._held]
        for version in idle[: max(0, 1 + len(self._attached) - self._most)]:
            detach(self._base, version)
            del self._attached[version]
