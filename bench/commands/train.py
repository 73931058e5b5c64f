"""``convbench train``: train one version to the end, or resume a run."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from bench.commands.console import say, wide_console
from bench.commands.networks import NetworkOptions, terminal_bar
from bench.commands.options import check_learning_rate
from bench.machine.devices import cpu_name, device_status, nvml_gpu
from bench.records.training import Checkpoint, EpochFigures, Requested, TrainSettings
from bench.training.data import load_training_data
from bench.training.folder import BEST, LAST, LOSS_CHART, METRICS, PICTURES, find_start, locked
from bench.training.run import RunProgress, TrainingRun, stop_on_signals
from bench.views.words import duration
from common.architecture import autoencoder
from common.backend import Device
from common.dataset import choose_folder
from common.device import usable_cores
from common.errors import UsageError, check_number
from versions.registry import find

LINE_S = 30  # between lines of progress without a terminal


@dataclass(frozen=True, kw_only=True)
class TrainOptions(NetworkOptions):
    """The options of ``convbench train``."""

    context: typer.Context
    out: Annotated[Path, typer.Option(help="Folder of this run; made if it does not exist.", metavar="DIR")]
    seed: Annotated[int, typer.Option(help="Of weights, order and photo crops.")] = 0
    epochs: Annotated[int, typer.Option(help="In all, with those before --resume.")] = 20
    learning_rate: Annotated[float, typer.Option(help="Of plain SGD; the default learns slowly by design.")] = 0.001
    samples: Annotated[int | None, typer.Option(help="Training pictures; all by default.")] = None
    held_out: Annotated[
        int | None, typer.Option(help="Pictures only to evaluate on; one for five training pictures, at most 10,000.")
    ] = None
    stream: Annotated[bool, typer.Option("--stream", help="Leave pictures in their files, however few.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Continue from last.safetensors in --out.")] = False
    checkpoint_steps: Annotated[
        int, typer.Option(help="Also write last.safetensors after this many steps, not only every five minutes.")
    ] = 0
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write scalars for TensorBoard.")] = False
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
    if options.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UsageError('--tensorboard needs tensorboardX: python -m pip install -e ".[tensorboard]"')
    architecture = autoencoder()
    console = wide_console(quiet=options.quiet)
    with locked(options.out):
        start = find_start(options.out, architecture, resume=options.resume)
        if start:
            options = _inherit(options, start)
        settings = _settings(options)
        device_name, free_bytes = _device(settings.device)
        pictures = load_training_data(
            settings.asked.data, Path(settings.asked.data_dir), options.samples, options.held_out, options.seed,
            stream=options.stream, room_bytes=free_bytes,
        )  # fmt: skip
        run = TrainingRun(settings, pictures, architecture, options.out, start)
        already = run.trainer.epochs_done
        say(console, f"data: {pictures.description}; {len(pictures.held_out):,} held out")
        label = find(settings.backend).label
        say(console, f"device: {settings.device} ({device_name}), {settings.threads} threads; {label}")
        if start:
            say(console, _resumed(start, settings))
        if already < run.epochs:
            say(console, "compiling")
        with terminal_bar(TextColumn("{task.fields[figures]}"), quiet=options.quiet) as bar, stop_on_signals(run.stop):
            # On a terminal the bar's own console prints lines above the bar.
            shown = bar.console if console.is_terminal and not options.quiet else console
            finished = run.run(_Display(shown, run.epochs, bar), tensorboard=options.tensorboard)
    if not finished:
        kept = f"{options.out / LAST} holds {run.saved}" if run.saved else "no checkpoint was worth writing"
        say(console, f"stopped after {run.trainer.epochs_done} epochs and {run.trainer.steps_done} steps; {kept}")
        if run.saved:
            say(console, f"convbench train --resume --out {options.out} continues the run")
        raise typer.Exit(130)
    if already >= run.epochs:
        say(console, f"{options.out / LAST} already has {already} epochs: nothing was left to train")
    if run.best:
        say(console, f"best: {options.out / BEST}, epoch {run.best.epoch}")
    for name in (LAST, METRICS, LOSS_CHART, PICTURES):
        if (options.out / name).exists():
            say(console, f"{options.out / name}")


def _inherit(options: TrainOptions, start: Checkpoint) -> TrainOptions:
    """The options, and the values of the run to resume where none are given."""
    values = asdict(start.asked) | {
        "backend": start.backend, "math": start.precision, "batch_size": start.batch_size, "seed": start.seed,
        "learning_rate": start.learning_rate, "samples": start.samples, "held_out": start.data.held_out,
    }  # fmt: skip
    if device_status(start.device).available:
        values["device"] = start.device  # otherwise another one, and the line about the resumption says so
    if start.threads <= usable_cores():
        values["threads"] = start.threads  # the same bits need the same number of threads
    source = options.context.get_parameter_source
    return replace(options, **{name: value for name, value in values.items() if source(name).name == "DEFAULT"})


def _settings(options: TrainOptions) -> TrainSettings:
    """The settings of the run; UsageError for a value that no run can have."""
    check_learning_rate(options.learning_rate)
    check_number("epochs", options.epochs, 1)
    check_number("checkpoint steps", options.checkpoint_steps, 0)
    data, folder = options.data, Path(options.data_dir).resolve()
    if data.endswith(".npy"):
        data = str(Path(data).resolve())
    elif data == "auto":
        data = "photos" if choose_folder(data, folder) is None else "cifar10"
    asked = Requested(options.epochs, options.checkpoint_steps, data, str(folder))
    settings = vars(options.settings())
    return TrainSettings(**settings, learning_rate=options.learning_rate, seed=options.seed, asked=asked)


def _device(device: Device) -> tuple[str, int]:
    """The device's name, and the free memory for pictures: the host's, or the GPU's if that is less."""
    free = psutil.virtual_memory().available
    if device == "cpu":
        return cpu_name(), free
    with nvml_gpu() as (nvml, gpu):
        return nvml.nvmlDeviceGetName(gpu), min(free, nvml.nvmlDeviceGetMemoryInfo(gpu).free)


# What is printed ------------------------------------------------------------------------------------------------------


class _Display:
    """Shows a training run: a bar on a terminal, otherwise a line now and then; and a line for each epoch."""

    def __init__(self, console: Console, epochs: int, bar: Progress) -> None:
        self._console, self._epochs, self._bar = console, epochs, bar
        self._task = bar.add_task("compiling", total=None, figures="")
        self._shown_at = perf_counter()

    def __call__(self, progress: RunProgress) -> None:
        now = perf_counter()
        epoch = f"epoch {progress.epoch} of {self._epochs}"
        left = f"{duration(progress.seconds_left)} left"
        if progress.figures:
            self._shown_at = now
            more = f", {left}" if progress.epoch < self._epochs else ""
            say(self._console, f"{epoch}: {_figures(progress.figures, best=progress.best)}{more}")
            return
        figures = f"{progress.images_per_s:,.0f} images/s, {left}, loss {progress.loss:.5f}"
        self._bar.update(
            self._task,
            description=epoch,
            total=progress.steps,
            completed=progress.step,
            figures=f"{progress.step}/{progress.steps} steps, {figures}",
        )
        if self._bar.disable and now - self._shown_at > LINE_S and progress.step < progress.steps:
            self._shown_at = now
            say(self._console, f"{epoch}, step {progress.step} of {progress.steps}: {figures}")


def _figures(figures: EpochFigures, *, best: bool) -> str:
    def error(mse: float, psnr: float | None) -> str:
        return f"MSE {mse:.5f}{'' if psnr is None else f', PSNR {psnr:.2f} dB'}"

    parts = [f"train {error(figures.train_mse, figures.train_psnr_db)}"]
    if figures.held_out_mse is not None:
        held_out = error(figures.held_out_mse, figures.held_out_psnr_db)
        parts.append(f"held out {held_out}{' (best)' if best else ''}")
    return ", ".join([*parts, f"{figures.images_per_s:,.0f} images/s"])


def _resumed(start: Checkpoint, settings: TrainSettings) -> str:
    """Where the run continues, and whether with the same bits."""
    at = f"resumed after {start.epoch} epochs and {start.step} steps"
    before, now = ((each.backend, each.device, each.precision, each.threads) for each in (start, settings))
    if now == before:
        return f"{at}, on the same backend"
    words = "{} on the {}, {}, {} threads".format
    return f"{at} of {words(*before)}; now {words(*now)}: equal within rounding, not bit for bit"
