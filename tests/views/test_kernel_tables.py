"""The tables of a kernels file: what is in them, what is marked as bad, and that they fit 80 columns."""

from rich.console import Console

from bench.machine.devices import ROOT
from bench.records.kernels import read_kernels
from bench.views.kernel_tables import condensed, kernel_summary, kernel_tables
from bench.views.table import Cell, to_rich
from common.operations import WHOLE_STEP, Operation
from tests.support.results_files import MACHINE, kernels_record, new_kernel_row

TARGETS = ["sm_75", "sm_80", "sm_90", "sm_100"]


def text_of(table, width=80):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(to_rich(table))
    return capture.get()


def recorded():
    (path,) = (ROOT / "results" / "runs").glob("2026-11-24T220552Z_*_kernels_*.json")
    return read_kernels(path)


def rows_of(table):
    return {row.cells[0].text: row.cells for group in table.groups for row in group.rows}


def test_several_targets_have_a_table_of_their_own():
    resources, loops, of_targets = kernel_tables(recorded())
    assert resources.caption == "GPU kernels at batch 64, compiled for sm_90"
    assert loops.caption.endswith("sm_90")
    assert [column.header for column in of_targets.columns] == ["kernel", *TARGETS]
    resources, _ = kernel_tables(kernels_record(new_kernel_row("a_kernel", "sm_80")))
    assert resources.caption.endswith("sm_80")


def test_the_tables_fit_80_columns_and_no_word_is_broken():
    record = recorded()
    for table in kernel_tables(record):
        text = text_of(table)
        assert max(map(len, text.splitlines())) <= 80
        shown = " ".join(text.split())
        for line in rows_of(table):
            assert all(word in shown for word in line.split())
        assert all(" ".join(note.split()) in shown for note in table.notes)
    assert set(rows_of(table)) == {row.name.removesuffix("_kernel") for row in record.rows}


def test_a_row_has_the_figures_of_its_kernel():
    resources, loops = kernel_tables(kernels_record(new_kernel_row("a_kernel")))
    name, *figures = rows_of(resources)["a"]
    assert (name.text, name.below) == ("a", "forward conv1-2")
    assert [cell.text for cell in figures] == ["128", "256-1,024", "96", "128", "0", "0", "25 %"]
    assert not any(cell.tone for cell in figures)
    assert [cell.text for cell in rows_of(loops)["a"][1:]] == ["9,504", "192", "29 (34)", "-", "0.18"]
    assert [group.heading for group in resources.groups] == ["v2 tiled (NHWC)"]


def test_shared_kernels_come_last_and_an_unknown_version_keeps_its_name():
    rows = [
        new_kernel_row("a_kernel", versions=["v2", "v4"]),
        new_kernel_row("b_kernel", versions=["v99"]),
        new_kernel_row("c_kernel", resources={"loop": None, "occupancy": []}),
    ]
    table, loops = kernel_tables(kernels_record(*rows))
    assert [group.heading for group in table.groups] == ["v2 tiled (NHWC)", "v99", "shared by v2, v4"]
    assert rows_of(table)["c"][-1].text == "-"
    assert [cell.text for cell in rows_of(loops)["c"][1:]] == ["9,504", "-", "-", "-", "-"]


def machine_table(*rows):
    return kernel_tables(kernels_record(*rows))[2]


def test_machine_code_has_a_table_of_its_own():
    linked = {"stated_ffma": 0.8, "machine": MACHINE}
    straight = {"machine": {"straight": {"instructions": 9, "memory": {"LDG.32": 2}, "loads_together": 2}, "loops": []}}
    rows = [
        new_kernel_row("a_kernel", "sm_90a", resources=linked),
        new_kernel_row("b_kernel", "sm_90a", resources=linked | {"stated_ffma": 0.9}),
        new_kernel_row("c_kernel", "sm_90a", resources=straight),
        new_kernel_row("d_kernel", "sm_90a"),
    ]
    table = machine_table(*rows)
    assert table.caption.endswith("sm_90a")
    cells = {name: [cell.text for cell in line[1:]] for name, line in rows_of(table).items()}
    assert cells["a"] == ["192 of 224", "86 %", "80 %", "-", "6x128\n5x64", "-", "1"]
    assert bad(rows_of(table)["b"]) == ["86 %"]
    assert cells["c"] == ["-", "-", "-", "-", "-", "-", "2"]
    assert "d" not in cells
    assert max(map(len, text_of(table).splitlines())) <= 80
    # Without machine code there is no such table.
    assert len(kernel_tables(kernels_record(new_kernel_row("a_kernel", "sm_90a")))) == 2


def test_kernels_of_one_name_are_told_apart_by_what_launches_them():
    linked = {"machine": MACHINE}
    rows = [
        new_kernel_row("a_kernel", target, operations=[[stage, "forward"]], resources=linked)
        for stage in ("conv2", "conv4")
        for target in ("sm_80", "sm_90a")
    ]
    rows.append(new_kernel_row("b_kernel", "sm_90a", resources=linked))
    for table in kernel_tables(kernels_record(*rows)):
        first, second, alone = (line.cells[0] for group in table.groups for line in group.rows)
        assert (first.text, first.below) == ("a", "forward conv2")
        assert (second.text, second.below) == ("a", "forward conv4")
        assert alone.below in ("", "forward conv1-2")


def bad(cells):
    return [cell.text for cell in cells if cell.tone == "bad"]


def test_what_breaks_a_rule_is_marked():
    rows = [
        new_kernel_row("spill_kernel", resources={"spill_bytes": 24}),
        new_kernel_row("stack_kernel", resources={"stack_bytes": 1016}),
        new_kernel_row("double_kernel", resources={"uses_float64": True}),
        new_kernel_row("over_kernel", resources={"registers": 200}),
        new_kernel_row("unbound_kernel", resources={"stated_registers": None}),
        new_kernel_row("refused_kernel", refused=True),
        new_kernel_row("refused_kernel", "sm_80"),
    ]
    full, _, of_targets = kernel_tables(kernels_record(*rows))
    marked = {name: bad(cells) for name, cells in rows_of(full).items()}
    assert marked == {
        "spill": ["24"],
        "stack": ["1,016"],
        "double (double precision)": ["double (double precision)"],
        "over": ["200"],
        "unbound": ["none"],
        "refused": ["refused"],
    }
    assert sum(cell.span for cell in rows_of(full)["refused"]) == len(full.columns)
    cells = rows_of(of_targets)
    assert cells["spill"][1:] == (Cell("96, spills 24", tone="bad"), Cell("-"))
    assert bad(cells["stack"]) == ["96, stack 1,016"]
    assert bad(cells["double"]) == ["96, double"]
    assert cells["refused"][1:] == (Cell("refused", tone="bad"), Cell("96, 25 %"))
    assert "refused" in text_of(full)


def test_the_summary_counts_kernels_spills_and_refusals():
    assert kernel_summary(recorded()) == (
        "42 kernels, at batch 64, were compiled for sm_75, sm_80, sm_90, sm_100: none spills."
    )
    rows = [new_kernel_row("a_kernel", target, resources={"spill_bytes": 24}) for target in ("sm_80", "sm_90")]
    rows.append(new_kernel_row("b_kernel", "sm_80", refused=True))
    assert kernel_summary(kernels_record(*rows)) == (
        "2 kernels, at batch 64, were compiled for sm_80, sm_90: 1 of them spill or keep arrays in memory."
        " Refused compilations: 1."
    )


def test_operations_in_few_words():
    pairs = [("conv5", "forward"), ("conv1", "forward"), ("conv2", "forward"), (WHOLE_STEP, "gather")]
    pairs += [("conv2", "maxpool"), ("conv9", "backward_data"), ("conv10", "backward_data"), ("conv9", "backward_data")]
    words = condensed((stage, Operation(operation)) for stage, operation in pairs)
    assert words == "forward conv1-2,5, gather, maxpool conv2, backward data conv9-10"
