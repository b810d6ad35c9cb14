"""Many adapters beside one resident base: immutable versions, movable names, idle ones in host memory.

A version is named by the hash of its content (`content_hash`), and that name is also the slot
that documents and requests read; a name such as `sql` points at a version and may move on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.budget import MemoryBudget
from pennyweight.errors import AdapterError, MemoryExhausted
from pennyweight.lora.adapter import Adapter, content_hash
from pennyweight.lora.binding import adapter_of, attach, check_name, detach
from pennyweight.lora.fit import Resident, check_fit

__all__ = ["ADAPTERS", "MASTER_BYTES", "AdapterBank", "on_host", "reserve"]

MASTER_BYTES = 4
ADAPTERS = "adapters"


@dataclass(slots=True)
class _Version:
    """One version: `told` is the adapter without tensors; `host` holds them while it rests."""

    told: Adapter
    size_bytes: int
    host: Adapter | None
    reading: int = 0


class AdapterBank:
    """Adapters to read beside one base, loaded, named, rested and unloaded while it serves.

    `budget`: the device's account; None takes what is asked. `in_use()`: slots that requests under
    way read, beside those of `reading`; a slot in use is never moved. `resting` False: what makes
    room is forgotten, for a base that stands in host memory itself and adapters kept elsewhere.
    """

    def __init__(
        self,
        base: Resident,
        budget: MemoryBudget | None = None,
        *,
        in_use: Callable[[], Collection[str]] = tuple,
        resting: bool = True,
    ) -> None:
        self.base, self.budget, self._in_use, self._resting = base, budget, in_use, resting
        self._versions: dict[str, _Version] = {}  # least recently read first
        self._names: dict[str, str] = {}

    def load(self, adapter: Adapter, name: str | None = None) -> str:
        """Take an adapter in and, with `name`, point that name at it; gives its version.

        The same content is the same version. AdapterError where it does not fit the base;
        MemoryExhausted says what is needed, what is free, and the mend; then nothing has changed.
        """
        if name is not None:
            check_name(name)
        version = content_hash(adapter)
        if version not in self._versions:
            check_fit(self.base, adapter)
            told = replace(adapter, factors={}, saved={})
            size = MASTER_BYTES * adapter.parameters
            self._reserve(name or version[:12], size)
            attach(self.base, adapter, name=version, trainable=False)
            self._versions[version] = _Version(told, size, None)
        if name is not None:
            self._names[name] = version
        return version

    def unload(self, key: str) -> None:
        """Forget a name; of a version, the version and every name that points at it.

        AdapterError while somebody reads it.
        """
        if self._names.pop(key, None) is not None:
            return
        version = self.version(key)
        self._refuse_in_use(version)
        if self._versions[version].host is None:
            self._take_off(version)
        del self._versions[version]
        self._names = {name: at for name, at in self._names.items() if at != version}

    def point(self, name: str, key: str) -> None:
        """Let a name stand for another version from now on; whoever reads the old one reads on."""
        self._names[check_name(name)] = self.version(key)

    def version(self, key: str) -> str:
        """The version that a name, or a version itself, stands for; AdapterError lists what there is."""
        version = self._names.get(key, key)
        if version not in self._versions:
            there = ", ".join(self._names) or "none"
            raise AdapterError(f"no adapter {key!r} in the bank; names there are: {there}")
        return version

    def names(self) -> dict[str, str]:
        """Every name, and the version it stands for."""
        return dict(self._names)

    def versions(self) -> tuple[str, ...]:
        return tuple(self._versions)

    def resident(self) -> tuple[str, ...]:
        """Versions beside the base's layers, least recently read first; the others rest."""
        return tuple(v for v, it in self._versions.items() if it.host is None)

    def slot(self, key: str) -> str:
        """What documents name to read it, awake: its version."""
        version = self.version(key)
        self.wake(version)
        self._versions[version] = self._versions.pop(version)
        return version

    @contextmanager
    def reading(self, *keys: str) -> Iterator[tuple[str, ...]]:
        """Their slots, none of which is moved or unloaded meanwhile."""
        held: list[_Version] = []
        try:
            slots = []
            for key in keys:
                slots.append(self.slot(key))
                held.append(self._versions[slots[-1]])
                held[-1].reading += 1
            yield tuple(slots)
        finally:
            for version in held:
                version.reading -= 1

    def read(self, key: str) -> Adapter:
        """The adapter as a value, its tensors copied to host memory."""
        version = self.version(key)
        kept = self._versions[version]
        return kept.host or self._taken(version, kept)

    def rest(self, key: str) -> None:
        """Move it to host memory; the base's layers stand without it. AdapterError while it is read."""
        version = self.version(key)
        kept = self._versions[version]
        if kept.host is not None:
            return
        self._refuse_in_use(version)
        kept.host = self._taken(version, kept)
        self._take_off(version)

    def wake(self, key: str) -> None:
        """Put it beside the base's layers again, with the same bits. MemoryExhausted as `load`."""
        version = self.version(key)
        kept = self._versions[version]
        if kept.host is None:
            return
        self._reserve(key[:12], kept.size_bytes)
        attach(self.base, kept.host, name=version, trainable=False)
        kept.host = None

    @property
    def room_bytes(self) -> int | None:
        """What further adapters could take now, every idle one moved; None: as much as is asked."""
        if self.budget is None:
            return None
        idle = (v for v in self.resident() if not self._is_in_use(v))
        return self.budget.free_for(ADAPTERS) + sum(self._versions[v].size_bytes for v in idle)

    def make_room(self, wanted_bytes: int, purpose: str = ADAPTERS) -> None:
        """Move idle versions to host memory, least recently read first, until so much is free for
        that purpose or all rest."""
        for version in self.resident():
            if self.budget is None or self.budget.free_for(purpose) >= wanted_bytes:
                return
            if not self._is_in_use(version):
                self.rest(version) if self._resting else self.unload(version)

    def _take_off(self, version: str) -> None:
        detach(self.base, version)
        if self.budget is not None:
            self.budget.release(ADAPTERS, self._versions[version].size_bytes)

    def _reserve(self, name: str, wanted_bytes: int) -> None:
        if self.budget is None:
            return
        self.make_room(wanted_bytes)
        reserve(self.budget, ADAPTERS, wanted_bytes, f"adapter {name}")

    def _taken(self, version: str, kept: _Version) -> Adapter:
        live = adapter_of(self.base, version, kept.told.config)
        return replace(
            kept.told,
            factors={path: (on_host(a), on_host(b)) for path, (a, b) in live.factors.items()},
            saved={path: on_host(weight) for path, weight in live.saved.items()},
        )

    def _is_in_use(self, version: str) -> bool:
        return bool(self._versions[version].reading) or version in self._in_use()

    def _refuse_in_use(self, version: str) -> None:
        if self._is_in_use(version):
            names = [name for name, at in self._names.items() if at == version]
            raise AdapterError(
                f"adapter {', '.join(names) or version[:12]} is being read; wait until its requests "
                "have ended"
            )


def reserve(budget: MemoryBudget, purpose: str, wanted_bytes: int, what: str) -> None:
    """Take so many bytes of the account, or MemoryExhausted with figures and the mend."""
    if budget.reserve(purpose, wanted_bytes):
        return
    held = ", ".join(f"{_mb(size)} for {name}" for name, size in budget.held().items())
    raise MemoryExhausted(
        f"{what} needs {_mb(wanted_bytes)}, {_mb(budget.free_for(purpose))} of "
        f"{_mb(budget.total_bytes)} are free ({held or 'nothing is held'}): unload an adapter or let a run end, lower "
        "adapter.r, or give more memory"
    )


def on_host(tensor: Tensor) -> Tensor:
    """A float32 copy in host memory, pinned where a GPU will read it back."""
    copy = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    return copy.pin_memory() if tensor.is_cuda else copy


def _mb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
