"""Results files and what is read off them; charts."""

import json
from dataclasses import asdict

import pytest

from bench.charts import draw_charts
from bench.environment import machine_slug
from bench.records import SCHEMA, Row, RunRecord, prepare_folder, read_record, summarise, write_record
from common.errors import UsageError


def row(backend, epoch_s, **changes):
    fields = {
        "backend": backend,
        "label": f"{backend} idea (NHWC)",
        "device": "cpu",
        "layout": "NHWC",
        "math": "fp32",
        "verified": True,
        "first_epoch_s": 9.0,
        "epoch_s": epoch_s,
        "images_per_s": 1.0,
        "loss": [1.0] * (len(epoch_s) + 1),
        "peak_bytes": 1,
        "checks": 5,
    }
    return Row(**{**fields, **changes})


def record(*rows):
    environment = {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "commit": "abc1234567", "dirty": False}
    config = {"data": "photos", "samples": 256, "batch_size": 64}
    return RunRecord(environment, config, list(rows), "2026-01-02T030405Z")


def test_speedups_are_ratios_of_medians_with_the_range_epoch_by_epoch():
    base, fast = summarise([row("v1", [8.0, 10.0, 12.0]), row("v4", [2.0, 2.5, 2.0])], "v1")
    assert base.speedup == 1
    assert fast.speedup == pytest.approx(5.0)
    assert (fast.speedup_low, fast.speedup_high) == pytest.approx((4.0, 6.0))
    assert base.noisy
    assert fast.noisy
    assert fast.baseline_noisy


def test_quiet_samples_are_not_called_noisy():
    (quiet,) = summarise([row("v1", [1.0, 1.05, 1.02])], "v1")
    assert not quiet.noisy


@pytest.mark.parametrize("difference", [{"math": "tf32"}, {"device": "gpu"}])
def test_other_math_or_device_is_never_compared(difference):
    _, other = summarise([row("v1", [8.0]), row("v4", [2.0], **difference)], "v1")
    assert other.speedup is None
    assert other.median_s == 2.0


def test_without_the_baseline_there_is_no_speedup():
    (alone,) = summarise([row("v4", [2.0])], "v1")
    assert alone.speedup is None


@pytest.mark.parametrize("changes", [{"verified": False}, {"reason": "killed"}])
def test_unverified_and_unfinished_rows_are_left_out(changes):
    summaries = summarise([row("v1", [8.0], **changes), row("v4", [2.0])], "v1")
    assert [(s.row.backend, s.speedup) for s in summaries] == [("v4", None)]


def test_round_trip_and_never_overwritten(tmp_path):
    runs = prepare_folder(tmp_path)
    first = write_record(record(row("v1", [1.0])), runs)
    before = first.read_bytes()
    second = write_record(record(row("v1", [2.0])), runs)
    assert first.name == "2026-01-02T030405Z_amd-epyc-2c_abc1234567.json"
    assert second != first
    assert first.read_bytes() == before
    assert asdict(read_record(second)) == asdict(record(row("v1", [2.0])))
    assert json.loads(before)["schema"] == SCHEMA


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "no JSON"),
        ("[1, 2]", "names no schema"),
        ('{"rows": []}', "names no schema"),
        ('{"schema": "convbench-run/99", "rows": []}', "convbench-run/99"),
        (f'{{"schema": "{SCHEMA}"}}', "not a valid results file"),
        (f'{{"schema": "{SCHEMA}", "rows": [{{"backend": "v1"}}]}}', "not a valid results file"),
    ],
)
def test_files_that_are_not_results_are_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_record(path)


def test_times_without_verification_are_refused(tmp_path):
    path = write_record(record(row("v1", [1.0], verified=False)), prepare_folder(tmp_path))
    with pytest.raises(UsageError, match="was not verified"):
        read_record(path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write results"):
        prepare_folder(tmp_path / "file")


def test_machine_names_tell_processors_not_hosts():
    assert machine_slug({"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 4}) == "intel-xeon-4c"
    assert machine_slug({"cpu": "x", "cores": 4, "gpu": {"name": "NVIDIA H200"}}) == "nvidia-h200"


def test_charts_show_what_finished_and_nothing_else(tmp_path):
    failed = row("v3", [], verified=False, reason="failed verification: forward")
    results = write_record(record(row("v1", [8.0, 9.0]), row("v4", [2.0, 2.01]), failed), prepare_folder(tmp_path))
    written = draw_charts(results, tmp_path / "charts")
    assert sorted(path.suffix for path in written) == [".png", ".png", ".svg", ".svg"]
    times = next(path for path in written if path.name.endswith("epoch-time.svg")).read_text()
    speedups = next(path for path in written if path.name.endswith("speedup.svg")).read_text()
    assert "v4 idea (NHWC)" in times
    assert "noisy" in times
    assert "4.24x" in speedups
    assert "v3 idea" not in times + speedups
    assert all(path.stat().st_size > 3_000 for path in written)
    again = draw_charts(results, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_without_a_baseline_only_times_are_drawn(tmp_path):
    results = write_record(record(row("v4", [2.0])), prepare_folder(tmp_path))
    assert {path.stem.rpartition("_")[2] for path in draw_charts(results, tmp_path)} == {"epoch-time"}


def test_nothing_to_draw_says_why(tmp_path):
    results = write_record(record(row("v1", [], verified=False, reason="it crashed")), prepare_folder(tmp_path))
    with pytest.raises(UsageError, match="it crashed"):
        draw_charts(results, tmp_path / "charts")
