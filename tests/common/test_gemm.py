"""The call of cuBLAS, without a GPU: a replacement on the host reads every argument as cuBLAS would."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda has no wheel for this platform")

from common.gpu import CudaRuntime, Operand


def at(address, count):
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


class HostCublas:
    """sgemm and sgemmStridedBatched as cuBLAS defines them, on host memory; alpha and beta are addresses."""

    def sgemm(self, handle, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
        self.sgemmStridedBatched(handle, trans_a, trans_b, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c, ldc, 0, 1)

    def sgemmStridedBatched(  # noqa: N802
        self,
        handle,
        trans_a,
        trans_b,
        m,
        n,
        k,
        alpha,
        a,
        lda,
        stride_a,
        b,
        ldb,
        stride_b,
        beta,
        c,
        ldc,
        stride_c,
        batch,
    ):
        assert all(isinstance(pointer, int) and pointer > 4096 for pointer in (alpha, beta, a, b, c))
        for i in range(batch):

            def matrix(address, leading, stride, rows, columns, i=i):
                return at(address + 4 * i * stride, leading * columns).reshape(columns, leading).T[:rows]

            left = matrix(a, lda, stride_a, *((k, m) if trans_a else (m, k)))
            right = matrix(b, ldb, stride_b, *((n, k) if trans_b else (k, n)))
            out = matrix(c, ldc, stride_c, m, n)
            product = (left.T if trans_a else left) @ (right.T if trans_b else right)
            out[...] = at(alpha, 1)[0] * product + (at(beta, 1)[0] * out if at(beta, 1)[0] else 0)


class Stream:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def buffer(array):
    return SimpleNamespace(array=array, device_ctypes_pointer=ctypes.c_void_p(array.ctypes.data))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_row_major_products(batch, transpose_a, transpose_b, accumulate):
    m, n, k, offset = 4, 5, 6, 7
    rng = np.random.default_rng(0)
    a = rng.standard_normal((k, m) if transpose_a else (m, k)).astype(np.float32)
    b = rng.standard_normal((batch, n, k) if transpose_b else (batch, k, n)).astype(np.float32)
    c = rng.standard_normal((batch, m, n)).astype(np.float32)
    expected = (a.T if transpose_a else a) @ (b.transpose(0, 2, 1) if transpose_b else b) + (c if accumulate else 0)

    runtime = object.__new__(CudaRuntime)
    runtime._cublas, runtime._handle, runtime.stream = HostCublas(), 1, Stream()
    padded = np.concatenate([np.full(offset, np.nan, np.float32), b.ravel()])
    out = buffer(c if accumulate else np.full_like(c, np.nan))
    runtime.gemm(
        m,
        n,
        k,
        Operand(buffer(a), transposed=transpose_a),
        Operand(buffer(padded), offset, n * k, transpose_b),
        Operand(out, 0, m * n),
        batch=batch,
        accumulate=accumulate,
    )
    np.testing.assert_allclose(out.array, expected, rtol=1e-5, atol=1e-5)
