"""A training run: epochs to the end, checkpoints on the way, and one clear line for every error.

Everything is in one folder. The checkpoint is the only file that matters: it contains the figures of every epoch, and
the other files are made from it. A run that is killed at any point can be resumed from ``last.safetensors``; with the
same backend, device and threads it ends with the same bits as a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bench.machine.environment import git_state
from bench.records.files import replace_file
from bench.records.training import BestEpoch, Checkpoint, EpochFigures, TrainSettings
from bench.training.checkpoint import load_network, save_checkpoint
from bench.training.data import TrainingData
from bench.training.folder import BEST, LAST, LOSS_CHART, METRICS, PICTURES, SCALARS, best_of, check_resumable
from bench.training.outputs import metrics_csv, reconstructions_png, scalar_writer, writing
from common.architecture import Architecture
from common.errors import RunError, UsageError
from common.network import initial_parameters
from common.training import Evaluator, Trainer, mean_loss

CURVE_POINTS = 32  # means that are kept of the losses within an epoch
CHECKPOINT_S = 300  # within epochs, after this many seconds without a checkpoint
DIVERGED_MSE = 10.0
"""An error above this means divergence: values lie in [0, 1], so that even an output of zeros has at most 1."""
REPORT_S = 0.5  # how often the loss is read and progress is reported
MOST_STEPS = 1000  # between two reports


@dataclass(frozen=True)
class RunProgress:
    """How far a run is: in epoch ``epoch``, which counts from 1, or after it; then there are ``figures``."""

    epoch: int
    step: int
    steps: int
    loss: float
    images_per_s: float
    seconds_left: float
    figures: EpochFigures | None = None
    best: bool = False


class TrainingRun:
    """One training run in its folder, from the beginning or from a checkpoint."""

    def __init__(
        self,
        settings: TrainSettings,
        data: TrainingData,
        architecture: Architecture,
        out: Path,
        start: Checkpoint | None = None,
    ) -> None:
        """Allocate everything; nothing is written yet. UsageError if ``start`` belongs to a different run."""
        identity = data.identity()
        if start:
            check_resumable(start, settings, len(data.train), identity, out / LAST)
        self.settings, self.epochs, self.data, self.out = settings, settings.asked.epochs, data, out
        parameters = start.parameters if start else initial_parameters(architecture, settings.seed)
        self.network = load_network(settings, architecture, parameters)
        self.trainer = Trainer(self.network, data.train, learning_rate=settings.learning_rate, seed=settings.seed)
        self.evaluator = Evaluator(self.network, data.held_out) if len(data.held_out) else None
        self.history = list(start.history) if start else []
        self.best = best_of(out, start) if start else None
        self.saved = _place(start) if start else ""
        """Epoch and step of ``last.safetensors``; empty if there is none."""
        self.stopping = False
        self._identity, self._commit = identity, git_state()[0]
        self._saved_at = perf_counter()
        self._epoch_seconds = start.epoch_seconds if start else 0.0
        self._evaluation_s = 0.0
        if start:
            self.trainer.restore(start.position)
            if self.trainer.order_digest() != start.order_sha256:
                raise UsageError(
                    f"{out / LAST} cannot be resumed: this NumPy ({np.__version__}) shuffles differently from the one "
                    f"that it was trained with; install that version"
                )

    def run(
        self, on_progress: Callable[[RunProgress], None] = lambda progress: None, *, tensorboard: bool = False
    ) -> bool:
        """Train to ``epochs`` in all; False if it was stopped earlier. Raises RunError if it cannot go on."""
        self._on_progress = on_progress
        try:
            with scalar_writer(self.out / SCALARS if tensorboard else None, self._total_steps()) as self._add_scalars:
                finished = self._train()
            self._draw_losses()
            return finished
        except BaseException as error:
            with contextlib.suppress(RunError):  # the first error is the one to report
                self._draw_losses()
            if isinstance(error, RunError):
                kept = f"{LAST} holds {self.saved}: --resume continues from there"
                raise RunError(f"{error}; {kept if self.saved else 'no checkpoint was written yet'}") from error
            raise

    def stop(self) -> None:
        """Let ``run`` end with a checkpoint, after the current step or evaluation."""
        self.stopping = True

    def _train(self) -> bool:
        if self.history:  # a killed process may have written its checkpoint and no more
            self._write(METRICS, metrics_csv(self.history))
        if self.trainer.epochs_done < self.epochs:
            self.trainer.warm_up()
        while self.trainer.epochs_done < self.epochs:
            if not self._run_epoch():
                return False
        self._write_pictures()
        return True

    def _run_epoch(self) -> bool:
        """Continue to the end of the epoch; False if training was stopped before its end."""
        trainer, checkpoint_steps = self.trainer, self.settings.asked.checkpoint_steps
        epoch, begun = trainer.epochs_done, trainer.steps_done
        done, seconds = begun, 0.0  # of this process: an earlier process may have been faster or slower
        while done < trainer.steps:
            count = round(REPORT_S * (done - begun) / seconds) if seconds else 1
            count = min(max(count, 1), MOST_STEPS)
            if checkpoint_steps:
                count = min(count, checkpoint_steps - done % checkpoint_steps)
            started = perf_counter()
            trainer.take_steps(count)
            elapsed = perf_counter() - started
            seconds += elapsed
            self._epoch_seconds += elapsed
            first, done = done, min(done + count, trainer.steps)
            losses = trainer.read_losses()[:done]
            bad = np.flatnonzero(~np.isfinite(losses))
            if bad.size:  # the checkpoints are from earlier steps
                self._diverged(f"the loss is {losses[bad[0]]} in step {bad[0] + 1} of epoch {epoch + 1}")
            for step, loss in enumerate(losses[first:], epoch * trainer.steps + first + 1):
                self._add_scalars(step, {"loss/step": float(loss)})
            step_s = seconds / (done - begun)
            images_per_s = trainer.samples / trainer.steps / step_s
            left = self._seconds_left(step_s)
            progress = RunProgress(epoch + 1, done, trainer.steps, float(losses[-1]), images_per_s, left)
            self._on_progress(progress)
            if done < trainer.steps:
                due = checkpoint_steps and done % checkpoint_steps == 0
                due = due or self.stopping or perf_counter() - self._saved_at > CHECKPOINT_S
                # What the last step did shows only in the next loss. Divergence: the checkpoint before is better.
                if due and trainer.peek_loss() <= DIVERGED_MSE:
                    self._save(LAST)
                if self.stopping:
                    return False
        figures, best = self._end_epoch(losses)
        self._on_progress(replace(progress, seconds_left=self._seconds_left(step_s), figures=figures, best=best))
        return not self.stopping or trainer.epochs_done >= self.epochs

    def _end_epoch(self, losses: np.ndarray) -> tuple[EpochFigures, bool]:
        """Evaluate, record the figures, and write every file; the figures, and whether they are the best so far."""
        trainer, settings = self.trainer, self.settings
        started = perf_counter()
        held_out_mse = self.evaluator.mse() if self.evaluator else None
        self._evaluation_s = perf_counter() - started
        error = trainer.peek_loss() if held_out_mse is None else held_out_mse
        last = trainer.epochs_done >= self.epochs
        if not math.isfinite(error) or (last and error > DIVERGED_MSE):
            name = "next loss" if held_out_mse is None else "held-out error"
            self._diverged(f"the {name} is {error:g} after epoch {trainer.epochs_done}")
        figures = EpochFigures(
            epoch=trainer.epochs_done,
            step=self._total_steps(),
            learning_rate=settings.learning_rate,
            train_mse=mean_loss(losses, trainer.samples, settings.batch_size),
            held_out_mse=held_out_mse,
            epoch_s=self._epoch_seconds,
            images_per_s=trainer.samples / self._epoch_seconds,
            backend=settings.backend,
            device=settings.device,
            curve=thinned(losses),
        )
        self.history.append(figures)
        self._epoch_seconds = 0.0
        compared = figures.train_mse if held_out_mse is None else held_out_mse
        is_best = error <= DIVERGED_MSE and (self.best is None or compared < self.best.mse)
        if is_best:
            self.best = BestEpoch(trainer.epochs_done, compared)
            self._save(BEST)
        if error <= DIVERGED_MSE:  # above, training may recover; if it does not, the checkpoint before is better
            self._save(LAST)
        self._write(METRICS, metrics_csv(self.history))
        self._write_pictures()
        self._add_scalars(figures.step, figures.scalars())
        return figures, is_best

    def _total_steps(self) -> int:
        return self.trainer.epochs_done * self.trainer.steps + self.trainer.steps_done

    def _diverged(self, what: str) -> None:
        raise RunError(f"training diverged: {what}. Try a learning rate below {self.settings.learning_rate:g}")

    def _seconds_left(self, step_s: float) -> float:
        steps = self.epochs * self.trainer.steps - self._total_steps()
        return steps * step_s + (self.epochs - len(self.history)) * self._evaluation_s

    def _save(self, name: str) -> None:
        checkpoint = self._checkpoint()
        for parameter, value in checkpoint.parameters.items():
            if not np.isfinite(value).all():
                self._diverged(f"{parameter} is no longer finite after {self._total_steps()} steps")
        with writing(self.out / name) as path:
            save_checkpoint(checkpoint, path)
        if name == LAST:
            self.saved, self._saved_at = _place(checkpoint), perf_counter()

    def _checkpoint(self) -> Checkpoint:
        trainer = self.trainer
        return Checkpoint(
            **vars(self.settings),
            parameters=self.network.read_parameters(),
            architecture=self.network.architecture,
            **asdict(trainer.position()),
            order_sha256=trainer.order_digest(),
            samples=trainer.samples,
            data=self._identity,
            commit=self._commit,
            epoch_seconds=self._epoch_seconds,
            history=self.history,
            best=self.best,
        )

    def _write(self, name: str, data: bytes) -> None:
        with writing(self.out / name) as path:
            replace_file(path, data)

    def _write_pictures(self) -> None:
        pictures = self.data.held_out if len(self.data.held_out) else self.data.train
        self._write(PICTURES, reconstructions_png(self.network, pictures))

    def _draw_losses(self) -> None:
        if self.history:
            from bench.views.training_chart import training_png  # matplotlib is slow to import

            self._write(LOSS_CHART, training_png(self.history, self.trainer.samples, self.settings.batch_size))


def _place(checkpoint: Checkpoint) -> str:
    return f"epoch {checkpoint.epoch}, step {checkpoint.step}"


def thinned(losses: np.ndarray) -> list[float]:
    """At most ``CURVE_POINTS`` means of neighbouring losses, to six digits."""
    parts = np.array_split(losses.astype(np.float64), min(CURVE_POINTS, len(losses)))
    return [float(f"{part.mean():.6g}") for part in parts]


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C or SIGTERM calls ``stop``; the second one ends the process as usual."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        restore()
        stop()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
