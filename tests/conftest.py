"""The tests of the simulator and of the stub driver need processes of their own.

NUMBA_ENABLE_CUDASIM has to be set before Numba is imported, and the stub driver found when the process starts.
"""

import os
import signal

# The options of the benchmark suite, registered here because pytest reads this file before its arguments.
from tests.benchmarks.options import (  # noqa: F401
    pytest_addoption,
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_update_machine_info,
    pytest_configure,
)
from tests.stub.driver import MARK

SIMULATOR = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
STUB = MARK in os.environ
collect_ignore = [*([] if SIMULATOR else ["simulator"]), *([] if STUB else ["stub"])]

# How this run is spread over processes is not for the runs of pytest that tests start.
for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
    os.environ.pop(name, None)

# A shell starts what it runs in the background with Ctrl-C ignored, and every child would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
