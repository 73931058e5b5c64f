"""What prepared launches need of numba-cuda beyond its documented interface: a new version may move it."""

import importlib.metadata
import inspect

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda has no wheel for this platform")

from numba import cuda
from numba.cuda import codegen, dispatcher

from common.device import in_simulator
from common.gpu_launch import FORMATS, IdentityCache, Tape, padded

VERSION = importlib.metadata.version("numba-cuda")
SEE = "launches are now Numba's own and slow; adapt common/gpu_launch.py"


@pytest.mark.skipif(in_simulator(), reason="the simulator has none of this")
def test_numba_cuda_still_has_what_prepared_launches_need():
    kernel = getattr(dispatcher, "_Kernel", None)
    assert kernel is not None, f"numba-cuda {VERSION}: numba.cuda.dispatcher._Kernel is gone; {SEE}"
    for name in ("argument_types", "library", "_prepare_args"):
        assert hasattr(kernel, name), f"numba-cuda {VERSION}: _Kernel.{name} is gone; {SEE}"
    found = list(inspect.signature(kernel._prepare_args).parameters)
    expected = ["self", "ty", "val", "stream", "retr", "kernelargs"]
    assert found == expected, f"numba-cuda {VERSION}: _Kernel._prepare_args takes {found}, not {expected}; {SEE}"
    library = codegen.CUDACodeLibrary
    assert hasattr(library, "get_cufunc"), f"numba-cuda {VERSION}: CUDACodeLibrary.get_cufunc is gone; {SEE}"
    source = inspect.getsource(dispatcher)
    assert "pre_launch_callbacks" in source, f"numba-cuda {VERSION}: pre_launch_callbacks is gone; {SEE}"


@pytest.mark.skipif(in_simulator(), reason="the simulator has no types")
def test_each_format_is_the_name_of_a_numba_type():
    from numba.cuda import types

    kinds = (types.boolean, types.int32, types.int64, types.float32, types.float64)
    assert [str(kind) for kind in kinds] == list(FORMATS), f"numba-cuda {VERSION}: types have other names; {SEE}"
    assert isinstance(cuda.jit(lambda: None), dispatcher.CUDADispatcher)


def test_a_launch_shape_has_three_dimensions():
    assert padded((5,)) == (5, 1, 1)
    assert padded((5, 4, 3)) == (5, 4, 3)


class Thing:
    pass


def test_a_cache_entry_goes_with_any_of_its_objects():
    cache, first, second = IdentityCache(), Thing(), Thing()
    cache.keep((id(first), id(second)), "both", [first, second])
    cache.keep((id(second),), "one", [second])
    assert cache.get((id(first), id(second)))[0] == "both"
    del first
    assert [entry[0] for entry in cache.values()] == ["one"]
    del second
    assert not cache


def test_a_recording_that_fails_ends():
    tape = Tape()

    def fails():
        tape.calls.append(print)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tape.record(fails)
    assert tape.record(lambda: None) == []
