"""The reference: every operation, forward and backward, in float64 NumPy, written for readability.

All arrays are in canonical order: pictures (N, C, H, W), filters (K, C, R, S). The convolution is a sum of nine shifted
products, one for each tap of the window. Each function returns new arrays. Tests check this module against brute force
and finite differences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from common.architecture import WINDOW, Architecture, Stage

Parameters = dict[str, np.ndarray]


def conv2d_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross-correlate x (N, C, H, W) with w (K, C, 3, 3), padding 1, and add b (K,): (N, K, H, W)."""
    height, width = x.shape[2:]
    padded = _pad(x)
    y = np.zeros((x.shape[0], height, width, w.shape[0]))
    for r in range(WINDOW):
        for s in range(WINDOW):
            y += np.tensordot(padded[:, :, r : r + height, s : s + width], w[:, :, r, s], axes=([1], [1]))
    return (y + b).transpose(0, 3, 1, 2)


def conv2d_backward_data(dy: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Gradient with respect to x (N, C, H, W): each output gradient is added to the inputs under its window."""
    n, _, height, width = dy.shape
    padded = np.zeros((n, height + 2, width + 2, w.shape[1]))
    for r in range(WINDOW):
        for s in range(WINDOW):
            padded[:, r : r + height, s : s + width] += np.tensordot(dy, w[:, :, r, s], axes=([1], [0]))
    return padded[:, 1:-1, 1:-1].transpose(0, 3, 1, 2)


def conv2d_backward_filter(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Gradient with respect to w (K, C, 3, 3), summed over pictures and positions."""
    height, width = x.shape[2:]
    padded = _pad(x)
    dw = np.empty((dy.shape[1], x.shape[1], WINDOW, WINDOW))
    for r in range(WINDOW):
        for s in range(WINDOW):
            window = padded[:, :, r : r + height, s : s + width]
            dw[:, :, r, s] = np.tensordot(dy, window, axes=([0, 2, 3], [0, 2, 3]))
    return dw


def conv2d_backward_bias(dy: np.ndarray) -> np.ndarray:
    """Gradient with respect to b (K,): the sum of dy over N, H and W."""
    return dy.sum(axis=(0, 2, 3))


def relu(y: np.ndarray) -> np.ndarray:
    """max(y, 0); NaN stays NaN."""
    return np.where(y <= 0, 0.0, y)


def maxpool_forward(y: np.ndarray) -> np.ndarray:
    """2x2, stride-2 maximum: (N, K, H/2, W/2)."""
    return windows(y).max(axis=-1)


def relu_maxpool_backward(y: np.ndarray, dout: np.ndarray) -> np.ndarray:
    """Gradient through pooling and the ReLU before it: to the first maximum of each window of y, if positive."""
    winner = windows(y).argmax(axis=-1)  # NumPy returns the first one, and ``windows`` is in row-major window order
    spread = (np.arange(4) == winner[..., None]) * dout[..., None]
    n, k, half_height, half_width = dout.shape
    dy = spread.reshape(n, k, half_height, half_width, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(y.shape)
    return dy * (y > 0)


def upsample_forward(y: np.ndarray) -> np.ndarray:
    """Nearest neighbour, twice as high and twice as wide."""
    return y.repeat(2, axis=2).repeat(2, axis=3)


def relu_upsample_backward(y: np.ndarray, dout: np.ndarray) -> np.ndarray:
    """Gradient through upsampling and the ReLU before it: the sum over each 2x2 block, where y is positive."""
    return windows(dout).sum(axis=-1) * (y > 0)


def mse_loss(prediction: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean squared error over every value, and its gradient with respect to the prediction."""
    difference = prediction - target
    return float(np.mean(difference**2)), 2.0 / difference.size * difference


def forward(stages: Iterable[Stage], parameters: Parameters, pictures: np.ndarray) -> np.ndarray:
    """Run some stages on pictures (N, C, H, W) in [0, 1] and return the output of the last one."""
    x = pictures.astype(np.float64)
    for stage in stages:
        x = conv2d_forward(x, parameters[f"{stage.name}.weight"], parameters[f"{stage.name}.bias"])
        if stage.relu:
            x = relu(x)
        if stage.resample == "maxpool":
            x = maxpool_forward(x)
        elif stage.resample == "upsample":
            x = upsample_forward(x)
    return x


@dataclass
class Step:
    """The results of one forward and backward pass."""

    loss: float
    prediction: np.ndarray
    gradients: Parameters
    margin: float = field(default=np.inf)
    """Smallest distance of any ReLU or pooling decision from its reversal, relative to the layer's largest value."""


def forward_backward(architecture: Architecture, parameters: Parameters, pictures: np.ndarray) -> Step:
    """Run the network on pictures (N, C, H, W) in [0, 1] and return the loss and the gradient of every parameter."""
    activations = [pictures.astype(np.float64)]
    rectified = []
    margin = np.inf
    for stage in architecture.stages:
        y = conv2d_forward(activations[-1], parameters[f"{stage.name}.weight"], parameters[f"{stage.name}.bias"])
        if stage.relu:
            margin = min(margin, np.abs(y).min() / np.abs(y).max())
            y = relu(y)
        rectified.append(y)
        if stage.resample == "maxpool":
            margin = min(margin, _pooling_margin(y))
            y = maxpool_forward(y)
        elif stage.resample == "upsample":
            y = upsample_forward(y)
        activations.append(y)

    loss, gradient = mse_loss(activations[-1], activations[0])
    gradients = {}
    for stage, x, y in reversed(list(zip(architecture.stages, activations[:-1], rectified, strict=True))):
        if stage.resample == "maxpool":
            gradient = relu_maxpool_backward(y, gradient)
        elif stage.resample == "upsample":
            gradient = relu_upsample_backward(y, gradient)
        gradients[f"{stage.name}.weight"] = conv2d_backward_filter(x, gradient)
        gradients[f"{stage.name}.bias"] = conv2d_backward_bias(gradient)
        gradient = conv2d_backward_data(gradient, parameters[f"{stage.name}.weight"])
    return Step(loss, activations[-1], gradients, margin)


def train(
    architecture: Architecture, parameters: Parameters, batches: list[np.ndarray], learning_rate: float
) -> tuple[list[float], Parameters]:
    """Plain SGD over the batches in order; returns the loss of each step and the final parameters."""
    current = {name: value.astype(np.float64) for name, value in parameters.items()}
    losses = []
    for batch in batches:
        step = forward_backward(architecture, current, batch)
        losses.append(step.loss)
        current = {name: value - learning_rate * step.gradients[name] for name, value in current.items()}
    return losses, current


def _pad(x: np.ndarray) -> np.ndarray:
    return np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))


def windows(y: np.ndarray) -> np.ndarray:
    """(N, K, H, W) to (N, K, H/2, W/2, 4): each 2x2 window in row-major order."""
    n, k, height, width = y.shape
    return y.reshape(n, k, height // 2, 2, width // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, k, height // 2, -1, 4)


def _pooling_margin(y: np.ndarray) -> float:
    """Smallest gap between the two largest values of a window; windows without a positive value do not count."""
    ordered = np.sort(windows(y), axis=-1)
    gaps = (ordered[..., 3] - ordered[..., 2])[ordered[..., 3] > 0]
    return float(gaps.min() / y.max()) if gaps.size else np.inf
