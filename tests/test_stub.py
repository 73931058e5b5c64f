"""Runs tests/stub in a process of its own: the stub driver has to be found when the process starts."""

import subprocess
import sys

import pytest

from bench.machine.devices import ROOT
from tests.stub.driver import compiler, stub_environment

pytest.importorskip("numba_cuda", reason="numba-cuda has no wheel for this platform")


@pytest.mark.skipif(compiler() is None, reason="no C compiler to build the stub driver with")
@pytest.mark.skipif(sys.platform != "linux", reason="the stub driver is built for Linux")
def test_the_real_runtime_on_the_stub_driver(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/stub"]
    environment = stub_environment(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout
