"""As much of CuPy as the GPU versions and ``convbench doctor`` use, with memory on the host and no arithmetic."""

import numpy as np

from . import cuda

__version__ = "0.0 (stub)"


class ndarray:  # noqa: N801
    """An array that Numba takes for a device array."""

    def __init__(self, host):
        self._host = host
        self.nbytes = host.nbytes

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self._host.shape,
            "typestr": self._host.dtype.str,
            "data": (self._host.ctypes.data, False),
            "strides": None,
            "stream": cuda.get_current_stream().ptr or 1,
            "version": 3,
        }

    def sum(self):
        return self._host.sum()


def empty(shape, dtype=np.float64):
    return ndarray(np.empty(shape, dtype))


def zeros(shape, dtype=np.float64):
    return ndarray(np.zeros(shape, dtype))
