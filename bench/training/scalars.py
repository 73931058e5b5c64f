"""A training run's figures for TensorBoard: event files in the folder ``tensorboard`` of the run's folder.

Events are written in this thread and flushed at once, so that a full disk raises an error there. A resumed run begins
its file with a mark: TensorBoard then discards the later steps that a killed process wrote.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Scalars:
    """Writes scalars; every method raises OSError if the disk refuses them."""

    def __init__(self, folder: Path, step: int) -> None:
        """Begin an event file for the steps after ``step``."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        try:
            self._write(0, file_version="brain.Event:2")
            # TensorBoard discards everything from this step on; steps count from 1.
            self._write(step + 1, session_log=SessionLog(status=SessionLog.START))
        except OSError:
            self.close()
            raise

    def add(self, values: Iterable[tuple[int, dict[str, float | None]]]) -> None:
        """Write steps and their values by tag, None left out, and flush the file to the disk."""
        for step, tags in values:
            for tag, value in tags.items():
                if value is not None:
                    self._write(step, summary=self._scalar(tag, value))
        self._records.flush()

    def close(self) -> None:
        """End the file."""
        self._records.close()

    def _write(self, step: int, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())
