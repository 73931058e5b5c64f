"""Single launches through the real runtime: what is prepared, what is compiled anew, and what Numba has to launch."""

import gc

import numpy as np
import pytest
from numba import cuda

from common import gpu_launch
from common.gpu import CudaRuntime, Operand
from tests.stub.driver import Driver
from tests.stub.watching import packed


def scale_kernel(x, factor, y):
    i = cuda.grid(1)
    if i < y.size:
        y[i] = factor * x[i]


@cuda.jit
def scale_by_two_kernel(x, factors, y):
    i = cuda.grid(1)
    if i < y.size:
        y[i] = factors[0] * factors[1] * x[i]


@pytest.fixture
def runtime():
    return CudaRuntime("fp32")


@pytest.fixture
def x(runtime):
    return runtime.empty((300,), np.float32)


@pytest.fixture
def driver():
    found = Driver()
    found.forget()
    return found


@pytest.fixture
def launcher(runtime):
    """Of a kernel that is not compiled yet."""
    return runtime.bind(cuda.jit(scale_kernel), (2,), (256,))


def test_the_host_memory_of_the_stub_is_read_as_written(runtime, x):
    values = np.arange(300, dtype=np.float32)
    runtime.write(x, values)
    np.testing.assert_array_equal(runtime.read(x), values)


def test_scalars_may_change_and_another_type_is_compiled_anew(launcher, x, driver):
    loaded = driver.libraries()
    # Each factor with the number of compiled variants so far. Numba widens a truth value by itself.
    factors = {3: 1, -4: 1, 2**40: 1, np.float32(0.5): 2, np.float32(-1.5): 2, 5: 2, 0.25: 3, 6: 3}
    for factor, variants in factors.items():
        launcher(x, factor, x)
        assert driver.libraries() - loaded == variants, factor
        last = driver.launches()[-1]
        assert (last.sizes, last.values) == packed((x, factor, x)), factor
    assert len(driver.launches()) == len(factors)
    for truth in (True, False, True):
        launcher(x, truth, x)
        assert driver.launches()[-1].values == packed((x, int(truth), x))[1]


def test_an_integer_beyond_64_bits_with_sign_is_left_to_numba_also_in_a_replay(runtime, launcher, x, driver):
    launcher(x, 1, x)
    calls = runtime.record(lambda: launcher(x, 2**64 - 1, x))
    runtime.replay(calls)
    # Numba packs -1: the same bits.
    assert [launch.values for launch in driver.launches()[1:]] == [packed((x, 2**64 - 1, x))[1]] * 2
    assert len(launcher._prepared) == 1


def test_a_recording_keeps_each_launch_with_its_own_scalars(runtime, launcher, x, driver):
    def work():
        for factor in (1, 2, 3):
            launcher(x, factor, x)

    calls = runtime.record(work)
    launcher(x, 9, x)
    driver.forget()
    runtime.replay(calls)
    assert [launch.values for launch in driver.launches()] == [packed((x, factor, x))[1] for factor in (1, 2, 3)]
    assert all(launch.stream == runtime.stream.ptr for launch in driver.launches())


def test_views_of_one_memory_are_told_apart(runtime, launcher, driver):
    memory = runtime.empty((600,), np.float32)
    halves = memory[:300], memory[300:]
    for _ in range(2):
        for half in halves:
            launcher(half, 1, memory)
    launched = [launch.values for launch in driver.launches()]
    assert launched == [packed((half, 1, memory))[1] for half in halves] * 2


def test_what_was_prepared_goes_with_its_array(runtime, launcher, x):
    y = runtime.empty((300,), np.float32)
    launcher(x, 1, y)
    launcher(x, 1, x)
    assert len(launcher._prepared) == 2
    del y
    gc.collect()
    assert len(launcher._prepared) == 1


def test_a_recording_keeps_its_arrays(runtime, launcher, x, driver):
    y = runtime.empty((300,), np.float32)
    expected = packed((x, 1, y))[1]

    def record(out):
        return runtime.record(lambda: launcher(x, 1, out))

    calls = record(y)
    del y
    others = [runtime.empty((300,), np.float32) for _ in range(3)]
    runtime.replay(calls)
    assert driver.launches()[-1].values == expected
    assert len(launcher._prepared) == 1
    assert others


def test_what_cannot_be_prepared_is_launched_by_numba_each_time(runtime, x, driver):
    launcher = runtime.bind(scale_by_two_kernel, (2,), (256,))

    def work():
        launcher(x, (2, 3), x)

    runtime.replay(runtime.record(work))
    work()
    assert [launch.values[7:9] for launch in driver.launches()] == [(2, 3)] * 3
    assert len(launcher._prepared) == 0


def test_an_error_of_the_driver_names_the_kernel(runtime, launcher, x, driver):
    calls = runtime.record(lambda: launcher(x, 1, x))
    driver.refuse(700)
    try:
        for launch in (lambda: launcher(x, 1, x), lambda: runtime.replay(calls)):
            with pytest.raises(RuntimeError, match=r"did not launch .*scale_kernel.*: CUDA_ERROR_ILLEGAL_ADDRESS"):
                launch()
    finally:
        driver.refuse(0)


@pytest.mark.parametrize("error", [AttributeError, ImportError, ValueError], ids=lambda error: error.__name__)
def test_without_numbas_packing_launches_are_numbas_own_and_a_warning_says_so(
    runtime, launcher, x, driver, monkeypatch, error
):
    def moved(*arguments):
        raise error("'_Kernel' object has no attribute '_prepare_args'")

    monkeypatch.setattr(gpu_launch, "pack", moved)
    said = r"numba-cuda [\d.]+: '_Kernel' object has no attribute '_prepare_args', so launches are Numba's own"
    with pytest.warns(RuntimeWarning, match=said):
        calls = runtime.record(lambda: launcher(x, 1, x))
    with pytest.warns(RuntimeWarning, match=said):
        launcher(x, 2, x)
    runtime.replay(calls)
    assert [launch.values for launch in driver.launches()] == [packed((x, f, x))[1] for f in (1, 2, 1)]


def test_without_callbacks_launches_are_numbas_own_and_a_warning_says_so(launcher, x, driver):
    configured = launcher._configured
    launcher._configured = lambda *arguments: configured(*arguments)
    with pytest.warns(RuntimeWarning, match="no kernel came to pre_launch_callbacks"):
        launcher(x, 1, x)
    assert [launch.values for launch in driver.launches()] == [packed((x, 1, x))[1]]


def test_a_product_and_a_vector_run_on_the_runtimes_stream(runtime, x):
    from cupy.cuda import cublas

    cublas.products.clear()
    runtime.gemm(10, 20, 15, Operand(x), Operand(x), Operand(x, 100), accumulate=True)
    runtime.gemv(10, 20, Operand(x, 3), Operand(x), Operand(x, 200))
    product, vector = cublas.products
    start = x.device_ctypes_pointer.value
    assert product.arguments == (0, 0, 20, 10, 15, start, 20, start, 15, start + 400, 20)
    assert vector.arguments == (1, 20, 10, start + 12, 20, start, 1, start + 800, 1)
    assert (product.alpha, product.beta, vector.alpha, vector.beta) == (1, 1, 1, 0)
    assert product.stream == vector.stream == runtime.stream.ptr
