"""One contract for training many adapters, for a job service and for single runs, by adapter:
`forward_backward`, `optim_step`, `sample`, `save_state`.

Each adapter has its own optimizer, step count, schedule, clip norm, weight decay, data order and
dropout seed, and nothing of one reads or writes anything of another. `exact`: a pass holds one
adapter, so each ends as it would alone, to the bit. `fast`: adapters share a pass, within rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pennyweight.budget import MemoryBudget
from pennyweight.config import LoraConfig, TrainConfig
from pennyweight.data.batch import Batch
from pennyweight.errors import AdapterError, MemoryExhausted
from pennyweight.generate import Completion, Decoding, Request, generate
from pennyweight.lora import Adapter, adapter_of, attach, detach, parameters_of, trained_parameters
from pennyweight.lora.bank import AdapterBank, on_host, reserve
from pennyweight.model import BaseModel
from pennyweight.train import (
    CheckpointState,
    Step,
    Trainee,
    forward_backward_together,
    learner,
    load_latest,
    require_same,
    save,
)

__all__ = ["Engine", "Mode", "Passed"]

Mode = Literal["exact", "fast"]
# A trained number's master, gradient and two moments, all float32.
TRAINED_BYTES = 16
PURPOSE = "training"


@dataclass(frozen=True, slots=True, eq=False)
class Passed:
    """What a micro-batch came to: its loss in nats, summed over `count` trained tokens; or why it
    failed, which is that adapter's affair alone."""

    total: Tensor | None
    count: int
    fault: MemoryExhausted | None = None


@dataclass(slots=True)
class _Trained:
    """One adapter that learns; `host` holds its tensors and progress while it rests."""

    config: LoraConfig
    train: TrainConfig
    total_steps: int
    seed: int
    size_bytes: int
    trainee: Trainee | None = None
    host: tuple[dict[str, Tensor], dict[str, Any]] | None = None


class Engine:
    """A resident base, the bank beside it, the adapters that train on it, and its generation.

    One thread owns an engine. `budget`: the account that adapters, optimizer states and keys and
    values draw on; None takes what is asked.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        mode: Mode = "exact",
        budget: MemoryBudget | None = None,
        batch_size: int = 16,
    ) -> None:
        self.base, self.mode, self.budget = base, mode, budget
        self.decoding = Decoding(base, batch_size=batch_size, budget=budget)
        self.bank = AdapterBank(base, budget, in_use=self.decoding.adapters)
        self._trained: dict[str, _Trained] = {}

    def begin(
        self,
        name: str,
        what: LoraConfig | Adapter,
        train: TrainConfig,
        *,
        total_steps: int,
        seed: int = 0,
    ) -> None:
        """Let an adapter learn under this name, fresh or from what it learned before.

        MemoryExhausted, with figures, before anything is allocated.
        """
        if name in self._trained or name in self.bank.names():
            raise AdapterError(f"an adapter named {name!r} is here already; choose another name")
        config = what.config if isinstance(what, Adapter) else what
        numbers = parameters_of(self.base, config)
        entry = _Trained(config, train, total_steps, seed, TRAINED_BYTES * numbers)
        self._reserve(name, entry.size_bytes)
        try:
            self._put(name, entry, what)
        except BaseException:
            self._release(entry)
            raise
        self._trained[name] = entry

    def forward_backward(self, batches: Mapping[str, Batch]) -> dict[str, Passed]:
        """Add each adapter's gradient of the summed loss of its micro-batch, until `optim_step`.

        In `fast` they share one pass; what cannot be shared, and all of `exact`, goes one by one.
        """
        shares = [
            (self._learning(name), replace(batch, adapters=(name,) * len(batch.adapters)))
            for name, batch in batches.items()
        ]
        if self.mode == "fast":
            found = forward_backward_together(shares).found
        else:
            found = [forward_backward_together([share]).found[0] for share in shares]
        return {name: _passed(each) for name, each in zip(batches, found, strict=True)}

    def optim_step(self, name: str, *, epoch: float = 0.0) -> Step:
        """One optimizer step of this adapter. DivergedError after too many that are not finite."""
        return self._learning(name).optim_step(epoch=epoch)

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer requests, whose `adapter` is a name of the bank or of one that learns."""
        return generate(self.base, [self.routed(request) for request in requests])

    def routed(self, request: Request) -> Request:
        """The request with the slot its adapter's name stands for, awake; for `decoding.add`."""
        name = request.adapter
        if name is None:
            return request
        if name in self._trained:
            self._learning(name)
            return request
        return replace(request, adapter=self.bank.slot(name))

    def save_state(self, name: str, folder: Path) -> Path:
        """A checkpoint of this adapter between two steps: weights, optimizer, counters."""
        entry = self._entry(name)
        tensors, progress = self._state(entry)
        step = int(progress["step"])
        return save(folder, CheckpointState(step, tensors, progress, self._identity(entry)))

    def load_state(self, name: str, folder: Path) -> int:
        """Take up the newest whole checkpoint; gives its step. ConfigError where it is another's."""
        found = load_latest(folder)
        if found is None:
            raise AdapterError(f"{folder}: no checkpoint of {name!r} is there")
        state, _ = found
        require_same(state.identity, self._identity(self._entry(name)))
        self._learning(name).restore(state.tensors, state.progress)
        return state.step

    def keep(self, name: str) -> str:
        """What this adapter has learned so far as a version of the bank, for which `name` stands
        there once it has ended; gives the version."""
        entry = self._entry(name)
        self._learning(name)
        live = adapter_of(self.base, name, entry.config)
        kept = replace(
            live,
            factors={path: (on_host(a), on_host(b)) for path, (a, b) in live.factors.items()},
            saved={path: on_host(weight) for path, weight in live.saved.items()},
        )
        return self.bank.load(kept, name)

    def end(self, name: str) -> None:
        """Forget an adapter that learned, its optimizer with it."""
        self.rest(name)
        del self._trained[name]

    def rest(self, name: str) -> None:
        """Move weights and optimizer state to host memory; between two steps only."""
        entry = self._entry(name)
        if entry.trainee is None:
            return
        if name in self.decoding.adapters():
            raise AdapterError(
                f"adapter {name!r} is being read; wait until its requests have ended"
            )
        tensors, progress = self._state(entry)
        entry.host = {key: on_host(tensor) for key, tensor in tensors.items()}, progress
        entry.trainee = None
        detach(self.base, name)
        self._release(entry)

    def wake(self, name: str) -> None:
        """Take it up again with the same bits; MemoryExhausted where there is no room."""
        self._learning(name)

    def learning(self) -> dict[str, bool]:
        """Every adapter that learns, and whether it is beside the base now."""
        return {name: entry.trainee is not None for name, entry in self._trained.items()}

    def _entry(self, name: str) -> _Trained:
        if name not in self._trained:
            there = ", ".join(self._trained) or "none"
            raise AdapterError(f"no adapter named {name!r} learns here; those that do: {there}")
        return self._trained[name]

    def _learning(self, name: str) -> Trainee:
        entry = self._entry(name)
        if entry.trainee is None:
            assert entry.host is not None
            self._reserve(name, entry.size_bytes)
            try:
                self._put(name, entry, entry.config).restore(*entry.host)
            except BaseException:
                entry.trainee = None
                self._release(entry)
                raise
            entry.host = None
        assert entry.trainee is not None
        return entry.trainee

    def _put(self, name: str, entry: _Trained, what: LoraConfig | Adapter) -> Trainee:
        """Attach it with an optimizer of its own."""
        attach(self.base, what, name=name, seed=entry.seed)
        try:
            entry.trainee = learner(
                self.base,
                trained_parameters(self.base, name),
                entry.train,
                total_steps=entry.total_steps,
                seed=entry.seed,
                loraplus_lr_ratio=entry.config.loraplus_lr_ratio,
            )
        except BaseException:
            detach(self.base, name)
            raise
        return entry.trainee

    def _reserve(self, name: str, wanted_bytes: int) -> None:
        if self.budget is None:
            return
        self.bank.make_room(wanted_bytes, PURPOSE)
        for other, entry in self._trained.items():
            idle = entry.trainee is not None and not entry.trainee.under_way
            if self.budget.free_for(PURPOSE) < wanted_bytes and idle and other != name:
                self.rest(other)
        reserve(self.budget, PURPOSE, wanted_bytes, f"training adapter {name}")

    def _release(self, entry: _Trained) -> None:
        if self.budget is not None:
            self.budget.release(PURPOSE, entry.size_bytes)

    @staticmethod
    def _state(entry: _Trained) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if entry.trainee is None:
            assert entry.host is not None
            return entry.host
        return entry.trainee.tensors(), entry.trainee.progress()

    def _identity(self, entry: _Trained) -> dict[str, str]:
        return {
            "base": self.base.fingerprint,
            "adapter": repr(entry.config),
            "train": repr(entry.train),
            "total_steps": str(entry.total_steps),
            "seed": str(entry.seed),
        }


def _passed(found: tuple[Tensor, int] | MemoryExhausted) -> Passed:
    if isinstance(found, MemoryExhausted):
        return Passed(None, 0, found)
    return Passed(*found)
