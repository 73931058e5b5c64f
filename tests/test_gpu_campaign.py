"""The GPU campaign: a part that fails costs no other, and what cannot be asked for is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from bench import gpu_campaign
from bench.gpu_campaign import LIMITS_S, Campaign, Part, PartError, main, run_part
from bench.records import read_json_object
from common.device import DeviceStatus, device_status
from tests.report_files import layers_file, row, run_file, write

ROOT = Path(__file__).resolve().parent.parent


def campaign(*arguments, timeout=60):
    command = [sys.executable, "-m", "bench.gpu_campaign", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--only", "tests,sing"], ["'sing'", "tests, run, layers, bench, sanitize"]),
        (["--only", ","], ["names no part", "tests, run"]),
        (["--simulator"], ["--only tests"]),
        (["--samples", "0"], ["samples 0"]),
        (["--math", "fp16"], ["'fp16'", "fp32, tf32"]),
        pytest.param([], ["--device gpu cannot run here"], marks=pytest.mark.skipif(
            device_status("gpu").available, reason="this machine has a GPU"
        )),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, arguments, wanted):
    done = campaign("--out", tmp_path / "new", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in wanted), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one."""
    monkeypatch.setattr(gpu_campaign, "choose_device", lambda asked: DeviceStatus("gpu", True, "Example GPU"))
    monkeypatch.setattr(gpu_campaign, "describe_environment", lambda *rest: {"commit": "0123456789"})


def asked(tmp_path, **changes):
    settings = {"samples": 100, "epochs": 2, "math": "fp32", "data": "photos", "data_dir": tmp_path, "simulator": False}
    (tmp_path / "logs").mkdir()
    (tmp_path / "runs").mkdir()
    return Campaign(tmp_path, **{**settings, **changes})


def test_a_part_that_fails_costs_no_other(tmp_path, monkeypatch, gpu, capsys):
    def wrong(campaign, part):
        raise PartError("two tests failed")

    def broken(campaign, part):
        part.figures.append("v1: as far as it came")
        raise ValueError("a file that nobody expected")

    def fine(campaign, part):
        part.outcome, part.words = "passed", "all of it"

    parts = {"tests": wrong, "run": broken, "layers": fine, "bench": fine, "sanitize": fine}
    monkeypatch.setattr(gpu_campaign, "PARTS", parts)
    with pytest.raises(typer.Exit) as ended:
        main(tmp_path / "out", "tests,run,layers,sanitize", 100, 2, "fp32", "photos", tmp_path, False)
    assert ended.value.exit_code == 1
    (path,) = (tmp_path / "out").glob("*_campaign.json")
    found = [(part["name"], part["outcome"], part["words"]) for part in read_json_object(path)["parts"]]
    assert found == [
        ("tests", "FAILED", "two tests failed"),
        ("run", "FAILED", "ValueError: a file that nobody expected"),
        ("layers", "passed", "all of it"),
        ("bench", "not run", "not asked for"),
        ("sanitize", "passed", "all of it"),
    ]
    printed = capsys.readouterr().out
    assert "v1: as far as it came" in printed
    assert "Example GPU" in printed


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    sleeping = f"{child}; print('begun', flush=True); time.sleep(60)"
    monkeypatch.setitem(
        gpu_campaign.PARTS, "bench", lambda campaign, part: gpu_campaign._ask(campaign, part, "-c", sleeping)
    )
    monkeypatch.setitem(LIMITS_S, "bench", 2)
    part = run_part("bench", asked(tmp_path))
    assert (part.outcome, part.words) == ("FAILED", "not done after 2 s")
    assert part.seconds < 30
    log = (tmp_path / "logs" / "bench.log").read_text()
    assert "begun" in log
    assert "KeyboardInterrupt" in log  # it was asked first


def writes(path, document, code=0):
    """In place of a process: it leaves a results file and an exit code."""

    def ask(campaign, part, *arguments, **rest):
        write(campaign.out / "runs", path, document)
        return code

    return ask


def test_figures_are_read_off_the_files(tmp_path, monkeypatch):
    flops = {"gemm_flop_per_s": 2e11, "copy_bytes_per_s": 1e10, "read_bytes_per_s": 1e10}
    rows = [
        row("v1", 8.0),
        row("v4", 2.0),
        row("v2", 1.0, verified=False, reason="wrong", epoch_s=[], first_epoch_s=None),
    ]
    monkeypatch.setattr(gpu_campaign, "_ask", writes("run.json", run_file(*rows, ceilings=flops), 1))
    part = run_part("run", asked(tmp_path))
    assert (part.outcome, part.words) == ("FAILED", "v2: wrong")
    assert part.figures[0].startswith("v1: epoch 8 s, 1 times v1, ")
    assert part.figures[1].startswith("v4: epoch 2 s, 4 times v1, ")
    assert "% of the measured GEMM" in part.figures[1]
    monkeypatch.setattr(gpu_campaign, "_ask", writes("layers.json", layers_file()))
    part = run_part("layers", asked_again(tmp_path))
    assert (part.outcome, part.words) == ("passed", "layers.json")
    assert "% of it outside the operations" in part.figures[0]


def asked_again(tmp_path):
    return Campaign(tmp_path, 100, 2, "fp32", "photos", tmp_path, False)


def test_a_command_that_writes_nothing_is_told_by_its_last_line(tmp_path):
    part = run_part("run", asked(tmp_path, data="nonsense"))
    assert part.outcome == "FAILED"
    assert "exit code 2, no results file: error: " in part.words


def test_what_is_not_installed_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign.shutil, "which", lambda name: None)
    part = run_part("sanitize", asked(tmp_path))
    assert (part.outcome, part.words) == ("not run", "compute-sanitizer is not installed: not measured")


@pytest.mark.parametrize(("code", "outcome"), [(0, "passed"), (9, "FAILED")])
def test_the_sanitizer_is_asked_of_every_version(tmp_path, monkeypatch, code, outcome):
    calls = []

    def ask(campaign, part, *arguments, before):
        calls.append((before[2], arguments[-1]))
        return code

    monkeypatch.setattr(gpu_campaign.shutil, "which", lambda name: "/example/compute-sanitizer")
    monkeypatch.setattr(gpu_campaign, "_ask", ask)
    part = run_part("sanitize", asked(tmp_path))
    assert part.outcome == outcome
    assert len(set(calls)) == 8
    assert ("memcheck of v1: errors" in part.words) is bool(code)


def test_no_gpu_test_that_ran_is_no_pass(tmp_path, monkeypatch):
    def ask(campaign, part, *arguments, **rest):
        (campaign.out / "tests.xml").write_text(
            '<testsuites><testsuite tests="3" skipped="3" failures="0"/></testsuites>'
        )
        return 0

    monkeypatch.setattr(gpu_campaign, "_ask", ask)
    part = run_part("tests", asked(tmp_path))
    assert (part.outcome, part.words) == ("FAILED", "0 passed, 0 failed, 3 skipped")


def test_the_tiny_step_in_the_simulator():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-m", "bench.tiny_step", "--backend"]
    done = subprocess.run([*command, "v4"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "as the reference has it" in done.stdout
    done = subprocess.run([*command, "v9"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "choose from v1" in done.stderr


def test_a_part_is_recorded_without_its_clock():
    assert Part("run").as_record() == {
        "name": "run", "outcome": "not run", "words": "", "seconds": 0.0, "figures": [], "limit_s": 0.0,
    }  # fmt: skip
