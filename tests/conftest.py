"""The simulator's tests need a process of their own: NUMBA_ENABLE_CUDASIM has to be set before Numba is imported."""

import os
import signal

# The options of the benchmark suite, registered here because pytest reads this file before its arguments.
from tests.benchmarks.options import (  # noqa: F401
    pytest_addoption,
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_update_machine_info,
    pytest_configure,
)

SIMULATOR = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
collect_ignore = [] if SIMULATOR else ["simulator"]

# A shell starts what it runs in the background with Ctrl-C ignored, and every child would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
