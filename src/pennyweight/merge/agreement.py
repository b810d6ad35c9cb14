"""How close two models' predictions are on the same tokens, and what each loses on them.

The reference is run once and kept as its last hidden states: d numbers a token in place of a
vocabulary's, from which its head makes the very logits again, so KL is exact and nothing is stored
that grows with the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from pennyweight.config import BaseConfig
from pennyweight.data.batch import Batch
from pennyweight.errors import MemoryExhausted
from pennyweight.loss import Places, places, predictions
from pennyweight.model import BaseModel, load_base

__all__ = ["Agreement", "Comparison", "Reader", "Reference", "beside"]


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A model, read with one of its adapters or bare."""

    model: BaseModel
    adapter: str | None = None

    def places(self, batch: Batch) -> Places:
        return places(self.model, replace(batch, adapters=(self.adapter,) * len(batch.adapters)))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How close two models' logits are where a trained token is predicted: largest difference, mean
    KL(reference || other) in nats a token, share of tokens whose likeliest one is the same."""

    tokens: int
    max_logit_difference: float
    mean_kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Another model beside the reference: their agreement, and document by document, in nats, its
    summed loss and its summed KL from the reference; `correct` tokens it predicted right."""

    agreement: Agreement
    document_losses: tuple[float, ...]
    document_kl: tuple[float, ...]
    correct: int


class Reference:
    """What the reader predicts on some batches, kept to hold others against."""

    @torch.inference_mode()
    def __init__(self, reader: Reader, batches: Iterable[Batch]) -> None:
        self.reader = reader
        self.batches = tuple(batches)
        self._places = [reader.places(batch) for batch in self.batches]
        self.sources = tuple(source for batch in self.batches for source in batch.sources)
        self.document_counts = tuple(count for at in self._places for count in _counts(at))

    @property
    def tokens(self) -> int:
        return sum(self.document_counts)

    @torch.inference_mode()
    def compare(self, other: Reader) -> Comparison:
        """Hold another model's predictions against these; what is summed is float64."""
        assert self.tokens, "batches in which a token is trained"
        worst, agreed, correct = 0.0, 0, 0
        losses: list[float] = []
        divergences: list[float] = []
        for batch, mine in zip(self.batches, self._places, strict=True):
            theirs = mine if other is self.reader else other.places(batch)
            loss = torch.zeros(len(batch.adapters), dtype=torch.float64)
            divergence = torch.zeros_like(loss)
            pairs = zip(
                predictions(self.reader.model, mine),
                predictions(other.model, theirs),
                strict=True,
            )
            for one, two in pairs:
                p, q = one.logits.cpu().double(), two.logits.cpu().double()
                wanted, documents = two.wanted.cpu(), two.documents.cpu()
                worst = max(worst, _largest(p - q))
                agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
                correct += int((q.argmax(-1) == wanted).sum())
                p, q = p.log_softmax(-1), q.log_softmax(-1)
                divergence.index_add_(0, documents, (p.exp() * (p - q)).sum(-1))
                loss.index_add_(0, documents, F.nll_loss(q, wanted, reduction="none"))
            losses += loss.tolist()
            divergences += divergence.tolist()
        mean_kl = math.fsum(divergences) / self.tokens
        agreement = Agreement(self.tokens, worst, mean_kl, agreed / self.tokens)
        return Comparison(agreement, tuple(losses), tuple(divergences), correct)


def beside(base: BaseModel, folder: Path | str) -> BaseModel:
    """The model in `folder`, computing in the base's type: on the base's device, or on the CPU where
    the two do not fit there together."""
    config = BaseConfig.model_validate(
        {
            "model": str(folder),
            "quantization": "none",
            "dtype": str(base.dtype).removeprefix("torch."),
            "device": str(base.device),
        }
    )
    try:
        return load_base(config)
    except MemoryExhausted:
        return load_base(config.model_copy(update={"device": "cpu"}))


def _counts(at: Places) -> list[int]:
    return torch.bincount(at.documents, minlength=len(at.adapters)).tolist()


def _largest(difference: torch.Tensor) -> float:
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    return math.inf if math.isnan(largest) else largest
