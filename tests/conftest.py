"""The simulator's tests need a process of their own: NUMBA_ENABLE_CUDASIM has to be set before Numba is imported."""

import os

SIMULATOR = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
collect_ignore = [] if SIMULATOR else ["simulator"]
