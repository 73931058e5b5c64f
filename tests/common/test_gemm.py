"""The call of cuBLAS, without a GPU: a replacement on the host reads every argument as cuBLAS would."""

import ctypes
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda has no wheel for this platform")

from common.gpu import CudaRuntime, Operand, SimulatorRuntime
from common.gpu_launch import IdentityCache, Tape


def at(address, count):
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


class HostCublas:
    """sgemm, sgemmStridedBatched and sgemv as cuBLAS defines them, on host memory; alpha and beta are addresses."""

    def sgemv(self, handle, trans, m, n, alpha, a, lda, x, incx, beta, y, incy):
        assert at(beta, 1)[0] == 0
        matrix = at(a, lda * n).reshape(n, lda).T[:m]
        rows, columns = (n, m) if trans else (m, n)
        left = matrix.T if trans else matrix
        at(y, rows * incy)[::incy] = at(alpha, 1)[0] * (left @ at(x, columns * incx)[::incx])

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


class Buffer:
    def __init__(self, array):
        self.array = array
        self.device_ctypes_pointer = ctypes.c_void_p(array.ctypes.data)


class HostArray:
    """As much of a simulated device array as a product of SimulatorRuntime needs."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def copy_to_host(self):
        return self.array.copy()

    def copy_to_device(self, array):
        self.array[...] = array


@pytest.fixture
def runtime():
    made = object.__new__(CudaRuntime)
    made._cublas, made._handle, made.stream = HostCublas(), 1, Stream()
    made._tape, made._products = Tape(), IdentityCache()
    return made


def in_the_middle(array, offset):
    """A buffer in which ``array`` starts at ``offset``, after NaNs."""
    return Operand(Buffer(np.concatenate([np.full(offset, np.nan, np.float32), array.ravel()])), offset)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_row_major_products(runtime, batch, transpose_a, transpose_b, accumulate):
    m, n, k = 4, 5, 6
    rng = np.random.default_rng(0)
    a = rng.standard_normal((k, m) if transpose_a else (m, k)).astype(np.float32)
    b = rng.standard_normal((batch, n, k) if transpose_b else (batch, k, n)).astype(np.float32)
    c = rng.standard_normal((batch, m, n)).astype(np.float32)
    expected = (a.T if transpose_a else a) @ (b.transpose(0, 2, 1) if transpose_b else b) + (c if accumulate else 0)

    out = Buffer(c if accumulate else np.full_like(c, np.nan))
    b = replace(in_the_middle(b, 7), stride=n * k, transposed=transpose_b)
    a = Operand(Buffer(a), transposed=transpose_a)
    runtime.gemm(m, n, k, a, b, Operand(out, 0, m * n), batch=batch, accumulate=accumulate)
    np.testing.assert_allclose(out.array, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_that_do_not_lie_together(runtime, transposed):
    """Each of a batch takes some columns of wider matrices, and fills some of another."""
    m, n, k, batch = 4, 5, 3, 2
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal((rows, 16)).astype(np.float32) for rows in ((k if transposed else m), k, m))
    shape = (k, m) if transposed else (m, k)
    for made in (runtime, SimulatorRuntime()):
        out = np.full_like(c, np.nan)
        buffers = [Buffer(a), Buffer(b), Buffer(out)]
        if made is not runtime:
            buffers = [HostArray(each.array) for each in buffers]
        operands = [Operand(each, 1, 7, row=16) for each in buffers]
        made.gemm(m, n, k, replace(operands[0], transposed=transposed), *operands[1:], batch=batch)
        for first in (1, 8):
            left = a[:, first : first + shape[1]]
            expected = (left.T if transposed else left) @ b[:, first : first + n]
            np.testing.assert_allclose(out[:, first : first + n], expected, rtol=1e-5, atol=1e-5)
        assert np.isnan(out[:, [0, 6, 7, 13, 14, 15]]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_row_major_matrix_and_vector(runtime, transposed):
    m, n = 4, 7
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n, m) if transposed else (m, n)).astype(np.float32)
    x = rng.standard_normal(n).astype(np.float32)
    y = np.full(2 + m + 1, np.nan, np.float32)
    matrix = replace(in_the_middle(a, 3), transposed=transposed)
    runtime.gemv(m, n, matrix, in_the_middle(x, 5), Operand(Buffer(y), 2))
    np.testing.assert_allclose(y[2:-1], (a.T if transposed else a) @ x, rtol=1e-5, atol=1e-5)
    assert np.isnan(y[[0, 1, -1]]).all()


def test_each_distinct_product_is_prepared_once_and_goes_with_its_buffers(runtime):
    square, other, out = (Buffer(np.ones((2, 2), np.float32)) for _ in range(3))
    for _ in range(2):
        runtime.gemm(2, 2, 2, Operand(square), Operand(square), Operand(out))
        runtime.gemm(2, 2, 2, Operand(square, transposed=True), Operand(square), Operand(out), accumulate=True)
        runtime.gemm(2, 2, 2, Operand(other), Operand(square), Operand(out))
    assert len(runtime._products) == 3
    assert (out.array == 2).all()
    del other
    assert len(runtime._products) == 2


def test_a_recorded_product_is_repeated_and_keeps_its_buffers(runtime):
    a, out = Buffer(np.full((2, 2), 3, np.float32)), np.zeros((2, 2), np.float32)
    calls = runtime.record(partial(runtime.gemm, 2, 2, 2, Operand(a), Operand(a), Operand(Buffer(out))))
    assert (out == 18).all()
    alive = weakref.ref(a)
    del a
    out[:] = 0
    runtime.replay(calls)
    assert (out == 18).all()
    assert alive() is not None
    del calls
    assert alive() is None
    assert runtime._products == {}


def test_what_cannot_be_replayed_is_refused(runtime):
    with pytest.raises(RuntimeError, match="read while launches are recorded"):
        runtime.record(lambda: runtime.read(None))
    with pytest.raises(RuntimeError, match="write while launches are recorded"):
        runtime.record(lambda: runtime.write(None, np.zeros(1)))
    with pytest.raises(RuntimeError, match="already under way"):
        runtime.record(lambda: runtime.record(lambda: None))
    assert runtime.record(lambda: None) == []
