"""A training run as people do it: epochs to the end, checkpoints on the way, and every fault told in one line.

Everything lies in one folder: ``last.safetensors`` and ``best.safetensors``, ``metrics.csv`` with a line an epoch,
``loss.png`` and ``reconstructions.png``. The checkpoint is the only thing that counts: it holds the figures of every
epoch, and the other files are made from it. Files are replaced whole, so a run that is killed anywhere can be taken up
from ``last.safetensors``, and on the same backend, device and threads it comes to the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bench.machine.environment import git_state
from bench.records.files import replace_file
from bench.training.checkpoint import Checkpoint, save_checkpoint
from bench.training.data import TrainingData
from bench.training.folder import BEST, LAST, LOSS_CHART, METRICS, PICTURES, SCALARS, best_of
from bench.training.scalars import Scalars
from bench.views.pictures import grid_png
from common.architecture import Architecture
from common.backend import Device, Math
from common.errors import RunError, UsageError
from common.network import Network, initial_parameters
from common.picture_files import first_pictures
from common.training import Evaluator, Trainer, forward_batches, mean_loss
from versions.registry import BackendInfo

COLUMNS = (
    "epoch", "step", "learning_rate", "train_mse", "train_psnr_db", "held_out_mse", "held_out_psnr_db", "epoch_s",
    "images_per_s", "backend", "device",
)  # fmt: skip
SHOWN = 16  # pictures in the grid
CURVE_POINTS = 32  # of the loss within an epoch that are kept
CHECKPOINT_S = 300  # within epochs, after so many seconds without a checkpoint
RUINED = 10.0
"""An error above this is of a network that goes to pieces: values lie in [0, 1], so zeros have one of at most 1."""
LOOK_S = 0.5  # how often the loss is read and progress is told
MOST_STEPS = 1000  # between two looks


@dataclass(frozen=True)
class TrainConfig:
    """What was asked for, every default filled in."""

    backend: BackendInfo
    device: Device
    math: Math
    threads: int
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    checkpoint_steps: int = 0
    """Also write ``last.safetensors`` after this many steps; 0 leaves it to whole epochs and the clock."""
    tensorboard: bool = False
    data: str = ""
    data_dir: str = ""
    """Where the pictures came from, for a run that is taken up."""


@dataclass(frozen=True)
class Moment:
    """What there is to tell while an epoch is under way."""

    epoch: int
    """The one under way, from 1."""
    step: int
    steps: int
    loss: float
    images_per_s: float
    seconds_left: float


class Listener:
    """Is told how training goes; this one does not care."""

    def compiling(self) -> None:
        """The first step is about to be run."""

    def step(self, moment: Moment) -> None:
        """Some steps were taken."""

    def epoch(self, figures: dict[str, Any], *, best: bool, seconds_left: float) -> None:
        """An epoch is over and its checkpoint written."""


def psnr_db(mse: float | None) -> float | None:
    """Peak signal-to-noise ratio of values in [0, 1], in decibels: -10 log10(MSE); None without an error."""
    return None if not mse else -10 * math.log10(mse)


# The run --------------------------------------------------------------------------------------------------------------


class TrainingRun:
    """One training run in its folder, from the start or from a checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        architecture: Architecture,
        out: Path,
        start: Checkpoint | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Allocate everything; nothing is written yet."""
        self.config, self.data, self.out = config, data, out
        self.listener = listener or Listener()
        parameters = start.parameters if start else initial_parameters(architecture, config.seed)
        backend = config.backend.load(config.device, math=config.math, threads=config.threads)
        self.network = Network(backend, architecture, config.batch_size, parameters)
        self.trainer = Trainer(self.network, data.train, learning_rate=config.learning_rate, seed=config.seed)
        self.evaluator = Evaluator(self.network, data.held_out) if data.held_out is not None else None
        self.history: list[dict[str, Any]] = list(start.history) if start else []
        self.best = best_of(out, start) if start else None
        self.data_metadata = data.as_metadata()
        self.commit = git_state()[0]
        self.stopping = False
        self._epoch_seconds = start.epoch_seconds if start else 0.0
        self.saved: str = f"epoch {start.position.epoch}, step {start.position.step}" if start else ""
        self._saved_at = perf_counter()
        self._evaluation_s = 0.0
        if start:
            self.trainer.restore(start.position)
            if self.trainer.order_digest() != start.order_sha256:
                raise UsageError(
                    f"{out / LAST}: this NumPy ({np.__version__}) shuffles otherwise than the one that it was trained "
                    f"with: go on with that one"
                )
        self._scalars: Scalars | None = None
        if config.tensorboard:
            with self._writing(SCALARS) as folder:
                self._scalars = Scalars(folder, self._steps_in_all())

    def run(self) -> bool:
        """Train to ``config.epochs`` in all; False if it was stopped before. RunError for every fault on the way."""
        try:
            finished = self._train()
        except BaseException:
            with contextlib.suppress(RunError):  # what went wrong first is what is told
                self._draw_losses()
            raise
        finally:
            if self._scalars:
                with contextlib.suppress(OSError):  # all of it was flushed after the last epoch
                    self._scalars.close()
        self._draw_losses()
        return finished

    def _train(self) -> bool:
        self._write_metrics()  # a process that was killed may have got no further than its checkpoint
        if self.trainer.epochs_done < self.config.epochs:
            self.listener.compiling()
            self.trainer.warm_up()
        while self.trainer.epochs_done < self.config.epochs:
            if not self._run_epoch():
                return False
        self._write_pictures()
        return True

    def stop(self) -> None:
        """Let ``run`` end with a checkpoint of where it is: after the step, or the evaluation, that is under way."""
        self.stopping = True

    def _run_epoch(self) -> bool:
        """Go on to the end of the epoch; False if it was stopped before the end of training."""
        trainer, config = self.trainer, self.config
        epoch = trainer.epochs_done
        pace, taken = 0.0, 0  # of this process: what an epoch took before it was killed says little of it
        while trainer.epochs_done == epoch:
            first = trainer.steps_done
            count = 1 if not taken else min(MOST_STEPS, max(1, round(LOOK_S * taken / pace)))
            if config.checkpoint_steps:
                count = min(count, config.checkpoint_steps - first % config.checkpoint_steps)
            begun = perf_counter()
            with self._reading():
                trainer.take_steps(count)
            seconds = perf_counter() - begun
            self._epoch_seconds += seconds
            done = trainer.steps_done if trainer.epochs_done == epoch else trainer.steps
            pace, taken = pace + seconds, taken + done - first
            losses = trainer.read_losses()[:done]
            self._check(losses, epoch)
            self._tell_steps(losses, first, epoch, pace / taken)
            if trainer.epochs_done > epoch:
                break
            due = config.checkpoint_steps and trainer.steps_done % config.checkpoint_steps == 0
            if due or self.stopping or perf_counter() - self._saved_at > CHECKPOINT_S:
                self._save_within()
            if self.stopping:
                return False
        self._end_epoch(losses, pace / taken)
        return not self.stopping or trainer.epochs_done >= config.epochs

    def _tell_steps(self, losses: np.ndarray, first: int, epoch: int, step_s: float) -> None:
        trainer, config = self.trainer, self.config
        if self._scalars:
            with self._writing(SCALARS):
                for number, loss in enumerate(losses[first:], epoch * trainer.steps + first + 1):
                    self._scalars.add(number, loss__step=float(loss))
        steps_left = (config.epochs - epoch) * trainer.steps - len(losses)
        left = steps_left * step_s + (config.epochs - epoch) * self._evaluation_s
        images_per_s = trainer.samples / trainer.steps / step_s
        self.listener.step(Moment(epoch + 1, len(losses), trainer.steps, float(losses[-1]), images_per_s, left))

    def _check(self, losses: np.ndarray, epoch: int) -> None:
        """Stop at the first loss that is no number; the checkpoints are from before it."""
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            self._diverged(f"the loss is {losses[bad[0]]} in step {bad[0] + 1} of epoch {epoch + 1}")

    def _diverged(self, what: str) -> None:
        kept = f"{self.out / LAST} is from before it ({self.saved})" if self.saved else "no checkpoint was written yet"
        raise RunError(
            f"training diverged: {what}. {kept}. Try a smaller learning rate than {self.config.learning_rate:g}"
            f"{', with --resume to go on from there' if self.saved else ''}"
        )

    def _save_within(self) -> None:
        """Write ``last.safetensors`` within an epoch, unless training goes to pieces: the one before is then better.

        A loss is of the parameters before its step, so what the last step made of them shows only in the next one's.
        """
        with self._reading():
            next_loss = self.trainer.peek_loss()
        if next_loss <= RUINED:
            self._save(LAST)

    def _end_epoch(self, losses: np.ndarray, step_s: float) -> None:
        trainer, config = self.trainer, self.config
        train_mse = mean_loss(losses, trainer.samples, config.batch_size)
        held_out = None
        if self.evaluator:
            begun = perf_counter()
            with self._reading():
                held_out = self.evaluator.mse()
            self._evaluation_s = perf_counter() - begun
        with self._reading():
            mse, what = (trainer.peek_loss(), "next loss") if held_out is None else (held_out, "held-out error")
        over = trainer.epochs_done >= config.epochs
        if not math.isfinite(mse) or (over and mse > RUINED):
            self._diverged(f"the {what} is {mse:g} after epoch {trainer.epochs_done}")
        figures = {
            "epoch": trainer.epochs_done,
            "step": self._steps_in_all(),
            "learning_rate": config.learning_rate,
            "train_mse": train_mse,
            "held_out_mse": held_out,
            "epoch_s": self._epoch_seconds,
            "images_per_s": trainer.samples / self._epoch_seconds,
            "backend": config.backend.name,
            "device": config.device,
            "curve": _thinned(losses),
        }
        self.history.append(figures)
        self._epoch_seconds = 0.0
        judged = train_mse if held_out is None else held_out
        is_best = mse <= RUINED and (self.best is None or judged < self.best["mse"])
        if is_best:
            self.best = {"epoch": trainer.epochs_done, "mse": judged}
            self._save(BEST)
        if mse <= RUINED:  # or it may still recover, and if not, the one before is worth more
            self._save(LAST)
        self._write_metrics()
        self._write_pictures()
        if self._scalars:
            with self._writing(SCALARS):
                self._scalars.add(
                    figures["step"],
                    mse__train=train_mse,
                    mse__held_out=held_out,
                    psnr_db__train=psnr_db(train_mse),
                    psnr_db__held_out=psnr_db(held_out),
                    images_per_s=figures["images_per_s"],
                )
                self._scalars.flush()
        left = (config.epochs - trainer.epochs_done) * (trainer.steps * step_s + self._evaluation_s)
        self.listener.epoch(figures, best=is_best, seconds_left=left)

    def _steps_in_all(self) -> int:
        return self.trainer.epochs_done * self.trainer.steps + self.trainer.steps_done

    def checkpoint(self) -> Checkpoint:
        """Where training stands now."""
        trainer, config = self.trainer, self.config
        return Checkpoint(
            parameters=self.network.read_parameters(),
            architecture=self.network.architecture,
            position=trainer.position(),
            seed=config.seed,
            order_sha256=trainer.order_digest(),
            batch_size=config.batch_size,
            samples=trainer.samples,
            learning_rate=config.learning_rate,
            data=self.data_metadata,
            asked={
                "epochs": config.epochs,
                "checkpoint_steps": config.checkpoint_steps,
                "data": config.data,
                "data_dir": config.data_dir,
            },
            backend=config.backend.name,
            device=config.device,
            math=config.math,
            threads=config.threads,
            commit=self.commit,
            epoch_seconds=self._epoch_seconds,
            history=self.history,
            best=self.best,
        )

    def _save(self, name: str) -> None:
        checkpoint = self.checkpoint()
        for parameter, value in checkpoint.parameters.items():
            if not np.isfinite(value).all():
                self._diverged(f"{parameter} is no longer finite after {self._steps_in_all()} steps")
        if self._scalars:
            with self._writing(SCALARS):
                self._scalars.flush()
        with self._writing(name) as path:
            save_checkpoint(checkpoint, path)
        if name == LAST:
            self.saved = f"epoch {checkpoint.position.epoch}, step {checkpoint.position.step}"
            self._saved_at = perf_counter()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """Turn what goes wrong with a file into RunError, which says what is left."""
        try:
            yield self.out / name
        except OSError as error:
            raise RunError(f"cannot write {self.out / name}: {error.strerror or error}; {self._left()}") from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Say what is left where pictures cannot be read any more."""
        try:
            yield
        except RunError as error:
            raise RunError(f"{error}; {self._left()}") from error

    def _left(self) -> str:
        return f"{LAST} there is of {self.saved}" if self.saved else "no checkpoint was written yet"

    def _write_metrics(self) -> None:
        if not self.history:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in self.history:
            errors = {f"{part}_psnr_db": psnr_db(row[f"{part}_mse"]) for part in ("train", "held_out")}
            writer.writerow({**row, **errors})
        with self._writing(METRICS) as path:
            replace_file(path, text.getvalue().encode())

    def _write_pictures(self) -> None:
        """Held-out pictures, or without any the first ones, above what the network makes of them."""
        shown = self.data.train if self.data.held_out is None else self.data.held_out
        originals = first_pictures(shown, min(SHOWN, len(shown)))
        made = np.concatenate(list(forward_batches(self.network, originals)))
        with self._writing(PICTURES) as path:
            replace_file(path, grid_png(originals, made))

    def _draw_losses(self) -> None:
        if not self.history:
            return
        from bench.views.training_chart import training_png  # matplotlib is slow to import

        with self._writing(LOSS_CHART) as path:
            replace_file(path, training_png(self.history, self.trainer.samples, self.config.batch_size))


def _thinned(losses: np.ndarray) -> list[float]:
    """At most ``CURVE_POINTS`` means of neighbouring losses, to six digits."""
    parts = np.array_split(losses.astype(np.float64), min(CURVE_POINTS, len(losses)))
    return [float(f"{part.mean():.6g}") for part in parts]


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C or SIGTERM calls ``stop`` and the second one ends the process as it always does."""
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
