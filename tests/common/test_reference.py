"""The reference: brute force checks the convolution, finite differences check every gradient."""

import numpy as np
import pytest

from common import reference
from common.architecture import autoencoder
from common.verify import safe_step_inputs


def brute_force(x, w, b):
    n, channels, height, width = x.shape
    y = np.zeros((n, len(w), height, width))
    for i, k, h, v in np.ndindex(y.shape):
        y[i, k, h, v] = b[k]
        for c, r, s in np.ndindex(channels, 3, 3):
            if 0 <= h + r - 1 < height and 0 <= v + s - 1 < width:
                y[i, k, h, v] += x[i, c, h + r - 1, v + s - 1] * w[k, c, r, s]
    return y


def test_forward_is_the_definition():
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((4, 3, 3, 3)), rng.standard_normal(4)
    np.testing.assert_allclose(reference.conv2d_forward(x, w, b), brute_force(x, w, b), rtol=1e-12, atol=1e-12)


def test_every_gradient_by_finite_differences():
    architecture = autoencoder((4, 8), (3, 2))
    parameters, pictures = safe_step_inputs(architecture, 2, 1e-3)
    parameters = {name: value.astype(np.float64) for name, value in parameters.items()}
    pictures = pictures / 255.0
    step = reference.forward_backward(architecture, parameters, pictures)
    h = 1e-6
    for name, value in parameters.items():
        numeric = np.empty_like(value)
        for index in np.ndindex(value.shape):
            kept = value[index]
            value[index] = kept + h
            above = reference.forward_backward(architecture, parameters, pictures).loss
            value[index] = kept - h
            below = reference.forward_backward(architecture, parameters, pictures).loss
            value[index] = kept
            numeric[index] = (above - below) / (2 * h)
        np.testing.assert_allclose(step.gradients[name], numeric, rtol=1e-4, atol=1e-8, err_msg=name)


def test_input_gradient_by_finite_differences():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((1, 2, 3, 4)), rng.standard_normal((3, 2, 3, 3))
    dy = rng.standard_normal((1, 3, 3, 4))
    analytic = reference.conv2d_backward_data(dy, w)
    for index in np.ndindex(x.shape):
        unit = np.zeros_like(x)
        unit[index] = 1
        # The convolution is linear in x, so one difference of any size is exact.
        moved = (reference.conv2d_forward(unit, w, np.zeros(3)) * dy).sum()
        assert analytic[index] == pytest.approx(moved)


def test_pooling_ties_go_to_the_first_in_row_major_order():
    y = np.array([[2.0, 2, 1, 3], [2, 2, 3, 3], [0, 0, 5, 1], [0, 0, 1, 5]]).reshape(1, 1, 4, 4)
    dy = reference.relu_maxpool_backward(y, np.array([[10.0, 20], [30, 40]]).reshape(1, 1, 2, 2))
    expected = [[10, 0, 0, 20], [0, 0, 0, 0], [0, 0, 40, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(dy[0, 0], expected)


def test_relu_keeps_nan():
    assert np.isnan(reference.relu(np.array([np.nan]))).all()


def test_loss_and_its_gradient():
    prediction, target = np.array([[1.0, 2.0]]), np.array([[0.0, 4.0]])
    loss, gradient = reference.mse_loss(prediction, target)
    assert loss == 2.5
    np.testing.assert_allclose(gradient, [[1.0, -2.0]])
