"""The command line as a stranger uses it: in a process of its own, in an empty folder."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import psutil
import pytest

import bench
from bench.machine.devices import ROOT, device_status


def convbench(*arguments, cwd, root=ROOT, timeout=300, **environment):
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


BAD = {
    "unknown backend": (["run", "--backend", "v9"], ["'v9'", "v1", "v4", "all"]),
    "unknown backend beside all": (["run", "--backend", "all", "--backend", "v9"], ["'v9'"]),
    "unknown device": (["run", "--device", "tpu"], ["'tpu'", "auto", "cpu", "gpu"]),
    "unknown math": (["run", "--math", "bf16"], ["'bf16'", "fp32", "tf32"]),
    "unknown peer": (["run", "--peer", "jax"], ["'jax'", "torch"]),
    "unknown data": (["run", "--data", "mnist"], ["'mnist'", "auto", "cifar10", "photos"]),
    "zero samples": (["run", "--samples", "0"], ["samples 0", "at least 1"]),
    "negative epochs": (["run", "--epochs", "-1"], ["epochs -1", "at least 1"]),
    "zero batch": (["run", "--batch-size", "0"], ["batch size 0"]),
    "zero learning rate": (["run", "--learning-rate", "0"], ["learning rate 0"]),
    "learning rate nan": (["run", "--learning-rate", "nan"], ["learning rate nan"]),
    "negative seed": (["run", "--seed", "-1"], ["seed -1"]),
    "too many threads": (["run", "--threads", "5000"], ["threads 5000", "choose from 1 to"]),
    "not a number": (["run", "--epochs", "many"], ["--epochs"]),
    "unknown option": (["run", "--frobnicate"], ["--frobnicate"]),
    "unknown command": (["frobnicate"], ["frobnicate"]),
    "more samples than photographs": (["run", "--data", "photos", "--samples", "99999999"], ["99,999,999"]),
    "no CIFAR-10": (["run", "--data", "cifar10", "--data-dir", "nowhere"], ["nowhere", "convbench data download"]),
    "unwritable folder": (["run", "--out", "file"], ["file"]),
    "plot a missing file": (["plot", "missing.json"], ["missing.json"]),
    "plot no results file": (["plot", "file"], ["file is not a results file"]),
    "learning rate that float32 loses": (["run", "--learning-rate", "1e-60"], ["1e-60", "float32"]),
    "a newline in a path": (["run", "--out", "file/a\nb"], ["file/a"]),
    "describe unknown": (["describe", "--backend", "v9"], ["'v9'"]),
    "describe unknown card": (
        ["describe", "--device", "gpu", "--card", "K80"],
        ["'K80'", "T4", "A100", "H100", "H200"],
    ),
    "describe card without GPU": (["describe", "--card", "A100"], ["--card A100", "--device gpu"]),
    "describe width": (["describe", "--width", "0.3"], ["width 0.3", "from 1/128 to 4", "for example 0.5"]),
    "run width": (["run", "--width", "nan"], ["width nan", "from 1/128 to 4"]),
    "describe zero": (["describe", "--batch-size", "0"], ["batch size 0"]),
    "check unknown": (["check", "--backend", "v9"], ["'v9'"]),
}


@pytest.mark.parametrize(("arguments", "wanted"), BAD.values(), ids=BAD.keys())
def test_bad_input(tmp_path, arguments, wanted):
    (tmp_path / "file").write_text("something")
    done = convbench(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in wanted), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_version(tmp_path):
    done = convbench("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"convbench {bench.__version__}\n")


def test_help_has_groups_in_the_order_of_use(tmp_path):
    text = convbench("--help", cwd=tmp_path).stdout
    groups = re.findall(r"─ (\w+) ─", text)
    assert groups == ["Options", "Measure", "Inspect", "Train", "Results"]
    commands = re.findall(r"^│ ([a-z]+) ", text, re.MULTILINE)
    assert commands == [
        "run", "layers", "check",
        "list", "doctor", "describe", "kernels",
        "train", "encode", "reconstruct", "probe", "data",
        "compare", "plot", "report", "readme",
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["run", "compare", "train"])
def test_help_shows_examples_that_fit_80_columns(tmp_path, command):
    done = convbench(command, "--help", cwd=tmp_path, COLUMNS="80")
    examples = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith(f"convbench {command}")]
    assert len(examples) >= 2
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_gpu_that_is_not_there(tmp_path):
    if device_status("gpu").available:
        pytest.skip("this machine has a GPU")
    done = convbench("run", "--device", "gpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "--device gpu cannot run here: " in done.stderr
    assert not list(tmp_path.iterdir())


def test_damaged_cifar_file(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data_batch_1.bin").write_bytes(bytes(3072))
    done = convbench("run", cwd=tmp_path)
    assert done.returncode == 2
    assert "truncated" in done.stderr
    assert not (tmp_path / "results").exists()


def test_modules_of_the_users_folder_are_not_imported(tmp_path):
    for name in ("common.py", "numpy.py"):
        (tmp_path / name).write_text("raise ImportError('the wrong module')")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bench", "check", "--backend", "v4", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "checks passed" in done.stdout


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """V1's kernels, the smallest, are compiled once for both tests of them."""
    arguments = ["describe", "--backend", "v1", "--device", "gpu", "--card", "A100"]
    return convbench(*arguments, cwd=tmp_path_factory.mktemp("described"))


def test_describe_prints_the_work_of_the_gpu_kernels(described):
    assert described.returncode == 0, described.stderr
    lines = [line.split() for line in described.stdout.splitlines()]
    (row, kernel) = next(pair for pair in pairwise(lines) if pair[0][:2] == ["conv2", "forward"])
    assert kernel == ["conv2d_forward"]
    # FLOPs: 2 * 64 * 128 * 256 * 9 * 256. Least: x, w and y once.
    assert row[2] == "9,663.7"
    assert float(row[3]) == pytest.approx(4 * (64 * 256 * (256 + 128) + 9 * 256 * 128) / 1e6, abs=0.06)
    assert float(row[6]) == pytest.approx(9663.7e6 / 67e12 * 1e6, abs=0.1)
    assert row[7:] == ["FLOPs"]
    assert "67 TFLOP/s" in described.stdout
    assert "4.3 TB/s" in described.stdout
    assert "computed, not measured" in described.stdout
    assert max(map(len, described.stdout.splitlines())) <= 132  # notes are not folded in a file


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda has no wheel for this platform")
def test_describe_predicts_times_on_a_card(described):
    work, table = described.stdout.split("Predicted: v1 naive (NHWC), A100, batch 64")
    assert "GPU kernels of v1" in work
    assert "Predicted, not measured. A100: 108 multiprocessors at 1.41 GHz with 64 lanes each, 2.039 TB/s" in table
    lines = [line.split() for line in table.splitlines()]
    (total,) = [line for line in lines if line[:1] == ["total"]]
    rows = [line for line in lines if line[-1:] in (["compute"], ["memory"], ["launch"])]
    assert len(rows) == int(total[1])  # V1 launches each kernel once an operation
    times = [float(row[-2].replace(",", "")) for row in rows]
    assert float(total[-1].replace(",", "")) == pytest.approx(sum(times), abs=0.05 * len(rows))
    assert min(times) == 2.5


def test_list_describe_and_doctor(tmp_path):
    listed = convbench("list", cwd=tmp_path)
    assert listed.returncode == 0
    assert "v1" in listed.stdout
    assert "im2col GEMM" in listed.stdout
    described = convbench(
        "describe", "--backend", "v4", "--device", "gpu", "--batch-size", "64", cwd=tmp_path, NUMBA_ENABLE_CUDASIM="1"
    )
    assert described.returncode == 0
    for figure in ("751,875", "349.2", "1,033.4", "22 or 26", "design document differs", "columns", "625 MB"):
        assert figure in described.stdout, figure
    assert "asked" not in convbench("describe", "--backend", "v2", "--device", "cpu", cwd=tmp_path).stdout
    doctor = convbench("doctor", cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stderr
    assert "BLAS for V4" in doctor.stdout
    assert "GPU" in doctor.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = ["--device", "cpu", "--samples", "6", "--batch-size", "4", "--epochs", "2", "--seed", "3"]
    options += ["--backend", "v1", "--backend", "v4"]
    return folder, convbench("run", *options, cwd=folder)


def test_run_writes_a_complete_results_file(finished_run):
    folder, done = finished_run
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "results" / "runs").iterdir()
    data = json.loads(path.read_text())
    assert data["schema"] == "convbench-run/2"
    assert data["interrupted"] is False
    environment = data["environment"]
    for key in ("cpu", "cores", "memory_bytes", "python", "libraries", "threads", "commit", "dirty", "command_line"):
        assert environment[key] not in (None, ""), key
    assert environment["command_line"][:2] == ["convbench", "run"]
    assert (
        data["config"] | {"data": "photos", "samples": 6, "batch_size": 4, "seed": 3, "math": "fp32"} == data["config"]
    )
    assert [row["backend"] for row in data["rows"]] == ["v1", "v4"]
    for row in data["rows"]:
        assert row["verified"] is True
        assert row["reason"] == ""
        assert row["checks"] > 100
        assert row["deterministic"] is True
        assert len(row["epoch_s"]) == 2
        assert len(row["loss"]) == 3
        # The first epoch compiles; the others do not.
        assert row["first_epoch_s"] > max(row["epoch_s"])
        assert row["images_per_s"] == pytest.approx(6 / (sum(row["epoch_s"]) / 2))
        assert 50e6 < row["peak_bytes"] < 5e9
    first, *others = (row["loss"] for row in data["rows"])
    assert all(other == pytest.approx(first, rel=1e-4) for other in others)
    assert first[0] > first[1] > first[2]


def test_run_says_what_it_did_and_where(finished_run):
    folder, done = finished_run
    lines = done.stdout.splitlines()
    assert lines[0].startswith("data: photo crops, 6 of")
    assert "--samples 50000 is the full epoch" in lines[1]
    for chart in (folder / "results" / "charts").iterdir():
        assert str(chart.relative_to(folder)) in done.stdout
    assert len(list((folder / "results" / "charts").iterdir())) == 4
    assert "v1: epoch 1 of 2" in done.stderr
    assert "v4: first epoch, compiling" in done.stderr


def test_plot_draws_the_same_charts_again(finished_run, tmp_path):
    folder, _ = finished_run
    (results,) = (folder / "results" / "runs").iterdir()
    before = {path.name: path.read_bytes() for path in (folder / "results" / "charts").iterdir()}
    assert convbench("plot", results, "--out", tmp_path, cwd=tmp_path).returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_ctrl_c_ends_the_workers_and_keeps_what_finished(tmp_path):
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench", "run", "--backend=v4", "--device=cpu", "--samples=2", "--epochs=1000000"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    workers = []
    try:
        deadline = time.monotonic() + 300
        while "epoch 3 of" not in errors.read_text():
            assert process.poll() is None, errors.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    except BaseException:  # a run that does not end must not outlive its test, nor keep a core from the others
        for left in (process, *workers):
            left.kill()
        process.communicate()
        raise
    assert process.returncode == 130, errors.read_text()
    assert "Traceback" not in errors.read_text()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == []
    (path,) = (tmp_path / "results" / "runs").iterdir()
    data = json.loads(path.read_text())
    assert data["interrupted"] is True
    (row,) = data["rows"]
    assert len(row["epoch_s"]) >= 2
    assert "interrupted after" in row["reason"]


VERSION = '''"""{name}."""

import os

from common import reference
from common.cpu import CpuBackend


class Odd(CpuBackend):
    layout = "NCHW"

    def conv2d_forward(self, x, w, b, y, relu):
        exact = reference.conv2d_forward(x, w, b)
        y[...] = reference.relu(exact) if relu else exact

    def conv2d_backward_data(self, dy, w, dx):
        dx[...] = reference.conv2d_backward_data(dy, w)

    def conv2d_backward_filter(self, x, dy, dw):
        dw[...] = reference.conv2d_backward_filter(x, dy)

    def conv2d_backward_bias(self, dy, db):
        db[...] = reference.conv2d_backward_bias(dy)
        {mistake}

    calls = 0

    def late(self, dy):
        """True from the second step of six pictures on: after the one that is verified, and the first epoch."""
        self.calls += len(dy) == 6
        return self.calls > 5

    def run_out(self):
        raise MemoryError("no room for db")


make_backend = Odd
'''


@pytest.fixture
def extended(tmp_path):
    """A copy of the project with more versions: a folder and a registry line each, and nothing else."""
    root = tmp_path / "project"
    for package in ("bench", "common", "versions"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    registry = root / "versions" / "registry.py"
    mistakes = {
        "v7": "pass",
        "v8": "db[...] = 0",
        "v9": "if self.late(dy): os.abort()",
        "v10": "if self.late(dy): self.run_out()",
    }
    lines = []
    for name, mistake in mistakes.items():
        folder = root / "versions" / f"{name}_odd"
        folder.mkdir()
        (folder / "__init__.py").write_text("def workspace(*arguments):\n    return {}\n")
        (folder / "cpu.py").write_text(VERSION.format(name=name, mistake=mistake))
        lines.append(f'    BackendInfo("{name}", "odd", "NCHW", "versions.{name}_odd"),\n')
    text = registry.read_text()
    registry.write_text(text.replace("\n)\n\nBASELINE", "\n" + "".join(lines) + ")\n\nBASELINE"))
    return root


def test_a_new_version_is_a_folder_and_a_line_and_bad_ones_do_not_stop_it(extended, tmp_path):
    listed = convbench("list", cwd=extended, root=extended)
    assert "v7" in listed.stdout
    options = [part for name in ("v7", "v7", "v8", "v9", "v10") for part in ("--backend", name)]
    options += ["--device", "cpu", "--samples", "6", "--batch-size", "6", "--epochs", "1"]
    with_torch = importlib.util.find_spec("torch") is not None
    options += ["--peer", "torch"] if with_torch else []
    done = convbench("run", *options, cwd=extended, root=extended)
    assert done.returncode == 1
    (path,) = (extended / "results" / "runs").iterdir()
    data = json.loads(path.read_text())
    good, again, wrong, crashed, full, *peers = data["rows"]
    assert [row["id"] for row in (good, again)] == ["v7", "v7#2"]
    assert again["loss"] == good["loss"]
    assert again["reconstruction_png"] == good["reconstruction_png"] != data["originals_png"]
    assert data["ceilings"]["gemm_flop_per_s"] > 1e9
    assert data["conditions"].keys() == {"before", "after"}
    names = ["torch-eager", "torch-channels-last", "torch-compiled"] if with_torch else []
    assert [row["id"] for row in peers] == names
    for row in peers:
        if row["id"] != "torch-compiled":  # needs a C++ compiler, which not every machine has
            assert row["reason"] == ""
        if not row["reason"]:
            assert row["loss"] == pytest.approx(good["loss"], rel=1e-4)
            assert row["peer"]
    assert good["verified"]
    assert len(good["epoch_s"]) == 1
    assert wrong["verified"] is False
    assert "failed verification: backward bias" in wrong["reason"]
    assert (wrong["first_epoch_s"], wrong["epoch_s"]) == (None, [])
    assert crashed["verified"]
    assert "SIGABRT" in crashed["reason"]
    assert crashed["first_epoch_s"] > 0
    assert crashed["epoch_s"] == []
    assert "MemoryError: no room for db" in full["reason"]
    reasons = [
        line.partition(":")[0] for line in done.stderr.splitlines() if re.match("v[0-9#]+: .*(fail|proc|Mem)", line)
    ]
    assert reasons == ["v8", "v9", "v10"]
    described = convbench("describe", "--backend", "v7", "--device", "gpu", cwd=extended, root=extended)
    assert "v7 odd (NCHW) does not state the work of its kernels" in described.stdout
    drawn = "".join(file.read_text() for file in (extended / "results" / "charts").glob("*.svg"))
    assert "v7 odd" in drawn
    assert "v8 odd" not in drawn

    checked = convbench("check", "--backend", "v7", "--backend", "v8", "--device", "cpu", cwd=extended, root=extended)
    assert checked.returncode == 1
    assert "checks passed" in checked.stdout
    assert "FAILED" in checked.stdout
