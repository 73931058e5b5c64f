"""``convbench doctor`` with a GPU: on the stub driver, which computes nothing, and with libraries missing."""

import importlib.util
import re

import pytest

from bench.commands.doctor import doctor_command
from bench.machine import devices
from bench.machine.devices import GPU_INSTALL_HINT, device_status, probe_gpu
from bench.machine.gpu_probes import matching_versions
from tests.stub.driver import compiler, stub_environment

needs_stub = pytest.mark.skipif(
    compiler() is None or importlib.util.find_spec("numba_cuda") is None,
    reason="the stub driver needs a C compiler, and numba-cuda a wheel for this platform",
)

HIDE = """
import cuda.pathfinder as pathfinder

load = pathfinder.load_nvidia_dynamic_lib

def without(name):
    if name == "{name}":
        raise pathfinder.DynamicLibNotFoundError("no {name} here")
    return load(name)

pathfinder.load_nvidia_dynamic_lib = without
"""


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A machine on which NVML finds a GPU and CUDA the stub driver; the environment of its processes may be changed."""
    from cuda.bindings import nvjitlink

    major, minor = nvjitlink.version()
    versions = {"STUB_DRIVER_VERSION": f"{major + 1}000", "STUB_RUNTIME_VERSION": f"{1000 * major + 10 * minor}"}
    environment = stub_environment(tmp_path) | versions
    monkeypatch.setattr(devices, "_driver", lambda: "Stub")
    monkeypatch.setattr(devices, "child_environment", lambda: environment)
    return environment


def found(probes):
    return {probe.what: (probe.ok, probe.detail) for probe in probes}


@needs_stub
def test_doctor_finds_that_nothing_is_computed(stub, capsys):
    doctor_command()
    lines = capsys.readouterr().out.splitlines()
    gpu = [line.partition("GPU, ")[2] for line in lines if "GPU, " in line]
    marks = [line.split()[0] for line in lines if "GPU, " in line]
    assert marks == ["yes", "yes", "yes", "yes", "yes", "no", "no"]
    assert re.fullmatch(r"CUDA versions: driver \d+\.0, numba-cuda's linker (\d+\.\d+), CuPy \1", gpu[4])
    assert gpu[5].startswith("a kernel: wrong result, by up to 3")
    assert gpu[6].startswith("a product by cuBLAS: wrong result")
    assert not any("pip install" in line for line in gpu)


@needs_stub
def test_a_run_asks_only_whether_the_libraries_load(stub):
    assert device_status("gpu").available
    assert list(found(probe_gpu())) == ["NVIDIA driver", "numba-cuda", "CuPy", "cuBLAS through CuPy"]


@needs_stub
@pytest.mark.parametrize("name", ["nvvm", "nvJitLink"])
def test_a_missing_compiler_and_an_old_driver_are_found(stub, tmp_path, name):
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(name=name))
    stub.update(PYTHONPATH=f"{tmp_path}:{stub['PYTHONPATH']}", STUB_DRIVER_VERSION="11080")
    probes = found(probe_gpu(thorough=True))
    assert probes["numba-cuda"][0]
    ok, detail = probes["a kernel"]
    assert not ok
    assert detail.endswith(GPU_INSTALL_HINT)
    assert "wrong result" not in detail
    assert "wrong result" in probes["a product by cuBLAS"][1]
    ok, detail = probes["CUDA versions"]
    assert not ok
    assert "no nvJitLink here" in detail if name == "nvJitLink" else "the driver is older than the lib" in detail


def test_versions_that_do_not_match_are_named():
    assert matching_versions((13, 0), {"a": (12, 9), "b": (12, 4)}) == "driver 13.0, a 12.9, b 12.4"
    with pytest.raises(RuntimeError, match=r"driver 13\.0, a 12\.9, b 13\.0: numba-cuda and CuPy do not match"):
        matching_versions((13, 0), {"a": (12, 9), "b": (13, 0)})
    with pytest.raises(RuntimeError, match="the driver is older than the libraries"):
        matching_versions((12, 8), {"a": (13, 0), "b": (13, 0)})
