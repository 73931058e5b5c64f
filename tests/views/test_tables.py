"""The table of a run on a terminal and in Markdown, and the tables of a layers file."""

import io

import pytest
from rich.console import Console

from bench.records.layers import summarise_layers
from bench.views.charts import COLOURS, colours_of, drawn, run_charts
from bench.views.layer_tables import ceilings_line, layer_memory_table, operations_table, steps_table
from bench.views.run_tables import results_table
from bench.views.table import to_markdown, to_rich
from bench.views.words import figure, ratio
from tests.support.results_files import (
    ENVIRONMENT,
    GPU,
    NO_TIME,
    layer_row,
    layers_record,
    row,
    run_record,
)


def printed(table, width):
    file = io.StringIO()
    Console(file=file, width=width).print(to_rich(table))
    return file.getvalue()


@pytest.mark.parametrize(
    ("value", "text"), [(0.04567, "0.0457"), (1, "1"), (99.96, "100"), (999.7, "1,000"), (12345.6, "12,346")]
)
def test_three_figures_or_all_before_the_point(value, text):
    assert figure(value) == ratio(value) == text


@pytest.fixture
def widest():
    """A run with the longest names and figures."""
    large = {"images_per_s": 123_456.0, "peak_bytes": 12_345_000_000, "precision": "tf32"}
    rows = [
        row("v1", 14.0),
        row("v4", 0.00123456, label="v4 im2col GEMM (NCHW)", layout="NCHW", **large),
        row("v4", 12.3, id="v4#2", epoch_s=[12.3, 12.4, 12.5, 12.3, 12.4, 15.6]),
        row("torch-channels-last", 2.0, label="PyTorch channels_last (NHWC)"),
        row("v2", 1.0, **NO_TIME),
    ]
    return run_record(*rows, environment=ENVIRONMENT | {"gpu": GPU})


def test_the_results_fit_80_characters_and_no_word_is_cut(widest):
    text = printed(results_table(widest), 80)
    assert max(map(len, text.splitlines())) <= 80
    words = text.split()
    for word in ("torch-", "channels-last", "v4#2", "123,456", "12,345", "0.901-1.13", "noisy", "GEMM", "TF32", "NO"):
        assert word in words
    assert "no time" in text
    assert "…" not in text


def test_the_results_in_markdown_have_one_line_a_row(widest):
    lines = to_markdown(results_table(widest)).splitlines()
    assert len(lines) == 2 + len(widest.rows)
    assert {line.count("|") for line in lines} == {10}
    assert lines[0].startswith("| version | checks passed | first epoch |")
    assert lines[3].startswith("| v4 (im2col GEMM NCHW, TF32) | 182 |")
    assert "| no time: failed verification: conv2 is wrong | - |" in lines[-1]


def test_the_notes_name_the_baseline_and_rows_that_are_not_deterministic(widest):
    notes = " ".join(results_table(widest).notes)
    assert "the median epoch of v1 divided by the row's" in notes
    assert "different bits" not in notes
    changing = run_record(row("v3", 2.0), row("v2", 1.0, deterministic=False))
    notes = " ".join(results_table(changing).notes)
    assert "the median epoch of v3" in notes
    assert "gave different bits: v2" in notes


def test_a_width_is_in_caption_notes_and_charts_unless_it_is_1():
    record = run_record(row("v1", 2.0), row("v4", 1.0))
    words = ", width 0.5, on the cpu"
    assert words not in results_table(record).caption
    record.config.width = 0.5
    table = results_table(record)
    assert table.caption.endswith(words)
    assert any("0.5 times the filters" in note for note in table.notes)
    for draw in run_charts(record).values():
        assert b"; width 0.5" in drawn(draw, "svg")


def test_rows_beside_the_versions_have_colours_of_their_own():
    rows = [row("v2", 1.0), row("torch-eager", 1.0), row("v2", 1.0, id="v2#2"), row("v1", 1.0), row("other", 1.0)]
    places = {"v2": 1, "torch-eager": 5, "v2#2": 6, "v1": 0, "other": 7}
    assert colours_of(run_record(*rows).rows) == {row_id: COLOURS[place] for row_id, place in places.items()}


def test_the_operations_of_a_step():
    record = layers_record(layer_row("v1", 1.2, step_s=[0.8, 1.2, 1.3]))
    (summary,) = summarise_layers(record)
    text = printed(operations_table(summary), 80)
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "conv2",
        "backward filter",
        "sgd",
        "all operations",
        "overhead",
        "whole step",
        "42 % noisy",
        "100.0 %",
    ):
        assert words in text
    fast = layers_record(layer_row("v1", 0.001))
    assert "time\nµs" in [column.header for column in operations_table(summarise_layers(fast)[0]).columns]


def test_the_steps_and_the_memory_of_every_row():
    record = layers_record(layer_row("v1", 1.2), layer_row("v2", 0.1, reason="suspicious: 900 GFLOP/s"))
    text = to_markdown(steps_table(record))
    assert "| v2 example (NHWC) | no time: suspicious: 900 GFLOP/s |" in text
    text = printed(layer_memory_table(record), 80)
    assert "not measured" in text  # CuPy's pool on a CPU
    assert "625" in text
    assert ceilings_line(record.ceilings) == "ceilings measured (cpu, fp32): GEMM 200 GFLOP/s, memory 50 GB/s"
