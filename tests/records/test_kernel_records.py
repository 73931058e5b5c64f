"""Kernels files: what is written can be read, and files of the first and second schema are read as before."""

import json

import pytest

from bench.machine.devices import ROOT
from bench.records.kernels import KernelResources, LoopCounts, read_kernels, write_kernels
from common.errors import UsageError
from common.operations import WHOLE_STEP, Operation
from tests.support.results_files import (
    MACHINE,
    RESOURCES,
    kernel_row,
    kernels_file,
    kernels_record,
    new_kernel_row,
    new_kernels_file,
    write,
)


def test_a_written_record_is_read_again(tmp_path):
    record = kernels_record(new_kernel_row("a_kernel"), new_kernel_row("b_kernel", "sm_80", refused=True), faults=["x"])
    path = write_kernels(record, tmp_path)
    assert path.name == "2026-01-02T050000Z_0123456789_kernels_sm_90-sm_80.json"
    assert read_kernels(path) == record
    assert write_kernels(record, tmp_path).name.endswith("-2.json")


def test_a_file_of_the_first_schema_is_upgraded(tmp_path):
    old = [["conv1", "max-pool"], ["conv4", "upsample backward"], ["", "SGD"], ["conv2", "fused forward"]]
    rows = [kernel_row("a_kernel", operations=old), {**kernel_row("b_kernel", "sm_80"), "refused": True}]
    built, refused = read_kernels(write(tmp_path, "old.json", kernels_file(*rows))).rows
    assert built.operations == [
        ("conv1", Operation.MAXPOOL),
        ("conv4", Operation.UPSAMPLE_BACKWARD),
        (WHOLE_STEP, Operation.SGD),
        ("conv2", Operation.STAGE_FORWARD),
    ]
    assert built.resources == KernelResources(**RESOURCES | {"loop": LoopCounts(**RESOURCES["loop"])})
    assert refused.resources is None


def test_a_file_of_the_second_schema_has_no_machine_code(tmp_path):
    row = new_kernel_row("a_kernel")
    assert "machine" not in row["resources"]
    (read,) = read_kernels(write(tmp_path, "old.json", new_kernels_file(row, schema="convbench-kernels/2"))).rows
    assert (read.resources.machine, read.resources.stated_ffma) == (None, None)
    assert read.resources.registers == RESOURCES["registers"]


def test_machine_code_is_kept(tmp_path):
    row = new_kernel_row("a_kernel", "sm_90a", resources={"stated_ffma": 0.8, "machine": MACHINE})
    path = write_kernels(kernels_record(row), tmp_path)
    resources = read_kernels(path).rows[0].resources
    assert resources.stated_ffma == 0.8
    assert resources.machine.hot == 1
    assert resources.machine.hot_loop.ffma_share == pytest.approx(192 / 224)
    assert resources.machine.loops[0].loads_together == 1
    assert json.loads(path.read_text())["rows"][0]["resources"]["machine"] == MACHINE


def machine(**loop):
    return {"machine": {"straight": {}, "loops": [loop]}}


def test_the_file_of_the_first_schema_on_record_is_read():
    (path,) = (ROOT / "results" / "runs").glob("2026-11-24T220552Z_*_kernels_*.json")
    record = read_kernels(path)
    document = json.loads(path.read_text())
    assert document["schema"] == "convbench-kernels/1"
    assert [row.name for row in record.rows] == [row["name"] for row in document["rows"]]
    assert [row.resources.registers for row in record.rows] == [row["registers"] for row in document["rows"]]
    assert {operation for row in record.rows for _, operation in row.operations} >= {Operation.MAXPOOL, Operation.SGD}


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


WRONG = {
    "an unknown operation": (new_kernels_file(new_kernel_row("k", operations=[["conv1", "max-pool"]])), "operations"),
    "an unknown stage": (new_kernels_file(new_kernel_row("k", operations=[["last", "forward"]])), "operations"),
    "an occupancy above 1": (new_kernels_file(new_kernel_row("k", resources={"occupancy": [1.5]})), "occupancy"),
    "no resources": (new_kernels_file(without(new_kernel_row("k"), "resources")), "resources"),
    "another target": (new_kernels_file(config={"batch_size": 64, "targets": ["sm_80"]}), "not among the targets"),
    "old, without refused": (kernels_file(without(kernel_row("k"), "refused")), "rows are not as convbench-kernels/1"),
    "old, without registers": (kernels_file(without(kernel_row("k"), "registers")), "registers"),
    "an unknown schema": (new_kernels_file(schema="convbench-kernels/9"), "convbench-kernels/2"),
    "a loop in itself": (
        new_kernels_file(new_kernel_row("k", resources=machine(parent=0))),
        "does not stand before it",
    ),
    "an unknown load": (new_kernels_file(new_kernel_row("k", resources=machine(memory={"LDG.7": 1}))), "memory"),
    "a share above 1": (new_kernels_file(new_kernel_row("k", resources={"stated_ffma": 80})), "stated_ffma"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_file_that_breaks_a_rule_is_a_usage_error(tmp_path, data, message):
    with pytest.raises(UsageError, match=message) as error:
        read_kernels(write(tmp_path, "wrong.json", data))
    assert "wrong.json" in str(error.value)
