"""General text that is on every machine, and none of the built-in base's lessons."""

from __future__ import annotations

import sys

import pytest

from pennyweight.builtin.task import LEFT_OUT
from pennyweight.compare.general import PASSAGE_CHARS, passages
from pennyweight.errors import DataError


def test_passages_are_many_short_and_the_same_every_time() -> None:
    found = list(passages())
    assert found == list(passages())
    assert len(found) == len(set(found)) > 300
    assert sum(len(passage) <= PASSAGE_CHARS for passage in found) > 0.7 * len(found)
    assert "pydoc_data" in LEFT_OUT  # its modules are in no split of the built-in task


def test_a_python_without_it_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="name a file of plain text"):
        list(passages())
