"""Loss, perplexity and token accuracy of held-out rows, with the rows' own sums kept."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from pennyweight.data.batch import Batch, collate, parts
from pennyweight.data.conversation import Example
from pennyweight.errors import AdapterError, DataError, DivergedError, MemoryExhausted
from pennyweight.evaluate.intervals import Difference, Interval, bootstrap
from pennyweight.lora import attached
from pennyweight.loss import places, predictions
from pennyweight.model import BaseModel, is_out_of_memory, release_cached

__all__ = ["LossReport", "evaluate_loss", "in_batches", "loss_by_batch", "paired", "read_by"]


@dataclass(frozen=True, slots=True)
class LossReport:
    """Summed loss in nats over `count` trained tokens, document by document too.

    `limit_tokens`: where memory did not do for a batch, the most tokens that then went at once.
    """

    loss_sum: float
    count: int
    correct: int
    sources: tuple[str, ...]
    document_losses: tuple[float, ...]
    document_counts: tuple[int, ...]
    limit_tokens: int | None = None

    @property
    def loss(self) -> float:
        """Nats per trained token."""
        return self.loss_sum / self.count

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def token_accuracy(self) -> float:
        """Share of trained tokens that were the likeliest one."""
        return self.correct / self.count

    @property
    def interval(self) -> Interval | None:
        """Of `loss`; None for a single document, which says nothing of others."""
        return bootstrap(self.document_losses, self.document_counts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "loss_interval_95": self.interval,
            "perplexity": self.perplexity,
            "token_accuracy": self.token_accuracy,
            "trained_tokens": self.count,
            "documents": len(self.sources),
        }


def in_batches(examples: Iterable[Example], *, budget_tokens: int = 4096) -> Iterator[Batch]:
    """Rows in their own order, as many to a batch as the budget holds, one at the least."""
    waiting: list[Example] = []
    tokens = 0
    for example in examples:
        if waiting and tokens + len(example.ids) > budget_tokens:
            yield collate(waiting)
            waiting, tokens = [], 0
        waiting.append(example)
        tokens += len(example.ids)
    if waiting:
        yield collate(waiting)


def read_by(batches: Iterable[Batch], adapter: str | None) -> Iterator[Batch]:
    """The same batches, every document read by `adapter`; None is the bare base."""
    for batch in batches:
        yield replace(batch, adapters=(adapter,) * len(batch.adapters))


def evaluate_loss(base: BaseModel, batches: Iterable[Batch]) -> LossReport:
    """Loss of every trained token, each document by the adapter its batch names; errors as below."""
    measuring = loss_by_batch(base, batches)
    while True:
        try:
            next(measuring)
        except StopIteration as done:
            report: LossReport = done.value
            return report


def loss_by_batch(base: BaseModel, batches: Iterable[Batch]) -> Generator[Batch, None, LossReport]:
    """`evaluate_loss` in pieces: yields each batch once it is measured.

    Where memory runs out the batch goes in parts of half its tokens, and so do those after it.
    DataError where nothing is trained; AdapterError for an adapter that is not attached, which
    would be the bare base under a wrong name; DivergedError names the first row whose loss is not
    finite, MemoryExhausted one that does not fit alone.
    """
    names = attached(base)
    sources: list[str] = []
    losses: list[float] = []
    counts: list[int] = []
    correct, limit = 0, None
    for batch in batches:
        for adapter in set(batch.adapters) - {None, *names}:
            raise AdapterError(
                f"{batch.sources[0]}: to be read by adapter {adapter!r}, which is not attached; attached: "
                f"{', '.join(names) or 'none'}; `read_by(batches, None)` reads by the bare base"
            )
        (right, sums, numbers), limit = _within_memory(base, batch, limit)
        correct += right
        losses += sums
        counts += numbers
        sources += batch.sources
        yield batch
    if not sum(counts):
        raise DataError(
            f"{len(sources)} held-out rows train no token, so there is no loss to measure; "
            "`pennyweight preview` shows which tokens are trained"
        )
    for source, loss in zip(sources, losses, strict=True):
        if not math.isfinite(loss):
            raise DivergedError(f"{source}: the loss of this held-out row is {loss}")
    return LossReport(
        math.fsum(losses), sum(counts), correct, tuple(sources), tuple(losses), tuple(counts), limit
    )


def _within_memory(
    base: BaseModel, batch: Batch, limit_tokens: int | None
) -> tuple[tuple[int, list[float], list[int]], int | None]:
    """`_document_losses` in parts of at most so many tokens, and the limit that did."""
    while True:
        smaller = parts(batch, limit_tokens)
        try:
            found = [_document_losses(base, part) for part in smaller]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            right, losses, counts = zip(*found, strict=True)
            return (sum(right), [*chain(*losses)], [*chain(*counts)]), limit_tokens
        release_cached(base.device)
        largest = max(smaller, key=lambda part: part.tokens)
        if all(len(part.sources) == 1 for part in smaller):
            raise MemoryExhausted(
                f"{largest.sources[0]}: one held-out row of {largest.tokens:,} tokens does not fit "
                "in memory; lower data.max_length, or take a smaller base or quantization"
            )
        limit_tokens = largest.tokens // 2


@torch.inference_mode()
def _document_losses(base: BaseModel, batch: Batch) -> tuple[int, list[float], list[int]]:
    """Of one batch: tokens predicted right; of each document its summed loss and its count."""
    at = places(base, batch)
    documents = len(batch.adapters)
    losses = torch.zeros(documents, dtype=torch.float64)
    correct = 0
    for part in predictions(base, at):
        nats = F.cross_entropy(part.logits, part.wanted, reduction="none").double()
        losses.index_add_(0, part.documents.cpu(), nats.cpu())
        correct += int((part.logits.argmax(-1) == part.wanted).sum())
    return correct, losses.tolist(), torch.bincount(at.documents, minlength=documents).tolist()


def paired(before: LossReport, after: LossReport) -> Difference:
    """Difference in loss, nats per trained token; below 0 is better."""
    if (before.sources, before.document_counts) != (after.sources, after.document_counts):
        raise DataError(
            "the two losses were measured on different rows or tokens; evaluate both on the same"
        )
    changes = [b - a for a, b in zip(before.document_losses, after.document_losses, strict=True)]
    mean = math.fsum(changes) / before.count
    return Difference(mean, bootstrap(changes, before.document_counts), len(changes))
