"""Runs tests/simulator as the GPU campaign does: in a separate process with Numba's simulator."""

import json
import subprocess
import sys

from bench.machine.devices import ROOT


def test_gpu_kernels_in_the_simulator(tmp_path):
    program = [sys.executable, "-m", "bench.experiments.gpu_campaign"]
    command = [*program, "--out", tmp_path, "--only", "tests", "--simulator", "--minutes", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    log = (tmp_path / "logs" / "tests.log").read_text()
    assert done.returncode == 0, log + done.stderr
    (path,) = tmp_path.glob("*_campaign.json")
    record = json.loads(path.read_text())
    assert record["device"] == "Numba's simulator"
    outcomes = {part["name"]: part["outcome"] for part in record["parts"]}
    assert outcomes == {
        "tests": "passed",
        "run": "not run",
        "layers": "not run",
        "bench": "not run",
        "sanitize": "not run",
    }
    number, outcome, *rest = record["parts"][0]["words"].split()
    assert (int(number) > 60, outcome) == (True, "passed")
    assert not {"failed", "failed,", "skipped", "skipped,", "error", "errors"} & {*rest}
    assert "not asked for" in done.stdout
