"""Reading machine code: short listings, written by hand as nvdisasm writes them."""

import pytest

from bench.kernels.sass import machine_code
from bench.records.kernels import CodeCounts


def listing(*lines):
    """Number the instructions; labels stay as they are."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines)
    )


NESTED = listing(
    "_ZN6kernelE:",
    ".text._ZN6kernelE:",
    "S2R R0, SR_TID.X",
    "@P0 BRA `(.L_x_9)",
    ".L_x_0:",  # fills shared memory and multiplies
    "LDG.E.128 R4, desc[UR10][R18.64]",
    "@!P3 LDG.E.U8 R8, desc[UR10][R20.64+0x3]",
    "STS.128 [R21], R4",
    "STS [R21+0x10], R8",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    ".L_x_1:",
    "LDS.U.64 R30, [R2]",
    "LDS R33, [R2+0x20]",
    "FFMA R40, R30, R33.reuse, R40",
    "FFMA R41, R31, R33, R41",
    "@P1 BRA `(.L_x_1)",
    "ISETP.NE.AND P2, PT, R0, RZ, PT",
    "@P2 BRA `(.L_x_0)",
    ".L_x_9:",
    "STG.E desc[UR10][R18.64], R40",
    "EXIT",
    ".L_x_10:",
    "BRA `(.L_x_10)",
    "NOP",
)


def test_nested_loops_are_counted_each_without_the_loops_inside():
    code = machine_code(NESTED)
    outer, inner = code.loops
    staged = {"LDG.128": 1, "LDG.8": 1, "STS.128": 1, "STS.32": 1}
    assert outer == CodeCounts(instructions=7, memory=staged, loads_together=2)
    assert inner == CodeCounts(instructions=5, ffma=2, memory={"LDS.32": 1, "LDS.64": 1}, parent=0)
    assert code.straight == CodeCounts(instructions=4, memory={"STG.32": 1})
    assert code.hot_loop is inner
    assert inner.ffma_share == pytest.approx(0.4)
    assert [outer.count(name) for name in ("LDG", "STS", "LDS")] == [2, 2, 0]


def test_a_loop_with_several_exits_and_a_predicated_branch():
    code = machine_code(
        listing(
            ".L_x_0:",
            "@P0 EXIT",
            "FFMA R1, R2, R3, R1",
            "@!P1 BRA `(.L_x_2)",
            "FFMA R1, R2, R3, R1",
            "BRA.U UP0, `(.L_x_3)",
            ".L_x_2:",
            "BRA `(.L_x_0)",
            ".L_x_3:",
            "RET.REL.NODEC R4 `(_ZN6kernelE)",
        )
    )
    assert code.loops == [CodeCounts(instructions=6, ffma=2)]
    assert code.straight.instructions == 1


def test_what_only_a_call_reaches_is_left_out():
    code = machine_code(
        listing(
            "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)",
            "BSSY B0, `(.L_x_1)",
            "BSYNC B0",
            ".L_x_1:",
            "EXIT",
            "$__internal_0_$__cuda_sm20_div_s64:",
            "FFMA R1, R2, R3, R1",
            "RET.REL.NODEC R4 `(_ZN6kernelE)",
        )
    )
    assert code.straight == CodeCounts(instructions=4)
    assert (code.loops, code.hot, code.hot_loop) == ([], None, None)


def test_a_packed_instruction_has_two_multiply_adds():
    loop = machine_code(listing(".L_x_0:", "FFMA2 R4, R6, R8, R4", "@P0 BRA `(.L_x_0)", "EXIT")).hot_loop
    assert (loop.ffma, loop.instructions) == (2, 2)


def test_without_multiply_adds_the_loop_with_the_most_loads_is_hot():
    load, store = "LDG.E R4, desc[UR4][R2.64]", "STG.E desc[UR4][R2.64], R4"
    code = machine_code(
        listing(".L_x_0:", load, store, "@P0 BRA `(.L_x_0)", ".L_x_1:", load, load, "@P0 BRA `(.L_x_1)", "EXIT")
    )
    assert code.hot == 1
    idle = machine_code(listing(".L_x_0:", store, "@P0 BRA `(.L_x_0)", "EXIT"))
    assert (len(idle.loops), idle.hot) == (1, None)


LOADS = [f"LDG.E R{register}, desc[UR4][R2.64+{register}]" for register in (8, 9, 10, 11)]
STORES = [f"STS [R3+{register}], R{register}" for register in (8, 9, 10, 11)]
WIDE = ["LDG.E.128 R8, desc[UR4][R2.64]"]
TOGETHER = {
    "no load": (STORES, 0),
    "each waits for its own store": ([line for pair in zip(LOADS, STORES, strict=True) for line in pair], 1),
    "all loads first": (LOADS + STORES, 4),
    "two by two": (LOADS[:2] + STORES[:2] + LOADS[2:] + STORES[2:], 2),
    "one ahead": ([LOADS[0], LOADS[1], STORES[0], LOADS[2], STORES[1], LOADS[3], STORES[2], STORES[3]], 2),
    "stored in the next turn": (STORES + LOADS, 4),
    "one wide load, its last value first": ([*WIDE, STORES[3], *STORES[:3]], 1),
    "a wide store needs all": ([*LOADS, "STS.128 [R3], R8"], 4),
    "an address of two registers": (["LDG.E.64 R8, desc[UR4][R2.64]", "LDG.E R10, desc[UR4][R8.64]", STORES[2]], 1),
    "the register is loaded again": ([LOADS[0], LOADS[0]], 1),
}


@pytest.mark.parametrize(("lines", "most"), TOGETHER.values(), ids=TOGETHER.keys())
def test_how_many_loads_are_on_their_way(lines, most):
    (loop,) = machine_code(listing(".L_x_0:", *lines, "@P0 BRA `(.L_x_0)", "EXIT")).loops
    assert loop.loads_together == most


def test_loads_that_straight_code_leaves_for_later_count_too():
    assert machine_code(listing(*LOADS, "EXIT")).straight.loads_together == 4


def test_an_empty_listing_is_a_kernel_without_instructions():
    assert machine_code("").straight == CodeCounts()
