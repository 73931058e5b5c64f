"""The GPU campaign: a step that fails does not affect the others, and bad input is refused."""

import json
import os
import signal
import subprocess
import sys
import threading
from time import perf_counter, sleep

import psutil
import pytest

from bench.commands.console import run_script
from bench.commands.options import options_of
from bench.experiments import gpu_campaign
from bench.experiments.gpu_campaign import (
    SHARES,
    CampaignOptions,
    Step,
    call,
    campaign_steps,
    run_campaign,
    run_step,
    sanitizer_steps,
    share_s,
)
from bench.machine.devices import ROOT, DeviceStatus, device_status
from bench.machine.environment import describe_environment
from versions.registry import names


@pytest.fixture
def campaign(monkeypatch, capsys):
    """Run the program in this process; gives exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_campaign", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as ended:
                run_script(options_of(run_campaign, CampaignOptions))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--only", "tests,sing"], ["'sing'", "tests, run, layers, bench, sanitize"]),
        (["--only", ","], ["unknown step ''", "tests, run"]),
        (["--simulator"], ["--only tests"]),
        (["--samples", "0"], ["samples 0"]),
        (["--epochs", "0"], ["epochs 0"]),
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
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, campaign, arguments, wanted):
    code, _, errors = campaign("--out", tmp_path / "new", *arguments)
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in wanted), errors
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, and a sanitizer."""
    monkeypatch.setattr(gpu_campaign, "choose_device", lambda asked: DeviceStatus("gpu", True, "Example GPU"))
    monkeypatch.setattr(gpu_campaign, "describe_environment", lambda device, *rest: describe_environment("cpu", *rest))
    monkeypatch.setattr(gpu_campaign.shutil, "which", lambda name, path: f"/example/{name}")


def ends(monkeypatch, **endings):
    """Let the steps end as given instead of running them; the commands are collected."""
    commands = {}

    def instead(command, log, limit_s, **rest):
        commands[log.stem] = command
        ending = endings.get(log.stem, ("exit code 0", "3 passed"))
        return ending() if callable(ending) else ending

    monkeypatch.setattr(gpu_campaign, "call", instead)
    return commands


def record_of(folder):
    (path,) = folder.glob("*_campaign.json")
    return json.loads(path.read_text())


def test_a_step_that_fails_does_not_affect_the_others(tmp_path, monkeypatch, gpu, campaign):
    def no_space():
        raise OSError(28, "No space left on device")

    commands = ends(
        monkeypatch,
        tests=("exit code 1", "...\n2 failed, 1 passed in 3 s\n"),
        run=("exit code 0", "results: runs/new.json\nchart: new.svg\nwarning: the CPU was busy\n"),
        layers=no_space,
    )
    code, printed, _ = campaign("--out", tmp_path / "out", "--only", "tests,run,layers,sanitize")
    assert code == 1
    record = record_of(tmp_path / "out")
    assert record["schema"] == "convbench-campaign/1"
    assert record["parts"][0].keys() == {"name", "words", "outcome", "seconds"}
    found = {part["name"]: (part["outcome"], part["words"]) for part in record["parts"]}
    assert found["tests"] == ("FAILED", "exit code 1: 2 failed, 1 passed in 3 s")
    assert found["run"][0] == "passed"
    assert found["run"][1].startswith("results: runs/new.json")
    assert found["layers"] == ("FAILED", "it cannot run: No space left on device")
    assert found["bench"] == ("not run", "not asked for")
    tools = [f"{tool}-{name}" for tool in ("memcheck", "racecheck") for name in names()]
    assert list(found)[4:] == tools
    assert {found[tool][0] for tool in tools} == {"passed"}
    assert "bench" not in commands
    assert "Example GPU" in printed
    assert "2 failed, 1 passed" in printed


def test_a_campaign_without_failures_ends_with_a_page(tmp_path, monkeypatch, gpu, campaign):
    def write_results():
        (tmp_path / "runs" / "new.json").write_text("{}")
        return "exit code 0", "results: new.json"

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "old.json").write_text("{}")
    commands = ends(monkeypatch, run=write_results, page=("exit code 0", ""))
    code, printed, _ = campaign("--out", tmp_path, "--only", "run", "--samples", "7", "--math", "tf32")
    assert code == 0
    page = commands["page"]
    assert page[page.index("report") + 1 :] == [
        str(tmp_path / "runs" / "new.json"), "--out", str(tmp_path / "report.html"), "--force",
    ]  # fmt: skip
    assert f"page: {tmp_path / 'report.html'}" in printed
    run = commands["run"]
    assert [run[run.index(name) + 1] for name in ("--samples", "--math", "--device")] == ["7", "tf32", "gpu"]
    assert 500 < int(run[run.index("--time-limit") + 1]) <= 570
    ends(monkeypatch, run=write_results, page=("exit code 2", "error: no rows"))
    (tmp_path / "runs" / "new.json").unlink()
    code, printed, _ = campaign("--out", tmp_path, "--only", "run")
    assert code == 0
    assert "no page: exit code 2: error: no rows" in printed


def test_an_interrupted_campaign_keeps_its_results(tmp_path, monkeypatch, gpu, campaign):
    ends(monkeypatch, layers=("interrupted", "half of it"))
    code, printed, _ = campaign("--out", tmp_path)
    assert code == 130
    found = [(part["outcome"], part["words"]) for part in record_of(tmp_path)["parts"]]
    assert [outcome for outcome, _ in found[:3]] == ["passed", "passed", "FAILED"]
    assert found[2][1] == "interrupted: half of it"
    assert set(found[3:]) == {("not run", "not reached")}
    assert "interrupted: half of it" in printed


def test_the_record_is_written_after_each_step_and_a_full_disk_stops_nothing(tmp_path, monkeypatch, gpu, campaign):
    def fill_the_disk():
        assert record_of(tmp_path)["parts"][0]["outcome"] == "passed"

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(gpu_campaign, "replace_file", full)
        return "exit code 0", ""

    ends(monkeypatch, run=fill_the_disk)
    code, printed, errors = campaign("--out", tmp_path)
    assert code == 0
    assert "No space left on device" in errors
    rows = [line.split()[:2] for line in printed.splitlines()]
    assert ["layers", "passed"] in rows
    assert ["racecheck-v4", "passed"] in rows


def run_one(tmp_path, monkeypatch, step, how, output):
    ends(monkeypatch, **{step.name: (how, output)})
    run_step(step, tmp_path, 60.0, 60.0)
    return step.outcome, step.words


def the_tests(tmp_path):
    return campaign_steps(CampaignOptions(out=tmp_path))[0]


def test_a_test_suite_that_only_skips_has_not_passed(tmp_path, monkeypatch):
    assert run_one(tmp_path, monkeypatch, the_tests(tmp_path), "exit code 0", "3 skipped in 1 s") == (
        "FAILED", "exit code 0: 3 skipped in 1 s",
    )  # fmt: skip
    passed = run_one(tmp_path, monkeypatch, the_tests(tmp_path), "exit code 0", "2 passed, 3 skipped in 1 s")
    assert passed[0] == "passed"
    late = run_one(tmp_path, monkeypatch, the_tests(tmp_path), "its time was up", "")
    assert late == ("FAILED", "its time was up: no output")


def test_a_missing_or_unsupported_sanitizer_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign.shutil, "which", lambda name, path: None)
    (missing,) = sanitizer_steps()
    assert run_one(tmp_path, monkeypatch, missing, "exit code 0", "") == (
        "not run", "compute-sanitizer is not installed: not measured",
    )  # fmt: skip
    monkeypatch.setattr(gpu_campaign.shutil, "which", lambda name, path: "/example/sanitizer")
    unsupported, faulty = sanitizer_steps()[:2]
    refusal = "Error: Device not supported. See the docs\n"
    assert run_one(tmp_path, monkeypatch, unsupported, "exit code 1", refusal) == (
        "not run", "compute-sanitizer does not support this device: not measured",
    )  # fmt: skip
    assert run_one(tmp_path, monkeypatch, faulty, "exit code 9", "ERROR SUMMARY: 2 errors\n") == (
        "FAILED", "exit code 9: ERROR SUMMARY: 2 errors",
    )  # fmt: skip


def test_time_that_a_step_leaves_goes_to_the_later_ones():
    left_s, limits = 570.0, {}
    for kind in SHARES:
        limits[kind] = round(share_s(left_s, kind, list(SHARES)))
        left_s -= {"tests": 34, "run": 400}.get(kind, limits[kind])  # one ends early and one late
    assert limits == {"tests": 114, "run": 268, "layers": 34, "bench": 51, "sanitize": 51}
    assert share_s(100.0, "run", ["run"]) == 100
    assert share_s(-1.0, "run", ["run"]) == 0


def test_a_step_without_time_is_not_started(tmp_path):
    step = Step("run", "run", ["/does/not/exist"])
    assert not run_step(step, tmp_path, 4.0, 4.0)
    assert (step.outcome, step.words) == ("not run", "no time was left")


# Processes ------------------------------------------------------------------------------------------------------------

SLEEPS = """
import subprocess, time
child = subprocess.Popen(["sleep", "99"])
print("begun", child.pid, flush=True)
try:
    time.sleep(99)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep({0})
"""


def assert_gone(number):
    for _ in range(100):
        if not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
            return
        sleep(0.05)
    raise AssertionError("a process that the step started is still there")


@pytest.mark.parametrize("after_s", [0, 99])
def test_a_command_whose_time_is_up_is_interrupted_then_killed(tmp_path, monkeypatch, after_s):
    monkeypatch.setattr(gpu_campaign, "INTERRUPT_S", 1)
    begun = perf_counter()
    how, output = call([sys.executable, "-c", SLEEPS.format(after_s)], tmp_path / "x.log", 2.0)
    assert how == "its time was up"
    assert perf_counter() - begun < 20
    words = output.split()
    assert words[0] == "begun"
    assert words[2:] == ["interrupted"]
    assert (tmp_path / "x.log").read_text() == output
    assert_gone(int(words[1]))


def test_ctrl_c_gives_a_command_time_to_write_its_results(tmp_path):
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    how, output = call([sys.executable, "-c", SLEEPS.format(0)], tmp_path / "x.log", 60.0)
    assert how == "interrupted"
    assert output.endswith("interrupted\n")


def test_a_second_ctrl_c_leaves_no_process_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign, "INTERRUPT_S", 2)
    handler = signal.getsignal(signal.SIGINT)
    for after_s in (1.5, 2.5):
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT)).start()
    how, output = call([sys.executable, "-c", SLEEPS.format(99)], tmp_path / "x.log", 60.0)
    assert how == "interrupted"
    assert_gone(int(output.split()[1]))
    assert signal.getsignal(signal.SIGINT) is handler


def test_processes_in_a_session_of_their_own_are_killed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign, "INTERRUPT_S", 1)
    own = SLEEPS.format(99).replace('"99"]', '"99"], start_new_session=True')
    how, output = call([sys.executable, "-c", own], tmp_path / "x.log", 2.0)
    assert how == "its time was up"
    assert_gone(int(output.split()[1]))


def test_processes_that_a_command_leaves_running_are_killed(tmp_path):
    leaving = "from subprocess import Popen; print(Popen(['sleep', '99']).pid)"
    how, output = call([sys.executable, "-c", leaving], tmp_path / "x.log", 60.0)
    assert how == "exit code 0"
    assert_gone(int(output))


def test_a_command_that_cannot_start_is_a_failed_step(tmp_path):
    step = Step("bench", "bench", ["/does/not/exist"])
    run_step(step, tmp_path, 60.0, 60.0)
    assert (step.outcome, step.words) == ("FAILED", "it cannot run: No such file or directory")


def test_the_tiny_step_in_the_simulator():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-m", "bench.experiments.tiny_step", "--backend"]
    done = subprocess.run([*command, "v4"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "equal to the reference" in done.stdout
    done = subprocess.run([*command, "v9"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "choose from v1" in done.stderr
