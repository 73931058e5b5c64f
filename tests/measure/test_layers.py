"""``convbench layers``: clocks inside a step, the work and the ceilings, judgement, files, tables and charts."""

import json
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from rich.console import Console

from bench import cli
from bench.machine.ceilings import Ceilings
from bench.machine.devices import child_environment
from bench.measure import layer_clock
from bench.measure import layers as layer_runner
from bench.measure import run as runner
from bench.measure.layer_clock import HostClock, Stopwatch, StreamClock
from bench.measure.layer_worker import Steps
from bench.measure.layers import LayerRow, describe_work, enter_times, higher, judge, measure_layers
from bench.measure.run import RunConfig, WorkerError
from bench.records.layers import BUDGET_MB, SCHEMA, planned_buffers, read_layers, summarise_layers, write_layers
from bench.records.run import prepare_folder
from bench.views.layer_charts import draw_layer_charts, layers_figure, roofline_figure
from bench.views.layer_tables import ceilings_line, layer_memory_table, layers_table
from bench.views.tables import memory_table
from common import reference
from common.architecture import autoencoder
from common.operations import step_operations
from tests.broken import PlainBackend
from versions.registry import REGISTRY, find

TINY = autoencoder((8, 12), (5, 4))
BATCH = 2


def steps_of(backend, architecture=TINY):
    images = np.random.default_rng(0).integers(0, 256, (3 * BATCH, *architecture.input_shape), np.uint8)
    return Steps(backend, architecture, images, batch_size=BATCH, learning_rate=0.01, seed=0)


class Fused(PlainBackend):
    """Convolution and pooling in one call, and the rest as everyone has it."""

    def stage_forward(self, stage, x, w, b, y, out):
        if stage.resample == "maxpool":
            y[...] = reference.relu(reference.conv2d_forward(x, w, b))
            out[...] = reference.maxpool_forward(y)
        else:
            super().stage_forward(stage, x, w, b, y, out)


# Clocks -------------------------------------------------------------------------------------------------------------


def test_every_operation_is_clocked_where_it_belongs_and_training_is_the_same():
    backend = PlainBackend()
    before = set(vars(backend))
    watched, plain = steps_of(backend), steps_of(PlainBackend())
    seconds, clean, losses = watched.watched(HostClock())
    assert list(seconds) == [(operation.stage, operation.name) for operation in step_operations(TINY, BATCH)]
    assert clean
    assert all(value > 0 for value in seconds.values())
    assert set(vars(backend)) == before
    for _ in range(2):
        losses += watched.timed()[1]
    assert losses == [plain.timed()[1][0] for _ in range(3)]


def test_what_an_instance_brought_along_is_put_back():
    backend = PlainBackend()
    backend.sgd = sgd = lambda *arguments: PlainBackend.sgd(backend, *arguments)
    with Stopwatch(backend, HostClock.timer).watching():
        assert backend.sgd is not sgd
    assert backend.sgd is sgd


def test_a_fused_stage_has_a_row_for_what_no_operation_covers():
    seconds, _, _ = steps_of(Fused()).watched(HostClock())
    assert ("conv1", "forward") not in seconds
    assert ("conv1", "maxpool") not in seconds
    assert seconds["conv1", "stage_forward_rest"] > 0
    # Where it only passes on, there is little besides the operations.
    assert seconds["conv4", "stage_forward_rest"] < seconds["conv4", "forward"]
    assert not any(name == "stage_backward_rest" for _, name in seconds)

    row = LayerRow("v4", "v4", "", "cpu", "NCHW", "fp32")
    enter_times(row, {"seconds": 1.0, "clean": True, "operations": [[*key, s] for key, s in seconds.items()]})
    describe_work(row, TINY, BATCH)
    work = {(entry["stage"], entry["operation"]): entry for entry in row.operations}
    parts = [op for op in step_operations(TINY, BATCH) if op.id in ("conv1-forward", "conv1-maxpool")]
    assert work["conv1", "stage_forward_rest"]["flops"] == sum(part.flops for part in parts)
    assert work["conv1", "stage_forward_rest"]["least_bytes"] == max(part.least_bytes for part in parts)
    assert work["conv4", "stage_forward_rest"]["flops"] == 0
    assert sum(entry["flops"] for entry in row.operations) == sum(op.flops for op in step_operations(TINY, BATCH))


def test_an_operation_that_uses_another_is_counted_once():
    class Nested(PlainBackend):
        def conv2d_backward_bias(self, dy, db):
            self.sgd(np.zeros(1, np.float32), np.zeros(1, np.float32), 0.0)
            super().conv2d_backward_bias(dy, db)

    seconds, _, _ = steps_of(Nested()).watched(HostClock())
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
        for name in layer_clock.OPERATIONS:
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
    seconds, clean, losses = steps.watched(clock)
    assert clean
    assert len(losses) > 1  # the first head start was too short, and the step was taken again
    assert list(seconds.values()) == pytest.approx([5e-6] * len(seconds))


def test_a_gpu_that_always_waits_for_the_host_is_told(monkeypatch):
    gpu = Gpu(host_s=2e-5)
    monkeypatch.setattr(layer_clock, "perf_counter", lambda: gpu.host)
    clock = StreamClock(gpu.read, lambda: gpu.launch(0.0), gpu.over, head_start_s=1.0)
    clock._copy_s = 1e-4
    _, clean, losses = steps_of(OnGpu(gpu)).watched(clock)
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
    seconds, clean, losses = steps.watched(clock)
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


def row(name, scale=1.0, rounds=3, **changes):
    """A row as ``measure_layers`` makes it, with times of ``scale`` times twice what the ceilings allow."""
    info = find(name)
    made = LayerRow(name, name, info.label, "cpu", info.layout, "fp32", True, 300)
    ceilings, work = Ceilings(**CEILINGS), step_operations(autoencoder(), 64)
    times = {(op.stage, op.name): 2 * scale * ceilings.bound_s(op) for op in work}
    for i in range(rounds):
        wobble = 1 + 0.01 * i
        answer = {"seconds": 1.1 * wobble * sum(times.values()), "clean": True}
        enter_times(made, {**answer, "operations": [[*key, wobble * s] for key, s in times.items()]})
    describe_work(made, autoencoder(), 64)
    plans = planned_buffers(info, autoencoder(), 64, "cpu", 2)
    made.memory = {
        "planned": [{**asdict(plan), "shape": list(plan.shape), "bytes": plan.bytes} for plan in plans],
        "peak": {"process_bytes": 500_000_000, "pool_bytes": None, "device_bytes": None},
    }
    made.losses = [0.3, 0.2]
    fields = {key: value for key, value in asdict(made).items() if key != "unclean"}
    return {**fields, **changes}


CEILINGS = {
    "device": "cpu",
    "math": "fp32",
    "threads": 2,
    "gemm_flop_per_s": 2e11,
    "copy_bytes_per_s": 2e10,
    "read_bytes_per_s": 3e10,
    "cache_bytes": 10**6,
}


def record(*rows):
    return {
        "schema": SCHEMA,
        "started": "2026-01-02T030405Z",
        "environment": {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "commit": "abc1234567"},
        "config": {"batch_size": 64, "math": "fp32", "device": "cpu", "threads": 2, "rounds": 3, "seed": 0},
        "ceilings": CEILINGS,
        "other_ceilings": [],
        "conditions": {"before": {}, "after": {}},
        "warnings": [],
        "rows": list(rows),
        "notes": {},
    }


def test_summaries_add_up():
    (summary,) = summarise_layers(record(row("v4")))
    assert summary.operations_s + summary.overhead_s == pytest.approx(summary.step_s)
    assert summary.overhead_s == pytest.approx(summary.step_s / 11)
    assert sum(line.share for line in summary.lines) == pytest.approx(10 / 11)
    assert sum(summary.seconds_by_direction().values()) == pytest.approx(summary.operations_s)
    assert all(line.fraction == pytest.approx(0.5 / 1.01) for line in summary.lines)
    places = list(dict.fromkeys((line.stage, line.direction) for line in summary.lines))
    stages = [(f"conv{i}", direction) for i in range(1, 6) for direction in ("forward", "backward")]
    assert places == [*stages, ("step", "other")]
    convolution = next(line for line in summary.lines if line.operation.id == "conv2-backward_filter")
    assert convolution.gflop_per_s == pytest.approx(100 / 1.01)
    assert convolution.bound_by == "arithmetic"
    assert next(line for line in summary.lines if line.name == "upsample").gflop_per_s is None


def test_the_overhead_comes_from_whole_steps_where_medians_do_not_add_up():
    noisy = row("v4")
    first, second = (entry["seconds"] for entry in noisy["operations"][1:3])
    first[0] += 1.0
    second[1] += 1.0
    noisy["step_s"] = [3.0, 3.0, 3.0]
    (summary,) = summarise_layers(record(noisy))
    assert summary.operations_s > 1 > summary.rows_s
    assert summary.overhead_s == pytest.approx(3 - summary.operations_s)
    assert "noise makes their medians add up to" in text_of(layers_table(summary))


def test_operations_that_take_longer_than_the_step_are_shown_as_they_are():
    long = row("v4", step_s=[0.001])
    (summary,) = summarise_layers(record(long))
    assert summary.overhead_s < 0
    assert "below zero" in text_of(layers_table(summary))
    assert layers_figure(record(long)) is not None


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
    good, bad = suspect["rows"]
    assert good["reason"] == ""
    assert bad["reason"].startswith("suspicious: ")
    assert reason in bad["reason"]
    assert [summary.row["id"] for summary in summarise_layers(suspect)] == ["v2"]


def test_an_operation_without_time_is_suspicious():
    suspect = row("v4")
    next(entry for entry in suspect["operations"] if entry["operation"] == "sgd")["seconds"] = [0.0, 0.0, 0.0]
    found = record(suspect)
    judge(found)
    assert found["rows"][0]["reason"] == "suspicious: step-sgd took no time"


def test_a_loss_that_differs_from_the_other_versions_is_suspicious():
    found = record(row("v1"), row("v2", losses=[0.3, 0.21]), row("v4"))
    judge(found)
    assert [bool(one["reason"]) for one in found["rows"]] == [False, True, False]
    assert "loss 0.21 at step 2" in found["rows"][1]["reason"]


def test_the_higher_of_two_measured_ceilings_counts_speed_by_speed():
    other = {**CEILINGS, "gemm_flop_per_s": 1e11, "read_bytes_per_s": 4e10}
    assert higher([CEILINGS], [other]) == [{**CEILINGS, "read_bytes_per_s": 4e10}]


# The measurement, with processes that are none ------------------------------------------------------------------------


class FakeWorker:
    """Answers like a process; ``behaviour`` says, by version, what goes wrong."""

    behaviour: ClassVar[dict] = {}
    started: ClassVar[list] = []

    def __init__(self, info, config, images, module="bench.measure.worker"):
        self.name, self.module, self.closed = info.name, module, False
        self.started.append(self)

    def send(self, line):
        self.line = line

    def receive(self):
        return self.ask(self.line)

    def ask(self, command):
        wrong = self.behaviour.get((self.name, command))
        if isinstance(wrong, BaseException):
            raise wrong
        if wrong is not None:
            return wrong
        if command == "verify":
            return {"checks": 3, "failures": [], "deterministic": True}
        if command == "ceilings":
            return dict(CEILINGS)
        losses = {"losses": [0.25]}
        if command == "start":
            return {"memory": {"process_bytes": 1, "pool_bytes": None, "device_bytes": None}, **losses}
        if command == "step":
            work = step_operations(autoencoder(), 64)
            ceilings = Ceilings(**CEILINGS)
            operations = [[op.stage, op.name, 3 * ceilings.bound_s(op)] for op in work]
            total = sum(seconds for *_, seconds in operations)
            return {"seconds": total, "operations": operations, "clean": True, **losses}
        return {"unwritten": [], **losses}

    def close(self):
        self.closed = True


@pytest.fixture
def measured(monkeypatch):
    """Run ``measure_layers`` with stand-ins; gives the record."""
    monkeypatch.setattr(FakeWorker, "started", [])
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    monkeypatch.setattr(layer_runner, "Worker", FakeWorker)

    def measure(*names, **behaviour):
        monkeypatch.setattr(FakeWorker, "behaviour", behaviour.get("behaviour", {}))
        infos = tuple(find(name) for name in names)
        config = RunConfig(infos, "cpu", "fp32", 2, 64, learning_rate=0.001, seed=0, threads=1, samples=64)
        told = []
        images = np.zeros((4 * 64, 3, 32, 32), np.uint8)
        found = measure_layers(config, images, ["convbench", "layers"], told.append)
        if not behaviour:
            assert len(told) == layer_runner.total_steps(config)
        return found

    return measure


def test_a_measurement_from_end_to_end(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_runner, "shuffled", lambda rows: rows[::-1])
    found = measured("v2", "v4", "v4")
    assert [one["id"] for one in found["rows"]] == ["v2", "v4", "v4#2"]
    assert [one["reason"] for one in found["rows"]] == ["", "", ""]
    assert all(len(one["step_s"]) == 2 for one in found["rows"])
    assert found["order"] == [["v4#2", "v4", "v2"]] * 2
    assert all(worker.closed for worker in FakeWorker.started)
    timed = [worker for worker in FakeWorker.started if worker.module == "bench.measure.layer_worker"]
    assert [worker.name for worker in timed] == ["v2", "v4", "v4"]
    path = write_layers(found, prepare_folder(tmp_path))
    assert path.name.endswith("_layers.json")
    assert read_layers(path) == json.loads(json.dumps(found))


WRONG = {
    "verify": ({"checks": 3, "failures": ["forward: bad"], "deterministic": True}, "failed verification: forward: bad"),
    "start": (WorkerError("MemoryError: no room"), "no room"),
    "step": ({"seconds": 1.0, "operations": [], "clean": True, "losses": [float("nan")]}, "suspicious: a loss is nan"),
    "finish": ({"unwritten": ["conv1.bias"], "losses": [float("nan")]}, "outputs equal to the poison: conv1.bias"),
}


def test_ceilings_taken_on_a_busy_machine_are_measured_again_before_a_row_is_called_suspicious(measured):
    busy = {**CEILINGS, "gemm_flop_per_s": 1e10}
    answers = iter([busy, busy, busy, CEILINGS])

    class Later(dict):
        """The ceilings, as the machine becomes idle."""

        def get(self, key, default=None):
            return next(answers) if key == ("v4", "ceilings") else default

    found = measured("v4", behaviour=Later())
    assert found["rows"][0]["reason"] == ""
    assert found["ceilings"] == CEILINGS
    assert next(answers, None) is None

    answers = iter([busy] * 10)
    found = measured("v4", behaviour=Later())
    assert "suspicious" in found["rows"][0]["reason"]
    assert len(list(answers)) == 10 - 1 - layer_runner.CEILING_ATTEMPTS


@pytest.mark.parametrize("command", WRONG)
def test_a_version_that_goes_wrong_has_a_reason_and_does_not_stop_the_others(measured, command, tmp_path):
    answer, reason = WRONG[command]
    found = measured("v1", "v4", behaviour={("v1", command): answer})
    bad, good = found["rows"]
    assert reason in bad["reason"]
    assert good["reason"] == ""
    assert bad["verified"] == (command != "verify")
    if command in ("verify", "start", "step"):
        assert bad["step_s"] == bad["operations"] == []
    read_layers(write_layers(found, prepare_folder(tmp_path)))


def test_ctrl_c_ends_every_process(measured):
    with pytest.raises(KeyboardInterrupt):
        measured("v1", "v4", behaviour={("v4", "step"): KeyboardInterrupt()})
    assert all(worker.closed for worker in FakeWorker.started)


def test_without_ceilings_nothing_is_measured(measured):
    with pytest.raises(WorkerError, match="ceilings could not be measured: it crashed"):
        measured("v4", behaviour={("v4", "ceilings"): WorkerError("it crashed")})


# Files, tables, charts ----------------------------------------------------------------------------------------------


def test_a_file_is_never_overwritten(tmp_path):
    runs = prepare_folder(tmp_path)
    first, second = (write_layers(record(row("v4")), runs) for _ in range(2))
    assert first.name == "2026-01-02T030405Z_amd-epyc-2c_abc1234567_layers.json"
    assert second.name == "2026-01-02T030405Z_amd-epyc-2c_abc1234567_layers-2.json"
    assert read_layers(second) == record(row("v4"))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema",), "convbench-run/2", "has schema 'convbench-run/2'"),
        (("environment",), {}, "'cpu' is missing"),
        (("config", "rounds"), 0, "must be counts"),
        (("ceilings",), None, "not a valid"),
        (("ceilings", "gemm_flop_per_s"), 0, "must be a speed"),
        (("ceilings", "surplus"), 0, "surplus"),
        (("ceilings", "math"), "tf32", "no ceilings for the math of v2"),
        (("other_ceilings",), {}, "must be a list"),
        (("warnings",), "text", "warnings"),
        (("rows",), [], "no rows"),
        (("rows", 1, "id"), "v2", "same id"),
        (("order",), [["v2", "v3"]], "the order must name rows"),
        (("order",), {}, "the order must be a list"),
        (("rows", 0, "label"), None, "must be texts"),
        (("rows", 0, "verified"), False, "was not verified"),
        (("rows", 0, "step_s"), [-1.0], "a time that is none"),
        (("rows", 0, "step_s"), 1.0, "must be lists"),
        (("rows", 0, "operations"), [], "no operations"),
        (("rows", 0, "operations", 0, "flops"), 1.5, "must be counts"),
        (("rows", 0, "operations", 0, "seconds"), [], "has no times"),
        (("rows", 0, "operations", 0, "seconds"), [True], "a time that is none"),
        (("rows", 0, "operations", 1, "stage"), "step", None),
        (("rows", 0, "memory"), {}, "'planned' is missing"),
        (("rows", 0, "memory", "peak", "pool_bytes"), "much", "a count or null"),
        (("rows", 0, "memory", "planned", 0, "bytes"), -1, "must have sizes"),
    ],
    ids=str,
)
def test_files_with_wrong_parts_are_refused(tmp_path, place, value, message):
    data = deepcopy(record(row("v2"), row("v4")))
    *way, last = place
    inner = data
    for step in way:
        inner = inner[step]
    inner[last] = value
    if message is None:  # two operations of one name
        data["rows"][0]["operations"][1] = data["rows"][0]["operations"][0]
        message = "names of their own"
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(cli.UsageError, match=message):
        draw_layer_charts(path, tmp_path / "charts")
    assert not (tmp_path / "charts").exists()


def text_of(table, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
        return console.export_text()


def test_the_table_fits_a_hundred_columns_and_shows_everything():
    slow = row("v1", scale=100)
    slow["operations"].append(
        {"stage": "conv5", "operation": "stage_backward_rest", "flops": 0, "least_bytes": 0, "seconds": [2e-3] * 3}
    )
    slow["operations"][1]["seconds"][0] *= 3
    (summary,) = summarise_layers(record(slow))
    text = text_of(layers_table(summary))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in text
    assert "v1 naive (NHWC)" in text
    assert sum(line.split()[:1] == ["backward"] and "filter" in line for line in lines) == 5
    assert "rest of backward" in text
    assert "noisy" in text
    for name in ("operations", "overhead", "whole step", "bound by", "GFLOP/s", "GB/s"):
        assert name in text
    assert ceilings_line(CEILINGS) == "ceilings measured (cpu, fp32): GEMM 200 GFLOP/s, memory 30 GB/s"


def test_memory_stands_beside_the_budget_and_nothing_is_left_blank():
    rows = [row(info.name) for info in REGISTRY]
    text = text_of(layer_memory_table(record(*rows)))
    assert max(map(len, text.splitlines())) <= 100
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert lines["planned: activations, gradients"][-5] == "440"
    assert lines["planned: together"][-5] == "625"
    assert sum(BUDGET_MB.values()) == 621
    assert text.count("not measured") == 8
    assert lines["peak: process (RSS)"][-1] == "500.0"
    # What ``describe`` plans.
    described = text_of(memory_table(autoencoder(), 64, find("v4"), "cpu", 2))
    total = next(line.split()[-1] for line in described.splitlines() if "without pictures" in line)
    assert lines["planned: together"][-1] == f"{float(total):.1f}"


def test_charts_show_what_is_believed_and_nothing_else(tmp_path):
    bad = row("v3", reason="suspicious: 900 GFLOP/s")
    results = write_layers(record(row("v2", scale=3), bad, row("v4")), prepare_folder(tmp_path))
    written = draw_layer_charts(results, tmp_path / "charts")
    assert [path.name.rpartition("_")[2] for path in written] == [
        "steps.png", "steps.svg", "roofline.png", "roofline.svg",
    ]  # fmt: skip
    steps, roofline = (path.read_text() for path in written if path.suffix == ".svg")
    for text in (steps, roofline):
        assert "v4 im2col GEMM (NCHW)" in text
        assert "v3 direct" not in text
    assert "overhead 9.1 %" in steps
    assert "GEMM: 200 GFLOP/s, measured" in roofline
    assert "memory: 30 GB/s, measured" in roofline
    cli.plot([results], out=tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in written
    }


def test_both_arithmetics_have_a_roof():
    both = record(row("v1"), row("v4", math="tf32"))
    both["other_ceilings"] = [{**CEILINGS, "math": "tf32", "gemm_flop_per_s": 4e11}]
    texts = [text.get_text() for axes in roofline_figure(both).axes for text in axes.texts]
    assert "GEMM: 200 GFLOP/s, measured" in texts
    assert "GEMM, TF32: 400 GFLOP/s, measured" in texts
    assert summarise_layers(both)[1].ceilings.gemm_flop_per_s == 4e11


def test_nothing_to_draw_says_why(tmp_path):
    results = write_layers(record(row("v4", verified=False, reason="it crashed", step_s=[], operations=[])), tmp_path)
    with pytest.raises(cli.UsageError, match="v4: it crashed"):
        draw_layer_charts(results, tmp_path / "charts")


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
    with pytest.raises(cli.UsageError, match=message):
        cli.layers_command(**{"device": "cpu", **options}, out=tmp_path / "results")
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
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    data = read_layers(path)
    (only,) = data["rows"]
    assert only["verified"]
    assert only["checks"] > 100
    assert len(only["step_s"]) == 1
    wanted = {(operation.stage, operation.name) for operation in step_operations(autoencoder(), 2)}
    assert {(entry["stage"], entry["operation"]) for entry in only["operations"]} == wanted
    assert only["memory"]["peak"]["process_bytes"] > 50e6
    assert only["memory"]["peak"]["pool_bytes"] is None
    for word in ("backward filter", "overhead", "whole step", "ceilings measured", "not measured", "_roofline.svg"):
        assert word in done.stdout
    assert "v4: compiling" in done.stderr
    assert len(list((tmp_path / "charts").iterdir())) == 4
