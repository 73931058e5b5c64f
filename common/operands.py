"""The operands of a case, made from a few distinct pictures, and what is done with its outputs.

Inputs are random, with a mean away from zero so that a wrong border or a missing bias cannot hide among cancelling
terms. A batch can repeat a few distinct pictures in random order. The reference then computes only those few, and every
value of every picture is still compared; a sum over the batch is the sum over the distinct pictures, each as often as
it occurs. Each picture of the batch has memory of its own, so caches gain nothing from the repetition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.architecture import Stage
from common.backend import Backend, Buffer, from_canonical, to_canonical
from common.checks import Check, check_close, check_that
from common.plans import BufferPlan, activation_shape

INPUTS = "inputs"  # name of the check that no input changed


@dataclass(frozen=True)
class Case:
    """Something to check or to time."""

    call: Callable[[], None]
    """Does it once; on a GPU it is only queued."""
    poison: Callable[[], None]
    """Fills every output with NaN."""
    check: Callable[[], list[Check]]
    """Waits, and judges what the calls since ``poison`` have left."""
    read: Callable[[], list[np.ndarray]] = list
    """Copies the outputs; nothing where they differ from call to call."""


class Operands:
    """Makes operands, and remembers those that must not change."""

    def __init__(self, backend: Backend, batch_size: int, distinct: int, rng: np.random.Generator) -> None:
        """For batches of ``batch_size`` pictures, of which ``distinct`` are different."""
        self.backend = backend
        self.rng = rng
        # Every distinct picture comes at least once.
        self.which = rng.permutation(
            np.concatenate([np.arange(distinct), rng.integers(0, distinct, batch_size)])[:batch_size]
        )
        """The distinct picture that each picture of the batch repeats."""
        self.counts = np.bincount(self.which, minlength=distinct).astype(np.float64)
        self._inputs: list[tuple[Buffer, np.ndarray, np.ndarray | None]] = []

    def normal(self, shape: tuple[int, ...], mean: float = 0.0) -> np.ndarray:
        """Random float32."""
        return self.rng.standard_normal(shape, np.float32) + np.float32(mean)

    def batch(self, shape: tuple[int, int, int], mean: float = 0.0) -> tuple[np.ndarray, Buffer]:
        """Distinct random pictures (D, C, H, W), and a batch of them on the device."""
        return self.batch_of(self.normal((len(self.counts), *shape), mean))

    def rectified(self, shape: tuple[int, int, int]) -> tuple[np.ndarray, Buffer]:
        """Like ``batch``, but what a ReLU could give; half of the pooling windows are rounded, so maxima are equal."""
        channels, height, width = shape
        base = np.maximum(self.normal((len(self.counts), *shape)), 0)
        rounded = self.rng.random((len(self.counts), channels, -(-height // 2), -(-width // 2))) < 0.5
        rounded = rounded.repeat(2, axis=2).repeat(2, axis=3)[:, :, :height, :width]
        return self.batch_of(np.where(rounded, np.round(4 * base) / 4, base))

    def batch_of(self, base: np.ndarray) -> tuple[np.ndarray, Buffer]:
        """These distinct pictures (D, C, H, W), and a batch of them on the device."""
        laid = from_canonical(base, self.backend.layout)
        buffer = self.backend.upload(laid[self.which])
        self._inputs.append((buffer, laid, self.which))
        return base, buffer

    def given(self, array: np.ndarray) -> Buffer:
        """An input on the device as it is: filters in the backend's layout, a vector, bytes."""
        buffer = self.backend.upload(array)
        self._inputs.append((buffer, array, None))
        return buffer

    def planned(self, plan: BufferPlan) -> Buffer:
        """An output buffer as a version plans it."""
        return self.backend.empty(plan.shape, plan.dtype)

    def filters(self, stage: Stage) -> tuple[np.ndarray, Buffer]:
        """Random filters, canonical and on the device."""
        w = self.normal((stage.out_channels, stage.in_channels, 3, 3), 0.2)
        return w, self.given(from_canonical(w, self.backend.layout))

    def activations(self, channels: int, height: int, width: int) -> Buffer:
        """An output buffer for the batch."""
        return self.backend.empty(activation_shape(self.backend.layout, len(self.which), channels, height, width))

    def case(
        self,
        call: Callable[[], None],
        outputs: Sequence[Buffer],
        judge: Callable[[], list[Check]],
        before: Callable[[], None] | None = None,
    ) -> Case:
        """Put the case together, its outputs poisoned and then ``before`` done; ``judge`` compares the outputs."""

        def poison() -> None:
            self.backend.synchronize()
            for buffer in outputs:
                self.backend.write(buffer, np.full(buffer.shape, np.nan, np.float32))
            if before is not None:
                before()
                self.backend.synchronize()

        def read() -> list[np.ndarray]:
            self.backend.synchronize()
            return [self.backend.read(buffer) for buffer in outputs]

        def check() -> list[Check]:
            self.backend.synchronize()
            return [*judge(), self._check_inputs()]

        poison()
        return Case(call, poison, check, read)

    def check_batch(
        self, name: str, buffer: Buffer, expected: np.ndarray, tolerance: np.ndarray | float
    ) -> list[Check]:
        """Compare each picture of a batch with the distinct one that it has to be."""
        return [check_batch(name, self.backend, buffer, expected, tolerance, self.which)]

    def _check_inputs(self) -> Check:
        changed = sum(not self._kept(*entry) for entry in self._inputs)
        return check_that(INPUTS, not changed, f"{changed} of {len(self._inputs)} inputs changed")

    def _kept(self, buffer: Buffer, array: np.ndarray, which: np.ndarray | None) -> bool:
        now = self.backend.read(buffer)
        if which is None:
            return np.array_equal(now, array)
        return all(np.array_equal(picture, array[i]) for picture, i in zip(now, which, strict=True))


def check_batch(
    name: str,
    backend: Backend,
    buffer: Buffer,
    expected: np.ndarray,
    tolerance: np.ndarray | float,
    which: np.ndarray,
) -> Check:
    """Compare a batch on the device with ``expected[which]``, canonical, a picture at a time to save memory."""
    tolerance = np.broadcast_to(tolerance, expected.shape)
    worst = 0.0
    for n, (picture, i) in enumerate(zip(backend.read(buffer), which, strict=True)):
        actual = to_canonical(picture[None], backend.layout)
        check = check_close(name, actual, expected[i : i + 1], tolerance[i : i + 1])
        if not check.passed:
            return replace(check, detail=f"picture {n}: {check.detail}")
        worst = max(worst, check.worst)
    return Check(name, True, worst)
