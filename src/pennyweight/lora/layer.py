"""The low-rank update and the layer that adds it: h = W0 x + scaling * B(A(dropout(x))).

LoRA (Hu et al. 2021), section 4.1; scaling alpha / r, or alpha / sqrt(r) with rsLoRA
(Kalajdzievski 2023). Factors are float32 masters, cast to the type of the products. Gradients
are written out here, since autograd would keep the base's output and a mask beside the input:
with z = A x and dz = scaling * B' dy they are dA = dz x', dB = scaling * dy z' and
dx = W' dy + A' dz, and nothing of W.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pennyweight.lora.along import Along, Beside, kernels_for, layer_along
from pennyweight.lora.formed import kept
from pennyweight.lora.stack import FactorStack
from pennyweight.quant import QuantizedLinear
from pennyweight.route import Route

__all__ = [
    "AdaptedModule",
    "LoraFactors",
    "LoraLinear",
    "Update",
    "input_gradient",
    "lora_delta",
]


def lora_delta(
    x: Float[Tensor, "*rows d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    *,
    scaling: float,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """scaling * B(A(dropout(x))), in the type of x.

    Without a `seed` nothing is dropped. The scaling is folded into B, which is small, so that
    backward keeps only x and A(x).
    """
    if dropout and seed is not None:
        x = x * _kept(x, dropout, seed)
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype) * scaling)


def _kept(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Inverted-dropout factors of x's shape, a function of the seed alone (recomputation agrees)."""
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= dropout
    return keep.to(x.dtype) / (1.0 - dropout)


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one adapter adds to the rows `start..stop` of a layer's output; the factors are masters."""

    a: Tensor
    b: Tensor
    start: int
    stop: int
    scaling: float
    dropout: float
    seed: int | None

    def beside(self, x: Tensor) -> Beside | None:
        """The factors, if they are for all rows of x and nothing is dropped."""
        if self.stop - self.start < x.shape[-2] or (self.dropout and self.seed is not None):
            return None
        return Beside(self.a, self.b, self.scaling)

    def dropped(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The factors' input, and what it was multiplied with, if anything."""
        if not self.dropout or self.seed is None:
            return x, None
        kept = _kept(x, self.dropout, self.seed)
        return x * kept, kept


class LoraFactors(nn.Module):
    """One adapter's factors on one linear layer."""

    def __init__(self, a: Tensor, b: Tensor, *, scaling: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.scaling, self.dropout = scaling, dropout

    @classmethod
    def fresh(
        cls,
        d_in: int,
        d_out: int,
        r: int,
        *,
        scaling: float,
        dropout: float,
        seed: int,
        device: torch.device,
    ) -> LoraFactors:
        """A Kaiming-uniform (bound 1/sqrt(d_in), as nn.Linear), B zeros: the update starts at nothing."""
        generator = torch.Generator().manual_seed(seed)
        a = torch.empty(r, d_in, dtype=torch.float32)
        a.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
        b = torch.zeros(d_out, r, dtype=torch.float32, device=device)
        return cls(a.to(device), b, scaling=scaling, dropout=dropout)


class AdaptedModule(nn.Module):
    """A frozen module and what named adapters put beside it; `path` is its full name in the base."""

    base_layer: nn.Module
    adapters: nn.ModuleDict
    route: Route

    def __init__(self, base_layer: nn.Module, route: Route, path: str) -> None:
        super().__init__()
        self.base_layer, self.path = base_layer, path
        self.adapters = nn.ModuleDict()
        object.__setattr__(self, "route", route)

    def __contains__(self, name: str) -> bool:
        return _key(name) in self.adapters

    def put(self, name: str, weights: nn.Module) -> None:
        self.adapters[_key(name)] = weights

    def drop(self, name: str) -> None:
        del self.adapters[_key(name)]

    def of(self, name: str) -> nn.Module:
        return self.adapters[_key(name)]

    def names(self) -> list[str]:
        return [key.replace("%2E", ".") for key in self.adapters]

    def runs(self, rows: int) -> Sequence[tuple[str | None, int, int]]:
        """The route's segments, held against the rows at hand."""
        segments = self.route.segments()
        if len(segments) == 1:
            return [(segments[0][0], 0, rows)]
        covered = segments[-1][2] if segments else 0
        assert covered == rows, f"{self.path}: {rows} rows, the route says {segments}"
        return segments


class LoraLinear(AdaptedModule):
    """A frozen linear layer (plain, quantized or Conv1D) that adds each document its adapter's update."""

    _stack: FactorStack | None = None  # of several adapters
    _lone: FactorStack | None = None  # of one

    @property
    def in_features(self) -> int:
        return linear_shape(self.base_layer)[1]

    @property
    def out_features(self) -> int:
        return linear_shape(self.base_layer)[0]

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.base_layer.weight)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        if torch.is_autocast_enabled(x.device.type):
            return self._apart(x)
        if torch.is_inference_mode_enabled() and (mixed := self._mixed(x)) is not None:
            return mixed
        updates = self.updates(x)
        if not updates:
            return cast(Tensor, self.base_layer(x))
        if not torch.is_grad_enabled():
            return self.product(x, updates)[0]
        masters = [factor for update in updates for factor in (update.a, update.b)]
        return cast(Tensor, _Adapted.apply(x, self, updates, *masters))

    def _apart(self, x: Tensor) -> Tensor:
        """The same by torch's own operations, to which autocast gives their types."""
        y: Tensor = self.base_layer(x)
        parts, done = [], 0
        for update in self.updates(x):
            part = slice(update.start, update.stop)
            parts += [
                y[..., done : update.start, :],
                y[..., part, :] + _delta(x[..., part, :], update),
            ]
            done = update.stop
        return torch.cat([*parts, y[..., done:, :]], dim=-2) if parts else y

    def put(self, name: str, weights: nn.Module) -> None:
        super().put(name, weights)
        self._stack = self._lone = None

    def drop(self, name: str) -> None:
        super().drop(name)
        self._stack = self._lone = None

    def _mixed(self, x: Tensor) -> Tensor | None:
        """The output for a short pass over few or many adapters at once, all their updates added
        in two products; None where the pass goes by segments.

        What is stacked stays until another set of adapters is read or a factor changes: the one
        thing that `forward` keeps, and it changes no number.
        """
        route = self.route
        mixture = route.mixture(x.device)
        if mixture is None or route.dropout_seed is not None:
            return None
        if x.numel() != route.boundaries[-1] * x.shape[-1]:
            return None
        y: Tensor = self.base_layer(x)
        lone = len(mixture.names) == 1
        stack = self._lone if lone else self._stack
        if stack is None or not stack.serves(mixture.names, x):
            factors = [
                cast(LoraFactors, self.of(name)) if name in self else None for name in mixture.names
            ]
            stack = FactorStack.of(mixture.names, factors, x)
            if lone:
                self._lone = stack
            else:
                self._stack = stack
        stack.add_to(y, x, mixture)
        return y

    def updates(self, x: Float[Tensor, "*rows d_in"]) -> tuple[Update, ...]:
        """What the route's adapters add to these rows, in order; rows of the bare base have none."""
        found = []
        for name, start, stop in self.runs(x.shape[-2]):
            if name is None or name not in self:
                continue
            factors = self.of(name)
            assert isinstance(factors, LoraFactors)
            seed = self.route.dropout_seed_of(name) if factors.dropout else None
            if seed is not None:
                seed = stable_seed(seed, self.path)
            found.append(
                Update(
                    factors.lora_A, factors.lora_B, start, stop,
                    factors.scaling, factors.dropout, seed,
                )
            )  # fmt: skip
        return tuple(found)

    def product(
        self, x: Float[Tensor, "*rows d_in"], updates: Sequence[Update]
    ) -> tuple[Float[Tensor, "*rows d_out"], list[Float[Tensor, "_ _"]]]:
        """W0 x with every update added in place, and A x of each, which backward reads."""
        if (taken := self._along(x, updates)) is not None:
            (y,), narrow = taken.product(x)
            return y, narrow
        narrow = self.narrowed(x, updates)
        y = cast(Tensor, self.base_layer(x))
        for update, z in zip(updates, narrow, strict=True):
            _rows(y, update, written=True).addmm_(z, update.b.to(x.dtype).T, alpha=update.scaling)
        return y, narrow

    def _along(self, x: Tensor, updates: Sequence[Update]) -> Along | None:
        """Base and update in one, where there is one update for all of the rows and no dropout."""
        if len(updates) != 1 or (kernels := kernels_for(x)) is None:
            return None
        if (beside := updates[0].beside(x)) is None:
            return None
        one = layer_along(kernels, self.base_layer, x, beside)
        return None if one is None else Along(kernels, (one,))

    def narrowed(
        self, x: Float[Tensor, "*rows d_in"], updates: Sequence[Update]
    ) -> list[Float[Tensor, "_ _"]]:
        """A x of each update, after dropout."""
        return [u.dropped(_rows(x, u))[0] @ u.a.to(x.dtype).T for u in updates]

    def gradients(
        self,
        grad_y: Float[Tensor, "*rows d_out"],
        x: Float[Tensor, "*rows d_in"],
        narrow: Sequence[Float[Tensor, "_ _"]],
        updates: Sequence[Update],
        *,
        of_x: bool,
    ) -> tuple[Float[Tensor, "*rows d_in"] | None, list[Tensor | None]]:
        """Gradient of x, if it is asked for, and of every update's A and B that is trained."""
        if (taken := self._along(grad_y, updates)) is not None:
            return taken.gradients((grad_y,), x, narrow, of_x=of_x)
        grad_x = input_gradient(self.base_layer, grad_y) if of_x else None
        of_factors: list[Tensor | None] = []
        for update, z in zip(updates, narrow, strict=True):
            dy, a, b = _rows(grad_y, update), update.a, update.b
            dz = dy @ (b.to(dy.dtype) * update.scaling)
            rows, mask = _rows(x, update), None
            if a.requires_grad:
                rows, mask = update.dropped(rows)
            of_factors += [
                (dz.T @ rows).to(a.dtype) if a.requires_grad else None,
                (dy.T @ z).to(b.dtype).mul_(update.scaling) if b.requires_grad else None,
            ]
            if grad_x is None:
                continue
            if update.dropout and update.seed is not None:
                mask = _kept(rows, update.dropout, update.seed) if mask is None else mask
                _rows(grad_x, update, written=True).add_((dz @ a.to(dy.dtype)).mul_(mask))
            else:
                _rows(grad_x, update, written=True).addmm_(dz, a.to(dy.dtype))
        return grad_x, of_factors


class _Adapted(torch.autograd.Function):
    """A LoraLinear's output. Kept for backward: A x, and its input, once however many layers read
    it, or what that is formed from."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: LoraLinear, updates: tuple[Update, ...], *masters: Tensor
    ) -> Tensor:
        y, narrow = layer.product(x, updates)
        parts, ctx.kept = kept(x)
        ctx.layer, ctx.updates = layer, updates
        ctx.save_for_backward(*parts, *narrow)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow = ctx.kept.again(ctx.saved_tensors)
        grad_x, of_factors = ctx.layer.gradients(
            grad_y, x, narrow, ctx.updates, of_x=ctx.needs_input_grad[0]
        )
        return grad_x, None, None, *of_factors


def _delta(x: Tensor, update: Update) -> Tensor:
    return lora_delta(
        x, update.a, update.b, scaling=update.scaling, dropout=update.dropout, seed=update.seed
    )


def _rows(x: Float[Tensor, "*rows d"], update: Update, *, written: bool = False) -> Tensor:
    """The update's rows as a matrix `[n, d]`; of what is `written` to, a view or an error."""
    if update.stop - update.start < x.shape[-2]:
        x = x[..., update.start : update.stop, :]
    return x.view(-1, x.shape[-1]) if written else x.reshape(-1, x.shape[-1])


def input_gradient(layer: nn.Module, grad_y: Tensor) -> Tensor:
    """Gradient of a frozen layer's input."""
    if isinstance(layer, QuantizedLinear):
        return layer.input_gradient(grad_y)
    weight = cast(Tensor, layer.weight)
    return grad_y @ (weight.T if type(layer).__name__ == "Conv1D" else weight)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear-like layer; transformers' Conv1D stores its weight as [in, out]."""
    if type(layer).__name__ == "Conv1D":
        d_in, d_out = cast(Tensor, layer.weight).shape
        return d_out, d_in
    return cast(int, layer.out_features), cast(int, layer.in_features)


def stable_seed(seed: int, *words: object) -> int:
    """A 63-bit seed from a seed and words, the same on every machine and run."""
    digest = hashlib.sha256("\x1f".join([str(seed), *map(str, words)]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _key(name: str) -> str:
    """Adapter names may hold dots, module names may not."""
    return name.replace(".", "%2E")
