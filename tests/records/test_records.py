"""Results files of a run: reading, writing, summaries, and their charts."""

import json

import pytest

from bench.machine.environment import Environment
from bench.records.documents import prepare_folder
from bench.records.run import SCHEMA, RunRecord, RunRow, RunSettings, read_run, summarise, write_run
from bench.views.charts import draw_charts
from common.errors import UsageError


def row(backend, epoch_s, **changes):
    fields = {
        "backend": backend,
        "label": f"{backend} idea (NHWC)",
        "device": "cpu",
        "layout": "NHWC",
        "precision": "fp32",
        "verified": True,
        "first_epoch_s": 9.0,
        "epoch_s": epoch_s,
        "images_per_s": 1.0,
        "loss": [1.0] * (len(epoch_s) + 1),
        "peak_bytes": 1,
        "checks": 5,
    }
    return RunRow(**{**fields, **changes})


def failed_row(backend, reason):
    return row(backend, [], verified=False, first_epoch_s=None, reason=reason)


def record(*rows):
    environment = Environment(cpu="AMD EPYC", cores=2, threads=2, commit="abc1234567")
    config = RunSettings(data="photos", samples=256, batch_size=64)
    return RunRecord(environment, config, list(rows), "2026-01-02T030405Z")


def write_changed(folder, place, value):
    """A results file of one row, with the value at a place of its JSON replaced."""
    path = write_run(record(row("v1", [1.0])), prepare_folder(folder))
    document = json.loads(path.read_text())
    *way, last = place
    inner = document
    for step in way:
        inner = inner[step]
    inner[last] = value
    path.write_text(json.dumps(document))
    return path


def test_speedups_are_ratios_of_medians():
    base, fast = summarise([row("v1", [8.0, 10.0, 12.0]), row("v4", [2.0, 2.5, 2.0])], "v1")
    assert base.speedup == 1
    assert base.is_baseline
    assert fast.speedup == pytest.approx(5.0)
    assert fast.interval is None  # three epochs are too few for one
    assert base.noisy
    assert fast.noisy
    assert fast.baseline_noisy


def test_enough_epochs_give_an_interval():
    rows = [row("v1", [8.0, 10.0, 12.0, 9.0, 11.0, 10.0]), row("v4", [2.0, 2.5, 2.0, 2.2, 2.1, 2.1])]
    _, fast = summarise(rows, "v1")
    low, high = fast.interval
    assert 3.5 < low < fast.speedup < high < 6.1


def test_without_v1_the_first_version_is_the_baseline():
    rows = [row("torch-eager", [1.0], peer=True), row("v4", [2.0]), row("v4", [1.0], id="v4#2")]
    peer, first, second = summarise(rows, "v1")
    assert first.is_baseline
    assert (peer.speedup, second.speedup) == (2.0, 2.0)


def test_quiet_samples_are_not_called_noisy():
    (quiet,) = summarise([row("v1", [1.0, 1.05, 1.02])], "v1")
    assert not quiet.noisy


@pytest.mark.parametrize("difference", [{"precision": "tf32"}, {"device": "gpu"}])
def test_a_row_in_another_precision_or_on_another_device_has_no_speedup(difference):
    _, other = summarise([row("v1", [8.0]), row("v4", [2.0], **difference)], "v1")
    assert other.speedup is None
    assert other.median_s == 2.0


def test_a_file_without_a_width_is_of_the_network(tmp_path):
    made = record(row("v1", [1.0]))
    made.config.width = 0.5
    path = write_run(made, prepare_folder(tmp_path))
    assert read_run(path).config.width == 0.5
    document = json.loads(path.read_text())
    del document["config"]["width"]
    path.write_text(json.dumps(document))
    assert read_run(path).config.width == 1


def test_peers_alone_have_no_speedup():
    (alone,) = summarise([row("torch-eager", [2.0], peer=True)], "v1")
    assert alone.speedup is None


@pytest.mark.parametrize("left_out", [failed_row("v1", "wrong"), row("v1", [8.0], reason="killed"), row("v1", [])])
def test_unverified_and_unfinished_rows_are_left_out(left_out):
    summaries = summarise([left_out, row("v4", [2.0])], "v1")
    assert [(s.row.backend, s.speedup) for s in summaries] == [("v4", 1.0)]


def test_a_record_is_read_back_and_never_overwritten(tmp_path):
    runs = prepare_folder(tmp_path)
    first = write_run(record(row("v1", [1.0])), runs)
    before = first.read_bytes()
    second = write_run(record(row("v1", [2.0])), runs)
    assert first.name == "2026-01-02T030405Z_amd-epyc-2c_abc1234567.json"
    assert second != first
    assert first.read_bytes() == before
    assert read_run(second) == record(row("v1", [2.0]))
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
        read_run(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("config",), {}),
        (("environment",), {}),
        (("environment",), []),
        (("rows",), []),
        (("rows", 0, "epoch_s"), [float("inf")]),
        (("rows", 0, "epoch_s"), [True, True]),
        (("rows", 0, "epoch_s"), [-1.0]),
        (("rows", 0, "reason"), None),
        (("rows", 0, "loss"), "none"),
        (("rows", 0, "images_per_s"), None),
        (("config", "samples"), "many"),
        (("order",), "v1"),
        (("order",), ["v1"]),
        (("order",), [["v9"]]),
        (("order",), [["v1", "v1"]]),
    ],
    ids=lambda part: str(part),
)
def test_records_with_wrong_parts_are_refused(tmp_path, place, value):
    path = write_changed(tmp_path, place, value)
    with pytest.raises(UsageError, match="not a valid results file") as error:
        draw_charts(path, tmp_path / "charts")
    assert str(place[-1]) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000], ids=["nesting", "digits"])
def test_json_that_python_cannot_parse_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match="not a results file"):
        read_run(tmp_path / "x.json")


def test_two_rows_of_one_backend_are_refused(tmp_path):
    rows = json.loads(write_run(record(row("v1", [1.0])), prepare_folder(tmp_path)).read_text())["rows"]
    path = write_changed(tmp_path, ("rows",), rows * 2)
    with pytest.raises(UsageError, match="two rows"):
        read_run(path)
    with pytest.raises(ValueError, match="two rows"):
        record(row("v1", [1.0]), row("v1", [2.0]))


def test_chart_labels_are_text_not_formulas(tmp_path):
    path = write_run(record(row("v1", [1.0], label="$x_$ {")), prepare_folder(tmp_path))
    drawn = next(chart for chart in draw_charts(path, tmp_path) if chart.suffix == ".svg")
    assert "$x_$ {" in drawn.read_text()


def test_times_without_verification_are_refused(tmp_path):
    path = write_changed(tmp_path, ("rows", 0, "verified"), False)
    with pytest.raises(UsageError, match="was not verified"):
        read_run(path)
    with pytest.raises(ValueError, match="was not verified"):
        row("v1", [1.0], verified=False)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write results"):
        prepare_folder(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot write results"):
        prepare_folder(tmp_path / "file" / "below")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "charts").write_text("in the way")
    with pytest.raises(UsageError, match="charts"):
        prepare_folder(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["charts"]


def test_charts_show_only_finished_rows(tmp_path):
    failed = failed_row("v3", "failed verification: forward")
    results = write_run(record(row("v1", [8.0, 9.0]), row("v4", [2.0, 2.01]), failed), prepare_folder(tmp_path))
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
    results = write_run(record(row("v4", [2.0])), prepare_folder(tmp_path))
    assert {path.stem.rpartition("_")[2] for path in draw_charts(results, tmp_path)} == {"epoch-time"}


def test_the_error_without_a_finished_row_gives_the_reasons(tmp_path):
    results = write_run(record(failed_row("v1", "it crashed")), prepare_folder(tmp_path))
    with pytest.raises(UsageError, match="it crashed"):
        draw_charts(results, tmp_path / "charts")
