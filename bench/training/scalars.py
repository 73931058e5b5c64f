"""A training run's figures as TensorBoard reads them: event files in ``tensorboard/`` in the run's folder.

Events are written in this thread and flushed before every checkpoint, so that a full disk is an error where it happens.
A process that takes a run up begins its file with a mark that tells TensorBoard to forget what an earlier one, since
killed, wrote of later steps.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


class Scalars:
    """Writes scalars; every method raises OSError if the disk does not take them."""

    def __init__(self, folder: Path, step: int) -> None:
        """Begin an event file for what follows after ``step`` steps."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        try:
            self._write(0, file_version="brain.Event:2")
            # All from this step on is forgotten; steps count from 1.
            self._write(step + 1, session_log=SessionLog(status=SessionLog.START))
        except OSError:
            self.close()
            raise

    def add(self, step: int, **values: float | None) -> None:
        """Write the values that there are, by tag (two underscores for a slash), after ``step`` steps."""
        for tag, value in values.items():
            if value is not None:
                self._write(step, summary=self._scalar(tag.replace("__", "/"), value))

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self._records.flush()

    def close(self) -> None:
        """End the file."""
        self._records.close()

    def _write(self, step: int, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())
