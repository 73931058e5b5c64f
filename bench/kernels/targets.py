"""The GPU architectures that kernels are compiled for, and how many warps of a kernel fit on a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UsageError

Target = tuple[int, int] | tuple[int, int, str]
"""Compute capability; the letter stands for instructions of this one architecture."""
LINKED: Target = (9, 0, "a")
"""The target that is linked as for a real run: Numba takes it on an H100 and an H200."""

REGISTERS = 65_536  # of a multiprocessor, on all targets
REGISTER_UNIT = 256  # a warp gets its registers in units of this size
WARP_UNIT = 4  # a multiprocessor has four schedulers, each with a quarter of the registers
LANES = 32  # threads of a warp


@dataclass(frozen=True)
class Multiprocessor:
    """The limits on the blocks that run at once on one multiprocessor."""

    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int  # shared memory that the system adds to each block
    shared_unit: int  # a block gets its shared memory in units of this many bytes


# NVIDIA, "CUDA C++ Programming Guide" 13.0, "Technical Specifications per Compute Capability".
MULTIPROCESSORS: dict[Target, Multiprocessor] = {
    (7, 5): Multiprocessor(32, 16, 64 * 1024, 0, 256),
    (8, 0): Multiprocessor(64, 32, 164 * 1024, 1024, 128),
    LINKED: Multiprocessor(64, 32, 228 * 1024, 1024, 128),
    (10, 0): Multiprocessor(64, 32, 228 * 1024, 1024, 128),
}
TARGETS: tuple[Target, ...] = tuple(MULTIPROCESSORS)


def target_name(target: Target) -> str:
    """``sm_80`` for (8, 0), ``sm_90a`` for (9, 0, "a")."""
    return f"sm_{''.join(map(str, target))}"


def find_targets(name: str) -> tuple[Target, ...]:
    """The target of that name, or ``all``; UsageError lists the known ones."""
    known = {target_name(target): target for target in TARGETS}
    if name not in (*known, "all"):
        raise UsageError(f"unknown target {name!r}: choose from {', '.join(known)} or all")
    return TARGETS if name == "all" else (known[name],)


def occupancy(target: Target, threads: int, registers: int, shared_bytes: int) -> float:
    """Share of a multiprocessor's warps that blocks of ``threads`` can fill; 0 if not even one block fits.

    ``registers`` are per thread, ``shared_bytes`` per block. The arithmetic is that of NVIDIA's occupancy calculator.
    """
    limits = MULTIPROCESSORS[target]
    warps = -(-threads // LANES)
    warp_registers = -(-registers * LANES // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // warp_registers // WARP_UNIT * WARP_UNIT // warps
    shared = -(-(shared_bytes + limits.reserved_bytes) // limits.shared_unit) * limits.shared_unit
    by_shared = limits.shared_bytes // shared if shared else limits.blocks
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps
