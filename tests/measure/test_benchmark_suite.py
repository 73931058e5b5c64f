"""The benchmark suite itself: its options and names, its clocks, what it refuses, and what its files say."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bench.machine import timers
from bench.machine.ceilings import Ceilings
from bench.machine.devices import ROOT, DeviceStatus
from bench.machine.environment import Environment, Gpu
from common.architecture import autoencoder
from common.cases import operation_case
from common.errors import UsageError
from common.operations import METHODS, OperationWork, step_work
from common.training import Trainer
from tests import broken
from tests.benchmarks import figures, options, timing
from tests.benchmarks.network_cases import NETWORK_CASES, network_case, network_work
from tests.benchmarks.options import SETTINGS, cases, choose, group, operation_names
from versions.registry import find, names

TINY = autoencoder((8, 8), (5, 4))
BATCH = 6


# Options and names --------------------------------------------------------------------------------------------------


def asked(**given):
    """A pytest configuration as the command line would leave it."""
    values = {
        "benchmark_enable": True,
        "benchmark_disable": True,
        **{f"convbench_{name}": None for name in ("backend", "device", "threads", "epoch_pictures", "cache")},
        "convbench_math": "fp32",
        "convbench_network": "full",
        "convbench_batch_size": 64,
        **{name if name.startswith("benchmark") else f"convbench_{name}": value for name, value in given.items()},
    }
    return SimpleNamespace(getoption=lambda name, default=None: values.get(name, default), stash={}, rootpath=ROOT)


def with_gpu(monkeypatch, available=True):
    """Say that there is a GPU, or why not."""
    gpu = DeviceStatus("gpu", available, "NVIDIA H200" if available else "", "" if available else "no driver")
    statuses = {"cpu": DeviceStatus("cpu", True, "AMD EPYC"), "gpu": gpu}
    monkeypatch.setattr(options, "status_of", statuses.get)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As if this were not one of several processes, in which nothing is timed."""
    monkeypatch.setattr(options, "PARALLEL", False)


def ids(settings, operations):
    return [case.id for case in cases(settings, lambda settings, version: operations)]


def test_all_that_can_run_by_default(monkeypatch):
    with_gpu(monkeypatch)
    settings = choose(asked())
    assert [info.name for info in settings.versions] == names()
    assert settings.devices == ("cpu", "gpu")
    assert settings.caches == ("warm",)
    assert settings.architecture == autoencoder()
    assert settings.batch_size == 64
    assert settings.epoch_pictures("gpu") == 2_048


def test_untimed_it_is_always_the_tiny_network():
    settings = choose(asked(benchmark_enable=False, batch_size=32))
    assert settings.architecture.parameter_count < 1_000
    assert settings.batch_sizes("cpu") == [5, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backend": ["v1", "v9"]}, "unknown backend 'v9': choose from v1, v2, v3, v4, v5, all"),
        ({"device": ["tpu"]}, "unknown device 'tpu': choose from cpu, gpu"),
        ({"device": ["gpu"]}, "--device gpu cannot run here: no driver"),
        ({"cache": ["hot"]}, "unknown cache 'hot': choose from warm, cold"),
        ({"math": "fp64"}, "unknown math 'fp64': choose from fp32, tf32"),
        ({"network": "huge"}, "unknown network 'huge': choose from full, tiny"),
        ({"threads": 0}, "--threads 0: choose from 1 to"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"epoch_pictures": -1}, "--epoch-pictures -1: must be at least 1"),
    ],
)
def test_a_wrong_value_is_named(monkeypatch, given, message):
    with_gpu(monkeypatch, available=False)
    with pytest.raises(UsageError, match=message):
        choose(asked(**given))


def test_ids_and_groups(monkeypatch):
    with_gpu(monkeypatch)
    settings = choose(asked(backend=["v2", "v4"], device=["cpu", "gpu"], math="tf32", cache=["warm", "cold"]))
    found = ids(settings, ["conv2-backward_filter", "step"])
    assert found[:2] == ["v2-cpu-conv2-backward_filter", "v4-cpu-conv2-backward_filter"]
    assert {"v2-cpu-step", "v2-cpu-step-cold", "v2-gpu-step", "v4-gpu-step-tf32", "v4-gpu-step-tf32-cold"} < set(found)
    assert group(settings, "v2", "gpu", "step", "warm") == "gpu step"
    assert group(settings, "v4", "gpu", "step", "cold") == "gpu step tf32 cold"


def test_another_size_has_another_name(monkeypatch):
    """Tools compare benchmarks of the same name."""
    with_gpu(monkeypatch, available=False)
    other = choose(asked(backend=["v2"], device=["cpu"], batch_size=8, epoch_pictures=12))
    assert ids(other, ["step", "epoch"]) == ["v2-cpu-step-batch8", "v2-cpu-epoch-batch8-12pictures"]
    tiny = choose(asked(backend=["v2"], device=["cpu"], network="tiny"))
    assert ids(tiny, ["step"]) == ["v2-cpu-step-tiny"]
    untimed = choose(asked(backend=["v2"], device=["cpu"], benchmark_enable=False))
    assert ids(untimed, ["step"]) == ["v2-cpu-step"]


def test_without_a_gpu_its_benchmarks_are_skipped_with_the_reason(monkeypatch):
    with_gpu(monkeypatch, available=False)
    found = cases(choose(asked()), lambda settings, version: ["step"])
    marks = {case.id: {mark.name: mark for mark in case.marks} for case in found}
    assert marks["v1-cpu-step"] == {}
    assert set(marks["v1-gpu-step"]) == {"gpu", "skip"}
    assert marks["v1-gpu-step"]["skip"].kwargs == {"reason": "no driver"}


def test_every_operation_of_a_step_is_there():
    settings = choose(asked(device=["cpu"]))
    found = operation_names(settings, find("v4"))
    assert len(found) == len(set(found)) == 30
    assert "conv2-stage_backward" not in found
    stages = operation_names(settings, find("v5"))
    assert len(stages) == len(set(stages)) == 13  # two for each stage; gather, loss and SGD
    assert "conv2-stage_backward" in stages
    timed = cases(settings, operation_names)
    assert [case.values[0] for case in timed if case.values[2] == "conv2-stage_backward"] == ["v5"]
    assert [case.values[0] for case in timed if case.values[2] == "conv2-forward"] == ["v1", "v2", "v3", "v4"]
    assert [case.values[0] for case in timed if case.values[2] == "step-sgd"] == names()


# Clocks -------------------------------------------------------------------------------------------------------------


class Events:
    """Stands in for ``cupy.cuda``: a stream whose clock goes on as work is queued, and events on it."""

    def __init__(self):
        self.stream = SimpleNamespace(milliseconds=0.0)
        self.waited_for = []

    def Event(self):  # noqa: N802
        events = self

        class Event:
            def record(self, stream):
                self.at = stream.milliseconds

            def synchronize(self):
                events.waited_for.append(self)

        return Event()

    def get_elapsed_time(self, start, end):
        assert end in self.waited_for, "asked before the device was there"
        return end.at - start.at


def test_the_event_clock_waits_for_the_later_event_and_counts_seconds():
    events = Events()
    clock = timers.EventTimer(events.stream, events)
    start = clock()
    events.stream.milliseconds += 250.0
    end = clock()
    assert events.waited_for == []
    assert end - start == 0.25
    assert events.waited_for == [end.event]


def test_an_estimate_leaves_the_first_call_out():
    events = Events()
    durations = iter([1_000.0, 3.0, *[2.0] * 100])

    def call():
        events.stream.milliseconds += next(durations)

    assert timers.seconds_of(timers.EventTimer(events.stream, events), call) == pytest.approx(0.002)


@pytest.mark.parametrize(("seconds", "iterations"), [(1.0, 1), (0.005, 1), (0.002, 3), (1e-5, 500), (0.0, 10_000)])
def test_a_round_lasts_long_enough(seconds, iterations):
    assert timing.iterations_for(seconds) == iterations


def test_a_gpus_cache_is_overwritten_on_the_backends_stream(monkeypatch):
    class Stream:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    queued = []

    def empty(size, dtype):
        data = SimpleNamespace(memset_async=lambda *arguments: queued.append(arguments))
        return SimpleNamespace(nbytes=size, data=data)

    device = SimpleNamespace(attributes={"L2CacheSize": 50})
    cupy = SimpleNamespace(empty=empty, cuda=SimpleNamespace(Device=lambda: device))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    backend = SimpleNamespace(device="gpu", runtime=SimpleNamespace(stream=Stream()))
    timing.cache_clearer(backend)()
    assert queued == [(0, 200, backend.runtime.stream)]


def test_a_cpus_cache_is_overwritten(monkeypatch):
    monkeypatch.setattr(timing, "cpu_cache_bytes", lambda: 4_096)
    seen = []
    overwrite = timing._overwrite_and_read()

    def spy(vector, value, sums):
        overwrite(vector, value, sums)
        seen.append((vector.nbytes, vector.min(), vector.max(), sums.tolist()))

    monkeypatch.setattr(timing, "_overwrite_and_read", lambda: spy)
    clear = timing.cache_clearer(SimpleNamespace(device="cpu", threads=2))
    clear()
    clear()
    assert seen == [(8_192, 1, 1, [128, 128]), (8_192, 2, 2, [256, 256])]


def test_registers_of_the_kernels_that_a_call_launches():
    def kernel(name, registers):
        function = SimpleNamespace(__name__=name)
        return SimpleNamespace(py_func=function, get_regs_per_thread=lambda: registers)

    class Gpu:
        device = "gpu"

        def __init__(self):
            self.launched = []

        def launch_grid(self, kernel, grid, block, *arguments):
            self.launched.append(kernel)

        def synchronize(self):
            pass

    backend, forward, sum_shares = Gpu(), kernel("forward", {"a": 96, "b": 40}), kernel("sum_shares", {"a": 24})

    def call():
        backend.launch_grid(forward, (1,), (256,))
        backend.launch_grid(sum_shares, (1,), (256,))

    assert timing.kernel_registers(backend, call) == {"forward": 96, "sum_shares": 24}
    assert backend.launched == [forward, sum_shares]
    assert "launch_grid" not in vars(backend)
    assert timing.kernel_registers(broken.PlainBackend(), call) is None


# Results ------------------------------------------------------------------------------------------------------------

MADE_WRONG = (
    "conv2d_forward",
    "conv2d_backward_data",
    "conv2d_backward_filter",
    "conv2d_backward_bias",
    "mse_loss",
    "sgd",
    "gather_batch",
    "maxpool_forward",
    "upsample_forward",
)


def changed_operations(make):
    """The operations that a wrong backend gets wrong; one that does not wait gets all of them wrong."""
    return {METHODS[name] for name in MADE_WRONG if name in vars(make)} or {METHODS["conv2d_forward"]}


# Wrong in ways that one call without NaN does not show; verification, which comes first, finds them.
NOT_SEEN_HERE = (
    broken.ReluDropsNaN,
    broken.SpreadsNaN,
    broken.DiffersFromRunToRun,
    broken.BreaksItsWorkspace,
    # The suite times operations, and whole steps; what a stage fuses is verified before.
    broken.FusesPoolingWithoutTheLastValue,
    broken.FusesPoolingThatDropsNaN,
    broken.FusesUpsamplingShifted,
)


def failures(backend, operation, architecture=TINY):
    """What is wrong after an operation was called a few times, as the benchmarks call it."""
    case = operation_case(backend, architecture, operation, BATCH, np.random.default_rng(3))
    call = timing.timed_call(backend, case.call)
    call()
    case.poison()
    call()
    call()
    return [check for check in case.check() if not check.passed]


@pytest.mark.parametrize("make", broken.RIGHT)
def test_right_results_pass(make):
    for work in step_work(TINY, BATCH):
        assert failures(make(), work) == [], work.id


@pytest.mark.parametrize("make", [make for make in broken.WRONG if make not in NOT_SEEN_HERE])
def test_a_wrong_result_fails(make):
    architecture = autoencoder((8, 8), (12, 10))  # more than a thousand parameters: one of them looks no further
    changed = changed_operations(make)
    if make is broken.RoutesTiesToTheLast:
        changed = {METHODS["relu_maxpool_backward"]}
    wrong = [part for part in step_work(architecture, BATCH) if part.operation in changed]
    assert wrong
    assert any(failures(make(), work, architecture) for work in wrong)


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="conv9-forward is no operation of this network"):
        operation_case(
            broken.PlainBackend(), TINY, OperationWork("conv9", "forward", 1, 1), BATCH, np.random.default_rng(0)
        )
    with pytest.raises(ValueError, match="unknown case 'decode': choose from step, epoch, forward, encode"):
        network_case(broken.PlainBackend(), TINY, "decode", BATCH, BATCH, np.random.default_rng(0))


def network_failures(backend, name, architecture=TINY):
    case = network_case(backend, architecture, name, BATCH, 2 * BATCH + 1, np.random.default_rng(3))
    case.call()
    case.poison()
    case.call()
    return [check for check in case.check() if not check.passed]


@pytest.mark.parametrize("name", NETWORK_CASES)
def test_the_network_as_a_whole(name):
    assert network_failures(broken.PlainBackend(), name) == []
    assert network_failures(broken.IgnoresRelu(), name) != []


def test_an_epoch_of_one_batch_only_fails(monkeypatch):
    def run_epoch(trainer):
        for index in range(trainer.steps):
            images, order, start, n = trainer._batches.batch(0)
            trainer.network.step(images, order, start, n, trainer.learning_rate, trainer._losses, index)

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
    names = [check.name for check in network_failures(broken.PlainBackend(), "epoch")]
    assert names == ["loss at the initial parameters"]


def test_a_loss_that_is_written_only_once_fails():
    class WritesTheFirstLoss(broken.PlainBackend):
        written = 0

        def mse_loss(self, prediction, target, gradient, losses, step):
            kept = losses.copy()
            super().mse_loss(prediction, target, gradient, losses, step)
            if self.written:
                losses[...] = kept
            self.written += 1

    assert "losses, parameters and gradients" in [
        check.name for check in network_failures(WritesTheFirstLoss(), "step")
    ]


def test_a_step_that_leaves_parameters_behind_fails():
    assert network_failures(broken.UpdatesSomeParameters(), "step", autoencoder((8, 8), (12, 10))) != []


def test_the_work_of_the_network_is_that_of_its_operations():
    network = autoencoder()
    step = network_work(find("v1"), network, "step", 64, 100)
    assert step.flops == sum(part.flops for part in step_work(network, 64))
    assert network_work(find("v1"), network, "epoch", 64, 128).flops == 2 * step.flops
    rest = network_work(find("v1"), network, "step", 36, 100)
    assert network_work(find("v1"), network, "epoch", 64, 100).flops == step.flops + rest.flops
    forward, encode = (network_work(find("v1"), network, name, 64, 64).flops for name in ("forward", "encode"))
    assert 64 * network.forward_flops <= forward < 1.01 * 64 * network.forward_flops
    convolutions = 64 * sum(stage.flops for stage in network.stages[:2])
    assert convolutions <= encode < 1.01 * convolutions


@pytest.mark.parametrize(
    ("second", "suspicious"), [(1e9, "suspicious: 5.0 GFLOP/s, above the measured 1.0"), (5e9, None)]
)
def test_a_figure_above_the_ceiling_is_measured_against_it_twice(monkeypatch, second, suspicious):
    measured = iter([1e9, second])
    monkeypatch.setattr(
        figures, "measure_ceilings", lambda *where: Ceilings("cpu", "fp32", 2, next(measured), 1e9, 2e9, None)
    )
    ceilings = figures.MeasuredCeilings(threads=2)
    figure = figures.judged(OperationWork("conv1", "forward", 10**9, 10**6), 0.2, ceilings, broken.PlainBackend())
    assert figure["suspicious"] == suspicious
    assert figure["gflop_per_s"] == pytest.approx(5)
    assert figure["gb_per_s"] == pytest.approx(0.005)
    assert figure["bound_by"] == "arithmetic"
    assert list(measured) == []


# Files --------------------------------------------------------------------------------------------------------------


def machine_info(monkeypatch, gpu=None, clock=2.1e9, commit="aaaa", node="a"):
    """What a file says of the machine; clock, commit and node differ from run to run."""
    card = Gpu(gpu, driver="570.1", sm_clock_mhz=int(clock / 1e6)) if gpu else None
    environment = Environment(cpu="AMD EPYC", cores=2, threads=2, numba_opt="2", commit=commit, gpu=card)
    with_gpu(monkeypatch, available=bool(gpu))
    monkeypatch.setattr(options, "describe_environment", lambda device, *more: environment)
    monkeypatch.setattr(options, "highest_clocks", lambda: {"highest_sm_clock_mhz": 1_980})
    config = asked(math="tf32")
    config.stash[SETTINGS] = choose(config)
    info = {"node": node, "system": "Linux", "cpu": {"hz_actual": [clock, 0], "brand_raw": "AMD EPYC"}}
    options.pytest_benchmark_update_machine_info(config, info)
    return info


@pytest.mark.parametrize("gpu", [None, "NVIDIA H200"])
def test_two_runs_on_one_machine_say_the_same_of_it(monkeypatch, gpu):
    first = machine_info(monkeypatch, gpu)
    assert first == machine_info(monkeypatch, gpu, clock=3.0e9, commit="bbbb", node="b")
    assert first["convbench"]["cpu"] == "AMD EPYC"
    assert first["convbench"]["threads"] == 2
    assert first["convbench"]["math"] == "tf32"
    if gpu:
        card = first["convbench"]["gpu"]
        assert (card["name"], card["driver"], card["highest_sm_clock_mhz"]) == (gpu, "570.1", 1_980)
        assert "sm_clock_mhz" not in card
    assert first != machine_info(monkeypatch, "NVIDIA H100")


def test_figures_of_another_machine_are_not_compared(monkeypatch):
    now = machine_info(monkeypatch, "NVIDIA H200")
    options.pytest_benchmark_compare_machine_info(now, {"machine_info": json.loads(json.dumps(now))})
    other = machine_info(monkeypatch, "NVIDIA H100")
    with pytest.raises(pytest.UsageError, match=r"convbench\.gpu\.name 'NVIDIA H200' instead of 'NVIDIA H100'"):
        options.pytest_benchmark_compare_machine_info(now, {"machine_info": other})


def test_files_are_kept_apart_by_machine_and_gpu(monkeypatch):
    def described(device, *more):
        gpu = Gpu("NVIDIA H200") if device == "gpu" else None
        return Environment(cpu="AMD EPYC", cores=2, threads=2, commit="aaaa", gpu=gpu)

    monkeypatch.setattr(options, "describe_environment", described)
    with_gpu(monkeypatch)
    config = asked()
    folder = f"file://{ROOT}/results/benchmarks/amd-epyc-2c"
    assert options.default_storage(config, choose(asked(device=["cpu"]))) == folder
    assert options.default_storage(config, choose(asked())) == f"{folder}_nvidia-h200"


STAND_INS = """
import common.verify, bench.machine.ceilings, tests.benchmarks.timing, versions.registry
from time import perf_counter
from types import SimpleNamespace

class Event:
    def record(self, stream):
        self.at = 1e3 * perf_counter()
    def synchronize(self):
        pass

def elapsed(start, end):
    return end.at - start.at

def load(self, device, *, precision, threads):
    from tests.broken import ReturnsZeros
    return ReturnsZeros(precision=precision, threads=threads)

events = SimpleNamespace(Event=Event, get_elapsed_time=elapsed)
tests.benchmarks.timing.device_timer = lambda backend: tests.benchmarks.timing.EventTimer(None, events)
Ceilings = bench.machine.ceilings.Ceilings
bench.machine.ceilings.measure_ceilings = lambda *where: Ceilings(*where[:3], 1e15, 1e15, 1e15, None)
common.verify.verify = lambda *arguments, **options: [common.verify.Check("stands in", True, 0.0)]
versions.registry.BackendInfo.load = load
"""


def run(*command, path=""):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_timed_run_and_its_file(tmp_path):
    """The real suite on a backend whose forward pass is wrong, with device events for its clock."""
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    storage = f"--benchmark-storage=file://{tmp_path}/saved"
    wanted = "(v2 or v4) and (conv2-forward or conv2-backward_data or step-sgd)"
    options = [
        "--device",
        "cpu",
        "--cache",
        "warm",
        "--cache",
        "cold",
        "--network",
        "tiny",
        "--benchmark-max-time",
        "0.05",
    ]
    command = ["pytest", "tests/benchmarks", "-p", "no:cacheprovider", "-p", "stand_ins", "--benchmark-only", *options]
    backends = ["--backend", "v2", "--backend", "v4"]
    code, output = run(*command, *backends, storage, "--benchmark-save", "one", "-k", wanted, path=tmp_path)
    assert code == 1, output
    assert "4 failed, 8 passed" in output

    (file,) = (tmp_path / "saved").glob("*/0001_one.json")
    saved = json.loads(file.read_text())
    found = {benchmark["param"]: benchmark for benchmark in saved["benchmarks"]}
    operations = ("conv2-backward_data", "step-sgd")
    assert set(found) == {f"{v}-cpu-{op}-tiny{c}" for v in ("v2", "v4") for op in operations for c in ("", "-cold")}
    assert {benchmark["options"]["timer"] for benchmark in found.values()} == {"cuda_event"}

    warm, cold = found["v2-cpu-step-sgd-tiny"], found["v2-cpu-step-sgd-tiny-cold"]
    assert warm["group"] == "cpu step-sgd tiny"
    assert warm["stats"]["rounds"] >= 5
    assert (cold["stats"]["iterations"], cold["group"]) == (1, "cpu step-sgd tiny cold")
    told = warm["extra_info"]
    assert told["verified"] is True
    assert told["checks"] == 3
    assert told["suspicious"] is None
    assert told["gb_per_s"] == pytest.approx(told["least_bytes"] / warm["stats"]["median"] / 1e9)
    assert (told["cache"], told["math"], told["layout"], told["registers"]) == ("warm", "fp32", "NCHW", None)
    assert "node" not in saved["machine_info"]
    assert saved["machine_info"]["convbench"]["network"] == "tiny"

    file.with_name("0002_two.json").write_text(file.read_text())
    code, output = run("pytest_benchmark", f"--storage=file://{tmp_path}/saved", "compare", "--columns=median")
    assert code == 0, output
    assert "test_operation[v4-cpu-step-sgd-tiny] (0001_one)" in output
    assert "test_operation[v4-cpu-step-sgd-tiny] (0002_two)" in output


def test_a_wrong_name_ends_pytest_with_one_line():
    code, output = run("pytest", "tests/benchmarks", "-p", "no:cacheprovider", "--benchmark-only", "--backend", "v9")
    assert code == 4
    assert output.strip() == "ERROR: unknown backend 'v9': choose from v1, v2, v3, v4, v5, all"
