"""BLAS's sgemm inside Numba loops, through the function pointer that SciPy exports; see ``CpuBackend`` for threads."""

import ctypes

import numpy as np
from numba import njit
from numba.extending import get_cython_function_address

_sgemm = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)(
    get_cython_function_address("scipy.linalg.cython_blas", "sgemm")
)
NO, YES = ord("N"), ord("T")


@njit
def gemm(m, n, k, a, lda, transpose_a, b, ldb, transpose_b, c, ldc, accumulate):
    """c (m, n) = op(a) . op(b), added to c if ``accumulate``; row-major, each with the length of its stored rows.

    The arrays only say where their matrix begins. BLAS takes every argument by address and is column-major: it sees a
    row-major matrix as its transpose, and c^T = op(b)^T . op(a)^T. So b goes first, and m and n are exchanged.
    """
    letters = np.empty(2, np.uint8)
    letters[0] = YES if transpose_b else NO
    letters[1] = YES if transpose_a else NO
    integers = np.empty(6, np.int32)
    integers[0], integers[1], integers[2], integers[3], integers[4], integers[5] = n, m, k, ldb, lda, ldc
    scalars = np.empty(2, np.float32)
    scalars[0] = 1
    scalars[1] = 1 if accumulate else 0
    _sgemm(
        letters.ctypes,
        letters[1:].ctypes,
        integers.ctypes,
        integers[1:].ctypes,
        integers[2:].ctypes,
        scalars.ctypes,
        b.ctypes,
        integers[3:].ctypes,
        a.ctypes,
        integers[4:].ctypes,
        scalars[1:].ctypes,
        c.ctypes,
        integers[5:].ctypes,
    )
