"""V5: its matrices and error bound, every method on any shape, the bits of any number of threads, and its plan."""

from fractions import Fraction
from itertools import product

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.records.layers import planned_buffers
from common import reference
from common.architecture import Architecture, Stage, autoencoder
from common.network import Network, initial_parameters
from common.verify import stage_checks
from versions.registry import REGISTRY, find, names
from versions.v5_winograd_nhwc import plan, winograd

OTHER_POINTS = (0, 1, -1, 3, -2)


# The algorithm ------------------------------------------------------------------------------------------------------


def times(matrix, vector):
    return [sum((a * b for a, b in zip(row, vector, strict=True)), start=Fraction(0)) for row in matrix]


def units(length):
    return [[Fraction(i == j) for j in range(length)] for i in range(length)]


@pytest.mark.parametrize("points", [winograd.POINTS, OTHER_POINTS, (5, -7, 2, 0, 1)])
def test_the_matrices_convolve_exactly(points):
    """Everything is linear in the filter and in the tile, so that it suffices to try every pair of units."""
    a_t, g, b_t = winograd.matrices(points)
    for taps, line in product(units(3), units(6)):
        products = [u * v for u, v in zip(times(g, taps), times(b_t, line), strict=True)]
        direct = [sum(taps[r] * line[i + r] for r in range(3)) for i in range(4)]
        assert times(a_t, products) == direct


def test_the_filter_gradient_is_the_transpose():
    a_t, g, b_t = winograd.A_T, winograd.G, winograd.B_T
    for line, gradient in product(units(6), units(4)):
        spread = times(winograd.transposed(a_t), gradient)
        products = [u * v for u, v in zip(times(b_t, line), spread, strict=True)]
        direct = [sum(gradient[i] * line[i + r] for i in range(4)) for r in range(3)]
        assert times(winograd.transposed(g), products) == direct


@pytest.mark.parametrize("points", [(0, 1, -1, 2), (0, 1, -1, 2, 2), (0, 1, -1, 2, -2, 3)])
def test_points_that_do_not_fit_are_refused(points):
    with pytest.raises(ValueError, match="5 different points"):
        winograd.matrices(points)


def test_four_outputs_are_not_the_only_ones():
    a_t, g, b_t = winograd.matrices((0, 1, -1), outputs=2)
    assert (len(a_t), len(g), len(b_t)) == (2, 4, 4)
    assert times(a_t, [u * v for u, v in zip(times(g, [1, 2, 3]), times(b_t, [4, 5, 6, 7]), strict=True)]) == [32, 38]


@pytest.mark.parametrize("name", ["A_T", "B_T", "G_WHOLE"])
def test_combinations_are_the_rows(name):
    matrix = getattr(winograd, name)
    values = np.random.default_rng(0).integers(-9, 9, len(matrix[0])).astype(np.float32)
    sums = [combine(values) for combine in winograd.combinations(matrix, lambda function: function)]
    assert sums == [float(total) for total in times(matrix, [Fraction(int(value)) for value in values])]


def test_the_error_factor_is_that_of_its_points():
    assert winograd.error_factor() == pytest.approx(31.44, abs=0.01)
    assert winograd.error_factor(*winograd.matrices(OTHER_POINTS)) > 1.5 * winograd.error_factor()
    assert winograd.error_factor(*winograd.matrices((0, 1, -1), outputs=2)) < 4


def test_the_error_factor_covers_the_error_and_is_not_far_above_it():
    """Of conv2 with normal operands, against the rounding of a direct sum of as many terms."""
    stage, rng = Stage("conv2", 256, 128, 16, 16), np.random.default_rng(0)
    x, w = rng.standard_normal((2, 256, 16, 16), np.float32), rng.standard_normal((128, 256, 3, 3), np.float32)
    exact = reference.conv2d_forward(x, w, np.zeros(128))
    errors = {}
    for name in ("v1", "v5"):
        backend = find(name).load("cpu")
        backend.prepare(Architecture((stage,)), 2)
        out = backend.empty((2, 16, 16, 128))
        laid = [np.ascontiguousarray(array.transpose(0, 2, 3, 1)) for array in (x, w)]
        backend.stage_forward(stage, *laid, np.zeros(128, np.float32), out, {})
        errors[name] = np.sqrt(((out.transpose(0, 3, 1, 2) - exact) ** 2).mean())
    # A direct sum of 2,304 terms rounds each partial sum; 256 products of tiles round fewer, but larger ones.
    assert winograd.error_factor() / 30 < errors["v5"] / errors["v1"] < winograd.error_factor()


# Stages -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend():
    return find("v5").load("cpu")


@pytest.mark.parametrize("narrow", [0, 3], ids=["winograd", "unfold"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 9),
    k=st.integers(1, 9),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
)
def test_any_shape(narrow, n, c, k, height, width):
    """Forward and backward, pooled, upsampled or neither; with ``narrow`` 0 Winograd takes even a single channel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "NARROW", narrow)
        shape = (n, c, k, height, width)
        checks = stage_checks(find("v5").load("cpu"), shape, np.random.default_rng(list(shape)))
        assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("shape", [(2, 131, 3, 3, 5), (1, 5, 130, 9, 2), (19, 65, 6, 2, 18)])
def test_more_channels_or_pictures_than_a_piece(backend, shape):
    checks = stage_checks(backend, shape, np.random.default_rng(7))
    assert [check for check in checks if not check.passed] == []


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="this machine has one core")
def test_any_number_of_threads_gives_the_same_bits():
    architecture, n = autoencoder((16, 16), (70, 66)), 11
    images = np.random.default_rng(0).integers(0, 256, (n, 3, 16, 16), np.uint8)
    found = []
    for threads in (1, 2, 2):
        backend = find("v5").load("cpu", threads=threads)
        network = Network(backend, architecture, n, initial_parameters(architecture, 0))
        network.step(images, np.arange(n, dtype=np.int32), 0, n, 0.1, backend.empty((1,)), 0)
        found.append(network.read_parameters())
    for again in found[1:]:
        assert all(np.array_equal(value, again[name]) for name, value in found[0].items())


# The plan -----------------------------------------------------------------------------------------------------------


def test_methods_of_the_network():
    stages = autoencoder().stages
    assert [plan.method(stage) for stage in stages] == ["unfold", "winograd", "winograd", "taps", "taps"]


def test_a_quarter_of_the_multiplications():
    info = find("v5")
    assert info.training_flops(autoencoder()) / 1e6 == pytest.approx(279.6, abs=0.05)
    assert find("v4").training_flops(autoencoder()) == autoencoder().training_flops


@pytest.mark.parametrize("info", REGISTRY, ids=names())
def test_the_registry_says_what_the_backend_does(info):
    backend = info.load("cpu")
    assert info.whole_stages == backend.whole_stages
    for stage in autoencoder().stages:
        assert info.stage_plan(stage, 5) == backend.stage_plan(stage, 5)
    work = {part.id for part in info.step_work(autoencoder(), 2)}
    assert ("conv2-stage_backward" in work, "conv2-backward_data" in work) == (info.whole_stages, not info.whole_stages)


def test_full_size_maps_are_never_in_memory():
    plans = planned_buffers(find("v5"), autoencoder(), 64, "cpu", 2)
    largest = {buffer.name: buffer.bytes for buffer in plans if buffer.purpose != "workspace"}
    assert max(largest.values()) == 64 * 16 * 16 * 256 * 4  # conv1 pooled, and conv4 before it is upsampled
    planned = {
        name: sum(buffer.bytes for buffer in planned_buffers(find(name), autoencoder(), 64, "cpu", 2))
        for name in ("v4", "v5")
    }
    assert planned["v5"] < 0.5 * planned["v4"]


@pytest.mark.parametrize("n", [1, 3, 64])
def test_the_workspace_is_what_is_planned(n):
    architecture, backend = autoencoder((8, 12), (6, 4)), find("v5").load("cpu")
    backend.prepare(architecture, n)
    buffers = (backend._scratch, backend._filters, backend._tiles, backend._products, backend._partials)
    planned = plan.workspace(architecture, n, "cpu", backend.threads)
    assert [buffer.shape for buffer in buffers] == list(planned.values())


def test_stages_without_operations_say_so(backend):
    with pytest.raises(NotImplementedError, match="whole stages only"):
        backend.conv2d_forward(None, None, None, None, True)
