"""The loops of small control flow graphs, written by hand."""

import pytest

from bench.kernels.flow import loop_nest, reachable


def shape(loops):
    """Each loop as its blocks and the loops inside it."""
    return [(sorted(loop.blocks), shape(loop.inner)) for loop in sorted(loops, key=lambda loop: min(loop.blocks))]


GRAPHS = {
    "no loop": ([[1, 2], [2], []], []),
    "a block that repeats itself": ([[1], [1, 2], []], [([1], [])]),
    "two in a row": ([[1], [1, 2], [3], [2]], [([1], []), ([2, 3], [])]),
    "nested": ([[1], [2], [2, 3], [1, 4], []], [([1, 2, 3], [([2], [])])]),
    "two inside one": ([[1], [1, 2], [2, 3], [0]], [([0, 1, 2, 3], [([1], []), ([2], [])])]),
    "several ways out": ([[1], [2, 4], [3, 5], [1], [5], []], [([1, 2, 3], [])]),
    "two ways back are one loop": ([[1], [2, 3], [1], [1, 4], []], [([1, 2, 3], [])]),
    "two entries": ([[1, 2], [2], [1, 3], []], [([1, 2], [])]),
    "never reached": ([[], [1, 2], [1]], []),
    "three deep": ([[1], [2], [3], [3, 4], [2, 5], [1, 6], []], [([1, 2, 3, 4, 5], [([2, 3, 4], [([3], [])])])]),
}


@pytest.mark.parametrize(("graph", "wanted"), GRAPHS.values(), ids=GRAPHS.keys())
def test_the_loops_of_a_graph(graph, wanted):
    assert shape(loop_nest(graph)) == wanted


def test_the_own_blocks_of_a_loop_are_in_no_other():
    (outer,) = loop_nest([[1], [2], [2, 3], [1, 4], []])
    assert sorted(outer.own) == [1, 3]
    assert sorted(outer.inner[0].own) == [2]


def test_only_what_can_be_reached_counts():
    assert reachable([[2], [0], [2]]) == [0, 2]
    assert reachable([[]]) == [0]
