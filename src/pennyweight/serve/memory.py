"""The device's memory beside the base under one account: adapters, keys and values, passes, jobs.

The model does one piece of work at a time, so of all passes only the largest is reserved. A part is
kept for answers, which jobs never take; while a job waits for memory, answers get no more than that
part, so that whatever ends gives its memory to the job. So neither waits for the other for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from pennyweight.attention import KEYS_AND_VALUES
from pennyweight.budget import MemoryBudget
from pennyweight.config import RunConfig, resolve
from pennyweight.data.prepare import Prepared
from pennyweight.errors import AdapterError, ConfigError, MemoryExhausted
from pennyweight.finetune import EVALUATION_TOKENS, data_size
from pennyweight.generate import CHUNK_TOKENS
from pennyweight.lora.bank import ADAPTERS, MASTER_BYTES
from pennyweight.loss import chunk_rows
from pennyweight.model import BaseModel
from pennyweight.plan import (
    Device,
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
            int(SHARE_USED * left_beside(base))
            if asked.limit is None
            else parse_memory(asked.limit)
        )
        self._base, self._shapes = base, shapes_of(str(base.folder))
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

    def planned(self, run: RunConfig, data: Prepared, device: Device | None = None) -> Plan:
        """The plan of a run in the memory that jobs can have; `device`: one whose speed is known."""
        run = resolve(run)
        return plan(
            run,
            self._shapes,
            device=device or named_device(run.base.device),
            rows=data_size(data),
            beside_bytes=self.jobs_bytes,
        )

    def need(self, run: RunConfig, data: Prepared) -> Need:
        """What a run takes. MemoryExhausted where it never fits, with the mend."""
        said = self.planned(run, data)
        need = Need(said.standing_bytes, max(said.pass_bytes, self._evaluation_bytes(run, data)))
        wanted = need.standing_bytes + need.pass_bytes
        if wanted > self.jobs_bytes:
            raise MemoryExhausted(
                f"the job needs {as_size(wanted)} beside the base, {as_size(need.standing_bytes)} of "
                f"it for adapter and optimizer; jobs can have {as_size(self.jobs_bytes)} here: "
                f"{_mend(said, self.jobs_bytes)}"
            )
        if why := self._large(said.trained_parameters):
            raise MemoryExhausted(f"what the job makes could not be asked: {why}")
        return need

    def require_room(self, parameters: int) -> None:
        """AdapterError for an adapter that may never find room beside the base."""
        if why := self._large(parameters):
            raise AdapterError(why)

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

    def _held_by(self, needs: Iterable[Need]) -> int:
        """Standing bytes of all, and by how much their largest pass is more than that of answers."""
        needs = list(needs)
        largest = max([self._answering_bytes, *(need.pass_bytes for need in needs)])
        return sum(n.standing_bytes for n in needs) + largest - self._answering_bytes

    def _evaluation_bytes(self, run: RunConfig, data: Prepared) -> int:
        """The largest pass over held-out rows; 0 where there are none."""
        lengths = data.eval[: run.evaluate.max_rows].lengths
        if not len(lengths):
            return 0
        tokens = min(int(sum(lengths)), max(EVALUATION_TOKENS, int(max(lengths))))
        chunk = chunk_rows(self._shapes.vocab, self._base.device)
        return self._forward_bytes(tokens, min(tokens, chunk))

    def _forward_bytes(self, tokens: int, logits: int) -> int:
        return forward_bytes(
            self._shapes,
            tokens,
            product_bytes=self._base.dtype.itemsize,
            logits=logits,
            quantized=self._base.quantization != "none",
        )

    def _large(self, parameters: int) -> str | None:
        """Why an adapter of so many numbers could wait for ever to be asked; None where it could not."""
        size, kept = MASTER_BYTES * parameters, self.budget.floors[ADAPTERS]
        if size <= kept:
            return None
        return (
            f"the adapter takes {as_size(size)}, and {as_size(kept)} are kept for adapters here: "
            "lower its rank, or let the operator raise memory.limit or memory.answers"
        )


def left_beside(base: BaseModel) -> int:
    """Bytes that the device has left beside the base, as it stands in memory now."""
    device = named_device(str(base.device))
    if device.kind == "cuda":
        held = torch.cuda.memory_allocated(base.device)
    else:
        held = resident_bytes() or 0
    return max(LEAST_BYTES, device.memory_bytes - held)


def _mend(said: Plan, jobs_bytes: int) -> str:
    """What the plan would change, by the names a job's request has for it."""
    if not said.changes:
        return "no smaller batch, length or rank would do; let the operator raise memory.limit"
    text = " ".join(said.changes)
    for ours, theirs in (("train.batch_size", "hyperparameters.batch_size"), ("adapter.", "lora.")):
        text = text.replace(ours, theirs)
    after = (said.peak_after_changes or 0) - (said.budget_bytes - jobs_bytes)
    return f"with {text} it would need {as_size(after)}"
