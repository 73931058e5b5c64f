"""The state of the machine around a measurement: its load, and the clocks of the GPU.

A busy machine, or a GPU that is throttled or clocked lower afterwards, is not an error; table and file have a warning.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
from pydantic.dataclasses import dataclass

from bench.machine.devices import nvml_gpu
from bench.model import CHECKED
from common.backend import Device

BUSY_SHARE = 0.25  # of the cores
CLOCK_CHANGE = 0.05

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a GPU down (nvml.h, nvmlClocksEventReason*).
THROTTLE_REASONS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(config=CHECKED)
class GpuConditions:
    """One reading of NVML; None where the card or the driver does not report a value."""

    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    throttle_reasons: list[str] | None = None
    used_bytes: int | None = None


@dataclass(config=CHECKED)
class Conditions:
    """One reading of the load; None where the system does not report a value."""

    cpu_busy_share: float | None = None
    """Share of the usable cores in use, over 0.2 s in which nothing was timed."""
    load_1_min: float | None = None
    gpu: GpuConditions | None = None


@dataclass(config=CHECKED)
class ConditionsAround:
    """The conditions immediately before and after the timed part."""

    before: Conditions
    after: Conditions

    def warnings(self) -> list[str]:
        """Reasons to distrust the measurement, one line each."""
        warnings = []
        busy = self.before.cpu_busy_share
        if busy is not None and busy > BUSY_SHARE:
            warnings.append(f"other work kept {100 * busy:.0f} % of the cores busy before the measurement began")
        before, after = self.before.gpu or GpuConditions(), self.after.gpu or GpuConditions()
        if reasons := {*(before.throttle_reasons or ()), *(after.throttle_reasons or ())}:
            warnings.append(f"the GPU was throttled: {', '.join(sorted(reasons))}")
        for name, first, last in (
            ("memory clock", before.memory_clock_mhz, after.memory_clock_mhz),
            ("clock", before.sm_clock_mhz, after.sm_clock_mhz),
        ):
            # A rising clock only leaves the idle state.
            if first and last and last < (1 - CLOCK_CHANGE) * first:
                warnings.append(f"the GPU's {name} fell from {first:,} to {last:,} MHz")
        return warnings


def read_conditions(device: Device) -> Conditions:
    """Read the load now; on a GPU also NVML's clocks, temperature, power and throttle reasons."""
    cores = psutil.cpu_percent(interval=0.2, percpu=True)
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cores))
    shares = [cores[core] / 100 for core in ours if core < len(cores)]
    return Conditions(
        cpu_busy_share=round(sum(shares) / len(shares), 3) if shares else None,
        load_1_min=round(psutil.getloadavg()[0], 2),
        gpu=_gpu_conditions() if device == "gpu" else None,
    )


def _gpu_conditions() -> GpuConditions:
    with nvml_gpu() as (nvml, gpu):

        def ask(name: str, *arguments: Any) -> Any:
            try:
                return getattr(nvml, name)(gpu, *arguments)
            except (AttributeError, nvml.NVMLError):  # an older driver or library, or an unsupported value
                return None

        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:
            reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        power = ask("nvmlDeviceGetPowerUsage")
        return GpuConditions(
            sm_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            memory_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power is None else power / 1000,
            throttle_reasons=None if reasons is None else throttle_reasons(reasons),
            used_bytes=nvml.nvmlDeviceGetMemoryInfo(gpu).used,
        )


def throttle_reasons(bits: int) -> list[str]:
    """NVML's bit mask in words; an idle GPU, or a clock set by an application, is not throttling."""
    return [text for bit, text in THROTTLE_REASONS.items() if bits & bit]
