"""``convbench run --time-limit``: rounds are whole, one is always run, and the record says how many were meant."""

import pytest

from bench.measure import run as runner
from bench.measure.run import RunConfig
from bench.records.run import Row, RunRecord
from versions.registry import find


@pytest.mark.parametrize(("limit", "rounds"), [(None, 5), (1, 1), (125, 2), (1000, 5)])
def test_no_round_is_begun_when_time_is_up(monkeypatch, limit, rounds):
    infos = (find("v1"), find("v4"))
    config = RunConfig(
        infos, "cpu", "fp32", 5, 64, learning_rate=0.1, seed=0, threads=1, samples=64, time_limit_s=limit
    )
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

    monkeypatch.setattr(runner, "perf_counter", lambda: now)
    monkeypatch.setattr(runner, "_epoch", epoch)
    monkeypatch.setattr(runner, "shuffled", lambda rows: rows[::-1])
    monkeypatch.setattr(runner, "Worker", lambda *arguments: None)
    monkeypatch.setattr(runner, "conditions", lambda device: {})
    rows = [Row(info.name, info.label, "cpu", info.layout, "fp32", verified=True) for info in infos]
    record = RunRecord({}, {}, rows, "")
    runner._time(config, record, {}, None, lambda what: None, begun=now)
    assert [len(row.epoch_s) for row in rows] == [rounds] * 2
    assert record.order == [["v4", "v1"]] * rounds
    assert begun == ["v1", "v4", *["v4", "v1"] * rounds]
    assert record.warnings == ([] if rounds == 5 else [f"time was up: {rounds} of 5 epochs"])
