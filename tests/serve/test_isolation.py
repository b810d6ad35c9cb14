"""Adapters of several keys kept apart, as a machine whose steps hypothesis chooses (and shortens)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

pytest.importorskip("fastapi")

from campaigns.isolation import NAMES, OWNERS, Names, World

ADAPTERS = 3
owners, names = st.sampled_from(OWNERS), st.sampled_from(NAMES[:2])
asked = st.lists(st.tuples(owners, names | st.just("base")), min_size=1, max_size=4)


class Isolated(RuleBasedStateMachine):
    """Every name answers as its adapter alone, or is not there."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.names = Names(world)

    @rule(owner=owners, name=names, number=st.integers(0, ADAPTERS - 1))
    def load(self, owner: str, name: str, number: int) -> None:
        assert self.names.load(owner, name, number) is None

    @rule(owner=owners, name=names)
    def unload(self, owner: str, name: str) -> None:
        assert self.names.unload(owner, name) is None

    @rule(asked=asked)
    def ask(self, asked: list[tuple[str, str]]) -> None:
        assert self.names.ask(asked) is None

    def teardown(self) -> None:
        for owner, name in list(self.names.known):
            self.names.unload(owner, name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("isolated"), ADAPTERS, resident=2)
    yield made
    made.end()


def test_each_name_is_its_own_adapter_and_its_keys_alone(world: World) -> None:
    few: Any = settings(max_examples=4, stateful_step_count=12, deadline=None, database=None)
    run_state_machine_as_test(lambda: Isolated(world), settings=few)


def test_the_machine_sees_an_answer_that_is_anothers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the base says passes for no adapter's answer."""
    monkeypatch.setitem(world.alone, 1, world.alone[None])
    kept = Names(world)
    assert kept.load("alice", "first", 1) is None
    assert "answers other than alone" in str(kept.ask([("alice", "first")]))
    assert kept.unload("alice", "first") is None
