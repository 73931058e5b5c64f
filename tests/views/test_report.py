"""``convbench report``: the page's content, its safety, and the files it is made from."""

import base64
import json
import re
import sys
import tomllib
from pathlib import Path
from statistics import median

import pytest

from bench import cli
from bench.machine.devices import ROOT
from bench.records.kernels import read_kernels
from bench.views import page as report
from bench.views.charts import loss_figure
from bench.views.page import KINDS, read_sources, render, write_report
from bench.views.page_parts import largest_loss_difference, summary_text
from bench.views.pictures import picture_uri
from bench.views.words import date
from common.errors import UsageError
from tests.support.results_files import (
    ENVIRONMENT,
    GPU,
    NO_TIME,
    Page,
    kernel_row,
    kernels_file,
    layer_row,
    layers_file,
    new_kernel_row,
    new_kernels_file,
    png,
    row,
    run_file,
    run_record,
    write,
)

HOSTILE = "<script>alert(1)</script>\"'>&amp;{{ 7 * 7 }}$\\frac$ \x00\x1b\u202e 漢字"
RESULTS = sorted((ROOT / "results" / "runs").glob("*.json"))
KNOWN = [path for path in RESULTS if json.loads(path.read_bytes()).get("schema") in KINDS]


def page_of(folder, *files):
    paths = [write(folder, f"{i}.json", data) for i, data in enumerate(files)]
    page = Page(render(read_sources(paths)))
    assert page.faults == []
    return page


def words_of(folder, *rows, **changes):
    (source,) = read_sources([write(folder, "run.json", run_file(*rows, **changes))])
    return summary_text(source.record)


def charts_of(page):
    """The drawings of a page as SVG: in light and in dark colours, one after the other."""
    return [base64.b64decode(chart.partition(",")[2]).decode() for chart in page.charts]


def test_a_page_of_all_three_kinds(tmp_path):
    parts = (new_kernels_file(), layers_file(), run_file())
    files = [write(tmp_path, f"{i}.json", data) for i, data in enumerate(parts)]
    out = tmp_path / "page.html"
    assert write_report(files, out) == out
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.faults == []
    wanted = ["Training epochs", "Results", "Loss", "Pictures before and after", "Layers", "Roofline", "Memory"]
    wanted += ["Kernel resources", "Environment and settings", "How it was measured", "Commands"]
    assert [heading for heading in page.headings if heading in wanted] == wanted
    assert "3 of 3 versions finished in float32. The fastest is v4 example (NHWC): an epoch of 128" in page.text
    assert "v1 example (NHWC), the baseline, takes 14 s, 7 times as long (95 % interval: " in page.text
    assert len(page.images) == 4  # originals and one a row
    assert page.tags.count("picture") == 3 + 2  # three charts of the run, two of the layers
    drawn = charts_of(page)
    assert len(drawn) == 2 * 5
    for title in ("Speedup over v1", "Epoch time", "mean squared error", "Time of a training step", "ceilings"):
        assert sum(title in drawing for drawing in drawn) == 2
    assert "convbench run --out 'my results'" in page.text
    assert "overhead" in page.text
    assert "none spills" in page.text
    assert "625" in page.text  # the budget at batch 64
    assert "not measured" in page.text  # CuPy's pool on a CPU
    assert "v1.memory" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json", "2.json", "page.html"]
    write_report(list(reversed(files)), out, force=True)
    assert out.read_text(encoding="utf-8") == text  # neither the order nor the day matters


@pytest.mark.parametrize("path", KNOWN, ids=lambda path: path.stem)
def test_every_results_file_of_the_repository_is_read_and_drawn(path):
    page = Page(render(read_sources([path])))
    assert page.faults == []
    data = json.loads(path.read_bytes())
    if data["schema"].startswith("convbench-run"):
        pictures = data["config"]["samples"]
        timed = [row for row in data["rows"] if row["epoch_s"] and not row["reason"] and not row.get("peer")]
        fastest = min(timed, key=lambda row: median(row["epoch_s"]))["label"]
        assert f"The fastest is {fastest}: an epoch of {pictures:,} pictures" in page.text
        assert len(page.charts) == 2 * 3
    elif data["schema"].startswith("convbench-layers"):
        assert len(page.charts) == 2 * 2
    else:
        assert "none spills" in page.text


def test_every_kind_of_file_is_among_those_of_the_repository():
    assert {json.loads(path.read_bytes())["schema"].partition("/")[0] for path in KNOWN} == {
        schema.partition("/")[0] for schema in KINDS
    }


@pytest.mark.parametrize(
    ("data", "commands"),
    [
        (run_file(), ["convbench layers --device cpu", "convbench kernels --out", "convbench run --peer torch"]),
        (layers_file(), ["convbench run --device cpu", "convbench kernels --out"]),
        (kernels_file(), ["convbench run --device cpu", "convbench layers --device cpu"]),
    ],
    ids=["run", "layers", "kernels"],
)
def test_what_is_not_there_is_said_to_be_not_measured(tmp_path, data, commands):
    page = page_of(tmp_path, data)
    assert "ot measured" in page.text
    for command in commands:
        assert command in page.text


def test_a_file_of_the_first_schema(tmp_path):
    data = run_file()
    for name in ("ceilings", "conditions", "warnings", "originals_png"):
        del data[name]
    for old in data["rows"]:
        for name in ("id", "peer", "reconstruction_png"):
            del old[name]
    page = page_of(tmp_path, data | {"schema": "convbench-run/1"})
    assert "Pictures that can be shown: not measured" in page.text
    assert "GFLOP/s" not in page.text


# Words --------------------------------------------------------------------------------------------------------------


def test_few_epochs_have_no_interval(tmp_path):
    words = words_of(tmp_path, row("v1", 4.0, epochs=3), row("v2", 2.0, epochs=3))
    assert "v1 example (NHWC), the baseline, takes 4 s, 2 times as long (no interval: it needs 6 epochs)" in words


def test_rows_that_cannot_be_told_apart_are_not_ranked(tmp_path):
    again = row("v4", 2.001, id="v4#2", epoch_s=[1.99, 2.01, 2.02, 1.98, 2.003, 1.995])
    words = words_of(tmp_path, row("v4", 2.0), again)
    assert "cannot tell apart" in words
    assert "times as" not in words


def test_against_the_fastest_form_of_a_peer(tmp_path):
    ours, eager, last = row("v4", 2.0), row("torch-eager", 4.0), row("torch-channels-last", 3.0)
    words = words_of(tmp_path, row("v1", 9.0), ours, eager, last)
    assert "torch-channels-last example (NHWC), the fastest peer of 2, takes 3 s, 1.5 times as long (95 %" in words
    words = words_of(tmp_path, row("v4", 6.0), last)
    assert "1 of 1 versions finished" in words
    assert "the fastest peer of 1, takes 3 s, 0.5 times as long" in words
    assert "takes 3 s, which this run cannot tell apart" in words_of(tmp_path, row("v4", 3.0), last)
    assert words_of(tmp_path, last) == "0 of 0 versions finished in float32."


def test_tf32_is_not_compared_with_float32(tmp_path):
    rows = [row("v1", 9.0, device="gpu"), row("v2", 3.0, device="gpu"), row("v4", 1.0, device="gpu", precision="tf32")]
    words = words_of(tmp_path, *rows, environment=ENVIRONMENT | {"gpu": GPU})
    assert "2 of 2 versions finished in float32. The fastest is v2 example (NHWC): " in words
    assert "1 of 1 versions finished in TF32. The fastest is v4 example (NHWC), TF32: " in words
    page = page_of(tmp_path, run_file(*rows, environment=ENVIRONMENT | {"gpu": GPU}))
    assert "is not compared: it ran on another device or in other arithmetic than v1" in page.text
    assert "convbench layers --device gpu" in page.text
    assert "Example GPU · 2 January 2026" in page.text


def test_another_width_is_said(tmp_path):
    half = run_file()
    half["config"] = half["config"] | {"width": 0.5}
    page = page_of(tmp_path, half)
    assert "The inner convolutions have 0.5 times the filters of the network." in page.text
    assert "times the filters" not in page_of(tmp_path, run_file()).text


def test_rows_without_a_time_say_why(tmp_path):
    bad = row("v2", 1.0, **NO_TIME)
    page = page_of(tmp_path, run_file(row("v1", 2.0), bad, interrupted=True, warnings=["the clock went down"]))
    assert "no time: failed verification: conv2 is wrong" in page.text
    assert "The run was interrupted" in page.text
    assert "the clock went down" in page.text
    assert "1 of 2 versions finished" in page.text
    page = page_of(tmp_path, run_file(bad))
    assert "0 of 1 versions finished" in page.text
    assert page.charts == []
    assert "Loss" not in page.headings


def test_layers_without_a_time_say_why(tmp_path):
    suspicious = layer_row("v2", 0.1, reason="suspicious: 900 GFLOP/s")
    page = page_of(tmp_path, layers_file(suspicious))
    assert "no time: suspicious: 900 GFLOP/s" in page.text
    assert page.charts == []
    other = layers_file(layer_row("v1", 0.002), suspicious)
    other["config"] = other["config"] | {"batch_size": 8}
    assert "is for batches of 64 and is not set against other sizes" in page_of(tmp_path, other).text


def test_kernels_that_break_a_rule(tmp_path):
    rows = [
        new_kernel_row("a_kernel", "sm_80", resources={"spill_bytes": 24}),
        new_kernel_row("a_kernel", "sm_90", resources={"registers": 200, "uses_float64": True}),
        new_kernel_row("b_kernel", "sm_80", refused=True),
    ]
    page = page_of(tmp_path, new_kernels_file(*rows, faults=["v2: b_kernel is refused"]))
    assert "1 of them spill" in page.text
    assert "spills 24" in page.text
    assert "(double precision)" in page.text
    assert "Refused compilations: 1" in page.text
    assert "v2: b_kernel is refused" in page.text


def test_machines_are_kept_apart(tmp_path):
    other = run_file(environment=ENVIRONMENT | {"cpu": "Another CPU"}, started="2026-01-03T030405Z")
    page = page_of(tmp_path, other, run_file())
    assert "figures of different machines are not compared" in page.text
    assert [heading for heading in page.headings if heading.startswith("Training")] == [
        f"Training epochs, run {i}" for i in (1, 2)
    ]
    assert "Training epochs, run 1 Example CPU, 4 threads · 2 January 2026, 03:04 UTC" in page.text
    assert "Training epochs, run 2 Another CPU" in page.text
    assert date("no date") == "no date"


# What must not happen -----------------------------------------------------------------------------------------------

KEPT = ("schema", "math", "device", "backend", "id", "stage", "operation", "operations", "target", "targets", "purpose")


def poisoned(value, key=""):
    """The value with every text in it hostile, except names that others refer to, and pictures."""
    if isinstance(value, dict):
        return {name: poisoned(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, key) for item in value]
    return HOSTILE if isinstance(value, str) and key not in KEPT else value


def test_no_text_of_a_file_becomes_markup(tmp_path):
    run = run_file(row("v1", 2.0), row("v4", 1.0, id="v4#2"), row("v3", 1.0, **NO_TIME), warnings=["x"])
    layers = layers_file(layer_row("v1", 0.1), layer_row("v2", 0.1, reason="x"), warnings=["x"])
    files = [poisoned(data) for data in (run, layers, new_kernels_file(faults=["x"]))]
    for data in files:
        data["environment"]["libraries"][HOSTILE] = HOSTILE
        data["notes"][HOSTILE] = HOSTILE
    paths = [tmp_path / f"<b>&{i}.json" for i in range(3)]
    for path, data in zip(paths, files, strict=True):
        path.write_text(json.dumps(data), encoding="utf-8")
    text = render(read_sources(paths))
    page = Page(text)
    assert page.faults == []
    assert "<script" not in text
    assert not any("<script" in drawing for drawing in charts_of(page))
    assert "{{ 7 * 7 }}" in page.text  # shown as it is written
    assert "<script>alert(1)</script>" in page.text
    assert not re.search("[\x00-\x08\x1b\u202e]", text)
    text.encode("utf-8")
    assert "b" not in page.tags


def test_long_texts_and_odd_numbers_still_make_a_page(tmp_path):
    long = "x" * 5000
    rows = [row("v1", 5e-9, label=long, loss=[0.0] * 7), row("v2", 9e8, label=long, id="v2#2", epochs=1)]
    page = page_of(tmp_path, run_file(*rows), layers_file(layer_row("v1", 0.1, label=long)))
    assert long not in page.text
    assert "difference between two rows" not in page.text
    long_epochs = write(tmp_path, "long.json", layers_file(layer_row("v1", 0.1, step_s=[1e308] * 3)))
    with pytest.raises(UsageError, match="cannot be shown"):
        render(read_sources([long_epochs]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (png(), True),
        (png(2048, 256), True),
        (png(4000, 32), False),
        (png(32, 300), False),
        (png()[:-40], False),
        ("aGVsbG8=", False),
        ("not base64!", False),
        ('"><script>', False),
        ("", False),
        ("A" * 3_000_000, False),
        (None, False),
    ],
)
def test_only_a_png_of_a_sensible_size_is_a_picture(text, shown):
    assert picture_uri(text) == (f"data:image/png;base64,{text}" if shown else None)


def test_bad_pictures_are_left_out(tmp_path):
    page = page_of(tmp_path, run_file(originals_png='"><script>alert(1)</script>'))
    assert len(page.images) == 3  # without the originals
    page = page_of(tmp_path, run_file(row("v1", 2.0), row("v2", 1.0, reconstruction_png="AAAA")))
    assert len(page.images) == 2


BENCHMARKS = {"machine_info": {}, "benchmarks": [], "version": "5.3.1"}
BAD_FILES = {
    "pytest-benchmark": (BENCHMARKS, ["'pytest-benchmark'", "convbench-run/2", "convbench-kernels/1"]),
    "another schema": ({"schema": "convbench-step/1"}, ["'convbench-step/1'", "convbench-run/1", "convbench-layers/1"]),
    "a schema that is no text": ({"schema": ["a"]}, ["names no schema"]),
    "no schema": ({"rows": []}, ["names no schema"]),
    "a list": ([1], ["names no schema"]),
    "no rows": (run_file() | {"rows": []}, ["it has no rows"]),
    "no ceilings": ({**layers_file(), "ceilings": None}, ["not a valid results file"]),
    "an unknown operation": (
        layers_file(layer_row("v1", 1.0, operations=[{"stage": "conv1", "operation": "dance", "flops": 1,
                                                      "least_bytes": 1, "seconds": [1.0]}])),
        ["'dance'", "backward_filter"],
    ),
    "a kernel without registers": (kernels_file({**kernel_row("k"), "registers": None}), ["rows.0", "registers"]),
    "half a character": (run_file(row("v1", 2.0, label="\ud800")), ["not a valid results file"]),
    "a number beyond all": (run_file(row("v1", 2.0, peak_bytes=10**400)), ["not a valid results file"]),
}  # fmt: skip


@pytest.mark.parametrize(("data", "wanted"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_files_that_are_no_part_of_a_report(tmp_path, data, wanted):
    good, bad = write(tmp_path, "good.json", run_file()), write(tmp_path, "bad.json", data)
    with pytest.raises(UsageError) as raised:
        write_report([good, bad], tmp_path / "page.html")
    assert "bad.json" in str(raised.value)
    assert all(word in str(raised.value) for word in wanted), str(raised.value)
    assert not (tmp_path / "page.html").exists()


def test_no_json_and_no_file(tmp_path):
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    for name, wanted in (("bad.json", "no JSON"), ("none.json", "cannot read")):
        with pytest.raises(UsageError, match=wanted):
            read_sources([tmp_path / name])


def test_where_the_page_cannot_go(tmp_path, monkeypatch):
    file = write(tmp_path, "run.json", run_file())
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "old.html").write_text("old")
    monkeypatch.setattr(report, "render", lambda sources: "new")
    for out, wanted in (
        ("page.pdf", "must end in .html or .htm"),
        ("folder.html", "--force writes over it"),
        ("none/page.html", "No such file or directory"),
        ("old.html", "--force writes over it"),
    ):
        with pytest.raises(UsageError, match=wanted):
            write_report([file], tmp_path / out)
    with pytest.raises(UsageError, match="given twice"):
        write_report([file, tmp_path / "." / "run.json"], tmp_path / "page.html")
    misnamed = file.rename(tmp_path / "run.htm")
    with pytest.raises(UsageError, match="one of the files to be read"):
        write_report([misnamed], misnamed, force=True)
    with pytest.raises(UsageError, match="Is a directory"):
        write_report([misnamed], tmp_path / "folder.html", force=True)
    assert (tmp_path / "old.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "old.html", "run.htm"]
    write_report([misnamed], tmp_path / "old.html", force=True)
    assert (tmp_path / "old.html").read_text() == "new"


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    file = write(tmp_path, "run.json", run_file())

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "render", lambda sources: "new")
    monkeypatch.setattr(Path, "hardlink_to", full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_report([file], tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_command(tmp_path, monkeypatch, capsys):
    file, out = write(tmp_path, "run.json", kernels_file()), tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["convbench", "report", str(file), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"page: {out}\n"
    assert Page(out.read_text(encoding="utf-8")).faults == []
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    written = capsys.readouterr()
    assert (written.out, written.err) == ("", f"error: {out} exists; --force writes over it\n")


# Parts --------------------------------------------------------------------------------------------------------------


def test_charts_are_drawn_in_light_and_in_dark_colours(tmp_path):
    light, dark = report.page_parts.LIGHT, report.page_parts.DARK
    page = page_of(tmp_path, run_file(), layers_file())
    drawn = charts_of(page)
    assert len(drawn) == 10
    for first, second in zip(drawn[0::2], drawn[1::2], strict=True):  # the dark one comes first, as a <source>
        for drawing, colours, other in ((first, dark, light), (second, light, dark)):
            assert colours["ink"] in drawing
            assert colours["paper"] in drawing
            assert other["ink"] not in drawing
            assert other["paper"] not in drawing
        assert re.findall(r"<text [^>]*>([^<]*)<", first) == re.findall(r"<text [^>]*>([^<]*)<", second)


def test_a_drawing_shows_figures_with_all_their_digits(tmp_path):
    rows = [row("v1", 2.0, loss=[0.0021 + 0.0003 * i for i in range(7)], label="v1 1.2345")]
    *_, loss, _ = charts_of(page_of(tmp_path, run_file(*rows)))
    assert len(re.findall(r">0\.00\d{2,}</text>", loss)) > 3
    assert "v1 1.2345" in loss


def test_loss_curves_are_told_apart():
    record = run_record()
    lines = loss_figure(record, record.rows).axes[0].lines
    assert len({(line.get_linewidth(), line.get_marker()) for line in lines}) == len(record.rows)
    record.rows[1].loss[2] *= 1.5
    assert largest_loss_difference(record.rows) == pytest.approx(0.5)
    assert largest_loss_difference(record.rows[:1]) is None


def test_the_kernels_command_writes_a_file_for_the_page(tmp_path, monkeypatch, capsys):
    pytest.importorskip("numba_cuda")
    from bench.kernels import launches
    from versions.registry import find

    uses = [use for use in launches.kernel_uses([find("v1")]) if use.name in ("sgd_kernel", "conv2d_forward_kernel")]
    monkeypatch.setattr(launches, "kernel_uses", lambda infos: uses)
    arguments = ["convbench", "kernels", "--backend", "v1", "--target", "sm_90a", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert f"results: {path}" in capsys.readouterr().out
    record = read_kernels(path)
    assert {row.name for row in record.rows} == {"sgd_kernel", "conv2d_forward_kernel"}
    for use in record.rows:
        assert use.resources.registers <= use.resources.stated_registers
        assert use.versions == ["v1"]
    assert record.environment.command_line == arguments
    page = Page(render(read_sources([path])))
    assert page.faults == []
    assert "2 kernels, at batch 64, were compiled for sm_90a: none spills" in page.text


def test_the_templates_are_shipped():
    with (ROOT / "pyproject.toml").open("rb") as file:
        data = tomllib.load(file)
    patterns = data["tool"]["setuptools"]["package-data"]["bench.views"]
    views = ROOT / "bench" / "views"
    shipped = {path for pattern in patterns for path in views.glob(pattern)}
    assert shipped == {path for path in (views / "templates").iterdir() if path.is_file()}
    assert any(dependency.startswith("jinja2") for dependency in data["project"]["dependencies"])
