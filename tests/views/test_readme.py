"""The README's block of results: what is written between its markers, and what is refused."""

import sys

import pytest

from bench import cli
from bench.records.documents import prepare_folder
from bench.records.run import write_run
from bench.views.charts import draw_charts
from bench.views.readme import BEGIN, END, named_file, replace, written
from common.errors import UsageError
from tests.support.results_files import NO_TIME, row, run_record


@pytest.fixture
def small(tmp_path):
    """A README of its own, with a results file and its charts beside it."""
    failed = row("v2", 1.0, **(NO_TIME | {"reason": "it | *crashed*"}))
    rows = [row("v1", 8.0, epoch_s=[8.0] * 6), row("v4", 2.0, epoch_s=[2.0] * 6), failed]
    results = write_run(run_record(*rows), prepare_folder(tmp_path / "results"))
    draw_charts(results, tmp_path / "results" / "charts")
    readme = tmp_path / "README.md"
    readme.write_bytes(f"before\r\n{BEGIN}old{END}\r\nafter".encode())
    return readme, results


def test_only_what_is_between_the_markers_changes(small):
    readme, results = small
    present, wanted = written(readme, results)
    assert present != wanted
    replace(readme, wanted)
    text = readme.read_bytes().decode()
    assert text.startswith(f"before\r\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\r\nafter")
    assert "| version | checks passed | first epoch | median epoch | spread |" in text
    assert "| v4 (example NHWC) | 182 | 6 s | 2 s | 0 % | 64 | 4 (4-4) |" in text
    assert r"| v2 (example NHWC) | NO | no time: it \| \*crashed\* | - |" in text
    assert "On a GPU: not measured." in text
    assert named_file(readme) == results
    assert written(readme, results)[0] == written(readme, results)[1]
    assert sorted(path.name for path in readme.parent.iterdir()) == ["README.md", "results"]


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, BEGIN + BEGIN + END, BEGIN + END + END])
def test_missing_repeated_and_swapped_markers_are_refused(small, text):
    readme, results = small
    readme.write_text(text)
    with pytest.raises(UsageError, match="must have one"):
        written(readme, results)
    assert readme.read_text() == text


def test_results_of_another_width_are_refused(small, tmp_path):
    readme, _ = small
    record = run_record(row("v1", 8.0), row("v4", 2.0))
    record.config.width = 0.5
    half = write_run(record, tmp_path / "results" / "runs")
    draw_charts(half, tmp_path / "results" / "charts")
    with pytest.raises(UsageError, match=r"has width 0\.5: the README shows the network"):
        written(readme, half)


def test_results_without_a_link_or_a_chart_are_refused(small, tmp_path_factory):
    readme, results = small
    with pytest.raises(UsageError, match="names no results file"):
        named_file(readme)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / results.name
    elsewhere.write_bytes(results.read_bytes())
    with pytest.raises(UsageError, match="not beneath"):
        written(readme, elsewhere)
    next((readme.parent / "results" / "charts").glob("*_speedup.png")).unlink()
    with pytest.raises(UsageError, match="convbench plot"):
        written(readme, results)


def test_check_writes_nothing_and_ends_with_1(small, monkeypatch, capsys):
    readme, results = small
    stale = readme.read_bytes()
    ends = []
    for arguments in (["--check", results], [results], ["--check"], ["--check", readme]):
        monkeypatch.setattr(sys, "argv", ["convbench", "readme", "--readme", str(readme), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        ends.append((ended.value.code, readme.read_bytes() == stale, capsys.readouterr().err.count("\n")))
    assert ends == [(1, True, 1), (0, False, 0), (0, False, 0), (2, False, 1)]
