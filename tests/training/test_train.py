"""Training runs of a tiny network: resumed, streamed, stopped, diverged, without disk space."""

import csv
import errno
import gc
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import psutil
import pytest
from PIL import Image

from bench.machine.devices import ROOT
from bench.records.training import BestEpoch, psnr_db
from bench.training import folder as train_folder
from bench.training import run as train
from bench.training.checkpoint import load_checkpoint, save_checkpoint
from bench.training.data import TrainingData, load_training_data
from bench.training.folder import BEST, LAST, LOSS_CHART, METRICS, PICTURES
from bench.training.run import TrainingRun
from common import reference
from common.architecture import autoencoder
from common.dataset import labelled_crops
from common.device import usable_cores
from common.errors import RunError, UsageError
from common.network import Network, initial_parameters
from common.training import Evaluator, Trainer
from tests.common.test_dataset import write_batches
from tests.support.tiny_training import ARCHITECTURE, tiny_config, tiny_data, train_tiny
from versions.registry import find, names

each_version = pytest.mark.parametrize("name", names())


def interrupted(out, config, steps, data=None, **options):
    """Train until ``steps`` steps are done, then stop as after Ctrl-C; returns whether the run was finished."""
    run = TrainingRun(config, data or tiny_data(), ARCHITECTURE, out)

    def stop(progress):
        if (progress.epoch - 1) * progress.steps + progress.step == steps and not progress.figures:
            run.stop()

    return run.run(stop, **options)


def loaded(out, name=LAST):
    return load_checkpoint(out / name, ARCHITECTURE)


def metrics(out):
    return list(csv.DictReader((out / METRICS).read_text().splitlines()))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def assert_same_bits(found, expected):
    for name, value in expected.parameters.items():
        np.testing.assert_array_equal(found.parameters[name], value, err_msg=name)


@each_version
def test_a_run_stopped_at_any_step_resumes_to_the_same_bits(tmp_path, monkeypatch, name):
    monkeypatch.setattr(TrainingRun, "_draw_losses", lambda run: None)  # slower than the training
    config = tiny_config(3, name)  # four steps an epoch, the last with one picture
    train_tiny(tmp_path, config)
    expected = loaded(tmp_path)
    for steps in range(1, 12):
        out = tmp_path / str(steps)
        out.mkdir()
        assert not interrupted(out, config, steps)
        assert (loaded(out).position.epoch, loaded(out).position.step) == divmod(steps, 4)
        train_tiny(out, config)
        found = loaded(out)
        assert found.position == expected.position
        assert_same_bits(found, expected)
        for ours, theirs in zip(found.history, expected.history, strict=True):
            kept = ("epoch", "step", "train_mse", "held_out_mse", "curve")
            assert [getattr(ours, key) for key in kept] == [getattr(theirs, key) for key in kept]
        assert found.best == expected.best


def test_a_run_can_change_versions(tmp_path):
    train_tiny(tmp_path, tiny_config(6, "v1"))
    expected = loaded(tmp_path)
    out = tmp_path / "mixed"
    out.mkdir()
    interrupted(out, tiny_config(6, "v1"), 6)
    for epochs, name in ((3, "v4"), (4, "v2"), (6, "v3")):
        train_tiny(out, tiny_config(epochs, name))
        assert loaded(out).backend == name
    found = loaded(out)
    assert [row.backend for row in found.history] == ["v1", "v4", "v4", "v2", "v3", "v3"]
    start = initial_parameters(ARCHITECTURE, 0)
    for parameter, value in expected.parameters.items():
        moved = np.linalg.norm(value - start[parameter])
        assert 0 < np.linalg.norm(found.parameters[parameter] - value) + 1e-12 <= 2e-3 * moved, parameter


def test_the_files_of_a_run(tmp_path):
    run = train_tiny(tmp_path, tiny_config(4, "v4"))
    files = {BEST, LAST, METRICS, LOSS_CHART, PICTURES}
    assert {path.name for path in tmp_path.iterdir()} == files
    rows = metrics(tmp_path)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["step"] for row in rows] == ["4", "8", "12", "16"]
    for row in rows:
        for part in ("train", "held_out"):
            assert float(row[f"{part}_psnr_db"]) == pytest.approx(-10 * np.log10(float(row[f"{part}_mse"])))
        assert float(row["images_per_s"]) == pytest.approx(7 / float(row["epoch_s"]))
    errors = [float(row["held_out_mse"]) for row in rows]
    best = loaded(tmp_path, BEST)
    assert best.position.epoch == 1 + errors.index(min(errors)) == run.best.epoch
    # The held-out error is that of the float64 reference on these pictures with the parameters of the checkpoint.
    last = loaded(tmp_path)
    exact = tiny_data().held_out / 255.0
    parameters = {name: value.astype(np.float64) for name, value in last.parameters.items()}
    assert errors[-1] == pytest.approx(reference.forward_backward(ARCHITECTURE, parameters, exact).loss, rel=1e-5)
    # Three held-out pictures above their reconstructions; each twice as large, with a gap of two.
    sheet = pixels(tmp_path / PICTURES)
    assert sheet.shape == (2 * 2 * 10, 2 * 3 * 10, 3)
    np.testing.assert_array_equal(sheet[:16:2, 40:56:2], tiny_data().held_out[2].transpose(1, 2, 0))
    made = np.clip(reference.forward_backward(ARCHITECTURE, parameters, exact).prediction, 0, 1)
    np.testing.assert_allclose(sheet[20:36:2, 40:56:2], 255 * made[2].transpose(1, 2, 0), atol=0.6)
    assert pixels(tmp_path / LOSS_CHART).shape[1] > 1000


def test_without_held_out_pictures_the_training_error_decides_which_epoch_is_best(tmp_path):
    train_tiny(tmp_path, tiny_config(2, "v4"), tiny_data(held_out=0))
    last = loaded(tmp_path)
    assert [row.held_out_mse for row in last.history] == [None, None]
    assert last.best.mse == min(row.train_mse for row in last.history)
    assert metrics(tmp_path)[0]["held_out_psnr_db"] == ""
    assert (tmp_path / PICTURES).exists()


def test_psnr():
    assert psnr_db(0.01) == pytest.approx(20)
    assert psnr_db(None) is None
    assert psnr_db(0.0) is None


@each_version
def test_the_warm_up_does_not_change_training(name):
    pictures = tiny_data().train
    ends = []
    for warm in (False, True):
        network = Network(find(name).load("cpu"), ARCHITECTURE, 2, initial_parameters(ARCHITECTURE, 0))
        trainer = Trainer(network, pictures, learning_rate=0.1, seed=0)
        trainer.take_steps(3)
        if warm:
            trainer.warm_up()
        trainer.take_steps(1)
        trainer.run_epoch()
        ends.append((trainer.read_losses(), network.read_parameters()))
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    for parameter, value in ends[0][1].items():
        np.testing.assert_array_equal(ends[1][1][parameter], value)


def test_streamed_pictures_train_to_the_same_bits(tmp_path):
    write_batches(tmp_path / "data", counts=(4, 4, 3), test=5)
    architecture = autoencoder((32, 32), (3, 2))
    ends = []
    for stream in (False, True):
        data = load_training_data("cifar10", tmp_path / "data", 10, 4, 0, stream=stream)
        assert isinstance(data.train, np.ndarray) != stream
        network = Network(find("v4").load("cpu"), architecture, 4, initial_parameters(architecture, 0))
        trainer, evaluator = Trainer(network, data.train, learning_rate=0.1, seed=0), Evaluator(network, data.held_out)
        trainer.run_epoch()
        error = evaluator.mse()
        trainer.run_epoch()
        found = (trainer.read_losses(), error, trainer.reconstruct(3))
        ends.append((data.identity(), network.read_parameters(), found))
    assert ends[0][0] == ends[1][0]
    for parameter, value in ends[0][1].items():
        np.testing.assert_array_equal(ends[1][1][parameter], value)
    for ours, theirs in zip(ends[0][2], ends[1][2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


# Invalid requests -----------------------------------------------------------------------------------------------------


def test_a_new_run_does_not_overwrite_another(tmp_path):
    train_tiny(tmp_path, tiny_config(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"already has last\.safetensors, which would be overwritten: --resume"):
        train_folder.find_start(tmp_path, ARCHITECTURE, resume=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "data", "words"),
    [
        ({"seed": 1}, {}, "--seed 0, not 1"),
        ({"batch_size": 3}, {}, "--batch-size 2, not 3"),
        ({}, {"train": 8}, "--samples 7, not 8"),
        ({}, {"held_out": 2}, "other pictures"),
    ],
)
def test_settings_of_a_different_run_are_refused(tmp_path, changes, data, words):
    train_tiny(tmp_path, tiny_config(1))
    with pytest.raises(UsageError, match=words):
        train_tiny(tmp_path, tiny_config(2, **changes), tiny_data(**data))
    assert loaded(tmp_path).position.epoch == 1


def test_changed_pixels_are_refused(tmp_path):
    train_tiny(tmp_path, tiny_config(1))
    data = tiny_data()
    data.train[3, 1, 2, 3] ^= 1
    with pytest.raises(UsageError, match="other pictures"):
        train_tiny(tmp_path, tiny_config(2), data)


def test_an_order_that_this_numpy_does_not_reproduce_is_refused(tmp_path):
    train_tiny(tmp_path, tiny_config(1))
    save_checkpoint(replace(loaded(tmp_path), order_sha256="0" * 64), tmp_path / LAST)
    with pytest.raises(UsageError, match=f"this NumPy \\({np.__version__}\\) shuffles differently"):
        train_tiny(tmp_path, tiny_config(2))


def test_a_run_may_be_resumed_with_another_learning_rate(tmp_path):
    train_tiny(tmp_path, tiny_config(1))
    train_tiny(tmp_path, tiny_config(2, learning_rate=0.01))
    assert [row.learning_rate for row in loaded(tmp_path).history] == [0.1, 0.01]


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    code = (
        "import sys, pathlib; from bench.training.folder import locked\nwith locked(pathlib.Path(sys.argv[1])): input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE)
    try:
        deadline = 600
        while deadline:  # until the other process has the lock
            deadline -= 1
            try:
                with train_folder.locked(tmp_path):
                    pass
            except UsageError as error:
                assert "another process trains in" in str(error)  # noqa: PT017
                break
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(0.05)
        assert deadline
    finally:
        other.communicate(b"\n")
    with train_folder.locked(tmp_path):  # the lock is free again
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(UsageError), train_folder.locked(tmp_path / "a" / "b"):
        raise UsageError("no such pictures")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("something")
    with pytest.raises(UsageError, match="cannot write to"), train_folder.locked(tmp_path / "file" / "b"):
        pass
    assert (tmp_path / "file").read_text() == "something"


# Errors during training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8, 20])
def test_the_last_checkpoint_is_from_before_divergence(tmp_path, rate):
    """The loss grows for many steps before it is infinite: within the epoch at rate 20, in the next epoch at rate 8."""
    data = tiny_data(train=40)
    interrupted(tmp_path, tiny_config(3, "v4"), 3, data)
    with pytest.raises(RunError) as caught:
        train_tiny(tmp_path, tiny_config(3, "v4", learning_rate=rate), data)
    epoch = 1 if rate == 20 else 2
    assert re.search(rf"training diverged: the loss is (inf|nan) in step \d+ of epoch {epoch}\. ", str(caught.value))
    assert f"a learning rate below {rate}; {LAST} holds epoch 0, step " in str(caught.value)
    assert str(caught.value).endswith(": --resume continues from there")
    assert loaded(tmp_path).position.step <= 5  # before the loss began to grow
    assert not (tmp_path / BEST).exists()
    train_tiny(tmp_path, tiny_config(3, "v4", learning_rate=0.1), data)
    assert loaded(tmp_path).history[-1].train_mse < 0.2


def test_divergence_in_the_last_epoch_is_an_error(tmp_path):
    """The error is finite, but a hundred thousand times that of an output of zeros."""
    data = tiny_data(train=40)
    train_tiny(tmp_path, tiny_config(1, "v4"), data)
    with pytest.raises(RunError, match=r"the held-out error is \S+e\+\d\d after epoch 2\. .* epoch 1, step 1?\d:"):
        train_tiny(tmp_path, tiny_config(2, "v4", learning_rate=8), data)
    assert loaded(tmp_path).position.epoch == 1


def test_without_held_out_pictures_the_next_loss_shows_divergence(tmp_path):
    """One step an epoch: its loss belongs to the parameters before it and does not show what the step did."""
    data = tiny_data(train=2, held_out=0)
    with pytest.raises(RunError, match="no checkpoint was written yet"):
        train_tiny(tmp_path, tiny_config(9, "v4", learning_rate=1e4), data)
    assert {path.name for path in tmp_path.iterdir()} <= {METRICS, LOSS_CHART, PICTURES}


@each_version
def test_the_peeked_loss_equals_that_of_the_next_step(name):
    network = Network(find(name).load("cpu"), ARCHITECTURE, 2, initial_parameters(ARCHITECTURE, 0))
    trainer = Trainer(network, tiny_data().train, learning_rate=0.1, seed=0)
    for step in [0, 1, 2, 3] * 2:
        expected = trainer.peek_loss()
        assert trainer.peek_loss() == expected
        trainer.take_steps(1)
        assert trainer.read_losses()[step] == np.float32(expected)


@pytest.mark.parametrize("pictures", ["one is black", "dark ones, bright ones held out"])
def test_unusual_pictures_are_not_taken_for_divergence(tmp_path, pictures):
    """Losses may differ widely between pictures: a black one has nearly none."""
    data = tiny_data()
    if pictures == "one is black":
        data.train[6] = 0
    else:
        data.train[:] //= 64
        data.held_out[:] = 250
    train_tiny(tmp_path, tiny_config(3, "v4", batch_size=1, learning_rate=0.01), data)
    assert loaded(tmp_path).position.epoch == 3


def test_a_best_checkpoint_of_another_run_is_ignored(tmp_path):
    train_tiny(tmp_path / "other", tiny_config(1, "v4", seed=5))
    train_tiny(tmp_path / "run", tiny_config(1, "v4"))
    shutil.copy(tmp_path / "other" / BEST, tmp_path / "run" / BEST)
    train_tiny(tmp_path / "run", tiny_config(2, "v4"))
    assert loaded(tmp_path / "run", BEST).seed == 0
    assert loaded(tmp_path / "run").best.epoch == 2


def test_divergence_that_no_loss_shows_is_detected(tmp_path, monkeypatch):
    """The ReLU hides a bias of minus infinity; a held-out error may be NaN although the losses are finite."""
    run = TrainingRun(tiny_config(2, "v4"), tiny_data(), ARCHITECTURE, tmp_path)

    def spoil(progress):
        bad = run.network.read_parameters()
        bad["conv1.bias"][1] = -np.inf
        run.network.write_parameters(bad)

    with pytest.raises(RunError, match=r"conv1\.bias is no longer finite after 1 steps"):
        run.run(spoil)
    monkeypatch.setattr(Evaluator, "mse", lambda self: float("nan"))
    with pytest.raises(RunError, match=r"the held-out error is nan after epoch 1"):
        train_tiny(tmp_path, tiny_config(2, "v4", checkpoint_steps=0))
    assert list(tmp_path.iterdir()) == []


def test_the_best_epoch_has_the_smallest_held_out_error(tmp_path, monkeypatch):
    errors = iter([0.3, 0.1, 0.2, 0.15])
    monkeypatch.setattr(Evaluator, "mse", lambda self: next(errors))
    saved = []
    real = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda made, path: (saved.append(path.name), real(made, path)))
    train_tiny(tmp_path, tiny_config(4, "v4", checkpoint_steps=0))
    assert loaded(tmp_path, BEST).position.epoch == 2
    assert loaded(tmp_path).best == BestEpoch(2, 0.1)
    assert [row.held_out_mse for row in loaded(tmp_path).history] == [0.3, 0.1, 0.2, 0.15]
    assert saved == [BEST, LAST, BEST, LAST, LAST, LAST]  # a process killed in between keeps the best one


def test_a_deleted_best_checkpoint_is_written_again(tmp_path, monkeypatch):
    errors = iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(Evaluator, "mse", lambda self: next(errors))
    train_tiny(tmp_path, tiny_config(1, "v4"))
    (tmp_path / BEST).unlink()
    train_tiny(tmp_path, tiny_config(2, "v4"))
    assert loaded(tmp_path).best == loaded(tmp_path, BEST).best == BestEpoch(2, 0.2)


def test_missing_files_are_made_from_the_checkpoint(tmp_path):
    """As after a kill between the last checkpoint and the files made from it."""
    train_tiny(tmp_path, tiny_config(2, "v4"))
    lines = (tmp_path / METRICS).read_text()
    for name in (METRICS, LOSS_CHART, PICTURES):
        (tmp_path / name).unlink()
    train_tiny(tmp_path, tiny_config(2, "v4"))
    assert (tmp_path / METRICS).read_text() == lines
    assert (tmp_path / LOSS_CHART).exists()
    assert (tmp_path / PICTURES).exists()


def test_the_time_before_a_stop_counts_towards_the_epoch(tmp_path):
    interrupted(tmp_path, tiny_config(1, "v4"), 2)
    stopped = loaded(tmp_path)
    assert stopped.epoch_seconds > 0
    save_checkpoint(replace(stopped, epoch_seconds=1000.0), tmp_path / LAST)
    train_tiny(tmp_path, tiny_config(1, "v4"))
    assert 1000 < loaded(tmp_path).history[0].epoch_s < 1100


def test_a_long_epoch_has_a_short_curve():
    losses = np.linspace(1, 0, 1000, dtype=np.float32)
    curve = train.thinned(losses)
    assert len(curve) == 32
    assert np.mean(curve) == pytest.approx(losses.mean(), rel=1e-2)
    assert train.thinned(losses[:3]) == pytest.approx(losses[:3], rel=1e-5)


def test_checkpoints_are_also_written_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_S", 0)
    seen = []

    def watch(progress):
        seen.append((tmp_path / LAST).exists())

    train_tiny(tmp_path, tiny_config(1, "v4", checkpoint_steps=0), tiny_data(train=40), on_progress=watch)
    assert seen[0] is False
    assert seen[1] is True


def test_divergence_before_the_first_checkpoint(tmp_path):
    config = tiny_config(1, "v4", learning_rate=1e30, checkpoint_steps=0)
    with pytest.raises(RunError, match=r"the loss is (nan|inf) in step [23] of epoch 1\. .*; no checkpoint was"):
        train_tiny(tmp_path, config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failing_disk_leaves_the_checkpoints_intact(tmp_path, monkeypatch, number):
    """Each write of a run in turn fails: one error, and the checkpoints are intact and can be resumed."""
    config = tiny_config(2)
    train_tiny(tmp_path / "whole", config)
    expected = loaded(tmp_path / "whole")
    real = os.fsync
    writes = 0

    def count(handle):
        nonlocal writes
        writes += 1
        real(handle)

    monkeypatch.setattr(os, "fsync", count)
    train_tiny(tmp_path / "counted", config)
    assert writes > 20
    for broken in range(1, writes, 5):
        out = tmp_path / str(broken)
        left = broken

        def fail(handle):
            nonlocal left
            left -= 1
            if left < 1:
                raise OSError(number, os.strerror(number))
            real(handle)

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(RunError, match=f"cannot write .*: {os.strerror(number)}; (no|last.safetensors)"):
            train_tiny(out, config)
        monkeypatch.setattr(os, "fsync", real)
        assert not list(out.glob(".*"))
        train_tiny(out, config)
        assert_same_bits(loaded(out), expected)


def test_a_real_limit_on_the_size_of_files(tmp_path):
    """The system itself refuses a write half-way; nothing is replaced by a stub."""
    train_tiny(tmp_path, tiny_config(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from pathlib import Path; from tests.support.tiny_training import *; from common.errors import RunError\n"
        "try: train_tiny(Path(sys.argv[1]), tiny_config(2))\n"
        "except RunError as error: print(error)"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "File too large; last.safetensors holds epoch 1, step 0" in done.stdout, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_deleted_during_training(tmp_path):
    def take_away(progress):
        if progress.figures:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(
        RunError, match=r"cannot write .*\.safetensors: No such file or directory; last.safetensors holds"
    ):
        train_tiny(tmp_path / "run", tiny_config(2), on_progress=take_away)
    assert list(tmp_path.iterdir()) == []


def test_signals_stop_between_steps():
    asked = []
    before = signal.getsignal(signal.SIGINT)
    with train.stop_on_signals(lambda: asked.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [1]
        assert signal.getsignal(signal.SIGINT) == before  # the second one acts as usual
    assert signal.getsignal(signal.SIGINT) == before


# Larger jobs ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_over_fifty_epochs(tmp_path):
    marks = {}

    def watch(progress):
        if progress.figures and progress.epoch in (10, 30, 50):
            gc.collect()
            marks[progress.epoch] = (tracemalloc.get_traced_memory()[0], psutil.Process().memory_info().rss)

    train_tiny(tmp_path / "first", tiny_config(2, "v4"))  # allocates everything that is allocated once
    tracemalloc.start()
    try:
        train_tiny(tmp_path / "run", tiny_config(50, "v4", checkpoint_steps=0), on_progress=watch)
    finally:
        tracemalloc.stop()
    # An epoch keeps only its figures; a batch, an activation or a checkpoint would be far larger.
    assert marks[50][0] - marks[10][0] < 40 * 3000
    assert marks[50][1] - marks[30][1] < 8e6


# TensorBoard ----------------------------------------------------------------------------------------------------------


def events(folder):
    """All events in the files, in order; a record is a length, its checksum, the event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def marks(folder):
    """The steps from which on TensorBoard discards what it has."""
    return [event.step for event in events(folder) if event.session_log.status]


def scalars(folder):
    """Every scalar in the event files, by tag and step."""
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_scalars_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    config = tiny_config(2, "v4")
    interrupted(tmp_path, config, 6, tensorboard=True)
    train_tiny(tmp_path, config, tensorboard=True)
    found = scalars(tmp_path / "tensorboard")
    history = loaded(tmp_path).history
    assert found["mse/train"] == {row.step: pytest.approx(row.train_mse) for row in history}
    assert found["mse/held_out"] == {row.step: pytest.approx(row.held_out_mse) for row in history}
    assert found["psnr_db/train"].keys() == found["images_per_s"].keys() == {4, 8}
    assert list(found["loss/step"]) == list(range(1, 9))


@pytest.fixture
def repeated(tmp_path):
    """The scalars of a run with steps 6 to 8 twice: a process was killed after them, before its checkpoint."""
    pytest.importorskip("tensorboardX")
    config = tiny_config(2, "v4")
    interrupted(tmp_path, config, 5, tensorboard=True)
    earlier = (tmp_path / LAST).read_bytes()
    train_tiny(tmp_path, config, tensorboard=True)
    (tmp_path / LAST).write_bytes(earlier)
    train_tiny(tmp_path, config, tensorboard=True)
    return tmp_path / "tensorboard"


def test_repeated_steps_are_marked(repeated):
    """TensorBoard discards the step of a mark and all later ones."""
    assert marks(repeated) == [1, 6, 6]
    assert [path.name for path in sorted(repeated.iterdir())] == [
        path.name for path in sorted(repeated.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    ]


def test_tensorboard_itself_shows_each_step_once(repeated):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no TensorBoard")
    found = accumulator.EventAccumulator(str(repeated)).Reload()
    assert [event.step for event in found.Scalars("loss/step")] == list(range(1, 9))
    assert [event.step for event in found.Scalars("mse/train")] == [4, 8]


def test_a_full_disk_while_writing_scalars(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    config = tiny_config(2, "v4")

    def full(self, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("tensorboardX.record_writer.RecordWriter.write", full)
        with pytest.raises(RunError, match=r"cannot write .*tensorboard: No space left on device; no checkpoint"):
            train_tiny(tmp_path / "run", config, tensorboard=True)

    def flush(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("tensorboardX.record_writer.RecordWriter.flush", flush)
        with pytest.raises(RunError, match=r"tensorboard: No space left on device; no checkpoint was written yet"):
            train_tiny(tmp_path / "later", config, tensorboard=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").write_text("another")
    with pytest.raises(RunError, match=r"cannot write .*tensorboard: File exists"):
        TrainingRun(config, tiny_data(), ARCHITECTURE, tmp_path / "other").run(tensorboard=True)
    assert (tmp_path / "other" / "tensorboard").read_text() == "another"


def test_the_identity_of_pictures():
    data = tiny_data()
    again = TrainingData(data.train.copy(), data.held_out.copy(), "random", "again")
    assert data.identity() == again.identity()
    assert data.identity() != TrainingData(data.train, data.held_out[:0], "random", "").identity()
    same = np.full((9, 3, 4, 4), 7, np.uint8)  # only the counts differ
    digests = {TrainingData(same[:n], same[n:], "", "").identity().sha256 for n in range(1, 9)}
    assert len(digests) == 8


def test_held_out_crops_come_from_the_other_part(tmp_path):
    data = load_training_data("photos", tmp_path, 20, None, 5)
    np.testing.assert_array_equal(data.train, labelled_crops(20, 5, "train")[0])
    np.testing.assert_array_equal(data.held_out, labelled_crops(4, 5, "test")[0])


def test_two_threads_resume_to_the_same_bits(tmp_path):
    if usable_cores() < 2:
        pytest.skip("this machine has one core")
    config = tiny_config(2, "v4", threads=2, batch_size=3)
    train_tiny(tmp_path / "whole", config)
    (tmp_path / "run").mkdir()
    interrupted(tmp_path / "run", config, 4)
    train_tiny(tmp_path / "run", config)
    assert_same_bits(loaded(tmp_path / "run"), loaded(tmp_path / "whole"))


def test_a_read_only_folder(tmp_path):
    """Without permission to write, and without the capabilities that let root write anywhere."""
    out = tmp_path / "run"
    train_tiny(out, tiny_config(1))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    out.chmod(0o555)
    command = [sys.executable, "-m", "tests.support.tiny_training", str(out), "2"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root can write anywhere, and setpriv is missing")
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    out.chmod(0o755)
    assert done.returncode == 1
    assert f"common.errors.UsageError: cannot write to {out}: Permission denied" in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
