"""Moments in 8 bits and in pages: equal to the bit wherever they lie, near bitsandbytes' in 8 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pennyweight.optim import (
    PagedAdamW,
    adamw,
    load_state_tensors,
    set_learning_rate,
    state_tensors,
)
from pennyweight.optim.eight_bits import BLOCK, dequantized, quantize_into
from pennyweight.optim.paged import state_bytes
from pennyweight.optim.pages import Page, Pager
from pennyweight.plan import named_device, plan
from pennyweight.plan.claims import PUBLISHED
from pennyweight.plan.memory import PAGE_BYTES
from pennyweight.plan.setting import Setting
from tests.plan.conftest import CPU, run_config

KINDS = ("paged_adamw_32bit", "paged_adamw_8bit")
# Two of them past 4,096 numbers, one of which leaves its last block part full.
SHAPES = {
    "q.lora_A": (8, 1000),
    "q.lora_B": (600, 8),
    "norm.weight": (64,),
    "head.weight": (90, 50),
}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def steps(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], seeds: range) -> None:
    set_learning_rate(optimizer, 1e-2)
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def made(kind: Any, resident_bytes: int | None = None, page_bytes: int | None = None) -> Any:
    """An optimizer over fresh parameters, with pages of some 40 KB where a size is given."""
    named = parameters()
    optimizer = adamw(
        named, weight_decay=0.1, loraplus_lr_ratio=4.0, kind=kind, resident_bytes=resident_bytes
    )
    if page_bytes is not None:
        assert isinstance(optimizer, PagedAdamW)
        optimizer = PagedAdamW(
            [
                {**g, "params": list(zip(g["param_names"], g["params"], strict=True))}
                for g in optimizer.param_groups
            ],
            betas=(0.9, 0.999),
            eps=1e-8,
            eight_bits=kind.endswith("8bit"),
            resident_bytes=resident_bytes,
            page_bytes=page_bytes,
        )
    return named, optimizer


def test_paged_in_32_bits_is_torchs_to_the_bit() -> None:
    named, optimizer = made("adamw_torch")
    steps(optimizer, named, range(4))
    for budget in (None, 0, 70_000):
        twins, paged = made("paged_adamw_32bit", budget, page_bytes=40_000)
        steps(paged, twins, range(4))
        for name in named:
            assert torch.equal(named[name], twins[name]), budget
        for name, value in state_tensors(optimizer).items():
            assert torch.equal(state_tensors(paged)[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_budget_changes_no_bit_and_is_kept(kind: str) -> None:
    named, whole = made(kind, None, page_bytes=40_000)
    assert len(whole.pager.pages) > 2
    steps(whole, named, range(4))
    assert whole.pager.moved_bytes == 0
    state = sum(page.bytes for page in whole.pager.pages)
    for budget in (0, 45_000):
        twins, paged = made(kind, budget, page_bytes=40_000)
        steps(paged, twins, range(4))
        for name in named:
            assert torch.equal(named[name], twins[name])
        assert paged.pager.here_bytes <= budget
        passing = state - paged.pager.here_bytes
        assert paged.pager.moved_bytes == 2 * 4 * passing  # there and back, each step


@pytest.mark.parametrize("kind", KINDS)
def test_relieved_amid_a_run_it_goes_on_the_same(kind: str) -> None:
    named, whole = made(kind)
    twins, paged = made(kind)
    steps(whole, named, range(4))
    steps(paged, twins, range(2))
    held = paged.pager.here_bytes
    assert paged.relieve() == held > 0
    assert paged.pager.here_bytes == 0
    assert paged.relieve() == 0
    steps(paged, twins, range(2, 4))
    assert paged.pager.here_bytes == 0
    for name in named:
        assert torch.equal(named[name], twins[name])


@pytest.mark.parametrize("kind", [*KINDS, "adamw_8bit"])
def test_state_goes_over_to_the_bit_wherever_it_lies(kind: str) -> None:
    named, optimizer = made(kind)
    steps(optimizer, named, range(3))
    kept = {name: value.clone() for name, value in state_tensors(optimizer).items()}
    twins, other = made(kind, 0)
    load_state_tensors(other, kept)
    with torch.no_grad():
        for name in named:
            twins[name].copy_(named[name])
    steps(optimizer, named, range(3, 5))
    steps(other, twins, range(3, 5))
    for name in named:
        assert torch.equal(named[name], twins[name])
    if kind.endswith("8bit"):
        assert kept["q.lora_A/exp_avg"].dtype == torch.uint8
        assert kept["q.lora_A/exp_avg"].numel() == -(-8000 // BLOCK) * BLOCK
        assert kept["norm.weight/exp_avg"].dtype == torch.float32


def test_a_page_is_as_large_as_said() -> None:
    _, optimizer = made("adamw_8bit")
    sizes = [state_bytes(p.numel(), eight_bits=True) for p in parameters().values()]
    assert sum(p.bytes for p in optimizer.pager.pages) == pytest.approx(sum(sizes), rel=0.05)
    assert optimizer.relieve() == 0  # not paged: it stays


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_gradient_stands_still(kind: str) -> None:
    named, optimizer = made(kind, 0)
    steps(optimizer, named, range(2))
    before = {n: t.clone() for n, t in state_tensors(optimizer).items() if n.startswith("q.lora_B")}
    value = named["q.lora_B"].detach().clone()
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    named["q.lora_B"].grad = None
    optimizer.step()
    assert torch.equal(named["q.lora_B"], value)
    for name, tensor in before.items():
        assert torch.equal(state_tensors(optimizer)[name], tensor)
    assert float(optimizer.state[named["q.lora_A"]]["step"]) == 3


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_come_back_within_half_a_gap(signed: bool) -> None:
    values = torch.randn(4 * BLOCK)
    values = values if signed else values.square()
    values[:BLOCK] = 0
    codes, peaks = torch.empty(4 * BLOCK, dtype=torch.uint8), torch.empty(4)
    quantize_into(codes, peaks, values.clone(), signed=signed)
    again = dequantized(codes, peaks, signed=signed)
    assert not again[:BLOCK].any()
    # The widest gap of the signed format is 1.4 % of the peak, of the unsigned one half of that.
    bound = (0.0071 if signed else 0.0036) * peaks.repeat_interleave(BLOCK)
    assert ((again - values).abs() <= bound).all()
    kept, same = codes.clone(), torch.empty(4)
    quantize_into(codes, same, again, signed=signed)
    assert torch.equal(codes, kept)


def test_8_bits_follow_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(1)
    mine = nn.Parameter(torch.randn(64, 256, generator=generator))
    theirs = nn.Parameter(mine.detach().clone())
    start = mine.detach().clone()
    ours = adamw({"w": mine}, weight_decay=0.01, kind="adamw_8bit")
    set_learning_rate(ours, 1e-2)
    peer = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.01, min_8bit_size=4096)
    for _ in range(10):
        mine.grad = torch.randn(mine.shape, generator=generator) + 0.3
        theirs.grad = mine.grad.clone()
        ours.step()
        peer.step()
    moved = (theirs - start).abs().mean()
    apart = (mine - theirs).abs()
    # A value on the midpoint of two levels may fall either way, and moves a step by one level.
    assert apart.mean() <= 2e-4 * moved
    assert apart.max() <= 0.1 * moved


def test_pages_hold_their_tensors_side_by_side() -> None:
    pages = [Page([((3, 5), torch.float32), ((7,), torch.uint8)]) for _ in range(3)]
    pager = Pager(pages, torch.device("cpu"), resident_bytes=pages[0].bytes)
    assert [page.here is not None for page in pages] == [True, False, False]
    for place in range(3):
        first, second = pager.using(place).tensors()
        assert (first.shape, first.dtype) == ((3, 5), torch.float32)
        assert (second.shape, second.dtype) == ((7,), torch.uint8)
        first.fill_(place)
        second.fill_(place + 10)
        pager.used(place)
    assert [page.here is not None for page in pages] == [True, False, False]
    for place, page in enumerate(pages):
        first, second = page.tensors()
        assert first.unique().tolist() == [place]
        assert second.unique().tolist() == [place + 10]


def test_the_plan_counts_what_the_optimizer_holds() -> None:
    model = PUBLISHED["Llama-3-8B"]
    sizes = {}
    for kind in ("adamw_torch", "adamw_8bit", "paged_adamw_32bit"):
        config = run_config(tokens=64, r=16)
        train = config.train.model_copy(update={"optim": kind})
        setting = Setting(config.model_copy(update={"train": train}), model, CPU)
        sizes[kind] = setting.optimizer_bytes
    assert sizes["adamw_torch"] == sizes["paged_adamw_32bit"] == 8 * setting.trained_elements
    assert sizes["adamw_8bit"] == pytest.approx(sizes["adamw_torch"] / 4, rel=0.02)
    assert PAGE_BYTES == 32 << 20
    named = {"a": nn.Parameter(torch.zeros(5, 1000)), "b": nn.Parameter(torch.zeros(4000))}
    held = adamw(named, kind="adamw_8bit").pager.pages  # type: ignore[attr-defined]
    counted = sum(state_bytes(p.numel(), eight_bits=True) for p in named.values())
    assert sum(page.bytes for page in held) == pytest.approx(counted, rel=0.02)


def test_the_plan_pages_before_it_recomputes() -> None:
    model = PUBLISHED["Llama-3-8B"]
    config = run_config(tokens=512, dtype="bfloat16", r=64)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(
                update={"optim": "paged_adamw_32bit", "gradient_checkpointing": "auto"}
            )
        }
    )
    card = named_device("rtx4090")
    roomy = plan(config, model, device=card)
    assert not roomy.optimizer_on_host
    scarce = plan(config, model, device=card, budget_bytes=roomy.peak_bytes - 10**8)
    assert scarce.optimizer_on_host
    assert scarce.recompute == "none"
    assert scarce.fits
    assert scarce.host_bytes == 8 * scarce.trained_parameters


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_a_run_finishes_that_would_not_without_pages(kind: str) -> None:
    """256 M numbers: weights and gradient take 2 GiB, float32 moments 2 more, under a cap of 3.4."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(3.4 * 2**30 / total)
    try:
        if kind == "paged_adamw_32bit":
            with pytest.raises(torch.OutOfMemoryError):
                _large_steps("adamw_torch", None)
            torch.cuda.empty_cache()
        found = _large_steps(kind, 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert torch.equal(found, _large_steps(kind, None))


def _large_steps(kind: Any, resident_bytes: int | None) -> Tensor:
    named = {f"w{i}": nn.Parameter(torch.ones(2**22, device="cuda")) for i in range(64)}
    optimizer = adamw(named, kind=kind, resident_bytes=resident_bytes)
    set_learning_rate(optimizer, 1e-2)
    for number in range(3):
        for parameter in named.values():
            parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
        optimizer.step()
    return named["w0"].detach().cpu()
