"""Peers: every form once, and what to do where PyTorch is missing."""

import importlib.util

import pytest

from bench.measure.peers import PEERS, find_peers
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
