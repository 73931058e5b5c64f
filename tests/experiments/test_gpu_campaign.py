"""The GPU campaign: a part that fails costs no other, and what cannot be asked for is said."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from time import perf_counter, sleep

import psutil
import pytest
import typer

from bench.experiments import gpu_campaign
from bench.experiments.gpu_campaign import SHARES, Campaign, Part, PartError, main, run_part
from bench.machine.devices import ROOT, DeviceStatus, device_status
from bench.records.run import read_json_object
from tests.support.results_files import layer_row, layers_file, row, run_file, write


def campaign(*arguments, timeout=60):
    command = [sys.executable, "-m", "bench.experiments.gpu_campaign", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--only", "tests,sing"], ["'sing'", "tests, run, layers, bench, sanitize"]),
        (["--only", ","], ["unknown part ''", "tests, run"]),
        (["--simulator"], ["--only tests"]),
        (["--samples", "0"], ["samples 0"]),
        (["--math", "fp16"], ["'fp16'", "fp32, tf32"]),
        (["--data", "mnist"], ["'mnist'", "cifar10"]),
        (["--minutes", "0.2"], ["minutes 0.2", "more than 0.5"]),
        (["--minutes", "inf"], ["minutes inf", "less than"]),
        (["--frobnicate"], ["--frobnicate"]),
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


def run_one(name, out, limit_s=60.0, **changes):
    """Run one part in a folder; returns what came of it."""
    for folder in ("logs", "runs"):
        (out / folder).mkdir(exist_ok=True)
    settings = {"samples": 100, "epochs": 2, "math": "fp32", "data": "photos", "data_dir": out, "simulator": False}
    campaign = Campaign(out, **{**settings, **changes}, ends=perf_counter() + limit_s)
    part = Part(name, limit_s=limit_s)
    run_part(part, campaign)
    return part


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
        main(tmp_path / "out", only="tests,run,layers,sanitize", data_dir=tmp_path)
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


def test_an_interrupted_campaign_keeps_what_it_has(tmp_path, monkeypatch, gpu, capsys):
    def fine(campaign, part):
        part.outcome = "passed"

    def ctrl_c(campaign, part):
        part.words = "half of it"
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_campaign, "PARTS", dict.fromkeys(SHARES, fine) | {"layers": ctrl_c})
    with pytest.raises(typer.Exit) as ended:
        main(tmp_path / "out", data_dir=tmp_path)
    assert ended.value.exit_code == 130
    (path,) = (tmp_path / "out").glob("*_campaign.json")
    found = [(part["outcome"], part["words"]) for part in read_json_object(path)["parts"]]
    assert found[:3] == [("passed", ""), ("passed", ""), ("FAILED", "interrupted; half of it")]
    assert found[3:] == [("not run", "not reached")] * 2
    assert "interrupted; half of it" in capsys.readouterr().out


def test_sigterm_and_a_full_disk(tmp_path, monkeypatch, gpu, capsys):
    """The record is written after each part; a disk that takes it no more costs no part and no table."""
    folder = tmp_path / "out"

    def fine(campaign, part):
        part.outcome = "passed"

    def look(campaign, part):
        (path,) = folder.glob("*_campaign.json")
        assert read_json_object(path)["parts"][0]["outcome"] == "passed"
        part.outcome = "passed"

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(gpu_campaign, "replace_file", full)

    def terminated(campaign, part):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(gpu_campaign, "PARTS", dict.fromkeys(SHARES, fine) | {"run": look, "bench": terminated})
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(typer.Exit) as ended:
            main(folder, data_dir=tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.exit_code == 130
    written = capsys.readouterr()
    assert "No space left on device" in written.err
    rows = [line.split()[:2] for line in written.out.splitlines() if line.strip().startswith(tuple(SHARES))]
    assert ["layers", "passed"] in rows
    assert ["bench", "FAILED"] in rows


def test_ctrl_c_in_a_command_gives_it_time_for_its_last_words(tmp_path, monkeypatch):
    words = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: open(r'{0}', 'w').write('kept')".format
    kept = tmp_path / "kept"

    def part_that_is_interrupted(campaign, part):
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        code = gpu_campaign._ask(campaign, part, "-c", words(kept))
        raise PartError(gpu_campaign._ended(campaign, code))

    monkeypatch.setitem(gpu_campaign.PARTS, "bench", part_that_is_interrupted)
    part = run_one("bench", tmp_path)
    assert (part.outcome, part.words) == ("FAILED", "interrupted")
    assert kept.read_text() == "kept"


def test_what_a_command_left_running_is_ended_too(tmp_path, monkeypatch):
    """It ended by itself, or by Ctrl-C, before what it had started."""
    leaving = "from subprocess import Popen; print('left', Popen(['sleep', '99']).pid)"

    def part_that_leaves_one(campaign, part):
        gpu_campaign._ask(campaign, part, "-c", leaving)

    monkeypatch.setitem(gpu_campaign.PARTS, "bench", part_that_leaves_one)
    run_one("bench", tmp_path)
    assert_gone(int((tmp_path / "logs" / "bench.log").read_text().split()[-1]))


def assert_gone(number):
    for _ in range(100):
        if not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
            return
        sleep(0.05)
    raise AssertionError("a process that the part started is still there")


def test_time_is_shared_out_and_what_is_left_goes_on(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(gpu_campaign, "perf_counter", lambda: now)
    campaign = Campaign(Path(), 1, 1, "fp32", "photos", Path(), False, ends=now + 570)
    limits = {}
    for name in SHARES:
        part = Part(name)
        gpu_campaign._share_out(campaign, part, list(SHARES))
        limits[name] = round(part.limit_s)
        now += {"tests": 34, "run": 400}.get(name, part.limit_s)  # one is early and one late
    assert limits == {"tests": 114, "run": 268, "layers": 34, "bench": 51, "sanitize": 51}
    assert now == pytest.approx(campaign.ends)


SLEEPING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], start_new_session=True)
print("begun", child.pid, flush=True)
try:
    time.sleep(99)
except KeyboardInterrupt:
    print("asked", flush=True)
    time.sleep(99)
"""


def test_a_part_that_takes_too_long_is_asked_then_killed_with_all_that_it_started(tmp_path, monkeypatch):
    def part_that_sleeps(campaign, part):
        assert gpu_campaign._ask(campaign, part, "-c", SLEEPING) is None
        raise PartError("its time was up")

    monkeypatch.setitem(gpu_campaign.PARTS, "bench", part_that_sleeps)
    monkeypatch.setattr(gpu_campaign, "LAST_WORDS_S", 1)
    part = run_one("bench", tmp_path, limit_s=2)
    assert (part.outcome, part.words) == ("FAILED", "its time was up")
    assert part.seconds < 20
    words = (tmp_path / "logs" / "bench.log").read_text().split()
    assert "asked" in words
    assert_gone(int(words[words.index("begun") + 1]))


def writes(path, document, code=0):
    """In place of a process: it leaves a results file and an exit code."""

    def ask(campaign, part, *arguments, **rest):
        write(campaign.out / "runs", path, document)
        return code

    return ask


def test_figures_are_read_off_the_files(tmp_path, monkeypatch):
    flops = {"gemm_flop_per_s": 2e11, "copy_bytes_per_s": 1e10, "read_bytes_per_s": 1e10, "math": "fp32"}
    failed = {"verified": False, "reason": "wrong", "epoch_s": [], "first_epoch_s": None}
    rows = [row("v1", 8.0), row("v4", 2.0), row("torch-eager", 3.0, peer=True), row("v2", 1.0, **failed)]
    monkeypatch.setattr(gpu_campaign, "_ask", writes("run.json", run_file(*rows, ceilings=flops), 1))
    part = run_one("run", tmp_path)
    assert (part.outcome, part.words) == ("FAILED", "run.json; v2: wrong")
    rates = [128 * 1.0333e9 / seconds / 1e12 for seconds in (8, 2)]
    shares = [f"{rate:.3g} TFLOP/s, {100 * rate / 0.2:.1f} % of the measured GEMM" for rate in rates]
    assert part.figures[0].startswith(f"v1 fp32: epoch 8 s, {shares[0]}, ")
    assert part.figures[1].startswith(f"v4 fp32: epoch 2 s, {shares[1]}, 4 times v1, ")
    assert part.figures[3] == "v4 is 1.5 times as fast as torch-eager"
    monkeypatch.setattr(gpu_campaign, "_ask", writes("layers.json", layers_file(layer_row("v4", 0.5))))
    part = run_one("layers", tmp_path)
    assert (part.outcome, part.words) == ("passed", "layers.json")
    assert "% of it outside the operations" in part.figures[0]


def test_a_command_that_writes_nothing_is_told_by_its_last_line(tmp_path):
    part = run_one("run", tmp_path, data="nonsense")
    assert part.outcome == "FAILED"
    assert "exit code 2, no results file: error: " in part.words


def test_what_is_not_installed_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign.shutil, "which", lambda name, path: None)
    part = run_one("sanitize", tmp_path)
    assert (part.outcome, part.words) == ("not run", "compute-sanitizer is not installed: not measured")


def test_the_sanitizer_is_asked_of_every_version_and_nothing_found_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign.shutil, "which", lambda name, path: "/example/compute-sanitizer")
    calls = []

    def asked(code_of):
        def ask(campaign, part, *arguments, before):
            calls.append((before[2], arguments[-1]))
            campaign.log(part).write_text(f"it said {calls[-1][1]}\n")
            return code_of(*calls[-1])

        monkeypatch.setattr(gpu_campaign, "_ask", ask)
        return run_one("sanitize", tmp_path)

    part = asked(lambda check, name: 0)
    assert part.outcome == "passed"
    assert len(set(calls)) == 8
    part = asked(lambda check, name: 9 if name == "v2" else 1 if name == "v3" else 0)
    assert part.outcome == "FAILED"
    assert part.words.startswith("memcheck of v2: errors, see the log; memcheck of v3: exit code 1: it said v3; ")
    assert part.words.endswith("clean: memcheck of v1, memcheck of v4, racecheck of v1, racecheck of v4")
    part = asked(lambda check, name: 9 if name == "v1" else None)  # time is up
    assert part.outcome == "FAILED"
    assert part.words == "memcheck of v1: errors, see the log; memcheck of v2: its time was up: it said v2; clean: none"


@pytest.mark.parametrize(
    ("memcheck", "outcome", "words"),
    [
        (
            0,
            "passed",
            "racecheck: compute-sanitizer does not support this device, not measured; clean: memcheck of v1, ",
        ),
        (9, "FAILED", "memcheck of v1: errors, see the log; memcheck of v2: errors, see the log; "),
        (1, "not run", "memcheck: compute-sanitizer does not support this device, not measured; racecheck: "),
    ],
)
def test_a_device_that_the_sanitizer_refuses_is_not_measured(tmp_path, monkeypatch, memcheck, outcome, words):
    def ask(campaign, part, *arguments, before):
        code = memcheck if before[2] == "memcheck" else 1
        with campaign.log(part).open("a") as log:
            log.write("Error: Device not supported. Please refer to the documentation\n" if code == 1 else "said\n")
        return code

    monkeypatch.setattr(gpu_campaign.shutil, "which", lambda name, path: "/example/compute-sanitizer")
    monkeypatch.setattr(gpu_campaign, "_ask", ask)
    part = run_one("sanitize", tmp_path)
    assert part.outcome == outcome
    assert part.words.startswith(words)


def test_no_gpu_test_that_ran_is_no_pass(tmp_path, monkeypatch):
    def ask(campaign, part, *arguments, **rest):
        (campaign.out / "tests.xml").write_text(
            '<testsuites><testsuite tests="3" skipped="3" failures="0"/></testsuites>'
        )
        return 0

    monkeypatch.setattr(gpu_campaign, "_ask", ask)
    part = run_one("tests", tmp_path)
    assert (part.outcome, part.words) == ("FAILED", "0 passed, 0 failed, 3 skipped")


def test_the_tiny_step_in_the_simulator():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-m", "bench.experiments.tiny_step", "--backend"]
    done = subprocess.run([*command, "v4"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "as the reference has it" in done.stdout
    done = subprocess.run([*command, "v9"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "choose from v1" in done.stderr
