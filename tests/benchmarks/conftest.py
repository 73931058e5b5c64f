"""Every version is verified before any of its benchmarks; what the machine is goes into the saved file."""

import pytest

from bench.environment import describe_environment, usable_cores
from common.architecture import autoencoder
from common.device import device_status
from common.verify import verify
from versions.registry import find


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config, machine_info):
    device = "gpu" if device_status("gpu").available else "cpu"
    machine_info["convbench"] = describe_environment(device, usable_cores(), ["pytest", *config.invocation_params.args])


@pytest.fixture(scope="session")
def verified():
    """A function that gives a verified backend, and fails the test if verification fails."""
    backends = {}

    def get(name, device):
        if (name, device) not in backends:
            status = device_status(device)
            if not status.available:
                pytest.skip(status.reason)
            backend = find(name).load(device)
            failures = [check for check in verify(backend, autoencoder(), batch_sizes=(64,)) if not check.passed]
            assert failures == [], "not timed: it failed its verification"
            backends[name, device] = backend
        return backends[name, device]

    return get
