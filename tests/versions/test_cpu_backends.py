"""Every version on the CPU: against the reference, in training, and on random shapes."""

import re
import sys
import tracemalloc

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import cpu_kernels
from common.architecture import autoencoder
from common.errors import UsageError
from common.network import Network, initial_parameters
from common.training import Trainer
from common.verify import convolution_checks, verify
from tests.support.parity import assert_training_parity
from versions.registry import REGISTRY, find, names

each_version = pytest.mark.parametrize("name", names())
with_operations = pytest.mark.parametrize("name", [info.name for info in REGISTRY if not info.whole_stages])


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 5, 7), (64, 3, 32, 32)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64])
def test_buffers_are_aligned_to_cache_lines(shape, dtype):
    backend = find("v1").load("cpu")
    for _ in range(5):
        buffer = backend.empty(shape, dtype)
        assert (buffer.shape, buffer.dtype) == (shape, dtype)
        assert buffer.flags.c_contiguous
        assert buffer.flags.writeable
        assert buffer.ctypes.data % 64 == 0 or buffer.size == 0
    assert backend.upload(np.full(shape, 7, dtype)).tolist() == np.full(shape, 7, dtype).tolist()


@each_version
def test_verified_at_the_real_shapes(name):
    checks = verify(find(name).load("cpu"), autoencoder(), batch_sizes=(64, 16))
    failures = [check for check in checks if not check.passed]
    assert failures == []


@each_version
def test_ten_steps_at_full_width(name):
    assert_training_parity(
        find(name).load("cpu"), autoencoder(), steps=10, batch_size=4, samples=18, learning_rate=0.001
    )


@with_operations
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 9),
    k=st.integers(1, 9),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
)
def test_any_shape(name, n, c, k, height, width):
    backend = _loaded(name)
    rng = np.random.default_rng([n, c, k, height, width])
    failures = [check for check in convolution_checks(backend, (n, c, k, height, width), rng) if not check.passed]
    assert failures == []


@with_operations
@pytest.mark.parametrize("shape", [(2, 131, 3, 3, 5), (1, 5, 130, 9, 2), (2, 129, 6, 2, 18)])
def test_more_channels_than_a_block(name, shape):
    """Hypothesis draws small sizes; here there are more channels or filters than a block has, and a remainder."""
    checks = convolution_checks(_loaded(name), shape, np.random.default_rng(7))
    assert [check for check in checks if not check.passed] == []


@each_version
@pytest.mark.parametrize("threads", [1, 2])
def test_any_thread_count(name, threads):
    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this machine has one core")
    backend = find(name).load("cpu", threads=threads)
    failures = [check for check in verify(backend, small=True) if not check.passed]
    assert failures == []


def test_too_many_threads_are_refused():
    with pytest.raises(UsageError, match="choose from 1 to"):
        find("v1").load("cpu", threads=10_000)


@each_version
def test_a_step_allocates_nothing(name):
    architecture = autoencoder((16, 16), (24, 16))
    backend = find(name).load("cpu")
    network = Network(backend, architecture, 8, initial_parameters(architecture, 0))
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), np.uint8)
    trainer = Trainer(network, images, learning_rate=0.01, seed=0)
    trainer.run_epoch()
    tracemalloc.start()
    trainer.run_epoch()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Python's own small objects and the random generator; the smallest buffer of the network has 24 KB.
    assert peak < 20_000
    # Python does not see what compiled code allocates, so no compiled function may call the allocator.
    for function in compiled_functions(backend):
        for signature in function.signatures:
            assert not ALLOCATION.search(function.inspect_llvm(signature)), function


def compiled_functions(backend):
    """Every function that Numba has compiled for a backend and for the operations it shares."""
    modules = (sys.modules[type(backend).__module__], cpu_kernels)
    functions = [value for module in modules for value in vars(module).values() if hasattr(value, "inspect_asm")]
    used = [function for function in functions if function.signatures]
    assert len(used) >= 10
    return used


ALLOCATION = re.compile(r"call [^\n]*@NRT_(MemInfo_alloc|MemInfo_new_varsize|Allocate)")


def test_an_allocation_is_detected():
    @numba.njit
    def careless(x):
        return (x + np.ones(x.size)).sum()

    careless(np.zeros(4))
    assert ALLOCATION.search(careless.inspect_llvm(careless.signatures[0]))


# Arithmetic in double precision, packed or scalar; conversions at the boundary to Python are not arithmetic.
DOUBLE = re.compile(r"\tv?(add|sub|mul|div|fn?m(add|sub)\d+)[ps]d\b")


@each_version
def test_kernels_compute_in_float32_only(name):
    backend = find(name).load("cpu")
    architecture = autoencoder((4, 4), (3, 2))
    network = Network(backend, architecture, 2, initial_parameters(architecture, 0))
    images = np.zeros((2, 3, 4, 4), np.uint8)
    Trainer(network, images, learning_rate=0.01, seed=0).run_epoch()
    for function in compiled_functions(backend):
        for signature in function.signatures:
            assert "float64" not in str(signature), function
            assert not DOUBLE.search(function.inspect_asm(signature)), function


def test_double_precision_is_detected():
    @numba.njit
    def careless(x):
        for i in range(x.size):
            x[i] = x[i] * 1.5 + 0.1

    careless(np.zeros(4, np.float32))
    assert DOUBLE.search(careless.inspect_asm(careless.signatures[0]))


def test_every_version_sees_the_same_batches():
    order = {}
    for info in REGISTRY:
        backend = info.load("cpu")
        architecture = autoencoder((4, 4), (2, 2))
        network = Network(backend, architecture, 3, initial_parameters(architecture, 0))
        images = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4), np.uint8)
        trainer = Trainer(network, images, learning_rate=0.01, seed=11)
        seen = []
        gather = backend.gather_batch
        backend.gather_batch = lambda images, order, start, x, gather=gather, seen=seen: (
            seen.append(order[start : start + len(x)].tolist()),
            gather(images, order, start, x),
        )
        trainer.run_epoch()
        trainer.run_epoch()
        order[info.name] = seen
    first = next(iter(order.values()))
    assert all(seen == first for seen in order.values())
    assert [len(batch) for batch in first] == [3, 3, 1, 3, 3, 1]
    assert sorted(picture for batch in first[:3] for picture in batch) == list(range(7))
    assert first[:3] != first[3:]


def test_the_epoch_loss_counts_pictures_not_batches():
    architecture = autoencoder((4, 4), (2, 2))
    network = Network(find("v1").load("cpu"), architecture, 3, initial_parameters(architecture, 0))
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 4, 4), np.uint8)
    trainer = Trainer(network, images, learning_rate=1e-9, seed=0)
    trainer.run_epoch()
    three, one = trainer.read_losses()
    assert trainer.read_epoch_loss() == pytest.approx((3 * three + one) / 4)


_backends = {}


def _loaded(name):
    if name not in _backends:
        _backends[name] = find(name).load("cpu")
    return _backends[name]
