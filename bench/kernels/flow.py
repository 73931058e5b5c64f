"""The loops of a control flow graph, and which loop lies in which; for PTX and for machine code."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components


@dataclass(frozen=True)
class Loop:
    """A loop: the numbers of its basic blocks, and the loops inside it."""

    blocks: frozenset[int]
    inner: tuple[Loop, ...]

    @property
    def own(self) -> frozenset[int]:
        """The blocks that are in no loop inside it."""
        return self.blocks.difference(*(loop.blocks for loop in self.inner))


def loop_nest(successors: Sequence[Collection[int]]) -> tuple[Loop, ...]:
    """The outermost loops that can be reached from block 0, given the blocks that can follow each block.

    A loop is a strongly connected component. Without the edges that lead to its entries, its own components are the
    loops inside it. Loops with several entries are found too. See Steensgaard, "Sequentializing Program Dependence
    Graphs for Irreducible Programs", 1993.
    """
    edges = [(source, target) for source, targets in enumerate(successors) for target in targets]
    reached = set(reachable(successors))
    return _loops(reached, [(source, target) for source, target in edges if source in reached])


def reachable(successors: Sequence[Collection[int]]) -> list[int]:
    """The blocks that can be reached from block 0, in order."""
    edges = [(source, target) for source, targets in enumerate(successors) for target in targets]
    return sorted(breadth_first_order(_matrix(edges, len(successors)), 0, return_predecessors=False).tolist())


def _loops(blocks: Collection[int], edges: list[tuple[int, int]]) -> tuple[Loop, ...]:
    size = max(blocks, default=-1) + 1
    _, labels = connected_components(_matrix(edges, size), directed=True, connection="strong")
    components: dict[int, set[int]] = {}
    for block in sorted(blocks):
        components.setdefault(labels[block], set()).add(block)
    loops = []
    for component in components.values():
        inside = [edge for edge in edges if component.issuperset(edge)]
        if inside:
            entries = {target for source, target in edges if target in component and source not in component}
            entries |= {0} & component
            rest = [(source, target) for source, target in inside if target not in entries]
            loops.append(Loop(frozenset(component), _loops(component, rest)))
    return tuple(loops)


def _matrix(edges: Sequence[tuple[int, int]], size: int) -> coo_array:
    sources, targets = zip(*edges, strict=True) if edges else ((), ())
    return coo_array((np.ones(len(edges), np.int8), (sources, targets)), shape=(size, size)).tocsr()
