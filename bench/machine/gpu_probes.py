"""What is tried of CUDA in a process of its own; ``bench.machine.devices`` starts it and reads what it prints.

A run needs to know whether the libraries load. ``convbench doctor`` is thorough: it also compiles and launches a kernel
and multiplies two matrices as the versions do, and checks the results.
"""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import numpy as np

from bench.machine.devices import GPU_INSTALL_HINT, attempt

VALUES = 256


class WrongResultError(ArithmeticError):
    """Everything ran, and the numbers are wrong; no package can be installed against that."""


def print_probes(*, thorough: bool = False) -> None:
    """Try the CUDA libraries in this process and print the results as JSON."""
    probes = []
    for what, action in (("numba-cuda", _numba_cuda), ("CuPy", _cupy), ("cuBLAS through CuPy", _cublas)):
        probes.append(attempt(what, action, GPU_INSTALL_HINT))
        if not probes[-1].ok:
            thorough = False
            break
    if thorough:
        probes += [attempt(what, action, GPU_INSTALL_HINT) for what, action in THOROUGH.items()]
    print(json.dumps([astuple(probe) for probe in probes]))


def _numba_cuda() -> str:
    version = importlib.metadata.version("numba-cuda")
    from numba import cuda

    cuda.current_context()
    return version


def _cupy() -> str:
    import cupy

    cupy.zeros(1).sum().item()
    return cupy.__version__


def _cublas() -> str:
    from cupy.cuda import cublas

    return f"version {cublas.getVersion(cublas.create())}"


def _versions() -> str:
    from cuda.bindings import nvjitlink
    from cupy.cuda import runtime

    def pair(number: int) -> tuple[int, int]:
        return number // 1000, number % 1000 // 10

    libraries = {"numba-cuda's linker": nvjitlink.version(), "CuPy": pair(runtime.runtimeGetVersion())}
    return matching_versions(pair(runtime.driverGetVersion()), libraries)


def matching_versions(driver: tuple[int, int], libraries: dict[str, tuple[int, int]]) -> str:
    """The CUDA versions in words; RuntimeError if the libraries are of different majors, or newer than the driver's."""
    found = ", ".join(f"{name} {major}.{minor}" for name, (major, minor) in {"driver": driver, **libraries}.items())
    majors = {major for major, _ in libraries.values()}
    if len(majors) > 1:
        raise RuntimeError(f"{found}: numba-cuda and CuPy do not match, take both from one extra")
    if max(majors) > driver[0]:
        raise RuntimeError(
            f"{found}: the driver is older than the libraries, take the extra of its version or renew it"
        )
    return found


def _kernel() -> str:
    """Launch a kernel twice, since the first launch is Numba's own and later ones are prepared."""
    from numba import cuda

    from common.gpu import CudaRuntime

    @cuda.jit
    def add_kernel(x, amount):
        # x (n,)
        i = cuda.grid(1)
        if i < x.size:
            x[i] += amount

    runtime = CudaRuntime("fp32")
    x = runtime.empty((VALUES,), np.float32)
    start = np.random.default_rng(0).standard_normal(VALUES, np.float32)
    runtime.write(x, start)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        launch = runtime.bind(add_kernel, (1,), (VALUES,))
        for amount in (1, 2):
            launch(x, np.float32(amount))
    _check(runtime.read(x), start + np.float32(1) + np.float32(2))
    slow = [str(warning.message) for warning in caught if "Numba's own" in str(warning.message)]
    return "; ".join(["compiled, launched, right", *slow])


def _product() -> str:
    from common.gpu import CudaRuntime, Operand

    runtime = CudaRuntime("fp32")
    m, n, k = 5, 6, 7
    rng = np.random.default_rng(0)
    hosts = [rng.standard_normal(shape, np.float32) for shape in ((m, k), (k, n), (m, n))]
    buffers = [runtime.empty(host.shape, np.float32) for host in hosts]
    for buffer, host in zip(buffers, hosts, strict=True):
        runtime.write(buffer, host)
    runtime.gemm(m, n, k, *map(Operand, buffers))
    _check(runtime.read(buffers[2]), hosts[0] @ hosts[1])
    return "right"


THOROUGH: dict[str, Callable[[], str]] = {
    "CUDA versions": _versions,
    "a kernel": _kernel,
    "a product by cuBLAS": _product,
}


def _check(found: Any, expected: np.ndarray) -> None:
    if not np.allclose(found, expected, rtol=1e-4, atol=1e-5):
        error = np.abs(found - expected).max()
        raise WrongResultError(f"wrong result, by up to {error:.3g}: the GPU, its driver or a library is at fault")
