"""A strict version of Numba's simulator: errors that a GPU hides, or shows only sometimes, fail here at once.

Numba's simulator runs a kernel as Python on NumPy arrays and accepts errors that a GPU does not: a negative index wraps
around, a barrier does not wait for a thread that has returned, a shared array keeps the values of the previous block.
For the duration of a test, ``install`` replaces its launches by launches that check

- indices: below zero or past the end, on any axis of a global, shared or local array, for loads and stores. The limit
  is the shape of the view that the kernel was given, not that of the buffer.
- barriers: a ``cuda.syncthreads()`` that not all threads of the block reach, or that they reach at different lines.
- races: one thread writes an element of shared or global memory, and another reads or writes it with no barrier in
  between. Between two blocks of a launch there is never a barrier. An atomic operation counts as a plain one.
- uninitialised values: loads from shared and local arrays, which are new for every block and thread.
- guard zones around every buffer, compared bit for bit after every launch and every GEMM.

An error is a ``KernelError`` that names the kernel, the thread and the element. Only one thread runs at a time, up to
its next barrier; then the next thread runs. Races are therefore found in any order of threads, and it is several times
faster than Numba's runner, which polls. Every second launch of a kernel runs threads and blocks in reverse order, so
that the checks that run an operation twice and compare the bits notice if the order matters.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from math import prod
from types import CodeType, FunctionType

import numpy as np
from numba.cuda.simulator import kernel as simulator
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from numba.cuda.simulator.kernelapi import Dim3, FakeCUDAModule

from common.gpu import SimulatorRuntime
from tests.simulator.arrays import GlobalArray, KernelError, LocalArray, SharedArray

GUARD_BYTES = 256
GUARD = np.full(GUARD_BYTES // 4, 0x7FC0DEAD, np.uint32).tobytes()  # a quiet NaN with an unusual payload


class Abandoned(BaseException):
    """Ends the threads that wait at a barrier after another thread of the block has failed."""


# A launch -----------------------------------------------------------------------------------------------------------


class Launch(FakeCUDAModule):
    """One launch of a kernel; also the ``cuda`` that the kernel sees while it runs."""

    threadIdx = blockIdx = laneid = None  # plain attributes of the running thread  # noqa: N815

    def __init__(self, kernel, grid: tuple[int, ...], block: tuple[int, ...], reverse: bool) -> None:
        super().__init__(grid, block, 0)
        self._local = _Arrays(lambda shape, dtype, site: LocalArray(self, shape, dtype))
        self._shared = _Arrays(self._shared_array)
        self.kernel = kernel
        self.name = kernel.fn.__name__
        # x varies fastest, as it does in a warp.
        self.threads = [(x, y, z) for z in range(block[2]) for y in range(block[1]) for x in range(block[0])]
        self.blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        self.order = list(range(len(self.threads)))
        if reverse:
            self.order.reverse()
            self.blocks.reverse()
        self._dims = [Dim3(*thread) for thread in self.threads]
        self.phase = 0  # counts the phases between barriers, over all blocks
        self.now: tuple = ()  # the running (thread, phase, block)
        self.several: tuple = ()  # the same, for more than one thread
        self.running = None

    def fail(self, what: str) -> None:
        """Raise a KernelError that names the kernel and the thread."""
        raise KernelError(f"{self.name}, {self.describe(self.now) if self.now else 'the launch'}: {what}") from None

    def describe(self, who: tuple) -> str:
        """The thread of an entry like ``now``, in words."""
        thread, _, block = who
        if block is None:
            return "threads of several blocks"
        return f"{'several threads' if thread is None else f'thread {self.threads[thread]}'} of block {block}"

    def run(self, arguments: tuple) -> None:
        """Run every block, one after the other."""
        names = self.kernel.fn.__code__.co_varnames
        accesses: dict[tuple, tuple[dict, dict]] = {}
        views: list[tuple[tuple, np.ndarray, str]] = []
        given = []
        for name, argument in zip(names, arguments, strict=False):
            if isinstance(argument, np.ndarray):
                self.fail(f"argument {name} is a NumPy array, which would be copied both ways at every launch")
            if isinstance(argument, FakeCUDAArray):
                array = argument._ary
                # Two arguments can be the same memory; they then share their accesses.
                key = (array.ctypes.data, array.shape, array.strides)
                for other_key, other, other_name in views:
                    if other_key != key and np.may_share_memory(array, other):
                        self.fail(f"arguments {other_name} and {name} overlap, and are not the same view")
                views.append((key, array, name))
                argument = GlobalArray(self, name, array, accesses.setdefault(key, ({}, {})))
            given.append(argument)
        try:
            self._run_blocks(given, _has_barrier(self.kernel.fn))
        except Exception as error:
            if not isinstance(error, KernelError):
                error.add_note(f"in {self.name}, {self.describe(self.now)}")
            raise

    def _run_blocks(self, given: list, barriers: bool) -> None:
        for block in self.blocks:
            self.blockIdx = Dim3(*block)
            self._block = block
            self._allocations: dict[tuple, SharedArray] = {}
            self._next_phase()
            if barriers:
                _CREW.run(self, given)
            else:
                for number in self.order:
                    self.switch_to(number)
                    self.kernel.fn(*given)

    def switch_to(self, number: int) -> None:
        """Make ``number`` the running thread."""
        self.threadIdx = self._dims[number]
        self.laneid = number % 32
        self.now = (number, self.phase, self._block)

    def _next_phase(self) -> None:
        self.phase += 1
        self.several = (None, self.phase, self._block)

    def end_phase(self, sites: list[tuple | None]) -> bool:
        """After every thread has stopped, at the barrier in ``sites`` or at its end (None): are any still waiting?"""
        waiting = {site for site in sites if site is not None}
        if not waiting:
            return False
        if len(waiting) > 1 or None in sites:
            places = []
            for site in sorted(waiting):
                at = [self.threads[number] for number in self.order if sites[number] == site]
                places.append(f"{len(at)} at line {site[1]} ({_few(at)})")
            gone = [self.threads[number] for number in self.order if sites[number] is None]
            if gone:
                places.append(f"{len(gone)} have returned ({_few(gone)})")
            raise KernelError(
                f"{self.name}, block {self._block}: the {len(sites)} threads do not meet at one barrier: "
                f"{', '.join(places)}"
            )
        self._next_phase()
        return True

    def syncthreads(self) -> None:
        """Wait for the block's other threads."""
        if self.running is None:
            raise KernelError(f"{self.name}: has a barrier where the strict simulator did not expect one")
        frame = sys._getframe(1)
        self.running.wait(self.now[0], (frame.f_code.co_filename, frame.f_lineno))

    def syncthreads_count(self, value) -> None:
        """Not simulated, because this project does not use it; the same holds for the other two."""
        raise NotImplementedError("the strict simulator knows syncthreads() only")

    syncthreads_and = syncthreads_or = syncthreads_count

    def _shared_array(self, shape, dtype, site: tuple) -> SharedArray:
        if site not in self._allocations:
            self._allocations[site] = SharedArray(self, shape, dtype)
        return self._allocations[site]


class _Arrays:
    """``cuda.shared`` or ``cuda.local``."""

    def __init__(self, make) -> None:
        self._make = make

    def array(self, shape, dtype, alignment=None):
        """Create the array; the alignment has no meaning in the simulator."""
        frame = sys._getframe(1)
        if not shape:
            raise NotImplementedError("the strict simulator knows shared memory of a fixed size only")
        return self._make(shape, dtype, (frame.f_code, frame.f_lasti))


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


class _Crew:
    """Operating system threads, one for each thread of a block; each sleeps until it gets the baton."""

    def __init__(self) -> None:
        self._batons: list[threading.Lock] = []
        self._main = _locked()
        self._launch: Launch

    def run(self, launch: Launch, arguments: list) -> None:
        """Run the current block of ``launch``; raises the error of its first thread that fails."""
        count = len(launch.threads)
        while len(self._batons) < count:
            self._batons.append(_locked())
            threading.Thread(target=self._work, args=(len(self._batons) - 1,), daemon=True).start()
        launch.running = self
        self._launch, self._arguments = launch, arguments
        self._sites: list[tuple | None] = [None] * count
        self._failure: BaseException | None = None
        self._position = 0
        self._go_on()
        self._main.acquire()
        if self._failure is not None:
            for number in [number for number in range(count) if self._sites[number] is not None]:
                self._batons[number].release()
                self._main.acquire()
            raise self._failure

    def wait(self, number: int, site: tuple) -> None:
        """Called by thread ``number`` at a barrier: run the others until it is this thread's turn again."""
        self._sites[number] = site
        try:
            self._pass_on()
        except KernelError:
            self._sites[number] = None  # this thread ends here and must not be woken
            raise
        self._batons[number].acquire()
        self._sites[number] = None
        if self._failure is not None:
            raise Abandoned

    def _pass_on(self) -> None:
        """Pass the baton to the next thread, or to the main one if the block is done."""
        self._position += 1
        if self._position == len(self._sites):
            if not self._launch.end_phase(self._sites):
                self._main.release()
                return
            self._position = 0
        self._go_on()

    def _go_on(self) -> None:
        number = self._launch.order[self._position]
        self._launch.switch_to(number)
        self._batons[number].release()

    def _work(self, number: int) -> None:
        """Run as thread ``number`` of one block after another."""
        while True:
            self._batons[number].acquire()
            try:
                self._launch.kernel.fn(*self._arguments)
                self._pass_on()
            except Abandoned:
                self._main.release()
            except BaseException as error:  # raised again in the main thread
                self._failure = error
                self._main.release()


_CREW = _Crew()


def _few(items: list) -> str:
    return ", ".join(map(str, items[:3])) + (", ..." if len(items) > 3 else "")


def _has_barrier(function: FunctionType, seen: set | None = None) -> bool:
    """Whether a kernel or a device function that it uses calls ``syncthreads``."""
    seen = set() if seen is None else seen
    if function in seen:
        return False
    seen.add(function)
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    if "syncthreads" in names:
        return True
    named = [function.__globals__.get(name) for name in names]
    named += [cell.cell_contents for cell in function.__closure__ or ()]
    return any(isinstance(one, simulator.FakeCUDAKernel) and _has_barrier(one.fn, seen) for one in named)


# Switching it on ----------------------------------------------------------------------------------------------------


class Guards:
    """The guard zones of all buffers in use."""

    def __init__(self) -> None:
        self._buffers: list[tuple[weakref.ref, tuple[int, ...], np.dtype]] = []

    def empty(self, shape: tuple[int, ...], dtype: type) -> FakeCUDAArray:
        """Allocate a buffer filled with NaN, with guard zones of NaN before and after it."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize * prod(shape)
        zones = -(-size // GUARD_BYTES) + 2
        whole = np.frombuffer(GUARD * zones, np.uint8).copy()
        self._buffers.append((weakref.ref(whole), shape, dtype))
        return FakeCUDAArray(whole[GUARD_BYTES : GUARD_BYTES + size].view(dtype).reshape(shape))

    def check(self, what: str) -> None:
        """Compare every zone; ``what`` names the launch that has just finished."""
        alive = []
        for buffer in self._buffers:
            reference, shape, dtype = buffer
            whole = reference()
            if whole is None:
                continue
            alive.append(buffer)
            end = GUARD_BYTES + dtype.itemsize * prod(shape)
            after = len(whole) - end
            if whole[:GUARD_BYTES].tobytes() != GUARD:
                raise KernelError(f"{what}: wrote before the {dtype} buffer of shape {shape}")
            if whole[end:].tobytes() != (GUARD + GUARD)[-after:]:
                raise KernelError(f"{what}: wrote past the end of the {dtype} buffer of shape {shape}")
        self._buffers = alive


def install(monkeypatch) -> Guards:
    """Make launches strict and guard the buffers of SimulatorRuntime until ``monkeypatch`` is undone."""
    guards = Guards()
    launches: Counter = Counter()
    plain_gemm = SimulatorRuntime.gemm

    def call(kernel, *arguments):
        running = simulator._get_kernel_context()
        if running is not None:  # a device function called by a kernel
            with simulator.swapped_cuda_module(kernel.fn, running):
                return kernel.fn(*arguments)
        grid, block = simulator.normalize_kernel_dimensions(kernel.grid_dim, kernel.block_dim)
        launch = Launch(kernel, grid, block, reverse=launches[kernel] % 2 == 1)
        launches[kernel] += 1
        with simulator._push_kernel_context(launch), simulator.swapped_cuda_module(kernel.fn, launch):
            launch.run(arguments)
        guards.check(launch.name)
        return None

    def gemm(runtime, m, n, k, a, b, c, *, batch=1, accumulate=False):
        for letter, operand, (rows, columns) in (("a", a, (m, k)), ("b", b, (k, n)), ("c", c, (m, n))):
            rows, columns = (columns, rows) if operand.transposed else (rows, columns)
            size = (rows - 1) * (operand.row or columns) + columns
            last = operand.offset + (batch - 1) * operand.stride + size
            if operand.offset < 0 or operand.stride < 0 or last > operand.buffer.size:
                raise KernelError(
                    f"gemm {m} x {n} x {k}, batch {batch}: operand {letter} takes elements {operand.offset} to {last} "
                    f"of a buffer of shape {tuple(operand.buffer.shape)}"
                )
        plain_gemm(runtime, m, n, k, a, b, c, batch=batch, accumulate=accumulate)
        guards.check("gemm")

    monkeypatch.setattr(simulator.FakeCUDAKernel, "__call__", call)
    monkeypatch.setattr(SimulatorRuntime, "empty", lambda runtime, shape, dtype: guards.empty(shape, dtype))
    monkeypatch.setattr(SimulatorRuntime, "gemm", gemm)
    return guards
