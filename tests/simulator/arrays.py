"""Global, shared and local arrays as a kernel sees them in the strict simulator: they check every access.

``Launch`` in ``strict.py`` creates them. ``Launch.now`` is the (thread, phase, block) that is running; a phase is the
time between two barriers.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numba.cuda.simulator.cudadrv.devicearray import FakeShape

if TYPE_CHECKING:
    from tests.simulator.strict import Launch

ANYONE = (None, None, None)  # threads of several blocks; see Launch.now


class KernelError(AssertionError):
    """A kernel broke a rule of the strict simulator."""


class GlobalArray:
    """A view of a buffer, as a kernel's argument.

    ``accesses`` belongs to the memory: for each index, the last writer and the last reader in this launch.
    """

    def __init__(self, launch: Launch, name: str, array: np.ndarray, accesses: tuple[dict, dict]) -> None:
        self._launch = launch
        self._name = name
        self._array = array
        self._writers, self._readers = accesses
        self.shape = FakeShape(array.shape)
        self.size, self.ndim, self.dtype, self.strides = array.size, array.ndim, array.dtype, array.strides

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index):
        value = self._at(index)
        now = self._launch.now
        writer = self._writers.get(index)
        if writer is not None and writer is not now:
            self._check_order(index, "reads", writer, "wrote")
        reader = self._readers.get(index)
        if reader is not now:
            if reader is None:
                self._readers[index] = now
            elif reader[2] != now[2]:
                self._readers[index] = ANYONE
            else:
                self._readers[index] = self._launch.several if reader[1] == now[1] else now
        return value

    def __setitem__(self, index, value) -> None:
        self._at(index)
        now = self._launch.now
        writer = self._writers.get(index)
        if writer is not None and writer is not now:
            self._check_order(index, "writes", writer, "wrote")
        reader = self._readers.get(index)
        if reader is not None and reader is not now:
            self._check_order(index, "writes", reader, "read")
        self._writers[index] = now
        self._array[index] = value

    def _at(self, index):
        """The element at ``index``, which must be inside the array on every axis."""
        try:
            inside = min(index) >= 0 if type(index) is tuple else index >= 0
            value = self._array[index] if inside else None
        except (IndexError, TypeError):
            value = None
        if value is None or type(value) is np.ndarray:
            self._launch.fail(f"index {index} of global array {self._name} of shape {self._array.shape}")
        return value

    def _check_order(self, index, does: str, other: tuple, did: str) -> None:
        """Only a barrier within a block orders the accesses of two threads."""
        _, phase, block = self._launch.now
        if other[2] != block or other[1] == phase:
            self._launch.fail(
                f"a race: {does} element {index} of global array {self._name} of shape {self._array.shape}, which "
                f"{self._launch.describe(other)} {did} with no barrier in between"
            )


class Memory:
    """The base of shared and local arrays: a cell for every valid index, so that an invalid index has none."""

    kind = ""

    def __init__(self, launch: Launch, shape, dtype) -> None:
        self._launch = launch
        self.dtype = np.dtype(dtype)
        self._type = self.dtype.type
        self.shape = FakeShape(shape if isinstance(shape, tuple) else (shape,))
        self.ndim, self.size = len(self.shape), prod(self.shape)
        indices = range(self.shape[0]) if self.ndim == 1 else product(*map(range, self.shape))
        self._cells = self._make_cells(indices)

    def __len__(self) -> int:
        return self.shape[0]

    def _fail_index(self, index) -> None:
        self._launch.fail(f"index {index} of a {self.kind} array of shape {tuple(self.shape)}")

    def _fail_unwritten(self, index) -> None:
        self._launch.fail(
            f"reads element {index} of a {self.kind} array of shape {tuple(self.shape)}, which no thread wrote"
        )


class LocalArray(Memory):
    """An array of one thread."""

    kind = "local"

    def _make_cells(self, indices) -> dict:
        return dict.fromkeys(indices)

    def __getitem__(self, index):
        try:
            value = self._cells[index]
        except (KeyError, TypeError):
            self._fail_index(index)
        if value is None:
            self._fail_unwritten(index)
        return value

    def __setitem__(self, index, value) -> None:
        if index not in self._cells:
            self._fail_index(index)
        self._cells[index] = value if type(value) is self._type else self._type(value)


class SharedArray(Memory):
    """An array of one block. A cell is [value, last writer, last reader]; both are like ``Launch.now``."""

    kind = "shared"

    def _make_cells(self, indices) -> dict:
        return {index: [None, None, None] for index in indices}

    def __getitem__(self, index):
        try:
            cell = self._cells[index]
        except (KeyError, TypeError):
            self._fail_index(index)
        launch = self._launch
        value, writer, reader = cell
        if writer is None:
            self._fail_unwritten(index)
        now = launch.now
        if writer is not now and writer[1] == now[1]:
            self._fail_race(index, "reads", writer, "wrote")
        if reader is not now:
            # For several readers in a phase it is enough to know that there are several.
            cell[2] = now if reader is None or reader[1] != now[1] else launch.several
        return value

    def __setitem__(self, index, value) -> None:
        try:
            cell = self._cells[index]
        except (KeyError, TypeError):
            self._fail_index(index)
        now = self._launch.now
        _, writer, reader = cell
        if writer is not None and writer is not now and writer[1] == now[1]:
            self._fail_race(index, "writes", writer, "wrote")
        if reader is not None and reader is not now and reader[1] == now[1]:
            self._fail_race(index, "writes", reader, "read")
        cell[0] = value if type(value) is self._type else self._type(value)
        cell[1] = now

    def _fail_race(self, index, does: str, other: tuple, did: str) -> None:
        self._launch.fail(
            f"a race: {does} element {index} of a shared array of shape {tuple(self.shape)}, which "
            f"{self._launch.describe(other)} {did} with no barrier in between"
        )
