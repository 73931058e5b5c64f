"""The tables of ``convbench describe`` and ``list``: their figures, and that each fits its terminal unbroken."""

import pytest
from rich.console import Console

from bench.machine.devices import DeviceStatus
from bench.views.network_tables import (
    BUDGET_MB,
    memory_table,
    receptive_field_table,
    stages_table,
    versions_table,
    work_table,
)
from bench.views.table import to_rich
from common.architecture import autoencoder, scaled_autoencoder
from versions.registry import REGISTRY, names

NETWORK = autoencoder()
STATUSES = [DeviceStatus("cpu", True, "Example CPU", ""), DeviceStatus("gpu", False, "", "no driver")]
EACH = pytest.mark.parametrize("info", REGISTRY, ids=names())


def lines_of(table, width):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(to_rich(table))
    return capture.get().splitlines()


def assert_unbroken(table, width):
    """No line is wider than the terminal, and no cell is folded."""
    lines = lines_of(table, width)
    assert max(map(len, lines)) <= width
    shown = [" ".join(line.split()) for line in lines]
    for group in table.groups:
        for row in group.rows:
            cells = " ".join(cell.text for cell in row.cells)
            assert " ".join(cells.split()) in shown
    words = " ".join(shown)
    assert all(" ".join(note.split()) in words for note in table.notes)


def assert_words_whole(table, width):
    """No line is wider than the terminal; names may fold at spaces, but no word is broken."""
    lines = lines_of(table, width)
    assert max(map(len, lines)) <= width
    words = {word for line in lines for word in line.split()}
    for group in table.groups:
        for row in group.rows:
            assert {word for cell in row.cells for word in f"{cell.text} {cell.below}".split()} <= words


def row_of(table, name):
    (found,) = [row for group in table.groups for row in group.rows if row.cells[0].text == name]
    return [cell.text for cell in found.cells]


def test_the_tables_of_the_network_fit_80_columns():
    for table in (stages_table(NETWORK), receptive_field_table(NETWORK), versions_table(STATUSES)):
        assert_unbroken(table, 80)


@EACH
def test_the_tables_of_a_version_fit_their_terminal(info):
    for device in ("cpu", "gpu"):
        assert_unbroken(memory_table(NETWORK, 64, info, device, 64), 80)
    assert_words_whole(work_table(NETWORK, 64, info), 80)


def test_stages():
    table = stages_table(NETWORK)
    assert row_of(table, "conv2") == ["conv2", "ReLU, pool", "256x16x16", "128x8x8", "295,040", "151.0", "453.0"]
    assert row_of(table, "conv5")[1] == "nothing"
    assert row_of(table, "total")[-3:] == ["751,875", "349.2", "1,033.4"]


def test_receptive_fields():
    assert row_of(receptive_field_table(NETWORK), "conv5") == ["conv5", "26", "22 or 26"]
    assert row_of(receptive_field_table(NETWORK), "conv1") == ["conv1", "3", ""]


def test_what_the_document_says_is_of_the_network_alone():
    assert receptive_field_table(NETWORK).notes[0].startswith("The network's design document differs")
    half = receptive_field_table(scaled_autoencoder(0.5))
    assert half.groups == receptive_field_table(NETWORK).groups
    assert half.notes == ["The same at every width."]
    assert row_of(stages_table(scaled_autoencoder(0.5)), "conv2")[2:5] == ["128x16x16", "64x8x8", "73,792"]


def test_versions_say_on_which_device_they_run():
    table = versions_table(STATUSES)
    assert [column.header for column in table.columns] == ["version", "idea", "layout", "cpu", "gpu"]
    assert row_of(table, "v4") == ["v4", "im2col GEMM", "NCHW", "yes", "no"]


def test_the_budget_is_named_at_its_batch_size_only():
    assert memory_table(NETWORK, 64, REGISTRY[0], "cpu", 2).notes == [
        "The design document's budget at batch 64 is 625 MB."
    ]
    assert memory_table(NETWORK, 8, REGISTRY[0], "cpu", 2).notes == []
    assert memory_table(scaled_autoencoder(0.5), 64, REGISTRY[0], "cpu", 2).notes == []
    assert sum(BUDGET_MB.values()) == 621


@EACH
def test_memory_adds_up(info):
    table = memory_table(NETWORK, 64, info, "gpu", 1)
    rows = [[cell.text for cell in row.cells] for row in table.groups[0].rows]
    total = float(row_of(table, "total")[-1].replace(",", ""))
    assert total == pytest.approx(sum(float(row[-1].replace(",", "")) for row in rows), abs=0.01 * len(rows))


@EACH
def test_work_adds_up_and_names_operations_in_words(info):
    table = work_table(NETWORK, 64, info)
    rows = [[cell.text for cell in row.cells] for group in table.groups[:-1] for row in group.rows]
    total = float(row_of(table, "total")[1].replace(",", ""))
    assert total == pytest.approx(sum(float(row[1].replace(",", "")) for row in rows), abs=0.1 * len(rows))
    operations = {row[0] for row in rows}
    backward = {"conv5 stage backward"} if info.whole_stages else {"conv5 backward data", "conv1 maxpool backward"}
    assert backward | {"step sgd"} <= operations
    assert {"conv2 forward", "conv2 stage forward"} & operations
    assert not any("_" in operation for operation in operations)


def test_a_version_that_states_no_work_has_no_table(monkeypatch):
    monkeypatch.setattr("versions.v1_naive_nhwc.gpu_work", None)
    assert work_table(NETWORK, 64, REGISTRY[0]) is None
