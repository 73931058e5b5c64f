"""The interface between the network and a version.

A version implements four operations: the convolution with bias and optional ReLU, and its three gradients. The device
classes ``CpuBackend`` and ``GpuBackend`` implement what all versions share: memory, the element-wise operations, the
loss and SGD. By default a stage (convolution, ReLU, resampling) calls these operations one after another. A version
that fuses some of them overrides ``stage_forward`` or ``stage_backward``; nothing else changes. One that overrides both
needs no operations of its own, and says in ``stage_plan`` what its stages write and keep.

Ownership: the network owns every buffer and passes views of them to the backend. The backend owns its workspace and
allocates it in ``prepare``. No operation allocates. An operation reads its inputs, overwrites its whole output, and
does not change its inputs. What it launches depends on its arguments alone, because a device may record the launches of
a step and repeat them; see ``Backend.replayed``. "Buffer" below means a float32 NumPy array on the CPU and a Numba
device array on the GPU.

Axis letters: N batch, H height, W width, C input channels, K filters, R x S the 3x3 window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from common.architecture import Architecture, Stage
from common.plans import Layout, StagePlan, operations_plan

Device = Literal["cpu", "gpu"]
Precision = Literal["fp32", "tf32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Buffer = Any

LAYOUT_FROM_NCHW = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 2, 3, 1)}
LAYOUT_TO_NCHW = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 3, 1, 2)}


def filter_shape(layout: Layout, filters: int, channels: int, window: int = 3) -> tuple[int, int, int, int]:
    """Shape of a filter bank: (K, C, R, S) with NCHW, (K, R, S, C) with NHWC."""
    return (filters, channels, window, window) if layout == "NCHW" else (filters, window, window, channels)


def from_canonical(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Copy (N, C, H, W) or (K, C, R, S) into ``layout``; the permutation is the same for pictures and filters."""
    return np.ascontiguousarray(array.transpose(LAYOUT_FROM_NCHW[layout]))


def to_canonical(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Copy an array in ``layout`` into the canonical order (N, C, H, W) or (K, C, R, S)."""
    return np.ascontiguousarray(array.transpose(LAYOUT_TO_NCHW[layout]))


class Backend(ABC):
    """One version on one device.

    Subclasses set ``layout`` and ``device``, and ``deterministic = False`` if results can differ from run to run.
    """

    layout: Layout
    device: Device
    deterministic: bool = True

    def __init__(self, *, precision: Precision = "fp32", threads: int | None = None) -> None:
        """Create a backend. Only a CPU uses ``threads``; only GEMM on a GPU uses ``precision``."""
        self.precision: Precision = precision
        self.threads = threads

    # Memory -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: type = np.float32) -> Buffer:
        """Allocate a C-contiguous buffer with undefined content on the device."""

    @abstractmethod
    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy a host array of the same shape and dtype into ``buffer``."""

    @abstractmethod
    def read(self, buffer: Buffer) -> np.ndarray:
        """Copy ``buffer`` to a new host array. It waits only for the copy: call ``synchronize`` first."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished all work."""

    def upload(self, array: np.ndarray) -> Buffer:
        """Allocate a buffer and fill it from a host array."""
        buffer = self.empty(array.shape, array.dtype.type)
        self.write(buffer, np.ascontiguousarray(array))
        return buffer

    def prepare(self, architecture: Architecture, batch_size: int) -> None:  # noqa: B027
        """Allocate the workspace for these stages and at most ``batch_size`` pictures; by default there is none."""

    def replayed(self, owner: Any, name: str, work: Callable[[], Any]) -> None:
        """Do ``work``. A device may record what it launches at the first call and only repeat that later.

        Therefore ``work`` has to launch the same, with the same buffers and scalars, whenever it is called with this
        ``owner`` and ``name``. It neither copies to or from the host nor allocates nor waits, and nothing reads what it
        returns. Numbers that change (a learning rate, a position) stay outside. ``owner`` is an object that lives
        as long as those buffers are in use; with it, or with the next ``prepare``, the recording goes.
        """
        work()

    # Operations that each version implements, unless it has whole stages only --------------------------------------

    @property
    def whole_stages(self) -> bool:
        """Whether the version has whole stages only, and none of the four operations."""
        return type(self).conv2d_forward is Backend.conv2d_forward

    def conv2d_forward(self, x: Buffer, w: Buffer, b: Buffer, y: Buffer, relu: bool) -> None:
        """Write y = conv(x, w) + b, then max(y, 0) if ``relu``; 3x3, stride 1, padding 1 (cross-correlation)."""
        raise NotImplementedError(f"{type(self).__name__} has whole stages only")

    def conv2d_backward_data(self, dy: Buffer, w: Buffer, dx: Buffer) -> None:
        """Write the gradient with respect to the convolution's input."""
        raise NotImplementedError(f"{type(self).__name__} has whole stages only")

    def conv2d_backward_filter(self, x: Buffer, dy: Buffer, dw: Buffer) -> None:
        """Write the gradient with respect to the filters, summed over the batch."""
        raise NotImplementedError(f"{type(self).__name__} has whole stages only")

    def conv2d_backward_bias(self, dy: Buffer, db: Buffer) -> None:
        """Write the gradient with respect to the biases (K,): the sum of dy over N, H and W."""
        raise NotImplementedError(f"{type(self).__name__} has whole stages only")

    # Shared by the versions of a device -------------------------------------------------------------------------

    @abstractmethod
    def gather_batch(self, images: Buffer, order: Buffer, start: int, x: Buffer) -> None:
        """Fill x with pictures ``order[start:start + N]``, scaled from bytes to [0, 1], in the backend's layout.

        ``images`` (samples, 3, H, W) uint8; ``order`` (samples,) int32; N is the batch size of x.
        """

    @abstractmethod
    def maxpool_forward(self, y: Buffer, out: Buffer) -> None:
        """Write the 2x2, stride-2 maximum of y; the result is NaN if the window has a NaN."""

    @abstractmethod
    def relu_maxpool_backward(self, y: Buffer, dout: Buffer, dy: Buffer) -> None:
        """Write the gradient through the pooling and the ReLU before it.

        ``y`` is the output of the ReLU. The first maximum of a window in row-major order gets the gradient, if it is
        positive. ``dy`` may be ``y`` itself.
        """

    @abstractmethod
    def upsample_forward(self, y: Buffer, out: Buffer) -> None:
        """Write each value of y into a 2x2 block (nearest neighbour)."""

    @abstractmethod
    def relu_upsample_backward(self, y: Buffer, dout: Buffer, dy: Buffer) -> None:
        """Write the gradient through the upsampling and the ReLU before it; ``dy`` may be ``y`` itself."""

    @abstractmethod
    def mse_loss(self, prediction: Buffer, target: Buffer, gradient: Buffer, losses: Buffer, step: int) -> None:
        """Write the mean squared error into ``losses[step]`` and (2/n)(prediction - target) into ``gradient``.

        ``gradient`` may be ``prediction`` itself.
        """

    @abstractmethod
    def sgd(self, parameters: Buffer, gradients: Buffer, learning_rate: float) -> None:
        """Subtract learning_rate * gradients from parameters, both flat."""

    # A stage ----------------------------------------------------------------------------------------------------

    def stage_plan(self, stage: Stage, n: int) -> StagePlan:
        """What the version writes and keeps in a stage for n pictures; the same as its package's ``stage_plan``."""
        return operations_plan(stage, n, self.layout)

    def stage_forward(
        self, stage: Stage, x: Buffer, w: Buffer, b: Buffer, out: Buffer, kept: Mapping[str, Buffer]
    ) -> None:
        """Run convolution, ReLU and resampling; ``out`` and ``kept`` are the buffers of ``stage_plan``."""
        y = kept.get("y", out)
        self.conv2d_forward(x, w, b, y, stage.relu)
        if stage.resample == "maxpool":
            self.maxpool_forward(y, out)
        elif stage.resample == "upsample":
            self.upsample_forward(y, out)

    def stage_backward(
        self,
        stage: Stage,
        x: Buffer,
        w: Buffer,
        dout: Buffer,
        kept: Mapping[str, Buffer],
        dw: Buffer,
        db: Buffer,
        dx: Buffer | None,
    ) -> None:
        """From ``dout`` compute the gradients of the stage's parameters and, unless ``dx`` is None, of its input.

        Memory is reused: here the gradient of the convolution's output replaces ``kept["y"]``, and ``dx`` may share
        memory with ``x``. The filter gradient reads x and therefore comes first. A version with whole stages only
        leaves ``kept`` as it is.
        """
        dy = kept.get("y", dout)
        if stage.resample == "maxpool":
            self.relu_maxpool_backward(dy, dout, dy)
        elif stage.resample == "upsample":
            self.relu_upsample_backward(dy, dout, dy)
        self.conv2d_backward_filter(x, dy, dw)
        self.conv2d_backward_bias(dy, db)
        if dx is not None:
            self.conv2d_backward_data(dy, w, dx)
