"""``convbench train``: train one version to the end, or resume a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from bench.commands.console import say, wide_console
from bench.commands.networks import DEFAULT_BACKEND, Place, choose_place, terminal_bar
from bench.commands.options import Threads, check_learning_rate
from bench.machine.devices import DeviceStatus, device_status, nvml_gpu
from bench.records.training import EpochFigures
from bench.training.checkpoint import Checkpoint
from bench.training.data import TrainingData, count_of, load_training_data
from bench.training.folder import BEST, LAST, LOSS_CHART, METRICS, PICTURES, check_resumable, find_start, locked
from bench.training.run import Listener, StepProgress, TrainingRun, stop_on_signals
from bench.training.settings import TrainConfig
from bench.views.words import duration
from common.architecture import autoencoder
from common.device import usable_cores
from common.errors import UsageError, check_number
from versions.registry import find

DEFAULTS = {
    "learning_rate": 0.001, "batch_size": 64, "seed": 0, "epochs": 20, "checkpoint_steps": 0, "data": "auto",
    "data_dir": "data",
}  # fmt: skip
LINE_S = 30  # between lines of progress without a terminal


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of ``convbench train``; None stands for the default or, with ``resume``, for the run's own value."""

    out: Annotated[Path, typer.Option(help="Folder of this run; made if it does not exist.", metavar="DIR")]
    backend: Annotated[
        str | None, typer.Option(help="The version; v4, or with --resume the one before.", metavar="NAME")
    ] = None
    device: Annotated[str | None, typer.Option(help="auto, the default, cpu or gpu.", metavar="DEVICE")] = None
    epochs: Annotated[int | None, typer.Option(help="In all, with those before --resume; 20.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step; 64.")] = None
    learning_rate: Annotated[float | None, typer.Option(help="Of plain SGD; 0.001, which learns slowly by design.")] = (
        None
    )
    seed: Annotated[int | None, typer.Option(help="Of weights, order and photo crops; 0.")] = None
    samples: Annotated[int | None, typer.Option(help="Training pictures; all by default.")] = None
    held_out: Annotated[
        int | None, typer.Option(help="Pictures only to evaluate on; one for five training pictures, at most 10,000.")
    ] = None
    data: Annotated[
        str | None, typer.Option(help="cifar10, photos, a FILE.npy, or auto, the default.", metavar="SOURCE")
    ] = None
    data_dir: Annotated[Path | None, typer.Option(help="Folder with CIFAR-10's binary files; data.")] = None
    stream: Annotated[bool, typer.Option("--stream", help="Leave pictures in their files, however few.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Continue from last.safetensors in --out.")] = False
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="Also write last.safetensors after this many steps, not only every five minutes.")
    ] = None
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write scalars for TensorBoard.")] = False
    math: Annotated[
        str | None, typer.Option("--math", help="fp32, the default, or tf32 for cuBLAS on a GPU.", metavar="MATH")
    ] = None
    threads: Threads = None
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; only errors.")] = False


def train_command(options: TrainOptions) -> None:
    """Train one version to the end: checkpoints, metrics, loss curve and reconstructions, all in one folder.

    With --resume, options that are not given keep the run's values, except --stream, --tensorboard and --quiet.

    \b
    Examples:
      convbench train --out runs/a                         V4, 20 epochs
      convbench train --out runs/a --resume --epochs 40    20 more epochs
      convbench train --out runs/a --resume --backend v1   continue on V1
      convbench train --out runs/b --device gpu --data cifar10
      convbench train --out runs/c --data pictures.npy --held-out 500
    """
    _check(options)
    architecture = autoencoder()
    # Before the lock, which makes the folder: a run that cannot be resumed leaves nothing behind.
    before = find_start(options.out, architecture, resume=True) if options.resume else None
    place = _choose_place(options, before)
    console = wide_console(quiet=options.quiet)
    with locked(options.out):
        start = find_start(options.out, architecture, resume=options.resume)
        config, pictures = _prepare(options, place, start)
        say(console, f"data: {pictures.description}; {count_of(pictures.held_out):,} held out")
        say(console, f"device: {config.device} ({place.status.name}), {config.threads} threads; {place.info.label}")
        if start:
            say(console, _resumed(start, config))
        run = TrainingRun(config, pictures, architecture, options.out, start)
        already = run.trainer.epochs_done
        with _display(console, config.epochs, quiet=options.quiet) as run.listener, stop_on_signals(run.stop):
            finished = run.run()
    if not finished:
        _tell_stopped(console, run)
        raise typer.Exit(130)
    if already >= config.epochs:
        say(console, f"{options.out / LAST} already has {already} epochs: nothing was left to train")
    if run.best:
        say(console, f"best: {options.out / BEST}, epoch {run.best.epoch}")
    for name in (LAST, METRICS, LOSS_CHART, PICTURES):
        if (options.out / name).exists():
            say(console, f"{options.out / name}")


# Options --------------------------------------------------------------------------------------------------------------


def _check(options: TrainOptions) -> None:
    """Raise UsageError for a value that no run can have."""
    check_learning_rate(options.learning_rate)
    check_number("epochs", options.epochs, 1)
    check_number("batch size", options.batch_size, 1)
    check_number("seed", options.seed, 0)
    check_number("checkpoint steps", options.checkpoint_steps, 0)
    if options.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UsageError('--tensorboard needs tensorboardX: python -m pip install -e ".[tensorboard]"')
    if options.backend is not None:
        find(options.backend)


def _choose_place(options: TrainOptions, before: Checkpoint | None) -> Place:
    """The version, device, arithmetic and threads asked for, or those of the run to resume."""
    info = find(options.backend or (before.backend if before else DEFAULT_BACKEND))
    math = options.math or (before.precision if before else "fp32")
    device, threads = options.device or "auto", options.threads
    if before and options.device is None and device_status(before.device).available:
        device = before.device  # otherwise another one, and the line about the resumption says so
    if before and threads is None and before.threads <= usable_cores():
        threads = before.threads  # the same bits need the same number of threads
    return choose_place(info, device, math, threads)


def _prepare(options: TrainOptions, place: Place, start: Checkpoint | None) -> tuple[TrainConfig, TrainingData]:
    """The run's settings, and its pictures; UsageError if the run cannot be resumed with them."""
    settings: dict[str, Any] = dict(DEFAULTS)
    if start:
        settings |= asdict(start.asked)
        settings |= {"batch_size": start.batch_size, "learning_rate": start.learning_rate, "seed": start.seed}
    settings |= {name: value for name in DEFAULTS if (value := getattr(options, name)) is not None}
    settings["data_dir"] = str(Path(settings["data_dir"]).resolve())
    if settings["data"].endswith(".npy"):
        settings["data"] = str(Path(settings["data"]).resolve())
    config = TrainConfig(
        backend=place.info,
        device=place.status.device,
        precision=place.precision,
        threads=place.threads,
        tensorboard=options.tensorboard,
        **settings,
    )
    samples, held_out = options.samples, options.held_out
    if start:
        samples = start.samples if samples is None else samples
        held_out = start.data.held_out if held_out is None else held_out
    pictures = load_training_data(
        config.data,
        Path(config.data_dir),
        samples,
        held_out,
        config.seed,
        stream=options.stream,
        room_bytes=_free_bytes(place.status),
    )
    if config.data == "auto":
        config = replace(config, data=pictures.source)
    if start:
        check_resumable(start, config.seed, config.batch_size, pictures, options.out / LAST)
    return config, pictures


def _free_bytes(status: DeviceStatus) -> int:
    """Free memory for pictures: the host's, or the GPU's if that is less."""
    free = psutil.virtual_memory().available
    if status.device != "gpu":
        return free
    with nvml_gpu() as (nvml, gpu):
        return min(free, nvml.nvmlDeviceGetMemoryInfo(gpu).free)


# What is printed ------------------------------------------------------------------------------------------------------


class _Display(Listener):
    """Shows a training run: a bar on a terminal, otherwise a line now and then; and a line for each epoch."""

    def __init__(self, console: Console, epochs: int, bar: Progress) -> None:
        self._console, self._epochs, self._bar = console, epochs, bar
        self._task = bar.add_task("compiling", total=None, figures="")
        self._shown_at = perf_counter()

    def compiling(self) -> None:
        say(self._console, "compiling")

    def step(self, progress: StepProgress) -> None:
        epoch = f"epoch {progress.epoch} of {self._epochs}"
        rate = f"{progress.images_per_s:,.0f} images/s, {duration(progress.seconds_left)} left"
        figures = f"{rate}, loss {progress.loss:.5f}"
        self._bar.update(
            self._task,
            description=epoch,
            total=progress.steps,
            completed=progress.step,
            figures=f"{progress.step}/{progress.steps} steps, {figures}",
        )
        now = perf_counter()
        if self._bar.disable and now - self._shown_at > LINE_S and progress.step < progress.steps:
            self._shown_at = now
            say(self._console, f"{epoch}, step {progress.step} of {progress.steps}: {figures}")

    def epoch(self, figures: EpochFigures, *, best: bool, seconds_left: float) -> None:
        self._shown_at = perf_counter()
        parts = [f"train {_error(figures.train_mse, figures.train_psnr_db)}"]
        if figures.held_out_mse is not None:
            held_out = _error(figures.held_out_mse, figures.held_out_psnr_db)
            parts.append(f"held out {held_out}{' (best)' if best else ''}")
        parts.append(f"{figures.images_per_s:,.0f} images/s")
        if figures.epoch < self._epochs:
            parts.append(f"{duration(seconds_left)} left")
        say(self._console, f"epoch {figures.epoch} of {self._epochs}: {', '.join(parts)}")


@contextmanager
def _display(console: Console, epochs: int, *, quiet: bool) -> Iterator[_Display]:
    with terminal_bar(TextColumn("{task.fields[figures]}"), quiet=quiet) as bar:
        # On a terminal the bar's own console prints lines above the bar.
        yield _Display(bar.console if console.is_terminal and not quiet else console, epochs, bar)


def _error(mse: float, psnr: float | None) -> str:
    return f"MSE {mse:.5f}{'' if psnr is None else f', PSNR {psnr:.2f} dB'}"


def _resumed(start: Checkpoint, config: TrainConfig) -> str:
    """Where the run continues, and whether with the same bits."""
    at = f"resumed after {start.epoch} epochs and {start.step} steps"
    now = (config.backend.name, config.device, config.precision, config.threads)
    before = (start.backend, start.device, start.precision, start.threads)
    if now == before:
        return f"{at}, on the same backend"
    words = "{} on the {}, {}, {} threads".format
    return f"{at} of {words(*before)}; now {words(*now)}: equal within rounding, not bit for bit"


def _tell_stopped(console: Console, run: TrainingRun) -> None:
    trainer, files = run.trainer, run.files
    kept = f"{files.out / LAST} holds {files.saved}" if files.saved else "no checkpoint was worth writing"
    say(console, f"stopped after {trainer.epochs_done} epochs and {trainer.steps_done} steps; {kept}")
    if files.saved:
        say(console, f"convbench train --resume --out {files.out} continues the run")
