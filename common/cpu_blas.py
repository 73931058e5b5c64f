"""BLAS's sgemm inside Numba loops, through the function pointer that SciPy exports; see ``CpuBackend`` for threads."""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import get_cython_function_address, intrinsic

# Loads BLAS. That comes before a backend is made, which limits the threads of every BLAS that is loaded.
SGEMM = get_cython_function_address("scipy.linalg.cython_blas", "sgemm")
NO, YES = ord("N"), ord("T")


@intrinsic
def _sgemm(typing_context, first, second, n, m, k, b, ldb, a, lda, beta, c, ldc):
    """Call BLAS, which takes every argument by address: each gets a place on the stack."""
    integer, letter, address = types.int32, types.uint8, types.uintp
    signature = types.void(
        letter, letter, integer, integer, integer, address, integer, address, integer, types.float32, address, integer
    )

    def generate(context, builder, signature, arguments):
        pointer = ir.IntType(8).as_pointer()

        def placed(value):
            return builder.bitcast(cgutils.alloca_once_value(builder, value), pointer)

        first, second, n, m, k, b, ldb, a, lda, beta, c, ldc = arguments
        alpha = ir.Constant(ir.FloatType(), 1.0)
        b, a, c = (builder.inttoptr(value, pointer) for value in (b, a, c))
        places = [placed(value) for value in (first, second, n, m, k, alpha)]
        places += [b, placed(ldb), a, placed(lda), placed(beta), c, placed(ldc)]
        function = ir.FunctionType(ir.VoidType(), [pointer] * 13)
        sgemm = ir.Constant(ir.IntType(64), SGEMM)
        builder.call(builder.inttoptr(sgemm, function.as_pointer()), places)
        return context.get_dummy_value()

    return signature, generate


@njit
def gemm(m, n, k, a, lda, transpose_a, b, ldb, transpose_b, c, ldc, accumulate):
    """c (m, n) = op(a) . op(b), added to c if ``accumulate``; row-major, each with the length of its stored rows.

    The arrays only say where their matrix begins. BLAS is column-major: it sees a row-major matrix as its transpose,
    and c^T = op(b)^T . op(a)^T. So b goes first, and m and n are exchanged.
    """
    first, second = YES if transpose_b else NO, YES if transpose_a else NO
    beta = 1 if accumulate else 0
    _sgemm(first, second, n, m, k, b.ctypes.data, ldb, a.ctypes.data, lda, beta, c.ctypes.data, ldc)
