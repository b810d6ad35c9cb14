"""Inputs that backward can form again from what is kept anyway, so that they need not be kept too.

A norm's output is read by two or three adapted layers, whose backward wants it. Its input and one
number a row are kept by the norm itself, and the output is elementwise work from there. Who makes
such a tensor says so on the tensor (`forms`); who would keep it asks (`kept`) and keeps the parts in
its place. Where the word is lost on the way, the tensor is kept as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Formed", "Forming", "Kept", "forms", "kept"]

_WORD = "pennyweight_formed"


class Forming:
    """How a tensor is formed again, without its parts: its readers' backwards share one forming."""

    def __init__(self, form: Callable[..., Tensor]) -> None:
        self.form, self.readers = form, 0
        self._value: Tensor | None = None

    def again(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor, from its parts as autograd gave them back; dropped after the last reader."""
        value = self.form(*parts) if self._value is None else self._value
        self.readers -= 1
        self._value = value if self.readers > 0 else None
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Formed:
    """A tensor's parts, which a reader saves with autograd, and the forming, which it holds.

    The first part is as large as the tensor, and must not live because the tensor does.
    """

    first: weakref.ref[Tensor]
    rest: tuple[Tensor, ...]
    forming: Forming

    def parts(self) -> tuple[Tensor, ...] | None:
        """The parts, if all of them are still there."""
        first = self.first()
        return None if first is None else (first.detach(), *self.rest)


def forms(tensor: Tensor, first: Tensor, *rest: Tensor, by: Callable[..., Tensor]) -> Tensor:
    """The tensor, with the word that `by(first, *rest)` gives it again; `by` holds no tensor."""
    setattr(tensor, _WORD, Formed(weakref.ref(first), rest, Forming(by)))
    return tensor


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """How a reader has its input again from the first `count` tensors that it saved."""

    forming: Forming | None
    count: int

    def again(self, saved: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """The input, and what else was saved."""
        parts, rest = saved[: self.count], saved[self.count :]
        return parts[0] if self.forming is None else self.forming.again(parts), rest


def kept(tensor: Tensor) -> tuple[tuple[Tensor, ...], Kept]:
    """What a reader saves of its input: what it can be formed from again if its maker said so, else
    the tensor."""
    said: Formed | None = getattr(tensor, _WORD, None)
    parts = None if said is None else said.parts()
    if said is None or parts is None:
        return (tensor,), Kept(None, 1)
    said.forming.readers += 1
    return parts, Kept(said.forming, len(parts))
