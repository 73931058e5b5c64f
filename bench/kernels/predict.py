"""Predict the time of GPU kernels from their machine code and the work that they state; a model, not a measurement.

A launch takes the longest of four times. Its instructions: each multiprocessor has four schedulers, and each of them
issues one instruction of a warp a cycle. The multiprocessor with the most blocks decides, so that a grid of 18 blocks
uses 18 of 132. Its loads: the first-level cache serves a line of 128 bytes a cycle. Its bytes: every operand crosses
global memory once. And the overhead of a launch. No time is below that of the stated FLOPs at the card's peak.

Nothing runs at its limit: warps wait for memory and at barriers, and the last wave of blocks does not fill the card.
So multiprocessors are taken to work in a stated share of the cycles, in the project's kernels as in a library's.

How often a loop turns is not in the machine code. The hot loop turns as often as the multiply-adds (or the loads) that
the version states for a thread, ``KernelWork.fmas``, fill it. ``KernelWork.rounds`` are the turns of the loops around
it, from the inside out. A stated loop that turns as often as the hot loop has been unrolled into it and is left out.
Every other loop, such as one that fills shared memory, turns once a turn of the loop around it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from bench.kernels.cards import Card
from bench.kernels.compiler import machine_codes
from bench.kernels.launches import NETWORK, Product, Shape, kernel_uses, recorded_step
from bench.records.kernels import CodeCounts, MachineCode
from bench.records.predictions import Prediction, StepPrediction
from common.architecture import Architecture
from common.operations import Operation
from common.work import KernelWork
from versions.registry import BackendInfo

LAUNCH_S = 2.5e-6  # a typical time from one short kernel to the next
BUSY_SHARE = 0.8  # of the cycles, in which a multiprocessor that has work does it
MEMORY_SHARE = 0.9  # of the bandwidth of global memory
TILE = 128  # rows and columns of the result that a multiprocessor computes at a time
NARROWEST = 32  # rows or columns of the narrowest tile
SCHEDULERS = 4  # of a multiprocessor
LANES = 32  # threads of a warp

Key = tuple[str, Operation, str]  # stage, operation, kernel


@dataclass(frozen=True)
class Built:
    """The launches of a kernel for one operation, and its machine code."""

    shapes: list[Shape]
    code: MachineCode


def loop_turns(code: MachineCode, work: KernelWork) -> list[float]:
    """How often a thread runs each loop of ``code``, in the order of ``code.loops``."""
    turns: list[float | None] = [None] * len(code.loops)
    hot = code.hot
    if hot is not None:
        inner = turns[hot] = _hot_turns(code, work)
        around, rounds = code.loops[hot].parent, [count for count in work.rounds if inner is None or count < inner]
        while around is not None and rounds:
            turns[around] = rounds.pop()
            around = code.loops[around].parent
    for place, loop in enumerate(code.loops):
        if turns[place] is None:
            turns[place] = 1.0 if loop.parent is None else turns[loop.parent]
    return turns


def _hot_turns(code: MachineCode, work: KernelWork) -> float | None:
    """The turns in which the hot loop does the stated multiply-adds or, without these, loads; None if unknown."""
    loop = code.hot_loop or CodeCounts()
    if loop.ffma and work.fmas:
        return work.fmas / loop.ffma
    widths = ((int(key.partition(".")[2]), number) for key, number in loop.memory.items() if key.startswith("LDG."))
    loaded = sum(number * max(1, bits // 32) for bits, number in widths)
    return work.loads / loaded if loaded and work.loads else None


def thread_instructions(code: MachineCode, work: KernelWork) -> tuple[float, float]:
    """The instructions that a thread executes, and the multiply-adds among them."""
    parts = [(code.straight, 1.0), *zip(code.loops, loop_turns(code, work), strict=True)]
    return sum(part.instructions * turns for part, turns in parts), sum(part.ffma * turns for part, turns in parts)


def issue_s(card: Card, shape: Shape, instructions: float, ffma: float) -> float:
    """Seconds to issue so many instructions a thread on the multiprocessor with the most blocks."""
    warps = ceil(shape.blocks / card.multiprocessors) * ceil(shape.threads / LANES)
    cycles_an_ffma = SCHEDULERS * LANES / card.lanes
    return ceil(warps / SCHEDULERS) * max(instructions, ffma * cycles_an_ffma) / card.clock_hz / BUSY_SHARE


def lines_s(card: Card, shape: Shape, lines: float) -> float:
    """Seconds to load so many lines a warp from the first-level cache of the multiprocessor with the most blocks."""
    warps = ceil(shape.blocks / card.multiprocessors) * ceil(shape.threads / LANES)
    return warps * lines / card.clock_hz / BUSY_SHARE


def predict_kernel(card: Card, work: KernelWork, built: Collection[Built]) -> Prediction:
    """The time of all launches of a kernel for one operation; its FLOPs and bytes are shared between the launches."""
    launches = [
        max(issue_s(card, shape, *thread_instructions(part.code, work)), lines_s(card, shape, work.lines))
        for part in built
        for shape in part.shapes
    ]
    unstated = any(part.code.loops and _hot_turns(part.code, work) is None for part in built)
    return _prediction(card, work, launches, at_least=unstated or not launches)


def predict_products(card: Card, work: KernelWork, products: Sequence[Product]) -> Prediction:
    """The time of a library's products for one operation; without their shapes, of their FLOPs."""
    whole = work.flops / 2 / card.fmas_per_s / BUSY_SHARE
    return _prediction(card, work, [_product_s(card, product) for product in products] or [whole])


def _product_s(card: Card, product: Product) -> float:
    """Tile by tile, each on one multiprocessor; a product with a vector has no tiles and is left to its bytes."""
    m, n, k, batch = product.m, product.n, product.k, product.batch
    if min(m, n) == 1:
        return m * n * k * batch / card.fmas_per_s
    tiles = ceil(m / TILE) * ceil(n / TILE) * batch
    # A narrow product is computed in narrower tiles, but not in any width.
    rows, columns = (min(TILE, NARROWEST * ceil(size / NARROWEST)) for size in (m, n))
    tile_s = rows * columns * k / (card.lanes * card.clock_hz) / BUSY_SHARE
    return ceil(tiles / card.multiprocessors) * tile_s


def _prediction(card: Card, work: KernelWork, issue: Sequence[float], at_least: bool = False) -> Prediction:
    """``issue`` are the seconds of each launch for its instructions."""
    number = max(1, len(issue))
    bytes_s, peak_s = work.least_bytes / card.bytes_per_s / MEMORY_SHARE, work.flops / 2 / card.fmas_per_s
    compute = [max(seconds, peak_s / number) for seconds in issue or [0.0]]
    return Prediction(
        work.stage,
        work.operation,
        work.kernel,
        launches=len(issue),
        compute_s=sum(compute),
        bytes_s=bytes_s,
        time_s=sum(max(seconds, bytes_s / number, LAUNCH_S) for seconds in compute),
        at_least=at_least,
    )


def predict_step(
    card: Card,
    work: Iterable[KernelWork],
    built: Mapping[Key, Collection[Built]],
    products: Mapping[tuple[str, Operation], Sequence[Product]],
) -> StepPrediction:
    """The time of every kernel in ``work``, which ends in a product of cuBLAS or is found in ``built``."""
    parts = []
    for row in work:
        if row.kernel.startswith("cuBLAS"):
            parts.append(predict_products(card, row, products.get((row.stage, row.operation), ())))
        else:
            parts.append(predict_kernel(card, row, built.get((row.stage, row.operation, row.kernel), ())))
    return StepPrediction(card.name, parts, _assumptions(card))


def predict_version(
    info: BackendInfo, batch_size: int, card: Card, architecture: Architecture = NETWORK
) -> StepPrediction:
    """Link every kernel of a version that states its work, and predict the time of a training step."""
    uses = kernel_uses([info], batch_size, architecture)
    built: dict[Key, list[Built]] = {}
    for use, code in zip(uses, machine_codes(uses), strict=True):
        for stage, operation in use.operations:
            shapes = [shape for shape in use.shapes if (shape.stage, shape.operation) == (stage, operation)]
            built.setdefault((stage, operation, use.name), []).append(Built(shapes, code))
    products: dict[tuple[str, Operation], list[Product]] = {}
    for product in recorded_step(info, batch_size, architecture).products:
        products.setdefault((product.stage, product.operation), []).append(product)
    work = [*(info.gpu_work(architecture, batch_size) or ()), *info.shared_gpu_work(architecture, batch_size)]
    return predict_step(card, work, built, products)


def _assumptions(card: Card) -> list[str]:
    return [
        f"Predicted, not measured. {card.name}: {card.multiprocessors} multiprocessors at {card.clock_hz / 1e9:g} GHz "
        f"with {card.lanes} lanes each, {card.bytes_per_s / 1e12:g} TB/s ({card.source}).",
        "Compute: the machine code for sm_90a times the turns of its loops, on the multiprocessor with most blocks: "
        f"an instruction a cycle on each of four schedulers, or a line of 128 bytes loaded, in {100 * BUSY_SHARE:g} % "
        "of the cycles. At least the FLOPs at the card's peak. "
        "Left out: the bandwidth and bank conflicts of shared memory.",
        "Turns: of the hot loop, from the multiply-adds or loads that the version states; of the loops around it, as "
        "stated; of every other loop, one a turn of the loop around it. "
        "≥: the version does not state the turns of the hot loop, and it is taken once.",
        f"Memory: every operand once, at {100 * MEMORY_SHARE:g} % of the bandwidth. A launch takes at least "
        f"{LAUNCH_S * 1e6:g} µs, and launches do not overlap.",
        f"cuBLAS: tiles of {TILE} x {TILE}, one at a time on a multiprocessor, in {100 * BUSY_SHARE:g} % of the "
        "cycles at its peak in float32; multiprocessors do not share the sums of a tile.",
        "A difference of less than about a third between two predictions says nothing.",
    ]
