"""The network as data: stages, shapes, parameters, FLOPs and receptive fields.

A symmetric convolutional autoencoder. Each stage is one 3x3 convolution (stride 1, padding 1, with a bias), and all
but the last are followed by a ReLU and by one resampling: a 2x2 max-pool on the way down, a nearest-neighbour
upsampling by two on the way up. Nothing here computes anything on pictures. The backends, the reference, the memory
plan and the tables all read this description, so a test can run a tiny network through the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from common.errors import UsageError

WINDOW = 3  # R = S = 3: every convolution has a 3x3 window, stride 1, padding 1
TAPS = WINDOW * WINDOW

Resample = Literal["maxpool", "upsample"]


@dataclass(frozen=True)
class Stage:
    """One convolution, and the ReLU and resampling after it.

    ``height`` and ``width`` are the size at the convolution, which does not change it. A stage with a ``resample`` has
    a ReLU before the resampling; a stage without one is linear. ``upsampled`` says that the stage before ends with an
    upsampling, so that each 2x2 block of this convolution's input has one value.
    """

    name: str
    in_channels: int
    out_channels: int
    height: int
    width: int
    resample: Resample | None = None
    upsampled: bool = False

    @property
    def relu(self) -> bool:
        """Whether a ReLU follows the convolution."""
        return self.resample is not None

    @property
    def out_height(self) -> int:
        """Height after the resampling, in pixels."""
        return _resampled(self.height, self.resample)

    @property
    def out_width(self) -> int:
        """Width after the resampling, in pixels."""
        return _resampled(self.width, self.resample)

    @property
    def weight_count(self) -> int:
        """Weights of the convolution: K * C * R * S."""
        return self.out_channels * self.in_channels * TAPS

    @property
    def parameter_count(self) -> int:
        """Weights and biases."""
        return self.weight_count + self.out_channels

    @property
    def flops(self) -> int:
        """FLOPs of the convolution for one picture; a multiply and an add count as two.

        Forward, backward data and backward filter cost the same.
        """
        return 2 * self.weight_count * self.height * self.width


@dataclass(frozen=True)
class Architecture:
    """The stages in order. The output of each stage is the input of the next."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        """Raise UsageError if a stage's input is not the output of the stage before it, or not upsampled as it says."""
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            given = (before.out_channels, before.out_height, before.out_width)
            wanted = (after.in_channels, after.height, after.width)
            if given != wanted:
                raise UsageError(f"{after.name} takes (C, H, W) = {wanted}, but {before.name} gives {given}")
            if after.upsampled != (before.resample == "upsample"):
                raise UsageError(f"{after.name} has upsampled={after.upsampled}, but {before.name} is before it")

    @property
    def parameter_count(self) -> int:
        """Weights and biases of all stages."""
        return sum(stage.parameter_count for stage in self.stages)

    @property
    def forward_flops(self) -> int:
        """FLOPs of all convolutions, forward, for one picture."""
        return sum(stage.flops for stage in self.stages)

    @property
    def training_flops(self) -> int:
        """FLOPs of one training step for one picture.

        Forward and backward filter of every convolution, and backward data of all but the first: no operation needs
        the gradient with respect to the pictures.
        """
        return 2 * self.forward_flops + sum(stage.flops for stage in self.stages[1:])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture."""
        first = self.stages[0]
        return first.in_channels, first.height, first.width

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one reconstruction."""
        last = self.stages[-1]
        return last.out_channels, last.out_height, last.out_width

    @property
    def latent_stages(self) -> int:
        """Number of stages up to the latent: the first stage output with the fewest pixels."""
        areas = [stage.out_height * stage.out_width for stage in self.stages]
        return areas.index(min(areas)) + 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture's latent."""
        last = self.stages[self.latent_stages - 1]
        return last.out_channels, last.out_height, last.out_width

    @property
    def values_per_image(self) -> int:
        """Values in one picture; its loss has as many terms."""
        return prod(self.input_shape)


def autoencoder(
    image_size: tuple[int, int] = (32, 32), widths: tuple[int, int] = (256, 128), channels: int = 3
) -> Architecture:
    """Build the symmetric autoencoder for pictures of ``image_size`` (H, W).

    ``widths`` are the numbers of filters of the outer and of the inner convolutions; (256, 128) is the network that
    the suite measures. H and W must be multiples of four, because there are two poolings.
    """
    height, width = image_size
    outer, inner = widths
    if height < 4 or width < 4 or height % 4 or width % 4:
        raise UsageError(f"image size {height}x{width}: both sides must be multiples of 4")
    if min(outer, inner, channels) < 1:
        raise UsageError(f"widths {widths} and channels {channels} must be at least 1")
    return Architecture(
        (
            Stage("conv1", channels, outer, height, width, "maxpool"),
            Stage("conv2", outer, inner, height // 2, width // 2, "maxpool"),
            Stage("conv3", inner, inner, height // 4, width // 4, "upsample"),
            Stage("conv4", inner, outer, height // 2, width // 2, "upsample", upsampled=True),
            Stage("conv5", outer, channels, height, width, upsampled=True),
        )
    )


def scaled_autoencoder(width: float = 1) -> Architecture:
    """The autoencoder whose inner convolutions have ``width`` times the filters; 1 is the network.

    UsageError for a width below 1/128 or above 4, or one that gives no whole numbers of filters.
    """
    outer, inner = 256 * width, 128 * width
    if not 1 <= inner <= 4 * 128 or inner % 1:
        raise UsageError(
            f"width {width}: must be from 1/128 to 4 and a multiple of 1/128, so that 256 and 128 filters become "
            "whole numbers; for example 0.5"
        )
    return autoencoder(widths=(round(outer), round(inner)))


def receptive_fields(architecture: Architecture) -> list[tuple[str, set[int]]]:
    """Return, for each layer, on how many input columns one of its values depends.

    The result is exact: each output column is traced back through every layer to an interval of input columns. After
    an upsampling there can be two sizes, one for even and one for odd positions. Positions whose interval crosses the
    picture's border are left out. If all do, the largest interval inside the picture is returned.
    """
    picture_width = architecture.stages[0].width
    layers: list[str] = []
    fields: list[tuple[str, set[int]]] = []

    def record(name: str, width: int) -> None:
        spans = [_input_span(column, layers) for column in range(width)]
        inside = {last - first + 1 for first, last in spans if first >= 0 and last < picture_width}
        clipped = max(min(last, picture_width - 1) - max(first, 0) + 1 for first, last in spans)
        fields.append((name, inside or {clipped}))

    counts = {"maxpool": 0, "upsample": 0}
    for stage in architecture.stages:
        layers.append("convolution")
        record(stage.name, stage.width)
        if stage.resample is not None:
            layers.append(stage.resample)
            counts[stage.resample] += 1
            record(f"{stage.resample.removeprefix('max')}{counts[stage.resample]}", stage.out_width)
    return fields


def _input_span(column: int, layers: list[str]) -> tuple[int, int]:
    """First and last input column that ``column`` of the last of ``layers`` depends on, ignoring the border."""
    first = last = column
    for layer in reversed(layers):
        if layer == "convolution":
            first, last = first - 1, last + 1
        elif layer == "maxpool":
            first, last = 2 * first, 2 * last + 1
        else:
            first, last = first // 2, last // 2
    return first, last


def _resampled(size: int, resample: Resample | None) -> int:
    return {"maxpool": size // 2, "upsample": size * 2, None: size}[resample]
