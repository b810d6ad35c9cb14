"""Differences and loaders: what a person is told before a tensor is read."""

from __future__ import annotations

from typing import Any

import pytest

from pennyweight.registry import Registry, difference, keep_uniform, loaders


def test_only_what_differs_is_told_and_both_sides_figures(
    registry: Registry, adapter_at: Any
) -> None:
    one = registry.add(adapter_at("one", seed=1), name="a")
    two = registry.add(
        adapter_at("two", seed=2, loss=1.2, **{"train.learning_rate": 1e-3}), name="b", parent="a"
    )
    found = difference(one, two)
    assert found.settings == {
        "parent": (None, one.short),
        "train.learning_rate": (2e-4, 1e-3),
    }
    assert found.figures["loss_after"] == (1.5, 1.2)
    assert found.figures["loss_interval_95_before"] == ([2.9, 3.1], [2.9, 3.1])
    assert found.notes == ()
    assert difference(one, one).notes == ("both are the same version",)


def test_without_a_receipt_pefts_settings_are_compared(registry: Registry, adapter_at: Any) -> None:
    one = registry.add(adapter_at("one", loss=None), name="a")
    two = registry.add(adapter_at("two", loss=None, lora_alpha=64.0), name="b")
    found = difference(one, two)
    assert list(found.settings) == ["lora_alpha"]
    assert found.notes == ("one of them has no held-out figures",)


@pytest.mark.parametrize(
    ("how", "faulted"),
    [
        ({}, set()),
        ({"use_rslora": True}, {"SGLang", "llama.cpp"}),
        ({"alpha_pattern": {"q_proj": 4.0}}, {"vLLM", "LoRAX", "SGLang", "llama.cpp"}),
    ],
)
def test_who_loads_it_as_it_is(
    registry: Registry, adapter_at: Any, how: dict[str, Any], faulted: set[str]
) -> None:
    version = registry.add(adapter_at("one", **how), name="a")
    assert {each.tool for each in loaders(version) if each.faults} == faulted


def test_the_uniform_form_loads_everywhere(registry: Registry, adapter_at: Any) -> None:
    version = registry.add(
        adapter_at("one", alpha_pattern={"q_proj": 4.0}, use_rslora=True), name="a"
    )
    plain = keep_uniform(registry, "a", name="a-plain")
    assert not [each for each in loaders(plain) if each.faults]
    assert (plain.parent, plain.data, plain.held_out()) == (
        version.hash,
        version.data,
        version.held_out(),
    )
    assert registry.lineage(plain) == [plain, version]
