"""Which token comes next: a pure function of the logits, the request's seed and the token's number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pennyweight.generate.request import Request

__all__ = ["draw", "draw_each", "uniform"]

# The likeliest that most nuclei lie within; sorting a whole vocabulary costs six times as much.
FEW_LIKELY = 256


def draw(logits: Float[Tensor, " vocab"], request: Request, number: int) -> Tensor:
    """Id of the request's `number`-th new token."""
    return draw_each(logits[None], [request], [number])[0]


def draw_each(
    logits: Float[Tensor, "rows vocab"], requests: Sequence[Request], numbers: Sequence[int]
) -> Int64[Tensor, " rows"]:
    """Of each row the id drawn: one uniform number through the inverse of the cumulative
    distribution, after temperature, then top-k, then top-p (nucleus sampling, Holtzman et al.
    2020, section 3.1: the smallest set of likeliest tokens whose mass reaches `top_p`).

    No row reads another: rows of like truncation go through the same operations at once.
    """
    if logits.device.type == "mps":  # it has no float64
        logits = logits.cpu()
    alike: defaultdict[tuple[int, bool], list[int]] = defaultdict(list)
    for at, request in enumerate(requests):
        top_k = request.top_k if request.top_k < logits.shape[1] else 0
        alike[top_k, request.top_p < 1].append(at)
    ids = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
    for (top_k, nucleus), rows in alike.items():
        where = torch.tensor(rows, device=logits.device)
        chosen = [requests[at] for at in rows]
        shares = [uniform(requests[at].seed, numbers[at]) for at in rows]
        ids[where] = _drawn(logits[where], chosen, shares, top_k, nucleus)
    return ids


def _drawn(
    logits: Tensor, requests: list[Request], shares: list[float], top_k: int, nucleus: bool
) -> Tensor:
    """The draws of rows that are cut alike, each by its share of the mass."""
    wide = logits.double()
    scaled = wide / _column([request.temperature for request in requests], wide)
    ids = None
    if top_k:
        scaled, ids = scaled.topk(top_k)
    likely, share = scaled.softmax(-1), _column(shares, wide)
    if not nucleus:
        return _picked(likely.cumsum(-1), share, None, ids)
    reach = _column([request.top_p for request in requests], wide)
    if not top_k:
        likely, ids = likely.topk(min(FEW_LIKELY, logits.shape[1]))
    mass = likely.cumsum(-1)
    picked = _picked(mass, share, reach, ids)
    if not top_k and (more := mass[:, -1] < reach[:, 0]).any():
        whole, order = scaled[more].softmax(-1).sort(descending=True, stable=True)
        picked[more] = _picked(whole.cumsum(-1), share[more], reach[more], order)
    return picked


def _picked(mass: Tensor, share: Tensor, reach: Tensor | None, ids: Tensor | None) -> Tensor:
    """Where a share of the mass falls, that of what lies past `reach` left out."""
    last = torch.full_like(mass[:, :1], mass.shape[1] - 1, dtype=torch.int64)
    if reach is not None:
        last = (mass < reach).sum(-1, keepdim=True).minimum(last)
    at = torch.searchsorted(mass, share * mass.gather(1, last), right=True).minimum(last)
    return (at if ids is None else ids.gather(1, at)).squeeze(1)


def _column(values: list[float], like: Tensor) -> Tensor:
    return like.new_tensor(values)[:, None]


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) that depends on these two alone (53 bits of BLAKE2b)."""
    digest = blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
