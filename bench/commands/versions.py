"""``convbench list``: the versions, and where they can run."""

from __future__ import annotations

from rich.console import Console

from bench.commands.console import show
from bench.machine.devices import DEVICES, device_status
from bench.views.network_tables import versions_table


def list_command() -> None:
    """Show the versions and whether each can run here."""
    statuses = [device_status(device) for device in DEVICES]
    show(versions_table(statuses), Console())
    for status in statuses:
        print(f"{status.device}: {status.name if status.available else 'not here: ' + status.reason}")
