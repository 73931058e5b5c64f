"""The strict simulator itself: it must find the one error in each kernel; the last kernels are correct."""

import numpy as np
import pytest
from numba import cuda

from common.gpu import Operand, SimulatorRuntime
from tests.simulator.arrays import KernelError
from tests.simulator.strict import GUARD_BYTES

pytestmark = pytest.mark.simulator
THREADS = 4


@cuda.jit
def writes_past_the_end_kernel(x):
    x[cuda.grid(1) + 1] = np.float32(1)


@cuda.jit
def reads_before_the_start_kernel(x):
    i = cuda.grid(1)
    x[i] = x[i - 1] if i == 0 else np.float32(0)


@cuda.jit
def wraps_an_inner_axis_kernel(x):
    i = cuda.grid(1)
    x[0, i - 2, 0] = np.float32(1)


@cuda.jit
def stores_a_row_kernel(x):
    if cuda.grid(1) == 0:
        x[0] = np.float32(1)


@cuda.jit
def shared_past_the_end_kernel(x):
    tile = cuda.shared.array((2, THREADS), np.float32)
    t = cuda.threadIdx.x
    tile[t // 3, t + 1] = x[t]


@cuda.jit
def shared_negative_kernel(x):
    tile = cuda.shared.array(THREADS, np.float32)
    t = cuda.threadIdx.x
    tile[t] = x[t]
    cuda.syncthreads()
    x[t] = tile[t - 1]


@cuda.jit
def local_negative_kernel(x):
    kept = cuda.local.array((2, 2), np.float32)
    t = cuda.threadIdx.x
    kept[1 - t, 0] = x[t]


@cuda.jit
def local_unwritten_kernel(x):
    kept = cuda.local.array(2, np.float32)
    t = cuda.threadIdx.x
    kept[0] += x[t]


@cuda.jit
def shared_unwritten_kernel(x):
    tile = cuda.shared.array(THREADS, np.float32)
    t = cuda.threadIdx.x
    # The first block stores values; the second must not rely on them.
    if cuda.blockIdx.x == 0:
        tile[t] = x[t]
    cuda.syncthreads()
    x[t + THREADS * cuda.blockIdx.x] = tile[t]


@cuda.jit
def barrier_after_return_kernel(x):
    t = cuda.threadIdx.x
    if t == 3:
        return
    cuda.syncthreads()
    x[t] = np.float32(1)


@cuda.jit
def barrier_in_a_branch_kernel(x):
    t = cuda.threadIdx.x
    for _ in range(2):
        if t % 2 == 0:
            cuda.syncthreads()
        else:
            cuda.syncthreads()
    x[t] = np.float32(1)


@cuda.jit
def one_barrier_fewer_kernel(x):
    t = cuda.threadIdx.x
    for _ in range(2 + t // 2):
        cuda.syncthreads()
    x[t] = np.float32(1)


@cuda.jit
def reads_too_early_kernel(x):
    tile = cuda.shared.array(THREADS, np.float32)
    t = cuda.threadIdx.x
    tile[t] = x[t]
    x[t] = tile[t - 1 if t > 0 else 0]


@cuda.jit
def writes_too_early_kernel(x):
    # No barrier between the reads of one round and the writes of the next.
    tile = cuda.shared.array(THREADS, np.float32)
    t = cuda.threadIdx.x
    total = np.float32(0)
    for _ in range(2):
        tile[t] = x[t]
        cuda.syncthreads()
        total += tile[(t + 1) % THREADS]
    x[t] = total


@cuda.jit
def two_writers_kernel(x):
    tile = cuda.shared.array(THREADS, np.float32)
    t = cuda.threadIdx.x
    tile[t // 2] = np.float32(1)


@cuda.jit
def two_global_writers_kernel(x):
    x[cuda.grid(1) // 2] = np.float32(1)


@cuda.jit
def reads_another_blocks_result_kernel(x):
    i = cuda.grid(1)
    value = x[(i + THREADS) % (2 * THREADS)]
    cuda.syncthreads()
    x[i] = value


@cuda.jit
def shifts_in_place_kernel(x):
    i = cuda.grid(1)
    x[i] = x[i + 1 if i + 1 < x.size else i]


FAULTS = {
    writes_past_the_end_kernel: r"index 8 of global array x of shape \(8,\)",
    reads_before_the_start_kernel: r"thread \(0, 0, 0\) of block \(0, 0, 0\): index -1 of global array x of shape \(8,",
    shared_past_the_end_kernel: r"index \(1, 4\) of a shared array of shape \(2, 4\)",
    shared_negative_kernel: r"index -1 of a shared array of shape \(4,\)",
    local_negative_kernel: r"index \(-1, 0\) of a local array of shape \(2, 2\)",
    local_unwritten_kernel: r"element 0 of a local array of shape \(2,\), which no thread wrote",
    shared_unwritten_kernel: r"block \(1, 0, 0\): reads element 0 of a shared array .* which no thread wrote",
    barrier_after_return_kernel: r"do not meet at one barrier: 3 at line \d+ .*, 1 have returned \(\(3, 0, 0\)\)",
    barrier_in_a_branch_kernel: r"do not meet at one barrier: 2 at line \d+ .*, 2 at line \d+",
    one_barrier_fewer_kernel: r"do not meet at one barrier: 2 at line \d+ .*, 2 have returned",
    reads_too_early_kernel: r"a race: reads element 0 of a shared array .* thread \(0, 0, 0\) of block .* wrote",
    writes_too_early_kernel: r"a race: writes element \d of a shared array .* read with no barrier",
    two_writers_kernel: r"a race: writes element 0 of a shared array .* thread \(0, 0, 0\) of block .* wrote",
    two_global_writers_kernel: r"a race: writes element 0 of global array x .* wrote",
    reads_another_blocks_result_kernel: r"a race: reads element 0 of global array x .* of block \(0, 0, 0\) wrote",
    shifts_in_place_kernel: r"a race: writes element 1 of global array x .* read with no barrier",
}


def buffer(shape, dtype=np.float32):
    runtime = SimulatorRuntime()
    made = runtime.empty(shape, dtype)
    runtime.write(made, np.arange(made.size, dtype=dtype).reshape(shape))
    return made


@pytest.mark.parametrize("kernel", FAULTS, ids=lambda kernel: kernel.__name__)
def test_a_wrong_kernel_is_caught(kernel):
    with pytest.raises(KernelError, match=FAULTS[kernel]) as fault:
        kernel[2, THREADS](buffer((8,)))
    assert str(fault.value).startswith(kernel.__name__)


def test_every_axis_is_checked():
    with pytest.raises(KernelError, match=r"index \(0, -2, 0\) of global array x of shape \(2, 3, 4\)"):
        wraps_an_inner_axis_kernel[1, 1](buffer((2, 3, 4)))
    with pytest.raises(KernelError, match=r"index 0 of global array x of shape \(2, 3\)"):
        stores_a_row_kernel[1, 1](buffer((2, 3)))


def test_the_limit_is_the_view_and_not_the_buffer():
    whole = buffer((16,))
    writes_past_the_end_kernel[2, THREADS](whole)
    with pytest.raises(KernelError, match=r"index 8 of global array x of shape \(8,\)"):
        writes_past_the_end_kernel[2, THREADS](whole[:8])


@cuda.jit
def copies_kernel(x, y):
    i = cuda.grid(1)
    y[i] = x[i]


def test_overlapping_arguments_are_refused_unless_equal():
    memory = SimulatorRuntime().empty((2 * THREADS,), np.float32)
    with pytest.raises(KernelError, match="arguments x and y overlap"):
        copies_kernel[1, THREADS](memory[1 : THREADS + 1], memory[:THREADS])
    copies_kernel[1, THREADS](memory[:THREADS], memory[:THREADS])
    copies_kernel[1, THREADS](memory[THREADS:], memory[:THREADS])


def test_numpy_arrays_are_refused():
    with pytest.raises(KernelError, match="argument x is a NumPy array"):
        two_global_writers_kernel[1, 1](np.zeros(4, np.float32))


@cuda.jit
def does_nothing_kernel(x):
    pass


@pytest.mark.parametrize(("place", "where"), [(-1, "before"), (0, "past the end of")])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_guard_zones(guards, place, where, dtype):
    made = guards.empty((3, 5), dtype)
    does_nothing_kernel[1, 1](made)
    size = 15 * np.dtype(dtype).itemsize
    memory = made._ary.base  # only an error in the simulator could reach it through the array
    memory[GUARD_BYTES + (place if place < 0 else size)] ^= 1
    with pytest.raises(KernelError, match=rf"does_nothing_kernel: wrote {where} the \w+ buffer of shape \(3, 5\)"):
        does_nothing_kernel[1, 1](buffer((1,)))


def test_buffers_start_as_nan():
    assert np.isnan(SimulatorRuntime().empty((7, 3), np.float32).copy_to_host()).all()


def test_gemm_operands_stay_inside():
    runtime = SimulatorRuntime()
    a, b, c = buffer((2, 3)), buffer((3, 4)), buffer((2, 4))
    runtime.gemm(2, 4, 3, Operand(a), Operand(b), Operand(c))
    np.testing.assert_array_equal(c.copy_to_host(), a.copy_to_host() @ b.copy_to_host())
    with pytest.raises(KernelError, match=r"operand b takes elements 1 to 13 of a buffer of shape \(3, 4\)"):
        runtime.gemm(2, 4, 3, Operand(a), Operand(b, 1), Operand(c))
    with pytest.raises(KernelError, match="operand a takes elements -3 to 3"):
        runtime.gemm(2, 4, 3, Operand(a, -3), Operand(b), Operand(c))


def test_gemv_operands_stay_inside():
    runtime = SimulatorRuntime()
    a, x, y = buffer((2, 3)), buffer((4,)), buffer((5,))
    host, vector = a.copy_to_host(), x.copy_to_host()
    runtime.gemv(2, 3, Operand(a), Operand(x, 1), Operand(y, 2))
    np.testing.assert_array_equal(y.copy_to_host()[2:4], host @ vector[1:])
    runtime.gemv(3, 2, Operand(a, transposed=True), Operand(x), Operand(y))
    np.testing.assert_array_equal(y.copy_to_host()[:3], host.T @ vector[:2])
    with pytest.raises(KernelError, match="operand c takes elements 4 to 6"):
        runtime.gemv(2, 3, Operand(a), Operand(x), Operand(y, 4))


@cuda.jit
def divides_by_zero_kernel(x):
    # Some threads wait at the barrier when another one fails.
    if cuda.threadIdx.x == 2:
        x[0] = 1 // (cuda.blockIdx.x - 1)
    cuda.syncthreads()


def test_other_exceptions_name_the_thread():
    with pytest.raises(ZeroDivisionError) as fault:
        divides_by_zero_kernel[2, THREADS](buffer((8,)))
    assert fault.value.__notes__ == ["in divides_by_zero_kernel, thread (2, 0, 0) of block (1, 0, 0)"]
    test_a_correct_kernel_passes(1)


@cuda.jit(device=True)
def mirrored(tile, t):
    cuda.syncthreads()
    return tile[cuda.blockDim.x - 1 - t]


@cuda.jit
def reverses_kernel(x, rounds):
    # Each block reverses its values `rounds` times; uses shared, local and global memory, and barriers.
    tile = cuda.shared.array(THREADS, np.float32)
    kept = cuda.local.array(1, np.float32)
    t = cuda.threadIdx.x
    for _ in range(rounds):
        tile[t] = x[cuda.grid(1)]
        kept[0] = mirrored(tile, t)
        # The next round overwrites values that another thread may not have read yet.
        cuda.syncthreads()
        x[cuda.grid(1)] = kept[0]


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_correct_kernel_passes(rounds):
    for _ in range(2):  # forwards and in reverse order
        made = buffer((3 * THREADS,))
        reverses_kernel[3, THREADS](made, rounds)
        rows = np.arange(3 * THREADS).reshape(3, THREADS)
        np.testing.assert_array_equal(made.copy_to_host().reshape(rows.shape), rows[:, ::-1] if rounds % 2 else rows)


@cuda.jit
def where_kernel(x):
    across, down = cuda.grid(2)
    x[down, across, 0] = cuda.blockIdx.z
    x[down, across, 1] = cuda.gridDim.y * cuda.blockDim.x
    x[down, across, 2] = cuda.laneid


def test_indices_of_threads_and_blocks():
    made = buffer((6, 4, 3), np.int32)
    where_kernel[(2, 3), (2, 2)](made)
    host = made.copy_to_host()
    assert (host[..., 0] == 0).all()
    assert (host[..., 1] == 6).all()
    np.testing.assert_array_equal(host[:2, :2, 2], [[0, 1], [2, 3]])


def test_launches_work_after_a_failed_block():
    with pytest.raises(KernelError):
        barrier_after_return_kernel[1, THREADS](buffer((8,)))
    test_a_correct_kernel_passes(1)
