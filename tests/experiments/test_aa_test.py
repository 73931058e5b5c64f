"""The A/A test: it counts the intervals that contain 1, and keeps every run."""

import json
import subprocess
import sys

import pytest

from bench.commands.console import run_script
from bench.experiments import aa_test
from bench.experiments.aa_test import AaRun, FailedAaRun, run_aa_test
from tests.support.results_files import row, run_file, write


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program in this process with the given results; gives exit code and output."""

    def call(found, *arguments):
        left = list(found)
        monkeypatch.setattr(aa_test, "_run_once", lambda command: left.pop(0))
        arguments = ["--runs", len(found), "--load", "0", *arguments]
        monkeypatch.setattr(sys, "argv", ["aa_test", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_script(run_aa_test)
        return ended.value.code, capsys.readouterr()

    return call


def around_one(low=0.9, high=1.1):
    return AaRun(1.0, (low, high), ([1.0] * 6, [1.0] * 6), [], [], None)


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([around_one()] * 9 + [around_one(1.01, 1.1)], 0),
        ([around_one()] * 8 + [around_one(1.01, 1.1)] * 2, 1),
        ([around_one()] * 8 + [FailedAaRun("killed")] * 2, 1),
    ],
    ids=["nine in ten", "eight in ten", "failed runs"],
)
def test_nine_in_ten_intervals_must_contain_one(run, tmp_path, found, code):
    ended, printed = run(found, "--out", tmp_path)
    assert ended == code
    held = 9 if code == 0 else 8
    assert f"the interval contained 1 in {held} of 10 runs" in printed.out
    (path,) = (tmp_path / "runs").glob("*_aa-test.json")
    document = json.loads(path.read_text())
    assert (document["schema"], document["held"], len(document["runs"])) == ("convbench-aa/1", held, 10)
    assert document["config"]["command"][:2] == ["convbench", "run"]
    assert document["runs"][0]["interval"] == [0.9, 1.1]


def test_an_unknown_version_is_one_line_and_writes_nothing(run, tmp_path):
    code, printed = run([], "--runs", "1", "--backend", "v9", "--out", tmp_path / "new")
    assert code == 2
    assert "'v9'" in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_one_run_is_read_from_its_results_file(monkeypatch):
    def write_results(command, **rest):
        folder = aa_test.Path(command[-1]) / "runs"
        folder.mkdir()
        write(folder, "x.json", run_file(row("v4", 2.0), row("v4", 2.2, id="v4#2")))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(aa_test.subprocess, "run", write_results)
    found = aa_test._run_once(["run"])
    assert found.ratio == pytest.approx(2 / 2.2)
    assert found.interval[0] < found.ratio < found.interval[1]
    assert [len(samples) for samples in found.epoch_s] == [6, 6]
    failed = subprocess.CompletedProcess([], 1, "", "warning: busy\nv4: out of memory\n")
    monkeypatch.setattr(aa_test.subprocess, "run", lambda command, **rest: failed)
    assert aa_test._run_once(["run"]) == FailedAaRun("v4: out of memory")
