"""Builds the stub driver, makes the environment in which a process finds it, and reads what it recorded there."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.machine.devices import child_environment

HERE = Path(__file__).parent
LIBRARY = "libcuda.so.1"
MARK = "CONVBENCH_STUB_DRIVER"
"""Set in a process that runs on the stub."""

MOST_PARAMETERS = 192


def compiler() -> str | None:
    """A C compiler of this machine; None if it has none."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def stub_environment(folder: Path) -> dict[str, str]:
    """Build the driver in ``folder``; returns the environment of a process that is to use it and the fake CuPy."""
    source = HERE / "driver.c"
    build = [compiler(), "-shared", "-fPIC", "-O1", "-o", str(folder / LIBRARY), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=60)
    environment = child_environment()

    def first(entry: object, variable: str) -> str:
        return os.pathsep.join(filter(None, [str(entry), environment.get(variable)]))

    environment.pop("NUMBA_ENABLE_CUDASIM", None)
    return {
        **environment,
        MARK: "1",
        "LD_LIBRARY_PATH": first(folder, "LD_LIBRARY_PATH"),
        "PYTHONPATH": first(HERE / "fake", "PYTHONPATH"),
    }


@dataclass(frozen=True)
class Launched:
    """A launch as the driver saw it; ``values`` are the arguments' bytes as numbers, ``sizes`` their lengths."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    sizes: tuple[int, ...]
    values: tuple[int, ...]


class _Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("shape", ctypes.c_uint32 * 6),
        ("shared_bytes", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("bytes", ctypes.c_uint32 * MOST_PARAMETERS),
        ("values", ctypes.c_uint64 * MOST_PARAMETERS),
    )


class Driver:
    """The stub of this process."""

    def __init__(self) -> None:
        """Open the library that the process has loaded."""
        self._library = ctypes.CDLL(LIBRARY)

    def launches(self) -> list[Launched]:
        """The launches since ``forget``, in order."""
        found = ctypes.POINTER(_Launch)()
        count = self._library.stub_launches(ctypes.byref(found))
        return [
            Launched(
                each.name.decode(),
                tuple(each.shape[:3]),
                tuple(each.shape[3:]),
                each.shared_bytes,
                each.stream,
                tuple(each.bytes[: each.count]),
                tuple(each.values[: each.count]),
            )
            for each in found[:count]
        ]

    def forget(self) -> None:
        """Forget the launches."""
        self._library.stub_forget()

    def libraries(self) -> int:
        """How much compiled code was loaded so far: one for each kernel and set of argument types."""
        return self._library.stub_libraries()

    def refuse(self, result: int) -> None:
        """Let every launch fail with this ``CUresult``; with 0 they succeed again."""
        self._library.stub_refuse(result)
