"""Tables and charts of a layers file: what they show, and that they fit."""

from dataclasses import replace

import pytest
from rich.console import Console

from bench.commands.plot import plot_command
from bench.records.documents import prepare_folder
from bench.records.layers import OperationTimes, summarise_layers, write_layers
from bench.views.layer_charts import draw_layer_charts, layers_figure, roofline_figure
from bench.views.layer_tables import ceilings_line, layer_memory_table, operations_table
from bench.views.network_tables import BUDGET_MB, memory_table
from bench.views.table import to_rich
from common.architecture import autoencoder
from common.operations import Operation
from tests.measure.test_layers import CEILINGS, record, row
from versions.registry import REGISTRY, find


def text_of(table, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(to_rich(table))
        return console.export_text()


def test_the_table_fits_a_hundred_columns_and_shows_everything():
    slow = row("v1", scale=100)
    slow.operations.append(OperationTimes("conv5", Operation.STAGE_BACKWARD, seconds=[2e-3] * 3))
    slow.operations[1].seconds[0] *= 3
    (summary,) = summarise_layers(record(slow))
    text = text_of(operations_table(summary))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in text
    assert "v1 naive (NHWC)" in text
    assert sum("backward filter" in line for line in lines) == 5
    assert "rest of backward" in text
    assert "noisy" in text
    for name in ("operations", "overhead", "whole step", "bound", "GFLOP/s", "GB/s"):
        assert name in text
    assert ceilings_line(CEILINGS) == "ceilings measured (cpu, fp32): GEMM 200 GFLOP/s, memory 30 GB/s"


def test_operations_that_take_longer_than_the_step_are_shown_as_they_are():
    long = row("v4", step_s=[0.001])
    (summary,) = summarise_layers(record(long))
    (overhead,) = (line.split() for line in text_of(operations_table(summary)).splitlines() if " overhead " in line)
    assert overhead[1].startswith("-")
    assert layers_figure(record(long)) is not None


def test_memory_stands_beside_the_budget_and_nothing_is_left_blank():
    rows = [row(info.name) for info in REGISTRY]
    text = text_of(layer_memory_table(record(*rows)))
    assert max(map(len, text.splitlines())) <= 100
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert lines["activation, gradient"][-6] == "440"
    assert lines["together"][-6] == "625"
    assert sum(BUDGET_MB.values()) == 621
    assert text.count("not measured") == 10
    assert lines["process (RSS)"][-1] == "500.0"
    # What ``describe`` plans.
    described = text_of(memory_table(autoencoder(), 64, find("v5"), "cpu", 2))
    total = next(line.split()[-1] for line in described.splitlines() if "without pictures" in line)
    assert lines["together"][-1] == f"{float(total):.1f}"


def test_charts_show_what_is_believed_and_nothing_else(tmp_path):
    bad = row("v3", reason="suspicious: 900 GFLOP/s")
    results = write_layers(record(row("v2", scale=3), bad, row("v4")), prepare_folder(tmp_path))
    written = draw_layer_charts(results, tmp_path / "charts")
    assert {path.name.rpartition("_")[2] for path in written} == {
        "steps.png", "steps.svg", "roofline.png", "roofline.svg",
    }  # fmt: skip
    steps, roofline = (path.read_text() for path in written if path.suffix == ".svg")
    for text in (steps, roofline):
        assert "v4 im2col GEMM (NCHW)" in text
        assert "v3 direct" not in text
    assert "overhead 9.1 %" in steps
    assert "GEMM: 200 GFLOP/s, measured" in roofline
    assert "memory: 30 GB/s, measured" in roofline
    plot_command([results], out=tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in written
    }


def test_both_arithmetics_have_a_roof():
    tf32 = replace(CEILINGS, precision="tf32", gemm_flop_per_s=4e11)
    both = record(row("v1"))
    both = replace(both, rows=[*both.rows, row("v4", precision="tf32")], other_ceilings=[tf32])
    texts = [text.get_text() for axes in roofline_figure(both).axes for text in axes.texts]
    assert "GEMM: 200 GFLOP/s, measured" in texts
    assert "GEMM, TF32: 400 GFLOP/s, measured" in texts
    assert summarise_layers(both)[1].ceilings.gemm_flop_per_s == 4e11


@pytest.mark.parametrize("width", [80, 100])
def test_no_table_breaks_a_word(width):
    (summary,) = summarise_layers(record(row("v4")))
    assert "…" not in text_of(operations_table(summary), width)
