"""AdamW against its formula, its groups, its schedule and its state as named tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pennyweight.errors import DiskError
from pennyweight.optim import adamw, load_state_tensors, lr_at, set_learning_rate, state_tensors


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.lora_A": (2, 8), "q.lora_B": (6, 2), "norm.weight": (8,), "head.weight": (9, 8)}
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def step(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_a_step_counts_as_a_change_of_each_parameter() -> None:
    """What is kept of a parameter, as by generation, is made anew by that count."""
    named = parameters()
    optimizer = adamw(named)
    before = {name: parameter._version for name, parameter in named.items()}
    step(optimizer, named, 1)
    assert all(parameter._version > before[name] for name, parameter in named.items())


def test_warm_up_meets_the_peak_and_the_schedule_falls() -> None:
    rates = [
        lr_at(s, peak=1.0, total_steps=4, warmup_steps=2, kind="linear", min_ratio=0.0)
        for s in range(4)
    ]
    assert rates == [0.5, 1.0, 1.0, 0.5]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_stay_between_their_floor_and_peak(kind: str) -> None:
    rates = [
        lr_at(s, peak=2.0, total_steps=50, warmup_steps=5, kind=kind, min_ratio=0.1)
        for s in range(60)
    ]
    assert max(rates) == 2.0
    assert min(rates[5:]) >= 0.2 * (1 - 1e-12)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[50] == pytest.approx(2.0 if kind == "constant" else 0.2)


def test_cosine_is_half_way_half_way() -> None:
    assert lr_at(5, peak=1.0, total_steps=10, kind="cosine") == pytest.approx(0.5)


def test_one_step_of_the_formula() -> None:
    named = parameters()
    before = {n: p.detach().clone() for n, p in named.items()}
    optimizer = adamw(named, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, loraplus_lr_ratio=4.0)
    set_learning_rate(optimizer, 0.01)
    step(optimizer, named, 1)
    for name, parameter in named.items():
        rate = 0.04 if "lora_B" in name else 0.01
        kept = 1 - rate * 0.1 if parameter.ndim > 1 else 1.0
        # After one step m / (1 - b1) = g and sqrt(v / (1 - b2)) = |g|.
        g = parameter.grad
        expected = before[name] * kept - rate * g / (g.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_equals_torch_adamw_to_the_bit() -> None:
    named, twins = parameters(), parameters()
    ours = adamw(named, weight_decay=0.0)
    theirs = torch.optim.AdamW(list(twins.values()), lr=3e-3, weight_decay=0.0, fused=True)
    set_learning_rate(ours, 3e-3)
    for seed in range(4):
        step(ours, named, seed)
        step(theirs, twins, seed)
    for name in named:
        assert torch.equal(named[name], twins[name])


def test_state_is_whole_from_the_start_and_goes_over_to_the_bit() -> None:
    named = parameters()
    optimizer = adamw(named, weight_decay=0.1, loraplus_lr_ratio=16.0)
    assert sorted(state_tensors(optimizer)) == sorted(
        f"{name}/{part}" for name in named for part in ("step", "exp_avg", "exp_avg_sq")
    )
    set_learning_rate(optimizer, 1e-2)
    step(optimizer, named, 1)
    twins = parameters()
    other = adamw(twins, weight_decay=0.1, loraplus_lr_ratio=16.0)
    load_state_tensors(other, {n: t.clone() for n, t in state_tensors(optimizer).items()})
    with torch.no_grad():
        for name in named:
            twins[name].copy_(named[name])
    set_learning_rate(other, 1e-2)
    for seed in (2, 3):
        step(optimizer, named, seed)
        step(other, twins, seed)
    for name in named:
        assert torch.equal(named[name], twins[name])


def test_state_that_does_not_fit_is_refused_whole() -> None:
    optimizer = adamw(parameters())
    tensors = {n: t + 1 for n, t in state_tensors(optimizer).items()}
    tensors["q.lora_A/exp_avg"] = torch.zeros(3, 3)
    tensors["v.lora_A/exp_avg"] = tensors.pop("q.lora_B/exp_avg")
    with pytest.raises(DiskError) as caught:
        load_state_tensors(optimizer, tensors)
    assert str(caught.value).splitlines() == [
        "optimizer state: q.lora_A/exp_avg is [3, 3], this run needs [2, 8]",
        "optimizer state: q.lora_B/exp_avg is missing",
        "optimizer state: v.lora_A/exp_avg is unknown",
    ]
    assert not any(t.any() for t in state_tensors(optimizer).values())


def test_warm_up_as_long_as_the_run() -> None:
    assert lr_at(9, peak=1.0, total_steps=10, warmup_steps=10, kind="cosine") == 1.0
    assert math.isfinite(lr_at(10, peak=1.0, total_steps=10, warmup_steps=10, kind="cosine"))
