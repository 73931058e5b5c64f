"""Training that is killed repeatedly at random points ends with the same bits as uninterrupted training."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bench.machine.devices import ROOT
from bench.records import files
from bench.training.checkpoint import load_checkpoint
from bench.training.folder import BEST, LAST, METRICS
from tests.support.tiny_training import ARCHITECTURE

KILLS = 20
EPOCHS = 12
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")


def start(out):
    fixed = {"PYTHONPATH": str(ROOT), "NUMBA_DISABLE_JIT": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.tiny_training", str(out), str(EPOCHS)],
        cwd=ROOT,
        env={**os.environ, **fixed},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_training_killed_at_random_points(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = start(whole)
    assert done.communicate(timeout=120)[1] == ""
    expected = load_checkpoint(whole / LAST, ARCHITECTURE)
    assert (expected.position.epoch, expected.position.step) == (EPOCHS, 0)

    moments = random.Random(1)
    kills, reached = 0, []
    while kills < KILLS:
        process = start(killed)
        before = (killed / LAST).stat().st_mtime_ns if (killed / LAST).exists() else 0
        # Wait for a new checkpoint, so that training progresses; then for a time in which some steps pass.
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (killed / LAST).exists() and (killed / LAST).stat().st_mtime_ns != before:
                break
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.12))
        process.kill()
        process.communicate()
        if process.returncode != -signal.SIGKILL:  # it finished before it was killed: start again from the beginning
            assert process.returncode == 0
            reached.append((EPOCHS, 0))
            for path in killed.iterdir():
                path.unlink()
            continue
        kills += 1
        position = load_checkpoint(killed / LAST, ARCHITECTURE).position
        reached.append((position.epoch, position.step))
        if (killed / BEST).exists():
            load_checkpoint(killed / BEST, ARCHITECTURE)
    assert len(set(reached)) > KILLS / 2, reached  # at different points, not all at the beginning
    last = start(killed)
    assert last.communicate(timeout=120)[1] == ""
    found = load_checkpoint(killed / LAST, ARCHITECTURE)
    assert found.position == expected.position
    for name, value in expected.parameters.items():
        np.testing.assert_array_equal(found.parameters[name], value, err_msg=name)
    assert [row.train_mse for row in found.history] == [row.train_mse for row in expected.history]
    assert [row.held_out_mse for row in found.history] == [row.held_out_mse for row in expected.history]
    assert len((killed / METRICS).read_text().splitlines()) == 1 + EPOCHS
    assert not list(killed.glob(".*")), "drafts were left behind"


KILLED_AT = {
    "write": "files.Path.open = lambda path, mode: Half(path, mode)",
    "fsync": "files.os.fsync = lambda handle: os._exit(9)",
    "replace": "files.Path.replace = lambda *paths: os._exit(9)",
}
DYING = """
import io, os, sys
from pathlib import Path
from bench.records import files

class Half(io.FileIO):
    def write(self, data):
        super().write(data[: len(data) // 2])
        os._exit(9)

{killed}
files.replace_file(Path(sys.argv[1]), b"new" * 1000)
"""


@pytest.mark.parametrize("killed", KILLED_AT.values(), ids=KILLED_AT.keys())
def test_a_write_killed_at_each_of_its_calls(tmp_path, killed):
    """The file is unchanged wherever the process ends, and the draft that it leaves is removed later."""
    path = tmp_path / "file"
    files.replace_file(path, b"old" * 1000)
    code = DYING.format(killed=killed)
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 9
    assert path.read_bytes() == b"old" * 1000
    assert len(list(tmp_path.iterdir())) == 2
    files.replace_file(path, b"newer")
    others = {f".file.draft-{os.getpid()}", ".file.draft-\u00b2", ".other.draft-99999999"}
    for name in others:  # of a live process, of no process, and of another file
        (tmp_path / name).write_text("kept")
    files.clear_drafts(path)
    assert {found.name for found in tmp_path.iterdir()} == {"file", *others}
    assert path.read_bytes() == b"newer"
