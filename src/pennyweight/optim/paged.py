"""AdamW whose moments lie in pages, in 32 bits (torch's own arithmetic) or in 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as torchs_adamw

from pennyweight.optim.eight_bits import BLOCK, SMALLEST, blocks_of, update
from pennyweight.optim.pages import Page, Pager

__all__ = ["PAGE_BYTES", "PagedAdamW", "state_bytes"]

# Long enough for a copy to run at the bus's speed, short enough that two are little.
PAGE_BYTES = 32 << 20


def state_bytes(count: int, *, eight_bits: bool) -> int:
    """Bytes of both moments of a parameter of `count` numbers."""
    if not eight_bits or count < SMALLEST:
        return 8 * count
    return 2 * blocks_of(count) * (BLOCK + 4)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Neighbours of one group that share a page; `small` ones have 8-bit moments."""

    parameters: tuple[nn.Parameter, ...]
    group: dict[str, Any]
    small: bool

    def page(self) -> Page:
        """32 bits: both moments of each parameter in turn. 8 bits: codes, then peaks, of all."""
        if not self.small:
            shapes = [tuple(p.shape) for p in self.parameters]
            return Page([(shape, torch.float32) for shape in shapes for _ in range(2)])
        blocks = sum(blocks_of(p.numel()) for p in self.parameters)
        codes, peaks = ((blocks * BLOCK,), torch.uint8), ((blocks,), torch.float32)
        return Page([codes, codes, peaks, peaks])


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with `state` as torch's has it, views of the pages: wherever they lie, the steps are
    the same to the bit.

    `state` of a parameter: `step`, `exp_avg`, `exp_avg_sq`; in 8 bits both are codes in blocks of
    256, with `exp_avg_peak` and `exp_avg_sq_peak`. Parameters under 4,096 numbers keep 32 bits.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        eight_bits: bool,
        paged: bool = True,
        resident_bytes: int | None = None,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.paged = paged
        self._runs = [
            run for group in self.param_groups for run in _runs(group, eight_bits, page_bytes)
        ]
        device = self._runs[0].parameters[0].device
        self.pager = Pager([run.page() for run in self._runs], device, resident_bytes)
        for run in self._runs:
            for parameter in run.parameters:
                self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        for place in range(len(self._runs)):
            self._show(place)

    def prefetch(self) -> None:
        """Begin to bring what the next step uses first."""
        self.pager.fetch(0)

    def relieve(self) -> int:
        """Move all moments to host memory, from now on between steps too; gives the bytes freed."""
        if not self.paged:
            return 0
        freed = self.pager.relieve()
        for place in range(len(self._runs)):
            self._show(place)
        return freed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients come from forward_backward"
        for place, run in enumerate(self._runs):
            tensors = self.pager.using(place).tensors()
            if run.small:
                self._step_in_8_bits(run, tensors)
            else:
                self._step_in_32_bits(run, tensors)
            self.pager.used(place)
            self._show(place)
        self.pager.settle()

    def _step_in_32_bits(self, run: _Run, tensors: Sequence[Tensor]) -> None:
        """torch's fused step, so that it gives what torch's own AdamW gives."""
        learned = [
            (p, first, second)
            for p, first, second in zip(run.parameters, tensors[::2], tensors[1::2], strict=True)
            if p.grad is not None
        ]
        if not learned:
            return
        parameters, firsts, seconds = (list(each) for each in zip(*learned, strict=True))
        group = run.group
        torchs_adamw(
            parameters,
            [p.grad for p in parameters],
            firsts,
            seconds,
            [],
            [self.state[p]["step"] for p in parameters],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_in_8_bits(self, run: _Run, tensors: Sequence[Tensor]) -> None:
        """All at once where all have a gradient and have made the same steps, else one by one."""
        counts = [blocks_of(p.numel()) for p in run.parameters]
        learned = [p for p in run.parameters if p.grad is not None]
        steps = {id(p): int(self.state[p]["step"]) for p in learned}
        for p in learned:
            self.state[p]["step"] += 1
        codes, peaks = tensors[:2], tensors[2:]
        if len(learned) == len(run.parameters) and len(set(steps.values())) == 1:
            self._update(run.group, run.parameters, (*codes, *peaks), steps[id(learned[0])])
            return
        lengths = [n * BLOCK for n in counts]
        apart = zip(
            *(c.split(lengths) for c in codes), *(p.split(counts) for p in peaks), strict=True
        )
        for parameter, own in zip(run.parameters, apart, strict=True):
            if parameter.grad is not None:
                self._update(run.group, (parameter,), own, steps[id(parameter)])

    @staticmethod
    def _update(
        group: dict[str, Any],
        parameters: Sequence[nn.Parameter],
        tensors: Sequence[Tensor],
        done: int,
    ) -> None:
        update(
            parameters,
            (tensors[0], tensors[1]),
            (tensors[2], tensors[3]),
            step=done + 1,
            rate=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _show(self, place: int) -> None:
        """Let `state` name the page's tensors where they lie now."""
        run, tensors = self._runs[place], self.pager.pages[place].tensors()
        if not run.small:
            for p, first, second in zip(run.parameters, tensors[::2], tensors[1::2], strict=True):
                self.state[p] |= {"exp_avg": first, "exp_avg_sq": second}
            return
        counts = [blocks_of(p.numel()) for p in run.parameters]
        lengths = [n * BLOCK for n in counts]
        names = ("exp_avg", "exp_avg_sq", "exp_avg_peak", "exp_avg_sq_peak")
        for name, tensor in zip(names, tensors, strict=True):
            sizes = counts if name.endswith("peak") else lengths
            for parameter, own in zip(run.parameters, tensor.split(sizes), strict=True):
                self.state[parameter][name] = own


def _runs(group: dict[str, Any], eight_bits: bool, page_bytes: int) -> list[_Run]:
    """The group's parameters in order, cut where a page is full; those of 32 and 8 bits apart."""
    found: list[_Run] = []
    for small in (False, True):
        taken: list[nn.Parameter] = []
        size = 0
        for parameter in group["params"]:
            count = parameter.numel()
            if (eight_bits and count >= SMALLEST) != small:
                continue
            own = state_bytes(count, eight_bits=eight_bits)
            if taken and size + own > page_bytes:
                found.append(_Run(tuple(taken), group, small))
                taken, size = [], 0
            taken.append(parameter)
            size += own
        if taken:
            found.append(_Run(tuple(taken), group, small))
    return found
