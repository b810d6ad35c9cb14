"""Micro-batches of several adapters in one pass over the base they share (`fast`).

Documents stay apart in attention, each adapter's rows meet its factors alone, sums and dropout
seeds are kept by adapter: against passes alone only the rounding of larger products differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pennyweight.data.batch import Batch, joined
from pennyweight.errors import MemoryExhausted
from pennyweight.loss import summed_cross_entropy
from pennyweight.train.memory import is_out_of_memory, release_cached
from pennyweight.train.trainee import Trainee

__all__ = ["Together", "forward_backward_together"]

Share = tuple[Trainee, Batch]
Passed = tuple[Tensor, int]
Found = list[tuple[Tensor, int, list[Tensor | None]]]  # of each share: sum, count, gradients


@dataclass(frozen=True, slots=True)
class Together:
    """What came of each share, in order; `shared` says whether one pass did it."""

    found: list[Passed | MemoryExhausted]
    shared: bool


def forward_backward_together(shares: Sequence[Share]) -> Together:
    """`forward_backward` of trainees of one base, each with a micro-batch of its own adapter.

    Where memory does not do, or a loss or gradient is not finite, nothing of the pass is kept and
    every share goes alone: what is wrong with one reaches no other. A share that does not fit by
    itself is its entry in the answer, and its trainee stands as after its last step.
    """
    began = time.perf_counter()
    names = [batch.adapters[0] for _, batch in shares]
    assert len(set(names)) == len(shares), "an adapter takes part once"
    assert all(len(set(batch.adapters)) == 1 for _, batch in shares), "a share has one adapter"
    found = _tried(shares) if len(shares) > 1 else None
    if found is None:
        return Together([_alone(trainee, batch) for trainee, batch in shares], False)
    seconds = time.perf_counter() - began
    tokens = sum(batch.tokens for _, batch in shares)
    for (trainee, batch), (total, count, gradients) in zip(shares, found, strict=True):
        trainee.take(batch, total, count, gradients, seconds * batch.tokens / tokens)
    return Together([(total, count) for total, count, _ in found], True)


def _alone(trainee: Trainee, batch: Batch) -> Passed | MemoryExhausted:
    try:
        return trainee.forward_backward(batch)
    except MemoryExhausted as fault:
        trainee.drop()
        return fault


def _tried(shares: Sequence[Share]) -> Found | None:
    """What one pass gives, None where it must not count."""
    if any(t.limit_tokens is not None and b.tokens > t.limit_tokens for t, b in shares):
        return None
    if not all(batch.trained_tokens for _, batch in shares):
        return None
    parameters = [p for trainee, _ in shares for p in trainee.parameters.values()]
    try:
        with _gradients_aside(parameters):
            totals = _pass(shares)
            found = [
                (total, batch.trained_tokens, [p.grad for p in trainee.parameters.values()])
                for (trainee, batch), total in zip(shares, totals, strict=True)
            ]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release_cached(shares[0][0].base.device)
        return None
    gradients = [g for _, _, own in found for g in own if g is not None]
    measured = torch.stack(
        [*totals, *(n.to(totals[0].dtype) for n in torch._foreach_norm(gradients))]
    )
    return found if bool(measured.isfinite().all()) else None


def _pass(shares: Sequence[Share]) -> list[Tensor]:
    """Each share's summed loss; the gradients are in the parameters.

    The head and the loss run share by share over hidden states cut off from the pass below, so a
    head's adapter meets its own rows only; then one backward goes through the layers.
    """
    base = shares[0][0].base
    parts = [batch.to(base.device) for _, batch in shares]
    batch = joined(parts)
    seeds: Mapping[str, int] = {str(b.adapters[0]): t.dropout_seed() for t, b in shares}
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + part.tokens)
    totals, slopes = [], []
    sparing = next((t for t, _ in shares if t.recompute != "none"), shares[0][0])
    with (
        sparing.recomputation(),
        base.route.over(batch.boundaries, batch.adapters, dropout_seed=seeds),
    ):
        hidden = base.hidden(batch.ids, batch.positions).to(base.dtype)
        for part, (start, stop) in zip(parts, pairwise(offsets), strict=True):
            own = hidden[start:stop].detach().requires_grad_()
            with base.route.over(part.boundaries, part.adapters, dropout_seed=seeds):
                total, _ = summed_cross_entropy(
                    own, part.ids, part.trained, part.boundaries, base.head
                )
                torch.autograd.backward(total)
            assert own.grad is not None
            totals.append(total.detach())
            slopes.append(own.grad)
        if hidden.requires_grad:  # not where only heads are adapted
            torch.autograd.backward(hidden, torch.cat(slopes))
    return totals


@contextmanager
def _gradients_aside(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, gradients begin at none; afterwards they are what they were before."""
    before = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
