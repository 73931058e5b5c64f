"""Read PTX: the loads and multiply-adds of a kernel's inner loop.

PTX is the output of libNVVM, before ptxas assigns registers. Loops are already unrolled and loads merged, so the counts
of the inner loop are final. The floats loaded for each multiply-add show how much the kernel's tiling saves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from bench.records.kernels import LoopCounts

LABEL = re.compile(r"^([$\w]+):")
BRANCH = re.compile(r"^(?P<predicate>@\S+\s+)?bra(?:\.uni)?\s+(?P<label>[$\w]+)")


@dataclass(frozen=True)
class _Block:
    """Instructions without a branch in or out, and the blocks that can follow."""

    counts: LoopCounts
    successors: tuple[int, ...]


def inner_loop(ptx: str) -> LoopCounts | None:
    """Count the instructions of the innermost loop with the most FMAs; None if no loop has an FMA.

    If no innermost loop has an FMA, the outer loop with the most FMAs is counted, without the loops inside it.
    """
    innermost, outer = [], []
    for body in _functions(ptx):
        blocks = _blocks(body)
        loops = _loops(blocks)
        for header, members in loops.items():
            inside = set().union(*(loops[other] for other in loops if other != header and other in members))
            counts = sum((blocks[number].counts for number in members - inside), LoopCounts())
            (outer if inside else innermost).append(counts)
    for candidates in (innermost, outer):
        best = max(candidates, key=lambda counts: counts.fma, default=LoopCounts())
        if best.fma:
            return best
    return None


def _functions(ptx: str) -> Iterator[list[str]]:
    """Yield the lines of each function's body."""
    body: list[str] = []
    depth = 0  # a call has its own braces
    for raw in ptx.splitlines():
        line = raw.split("//")[0].strip()
        if line == "{":
            depth += 1
        elif line == "}":
            depth -= 1
            if depth == 0:
                yield body
                body = []
        elif depth and line:
            body.append(line)


def _blocks(lines: list[str]) -> list[_Block]:
    """Cut a function at its labels and after its branches."""
    starts: dict[str, int] = {}
    cut: list[list[str]] = [[]]
    for line in lines:
        if label := LABEL.match(line):
            if cut[-1]:
                cut.append([])
            starts[label[1]] = len(cut) - 1
            continue
        cut[-1].append(line)
        if BRANCH.match(line) or line.startswith(("ret", "exit", "trap")):
            cut.append([])
    blocks = []
    for number, block in enumerate(cut):
        last = block[-1] if block else ""
        branch = BRANCH.match(last)
        successors = []
        if branch:
            successors.append(starts[branch["label"]])
        ends = last.startswith(("ret", "exit", "trap")) or (branch and not branch["predicate"])
        if not ends and number + 1 < len(cut):
            successors.append(number + 1)
        blocks.append(_Block(sum(map(_count, block), LoopCounts()), tuple(successors)))
    return blocks


def _count(line: str) -> LoopCounts:
    operation = line.partition(" ")[2].lstrip() if line.startswith("@") else line
    name, *modifiers = operation.replace("\t", " ").split(" ")[0].rstrip(";").split(".")
    if name == "fma" and modifiers[-1] in ("f32", "f32x2"):
        return LoopCounts(fma=2 if modifiers[-1] == "f32x2" else 1)
    if name != "ld" or {"local", "param", "const"} & set(modifiers):
        return LoopCounts()
    width = next((int(modifier[1:]) for modifier in modifiers if modifier in ("v2", "v4", "v8")), 1)
    floats = width * max(1, int(modifiers[-1][1:]) // 32)
    if any(modifier.startswith("shared") for modifier in modifiers):
        return LoopCounts(shared_loads=1, shared_floats=floats)
    # libNVVM omits the state space where it does not know it: an argument, so global memory.
    return LoopCounts(global_loads=1, global_floats=floats)


def _loops(blocks: list[_Block]) -> dict[int, set[int]]:
    """The blocks of each natural loop, by the block at its entry.

    A back edge is a branch to a block on the current depth-first path. Its loop has all blocks that reach the back edge
    without passing the entry. See Aho, Lam, Sethi and Ullman, "Compilers", 2006, section 9.6.
    """
    back: list[tuple[int, int]] = []
    path: set[int] = set()
    seen: set[int] = set()
    stack: list[tuple[int, bool]] = [(0, False)]
    while stack:
        number, done = stack.pop()
        if done:
            path.discard(number)
            continue
        if number in seen:
            continue
        seen.add(number)
        path.add(number)
        stack.append((number, True))
        for successor in blocks[number].successors:
            if successor in path:
                back.append((number, successor))
            elif successor not in seen:
                stack.append((successor, False))
    before: dict[int, list[int]] = {}
    for number in seen:
        for successor in blocks[number].successors:
            before.setdefault(successor, []).append(number)
    loops: dict[int, set[int]] = {}
    for source, header in back:
        members = loops.setdefault(header, {header})
        waiting = [source]
        while waiting:
            number = waiting.pop()
            if number not in members:
                members.add(number)
                waiting += before.get(number, [])
    return loops
