"""Read PTX: the loads and multiply-adds of a kernel's inner loop.

PTX is the output of libNVVM, before ptxas assigns registers. Loops are already unrolled and loads merged, so the counts
of the inner loop are final. The floats loaded for each multiply-add show how much the kernel's tiling saves.
"""

from __future__ import annotations

import re

from bench.kernels.flow import loop_nest
from bench.records.kernels import LoopCounts

FUNCTION = re.compile(r"^\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)  # a call's own braces are indented
LABEL = re.compile(r"([$\w]+):")
BRANCH = re.compile(r"(?:@\S+\s+)?bra(?:\.uni)?\s+([$\w]+)")
ENDS = ("ret", "exit", "trap")


def inner_loop(ptx: str) -> LoopCounts | None:
    """Count the instructions of the innermost loop with the most FMAs; None if no loop has an FMA.

    If no innermost loop has an FMA, the outer loop with the most FMAs is counted, without the loops inside it.
    """
    innermost, outer = [], []
    for body in FUNCTION.findall(ptx):
        blocks, successors = _flow_graph(body)
        waiting = list(loop_nest(successors))
        while waiting:
            loop = waiting.pop()
            waiting += loop.inner
            counts = (_count(line) for number in loop.own for line in blocks[number])
            (outer if loop.inner else innermost).append(sum(counts, LoopCounts()))
    for candidates in (innermost, outer):
        best = max(candidates, key=lambda counts: counts.fma, default=LoopCounts())
        if best.fma:
            return best
    return None


def _flow_graph(body: str) -> tuple[list[list[str]], list[list[int]]]:
    """The basic blocks of a function, and the numbers of the blocks that can follow each one."""
    blocks: list[list[str]] = [[]]
    starts: dict[str, int] = {}
    for raw in body.splitlines():
        line = raw.partition("//")[0].strip()
        if label := LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
            starts[label[1]] = len(blocks) - 1
        elif line:
            blocks[-1].append(line)
            if BRANCH.match(line) or line.startswith(ENDS):
                blocks.append([])
    successors = []
    for number, block in enumerate(blocks, 1):
        last = block[-1] if block else ""
        branch = BRANCH.match(last)
        following = [starts[branch[1]]] if branch else []
        if number < len(blocks) and not last.startswith(("bra", *ENDS)):
            following.append(number)
        successors.append(following)
    return blocks, successors


def _count(line: str) -> LoopCounts:
    operation = re.sub(r"^@\S+\s+", "", line)
    name, *modifiers = operation.split()[0].rstrip(";").split(".")
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
