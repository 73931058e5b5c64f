"""Every version is verified before any of its benchmarks, and every figure is judged before it is kept."""

from __future__ import annotations

from math import ceil

import pytest

from bench.machine.timers import seconds_of
from common.operands import Case
from common.operations import OperationWork
from common.verify import verify
from tests.benchmarks.figures import MeasuredCeilings, Subject, about, judged
from tests.benchmarks.network_cases import NETWORK_CASES
from tests.benchmarks.options import SETTINGS, Settings, cases, group, operation_names
from tests.benchmarks.timing import cache_clearer, device_timer, iterations_for, kernel_registers, timed_call
from versions.registry import find

WARM_UP_ROUNDS = 2
MOST_COLD_ROUNDS = 20  # clearing the caches takes longer than what is timed


def pytest_generate_tests(metafunc):
    if "operation" in metafunc.fixturenames:
        settings = metafunc.config.stash[SETTINGS]
        single = metafunc.function.__name__ == "test_operation"
        names = operation_names if single else lambda settings, version: NETWORK_CASES
        metafunc.parametrize(("version", "device", "operation", "cache"), cases(settings, names))


@pytest.fixture(scope="session")
def settings(request) -> Settings:
    """What was asked for on the command line."""
    return request.config.stash[SETTINGS]


@pytest.fixture(scope="session")
def subjects():
    """The versions verified so far in this session."""
    return {}


@pytest.fixture
def subject(request, subjects, settings, version, device) -> Subject:
    """The version under test; the test fails if it fails its verification.

    Whatever asks for it has to do so before it asks for ``benchmark``, which takes its clock from the marker set here.
    """
    if (version, device) not in subjects:
        info = find(version)
        threads = settings.threads if device == "cpu" else None
        backend = info.load(device, precision=info.effective_precision(device, settings.precision), threads=threads)
        if settings.tiny:
            checks = verify(backend, small=True)
        else:
            checks = verify(backend, settings.architecture, batch_sizes=settings.batch_sizes(device))
        subjects[version, device] = info, backend, checks
    info, backend, checks = subjects[version, device]
    assert [check for check in checks if not check.passed] == [], "not timed: it failed its verification"
    request.node.add_marker(pytest.mark.benchmark(timer=device_timer(backend), disable_gc=True))
    return Subject(info, backend, len(checks))


@pytest.fixture(scope="session")
def ceilings(settings):
    return MeasuredCeilings(settings.threads)


@pytest.fixture
def measure(request, settings, subject, ceilings, benchmark, version, device, operation, cache):
    """A function that times a case, asserts its result, and says what the figure means."""

    def measure(work: OperationWork, case: Case) -> None:
        backend = subject.backend
        benchmark.group = group(settings, version, device, operation, cache)
        benchmark.extra_info.update(about(subject, settings, work, cache))
        call = timed_call(backend, case.call)
        clear = cache_clearer(backend) if cache == "cold" else None
        rounds = iterations = 1
        if benchmark.enabled:
            seconds = seconds_of(device_timer(backend), call)
            iterations = 1 if clear else iterations_for(seconds)
            rounds = ceil(float(request.config.getoption("benchmark_max_time")) / (seconds * iterations))
            rounds = max(
                min(rounds, MOST_COLD_ROUNDS) if clear else rounds, request.config.getoption("benchmark_min_rounds")
            )
            benchmark.extra_info["registers"] = kernel_registers(backend, case.call)
            case.poison()  # nothing of the warm-up is left to be mistaken for a result
        benchmark.pedantic(call, setup=clear, rounds=rounds, iterations=iterations, warmup_rounds=WARM_UP_ROUNDS)
        try:
            checks = case.check()
            failures = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
            assert failures == [], "what the timed calls left is wrong"
            benchmark.extra_info.update(verified=True, checks=subject.checks + len(checks))
            if benchmark.enabled:
                figure = judged(work, benchmark.stats.stats.median, ceilings, backend)
                benchmark.extra_info.update(figure)
                assert figure["suspicious"] is None
        except BaseException:
            benchmark.has_error = True  # keeps the figure out of every file
            raise

    return measure
