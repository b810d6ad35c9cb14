"""Summed cross-entropy of next tokens and the count of trained ones; the only place that shifts targets.

For measuring, `places` and `predictions` give the logits themselves, chunk by chunk.

The head and the loss go over the predicting rows in chunks, so full logits never exist. For a
plain head the gradient, (softmax - one-hot) W, is formed in the same pass as the loss, as in
Liger Kernel (Hsu et al. 2024, section 3.2); only that gradient is kept for backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pennyweight.blocks.kernels.compiled import Softmax
from pennyweight.data.batch import Batch
from pennyweight.model import BaseModel, Head
from pennyweight.quant.kernels.cpu import dense_product

__all__ = [
    "Places",
    "Predictions",
    "chunk_rows",
    "places",
    "predictions",
    "sum_type",
    "summed_cross_entropy",
    "targets",
]

# Bytes of one chunk's float32 logits: within a large cache's reach on a CPU, and long enough
# to fill a GPU (1,024 rows of a 128k vocabulary).
_CHUNK_BYTES = {"cpu": 64 << 20}
_CHUNK_BYTES_DEVICE = 512 << 20
_CHUNK_BYTES_SPARING = 128 << 20
# Of logits that are read right after they were written; and rows worth reading the head for.
_CHUNK_BYTES_CACHED = 4 << 20
_LEAST_CACHED_ROWS = 256
# Logits that measuring holds at once: 64 MiB of float32.
MOST_LOGITS = 2**24


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where one model predicts a batch's trained tokens: all that its logits there are made of.

    `hidden`: last hidden states `[n, d]`. `wanted`: int64 `[n]`, the token that follows.
    `documents`: int64 `[n]`, the document each place is in, whose adapter the head may read.
    """

    hidden: Tensor
    wanted: Tensor
    documents: Tensor
    adapters: tuple[str | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Logits `[n, vocab]` in float32 at some places, with the tokens wanted there and their documents."""

    logits: Tensor
    wanted: Tensor
    documents: Tensor


def places(base: BaseModel, batch: Batch) -> Places:
    """Run the model over a batch once, and keep the places that predict a trained token."""
    batch = batch.to(base.device)
    with base.route.over(batch.boundaries, batch.adapters):
        hidden = base.hidden(batch.ids, batch.positions)
    rows, wanted = targets(batch.ids, batch.trained, batch.boundaries)
    ends = torch.tensor(batch.boundaries[1:], device=hidden.device)
    documents = torch.bucketize(rows, ends, right=True)
    return Places(hidden[rows], wanted, documents, batch.adapters)


def predictions(base: BaseModel, at: Places) -> Iterator[Predictions]:
    """The logits at those places, as many at a time as `MOST_LOGITS` allows; the same for equal
    vocabularies."""
    rows = max(1, MOST_LOGITS // base.vocab_size)
    chunks = zip(
        *(torch.split(each, rows) for each in (at.hidden, at.wanted, at.documents)), strict=True
    )
    for hidden, wanted, documents in chunks:
        # The head may read adapters too: its rows are these places, document by document.
        ends = torch.bincount(documents, minlength=len(at.adapters)).cumsum(0).tolist()
        with base.route.over((0, *ends), at.adapters):
            logits = base.logits(hidden)
        yield Predictions(logits, wanted, documents)


def targets(
    ids: Int64[Tensor, " tokens"], trained: Bool[Tensor, " tokens"], boundaries: Sequence[int]
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Rows that predict a trained token of their own document, and the ids they should predict.

    Ids 5 6 7 | 8 9 in two documents (boundaries 0, 3, 5), all trained, give rows 0, 1, 3 and
    targets 6, 7, 9: the first token of a document has no predictor.
    """
    follows = trained[1:].clone()
    firsts = [start - 1 for start in boundaries[1:-1] if start > 0]
    if firsts:
        follows[torch.tensor(firsts, device=follows.device)] = False
    rows = follows.nonzero()[:, 0]
    return rows, ids[1:][rows]


def summed_cross_entropy(
    hidden: Float[Tensor, "tokens d"],
    ids: Int64[Tensor, " tokens"],
    trained: Bool[Tensor, " tokens"],
    boundaries: Sequence[int],
    head: Head,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, ""], int]:
    """Sum of -log p(next token), in nats, over the trained tokens, and their count.

    Products run in the type of `hidden`, softmax in float32; the sum is taken in float64 where the
    device has it, so that how a batch is cut does not show in it. `chunk_tokens` rows are taken at a
    time; None: as many as `chunk_rows` says. Without gradients no gradient work is done.
    """
    rows, wanted = targets(ids, trained, boundaries)
    chunk = chunk_tokens or chunk_rows(head.weight.shape[0], hidden.device)
    if head.wrapped:
        return _through_module(hidden, rows, wanted, head, chunk), len(rows)
    total = _PlainHead.apply(
        hidden, head.weight, head.bias, rows, wanted, head.softcap, head.scale, chunk,
        torch.is_grad_enabled() and hidden.requires_grad,
        torch.is_grad_enabled() and head.trainable,
    )  # fmt: skip
    return total, len(rows)


def sum_type(device: torch.device) -> torch.dtype:
    """What losses are summed in: float64, which MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def chunk_rows(vocab: int, device: torch.device, *, sparing: bool = False) -> int:
    """Rows whose float32 logits fit the device's chunk, at least 16; `sparing`: a smaller one."""
    limit = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_DEVICE)
    return max(16, (min(limit, _CHUNK_BYTES_SPARING) if sparing else limit) // (4 * vocab))


class _PlainHead(torch.autograd.Function):
    """The summed loss of a plain linear head, its gradients formed chunk by chunk with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        wanted: Tensor,
        softcap: float | None,
        scale: float,
        chunk: int,
        hidden_grad: bool,
        weight_grad: bool,
    ) -> Tensor:
        # One cast for all chunks where weights are float32 masters and products are not.
        W = weight.detach().to(hidden.dtype)
        losses = torch.empty(len(rows), device=hidden.device)
        grad_rows = hidden.new_empty(len(rows), hidden.shape[1]) if hidden_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_grad else None
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32)
            if weight_grad and bias is not None and bias.requires_grad
            else None
        )
        bare = bias is None and softcap is None and scale == 1.0 and not weight_grad
        plain = bare and Softmax.fits(hidden)
        if plain:
            chunk = min(chunk, max(_LEAST_CACHED_ROWS, _CHUNK_BYTES_CACHED // W[:, 0].nbytes))
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            h = hidden[rows[part]]
            if plain:
                error = _by_head(h, W)
                losses[part] = Softmax.losses(error, wanted[part], error=hidden_grad)
                if grad_rows is not None:
                    _by_head(error, W, back_into=grad_rows[part])
                continue
            logits, slope = _logits(h @ W.T, bias, softcap, scale)
            top, chosen = logits.amax(1, keepdim=True), logits.gather(1, wanted[part, None])
            powers = logits.sub_(top).exp_()
            normalizer = powers.sum(1, keepdim=True)
            losses[part] = (normalizer.log() + top - chosen)[:, 0]
            if not (hidden_grad or weight_grad):
                continue
            error = powers.div_(normalizer)
            error.scatter_add_(1, wanted[part, None], error.new_full((len(h), 1), -1.0))
            if slope is not None:
                error.mul_(slope)
            if grad_bias is not None:
                grad_bias += error.sum(0) * scale if scale != 1.0 else error.sum(0)
            if scale != 1.0:
                error.mul_(scale)
            error = error.to(h.dtype)
            if grad_rows is not None:
                torch.mm(error, W, out=grad_rows[part])
            if grad_weight is not None:
                _add_product(grad_weight, error.T, h)
            del logits, powers, error, h  # before the next chunk's, not after
        ctx.tokens = hidden.shape[0]
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(rows, grad_rows, grad_weight, grad_bias)
        return losses.sum(dtype=sum_type(losses.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, grad_rows, grad_weight, grad_bias = ctx.saved_tensors
        to_hidden = None
        if grad_rows is not None:
            to_hidden = grad_rows.new_zeros(ctx.tokens, grad_rows.shape[1])
            to_hidden.index_copy_(0, rows, grad_rows * grad.to(grad_rows.dtype))
        # In place, since it is as large as the head; a second backward would be refused.
        to_weight = None if grad_weight is None else grad_weight.mul_(grad).to(ctx.weight_dtype)
        to_bias = None if grad_bias is None else (grad_bias * grad).to(ctx.bias_dtype)
        return to_hidden, to_weight, to_bias, None, None, None, None, None, None, None


def _by_head(x: Tensor, weight: Tensor, *, back_into: Tensor | None = None) -> Tensor:
    """x W^T, or x W into a place for it."""
    back = back_into is not None
    found = dense_product(x, weight, transposed=back, out=back_into)
    if found is not None:
        return found
    return x @ weight.T if back_into is None else torch.mm(x, weight, out=back_into)


def _logits(
    product: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Float32 logits, and with a softcap the derivative of capped logits, 1 - tanh^2."""
    logits = product.float()
    if bias is not None:
        logits = logits + bias.float()
    if scale != 1.0:
        logits = logits * scale
    if softcap is None:
        return logits, None
    bounded = torch.tanh(logits / softcap)
    return bounded * softcap, 1 - bounded**2


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32 whatever the factors' type."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _through_module(hidden: Tensor, rows: Tensor, wanted: Tensor, head: Head, chunk: int) -> Tensor:
    """The same sum for a head with something around its weight; each chunk is computed again in backward."""

    def piece(h: Tensor, ids: Tensor) -> Tensor:
        logits, _ = _logits(head.module(h), None, head.softcap, head.scale)
        losses = nn.functional.cross_entropy(logits, ids, reduction="none")
        return losses.sum(dtype=sum_type(losses.device))

    total = hidden[rows[:0]].sum(dtype=sum_type(hidden.device))  # 0, and a gradient of zeros
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        h = hidden[rows[part]]
        if torch.is_grad_enabled():
            total = total + checkpoint(
                piece, h, wanted[part], use_reentrant=False, preserve_rng_state=False
            )
        else:
            total = total + piece(h, wanted[part])
    return total
