"""``convbench doctor``: try everything that the suite needs, for real, and say what to install."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.markup import escape

from bench.machine.devices import probe_gpu
from common.dataset import photo_crops
from common.device import usable_cores
from common.errors import RunError


def doctor_command() -> None:
    """Try everything that the suite needs, for real, and say what to install."""
    console = Console()

    def tell(mark: str, what: str, detail: str) -> None:
        console.print(f"{mark}  {what}: {escape(detail)}", highlight=False, soft_wrap=True)

    ok = True
    for what, attempt in (("Numba on the CPU", _try_numba), ("BLAS for V4", _try_blas), ("pictures", _try_pictures)):
        try:
            tell("[green]yes[/]", what, attempt())
        except Exception as error:  # whatever is wrong with an installation is the answer
            ok = False
            tell("[bold red]no[/] ", what, str(error))
    for probe in probe_gpu(thorough=True):
        tell("[green]yes[/]" if probe.ok else "[yellow]no[/] ", f"GPU, {probe.what}", probe.detail)
    if not ok:
        raise RunError("the CPU versions cannot run: python -m pip install -e . installs what they need")


def _try_numba() -> str:
    import numba

    double = numba.njit(parallel=True)(lambda x: x + x)
    if double(np.ones(8, np.float32)).sum() != 16:
        raise RuntimeError("a parallel function gave a wrong sum")
    return f"Numba {numba.__version__}, {numba.threading_layer()} threads, {usable_cores()} cores"


def _try_blas() -> str:
    from numba.extending import get_cython_function_address

    get_cython_function_address("scipy.linalg.cython_blas", "sgemm")
    import scipy
    from threadpoolctl import threadpool_info

    libraries = sorted(
        {f"{info['internal_api']} {info['version']}" for info in threadpool_info() if info["user_api"] == "blas"}
    )
    return f"SciPy {scipy.__version__} with {', '.join(libraries) or 'an unknown BLAS'}"


def _try_pictures() -> str:
    return f"photo crops {photo_crops(2, 0).shape[1:]}"
