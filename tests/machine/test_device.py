"""Which GPU is used, and the error where there is none. A stand-in replaces NVML."""

import os
import sys
from types import SimpleNamespace

import pytest

from bench.machine.devices import (
    ROOT,
    child_environment,
    choose_device,
    cpu_cache_bytes,
    device_status,
    nvml_gpu,
    probe_gpu,
)
from common.device import usable_cores
from common.errors import UsageError


@pytest.fixture
def nvml(monkeypatch):
    """Two GPUs, and a count of how often NVML is open."""
    stand_in = SimpleNamespace(open=0)
    stand_in.nvmlInit = lambda: setattr(stand_in, "open", stand_in.open + 1)
    stand_in.nvmlShutdown = lambda: setattr(stand_in, "open", stand_in.open - 1)
    stand_in.nvmlDeviceGetHandleByIndex = lambda index: ["first", "second"][index]
    stand_in.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-b": "second"}[uuid]
    stand_in.nvmlDeviceGetName = lambda gpu: f"NVIDIA {gpu}"
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    return stand_in


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "first"), ("0,1", "first"), ("1", "second"), ("GPU-b", "second")]
)
def test_cuda_visible_devices_selects_the_gpu(nvml, monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with nvml_gpu() as (_, gpu):
        assert gpu == expected
        assert nvml.open == 1
    assert nvml.open == 0


@pytest.mark.parametrize("visible", ["", "-1"])
def test_the_error_says_that_the_gpus_are_hidden(nvml, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (probe,) = probe_gpu()
    assert not probe.ok
    assert "hides every GPU" in probe.detail
    with pytest.raises(UsageError, match="hides every GPU"):
        choose_device("gpu")
    assert choose_device("auto").device == "cpu"


def test_a_driver_without_cuda_packages_says_what_to_install(nvml, monkeypatch):
    """Only the driver is a stand-in; another process tries the rest and finds no GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    status = device_status("gpu")
    if status.available:
        pytest.skip("this machine has a GPU")
    assert status.reason


def test_a_cpu_is_always_available():
    assert device_status("cpu").available
    assert choose_device("cpu").name
    assert cpu_cache_bytes() is None or cpu_cache_bytes() >= 2**15
    assert usable_cores() >= 1


@pytest.mark.parametrize("given", [None, "", "/somewhere"])
def test_child_processes_import_from_the_suite_and_not_from_the_current_folder(monkeypatch, given):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHONPATH", given)
    environment = child_environment()
    entries = environment["PYTHONPATH"].split(os.pathsep)
    assert entries[0] == str(ROOT)
    assert entries[1:] == ([given] if given else [])
    assert environment["PYTHONSAFEPATH"] == "1"
