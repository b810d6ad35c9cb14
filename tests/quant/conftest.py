"""The oracle of this room: bitsandbytes on the CPU, never imported by the package itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def bnb() -> Iterator[ModuleType]:
    """bitsandbytes.functional; its odd shapes would be compiled one by one, so it runs eagerly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip(
            "bitsandbytes.functional", reason="bitsandbytes, the oracle, is not installed"
        )
    with torch.compiler.set_stance("force_eager"):
        yield functional
