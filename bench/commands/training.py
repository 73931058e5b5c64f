"""The commands that train and that use what was trained: ``train``, ``encode``, ``reconstruct`` and ``probe``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.commands.options import (
    DataDir,
    DeviceOption,
    MathOption,
    Threads,
    check_learning_rate,
    check_threads,
    choose,
    wide_console,
)
from bench.machine.devices import DeviceStatus, device_status, nvml_gpu
from bench.machine.environment import worker_environment
from bench.training.checkpoint import Checkpoint, load_checkpoint
from bench.training.data import count_of, load_labelled, load_split, load_training_data
from bench.training.features import FEATURES, Runner, check_new, latents, probe_checkpoints, write_array, write_new
from bench.training.folder import BEST, LAST, LOSS_CHART, METRICS, PICTURES, check_resumable, find_start, locked
from bench.training.run import Listener, Moment, TrainConfig, TrainingRun, psnr_db, stop_on_signals
from bench.views.pictures import grid_png, to_bytes
from common.architecture import autoencoder
from common.device import usable_cores
from common.errors import UsageError
from common.network import Network
from common.picture_files import first_pictures
from common.training import Pictures, forward_batches
from common.validation import check_number
from versions.registry import BackendInfo, find

DEFAULT_BACKEND = "v4"
DEFAULTS = {
    "learning_rate": 0.001, "batch_size": 64, "seed": 0, "epochs": 20, "checkpoint_steps": 0, "data": "auto",
}  # fmt: skip
SPLITS = ("train", "test")
MOST_SHOWN = 256  # pictures in a grid
LINE_S = 30  # between lines of progress where there is no terminal

Backend = Annotated[str, typer.Option("--backend", help="The version.", metavar="NAME")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Pictures at a time.")]
DataSource = Annotated[str, typer.Option("--data", help="auto, cifar10, photos or a FILE.npy.", metavar="SOURCE")]
LabelledSource = Annotated[str, typer.Option("--data", help="auto, cifar10 or photos.", metavar="SOURCE")]
CheckpointFile = Annotated[Path, typer.Argument(help="A checkpoint.", metavar="CHECKPOINT")]
Split = Annotated[str | None, typer.Option("--split", help="train or test.", metavar="SPLIT")]
Seed = Annotated[int, typer.Option("--seed", help="Of the photo crops.")]


def add_to(app: typer.Typer) -> None:
    """Make these commands part of the command line."""
    app.command("train")(train_command)
    app.command("encode")(encode_command)
    app.command("reconstruct")(reconstruct_command)
    app.command("probe")(probe_command)


def train_command(
    out: Annotated[Path, typer.Option(help="Folder of this run; made if it is not there.", metavar="DIR")],
    backend: Annotated[
        str | None, typer.Option(help="The version; v4, or with --resume the one before.", metavar="NAME")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, the default, cpu or gpu.", metavar="DEVICE")] = None,
    epochs: Annotated[int | None, typer.Option(help="In all, those before --resume included; 20.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step; 64.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of plain SGD; 0.001, which learns slowly by design.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and photo crops; 0.")] = None,
    samples: Annotated[int | None, typer.Option(help="Pictures to learn from; all by default.")] = None,
    held_out: Annotated[
        int | None, typer.Option(help="Pictures to be judged by only; one for five, at most 10,000.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="cifar10, photos, a FILE.npy, or auto, the default.", metavar="SOURCE")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with CIFAR-10's binary files; data.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Leave pictures in their files, however few.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from last.safetensors in --out.")] = False,
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="Also write last.safetensors after so many steps, not only every five minutes.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write scalars for TensorBoard.")] = False,
    math: Annotated[str | None, typer.Option(help="fp32, the default, or tf32 for cuBLAS on a GPU.")] = None,
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; only what went wrong.")] = False,
) -> None:
    """Train one version to the end: checkpoints, metrics, loss curve and reconstructions, all in one folder.

    With --resume, whatever is not given is as the run was begun, but for --stream, --tensorboard and --quiet.
    """
    check_learning_rate(learning_rate)
    check_number("epochs", epochs, 1)
    check_number("batch size", batch_size, 1)
    check_number("seed", seed, 0)
    check_number("checkpoint steps", checkpoint_steps, 0)
    if tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UsageError('--tensorboard needs tensorboardX: python -m pip install -e ".[tensorboard]"')
    if backend is not None:
        find(backend)
    architecture = autoencoder()
    before = find_start(out, architecture, resume=True) if resume else None  # and no folder is made for nothing
    if before and threads is None and before.threads <= usable_cores():
        threads = before.threads  # on which the bits depend
    math = math or (before.math if before else "fp32")
    info = find(backend or (before.backend if before else DEFAULT_BACKEND))
    if device is None and before and not device_status(before.device).available:
        device = "auto"  # and the line about the resumption tells of it
    status, threads = _where(info, device or (before.device if before else "auto"), math, threads)

    console = wide_console(quiet=quiet)
    tell = _teller(console)
    with locked(out):
        start = find_start(out, architecture, resume=resume)
        given = {"batch_size": batch_size, "learning_rate": learning_rate, "seed": seed, "epochs": epochs}
        given |= {"checkpoint_steps": checkpoint_steps, "data": data}
        given["data_dir"] = None if data_dir is None else str(data_dir.resolve())
        kept = DEFAULTS | {"data_dir": str(Path("data").resolve())}
        if start:
            kept = {name: getattr(start, name, None) for name in kept} | start.asked
        if data is not None and data.endswith(".npy"):
            given["data"] = str(Path(data).resolve())
        settings = {name: kept[name] if value is None else value for name, value in given.items()}
        config = TrainConfig(
            backend=info,
            device=status.device,
            math=info.effective_math(status.device, math),
            threads=threads,
            tensorboard=tensorboard,
            **settings,
        )
        if start:
            samples = start.samples if samples is None else samples
            held_out = start.data["held_out"] if held_out is None else held_out
        pictures = load_training_data(
            config.data, Path(config.data_dir), samples, held_out, config.seed, stream=stream,
            room_bytes=_free_bytes(status),
        )  # fmt: skip
        if config.data == "auto":
            config = replace(config, data=pictures.source)
        if start:
            check_resumable(start, config.seed, config.batch_size, pictures, out / LAST)
        tell(f"data: {pictures.description}; {count_of(pictures.held_out):,} held out")
        tell(f"device: {status.device} ({status.name}), {threads} threads; {info.label}")
        if start:
            tell(_resumed(start, config))
        run = TrainingRun(config, pictures, architecture, out, start)
        already = run.trainer.epochs_done
        with _shown(console, config.epochs, quiet=quiet) as run.listener, stop_on_signals(run.stop):
            finished = run.run()
    trainer = run.trainer
    if not finished:
        there = f"{out / LAST} is of {run.saved}" if run.saved else "no checkpoint was worth writing"
        tell(f"stopped after {trainer.epochs_done} epochs and {trainer.steps_done} steps; {there}")
        if run.saved:
            tell(f"convbench train --resume --out {out} goes on")
        raise typer.Exit(130)
    if already >= config.epochs:
        tell(f"{out / LAST} has {already} epochs already: nothing was left to train")
    if run.best:
        tell(f"best: {out / BEST}, epoch {run.best['epoch']}")
    for name in (LAST, METRICS, LOSS_CHART, PICTURES):
        if (out / name).exists():
            tell(f"{out / name}")


def encode_command(
    checkpoint: CheckpointFile,
    out: Annotated[Path, typer.Option(help="The array, .npy; never written over another file.", metavar="FILE.npy")],
    backend: Backend = DEFAULT_BACKEND,
    device: DeviceOption = "auto",
    data: DataSource = "auto",
    data_dir: DataDir = Path("data"),
    split: Split = None,
    samples: Annotated[int | None, typer.Option(help="How many pictures; all by default.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    math: MathOption = "fp32",
    threads: Threads = None,
) -> None:
    """Write the latent of every picture, 8,192 float32 values in (C, H, W) order, into one array, part by part.

    Training pictures unless --split says otherwise.
    """
    if out.suffix != ".npy":
        raise UsageError(f"--out {out}: must end in .npy")
    runner = _runner(backend, device, math, threads, batch_size)

    check_new(out)
    network, pictures, description = _loaded(runner, checkpoint, data, data_dir, split, samples, seed)
    columns = prod(network.architecture.latent_shape)
    parts = _counted("encoding", len(pictures), latents(network, pictures))
    write_array(out, parts, (len(pictures), columns), "<f4")
    print(f"{out}: float32 ({len(pictures)}, {columns}), latents of {description}")


def reconstruct_command(
    checkpoint: CheckpointFile,
    out: Annotated[
        Path, typer.Option(help="A grid, .png, or all as bytes, .npy; never over another file.", metavar="FILE")
    ],
    backend: Backend = DEFAULT_BACKEND,
    device: DeviceOption = "auto",
    data: DataSource = "auto",
    data_dir: DataDir = Path("data"),
    split: Split = None,
    samples: Annotated[int, typer.Option(help="How many pictures.")] = 32,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    math: MathOption = "fp32",
    threads: Threads = None,
) -> None:
    """Write pictures as the network gives them back: originals above reconstructions, or an array (N, 3, 32, 32).

    Test pictures unless --split says otherwise.
    """
    if out.suffix not in (".png", ".npy"):
        raise UsageError(f"--out {out}: must end in .png, a grid, or .npy, an array")
    if out.suffix == ".png" and samples > MOST_SHOWN:
        raise UsageError(f"samples {samples}: a grid shows at most {MOST_SHOWN}; an array (.npy) takes any number")
    runner = _runner(backend, device, math, threads, batch_size)

    check_new(out)
    if split is None and not data.endswith(".npy"):
        split = "test"
    network, pictures, description = _loaded(runner, checkpoint, data, data_dir, split, samples, seed)
    parts = _counted("reconstructing", len(pictures), map(to_bytes, forward_batches(network, pictures)))
    if out.suffix == ".npy":
        write_array(out, parts, (len(pictures), *network.architecture.output_shape), "|u1")
    else:
        write_new(out, grid_png(first_pictures(pictures, len(pictures)), np.concatenate(list(parts))))
    print(f"{out}: {len(pictures)} pictures of {description}")


def probe_command(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints.", metavar="CHECKPOINT...")],
    backend: Backend = DEFAULT_BACKEND,
    device: DeviceOption = "auto",
    data: LabelledSource = "auto",
    data_dir: DataDir = Path("data"),
    samples: Annotated[int, typer.Option(help="Pictures that the classifier learns from.")] = 5000,
    test_samples: Annotated[int, typer.Option(help="Pictures that it is tested on.")] = 2000,
    features: Annotated[str, typer.Option(help="pooled, the mean of each channel, or whole latents.")] = "pooled",
    seed: Annotated[int, typer.Option(help="Of the untrained network and the photo crops.")] = 0,
    batch_size: BatchSize = 64,
    math: MathOption = "fp32",
    threads: Threads = None,
) -> None:
    """Fit a linear classifier on the latents of each checkpoint, on an untrained network's, and on raw pixels."""
    check_number("seed", seed, 0)
    if features not in FEATURES:
        raise UsageError(f"unknown features {features!r}: choose from {', '.join(FEATURES)}")
    runner = _runner(backend, device, math, threads, batch_size)

    counts = {"train": samples, "test": test_samples}
    train, test = (load_labelled(data, data_dir, split, count, seed) for split, count in counts.items())
    largest = float(np.bincount(test[1]).max() / len(test[1]))
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("features", "values", "accuracy", "95 % interval"):
        table.add_column(name, justify="left" if name == "features" else "right")
    for found in probe_checkpoints(
        checkpoints, autoencoder(), runner, train, test, features=features, seed=seed
    ):  # fmt: skip
        low, high = found.interval
        note = "" if found.converged else " (not converged)"
        table.add_row(
            f"{escape(found.features)}{note}", f"{found.dimensions:,}", f"{100 * found.accuracy:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
        )  # fmt: skip
    tell = _teller(wide_console())
    tell(f"linear classifier, {features} latents: learns from {samples:,} pictures, tested on {test_samples:,}")
    wide_console().print(table)
    tell(f"interval: Wilson's, 95 %; always the most frequent class: {100 * largest:.1f} %")


# What they share ------------------------------------------------------------------------------------------------------


def _where(info: BackendInfo, device: str, math: str, threads: int | None) -> tuple[DeviceStatus, int]:
    """Check where to run, and fix thread counts before anything that reads them from the environment is imported."""
    os.environ.update(worker_environment(check_threads(threads)))
    _, status, threads = choose([info.name], device, math, threads)
    return status, threads


def _runner(backend: str, device: str, math: str, threads: int | None, batch_size: int) -> Runner:
    check_number("batch size", batch_size, 1)
    info = find(backend)
    status, threads = _where(info, device, math, threads)
    return Runner(info, status.device, info.effective_math(status.device, math), threads, batch_size)


def _loaded(
    runner: Runner, checkpoint: Path, data: str, data_dir: Path, split: str | None, samples: int | None, seed: int
) -> tuple[Network, Pictures, str]:
    """The network with a checkpoint's parameters, and the pictures to run it on."""
    check_number("seed", seed, 0)
    if split is not None and split not in SPLITS:
        raise UsageError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    architecture = autoencoder()
    parameters = load_checkpoint(checkpoint, architecture).parameters
    pictures, description = load_split(data, data_dir, split, samples, seed)
    return runner.network(architecture, parameters), pictures, description


def _free_bytes(status: DeviceStatus) -> int:
    """Memory for pictures: the host's, or the GPU's if that is less."""
    free = psutil.virtual_memory().available
    if status.device != "gpu":
        return free
    with nvml_gpu() as (nvml, gpu):
        return min(free, nvml.nvmlDeviceGetMemoryInfo(gpu).free)


def _counted(what: str, total: int, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass parts on, with a bar on a terminal's standard error."""
    with _bar() as bar:
        task = bar.add_task(what, total=total)
        for part in parts:
            bar.update(task, advance=len(part))
            yield part


def _bar(*columns: ProgressColumn, quiet: bool = False) -> Progress:
    """A bar on standard error that goes when what it shows is done; none where there is no terminal."""
    console = Console(stderr=True)
    shown = (TextColumn("{task.description}"), BarColumn(), *(columns or (TaskProgressColumn(), TimeRemainingColumn())))
    return Progress(*shown, console=console, transient=True, disable=quiet or not console.is_terminal)


def _teller(console: Console) -> Callable[[str], None]:
    """Prints a line as it is, however long."""
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


class _Shown(Listener):
    """Tells of a training run: a bar on a terminal, else a line now and then; and a line an epoch."""

    def __init__(self, console: Console, epochs: int, bar: Progress) -> None:
        self._tell, self._epochs, self._bar = _teller(console), epochs, bar
        self._task = bar.add_task("compiling", total=None, figures="")
        self._told = perf_counter()

    def compiling(self) -> None:
        self._tell("compiling")

    def step(self, moment: Moment) -> None:
        epoch = f"epoch {moment.epoch} of {self._epochs}"
        steps = f"{moment.step}/{moment.steps} steps"
        figures = f"{moment.images_per_s:,.0f} images/s, {duration(moment.seconds_left)} left, loss {moment.loss:.5f}"
        self._bar.update(
            self._task, description=epoch, total=moment.steps, completed=moment.step, figures=f"{steps}, {figures}"
        )
        now = perf_counter()
        if self._bar.disable and now - self._told > LINE_S and moment.step < moment.steps:
            self._told = now
            self._tell(f"{epoch}, step {moment.step} of {moment.steps}: {figures}")

    def epoch(self, figures: dict[str, Any], *, best: bool, seconds_left: float) -> None:
        self._told = perf_counter()
        parts = [f"train {_error(figures['train_mse'])}"]
        if figures["held_out_mse"] is not None:
            parts.append(f"held out {_error(figures['held_out_mse'])}{' (best)' if best else ''}")
        parts.append(f"{figures['images_per_s']:,.0f} images/s")
        if figures["epoch"] < self._epochs:
            parts.append(f"{duration(seconds_left)} left")
        self._tell(f"epoch {figures['epoch']} of {self._epochs}: {', '.join(parts)}")


@contextmanager
def _shown(console: Console, epochs: int, *, quiet: bool) -> Iterator[_Shown]:
    with _bar(TextColumn("{task.fields[figures]}"), quiet=quiet) as bar:
        yield _Shown(bar.console if console.is_terminal and not quiet else console, epochs, bar)


def duration(seconds: float) -> str:
    """A length of time in the two units that tell most."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _error(mse: float) -> str:
    found = psnr_db(mse)
    return f"MSE {mse:.5f}{'' if found is None else f', PSNR {found:.2f} dB'}"


def _resumed(start: Checkpoint, config: TrainConfig) -> str:
    """From where, and whether to the same bits."""
    at = f"resumed after {start.position.epoch} epochs and {start.position.step} steps"
    now = (config.backend.name, config.device, config.math, config.threads)
    before = (start.backend, start.device, start.math, start.threads)
    if now == before:
        return f"{at}, on the same backend"
    words = "{} on the {}, {}, {} threads".format
    return f"{at}, of {words(*before)}; now {words(*now)}: equal within rounding, not bit for bit"
