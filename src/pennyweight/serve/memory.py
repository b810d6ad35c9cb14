"""The device's memory beside the base under one account: adapters, keys and values, passes, jobs.

The model does one piece of work at a time, so of all passes only the largest is reserved. A part is
kept for answers, which jobs never take; while a job waits for memory, answers get no more than that
part, so that whatever ends gives its memory to the job. So neither waits for the other for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pennyweight.attention import KEYS_AND_VALUES
from pennyweight.budget import MemoryBudget
from pennyweight.config import RunConfig
from pennyweight.errors import AdapterError, ConfigError, MemoryExhausted
from pennyweight.finetune import EVALUATION_TOKENS, data_size
from pennyweight.generate import CHUNK_TOKENS
from pennyweight.lora.bank import ADAPTERS, MASTER_BYTES
from pennyweight.loss import chunk_rows
from pennyweight.model import BaseModel
from pennyweight.plan import (
    Plan,
    as_size,
    forward_bytes,
    named_device,
    parse_memory,
    plan,
    resident_bytes,
    shapes_of,
)
from pennyweight.serve.settings import ServeSettings

if TYPE_CHECKING:
    from pennyweight.data.prepare import Prepared

__all__ = ["Memory", "Need", "left_beside"]

PASSES, TRAINING = "passes", "training"
# Of what the device has left, for what no account knows: the system, others, fragments.
SHARE_USED = 0.9
LEAST_BYTES = 2**28
# Of the part that is kept for answers; the rest of it is kept for adapters.
SHARE_OF_KEYS_AND_VALUES = 2 / 3


@dataclass(frozen=True, slots=True)
class Need:
    """What a job takes: `standing_bytes` from its begin to its end, `pass_bytes` on top of that while
    one of its passes is under way."""

    standing_bytes: int
    pass_bytes: int


class Memory:
    """The account, and who is in it. What changes it is called by the owner of the model alone."""

    def __init__(self, base: BaseModel, settings: ServeSettings) -> None:
        asked = settings.memory
        total = (
            int(SHARE_USED * left_beside(base)) if asked.limit is None else parse_memory(asked.limit)
        )
        self._base, self._shapes = base, shapes_of(settings.base.model)
        self._rows = settings.chat.rows
        kept = int(asked.answers * total)
        floors = {KEYS_AND_VALUES: int(kept * SHARE_OF_KEYS_AND_VALUES)}
        floors[ADAPTERS] = kept - floors[KEYS_AND_VALUES]
        self.jobs_bytes = total - kept
        """What jobs can have at the most, a pass of theirs included."""
        self._answering_bytes = self._forward_bytes(CHUNK_TOKENS + self._rows, self._rows)
        if self._answering_bytes > self.jobs_bytes:
            raise ConfigError(
                f"memory.limit: {as_size(total)} beside the base, of which {as_size(kept)} are kept "
                f"for answers: a step of {self._rows} answers takes {as_size(self._answering_bytes)} "
                "more; raise memory.limit, or lower chat.rows or memory.answers"
            )
        self.budget = MemoryBudget(total, floors)
        self.budget.reserve(PASSES, self._answering_bytes)
        self._needs: dict[str, Need] = {}

    def in_words(self) -> str:
        kept = sum(self.budget.floors.values())
        return (
            f"memory: {as_size(self.budget.total_bytes)} beside the base, {as_size(kept)} of it kept "
            f"for answers, up to {as_size(self.jobs_bytes)} for jobs"
        )

    def need(self, run: RunConfig, data: Prepared) -> Need:
        """What a run, resolved or not, takes. MemoryExhausted where it never fits, with the mend."""
        size = data_size(data)
        said = plan(
            run,
            self._shapes,
            device=named_device(run.base.device),
            rows=size,
            beside_bytes=self.jobs_bytes,
        )
        need = Need(said.standing_bytes, max(said.pass_bytes, self._evaluation_bytes(run, data)))
        wanted = need.standing_bytes + need.pass_bytes
        if wanted > self.jobs_bytes:
            raise MemoryExhausted(
                f"the job needs {as_size(wanted)} beside the base, {as_size(need.standing_bytes)} of "
                f"it for adapter and optimizer; jobs can have {as_size(self.jobs_bytes)} here: "
                f"{_mend(said)}"
            )
        self._refuse_large(MASTER_BYTES * said.trained_parameters, "the job's adapter", "lora.r")
        return need

    def require_room(self, parameters: int) -> None:
        """AdapterError for an adapter that may never find room beside the base."""
        self._refuse_large(MASTER_BYTES * parameters, "the adapter", "its rank")

    def admit(self, name: str, need: Need, make_room: Callable[[int, str], object]) -> bool:
        """Give a job its memory; False: it waits, and what others give back is kept for it.

        `make_room(bytes, purpose)` moves what is idle out of the way.
        """
        wanted = self._held_by([*self._needs.values(), need]) - self._held_by(self._needs.values())
        make_room(wanted, TRAINING)
        if not self.budget.reserve(TRAINING, wanted):
            self.budget.waiting = TRAINING
            return False
        self._needs[name], self.budget.waiting = need, None
        return True

    def leave(self, name: str) -> None:
        """A job has ended, however; nothing where it was not admitted."""
        before = self._held_by(self._needs.values())
        if self._needs.pop(name, None) is not None:
            self.budget.release(TRAINING, before - self._held_by(self._needs.values()))

    def nobody_waits(self) -> None:
        """The job that waited does not wait any more."""
        self.budget.waiting = None

    def waiting_in_words(self, need: Need) -> str:
        wanted = need.standing_bytes + need.pass_bytes
        return (
            f"The job waits for memory: it needs up to {as_size(wanted)}, "
            f"{as_size(self.budget.free_for(TRAINING))} are free of the {as_size(self.jobs_bytes)} "
            "that jobs can have"
        )

    def _held_by(self, needs: object) -> int: ...
