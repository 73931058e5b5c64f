"""The comparison of two files: correct verdicts, and errors for files that cannot be compared."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bench.commands.compare import CompareOptions, compare_command
from bench.commands.console import run_script
from bench.commands.options import options_of
from bench.machine.devices import ROOT
from bench.model import adapter
from bench.records.compare import (
    FASTER,
    SAME,
    SLOWER,
    UNCLEAR,
    Comparison,
    compare_files,
    holm,
    judge,
    least_p,
    p_value,
    samples_needed,
)
from bench.records.run import SCHEMA
from bench.records.samples import read_samples
from bench.views.compare_tables import comparison_lines, comparison_table
from bench.views.table import to_rich
from common.errors import UsageError
from tests.records.test_records import failed_row, row

# Statistics -----------------------------------------------------------------------------------------------------------


def verdict(old, new, alpha=0.05, effect=0.05):
    return judge({"row": (old, new)}, alpha, effect)[0]


def around(median, count, seed, scatter=0.02):
    return list(np.random.default_rng(seed).lognormal(np.log(median), scatter, count))


def test_a_clear_slowdown_and_its_mirror():
    old, new = around(1.0, 10, 0), around(1.2, 10, 1)
    slower, faster = verdict(old, new), verdict(new, old)
    assert (slower.verdict, faster.verdict) == (SLOWER, FASTER)
    assert slower.ratio == pytest.approx(1.2, rel=0.03)
    assert slower.interval[0] < 1.2 < slower.interval[1]
    assert slower.interval == pytest.approx((1 / faster.interval[1], 1 / faster.interval[0]))
    assert slower.p == faster.p < 0.001


def test_equal_runs_are_almost_never_called_different():
    rng = np.random.default_rng(0)
    alarms, sames = 0, 0
    for _ in range(40):  # comparisons of ten rows each: without a correction two in five would raise an alarm
        pairs = {str(i): tuple(rng.lognormal(0, 0.05, (2, 8))) for i in range(10)}
        verdicts = [found.verdict for found in judge(pairs, alpha=0.05, effect=0.001)]
        alarms += FASTER in verdicts or SLOWER in verdicts
        sames += SAME in verdicts
    assert alarms <= 4
    assert sames == 0  # so few samples cannot show equality to a thousandth


def test_a_difference_within_the_least_effect_is_same():
    old, new = around(1.0, 40, 0, scatter=0.005), around(1.01, 40, 1, scatter=0.005)
    found = verdict(old, new)
    assert found.p < 0.001
    assert found.verdict == SAME
    assert verdict(old, new, effect=0.005).verdict == SLOWER
    unclear = verdict(around(1.0, 40, 0, scatter=0.1), around(1.02, 40, 1, scatter=0.1))
    assert unclear.verdict == UNCLEAR
    assert "the interval extends beyond 0.952 to 1.05" in unclear.why


def test_a_difference_close_to_the_least_effect_is_unclear():
    found = verdict(around(1.0, 30, 0), around(1.05, 30, 3))
    assert found.p < 0.001
    assert found.interval[0] < 1.05 < found.interval[1]
    found = verdict(around(1.0, 30, 0), around(1.05, 30, 3), effect=found.ratio - 1 + 0.001)
    assert found.verdict == UNCLEAR
    assert "it may be less than" in found.why


def test_too_few_samples_are_unclear_and_the_needed_number_is_given():
    found = verdict([1.0, 1.01, 1.02], [2.0, 2.01, 2.02])
    assert found.verdict == UNCLEAR
    assert found.interval is None
    assert found.why == "3 and 3 samples are too few: 4 of each can show a difference, 5 that there is none"
    assert verdict([1.0, 1.01, 1.02, 1.03], [2.0, 2.01, 2.02, 2.03]).verdict == SLOWER


def test_more_rows_need_more_samples():
    pairs = {str(i): ([1.0, 1.01, 1.02, 1.03, 1.04], [2.0, 2.01, 2.02, 2.03, 2.04]) for i in range(80)}
    found = judge(pairs, 0.05, 0.05)
    assert {row.verdict for row in found} == {UNCLEAR}
    assert "with 80 rows to judge, 7 of each" in found[0].why
    enough = {name: ([*old, 1.05, 1.06], [*new, 2.05, 2.06]) for name, (old, new) in pairs.items()}
    assert {row.verdict for row in judge(enough, 0.05, 0.05)} == {SLOWER}


@pytest.mark.parametrize(("alpha", "rows"), [(0.05, 1), (0.05, 20), (0.001, 3)])
def test_the_needed_number_is_the_smallest_that_suffices(alpha, rows):
    count = samples_needed(alpha, rows)
    assert rows * least_p(count, count) < alpha <= rows * least_p(count - 1, count - 1)
    assert p_value(range(1, count + 1), range(100, 100 + count)) == pytest.approx(least_p(count, count))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_is_exact_for_ties_and_equal_samples_are_the_same():
    assert p_value([1.0] * 4, [2.0] * 4) == pytest.approx(2 / math.comb(8, 4))  # the approximation says 0.013
    assert p_value([1.0] * 20, [1.0] * 20) == 1.0
    assert verdict([1.0] * 6, [1.0] * 6).verdict == SAME


def test_many_samples_are_thinned_and_keep_their_median():
    slower = verdict(around(1e-7, 20_000, 0, scatter=0.3), around(1.1e-7, 12_345, 1, scatter=0.3))
    assert slower.verdict == SLOWER
    assert slower.interval[0] < 1.1 < slower.interval[1]
    assert verdict(around(1.0, 20_000, 0, scatter=0.3), around(1.0, 15_000, 1, scatter=0.3)).verdict == SAME


samples = st.lists(st.floats(0.9, 1.2), min_size=2, max_size=9)


@settings(max_examples=30, deadline=None)
@given(samples, samples)
def test_exchanging_old_and_new_reverses_the_verdict(old, new):
    there, back = verdict(old, new), verdict(new, old)
    reverse = {FASTER: SLOWER, SLOWER: FASTER, SAME: SAME, UNCLEAR: UNCLEAR}
    assert back.verdict == reverse[there.verdict]
    assert back.p == pytest.approx(there.p)


# Files of run ---------------------------------------------------------------------------------------------------------

ENVIRONMENT = {
    "cpu": "AMD EPYC",
    "cores": 2,
    "memory_bytes": 25_000_000_000,
    "system": "Linux x86_64",
    "python": "3.11.7",
    "libraries": {"numba": "0.68.1"},
    "threads": 2,
    "commit": "abc1234567",
    "dirty": False,
}
CONFIG = {"data": "photos", "samples": 256, "batch_size": 64, "learning_rate": 0.001, "seed": 0, "math": "fp32"}
GPU = {"name": "NVIDIA H200", "driver": "580.1"}


def run_file(path, *rows, environment=(), config=(), **changes):
    document = {
        "schema": SCHEMA,
        "environment": {**ENVIRONMENT, **dict(environment)},
        "config": {**CONFIG, **dict(config)},
        "rows": [adapter(type(row)).dump_python(row, mode="json", by_alias=True) for row in rows],
        "started": "2026-01-02T030405Z",
    }
    path.write_text(json.dumps({**document, **changes}))
    return path


def compare(old, new, **arguments):
    return compare_files(old, new, **{"alpha": 0.05, "effect": 0.05, **arguments})


@pytest.fixture
def old(tmp_path):
    return run_file(tmp_path / "old.json", row("v1", around(8, 6, 0)), row("v4", around(2, 6, 1)))


def test_run_files_are_compared_row_by_row(tmp_path, old):
    new = run_file(
        tmp_path / "new.json",
        row("v2", around(4, 6, 2)),
        row("v4", around(3, 6, 3)),
        failed_row("v1", "failed verification: conv1"),
        environment={"commit": "fff", "dirty": True, "libraries": {"numba": "0.69"}, "memory_bytes": 25_100_000_000},
        interrupted=True,
        warnings=["the CPU was busy"],
    )
    found = compare(old, new)
    assert [(row.name, row.verdict) for row in found.judgements] == [("v4", SLOWER)]
    assert found.not_timed == {"v1": "NEW: failed verification: conv1"}
    assert (found.only_old, found.only_new, found.missing) == ([], ["v2"], ["v1"])
    assert found.summary == "1 slower; 1 not timed, 1 only in NEW"
    lines = comparison_lines(found)
    for line in (
        "only in NEW: v2",
        "not timed, v1: NEW: failed verification: conv1",
        "note: commit: abc1234567 -> fff with changes",
        "note: numba: 0.68.1 -> 0.69",
        "warning: NEW: it was interrupted",
        "warning: NEW: the CPU was busy",
    ):
        assert line in lines
    assert lines[-1] == found.summary


DIFFERENCES = {
    "processor": ("machine", {"environment": {"cpu": "Xeon"}}, "cpu: AMD EPYC -> Xeon"),
    "cores": ("machine", {"environment": {"cores": 4}}, "cores: 2 -> 4"),
    "memory": ("machine", {"environment": {"memory_bytes": 50_000_000_000}}, "50,000,000,000"),
    "system": ("machine", {"environment": {"system": "Darwin arm64"}}, "Darwin arm64"),
    "threads": ("threads", {"environment": {"threads": 1}}, "threads: 2 -> 1"),
    "data": ("data", {"config": {"data": "cifar10"}}, "data: photos -> cifar10"),
    "samples": ("data", {"config": {"samples": 128}}, "samples: 256 -> 128"),
    "batch": ("data", {"config": {"batch_size": 32}}, "batch_size: 64 -> 32"),
    "learning rate": ("data", {"config": {"learning_rate": 0.1}}, "learning_rate: 0.001 -> 0.1"),
    "width": ("data", {"config": {"width": 0.5}}, "width: 1.0 -> 0.5"),
    "seed": ("data", {"config": {"seed": 7}}, "seed: 0 -> 7"),
    "math": ("math", {"config": {"math": "tf32"}}, "--math: fp32 -> tf32"),
}


@pytest.mark.parametrize(("group", "changes", "words"), DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_a_difference_in_settings_is_refused_unless_allowed(tmp_path, old, group, changes, words):
    new = run_file(tmp_path / "new.json", row("v4", around(2, 6, 1)), **changes)
    with pytest.raises(UsageError, match=f"nevertheless: --allow {group}$") as refusal:
        compare(old, new)
    assert words in str(refusal.value)
    others = [other for other in ("machine", "gpu", "threads", "data", "math") if other != group]
    with pytest.raises(UsageError, match=f"--allow {group}$"):
        compare(old, new, allow=others)
    found = compare(old, new, allow=[group])
    assert [row.verdict for row in found.judgements] == [SAME]
    assert [note for note in found.notes if "(allowed)" in note and words in note]


def test_driver_device_and_precision_of_a_row_are_compared(tmp_path):
    rows = [
        row(name, around(2, 6, 1), device="gpu", **precision)
        for name, precision in (("v3", {}), ("v4", {"precision": "tf32"}))
    ]
    one = run_file(tmp_path / "one.json", *rows, environment={"gpu": GPU})
    two = run_file(tmp_path / "two.json", *rows, environment={"gpu": {**GPU, "driver": "590.2"}})
    with pytest.raises(UsageError, match=r"driver: 580.1 -> 590.2. .*--allow gpu$"):
        compare(one, two)
    cpu = run_file(tmp_path / "cpu.json", row("v3", around(2, 6, 1)), row("v4", around(2, 6, 1)))
    with pytest.raises(UsageError, match=r"device: gpu -> cpu; GPU: NVIDIA H200 -> .*math: tf32 -> fp32 \(v4\)") as why:
        compare(one, cpu)
    assert "--allow gpu --allow math" in str(why.value)
    assert compare(one, cpu, allow=["math", "gpu"]).summary == "2 same"


def test_arguments_are_checked_before_files_are_read():
    nowhere = "nowhere.json"
    with pytest.raises(UsageError, match=r"--allow 'cpu': choose from machine, gpu, threads, data, math"):
        compare(nowhere, nowhere, allow=["cpu"])
    with pytest.raises(UsageError, match=r"--fail-on 'faster': choose from slower, unclear, missing"):
        compare(nowhere, nowhere, fail_on=["faster"])
    for wrong in (0, 1, -1, math.nan):
        with pytest.raises(UsageError, match="alpha"):
            compare(nowhere, nowhere, alpha=wrong)
    for wrong in (0, -0.1, math.inf, math.nan):
        with pytest.raises(UsageError, match="effect"):
            compare(nowhere, nowhere, effect=wrong)


def test_files_without_a_common_row_are_refused(tmp_path, old):
    with pytest.raises(UsageError, match="no row in common: v1, v4 and v2"):
        compare(old, run_file(tmp_path / "new.json", row("v2", [1.0])))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[]", "names no schema"),
        ('{"schema": "convbench-kernels/1"}', "convbench run, convbench layers and pytest-benchmark"),
        ('{"benchmarks": []}', "not a valid file of pytest-benchmark: machine_info"),
        ('{"benchmarks": [], "machine_info": {}}', "benchmarks: List should have at least 1 item"),
        ('{"benchmarks": 1, "machine_info": {}}', "not a valid file of pytest-benchmark: benchmarks"),
        ('{"benchmarks": [1], "machine_info": {}}', r"not a valid file of pytest-benchmark: benchmarks\.0"),
        ('{"benchmarks": [], "machine_info": {}, "schema": "convbench-run/2"}', "not a valid results file"),
    ],
)
def test_a_file_without_samples_is_refused(tmp_path, old, text, words):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        compare(old, path)


# Files of layers and of pytest-benchmark ------------------------------------------------------------------------------


def layers_file(path, forward, **environment):
    ceilings = {"gemm_flop_per_s": 1e12, "copy_bytes_per_s": 1e10, "read_bytes_per_s": 1e10, "cache_bytes": None}
    operation = {"stage": "conv1", "flops": 10, "least_bytes": 10}
    rests = {**operation, "operation": "stage_forward_rest", "seconds": [0.0] * 6}
    layer_row = {
        **dict.fromkeys(("backend", "label", "layout"), "v4"),
        "device": "cpu",
        "math": "fp32",
        "verified": True,
        "step_s": around(1, 6, 0),
        "operations": [{**operation, "operation": "forward", "seconds": forward}, rests],
        "memory": {"planned": [], "peak": {"process_bytes": 1, "pool_bytes": None, "device_bytes": None}},
    }
    document = {
        "schema": "convbench-layers/1",
        "started": "2026-01-02T030405Z",
        "environment": {**ENVIRONMENT, **environment},
        "config": {"batch_size": 8, "math": "fp32", "device": "cpu", "threads": 2, "rounds": 6, "seed": 0},
        "ceilings": {**ceilings, "device": "cpu", "math": "fp32", "threads": 2},
        "other_ceilings": [],
        "conditions": None,
        "warnings": [],
        "notes": {},
        "rows": [layer_row],
    }
    path.write_text(json.dumps(document))
    return path


def test_layers_files_are_compared_operation_by_operation(tmp_path, old):
    one = layers_file(tmp_path / "one.json", around(0.1, 6, 1))
    two = layers_file(tmp_path / "two.json", around(0.05, 6, 1))
    found = compare(one, two)
    assert {row.name: row.verdict for row in found.judgements} == {"v4 whole step": SAME, "v4 conv1 forward": FASTER}
    assert "too short for the clock" in found.not_timed["v4 conv1 stage_forward"]  # its name today
    assert found.missing == []
    with pytest.raises(UsageError, match=r"convbench run, .* of convbench layers: both must be of the same kind"):
        compare(old, one)
    with pytest.raises(UsageError, match="--allow threads"):
        compare(one, layers_file(tmp_path / "three.json", around(0.1, 6, 1), threads=1))


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory):
    """Two files that pytest-benchmark writes: with single samples, and without."""
    folder = tmp_path_factory.mktemp("benchmarked")
    (folder / "test_sum.py").write_text("def test_sum(benchmark):\n    benchmark.pedantic(sum, ([1, 2],), rounds=30)\n")
    options = ["--benchmark-json=with.json", "--benchmark-save=without", "--benchmark-storage=saved"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "test_sum.py"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    (without,) = folder.glob("saved/**/*_without.json")
    return folder / "with.json", without


def test_files_of_any_pytest_benchmark_suite_are_compared(benchmarked, tmp_path):
    with_data, without = benchmarked
    assert compare(with_data, with_data).summary in ("1 same", "1 unclear")
    document = json.loads(with_data.read_text())
    document["benchmarks"][0]["stats"]["data"] = [
        9 * value + 1e-6 for value in document["benchmarks"][0]["stats"]["data"]
    ]
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(document))
    (found,) = compare(with_data, slower).judgements
    assert (found.name, found.verdict) == ("test_sum", SLOWER)
    with pytest.raises(UsageError, match=r"no single samples of test_sum.py::test_sum.*--benchmark-save-data"):
        compare(with_data, without)
    document["machine_info"]["cpu"]["brand_raw"] = "another"
    slower.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="--allow machine"):
        compare(with_data, slower)


def suite_file(path, samples=None, gpu=None, **extra_info):
    """A file of this suite's benchmarks, which add settings to each result."""
    about = {"device": "cpu", "math": "fp32", "threads": 2, "network": "full", "batch_size": 64, "verified": True}
    benchmark = {
        "fullname": "tests/benchmarks/test_versions.py::test_network[v4-cpu-epoch]",
        "stats": {"data": around(1, 9, 0) if samples is None else samples},
        "extra_info": {**about, **extra_info},
    }
    machine = {"convbench": {**ENVIRONMENT, **({"gpu": gpu} if gpu else {}), "network": "full"}}
    path.write_text(json.dumps({"machine_info": machine, "commit_info": {"id": "abc"}, "benchmarks": [benchmark]}))
    return path


def test_another_suite_may_write_anything_into_its_extra_info(tmp_path):
    one = suite_file(tmp_path / "one.json", samples=around(1, 9, 0), seed=1, data="a", cores=3)
    two = suite_file(tmp_path / "two.json", samples=around(1, 9, 1), seed=2, data="b", cores=4)
    document = json.loads(two.read_text()) | {"commit_info": None}
    two.write_text(json.dumps(document))
    (found,) = compare(one, two).judgements
    assert found.ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({"threads": 1}, "threads"),
        ({"network": "tiny"}, "data"),
        ({"batch_size": 8}, "data"),
        ({"math": "tf32"}, "math"),
        ({"device": "gpu", "gpu": GPU}, "gpu"),
    ],
)
def test_the_suites_own_settings_are_compared(tmp_path, changes, group):
    one, two = suite_file(tmp_path / "one.json"), suite_file(tmp_path / "two.json", **changes)
    with pytest.raises(UsageError, match=f"--allow {group}$"):
        compare(one, two)
    assert compare(one, two, allow=[group]).summary == "1 same"


def test_an_unused_gpu_is_ignored_and_an_unverified_benchmark_is_not_timed(tmp_path):
    one = suite_file(tmp_path / "one.json")
    assert compare(one, suite_file(tmp_path / "two.json", gpu=GPU)).judgements[0].name == "test_network[v4-cpu-epoch]"
    for changes, words in (({"verified": False}, "not verified"), ({"suspicious": "above"}, "above")):
        found = compare(one, suite_file(tmp_path / "two.json", **changes))
        assert list(found.not_timed.values()) == [f"NEW: {words}"]
        assert found.missing == ["test_network[v4-cpu-epoch]"]
    with pytest.raises(UsageError, match=r"stats\.data\.1: Input should be greater than or equal to 0"):
        compare(one, suite_file(tmp_path / "two.json", samples=[1.0, -1.0]))
    with pytest.raises(UsageError, match=r"stats\.data: List should have at least 1 item"):
        compare(one, suite_file(tmp_path / "two.json", samples=[]))


def test_a_name_that_comes_twice_is_refused(tmp_path):
    path = suite_file(tmp_path / "one.json")
    document = json.loads(path.read_text())
    document["benchmarks"] *= 2
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="two benchmarks are called tests/benchmarks"):
        read_samples(path)


RECORDED = ROOT / "results" / "runs"


def test_the_files_on_record_can_be_compared():
    before = next(RECORDED.glob("2026-11-25T014401Z_*.json"))
    found = compare(before, next(RECORDED.glob("2026-11-25T031524Z_*.json")))
    assert {row.name: row.verdict for row in found.judgements}.items() >= {"v1": FASTER, "v4": SAME}.items()
    rows = read_samples(next(RECORDED.glob("*_layers.json"))).rows
    assert {"v4 whole step", "v4 conv1 backward_filter", "v1 step sgd"} <= rows.keys()
    assert not any(row.reason for row in rows.values())


# What is printed ------------------------------------------------------------------------------------------------------


def printed(found, width):
    console = Console(width=width, file=io.StringIO())
    console.print(to_rich(comparison_table(found)))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_usual_names_stay_whole_in_80_columns():
    names = ["v4#2", "torch-channels-last", "v4 whole step", "v2 conv2 backward_filter", "v1 conv1 maxpool_backward"]
    pairs = {name: (around(0.12345, 6, 0), around(0.16, 6, 1)) for name in names}
    lines = printed(Comparison(0.05, 0.05, judge(pairs, 0.05, 0.05), {"v3 step sgd": "too short"}, [], [], []), 80)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for name in names:
        assert all(word in text for word in name.split())
    assert text.count("SLOWER") == len(names)
    assert "not timed" in text


def test_the_table_fits_100_columns_and_takes_names_literally():
    name = "test_operation[v2-cpu-conv2-backward_filter-cold-batch64-and-more]"
    times = {name: (5.1e-9, 9.2e-9), "slow": (1.2, 123.4)}
    pairs = {row: [around(time, 6, seed, 1e-4) for seed, time in enumerate(both)] for row, both in times.items()}
    lines = printed(Comparison(0.05, 0.05, judge(pairs, 0.05, 0.05), {}, [], [], []), 132)
    assert max(map(len, lines)) <= 100
    assert "".join(line.split()[0] for line in lines[4:7]) == name
    assert "SLOWER" in lines[4]
    assert "9.2 ns" in lines[4]
    assert "123 s" in lines[7]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_script(options_of(compare_command, CompareOptions))
    return ended.value.code


def test_exit_codes(tmp_path, old, monkeypatch, capsys):
    slower = run_file(tmp_path / "slower.json", row("v4", around(3, 6, 3)))
    assert command(monkeypatch, old, slower) == 0
    assert "1 slower; 1 only in OLD" in capsys.readouterr().out
    assert command(monkeypatch, old, slower, "--fail-on", "unclear") == 0
    assert command(monkeypatch, old, old, "--fail-on", "slower", "--fail-on", "missing") == 0
    assert command(monkeypatch, old, slower, "--effect", "0.9", "--fail-on", "slower") == 0
    capsys.readouterr()
    assert command(monkeypatch, old, slower, "--fail-on", "slower", "--fail-on", "missing") == 1
    assert capsys.readouterr().err == "slower: v4\nmissing: v1\n"
    few = run_file(tmp_path / "few.json", row("v4", [2.0]))
    assert command(monkeypatch, old, few, "--fail-on", "unclear") == 1
    capsys.readouterr()
    assert command(monkeypatch, old, tmp_path / "missing.json") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: cannot read")
    assert errors.count("\n") == 1
