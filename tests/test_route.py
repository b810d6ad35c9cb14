"""A route holds for the length of one pass, and names runs of documents."""

import pytest
import torch

from pennyweight.route import Route


def test_documents_that_read_the_same_adapter_are_one_segment() -> None:
    route = Route()
    with route.over([0, 3, 5, 9], ["a", "a", "b"]):
        assert route.segments() == (("a", 0, 5), ("b", 5, 9))


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


def test_a_short_pass_is_gathered_by_adapter() -> None:
    route, cpu = Route(), torch.device("cpu")
    with route.over([0, 1, 2, 3, 4], [None, "b", "a", "b"]):
        mixture = route.mixture(cpu)
        assert mixture is not None
        assert (mixture.names, mixture.bare, mixture.most) == (("a", "b"), 1, 2)
        assert mixture.gather is not None
        assert mixture.back is not None
        assert mixture.gather.tolist() == [2, 1, 1, 3], "a's second place is filled up"
        assert mixture.back.tolist() == [2, 0, 3]
    with route.over([0, 2, 4], ["a", "b"]):
        mixture = route.mixture(cpu)
        assert mixture is not None
        assert mixture.gather is None
        assert mixture.back is None
    # What was stacked for others stays while half of the groups are in use.
    for read in (["c", "d"], ["a", "c"]):
        with route.over([0, 1, 2], read):
            mixture = route.mixture(cpu)
            assert mixture is not None
            assert mixture.names == ("a", "b", "c", "d")
    # One adapter is read as if alone, whoever was read before.
    with route.over([0, 1], ["a"]):
        mixture = route.mixture(cpu)
        assert mixture is not None
        assert mixture.names == ("a",)
    with route.over([0, 1], ["c"]):
        mixture = route.mixture(cpu)
        assert mixture is not None
        assert mixture.names == ("c",)


def test_long_bare_or_scattered_passes_go_by_segments() -> None:
    route, cpu = Route(), torch.device("cpu")
    for boundaries, adapters in (
        ([0, 4], [None]),
        ([0, 9, 300], ["a", "b"]),
        ([0, 1, 2], ["a", None]),
        ([0, 100, 101, 102, 103], ["a", "b", "c", "d"]),
    ):
        with route.over(boundaries, adapters):
            assert route.mixture(cpu) is None
