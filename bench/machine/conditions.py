"""The state of the machine around a measurement: what it was doing, and how fast it was allowed to go.

Read right before the timed part and right after it, while a GPU is still warm. A machine that is busy, throttled or
clocked lower afterwards is not an error, but it is said aloud: ``condition_warnings`` turns the two readings into lines
for the table and the file.
"""

from __future__ import annotations

import os
from typing import Any

import psutil

from bench.machine.devices import nvml_gpu
from common.backend import Device

BUSY_SHARE = 0.25  # other processes' share of the cores, above which a CPU measurement is called disturbed
CLOCK_CHANGE = 0.05

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a GPU down (nvml.h, nvmlClocksEventReason*).
THROTTLE_REASONS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def conditions(device: Device) -> dict[str, Any]:
    """Load now; on a GPU also what NVML has: clocks, temperature, power and throttle reasons.

    What the system does not tell is None. ``cpu_busy_share`` is the cores' share in use over a fifth of a second, taken
    while nothing of a run is being timed.
    """
    cores = psutil.cpu_percent(interval=0.2, percpu=True)
    ours = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(len(cores))
    shares = [cores[core] / 100 for core in ours if core < len(cores)]
    found: dict[str, Any] = {
        "cpu_busy_share": round(sum(shares) / len(shares), 3) if shares else None,
        "load_1_min": round(psutil.getloadavg()[0], 2),
    }
    if device == "gpu":
        found["gpu"] = _gpu_conditions()
    return found


def _gpu_conditions() -> dict[str, Any]:
    with nvml_gpu() as (nvml, gpu):

        def ask(name: str, *arguments: Any) -> Any:
            try:
                return getattr(nvml, name)(gpu, *arguments)
            except (AttributeError, nvml.NVMLError):  # older driver or library, or a card that does not tell
                return None

        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:
            reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        power = ask("nvmlDeviceGetPowerUsage")
        return {
            "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "temperature_c": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power is None else power / 1000,
            "throttle_reasons": None if reasons is None else throttle_reasons(reasons),
            "used_bytes": nvml.nvmlDeviceGetMemoryInfo(gpu).used,
        }


def throttle_reasons(bits: int) -> list[str]:
    """NVML's bit mask in words; idling and clocks that an application set are not throttling."""
    return [text for bit, text in THROTTLE_REASONS.items() if bits & bit]


def condition_warnings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of the two readings should make a reader careful, a line each."""
    warnings = []
    busy = before["cpu_busy_share"]
    if busy is not None and busy > BUSY_SHARE:
        warnings.append(f"other work kept {100 * busy:.0f} % of the cores busy before the measurement began")
    gpu_before, gpu_after = before.get("gpu") or {}, after.get("gpu") or {}
    reasons = {*(gpu_before.get("throttle_reasons") or ()), *(gpu_after.get("throttle_reasons") or ())}
    if reasons:
        warnings.append(f"the GPU was held back: {', '.join(sorted(reasons))}")
    for name, key in (("memory clock", "memory_clock_mhz"), ("clock", "sm_clock_mhz")):
        first, last = gpu_before.get(key), gpu_after.get(key)
        # A clock that rises has only left its idle state.
        if first and last and last < (1 - CLOCK_CHANGE) * first:
            warnings.append(f"the GPU's {name} fell from {first:,} to {last:,} MHz")
    return warnings
