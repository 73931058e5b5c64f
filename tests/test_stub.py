"""Runs tests/stub in a process of its own: the stub driver has to be found when the process starts."""

import subprocess
import sys

import pytest

from bench.machine.devices import ROOT
from tests.stub.driver import compiler, stub_environment
from versions.registry import names

pytest.importorskip("numba_cuda", reason="numba-cuda has no wheel for this platform")


@pytest.mark.skipif(compiler() is None, reason="no C compiler to build the stub driver with")
@pytest.mark.skipif(sys.platform != "linux", reason="the stub driver is built for Linux")
def test_the_real_runtime_on_the_stub_driver(tmp_path):
    """In two processes side by side, because nearly all of the time is the compilation of the kernels."""
    later = " or ".join(names()[len(names()) // 2 :])
    environment, running = stub_environment(tmp_path), []
    for chosen in (f"not ({later})", later):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, "tests/stub"]
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        printed = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, printed, strict=True):
        assert process.returncode == 0, text
        assert " passed" in text
        assert "skipped" not in text, text
