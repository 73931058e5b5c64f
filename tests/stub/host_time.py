"""Prints how long the host takes to queue a training step, on the stub driver: ``python -m tests.stub.host_time v4``.

The driver, CuPy and cuBLAS do nothing here, so this is what Python, this project and the bindings take. A real driver
and a real cuBLAS add their own time to each launch and product.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from tests.stub.driver import MARK, stub_environment

STEPS = 200


def main(versions: list[str]) -> int:
    """Time the named versions, all without names, in a process on the stub; returns its exit code."""
    if MARK not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.stub.host_time", *versions]
            return subprocess.run(command, env=stub_environment(Path(folder)), check=False).returncode
    from cupy.cuda import cublas

    from common.gpu import CudaRuntime
    from tests.stub.watching import Training, with_room
    from versions.registry import names

    warnings.simplefilter("ignore")  # Numba's about small grids
    for version in versions or names():
        start = perf_counter()
        training = with_room(lambda version=version: Training(version, runtime=CudaRuntime("fp32")))
        first = with_room(training.step)
        compiled_s = perf_counter() - start
        cublas.recording = False
        replayed_s = median_s(training.take)
        training.backend.replayed = lambda owner, name, work: work()
        plain_s = median_s(training.take)
        cublas.recording = True
        print(
            f"{version}: {len(first.launched)} launches, {len(first.products)} products; the host takes "
            f"{replayed_s * 1e3:.3f} ms a step, {plain_s * 1e3:.3f} ms without replay; {compiled_s:.1f} s to compile",
            flush=True,
        )
    return 0


def median_s(call: Callable[[], None]) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(STEPS):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
