"""Training steps of every version through the real runtime: what reaches the driver and cuBLAS.

Numba's typing, compiler, linker and launch are real here; the driver, CuPy and cuBLAS only record. So nothing is
computed, and these tests are about arguments, not results.
"""

from dataclasses import replace

import numpy as np
import pytest

from bench.kernels.launches import RecordingRuntime, gpu_module
from bench.machine.timers import Timer
from bench.measure.layer_clock import Stopwatch
from common.architecture import autoencoder
from common.network import Network, initial_parameters
from tests.stub.driver import Driver
from tests.stub.watching import BATCH_SIZE, LAST, Training, in_three, packed, with_room
from versions.registry import find, names

OUTSIDE = ("gather", "mse", "sgd")
"""Kernels of a step that are not part of forward and backward: their scalars change."""


@pytest.fixture(scope="module", params=names())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def training(name):
    return Training(name)


@pytest.fixture(scope="module")
def first(training):
    """The first step: Numba compiles, and launches itself."""
    return with_room(training.step)


@pytest.fixture(scope="module")
def libraries(first):
    """How much code was loaded when the first step had been taken."""
    return Driver().libraries()


def assert_as_given(seen, runtime):
    assert len(seen.launched) == len(seen.given) > 10
    for launched, given in zip(seen.launched, seen.given, strict=True):
        function = given.kernel.py_func.__name__
        assert function[:16] in launched.name
        assert (launched.grid, launched.block) == (in_three(given.grid), in_three(given.block)), function
        assert (launched.sizes, launched.values) == packed(given.arguments), function
        assert launched.stream == runtime.stream.ptr, function
        assert launched.shared_bytes == 0


def assert_products_as_asked(seen, runtime):
    assert len(seen.products) == len(seen.asked)
    for product, asked in zip(seen.products, seen.asked, strict=True):
        assert (product.stream, product.handle) == (runtime.stream.ptr, runtime._handle)
        assert (product.alpha, product.beta) == (1, asked.accumulate)
        addresses = [each.buffer.device_ctypes_pointer.value + 4 * each.offset for each in asked.operands]
        assert set(addresses) <= set(product.arguments)
        sizes = product.arguments[1:3] if product.name == "sgemv" else product.arguments[2:5]
        assert sorted(sizes) == sorted(asked.sizes)
        assert (product.name == "sgemmStridedBatched") == (asked.batch > 1)
        assert asked.batch in (1, product.arguments[-1])


def test_the_first_step_launches_what_the_operations_ask_for(training, first):
    assert_as_given(first, training.runtime)
    assert_products_as_asked(first, training.runtime)


def test_a_step_launches_what_the_recording_runtime_records(name, first):
    """``convbench kernels`` compiles what that runtime records; a training step has to launch the same."""
    runtime = RecordingRuntime(name)
    backend = gpu_module(find(name)).make_backend(runtime=runtime)
    runtime.watch(backend)
    architecture = autoencoder()
    network = Network(backend, architecture, BATCH_SIZE, initial_parameters(architecture, 0))
    runtime.launches.clear()
    images, order = np.empty((BATCH_SIZE, *architecture.input_shape), np.uint8), np.empty(BATCH_SIZE, np.int32)
    network.step(images, order, 0, BATCH_SIZE, 0.5, np.empty(4, np.float32), 0)

    def values(kind):
        return 5 + 2 * kind.ndim if hasattr(kind, "ndim") else 1

    recorded = [(each.kernel, each.grid, each.block, sum(map(values, each.types))) for each in runtime.launches]
    launched = [
        (given.kernel, given.grid, given.block, len(launched.sizes))
        for given, launched in zip(first.given, first.launched, strict=True)
    ]
    assert launched == recorded


def test_a_later_step_replays_the_same_launches_and_products(training, first, libraries):
    second = training.step()
    assert second.launched == first.launched
    assert second.products == first.products
    assert second.asked == []
    assert {each.kernel.py_func.__name__.split("_")[0] for each in second.given} == set(OUTSIDE)
    assert Driver().libraries() == libraries


def test_a_step_without_replay_launches_the_same(training, first, libraries, monkeypatch):
    monkeypatch.setattr(training.backend, "replayed", lambda owner, name, work: work())
    for _ in range(2):
        plain = training.step()
        assert plain.launched == first.launched
        assert plain.products == first.products
        assert_as_given(plain, training.runtime)
    assert Driver().libraries() == libraries


def test_scalars_outside_the_replay_follow_the_call(training, first):
    seen = training.step(start=5, rate=0.25, index=3)
    changed = [i for i, launched in enumerate(first.launched) if launched != seen.launched[i]]
    outside = [i for i, given in enumerate(first.given) if given.kernel.py_func.__name__.startswith(OUTSIDE)]
    assert len(changed) == 3
    assert set(changed) <= set(outside)
    for i, given in zip(outside, seen.given, strict=True):
        assert (seen.launched[i].sizes, seen.launched[i].values) == packed(given.arguments)
    assert training.step().launched == first.launched


def test_the_smaller_last_batch_has_its_own_launches_and_compiles_nothing(training, first, libraries):
    smaller = training.step(n=LAST)
    assert_as_given(smaller, training.runtime)
    assert_products_as_asked(smaller, training.runtime)
    again = training.step(n=LAST)
    assert (again.launched, again.products) == (smaller.launched, smaller.products)
    assert len(again.given) < len(smaller.given)
    whole = training.step()
    assert (whole.launched, whole.products) == (first.launched, first.products)
    assert Driver().libraries() == libraries


def test_parameters_are_written_where_the_replayed_launches_read_them(training, first):
    training.network.write_parameters(initial_parameters(training.network.architecture, 1))
    training.network.poison()
    assert training.step().launched == first.launched


def test_a_clocked_step_passes_through_the_operations(training, first):
    clock: Timer = lambda: 0.0  # noqa: E731
    with Stopwatch(training.backend, clock).clocking():
        clocked = training.step()
    assert len(clocked.given) == len(first.given)
    assert clocked.launched == first.launched
    assert "replayed" not in vars(training.backend)
    assert len(training.step().given) < len(first.given)


def test_a_second_network_on_the_backend_has_its_own_launches(name, training, first, libraries):
    """Last of this file's tests of a version: it prepares the backend again."""
    other = Training(name, training.backend)
    assert len(training.backend._recorded) == 0
    seen = other.step()
    assert_as_given(seen, training.runtime)
    assert seen.launched != first.launched
    assert other.step().launched == seen.launched
    returned = training.step()  # with the new workspace
    assert_as_given(returned, training.runtime)
    assert training.step().launched == returned.launched
    assert other.step().launched == seen.launched
    assert len(training.backend._recorded) == 2
    del other
    assert len(training.backend._recorded) == 1
    assert Driver().libraries() == libraries


def test_addresses_are_compared():
    """The tests above compare launches by value; a launch with another address is another launch."""
    seen = Training("v1").step().launched[0]
    assert seen == replace(seen)
    assert seen != replace(seen, values=(*seen.values[:4], seen.values[4] + 4, *seen.values[5:]))
