"""Sizes and devices as people write them."""

from __future__ import annotations

import pytest

from pennyweight.errors import ConfigError
from pennyweight.plan.devices import DEVICES, named_device, parse_memory, this_device


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("24g", 24e9), ("1.5GiB", 1.5 * 2**30), ("512 MB", 512e6), ("6000000", 6e6)],
)
def test_memory_is_read_as_written(text: str, size: float) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "lots", "24 apples", "-3GB", "24", "5iB"])
def test_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="GB"):
        parse_memory(text)


def test_devices_are_found_by_the_names_people_use() -> None:
    assert named_device("RTX 4090").name == "rtx4090"
    assert named_device("NVIDIA GeForce RTX 3060").name == "rtx3060"
    with pytest.raises(ConfigError, match="did you mean rtx4090"):
        named_device("rtx4900")
    with pytest.raises(ConfigError, match="--memory"):
        named_device("zzzz")


def test_this_machine_has_a_processor() -> None:
    device = this_device("cpu")
    assert device.kind == "cpu"
    assert device.dtype == "float32"
    assert device.memory_bytes > 2**28
    assert device.fp32 > 1e9


def test_cards_without_bfloat16_say_so() -> None:
    assert DEVICES["t4"].dtype == "float16"
    assert all(d.half_type == "bfloat16" for d in DEVICES.values() if d.name != "t4")
