"""A route holds for the length of one pass, and names runs of documents."""

import pytest

from pennyweight.route import Route


def test_documents_that_read_the_same_adapter_are_one_segment() -> None:
    route = Route()
    with route.over([0, 3, 5, 9], ["a", "a", "b"]):
        assert route.segments() == [("a", 0, 5), ("b", 5, 9)]


def test_a_route_is_put_back_also_after_an_error() -> None:
    route = Route()
    with route.over([0, 4], [None], dropout_seed=7):
        with pytest.raises(RuntimeError), route.over([0, 1, 2], ["x", "y"]):
            raise RuntimeError
        assert route.boundaries == (0, 4)
        assert route.adapters == (None,)
        assert route.dropout_seed == 7
    assert route.boundaries == ()


def test_one_adapter_for_each_document() -> None:
    with pytest.raises(AssertionError), Route().over([0, 4], ["x", "y"]):
        pass
