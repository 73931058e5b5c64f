"""``convbench layers``: clocks inside a step, the work and the ceilings, and which rows are believed."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from bench.commands.layers import LayersOptions, layers_command
from bench.machine.ceilings import Ceilings
from bench.machine.devices import child_environment
from bench.machine.environment import Environment
from bench.measure import layer_clock, layers, workers
from bench.measure.layer_clock import HostClock, Stopwatch, StreamClock
from bench.measure.layers import describe_work, enter_times, judge, measure_layers
from bench.measure.setup import Setup, WorkerTask
from bench.measure.steps import Steps
from bench.measure.workers import WorkerError
from bench.records.documents import prepare_folder
from bench.records.layers import (
    LayerRow,
    LayersRecord,
    LayersSettings,
    Memory,
    MemoryPeaks,
    PlannedBuffer,
    planned_buffers,
    read_layers,
    summarise_layers,
    write_layers,
)
from common import reference
from common.architecture import autoencoder
from common.errors import UsageError
from common.operations import METHODS, step_work
from tests.broken import PlainBackend
from versions.registry import find

TINY = autoencoder((8, 12), (5, 4))
BATCH = 2


def steps_of(backend, architecture=TINY):
    images = np.random.default_rng(0).integers(0, 256, (3 * BATCH, *architecture.input_shape), np.uint8)
    task = WorkerTask("v4", False, "cpu", "fp32", 1, BATCH, (), learning_rate=0.01, seed=0, images=None)
    return Steps(backend, architecture, images, task)


class Fused(PlainBackend):
    """Convolution and pooling in one call, and the rest as everyone has it."""

    def stage_forward(self, stage, x, w, b, out, kept):
        if stage.resample == "maxpool":
            y = kept["y"]
            y[...] = reference.relu(reference.conv2d_forward(x, w, b))
            out[...] = reference.maxpool_forward(y)
        else:
            super().stage_forward(stage, x, w, b, out, kept)


# Clocks -------------------------------------------------------------------------------------------------------------


def test_every_operation_is_clocked_where_it_belongs_and_training_is_the_same():
    backend = PlainBackend()
    before = set(vars(backend))
    watched, plain = steps_of(backend), steps_of(PlainBackend())
    seconds, clean, losses = watched.clocked(HostClock())
    assert list(seconds) == [(work.stage, work.operation) for work in step_work(TINY, BATCH)]
    assert clean
    assert all(value > 0 for value in seconds.values())
    assert set(vars(backend)) == before
    for _ in range(2):
        losses += watched.timed()[1]
    assert losses == [plain.timed()[1][0] for _ in range(3)]


def test_what_an_instance_brought_along_is_put_back():
    backend = PlainBackend()
    backend.sgd = sgd = lambda *arguments: PlainBackend.sgd(backend, *arguments)
    with Stopwatch(backend, HostClock.timer).clocking():
        assert backend.sgd is not sgd
    assert backend.sgd is sgd


def test_a_fused_stage_has_a_row_for_what_no_operation_covers():
    seconds, _, _ = steps_of(Fused()).clocked(HostClock())
    assert ("conv1", "forward") not in seconds
    assert ("conv1", "maxpool") not in seconds
    assert seconds["conv1", "stage_forward"] > 0
    # Where it only passes on, there is little besides the operations.
    assert seconds["conv4", "stage_forward"] < seconds["conv4", "forward"]
    assert not any(name == "stage_backward" for _, name in seconds)

    row = layer_row("v4")
    enter_times(row, {"seconds": 1.0, "clean": True, "operations": [[*key, s] for key, s in seconds.items()]})
    describe_work(row, find("v4"), TINY, BATCH)
    work = {(times.stage, times.operation): times for times in row.operations}
    parts = [part for part in step_work(TINY, BATCH) if part.id in ("conv1-forward", "conv1-maxpool")]
    assert work["conv1", "stage_forward"].flops == sum(part.flops for part in parts)
    assert work["conv1", "stage_forward"].least_bytes == max(part.least_bytes for part in parts)
    assert work["conv4", "stage_forward"].flops == 0
    assert sum(times.flops for times in row.operations) == sum(part.flops for part in step_work(TINY, BATCH))


def test_an_operation_that_uses_another_is_counted_once():
    class Nested(PlainBackend):
        def conv2d_backward_bias(self, dy, db):
            self.sgd(np.zeros(1, np.float32), np.zeros(1, np.float32), 0.0)
            super().conv2d_backward_bias(dy, db)

    seconds, _, _ = steps_of(Nested()).clocked(HostClock())
    assert [key for key in seconds if key[1] == "sgd"] == [("step", "sgd")]


class Gpu:
    """A stand-in: a stream on which work takes its time, queued by a host that takes its own."""

    def __init__(self, host_s):
        self.host_s, self.host, self.free = host_s, 0.0, 0.0

    def launch(self, seconds):
        self.host += self.host_s
        self.free = max(self.free, self.host) + seconds

    def read(self):
        return max(self.free, self.host)

    def over(self, reading):
        return reading <= self.host


class OnGpu(PlainBackend):
    """Queues a piece of work for every operation, and computes at once."""

    def __init__(self, gpu):
        super().__init__()
        for name in METHODS:
            setattr(self, name, self._queued(gpu, getattr(self, name)))

    def _queued(self, gpu, operation):
        def queued(*arguments):
            gpu.launch(5e-6)
            operation(*arguments)

        return queued


def test_with_a_head_start_events_hold_the_work_and_not_the_launches(monkeypatch):
    gpu = Gpu(host_s=2e-5)
    monkeypatch.setattr(layer_clock, "perf_counter", lambda: gpu.host)
    clock = StreamClock(gpu.read, lambda: gpu.launch(1e-4), gpu.over, head_start_s=2e-5)
    steps = steps_of(OnGpu(gpu))
    seconds, clean, losses = steps.clocked(clock)
    assert clean
    assert len(losses) > 1  # the first head start was too short, and the step was taken again
    assert list(seconds.values()) == pytest.approx([5e-6] * len(seconds))


def test_a_gpu_that_always_waits_for_the_host_is_told(monkeypatch):
    gpu = Gpu(host_s=2e-5)
    monkeypatch.setattr(layer_clock, "perf_counter", lambda: gpu.host)
    clock = StreamClock(gpu.read, lambda: gpu.launch(0.0), gpu.over, head_start_s=1.0)
    clock._copy_s = 1e-4
    _, clean, losses = steps_of(OnGpu(gpu)).clocked(clock)
    assert not clean
    assert len(losses) == 5


def test_the_clock_of_a_gpu_is_made_of_its_streams_events(monkeypatch):
    """CuPy's part played by a few lines: events on a stream, and copies queued on it."""
    gpu = Gpu(host_s=2e-5)

    class Event:
        def record(self, stream):
            assert stream is backend.runtime.stream
            self.moment = gpu.read()

        def synchronize(self):
            gpu.host = max(gpu.host, self.moment)

        @property
        def done(self):
            return gpu.over(self.moment)

    class Memory:
        def __init__(self, size, dtype):
            self.size, self.data = size, self

        def copy_from_device_async(self, source, size, stream):
            assert size == self.size == source.size
            assert stream is backend.runtime.stream
            gpu.launch(5e-5)

    def elapsed(start, end):
        return 1e3 * (end.moment - start.moment)

    device = SimpleNamespace(Event=Event, get_elapsed_time=elapsed)
    cupy = SimpleNamespace(cuda=device, zeros=Memory, empty=Memory, uint8=np.uint8)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(layer_clock, "perf_counter", lambda: gpu.host)
    backend = OnGpu(gpu)
    backend.device, backend.runtime = "gpu", SimpleNamespace(stream=nullcontext())
    steps = steps_of(backend)
    clock = layer_clock.device_clock(backend, host_s=2e-3)
    assert isinstance(clock, StreamClock)
    seconds, clean, losses = steps.clocked(clock)
    assert clean
    assert len(losses) == 1
    assert list(seconds.values()) == pytest.approx([5e-6] * len(seconds))


# What is believed ---------------------------------------------------------------------------------------------------


def test_a_backend_that_stops_writing_is_found_by_the_poison():
    class Stops(PlainBackend):
        calls = 0

        def conv2d_backward_filter(self, x, dy, dw):
            self.calls += 1
            if self.calls <= 5 * 2:
                super().conv2d_backward_filter(x, dy, dw)

    steps, right = steps_of(Stops()), steps_of(PlainBackend())
    for one in (steps, right):
        one.warm_up()
    unwritten, _ = steps.unwritten()
    assert "gradient of conv3.weight" in unwritten
    assert "gradient of conv3.bias" not in unwritten
    unwritten, (loss,) = right.unwritten()
    assert unwritten == []
    assert np.isfinite(loss)


CEILINGS = Ceilings("cpu", "fp32", 2, 2e11, 2e10, 3e10, 10**6)


def layer_row(name):
    info = find(name)
    plans = planned_buffers(info, autoencoder(), 64, "cpu", 2)
    planned = [PlannedBuffer(plan.name, list(plan.shape), plan.purpose, plan.bytes) for plan in plans]
    memory = Memory(planned, MemoryPeaks(process_bytes=500_000_000))
    fields = {"verified": True, "checks": 300, "memory": memory}
    return LayerRow(name, info.label, "cpu", info.layout, "fp32", **fields)


def row(name, scale=1.0, rounds=3, **changes):
    """A row as ``measure_layers`` makes it, with times of ``scale`` times twice what the ceilings allow."""
    made = layer_row(name)
    times = {(part.stage, part.operation): 2 * scale * CEILINGS.bound_s(part) for part in step_work(autoencoder(), 64)}
    for i in range(rounds):
        wobble = 1 + 0.01 * i
        answer = {"seconds": 1.1 * wobble * sum(times.values()), "clean": True}
        enter_times(made, {**answer, "operations": [[*key, wobble * s] for key, s in times.items()]})
    describe_work(made, find(made.backend), autoencoder(), 64)
    made.losses = [0.3, 0.2]
    return replace(made, **changes)


def record(*rows):
    environment = Environment(cpu="AMD EPYC", cores=2, threads=2, commit="abc1234567")
    settings = LayersSettings(64, "fp32", "cpu", 2, 3, 0)
    return LayersRecord(environment, settings, list(rows), "2026-01-02T030405Z", CEILINGS)


def test_summaries_add_up():
    (summary,) = summarise_layers(record(row("v4")))
    assert summary.operations_s + summary.overhead_s == pytest.approx(summary.step_s)
    assert summary.overhead_s == pytest.approx(summary.step_s / 11)
    assert sum(line.share for line in summary.operations) == pytest.approx(10 / 11)
    assert sum(summary.seconds_by_direction().values()) == pytest.approx(summary.operations_s)
    assert all(line.fraction == pytest.approx(0.5 / 1.01) for line in summary.operations)
    places = list(dict.fromkeys((line.stage, line.direction) for line in summary.operations))
    stages = [(f"conv{i}", direction) for i in range(1, 6) for direction in ("forward", "backward")]
    assert places == [*stages, ("step", "other")]
    convolution = next(line for line in summary.operations if line.work.id == "conv2-backward_filter")
    assert convolution.gflop_per_s == pytest.approx(100 / 1.01)
    assert convolution.bound_by == "arithmetic"
    assert next(line for line in summary.operations if line.name == "upsample").gflop_per_s is None


def test_the_overhead_comes_from_whole_steps_where_medians_do_not_add_up():
    noisy = row("v4")
    first, second = (times.seconds for times in noisy.operations[1:3])
    first[0] += 1.0
    second[1] += 1.0
    noisy.step_s = [3.0, 3.0, 3.0]
    (summary,) = summarise_layers(record(noisy))
    assert summary.operations_s > 1 > sum(line.seconds for line in summary.operations)
    assert summary.overhead_s == pytest.approx(3 - summary.operations_s)


def test_operations_that_take_longer_than_the_step_are_shown_as_they_are():
    long = row("v4", step_s=[0.001])
    (summary,) = summarise_layers(record(long))
    assert summary.overhead_s < 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scale": 0.4}, "above the measured 200.0, in conv1-forward"),
        ({"step_s": [0.01] * 3}, "over the whole step"),
    ],
)
def test_a_row_above_the_ceilings_is_suspicious(changes, reason):
    suspect = record(row("v2"), row("v4", **changes))
    judge(suspect)
    good, bad = suspect.rows
    assert good.reason == ""
    assert bad.reason.startswith("suspicious: ")
    assert reason in bad.reason
    assert [summary.row.id for summary in summarise_layers(suspect)] == ["v2"]


def test_an_operation_without_time_is_suspicious():
    suspect = row("v4")
    next(times for times in suspect.operations if times.operation == "sgd").seconds = [0.0, 0.0, 0.0]
    found = record(suspect)
    judge(found)
    assert found.rows[0].reason == "suspicious: step-sgd took no time"


def test_a_loss_that_differs_from_the_other_versions_is_suspicious():
    found = record(row("v1"), row("v2", losses=[0.3, 0.21]), row("v4"))
    judge(found)
    assert [bool(one.reason) for one in found.rows] == [False, True, False]
    assert "loss 0.21 at step 2" in found.rows[1].reason


def test_the_higher_of_two_measured_ceilings_counts_speed_by_speed():
    other = replace(CEILINGS, gemm_flop_per_s=1e11, read_bytes_per_s=4e10)
    assert CEILINGS.higher(other) == replace(CEILINGS, read_bytes_per_s=4e10)


# The measurement, with processes that are none ------------------------------------------------------------------------


class FakeProcess:
    """Answers like a process; ``behaviour`` says, by version, what goes wrong."""

    behaviour: ClassVar[dict] = {}
    started: ClassVar[list] = []

    def __init__(self, task):
        self.name, self.images, self.closed = task.backend, task.images, False
        self.started.append(self)

    def send(self, line):
        self.command = line

    def receive(self):
        wrong = self.behaviour.get((self.name, self.command))
        if isinstance(wrong, BaseException):
            raise wrong
        if wrong is not None:
            return wrong
        if self.command == "verify":
            return {"checks": 3, "failures": [], "worst": 0.5, "deterministic": True}
        if self.command == "ceilings":
            return asdict(CEILINGS)
        losses = {"losses": [0.25]}
        if self.command == "start_steps":
            return {"memory": {"process_bytes": 1, "pool_bytes": None, "device_bytes": None}, **losses}
        if self.command == "time_step":
            work = step_work(autoencoder(), 64)
            operations = [[part.stage, part.operation, 3 * CEILINGS.bound_s(part)] for part in work]
            total = sum(seconds for *_, seconds in operations)
            return {"seconds": total, "operations": operations, "clean": True, **losses}
        return {"unwritten": [], **losses}

    def close(self):
        self.closed = True


@pytest.fixture
def measured(monkeypatch):
    """Run ``measure_layers`` with stand-ins; gives the record."""
    monkeypatch.setattr(FakeProcess, "started", [])
    monkeypatch.setattr(workers, "WorkerProcess", FakeProcess)

    def measure(*names, **behaviour):
        monkeypatch.setattr(FakeProcess, "behaviour", behaviour.get("behaviour", {}))
        setup = Setup(tuple(find(name) for name in names), "cpu", "fp32", 1, verified_sizes=(64,))
        told = []
        images = np.zeros((4 * 64, 3, 32, 32), np.uint8)
        found = measure_layers(setup, images, 2, ["convbench", "layers"], told.append)
        if not behaviour:
            assert len(told) == setup.messages(2)
        return found

    return measure


def test_a_measurement_from_end_to_end(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "shuffled", lambda rows: rows[::-1])
    found = measured("v2", "v4", "v4")
    assert [one.id for one in found.rows] == ["v2", "v4", "v4#2"]
    assert [one.reason for one in found.rows] == ["", "", ""]
    assert all(len(one.step_s) == 2 for one in found.rows)
    assert found.order == [["v4#2", "v4", "v2"]] * 2
    assert all(process.closed for process in FakeProcess.started)
    assert [process.name for process in FakeProcess.started if process.images] == ["v2", "v4", "v4"]
    path = write_layers(found, prepare_folder(tmp_path))
    assert path.name.endswith("_layers.json")
    assert read_layers(path) == found


WRONG = {
    "verify": (
        {"checks": 3, "failures": ["forward: bad"], "worst": 0.5, "deterministic": True},
        "failed verification: forward: bad",
    ),
    "start_steps": (WorkerError("MemoryError: no room"), "no room"),
    "time_step": (
        {"seconds": 1.0, "operations": [], "clean": True, "losses": [float("nan")]},
        "suspicious: a loss is nan",
    ),
    "finish_steps": (
        {"unwritten": ["conv1.bias"], "losses": [float("nan")]},
        "outputs equal to the poison: conv1.bias",
    ),
}


def test_ceilings_taken_on_a_busy_machine_are_measured_again_before_a_row_is_called_suspicious(measured):
    busy = asdict(replace(CEILINGS, gemm_flop_per_s=1e10))
    answers = iter([busy, busy, busy, asdict(CEILINGS)])

    class Later(dict):
        """The ceilings, as the machine becomes idle."""

        def get(self, key, default=None):
            return next(answers) if key == ("v4", "ceilings") else default

    found = measured("v4", behaviour=Later())
    assert found.rows[0].reason == ""
    assert found.ceilings == CEILINGS
    assert next(answers, None) is None

    answers = iter([busy] * 10)
    found = measured("v4", behaviour=Later())
    assert "suspicious" in found.rows[0].reason
    assert len(list(answers)) == 10 - 1 - layers.CEILING_ATTEMPTS


@pytest.mark.parametrize("command", WRONG)
def test_a_version_that_goes_wrong_has_a_reason_and_does_not_stop_the_others(measured, command, tmp_path):
    answer, reason = WRONG[command]
    found = measured("v1", "v4", behaviour={("v1", command): answer})
    bad, good = found.rows
    assert reason in bad.reason
    assert good.reason == ""
    assert bad.verified == (command != "verify")
    if command in ("verify", "start_steps", "time_step"):
        assert bad.step_s == bad.operations == []
    read_layers(write_layers(found, prepare_folder(tmp_path)))


def test_ctrl_c_ends_every_process(measured):
    with pytest.raises(KeyboardInterrupt):
        measured("v1", "v4", behaviour={("v4", "time_step"): KeyboardInterrupt()})
    assert all(process.closed for process in FakeProcess.started)


def test_without_ceilings_nothing_is_measured(measured):
    with pytest.raises(WorkerError, match="ceilings could not be measured: it crashed"):
        measured("v4", behaviour={("v4", "ceilings"): WorkerError("it crashed")})


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds 0: must be at least 1"),
        ({"batch_size": -1}, "batch size -1"),
        ({"seed": -1}, "seed -1"),
        ({"math": "bf16"}, "fp32, tf32"),
        ({"backend": ["v9"]}, "v1, v2"),
        ({"device": "tpu"}, "auto, cpu, gpu"),
    ],
    ids=str,
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        layers_command(LayersOptions(**{"device": "cpu", **options}, out=tmp_path / "results"))
    assert not (tmp_path / "results").exists()


def test_the_command_for_real(tmp_path):
    options = ["--backend", "v4", "--batch-size", "2", "--rounds", "1", "--device", "cpu", "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "layers", *map(str, options)],
        env=child_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "other work kept" in done.stderr and "suspicious" in done.stderr:
        pytest.skip("other work on this machine makes its ceilings lower than what a version reaches")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    data = read_layers(path)
    (only,) = data.rows
    assert only.verified
    assert only.checks > 100
    assert len(only.step_s) == 1
    wanted = {(part.stage, part.operation) for part in step_work(autoencoder(), 2)}
    assert {(times.stage, times.operation) for times in only.operations} == wanted
    assert only.memory.peak.process_bytes > 50e6
    assert only.memory.peak.pool_bytes is None
    for word in ("backward filter", "overhead", "whole step", "ceilings measured", "not measured", "_roofline.svg"):
        assert word in done.stdout
    assert "v4: compiling" in done.stderr
    assert len(list((tmp_path / "charts").iterdir())) == 4
