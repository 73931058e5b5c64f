"""A training run: epochs to the end, checkpoints on the way, and one clear line for every error.

Everything is in one folder: ``last.safetensors`` and ``best.safetensors``, ``metrics.csv`` with a line for each epoch,
``loss.png`` and ``reconstructions.png``. A run that is killed at any point can be resumed from ``last.safetensors``.
With the same backend, device and threads it ends with the same bits as a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bench.machine.environment import git_state
from bench.records.training import BestEpoch, EpochFigures, Requested
from bench.training.checkpoint import Checkpoint
from bench.training.data import TrainingData
from bench.training.folder import BEST, LAST, best_of
from bench.training.outputs import NO_CHECKPOINT, RunFiles
from bench.training.settings import TrainConfig
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
class StepProgress:
    """How far the current epoch is."""

    epoch: int
    """The current one, from 1."""
    step: int
    steps: int
    loss: float
    images_per_s: float
    seconds_left: float


class Listener:
    """Is called as training proceeds; this one does nothing."""

    def compiling(self) -> None:
        """The first step is about to run."""

    def step(self, progress: StepProgress) -> None:
        """Some steps were taken."""

    def epoch(self, figures: EpochFigures, *, best: bool, seconds_left: float) -> None:
        """An epoch is complete and its checkpoint written."""


class TrainingRun:
    """One training run in its folder, from the beginning or from a checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        architecture: Architecture,
        out: Path,
        start: Checkpoint | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Allocate everything; nothing is written yet, except that ``tensorboard`` begins its event file."""
        self.config, self.data = config, data
        self.listener = listener or Listener()
        self.files = RunFiles(out, start)
        parameters = start.parameters if start else initial_parameters(architecture, config.seed)
        self.network = config.network(architecture, parameters)
        self.trainer = Trainer(self.network, data.train, learning_rate=config.learning_rate, seed=config.seed)
        self.evaluator = Evaluator(self.network, data.held_out) if data.held_out is not None else None
        self.history: list[EpochFigures] = list(start.history) if start else []
        self.best = best_of(out, start) if start else None
        self.stopping = False
        self._data_identity = data.identity()
        self._commit = git_state()[0]
        self._epoch_seconds = start.epoch_seconds if start else 0.0
        self._evaluation_s = 0.0
        if start:
            self.trainer.restore(start.position)
            if self.trainer.order_digest() != start.order_sha256:
                raise UsageError(
                    f"{out / LAST} cannot be resumed: this NumPy ({np.__version__}) shuffles differently from the one "
                    f"that it was trained with; install that version"
                )
        if config.tensorboard:
            self.files.begin_scalars(self._total_steps())

    def run(self) -> bool:
        """Train to ``config.epochs`` in all; False if it was stopped earlier. Raises RunError if it cannot go on."""
        try:
            finished = self._train()
        except BaseException:
            with contextlib.suppress(RunError):  # the first error is the one to report
                self._draw_losses()
            raise
        finally:
            self.files.close()
        self._draw_losses()
        return finished

    def stop(self) -> None:
        """Let ``run`` end with a checkpoint, after the current step or evaluation."""
        self.stopping = True

    def checkpoint(self, parameters: dict[str, np.ndarray]) -> Checkpoint:
        """The present state, with these parameters."""
        trainer, config = self.trainer, self.config
        position = trainer.position()
        return Checkpoint(
            parameters=parameters,
            architecture=self.network.architecture,
            epoch=position.epoch,
            step=position.step,
            losses=position.losses,
            seed=config.seed,
            order_sha256=trainer.order_digest(),
            batch_size=config.batch_size,
            samples=trainer.samples,
            learning_rate=config.learning_rate,
            data=self._data_identity,
            asked=Requested(config.epochs, config.checkpoint_steps, config.data, config.data_dir),
            backend=config.backend.name,
            device=config.device,
            precision=config.precision,
            threads=config.threads,
            commit=self._commit,
            epoch_seconds=self._epoch_seconds,
            history=self.history,
            best=self.best,
        )

    # Epochs and steps -------------------------------------------------------------------------------------------

    def _train(self) -> bool:
        self.files.write_metrics(self.history)  # a killed process may have written its checkpoint and no more
        if self.trainer.epochs_done < self.config.epochs:
            self.listener.compiling()
            self.trainer.warm_up()
        while self.trainer.epochs_done < self.config.epochs:
            if not self._run_epoch():
                return False
        self._write_pictures()
        return True

    def _run_epoch(self) -> bool:
        """Continue to the end of the epoch; False if training was stopped before its end."""
        trainer, config = self.trainer, self.config
        epoch = trainer.epochs_done
        seconds, taken = 0.0, 0  # of this process: an earlier process may have been faster or slower
        while trainer.epochs_done == epoch:
            first = trainer.steps_done
            count = 1 if not taken else min(MOST_STEPS, max(1, round(REPORT_S * taken / seconds)))
            if config.checkpoint_steps:
                count = min(count, config.checkpoint_steps - first % config.checkpoint_steps)
            started = perf_counter()
            with self.files.errors_named():
                trainer.take_steps(count)
            elapsed = perf_counter() - started
            self._epoch_seconds += elapsed
            done = trainer.steps_done if trainer.epochs_done == epoch else trainer.steps
            seconds, taken = seconds + elapsed, taken + done - first
            losses = trainer.read_losses()[:done]
            self._check_losses(losses, epoch)
            self._report_steps(losses, first, epoch, seconds / taken)
            if trainer.epochs_done > epoch:
                break
            due = config.checkpoint_steps and trainer.steps_done % config.checkpoint_steps == 0
            if due or self.stopping or perf_counter() - self.files.saved_at > CHECKPOINT_S:
                self._save_within_epoch()
            if self.stopping:
                return False
        self._end_epoch(losses, seconds / taken)
        return not self.stopping or trainer.epochs_done >= config.epochs

    def _report_steps(self, losses: np.ndarray, first: int, epoch: int, step_s: float) -> None:
        trainer, config = self.trainer, self.config
        values = ({"loss/step": float(loss)} for loss in losses[first:])
        self.files.add_scalars(enumerate(values, epoch * trainer.steps + first + 1))
        steps_left = (config.epochs - epoch) * trainer.steps - len(losses)
        left = steps_left * step_s + (config.epochs - epoch) * self._evaluation_s
        images_per_s = trainer.samples / trainer.steps / step_s
        self.listener.step(StepProgress(epoch + 1, len(losses), trainer.steps, float(losses[-1]), images_per_s, left))

    def _end_epoch(self, losses: np.ndarray, step_s: float) -> None:
        """Evaluate, record the figures, and write every file."""
        trainer, config = self.trainer, self.config
        held_out_mse = self._evaluate()
        error = self._check_epoch(held_out_mse)
        figures = EpochFigures(
            epoch=trainer.epochs_done,
            step=self._total_steps(),
            learning_rate=config.learning_rate,
            train_mse=mean_loss(losses, trainer.samples, config.batch_size),
            held_out_mse=held_out_mse,
            epoch_s=self._epoch_seconds,
            images_per_s=trainer.samples / self._epoch_seconds,
            backend=config.backend.name,
            device=config.device,
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
        self.files.write_metrics(self.history)
        self._write_pictures()
        self.files.add_scalars([(figures.step, figures.scalars())])
        left = (config.epochs - trainer.epochs_done) * (trainer.steps * step_s + self._evaluation_s)
        self.listener.epoch(figures, best=is_best, seconds_left=left)

    def _evaluate(self) -> float | None:
        """The held-out error; None without held-out pictures."""
        if self.evaluator is None:
            return None
        started = perf_counter()
        with self.files.errors_named():
            mse = self.evaluator.mse()
        self._evaluation_s = perf_counter() - started
        return mse

    def _total_steps(self) -> int:
        return self.trainer.epochs_done * self.trainer.steps + self.trainer.steps_done

    # Divergence -------------------------------------------------------------------------------------------------

    def _check_losses(self, losses: np.ndarray, epoch: int) -> None:
        """Stop at the first loss that is not finite; the checkpoints are from earlier steps."""
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            self._diverged(f"the loss is {losses[bad[0]]} in step {bad[0] + 1} of epoch {epoch + 1}")

    def _check_epoch(self, held_out_mse: float | None) -> float:
        """The error of the present parameters; stops if it is not finite, or too large after the last epoch."""
        with self.files.errors_named():
            error = self.trainer.peek_loss() if held_out_mse is None else held_out_mse
        last = self.trainer.epochs_done >= self.config.epochs
        if not math.isfinite(error) or (last and error > DIVERGED_MSE):
            name = "next loss" if held_out_mse is None else "held-out error"
            self._diverged(f"the {name} is {error:g} after epoch {self.trainer.epochs_done}")
        return error

    def _diverged(self, what: str) -> None:
        saved = self.files.saved
        kept = f"{self.files.out / LAST} holds the state before that ({saved})" if saved else NO_CHECKPOINT
        advice = f"Try a learning rate below {self.config.learning_rate:g}"
        more = ", with --resume to continue from there" if saved else ""
        raise RunError(f"training diverged: {what}. {kept}. {advice}{more}")

    # Files ------------------------------------------------------------------------------------------------------

    def _save_within_epoch(self) -> None:
        """Write ``last.safetensors`` within an epoch, unless training diverges: then the one before is better.

        A loss belongs to the parameters before its step. What the last step did shows only in the next loss.
        """
        with self.files.errors_named():
            next_loss = self.trainer.peek_loss()
        if next_loss <= DIVERGED_MSE:
            self._save(LAST)

    def _save(self, name: str) -> None:
        parameters = self.network.read_parameters()
        for parameter, value in parameters.items():
            if not np.isfinite(value).all():
                self._diverged(f"{parameter} is no longer finite after {self._total_steps()} steps")
        self.files.save(self.checkpoint(parameters), name)

    def _write_pictures(self) -> None:
        """Reconstruct held-out pictures, or training pictures if none are held out."""
        self.files.write_pictures(self.network, self.data.train if self.data.held_out is None else self.data.held_out)

    def _draw_losses(self) -> None:
        self.files.draw_losses(self.history, self.trainer.samples, self.config.batch_size)


def thinned(losses: np.ndarray) -> list[float]:
    """At most ``CURVE_POINTS`` means of neighbouring losses, to six digits."""
    parts = np.array_split(losses.astype(np.float64), min(CURVE_POINTS, len(losses)))
    return [float(f"{part.mean():.6g}") for part in parts]


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C or SIGTERM calls ``stop``; the second one ends the process as usual."""
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        restore()
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
