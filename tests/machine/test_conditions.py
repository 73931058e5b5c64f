"""What a run says about the machine's state around it."""

from types import SimpleNamespace

import pytest

from bench.machine import conditions as module
from bench.machine.conditions import condition_warnings, conditions, throttle_reasons

QUIET = {"cpu_busy_share": 0.01, "load_1_min": 0.1}


def test_a_quiet_machine_is_not_warned_about():
    assert condition_warnings(QUIET, QUIET) == []


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ({"cpu_busy_share": 0.6}, {}, "60 %"),
        ({}, {"gpu": {"throttle_reasons": ["software power cap"]}}, "held back: software power cap"),
        ({"gpu": {"memory_clock_mhz": 2600}}, {"gpu": {"memory_clock_mhz": 1600}}, "memory clock fell from 2,600"),
    ],
)
def test_what_disturbs_is_said(before, after, wanted):
    (warning,) = condition_warnings(QUIET | before, QUIET | after)
    assert wanted in warning


def test_the_cpu_is_asked_for_real():
    found = conditions("cpu")
    assert 0 <= found["cpu_busy_share"] <= 1
    assert "gpu" not in found


def test_nvml_is_asked_and_what_it_lacks_is_none(monkeypatch):
    class NVMLError(Exception):
        pass

    def refuse(*_):
        raise NVMLError

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetClockInfo=lambda gpu, which: 1000 * which,
        nvmlDeviceGetTemperature=refuse,
        nvmlDeviceGetPowerUsage=lambda gpu: 70_500,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: 0x1 | 0x40,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=5),
    )

    class Opened:
        def __enter__(self):
            return nvml, "gpu 0"

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(module, "nvml_gpu", Opened)
    assert conditions("gpu")["gpu"] == {
        "sm_clock_mhz": 1000,
        "memory_clock_mhz": 2000,
        "temperature_c": None,
        "power_w": 70.5,
        "throttle_reasons": ["hardware thermal slowdown"],
        "used_bytes": 5,
    }


def test_idling_is_no_throttling():
    assert throttle_reasons(0x1 | 0x2) == []
