"""The architecture: counts of the specified network, exact receptive fields, and invalid networks."""

import numpy as np
import pytest

from common import reference
from common.architecture import Architecture, Stage, autoencoder, receptive_fields, scaled_autoencoder
from common.errors import UsageError
from common.network import initial_parameters, parameter_shapes, plan_activations
from versions.registry import find


def test_counts_of_the_full_network():
    network = autoencoder()
    assert [stage.parameter_count for stage in network.stages] == [7_168, 295_040, 147_584, 295_168, 6_915]
    assert network.parameter_count == 751_875
    assert network.forward_flops / 1e6 == pytest.approx(349.2, abs=0.05)
    assert network.training_flops / 1e9 == pytest.approx(1.033, abs=0.0005)
    assert [round(stage.flops / 1e6, 1) for stage in network.stages] == [14.2, 151.0, 18.9, 151.0, 14.2]


@pytest.mark.parametrize(("width", "filters"), [(1, (256, 128)), (1 / 128, (2, 1)), (4, (1024, 512)), (0.5, (128, 64))])
def test_a_width_scales_the_inner_filters_and_nothing_else(width, filters):
    assert scaled_autoencoder(width) == autoencoder(widths=filters)
    assert scaled_autoencoder(width).output_shape == (3, 32, 32)


@pytest.mark.parametrize("width", [0.3, 1 / 256, 4.5, 0, -1, float("nan"), float("inf")])
def test_a_width_without_whole_numbers_of_filters_is_refused(width):
    with pytest.raises(UsageError, match=f"width {width}: must be from 1/128 to 4 .* for example 0.5"):
        scaled_autoencoder(width)


def test_shapes_of_the_full_network():
    network = autoencoder()
    outputs = [(stage.out_channels, stage.out_height, stage.out_width) for stage in network.stages]
    assert outputs == [(256, 16, 16), (128, 8, 8), (128, 16, 16), (256, 32, 32), (3, 32, 32)]
    assert network.input_shape == network.output_shape == (3, 32, 32)


def test_receptive_fields_of_the_full_network():
    fields = receptive_fields(autoencoder())
    assert [max(sizes) for _, sizes in fields] == [3, 4, 8, 10, 18, 18, 22, 22, 26]
    assert [name for name, _ in fields][:4] == ["conv1", "pool1", "conv2", "pool2"]
    assert fields[-1] == ("conv5", {22, 26})


def test_receptive_fields_agree_with_changed_pixels():
    # One channel, positive weights and pictures, average pooling: an output depends on every pixel in its field.
    architecture = autoencoder((32, 32), (1, 1), channels=1)
    parameters = {name: np.abs(value) + 0.1 for name, value in initial_parameters(architecture, 0).items()}
    base = np.random.default_rng(0).random((1, 1, 32, 32))

    def output(picture):
        x = picture
        for stage in architecture.stages:
            x = reference.conv2d_forward(x, parameters[f"{stage.name}.weight"], parameters[f"{stage.name}.bias"])
            if stage.resample == "maxpool":
                x = (x[:, :, ::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, ::2] + x[:, :, 1::2, 1::2]) / 4
            elif stage.resample == "upsample":
                x = reference.upsample_forward(x)
        return x

    before = output(base)[0, 0, 16]
    moved = np.zeros((32, 32), bool)  # output column, input column
    for column in range(32):
        changed = base.copy()
        changed[0, 0, :, column] += 1
        moved[:, column] = np.abs(output(changed)[0, 0, 16] - before) > 1e-9
    sizes = moved.sum(axis=1)
    assert sizes.max() == 26
    assert {int(size) for size in sizes[13:19]} == {22, 26}


def test_weights_are_he_normal_and_seeded():
    parameters = initial_parameters(autoencoder(), seed=3)
    weight = parameters["conv2.weight"]
    assert weight.shape == (128, 256, 3, 3)
    assert weight.dtype == np.float32
    assert weight.std() == pytest.approx(np.sqrt(2 / (256 * 9)), rel=0.01)
    assert not parameters["conv2.bias"].any()
    again = initial_parameters(autoencoder(), seed=3)
    assert all(np.array_equal(parameters[name], again[name]) for name in parameters)
    assert not np.array_equal(initial_parameters(autoencoder(), seed=4)["conv2.weight"], weight)
    shapes = parameter_shapes(autoencoder(), "NHWC")
    assert shapes["conv2.weight"] == (128, 3, 3, 256)


def test_activations_stay_below_200_mb():
    plans = plan_activations(autoencoder(), 64, "NHWC", find("v1").stage_plan)
    assert plans[1].shape == (64, 32, 32, 256)
    total = sum(plan.bytes for plan in plans)
    assert total < 200e6  # activations and gradients together


@pytest.mark.parametrize("size", [(0, 8), (8, 6), (2, 4), (-4, 4)])
def test_sizes_that_are_not_multiples_of_four_are_refused(size):
    with pytest.raises(UsageError, match="multiples of 4"):
        autoencoder(size)


def test_widths_below_one_are_refused():
    with pytest.raises(UsageError, match="at least 1"):
        autoencoder((8, 8), (0, 3))


def test_stages_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="b takes"):
        Architecture((Stage("a", 3, 4, 8, 8, "maxpool"), Stage("b", 5, 3, 4, 4)))
