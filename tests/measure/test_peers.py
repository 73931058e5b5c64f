"""Peers: missing PyTorch is said, a peer that computes something else is never timed, and so is a row too fast."""

import importlib.util
from types import SimpleNamespace

import pytest

from bench.measure import run as runner
from bench.measure.peers import PEERS, find_peers
from bench.records.run import Row, RunRecord
from common.errors import UsageError


def test_every_form_of_a_peer_and_each_once():
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed (extra: peers)")
    assert find_peers(["torch", "torch"]) == PEERS["torch"]
    assert find_peers(None) == ()


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="peers"):
        find_peers(["torch"])


def a_row(name, loss, **changes):
    fields = {"verified": True, "loss": [loss], "first_epoch_s": 1.0, "peer": name.startswith("torch")}
    return Row(name, name, "cpu", "NCHW", "fp32", **{**fields, **changes})


@pytest.mark.parametrize(("loss", "kept"), [(0.50001, True), (0.51, False)])
def test_a_peer_with_another_loss_is_not_timed(loss, kept):
    closed = []
    peer = a_row("torch-eager", loss)
    workers = {"torch-eager": SimpleNamespace(close=lambda: closed.append(True))}
    runner._compare_first_loss(peer, [a_row("v1", 0.5), peer], workers)
    assert peer.verified is kept
    assert bool(closed) is not kept
    assert ("failed verification" in peer.reason) is not kept
    assert (peer.first_epoch_s is None) is not kept


def test_a_row_faster_than_the_machine_is_not_believed(monkeypatch):
    honest, too_fast = a_row("v1", 1.0, epoch_s=[100.0]), a_row("v4", 1.0, epoch_s=[1e-6])
    record = RunRecord({}, {"samples": 64}, [honest, too_fast], "now")
    measured = []

    def ceilings(*_):
        measured.append({"math": "fp32", "gemm_flop_per_s": 1e12})
        return measured[-1]

    monkeypatch.setattr(runner, "_ceilings", ceilings)
    runner._judge(None, record, None)
    assert len(measured) == runner.CEILING_ATTEMPTS
    assert honest.reason == ""
    assert "suspicious" in too_fast.reason
    assert not too_fast.finished


def test_a_row_that_stops_doing_the_work_is_not_believed():
    honest, lazy = a_row("v1", 1.0, epoch_s=[2.0, 2.0]), a_row("v2", 1.0, epoch_s=[1.0, 1.0])
    other_math = a_row("v4", 1.0, epoch_s=[1.0, 1.0])
    honest.loss, lazy.loss, other_math.loss, other_math.math = (
        [1.0, 0.5, 0.25],
        [1.0, 0.5, 0.5],
        [1.0, 0.5, 0.24],
        "tf32",
    )
    runner._compare_losses([honest, lazy, other_math])
    assert (honest.reason, other_math.reason) == ("", "")
    assert "loss 0.5 in epoch 2, v1 has 0.25" in lazy.reason


def test_a_ceiling_lowered_by_other_work_accuses_nobody(monkeypatch):
    row = a_row("v4", 1.0, epoch_s=[0.5])
    record = RunRecord({}, {"samples": 64}, [row], "now")
    speeds = iter([5e10, 6e10, 2e11])
    monkeypatch.setattr(runner, "_ceilings", lambda *_: {"math": "fp32", "gemm_flop_per_s": next(speeds)})
    runner._judge(None, record, None)
    assert row.reason == ""
    assert record.ceilings["gemm_flop_per_s"] == 2e11
