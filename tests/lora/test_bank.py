"""The bank: versions by content, movable names, memory reserved first, rest and wake without a bit lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pennyweight.budget import MemoryBudget
from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.errors import AdapterError, MemoryExhausted
from pennyweight.lora import (
    Adapter,
    AdapterBank,
    adapter_of,
    attach,
    attached,
    content_hash,
    detach,
)
from pennyweight.model import BaseModel, load_base

CONFIGS = (
    LoraConfig(r=2),
    LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj")),
    LoraConfig(r=8, target_modules=("down_proj",)),
    LoraConfig(r=2, target_modules=("o_proj",), modules_to_save=("norm",)),
)
IDS = torch.arange(5, 17)


@pytest.fixture(scope="module")
def base(tiny_model_folder: Callable[[str], Path]) -> BaseModel:
    folder = str(tiny_model_folder("llama"))
    return load_base(BaseConfig(model=folder, quantization="nf4", device="cpu"))


def made(base: BaseModel, number: int) -> Adapter:
    """An adapter that changes something, as a value of its own."""
    config = CONFIGS[number % len(CONFIGS)]
    attach(base, config, name="made", seed=number)
    live = adapter_of(base, "made", config)
    draw = torch.Generator().manual_seed(number)
    factors = {
        path: (a.detach().clone(), 0.2 * torch.randn(b.shape, generator=draw))
        for path, (a, b) in live.factors.items()
    }
    saved = {path: 1.1 * w.detach().clone() for path, w in live.saved.items()}
    detach(base, "made")
    return Adapter(config, factors, saved, base_name=base.name, base_fingerprint=base.fingerprint)


@torch.inference_mode()
def logits(base: BaseModel, slot: str | None) -> torch.Tensor:
    with base.route.over((0, len(IDS)), (slot,)):
        return base.logits(base.hidden(IDS, torch.arange(len(IDS))))


def isolated(base: BaseModel, adapter: Adapter) -> torch.Tensor:
    attach(base, adapter, name="alone", trainable=False)
    found = logits(base, "alone")
    detach(base, "alone")
    return found


def size(adapter: Adapter) -> int:
    return 4 * adapter.parameters


def test_a_version_is_its_content_and_a_name_moves(base: BaseModel) -> None:
    bank = AdapterBank(base)
    one, two = made(base, 0), made(base, 1)
    first = bank.load(one, "sql")
    assert first == content_hash(one)
    assert bank.load(one) == first
    second = bank.load(two, "sql")
    assert bank.names() == {"sql": second}
    assert bank.versions() == (first, second)
    bank.point("sql", first)
    assert bank.slot("sql") == first
    assert torch.equal(logits(base, bank.slot("sql")), isolated(base, one))
    changed = Adapter(one.config.model_copy(update={"lora_alpha": 9}), one.factors, one.saved)
    assert content_hash(changed) != first
    bank.unload("sql")
    assert bank.versions() == (second, first)
    for version in bank.versions():
        bank.unload(version)
    assert attached(base) == []


def test_memory_is_reserved_before_acceptance_and_the_refusal_has_figures(base: BaseModel) -> None:
    one, two, three = (made(base, n) for n in range(3))
    budget = MemoryBudget(size(one) + size(two) // 2)
    bank = AdapterBank(base, budget)
    first = bank.load(one, "one")
    with bank.reading("one"):
        with pytest.raises(
            MemoryExhausted, match=r"adapter two needs .* MB, .* MB of .* MB are free"
        ):
            bank.load(two, "two")
        assert bank.names() == {"one": first}
        assert attached(base) == [first]
    second = bank.load(two, "two")  # the idle one rests
    assert bank.resident() == (second,)
    assert budget.held() == {"adapters": size(two)}
    assert torch.equal(logits(base, bank.slot("one")), isolated(base, one))
    assert bank.resident() == (first,)
    with pytest.raises(AdapterError, match="no adapter 'three'"):
        bank.slot("three")
    bank.unload(first), bank.unload(second)
    assert budget.held() == {}
    assert three is not None


def test_what_makes_room_rests_or_is_forgotten(base: BaseModel) -> None:
    one, two = made(base, 0), made(base, 1)
    for resting in (True, False):
        budget = MemoryBudget(size(one) + size(two) - 1)
        bank = AdapterBank(base, budget, resting=resting)
        assert AdapterBank(base).room_bytes is None
        first, second = bank.load(one), bank.load(two)
        assert bank.resident() == (second,)
        assert bank.versions() == ((first, second) if resting else (second,))
        assert bank.room_bytes == budget.total_bytes
        bank.make_room(budget.total_bytes, "training")
        assert budget.reserve("training", budget.total_bytes)
        assert (bank.resident(), attached(base)) == ((), [])
        assert bank.room_bytes == 0


def test_what_is_read_stays(base: BaseModel) -> None:
    used: set[str] = set()
    bank = AdapterBank(base, in_use=lambda: used)
    version = bank.load(made(base, 0), "one")
    used.add(version)
    for refused in (bank.rest, bank.unload):
        with pytest.raises(AdapterError, match="one is being read"):
            refused(version)
    used.clear()
    bank.rest(version)
    assert attached(base) == []
    bank.unload(version)


class Bank(RuleBasedStateMachine):
    """Any order of operations: each adapter's logits are those it has alone, to the bit."""

    base: BaseModel
    adapters: list[Adapter]
    expected: list[torch.Tensor]

    @initialize()
    def open(self) -> None:
        self.budget = MemoryBudget(sum(size(each) for each in self.adapters[:3]))
        self.bank = AdapterBank(self.base, self.budget)
        self.names: dict[str, int] = {}
        self.known: set[int] = set()

    @rule(number=st.integers(0, 4), name=st.sampled_from(["a", "b", "c"]))
    def load(self, number: int, name: str) -> None:
        self.bank.load(self.adapters[number], name)
        self.names[name] = number
        self.known.add(number)

    @rule(name=st.sampled_from(["a", "b", "c"]), number=st.integers(0, 4))
    def point(self, name: str, number: int) -> None:
        if number in self.known:
            self.bank.point(name, content_hash(self.adapters[number]))
            self.names[name] = number

    @rule(number=st.integers(0, 4))
    def unload(self, number: int) -> None:
        if number in self.known:
            self.bank.unload(content_hash(self.adapters[number]))
            self.known.remove(number)
            self.names = {name: at for name, at in self.names.items() if at != number}

    @rule(number=st.integers(0, 4))
    def rest(self, number: int) -> None:
        if number in self.known:
            self.bank.rest(content_hash(self.adapters[number]))

    @rule(name=st.sampled_from(["a", "b", "c"]))
    def answer(self, name: str) -> None:
        if name in self.names:
            found = logits(self.base, self.bank.slot(name))
            assert torch.equal(found, self.expected[self.names[name]])

    @rule(number=st.integers(0, 4))
    def read(self, number: int) -> None:
        if number in self.known:
            version = content_hash(self.adapters[number])
            assert content_hash(self.bank.read(version)) == version

    @invariant()
    def as_told(self) -> None:
        if not hasattr(self, "bank"):
            return
        known = {content_hash(self.adapters[number]) for number in self.known}
        assert set(self.bank.versions()) == known
        assert set(attached(self.base)) == set(self.bank.resident())
        resident = [n for n in self.known if content_hash(self.adapters[n]) in self.bank.resident()]
        assert self.budget.held().get("adapters", 0) == sum(
            size(self.adapters[n]) for n in resident
        )

    def teardown(self) -> None:
        for version in getattr(self, "bank", AdapterBank(self.base)).versions():
            self.bank.unload(version)


def test_any_order_of_operations_keeps_every_bit(base: BaseModel) -> None:
    Bank.base = base
    Bank.adapters = [made(base, number) for number in range(5)]
    Bank.expected = [isolated(base, adapter) for adapter in Bank.adapters]
    bare = logits(base, None)
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Bank,
        settings=settings(max_examples=8, stateful_step_count=12, deadline=None, database=None),
    )
    assert attached(base) == []
    assert torch.equal(logits(base, None), bare)
