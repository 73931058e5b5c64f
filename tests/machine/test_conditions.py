"""The state of the machine around a measurement."""

from types import SimpleNamespace

import pytest

from bench.machine import conditions as module
from bench.machine.conditions import Conditions, ConditionsAround, GpuConditions, read_conditions, throttle_reasons
from bench.model import adapter


def around(before, after):
    quiet = {"cpu_busy_share": 0.01, "load_1_min": 0.1}
    return adapter(ConditionsAround).validate_python({"before": quiet | before, "after": quiet | after})


def test_an_idle_machine_causes_no_warning():
    assert around({}, {}).warnings() == []
    assert ConditionsAround(Conditions(), Conditions()).warnings() == []


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ({"cpu_busy_share": 0.6}, {}, "60 %"),
        ({}, {"gpu": {"throttle_reasons": ["software power cap"]}}, "throttled: software power cap"),
        (
            {"gpu": {"memory_clock_mhz": 2600}},
            {"gpu": {"memory_clock_mhz": 1600}},
            "memory clock fell from 2,600 to 1,600",
        ),
        ({"gpu": {"sm_clock_mhz": 1980}}, {"gpu": {"sm_clock_mhz": 1200}}, "clock fell from 1,980 to 1,200"),
    ],
)
def test_a_disturbance_causes_one_warning(before, after, wanted):
    (warning,) = around(before, after).warnings()
    assert wanted in warning


@pytest.mark.parametrize(
    ("before", "after"),
    [(300, 1980), (1980, 1950), (None, 1200), (1980, None)],
    ids=["rises", "about equal", "unknown before", "unknown after"],
)
def test_a_clock_that_does_not_fall_causes_none(before, after):
    assert around({"gpu": {"sm_clock_mhz": before}}, {"gpu": {"sm_clock_mhz": after}}).warnings() == []


def test_the_conditions_of_this_cpu():
    found = read_conditions("cpu")
    assert 0 <= found.cpu_busy_share <= 1
    assert found.load_1_min >= 0
    assert found.gpu is None


def test_a_value_that_nvml_refuses_is_none(monkeypatch):
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
    assert read_conditions("gpu").gpu == GpuConditions(
        sm_clock_mhz=1000,
        memory_clock_mhz=2000,
        temperature_c=None,
        power_w=70.5,
        throttle_reasons=["hardware thermal slowdown"],
        used_bytes=5,
    )


def test_an_idle_gpu_is_not_throttled():
    assert throttle_reasons(0x1 | 0x2) == []
