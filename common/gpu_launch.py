"""Prepared launches: Numba types, compiles and packs a kernel's arguments once; later launches go to the driver.

Numba's launch looks up the compiled kernel and packs every argument anew, each time; a CIFAR-sized training step has so
many launches that this is most of what the host does. Here the first launch with a set of device arrays is Numba's own.
What it packed is kept, and each further launch rewrites the scalars in it and calls ``cuLaunchKernel``. Of the public
ways into the driver, ``cuda.bindings.driver.cuLaunchKernel`` with the address of a packed list costs least:
``cuda.core.launch`` packs again, and ctypes converts eleven arguments.

All that the project uses of numba-cuda beyond its documented interface is in this file: the compiled kernel that a
launch hands to its ``pre_launch_callbacks``, its ``argument_types``, ``_prepare_args`` and ``library.get_cufunc()``.
Where numba-cuda lacks one of these, every launch is Numba's own, slower and right, and one warning says so.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import struct
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

Call = Callable[[], None]
SCALARS = frozenset({bool, int, float, np.float32})
"""Types of arguments whose value may change from launch to launch."""

SLOT = 8  # bytes for each packed value; the longest has as many
FORMATS = {"bool": "?7x", "int32": "i4x", "int64": "q", "float32": "f4x", "float64": "d"}
"""How ``struct`` packs a scalar of a Numba type into a slot."""


class Tape:
    """What a runtime launches while it records; ``calls`` is None when it does not."""

    def __init__(self) -> None:
        """Start without recording."""
        self.calls: list[Call] | None = None

    def record(self, work: Callable[[], Any]) -> list[Call]:
        """Run ``work`` and return what it launched, each ready to be launched again. RuntimeError if nested."""
        if self.calls is not None:
            raise RuntimeError("a recording is already under way")
        self.calls = calls = []
        try:
            work()
        finally:
            self.calls = None
        return calls

    def refuse(self, what: str) -> None:
        """RuntimeError if a recording is under way: ``what`` cannot be repeated by launching the same again."""
        if self.calls is not None:
            raise RuntimeError(f"{what} while launches are recorded: a replay would leave it out")


class IdentityCache(dict):
    """Values kept under keys that contain the ``id`` of objects; an entry goes when one of its objects does.

    Therefore no other object can be mistaken for one that had its address, and the cache keeps no device memory alive.
    """

    def keep(self, key: tuple, value: Any, objects: Sequence[Any]) -> tuple[Any, list]:
        """Store ``value`` until one of ``objects`` is deleted; returns the entry, of which ``value`` is the first."""

        def forget(_: weakref.ref) -> None:
            self.pop(key, None)

        self[key] = entry = (value, [weakref.ref(each, forget) for each in objects])
        return entry


class Launcher:
    """A kernel with its launch shape and stream; call it with the kernel's arguments.

    A set of device arrays is prepared at its first launch. Scalars may differ from launch to launch; a scalar of
    another type is prepared anew, and compiled if the kernel has not met it. Launch from the thread that made it: a
    CUDA context belongs to a thread.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], stream: Any, tape: Tape) -> None:
        """Bind ``kernel``; ``stream`` is Numba's wrapper of the stream."""
        self._configured = kernel[grid, block, stream]
        self._shape = (*padded(grid), *padded(block))
        self._stream = stream
        self._tape = tape
        self._prepared = IdentityCache()

    def __call__(self, *arguments: Any) -> None:
        """Launch. RuntimeError, with the driver's name of the error, if the driver refuses."""
        key = tuple([kind if (kind := type(each)) in SCALARS else id(each) for each in arguments])
        found = self._prepared.get(key)
        if found is None:
            packed = self._first(key, arguments)
        else:
            packed = found[0]
            if packed.write(arguments):
                packed()
            else:
                packed = None
                self._configured(*arguments)
        if self._tape.calls is not None:
            again = partial(self._configured, *arguments) if packed is None else packed.frozen(arguments)
            self._tape.calls.append(again)

    def _first(self, key: tuple, arguments: tuple) -> PackedLaunch | None:
        """Let Numba launch, and keep what it would pack; None where only Numba can launch this."""
        compiled: list[Any] = []

        def remember(kernel: Any, configuration: Any) -> None:
            compiled.append(kernel)

        callbacks = getattr(self._configured, "pre_launch_callbacks", [])
        callbacks.append(remember)
        try:
            self._configured(*arguments)
        finally:
            callbacks.remove(remember)
        try:
            packed = pack(compiled[0], self._shape, self._stream, arguments)
        except (AttributeError, ImportError, IndexError, TypeError, ValueError, struct.error) as error:
            # Not a mistake of the caller: Numba has just launched with these arguments.
            _warn_of_slow_launches("no kernel came to pre_launch_callbacks" if not compiled else str(error))
            return None
        if packed is not None:
            self._prepared.keep(key, packed, [each for each in arguments if type(each) not in SCALARS])
        return packed


class PackedLaunch:
    """Everything that ``cuLaunchKernel`` takes: a function, a launch shape, a stream and packed arguments."""

    def __init__(self, function: Any, shape: tuple[int, ...], stream: int, memory: bytes, scalars: list) -> None:
        """Copy ``memory``, 8 bytes for each packed value.

        ``function`` is Numba's, with its ``handle``. ``scalars`` has, for each scalar argument, its place among the
        arguments, its offset in ``memory`` and its ``struct.Struct``.
        """
        from cuda.bindings import driver

        self._same = (function, shape, stream)
        self._scalars = scalars
        self._memory = ctypes.create_string_buffer(memory, len(memory))
        start = ctypes.addressof(self._memory)
        self._pointers = (ctypes.c_void_p * (len(memory) // SLOT))(*range(start, start + len(memory), SLOT))
        self._success = driver.CUresult.CUDA_SUCCESS
        self._launch = partial(
            driver.cuLaunchKernel,
            driver.CUfunction(int(function.handle)),
            *shape,
            0,  # bytes of dynamic shared memory
            driver.CUstream(stream),
            ctypes.addressof(self._pointers),
            0,  # the other way to pass arguments
        )

    def write(self, arguments: tuple) -> bool:
        """Pack the scalars among ``arguments``; False if a number is too large for the type it had."""
        try:
            for place, offset, packer in self._scalars:
                packer.pack_into(self._memory, offset, arguments[place])
        except (struct.error, OverflowError):
            return False
        return True

    def __call__(self) -> None:
        """Launch with the scalars packed last; the driver has copied all arguments when this returns."""
        (result,) = self._launch()
        if result is not self._success:
            raise RuntimeError(f"the driver did not launch {self._same[0].name}: {result.name}")

    def frozen(self, arguments: tuple) -> PackedLaunch:
        """This launch with its present scalars for good; it keeps ``arguments`` alive."""
        copy = PackedLaunch(*self._same, self._memory.raw, [])
        copy.arguments = arguments
        return copy


def padded(dimensions: tuple[int, ...]) -> tuple[int, ...]:
    """Three dimensions of a grid or a block; those not given are 1."""
    return (*dimensions, *(1,) * (3 - len(dimensions)))


def pack(compiled: Any, shape: tuple[int, ...], stream: Any, arguments: tuple) -> PackedLaunch | None:
    """Pack ``arguments`` as Numba does for a kernel that it has compiled.

    None where Numba's launch does more than pack and launch (host arrays, debug information, extensions, a cooperative
    grid), for scalars without a format here, and for numbers that exceed theirs. AttributeError or TypeError where
    numba-cuda lacks something.
    """
    from numba.cuda.cudadrv.devicearray import DeviceNDArray

    if compiled.debug or compiled.extensions or compiled.cooperative:
        return None
    memory, scalars = b"", []
    for place, (kind, value) in enumerate(zip(compiled.argument_types, arguments, strict=True)):
        if isinstance(value, DeviceNDArray):
            words: list[int] = []
            compiled._prepare_args(kind, value, stream, [], words)
            memory += struct.pack(f"={len(words)}q", *map(int, words))
        elif type(value) in SCALARS and str(kind) in FORMATS:
            packer = struct.Struct(f"={FORMATS[str(kind)]}")
            scalars.append((place, len(memory), packer))
            memory += bytes(SLOT)
        else:
            return None
    packed = PackedLaunch(compiled.library.get_cufunc(), shape, int(stream), memory, scalars)
    return packed if packed.write(arguments) else None


def _warn_of_slow_launches(what: str) -> None:
    version = importlib.metadata.version("numba-cuda")
    warnings.warn(
        f"numba-cuda {version}: {what}, so launches are Numba's own, right but slower on the host",
        RuntimeWarning,
        stacklevel=2,
    )
