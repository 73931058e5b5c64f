"""The environment that a result is recorded with."""

import pytest

from bench.machine.environment import Environment, Gpu, describe_environment
from common.device import usable_cores

XEON = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 4, "threads": 2, "commit": "abc1234567"}


def test_a_machine_is_named_by_its_processor_or_gpu_and_never_by_its_host():
    on_cpu, on_gpu = Environment(**XEON), Environment(**XEON, gpu=Gpu("NVIDIA H200"))
    assert (on_cpu.machine_slug, on_gpu.machine_slug) == ("intel-xeon-4c", "nvidia-h200")
    assert (on_cpu.machine, on_gpu.machine) == ("Intel(R) Xeon(R) CPU @ 2.20GHz, 2 threads", "NVIDIA H200")


@pytest.mark.parametrize("wrong", [{"cores": 0}, {"threads": -1}, {"memory_bytes": -1}, {"host": "name"}])
def test_a_wrong_or_unknown_field_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Environment(**{**XEON, **wrong})


def test_this_machine():
    found = describe_environment("cpu", 1, ["convbench", "run"])
    assert found.cores == usable_cores()
    assert found.memory_bytes > 2**28
    assert found.libraries.keys() >= {"numpy", "numba", "scipy"}
    assert (found.threads, found.command_line, found.gpu) == (1, ["convbench", "run"], None)
