"""Every test of this folder runs in the strict simulator."""

import pytest

from tests.simulator import strict


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """Guard zones around the buffers of the test."""
    return strict.install(monkeypatch)
