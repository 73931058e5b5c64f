"""Every version on the CPU: against the reference, in training, over shapes drawn at random."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.architecture import Architecture, Stage, autoencoder
from common.backend import from_canonical
from common.errors import UsageError
from common.network import Network, initial_parameters
from common.training import Trainer
from common.verify import convolution_checks, iterate_checks
from tests.training import assert_training_parity
from versions.registry import REGISTRY, find, names

each_version = pytest.mark.parametrize("name", names())


@each_version
def test_verified_at_the_real_shapes(name):
    failures = [check for check in iterate_checks(find(name).load("cpu"), autoencoder()) if not check.passed]
    assert failures == []


@each_version
def test_ten_steps_at_full_width(name):
    assert_training_parity(
        find(name).load("cpu"), autoencoder(), steps=10, batch_size=4, samples=18, learning_rate=0.001
    )


@each_version
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


@each_version
@pytest.mark.parametrize("threads", [1, 2])
def test_any_thread_count(name, threads):
    import numba

    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this machine has one core")
    backend = find(name).load("cpu", threads=threads)
    failures = [check for check in iterate_checks(backend, small=True) if not check.passed]
    assert failures == []


def test_too_many_threads_are_refused():
    with pytest.raises(UsageError, match="choose from 1 to"):
        find("v1").load("cpu", threads=10_000)


@each_version
def test_a_step_allocates_no_buffers(name):
    architecture = autoencoder((16, 16), (24, 16))
    backend = find(name).load("cpu")
    network = Network(backend, architecture, 8, initial_parameters(architecture, 0))
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 16, 16), np.uint8)
    trainer = Trainer(network, images, learning_rate=0.01, seed=0)
    trainer.run_epoch()
    smallest = 4 * min(buffer.size for buffer in network.activations.values())
    tracemalloc.start()
    trainer.run_epoch()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Python's own small objects, nothing the size of even the smallest buffer. NumPy reports its memory to tracemalloc.
    assert peak < smallest


@each_version
def test_kernels_see_float32_only(name):
    backend = find(name).load("cpu")
    architecture = Architecture((Stage("case", 5, 4, 6, 7),))
    backend.prepare(architecture, 2)
    rng = np.random.default_rng(0)
    x = from_canonical(rng.standard_normal((2, 5, 6, 7)).astype(np.float32), backend.layout)
    w = from_canonical(rng.standard_normal((4, 5, 3, 3)).astype(np.float32), backend.layout)
    y = np.empty(from_canonical(np.empty((2, 4, 6, 7), np.float32), backend.layout).shape, np.float32)
    backend.conv2d_forward(x, w, np.zeros(4, np.float32), y, True)
    module = __import__(type(backend).__module__, fromlist=["kernels"])
    compiled = [getattr(module, attribute) for attribute in dir(module) if attribute.endswith("_kernel")]
    assert compiled
    used = [kernel for kernel in compiled if kernel.signatures]
    assert used
    for kernel in used:
        for signature in kernel.signatures:
            assert "float64" not in str(signature)
            assembly = kernel.inspect_asm(signature)
            # Packed double-precision arithmetic would mean that a float32 was widened on the way.
            assert not any(f" v{op}pd" in assembly or f"\t{op}pd" in assembly for op in ("mul", "add", "fmadd231"))


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
