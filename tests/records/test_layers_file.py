"""The file of ``convbench layers``: never overwritten, and every rule that it must keep."""

import json
from dataclasses import replace

import pytest

from bench.records.documents import prepare_folder
from bench.records.layers import read_layers, write_layers
from bench.views.layer_charts import draw_layer_charts
from common.errors import UsageError
from tests.measure.test_layers import record, row
from tests.support.results_files import layers_file, write


def test_a_file_is_never_overwritten(tmp_path):
    runs = prepare_folder(tmp_path)
    first, second = (write_layers(record(row("v4")), runs) for _ in range(2))
    assert first.name == "2026-01-02T030405Z_amd-epyc-2c_abc1234567_layers.json"
    assert second.name == "2026-01-02T030405Z_amd-epyc-2c_abc1234567_layers-2.json"
    assert read_layers(second) == record(row("v4"))


def test_operations_of_earlier_files_have_their_names_of_today(tmp_path):
    data = layers_file()
    data["rows"][0]["operations"][0]["operation"] = "stage_forward_rest"
    found = read_layers(write(tmp_path, "x.json", data))
    assert found.rows[0].operations[0].operation == "stage_forward"


def test_an_earlier_file_that_was_interrupted_has_empty_conditions(tmp_path):
    found = read_layers(write(tmp_path, "x.json", layers_file() | {"conditions": {}}))
    assert found.conditions is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda times: times.update(seconds=[0.0] * len(times["seconds"])), "take no time in a round"),
        (lambda times: times["seconds"].append(1.0), "one time a round each"),
    ],
)
def test_times_of_operations_must_be_possible(tmp_path, change, message):
    data = json.loads(json.dumps(layers_file()))
    operations = data["rows"][0]["operations"]
    for times in operations if "no time" in message else operations[:1]:
        change(times)
    with pytest.raises(UsageError, match=message):
        read_layers(write(tmp_path, "x.json", data))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema",), "convbench-run/2", "has schema 'convbench-run/2'"),
        (("environment",), {}, r"environment\.cpu: Field required"),
        (("config", "rounds"), 0, r"config\.rounds: Input should be greater than or equal to 1"),
        (("ceilings",), None, "ceilings: Input should be"),
        (("ceilings", "gemm_flop_per_s"), 0, r"ceilings\.gemm_flop_per_s: Input should be greater than 0"),
        (("ceilings", "surplus"), 0, r"ceilings\.surplus: Unexpected"),
        (("ceilings", "math"), "tf32", "no ceilings for the math of v1"),
        (("other_ceilings",), {}, "other_ceilings: Input should be a valid array"),
        (("warnings",), "text", "warnings: Input should be a valid array"),
        (("rows",), [], "it has no rows"),
        (("rows", 1, "id"), "v1", "same id"),
        (("order",), [["v1", "v3"]], "the order must name rows"),
        (("order",), {}, "order: Input should be a valid array"),
        (("rows", 0, "label"), None, r"rows\.0\.label: Input should be a valid string"),
        (("rows", 0, "verified"), False, "was not verified"),
        (("rows", 0, "step_s"), [-1.0], r"rows\.0\.step_s\.0: Input should be greater than 0"),
        (("rows", 0, "step_s"), 1.0, r"rows\.0\.step_s: Input should be a valid array"),
        (("rows", 0, "operations"), [], "no operations"),
        (("rows", 0, "operations", 0, "operation"), "dance", "backward_filter"),
        (("rows", 0, "operations", 0, "flops"), 1.5, r"operations\.0\.flops: Input should be a valid integer"),
        (("rows", 0, "operations", 0, "seconds"), [], r"operations\.0\.seconds: List should have at least 1"),
        (("rows", 0, "operations", 0, "seconds"), [True], "Input should be a valid number"),
        (("rows", 0, "operations", 1, "operation"), "forward", "an operation twice"),
        (("rows", 0, "memory"), {}, r"memory\.planned: Field required"),
        (("rows", 0, "memory", "peak", "pool_bytes"), "much", r"peak\.pool_bytes: Input should be a valid integer"),
        (("rows", 0, "memory", "planned", 0, "bytes"), -1, r"planned\.0\.bytes: Input should be greater"),
    ],
    ids=str,
)
def test_files_with_wrong_parts_are_refused(tmp_path, place, value, message):
    data = json.loads(json.dumps(layers_file()))
    *way, last = place
    inner = data
    for step in way:
        inner = inner[step]
    inner[last] = value
    path = write(tmp_path, "x.json", data)
    with pytest.raises(UsageError, match=message) as raised:
        draw_layer_charts(path, tmp_path / "charts")
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "charts").exists()


def test_nothing_to_draw_says_why(tmp_path):
    failed = replace(row("v4"), verified=False, reason="it crashed", step_s=[], operations=[])
    results = write_layers(record(failed), tmp_path)
    with pytest.raises(UsageError, match="v4: it crashed"):
        draw_layer_charts(results, tmp_path / "charts")
