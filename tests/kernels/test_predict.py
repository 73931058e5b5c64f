"""The model of predicted times, on made-up numbers, and for a real version."""

import importlib.util

import pytest
from rich.console import Console

from bench.commands import describe
from bench.kernels import compiler, linker, predict
from bench.kernels.cards import CARDS, Card, find_card
from bench.kernels.launches import Product, Shape, kernel_uses, recorded_step
from bench.kernels.predict import Built, issue_s, loop_turns, predict_kernel, predict_products, predict_step
from bench.records.kernels import CodeCounts, MachineCode
from bench.views.network_tables import prediction_table
from bench.views.table import to_rich
from common.architecture import autoencoder
from common.errors import UsageError
from common.operations import Operation
from common.work import KernelWork
from versions.registry import REGISTRY, find

CARD = Card("made up", 10, 128, 1e9, 1e12, "nobody")
# A loop that fills shared memory and a hot loop, both inside a loop; before them 50 instructions.
CODE = MachineCode(
    CodeCounts(50),
    [
        CodeCounts(10, memory={"LDG.128": 1}),
        CodeCounts(20, memory={"LDG.32": 4}, parent=0),
        CodeCounts(100, ffma=80, memory={"LDS.128": 5}, parent=0),
    ],
)


def work(flops=0, least_bytes=0, kernel="a_kernel", **turns):
    return KernelWork("conv2", Operation.FORWARD, kernel, flops, least_bytes, None, **turns)


def shape(blocks=10, threads=128):
    return Shape("conv2", Operation.FORWARD, blocks, threads)


def test_turns_follow_from_the_stated_work():
    # 800 multiply-adds are 10 turns of 80; the loop around turns 5 times, and with it the one that fills memory.
    assert loop_turns(CODE, work(fmas=800, rounds=(5,))) == [5, 5, 10]
    # A stated loop outside those of the code is not used.
    assert loop_turns(CODE, work(fmas=800, rounds=(2, 5))) == [5, 5, 10]
    # The compiler has unrolled the stated inner loop: what turns as often as the hot loop is the hot loop.
    assert loop_turns(CODE, work(fmas=800, rounds=(5, 10))) == [5, 5, 10]


def test_without_stated_work_each_loop_turns_once():
    assert loop_turns(CODE, work()) == [1, 1, 1]
    assert loop_turns(CODE, work(rounds=(5,))) == [5, 5, 5]
    assert loop_turns(MachineCode(CodeCounts(50)), work(fmas=800)) == []


def test_loads_give_the_turns_where_there_is_no_multiply_add():
    code = MachineCode(CodeCounts(5), [CodeCounts(8, memory={"LDG.128": 2, "LDG.8": 1, "STG.128": 2})])
    assert loop_turns(code, work(loads=90)) == [10]


def test_the_multiprocessor_with_the_most_blocks_decides():
    one = issue_s(CARD, shape(1), 1000, 0)
    assert one == pytest.approx(1000 / 1e9 / predict.BUSY_SHARE)  # a block of four warps, one on each scheduler
    assert issue_s(CARD, shape(10), 1000, 0) == one
    assert issue_s(CARD, shape(11), 1000, 0) == pytest.approx(2 * one)
    assert issue_s(CARD, shape(10, 32), 1000, 0) == one  # three schedulers have nothing to do
    assert issue_s(CARD, shape(40, 32), 1000, 0) == one
    assert issue_s(CARD, shape(10, 160), 1000, 0) == pytest.approx(2 * one)


def test_half_the_lanes_take_two_cycles_for_a_multiply_add():
    narrow = Card("narrow", 10, 64, 1e9, 1e12, "nobody")
    assert issue_s(narrow, shape(), 1000, 400) == pytest.approx(1000 / 1e9 / predict.BUSY_SHARE)
    assert issue_s(narrow, shape(), 1000, 800) == pytest.approx(1600 / 1e9 / predict.BUSY_SHARE)


def test_the_longest_of_instructions_bytes_flops_and_launch():
    stated = {"fmas": 800_000, "rounds": (50,)}  # 10,000 turns of 100, 50 of 10 and of 20, and 50
    built = [Built([shape()], CODE)]
    slow = predict_kernel(CARD, work(**stated), built)
    cycles = (10_000 * 100 + 50 * 30 + 50) / predict.BUSY_SHARE
    assert slow.time_s == slow.compute_s == pytest.approx(cycles / 1e9)
    assert (slow.limit, slow.launches, slow.at_least) == ("compute", 1, False)
    moved = predict_kernel(CARD, work(least_bytes=10**10, **stated), built)
    assert (moved.time_s, moved.limit) == (pytest.approx(1e-2 / predict.MEMORY_SHARE), "memory")
    # A block of four warps loads its lines one after the other.
    lines = predict_kernel(CARD, work(lines=10**6, **stated), built)
    assert (lines.time_s, lines.limit) == (pytest.approx(4e6 / 1e9 / predict.BUSY_SHARE), "compute")
    counted = predict_kernel(CARD, work(flops=2 * 10 * 128 * 10**8, **stated), built)
    assert (counted.time_s, counted.limit) == (pytest.approx(0.1), "compute")
    short = predict_kernel(CARD, work(fmas=80), [Built([shape(), shape()], CODE)])
    assert (short.time_s, short.limit, short.launches) == (pytest.approx(2 * predict.LAUNCH_S), "launch", 2)


def test_a_kernel_whose_loops_have_no_stated_turns_takes_longer_than_predicted():
    assert predict_kernel(CARD, work(), [Built([shape()], CODE)]).at_least
    assert not predict_kernel(CARD, work(), [Built([shape()], MachineCode(CodeCounts(50)))]).at_least


def test_products_fill_the_multiprocessors_tile_by_tile():
    def time_of(*products):
        return predict_products(CARD, work(flops=2 * 10**6, kernel="cuBLAS"), products).compute_s

    def product(m, n, k, batch=1):
        return Product("conv2", Operation.FORWARD, m, n, k, batch)

    tile_s = 128 * 128 * 8192 / 128e9 / predict.BUSY_SHARE
    assert time_of(product(128, 128, 8192)) == pytest.approx(tile_s)
    assert time_of(product(640, 256, 8192)) == pytest.approx(tile_s)
    assert time_of(product(640, 257, 8192)) == pytest.approx(2 * tile_s)
    assert time_of(product(128, 128, 8192, batch=11)) == pytest.approx(2 * tile_s)
    assert time_of(product(128, 32, 8192)) == pytest.approx(tile_s / 4)
    assert time_of(product(128, 128, 8192), product(128, 128, 8192)) == pytest.approx(2 * tile_s)
    assert time_of(product(10**4, 1, 10**4)) == pytest.approx(10**8 / 1280e9)
    assert time_of() == pytest.approx(10**6 / 1280e9 / predict.BUSY_SHARE)


def test_kernels_of_one_name_are_told_apart_by_stage_and_operation():
    rows = [work(fmas=800), KernelWork("conv4", Operation.FORWARD, "a_kernel", 0, 0, None, fmas=8e8)]
    built = {(row.stage, row.operation, row.kernel): [Built([shape()], CODE)] for row in rows}
    first, second = predict_step(CARD, rows, built, {}).parts
    assert (first.stage, second.stage) == ("conv2", "conv4")
    assert second.compute_s > 100 * first.compute_s


def test_cards_by_name():
    assert find_card("H200").multiprocessors == 132
    assert find_card("H200").fmas_per_s * 2 == pytest.approx(67e12, rel=0.01)  # NVIDIA's figures
    assert find_card("A100").fmas_per_s * 2 == pytest.approx(19.5e12, rel=0.01)
    assert find_card("T4").fmas_per_s * 2 == pytest.approx(8.1e12, rel=0.01)
    assert all(card.source for card in CARDS)
    with pytest.raises(UsageError, match="unknown card 'K80': choose from T4, A100, H100, H200"):
        find_card("K80")


needs_compilers = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda has no wheel for this platform"
)


@needs_compilers
@pytest.mark.parametrize("info", REGISTRY, ids=lambda info: info.name)
def test_every_row_of_a_version_has_its_launches(info, monkeypatch):
    """The table fits 80 columns; a launch and a product are counted once."""
    monkeypatch.setattr(predict, "machine_codes", lambda uses: [CODE for _ in uses])
    step = predict.predict_version(info, 64, CARD)
    recorded = recorded_step(info)
    of_step = [
        each
        for each in (*recorded.launches, *recorded.products)
        if (each.stage, each.operation) != ("conv1", Operation.BACKWARD_DATA)  # compiled, but not part of a step
    ]
    assert all(part.launches for part in step.parts)
    assert sum(part.launches for part in step.parts) == len(of_step)
    assert {use.name for use in kernel_uses([info])} >= {
        part.kernel for part in step.parts if not part.kernel.startswith("cuBLAS")
    }
    table = prediction_table(step, info, 64)
    total = float(table.groups[-1].rows[0].cells[4].text.removeprefix("≥ ").replace(",", ""))
    assert total == pytest.approx(1e6 * sum(part.time_s for part in step.parts), abs=0.06)
    assert any("not measured" in note for note in table.notes)
    assert max(map(len, drawn(table).splitlines())) <= 80


def drawn(table):
    console = Console(width=80)
    with console.capture() as capture:
        console.print(to_rich(table))
    return capture.get()


def test_without_a_disassembler_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "check_compilers", lambda: None)
    monkeypatch.setattr(linker, "disassembler", lambda: None)
    assert describe._predicted(find("v1"), 64, CARD, autoencoder()) is None
    written = capsys.readouterr()
    assert written.out == f"no predicted times: {linker.DISASSEMBLER_HINT}\n"
    assert written.err == ""


@needs_compilers
def test_the_batch_size_counts():
    small, large = (recorded_step(find("v4"), size).products for size in (8, 16))
    assert sum(product.m * product.n * product.k * product.batch for product in large) == 2 * sum(
        product.m * product.n * product.k * product.batch for product in small
    )
