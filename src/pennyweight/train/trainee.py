"""The engine's contract for one adapter: `forward_backward` as often as wanted, then `optim_step`.

Gradients of the summed loss accumulate over micro-batches and are divided once by the count of
trained tokens in the whole optimizer step; never a mean of means.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.data.batch import Batch
from pennyweight.errors import DiskError, DivergedError, MemoryExhausted
from pennyweight.lora.layer import stable_seed
from pennyweight.loss import chunk_rows, sum_type, summed_cross_entropy
from pennyweight.model import BaseModel
from pennyweight.optim import PagedAdamW, load_state_tensors, set_learning_rate, state_tensors
from pennyweight.train.memory import is_out_of_memory, parts, release_cached
from pennyweight.train.recompute import Recompute, host_store, recomputing

__all__ = ["Step", "Trainee"]

_MOST_SKIPPED_IN_A_ROW = 3
_SOURCES_NAMED = 8


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. `loss` is in nats per trained token, `grad_norm` that of the mean
    loss before clipping, `epoch` the passes over the data made so far, `seconds` the time it took.

    A skipped step left the weights and the optimizer as they were; `notices` say why, and
    whatever else happened that nobody asked for.
    """

    number: int
    loss: float
    trained_tokens: int
    tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float
    epoch: float
    skipped: bool = False
    notices: tuple[str, ...] = ()


class Trainee:
    """What learns: named parameters, their optimizer, schedule, clip norm, seed and counters.

    One adapter on a resident base, or the base's own weights. It reads and writes nothing of any
    other trainee. `learning_rate_at(step)` is asked with the count of steps taken. Its passes, and no
    others of the base, go by `recompute` in the first `recomputed_layers` (None: all).
    """

    def __init__(
        self,
        base: BaseModel,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        learning_rate_at: Callable[[int], float],
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
        recompute: Recompute = "none",
        recomputed_layers: int | None = None,
        most_skipped: int = _MOST_SKIPPED_IN_A_ROW,
    ) -> None:
        self.base, self.parameters, self.optimizer = base, dict(parameters), optimizer
        self.learning_rate_at, self.max_grad_norm = learning_rate_at, max_grad_norm
        self.seed, self.most_skipped = seed, most_skipped
        self.recompute, self.recomputed_layers = recompute, recomputed_layers
        self._store = host_store(base) if recompute == "offloaded" else None
        self.step = 0
        self.epoch = 0
        self.micro_batch = 0
        self.micro_batches_seen = 0
        self.rows_seen = 0
        self.trained_tokens_seen = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.limit_tokens: int | None = None
        self._window: list[Batch] = []
        self._sums: list[tuple[Tensor, int]] = []
        self._notices: list[str] = []
        self._seconds = 0.0  # of this trainee's own work towards the step

    def forward_backward(self, batch: Batch) -> tuple[Tensor, int]:
        """Add the batch's gradient of the summed loss; gives that sum and its count.

        Where memory does not do, the whole window since the last `optim_step` is computed again in
        smaller parts, so what accumulates is the same (but for the inputs that dropout picks).
        MemoryExhausted: one document is too long.
        """
        began = time.perf_counter()
        self._window.append(batch)
        waiting = [len(self._window) - 1]
        while (failed := self._accumulate(waiting)) is not None:
            self._drop_gradients()
            if not self._relieved():
                self._halve(failed)
            release_cached(self.base.device)
            waiting = list(range(len(self._window)))
        self._seconds += time.perf_counter() - began
        return self._sums[-1]

    @property
    def under_way(self) -> bool:
        """Whether gradients wait for an optimizer step."""
        return bool(self._window)

    def drop(self) -> None:
        """Forget what was accumulated since the last step."""
        self._drop_gradients()
        self._window, self._notices, self._seconds = [], [], 0.0

    def dropout_seed(self) -> int:
        """What the next micro-batch draws its dropout from."""
        return stable_seed(self.seed, "dropout", self.step, len(self._window), 0)

    def holds(self, batch: Batch) -> bool:
        """Whether this very batch has gone forward and backward since the last step."""
        return any(held is batch for held in self._window)

    def take(
        self,
        batch: Batch,
        total: Tensor,
        count: int,
        gradients: Sequence[Tensor | None],
        seconds: float,
    ) -> None:
        """Add what a pass shared with others found for `batch`, as `forward_backward` would."""
        for parameter, found in zip(self.parameters.values(), gradients, strict=True):
            if found is None:
                continue
            parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)
        self._window.append(batch)
        self._sums.append((total, count))
        self._seconds += seconds

    def rehearse(self, batch: Batch, *, accumulating: bool = False) -> tuple[str, ...]:
        """A forward and backward over `batch` that leaves nothing behind but `limit_tokens`.

        With `accumulating` a second one runs beside the gradients of the first, as in a step of
        several micro-batches. Gives what there is to say of it; MemoryExhausted as above.
        """
        assert not self._window, "a rehearsal stands between optimizer steps"
        try:
            for _ in range(2 if accumulating else 1):
                self.forward_backward(batch)
            return tuple(self._notices)
        finally:
            self.drop()

    def advance(self, micro_batches: int, *, of: int) -> float:
        """Move on in an epoch of `of` micro-batches; gives the passes over the data made so far."""
        self.micro_batch += micro_batches
        if self.micro_batch >= of:
            self.epoch, self.micro_batch = self.epoch + 1, 0
        return self.epoch + self.micro_batch / of

    def optim_step(self, *, epoch: float = 0.0) -> Step:
        """Divide by the trained tokens, check, clip, step; what accumulated is used up.

        A loss or gradient that is not finite never reaches the optimizer: the step is skipped, and
        DivergedError names its rows when that happens too often in a row.
        """
        assert self._window, "forward_backward comes first"
        began = time.perf_counter()
        if isinstance(self.optimizer, PagedAdamW):
            self.optimizer.prefetch()
        count = sum(n for _, n in self._sums)
        losses = torch.stack([total for total, _ in self._sums]).tolist()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        summed_norm = self._gradient_norm()
        rate = self.learning_rate_at(self.step)
        self.step += 1
        self.micro_batches_seen += len(self._window)
        self.rows_seen += sum(len(batch.sources) for batch in self._window)
        finite = math.isfinite(sum(losses)) and math.isfinite(summed_norm)
        if not finite:
            self._skip(losses, summed_norm)
        elif count == 0:
            self._notices.append(f"step {self.step}: no token of it is trained; nothing changed")
        else:
            self.skipped_in_a_row = 0
            self.trained_tokens_seen += count
            self._apply(gradients, count, summed_norm, rate)
        step = Step(
            number=self.step,
            loss=sum(losses) / max(1, count),
            trained_tokens=count,
            tokens=sum(batch.tokens for batch in self._window),
            learning_rate=rate,
            grad_norm=summed_norm / max(1, count),
            seconds=self._seconds + time.perf_counter() - began,
            epoch=epoch,
            skipped=not finite or count == 0,
            notices=tuple(self._notices),
        )
        self.drop()
        return step

    def tensors(self) -> dict[str, Tensor]:
        """Masters and optimizer state by name, as a checkpoint holds them."""
        masters = {f"parameter/{name}": p.detach() for name, p in self.parameters.items()}
        state = state_tensors(self.optimizer)
        return masters | {f"optimizer/{name}": value for name, value in state.items()}

    def progress(self) -> dict[str, Any]:
        """Counters and position, as a checkpoint holds them. Only between optimizer steps."""
        assert not self._window, "a checkpoint stands between optimizer steps"
        return {name: getattr(self, name) for name in _PROGRESS}

    def restore(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Take up what `tensors` and `progress` gave; other entries are left alone.

        DiskError names what is missing or has another shape; then nothing has changed.
        """
        masters = {f"parameter/{name}": p for name, p in self.parameters.items()}
        faults = [f"checkpoint: {name} is missing" for name in masters if name not in tensors]
        faults += [f"checkpoint: {name} is missing" for name in _PROGRESS if name not in progress]
        faults += [
            f"checkpoint: {name} is {list(tensors[name].shape)}, this run has {list(p.shape)}"
            for name, p in masters.items()
            if name in tensors and tensors[name].shape != p.shape
        ]
        faults += [
            f"checkpoint: {name} is unknown to this run"
            for name in tensors
            if name.startswith("parameter/") and name not in masters
        ]
        if faults:
            raise DiskError.all(faults)
        state = {n.removeprefix("optimizer/"): t for n, t in tensors.items() if "optimizer/" in n}
        load_state_tensors(self.optimizer, state)
        with torch.no_grad():
            for name, parameter in masters.items():
                parameter.copy_(tensors[name])
        for name in _PROGRESS:
            setattr(self, name, progress[name])

    def _accumulate(self, waiting: Sequence[int]) -> Batch | None:
        """Run the window's micro-batches at these places; gives the part memory did not suffice for."""
        for place in waiting:
            device = self.base.device
            total, count = torch.zeros((), dtype=sum_type(device), device=device), 0
            for number, part in enumerate(parts(self._window[place], self.limit_tokens)):
                seed = stable_seed(self.seed, "dropout", self.step, place, number)
                try:
                    part_total, part_count = self._pass(part, seed)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    return part
                total, count = total + part_total, count + part_count
            self._sums.append((total, count))
        return None

    def recomputation(self) -> AbstractContextManager[None]:
        """What this trainee's passes compute again in backward, and no others' of the base."""
        if self.recompute == "none":
            return nullcontext()
        return recomputing(
            self.base, self.recompute, layers=self.recomputed_layers, store=self._store
        )

    def _pass(self, batch: Batch, seed: int) -> tuple[Tensor, int]:
        with self.recomputation():
            return _forward_backward(self.base, batch, seed, sparing=self.recompute == "offloaded")

    def _relieved(self) -> bool:
        """Whether the optimizer had moments on the device that it could move to host memory."""
        if not isinstance(self.optimizer, PagedAdamW) or not (freed := self.optimizer.relieve()):
            return False
        self._notices.append(
            f"step {self.step + 1}: out of memory, so the optimizer's {freed / 1e6:,.1f} MB moved to "
            "host memory, from where they come page by page; what is learned is the same"
        )
        return True

    def _halve(self, failed: Batch) -> None:
        if len(failed.sources) == 1:
            raise MemoryExhausted(
                f"{failed.sources[0]}: one row of {failed.tokens:,} tokens does not fit in memory; "
                "lower data.max_length, set train.gradient_checkpointing to full, or take a "
                "smaller base or quantization"
            )
        self.limit_tokens = failed.tokens // 2
        self._notices.append(
            f"step {self.step + 1}: out of memory with {failed.tokens:,} tokens at once; "
            f"micro-batches go in parts of at most {self.limit_tokens:,} tokens from here on, "
            "accumulated to the same optimizer step"
        )

    def _apply(self, gradients: list[Tensor], count: int, summed_norm: float, rate: float) -> None:
        norm = summed_norm / count
        clip = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (norm + 1e-6))
        torch._foreach_mul_(gradients, clip / count)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        # Fused steps write past autograd's count of changes, by which readers know stale copies.
        for parameter in self.parameters.values():
            torch.autograd.graph.increment_version(parameter)

    def _skip(self, losses: list[float], summed_norm: float) -> None:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        guilty = [
            b for b, loss in zip(self._window, losses, strict=True) if not math.isfinite(loss)
        ]
        found = "loss" if guilty else "gradient"
        candidates = guilty or self._window
        sources = self._alone_not_finite(candidates)
        if not sources:
            found += " of rows together"
            sources = [source for batch in candidates for source in batch.sources]
        named = ", ".join(sources[:_SOURCES_NAMED])
        if len(sources) > _SOURCES_NAMED:
            named += f" and {len(sources) - _SOURCES_NAMED} more"
        fault = f"step {self.step}: the {found} is not finite; rows {named}"
        if self.skipped_in_a_row > self.most_skipped:
            self._drop_gradients()
            self._window = []
            raise DivergedError(
                f"{fault}; {self.skipped_in_a_row} steps in a row, so training stops. The weights "
                f"are finite, as after step {self.step - self.skipped_in_a_row}; "
                "look at these rows, or lower train.learning_rate"
            )
        self._notices.append(f"{fault}; the step is skipped, the weights are as before")

    def _alone_not_finite(self, batches: list[Batch]) -> list[str]:
        """Rows whose own loss or gradient is not finite; none where it takes several of them."""
        found: list[str] = []
        for batch in batches:
            for part in parts(batch, 1):
                self._drop_gradients()
                seed = stable_seed(self.seed, "dropout", self.step, 0, 0)
                total, _ = self._pass(part, seed)
                if not math.isfinite(float(total)) or not math.isfinite(self._gradient_norm()):
                    found += part.sources
        self._drop_gradients()
        return found

    def _gradient_norm(self) -> float:
        """Of the summed loss."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def _drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        self._sums = []


_PROGRESS = (
    "step",
    "epoch",
    "micro_batch",
    "micro_batches_seen",
    "rows_seen",
    "trained_tokens_seen",
    "skipped_steps",
    "skipped_in_a_row",
    "limit_tokens",
)


def _forward_backward(
    base: BaseModel, batch: Batch, seed: int, *, sparing: bool
) -> tuple[Tensor, int]:
    """Gradients of the summed loss are added to the parameters; gives the sum and its count."""
    if not batch.trained_tokens:
        return torch.zeros((), dtype=sum_type(base.device), device=base.device), 0
    batch = batch.to(base.device)
    with base.route.over(batch.boundaries, batch.adapters, dropout_seed=seed):
        hidden = base.hidden(batch.ids, batch.positions).to(base.dtype)
        total, count = summed_cross_entropy(
            hidden,
            batch.ids,
            batch.trained,
            batch.boundaries,
            base.head,
            chunk_tokens=chunk_rows(base.vocab_size, base.device, sparing=sparing),
        )
        torch.autograd.backward(total)  # inside, since recomputation reads the route
    return total.detach(), count
