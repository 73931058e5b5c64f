"""A run's rules, with processes that are none: who is believed, and when a round of epochs begins."""

import importlib.util
import json
import math
from dataclasses import asdict, replace
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pytest

from bench.machine.ceilings import Ceilings
from bench.machine.conditions import Conditions
from bench.measure import run as module
from bench.measure.peers import find_peer
from bench.measure.run import check_first_loss, compare_losses, judge_speeds, new_rows, run
from bench.measure.setup import Setup, WorkerTask, epoch_batch_sizes
from bench.measure.worker import PeerWorker, VersionWorker
from bench.records.run import RunRow, RunSettings
from common.architecture import scaled_autoencoder
from common.dataset import Dataset
from common.errors import UsageError
from tests.support.results_files import run_record
from versions.registry import find


class FakeWorkers:
    """Stands for the processes of a run: every row runs, ceilings come from a list."""

    def __init__(self, speeds=(), *names, width=1.0):
        self.setup = Setup(tuple(map(find_info, names)), "cpu", "fp32", 1, width=width)
        self.speeds = iter(speeds)
        self.measured = 0
        self.ended = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def running(self, row):
        return row.id not in self.ended

    def start(self, row, images):
        pass

    def fail(self, row, reason):
        row.reason = reason
        self.ended.append(row.id)

    def measure_ceilings(self, precision):
        self.measured += 1
        return Ceilings("cpu", precision, 2, next(self.speeds), 1e10, 1e10, None)


def find_info(name):
    return find_peer(name) if name.startswith("torch") else find(name)


def a_row(name, loss, **changes):
    fields = {"verified": True, "loss": [loss], "first_epoch_s": 1.0, "images_per_s": 1.0, "peak_bytes": 1}
    return RunRow(name, name, "cpu", "NCHW", "fp32", **{**fields, "peer": name.startswith("torch"), **changes})


def a_record(*rows):
    record = run_record()
    record.rows, record.ceilings, record.config = list(rows), None, RunSettings("photos", 64, 64)
    record.warnings, record.order = [], []
    return record


def nothing(what):
    """Reports to nobody."""


def test_an_epoch_has_the_full_batch_and_the_last_one():
    assert epoch_batch_sizes(256, 64) == (64,)
    assert epoch_batch_sizes(100, 64) == (64, 36)
    assert epoch_batch_sizes(6, 64) == (6,)


def test_rows_of_one_version_have_ids_of_their_own():
    setup = Setup((find("v4"), find("v1"), find("v4")), "cpu", "tf32", 1)
    assert list(setup.by_row) == ["v4", "v1", "v4#2"]
    assert setup.row_fields("v4#2")["backend"] == "v4"
    assert setup.row_fields("v4")["precision"] == "fp32"  # TF32 is a GPU's


@pytest.mark.parametrize(("loss", "kept"), [(0.50001, True), (0.51, False)])
def test_a_peer_with_another_loss_is_not_timed(loss, kept):
    workers, peer = FakeWorkers(), a_row("torch-eager", loss)
    check_first_loss(peer, [a_row("v1", 0.5), peer], workers)
    assert peer.verified is kept
    assert workers.running(peer) is kept
    assert ("failed verification" in peer.reason) is not kept
    assert (peer.first_epoch_s is None) is not kept


def test_a_row_faster_than_the_machine_is_not_believed():
    honest, too_fast = a_row("v1", 1.0, epoch_s=[100.0]), a_row("v4", 1.0, epoch_s=[1e-6])
    record, workers = a_record(honest, too_fast), FakeWorkers(repeat(1e12), "v1", "v4")
    judge_speeds(record, workers, nothing)
    assert workers.measured == module.CEILING_ATTEMPTS
    assert honest.reason == ""
    assert "suspicious" in too_fast.reason
    assert not too_fast.finished


def test_ceilings_lowered_by_other_work_accuse_no_row():
    row = a_row("v4", 1.0, epoch_s=[0.5])
    record, workers = a_record(row), FakeWorkers([5e10, 6e10, 2e11], "v4")
    judge_speeds(record, workers, nothing)
    assert row.reason == ""
    assert workers.measured == 3
    assert record.ceilings.gemm_flop_per_s == 2e11


@pytest.mark.parametrize(("rate", "believed"), [(1.0, True), (2.0, False)])
@pytest.mark.parametrize(("name", "width"), [("v1", 1.0), ("v1", 0.5), ("torch-eager", 2.0), ("fast", 0.5)])
def test_a_row_is_held_to_its_own_products_in_its_own_network(monkeypatch, name, width, rate, believed):
    network = scaled_autoencoder(width)
    flops = network.training_flops
    if name == "fast":  # an algorithm with a quarter of the products
        fast = SimpleNamespace(name="fast", training_flops=lambda architecture: architecture.training_flops // 4)
        monkeypatch.setattr(f"{__name__}.find_info", lambda name: fast)
        flops //= 4
    row = a_row(name, 1.0, epoch_s=[64 * flops / (rate * 1e11)])
    judge_speeds(a_record(row), FakeWorkers(repeat(1e11), name, width=width), nothing)
    assert (row.reason == "") is believed


def test_the_processes_verify_and_train_the_network_of_the_width(tmp_path):
    images = tmp_path / "images.npy"
    np.save(images, np.zeros((4, 3, 32, 32), np.uint8))
    setup = Setup((find("v4"),), "cpu", "fp32", 1, batch_size=2, width=1 / 64)
    task = setup.task(setup.infos[0], images)
    told = json.loads(json.dumps(asdict(task)))
    worker = VersionWorker(WorkerTask(**told))
    assert worker.trainer.network.read_parameters()["conv2.weight"].shape == (2, 4, 3, 3)
    if importlib.util.find_spec("torch") is not None:
        peer = find_peer("torch-eager")
        task = replace(setup, infos=(peer,), verified_sizes=(2,)).task(peer, images)
        peer_worker = PeerWorker(task)
        assert all(check.passed for check in peer_worker.checks())
        assert peer_worker.trainer.read(gradients=False)["conv2.weight"].shape == (2, 4, 3, 3)


def test_rows_that_were_verified_before_are_not_verified_again(monkeypatch):
    workers = FakeWorkers(width=0.5)  # it has no ``verify``
    monkeypatch.setattr(module, "Workers", lambda setup: workers)
    monkeypatch.setattr(module, "_measure", lambda record, *rest: record.rows[0].epoch_s.append(2.0))
    setup = Setup((find("v1"), find("v4")), "cpu", "fp32", 1, batch_size=2, width=0.5)
    rows = new_rows(setup)
    rows[0].verified, rows[0].checks, rows[1].reason = True, 9, "left out"
    pictures = Dataset(np.zeros((4, 3, 32, 32), np.uint8), "photos", "")
    record = run(setup, pictures, 1, [], nothing, verified=rows)
    assert [(row.verified, row.checks, row.reason) for row in record.rows] == [(True, 9, ""), (False, 0, "left out")]
    assert (record.rows[0].images_per_s, record.config.width) == (2.0, 0.5)
    assert rows[0].epoch_s == []


def test_a_width_without_a_network_is_refused():
    with pytest.raises(UsageError, match=r"width 0\.3: "):
        assert Setup((find("v4"),), "cpu", "fp32", 1, width=0.3).architecture


def test_a_row_that_stops_doing_the_work_is_not_believed():
    honest, lazy = a_row("v1", 1.0, epoch_s=[2.0, 2.0]), a_row("v2", 1.0, epoch_s=[1.0, 1.0])
    other = a_row("v4", 1.0, epoch_s=[1.0, 1.0])
    honest.loss, lazy.loss, other.loss, other.precision = [1.0, 0.5, 0.25], [1.0, 0.5, 0.5], [1.0, 0.5, 0.24], "tf32"
    compare_losses([honest, lazy, other])
    assert (honest.reason, other.reason) == ("", "")
    assert "loss 0.5 in epoch 2, v1 has 0.25" in lazy.reason


@pytest.mark.parametrize(("limit", "rounds"), [(None, 5), (1, 1), (125, 2), (1000, 5)])
def test_no_round_begins_when_time_is_up(monkeypatch, limit, rounds):
    now = 100.0
    begun = []

    def epoch(row, workers, *, first=False):  # a version's epoch takes 20 s, the first one 40 s
        nonlocal now
        begun.append(row.id)
        now += 40 if first else 20
        row.loss.append(0.5)
        row.first_epoch_s = row.first_epoch_s or 40.0
        if not first:
            row.epoch_s.append(20.0)

    monkeypatch.setattr(module, "perf_counter", lambda: now)
    monkeypatch.setattr(module, "time_epoch", epoch)
    monkeypatch.setattr(module, "shuffled", lambda rows: rows[::-1])
    monkeypatch.setattr(module, "read_conditions", lambda device: Conditions())
    workers = FakeWorkers()
    workers.setup = Setup((find("v1"), find("v4")), "cpu", "fp32", 1)
    rows = [RunRow(**workers.setup.row_fields(name), verified=True) for name in ("v1", "v4")]
    left_out = a_row("v2", 1.0, reason="left out")
    monkeypatch.setattr(workers, "running", lambda row: row is not left_out)
    record = a_record(*rows, left_out)
    record.config.epochs = 5
    module._time_rows(record, workers, None, nothing, now + limit if limit else math.inf)
    assert [len(row.epoch_s) for row in rows] == [rounds] * 2
    assert record.order == [["v4", "v1"]] * rounds
    assert begun == ["v1", "v4", *["v4", "v1"] * rounds]
    assert record.warnings == ([] if rounds == 5 else [f"time was up: {rounds} of 5 epochs"])
