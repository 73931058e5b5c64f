"""The benchmark suite: each operation of a training step, and the network as a whole, by every version.

A version that has no separate operations is timed by whole stages, ``conv2-stage_forward``.

A plain test run takes each once, untimed, on a tiny network. To time the real one::

    python -m pytest tests/benchmarks --benchmark-only --backend v1 --backend v4 --device cpu

After warm-up rounds that take the compilation, a round is as many calls as last a few milliseconds, between two
readings of the device's own clock. The result that the timed calls left is asserted afterwards.
"""

import numpy as np

from common.cases import operation_case
from tests.benchmarks.network_cases import network_case, network_work


def test_operation(subject, settings, operation, measure):
    work = {work.id: work for work in subject.info.step_work(settings.architecture, settings.batch_size)}[operation]
    rng = np.random.default_rng(0)
    measure(work, operation_case(subject.backend, settings.architecture, work, settings.batch_size, rng))


def test_network(subject, settings, operation, device, measure):
    sizes = settings.batch_size, settings.epoch_pictures(device)
    rng = np.random.default_rng(0)
    case = network_case(subject.backend, settings.architecture, operation, *sizes, rng)
    measure(network_work(subject.info, settings.architecture, operation, *sizes), case)
