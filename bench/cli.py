"""The command line: ``convbench``, or ``python -m bench``.

Bad input ends in one line on standard error and exit code 2, before anything is written. Exit code 1 means that a
version failed its verification or did not finish, that a GPU kernel breaks a rule, or that training could not go on;
130 that Ctrl-C ended the run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from bench.commands import training as train_commands
from bench.commands.options import (
    Backends,
    DataDir,
    DeviceOption,
    MathOption,
    Threads,
    check_learning_rate,
    check_threads,
    choose,
    find_backends,
    progress,
    reporter,
    run_app,
    wide_console,
)
from bench.machine.devices import DEVICES, device_status, probe_gpu
from bench.measure.peers import find_peers
from bench.measure.run import RunConfig, Worker, WorkerError, record_verification, run, total_steps
from bench.records.run import Row, prepare_folder, write_record
from bench.views import tables
from common.architecture import autoencoder
from common.dataset import SOURCES, download_cifar10, find_cifar10, load_pictures, photo_crops
from common.device import usable_cores
from common.errors import UsageError
from common.validation import check_number
from versions.registry import find

DEFAULT_SAMPLES = {"cpu": 128, "gpu": 50_000}
DEFAULT_EPOCHS = 6  # enough for an interval, and for a difference between two files of seven rows to show
LAYER_ROUNDS = {"cpu": 8, "gpu": 20}  # enough for a difference between two files to show
FULL_EPOCH = 50_000
CHECKED_BATCH = 64  # the whole step that ``check`` verifies; ``run`` verifies the sizes it will time

app = typer.Typer(
    help="Train one convolutional autoencoder with interchangeable backends: verify each, time its epochs, chart them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Get the CIFAR-10 pictures.", no_args_is_help=True)
app.add_typer(data_app, name="data")
train_commands.add_to(app)


@app.command("run")
def run_command(
    backend: Backends = None,
    device: DeviceOption = "auto",
    epochs: Annotated[int, typer.Option(help="Timed epochs.")] = DEFAULT_EPOCHS,
    samples: Annotated[int | None, typer.Option(help="Pictures an epoch; 128 on a CPU, 50,000 on a GPU.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of plain SGD.")] = 0.001,
    seed: Annotated[int, typer.Option(help="Of the weights, the order and the photo crops.")] = 0,
    threads: Threads = None,
    math: MathOption = "fp32",
    data: Annotated[str, typer.Option(help="auto, cifar10 or photos.", metavar="SOURCE")] = "auto",
    data_dir: DataDir = Path("data"),
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which no further round of epochs is begun; one always is.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option("--peer", help="Also time the network in: torch.", metavar="NAME")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs/ and charts/.")] = Path("results"),
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")] = False,
) -> None:
    """Verify every version, time its epochs, write one results file and the charts."""
    if data not in SOURCES:
        raise UsageError(f"unknown data source {data!r}: choose from {', '.join(SOURCES)}")
    check_learning_rate(learning_rate)
    check_number("seed", seed, 0)
    for name, value in (("epochs", epochs), ("samples", samples), ("batch size", batch_size)):
        check_number(name, value, 1)
    if time_limit is not None and not time_limit > 0:
        raise UsageError(f"time limit {time_limit}: must be a positive number of seconds")
    peers = find_peers(peer)
    infos, status, threads = choose(backend, device, math, threads, again=True)
    config = RunConfig(
        backends=infos,
        device=status.device,
        math=math,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        threads=threads,
        samples=samples or DEFAULT_SAMPLES[status.device],
        peers=peers,
        time_limit_s=time_limit,
    )
    pictures = load_pictures(data, data_dir, config.samples, seed)
    runs = prepare_folder(out)

    console = wide_console(quiet=quiet)
    console.print(f"data: {escape(pictures.description)}", highlight=False, soft_wrap=True)
    count = len(pictures.images)
    part = "the full epoch" if count == FULL_EPOCH else f"--samples {FULL_EPOCH} is the full epoch"
    console.print(
        f"device: {status.device} ({escape(status.name)}), {config.threads} threads; "
        f"{config.epochs} epochs of {count:,} pictures after one warm-up ({part})",
        highlight=False,
        soft_wrap=True,
    )
    with progress(disable=quiet) as bar:
        report = reporter(bar, total_steps(config), quiet=quiet)
        record = run(config, pictures, ["convbench", *sys.argv[1:]], report)

    path = write_record(record, runs)
    console.print(tables.results_table(record))
    if math == "tf32" and not any(row.math == "tf32" for row in record.rows):
        console.print("--math tf32 changed nothing here: only cuBLAS on a GPU has it.")
    console.print(f"results: {escape(str(path))}", highlight=False, soft_wrap=True)
    if any(row.finished for row in record.rows):
        from bench.views.charts import draw_charts  # matplotlib is slow to import, and only wanted now

        for chart in draw_charts(path, out / "charts"):
            console.print(f"chart: {escape(str(chart))}", highlight=False, soft_wrap=True)
    for row in record.rows:
        if row.reason:
            print(f"{row.id}: {row.reason}", file=sys.stderr)
    for warning in record.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if record.interrupted:
        raise typer.Exit(130)
    if any(row.reason for row in record.rows):
        raise typer.Exit(1)


@app.command("layers")
def layers_command(
    backend: Backends = None,
    device: DeviceOption = "auto",
    math: MathOption = "fp32",
    threads: Threads = None,
    batch_size: Annotated[int, typer.Option(help="Pictures a step.")] = 64,
    rounds: Annotated[int | None, typer.Option(help="Steps timed in turn; 8 on a CPU, 20 on a GPU.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the order and the photo crops.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for runs/ and charts/.")] = Path("results"),
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")] = False,
) -> None:
    """Take the training step apart: every operation's time against the machine's measured ceilings, and the memory."""
    from bench.measure import layers as layer_runner
    from bench.records.layers import summarise_layers, write_layers
    from bench.views import layer_tables

    check_number("batch size", batch_size, 1)
    check_number("rounds", rounds, 1)
    check_number("seed", seed, 0)
    infos, status, threads = choose(backend, device, math, threads, again=True)
    rounds = rounds or LAYER_ROUNDS[status.device]
    config = RunConfig(
        infos, status.device, math, rounds, batch_size, learning_rate=0.001, seed=seed, threads=threads,
        samples=batch_size,
    )  # fmt: skip
    images = photo_crops(layer_runner.BATCHES * batch_size, seed)
    runs = prepare_folder(out)

    console = wide_console(quiet=quiet)
    console.print(
        f"device: {status.device} ({escape(status.name)}), {threads} threads; {rounds} rounds of steps of {batch_size}",
        highlight=False,
        soft_wrap=True,
    )
    with progress(disable=quiet) as bar:
        report = reporter(bar, layer_runner.total_steps(config), quiet=quiet)
        try:
            record = layer_runner.measure_layers(config, images, ["convbench", *sys.argv[1:]], report)
        except WorkerError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    path = write_layers(record, runs)
    summaries = summarise_layers(record)
    for summary in summaries:
        console.print(layer_tables.layers_table(summary))
    for ceilings in (record["ceilings"], *record["other_ceilings"]):
        console.print(layer_tables.ceilings_line(ceilings), highlight=False, soft_wrap=True)
    console.print(layer_tables.layer_memory_table(record))
    console.print(f"results: {escape(str(path))}", highlight=False, soft_wrap=True)
    if summaries:
        from bench.views.layer_charts import draw_layer_charts

        for chart in draw_layer_charts(path, out / "charts"):
            console.print(f"chart: {escape(str(chart))}", highlight=False, soft_wrap=True)
    for row in record["rows"]:
        if row["reason"]:
            print(f"{row['id']}: {row['reason']}", file=sys.stderr)
    for warning in record["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if any(row["reason"] for row in record["rows"]):
        raise typer.Exit(1)


@app.command()
def check(
    backend: Backends = None, device: DeviceOption = "auto", math: MathOption = "fp32", threads: Threads = None
) -> None:
    """Verify versions against the float64 reference, without timing them."""
    infos, status, threads = choose(backend, device, math, threads)
    where, batch = status.device, CHECKED_BATCH
    config = RunConfig(
        infos, where, math, epochs=1, batch_size=batch, learning_rate=0.001, seed=0, threads=threads, samples=batch
    )
    console = Console()
    failed = False
    for info in infos:
        row = Row(info.name, info.label, where, info.layout, info.effective_math(where, math))
        worker = Worker(info, config, None)
        try:
            with console.status(f"verifying {info.name}"):
                answer = worker.ask("verify")
        except WorkerError as error:
            failed = True
            console.print(f"{info.label}: could not be verified: {escape(str(error))}", highlight=False)
            continue
        finally:
            worker.close()
        record_verification(row, answer)
        failed = failed or not row.verified
        if row.verified:
            largest = f"largest error {answer['worst']:.2f} of what is allowed"
            console.print(f"{info.label} on the {where}: {row.checks} checks passed, {largest}", highlight=False)
        else:
            console.print(f"{info.label} on the {where}: FAILED", style="bold red", highlight=False)
            for failure in answer["failures"]:
                console.print(f"  {escape(failure)}", highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command("kernels")
def kernels_command(
    backend: Backends = None,
    target: Annotated[
        str, typer.Option(help="sm_75, sm_80, sm_90 or sm_100: that one in full; or all.", metavar="TARGET")
    ] = "all",
    out: Annotated[Path | None, typer.Option(help="Folder for runs/: also write a file.")] = None,
) -> None:
    """Compile every GPU kernel without a GPU: registers, spills, occupancy and inner loop of each."""
    from bench.kernels import launches as kernels

    infos = find_backends(backend)
    targets = kernels.find_targets(target)
    kernels.check_compilers()
    runs = prepare_folder(out) if out else None
    uses = kernels.merged_uses(infos)
    faults = kernels.uncovered_kernels(infos)
    compiled = {}
    target_names = [kernels.target_name(target) for target in targets]
    if not sys.stderr.isatty():
        print(f"compiling {len(uses)} kernels for {', '.join(target_names)}", file=sys.stderr)
    places = {id(use): place for place, use in enumerate(uses)}
    with progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("compiling", total=len(uses) * len(targets))
        for use, answer in kernels.compile_uses(uses, targets):
            bar.update(task, description=f"compiling {escape(use.name)}", advance=1)
            version = " ".join(use.versions)
            if isinstance(answer, kernels.CompileError):
                faults.append(f"{version}: {answer}")
            else:
                compiled[places[id(use)], answer.target] = answer
                faults += [f"{version}: {fault}" for fault in kernels.faults(answer)]
    wide_console().print(tables.kernels_table(uses, compiled, target_names))
    if runs:
        from bench.records.kernels import kernels_record, write_kernels

        record = kernels_record(uses, compiled, target_names, faults, ["convbench", *sys.argv[1:]])
        print(f"results: {write_kernels(record, runs)}")
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(1)


@app.command("list")
def list_command() -> None:
    """Show the versions and whether each can run here."""
    statuses = [device_status(device) for device in DEVICES]
    Console().print(tables.versions_table(statuses))
    for status in statuses:
        print(f"{status.device}: {status.name if status.available else 'not here: ' + status.reason}")


@app.command()
def describe(
    backend: Annotated[str, typer.Option(help="The version whose memory is planned.", metavar="NAME")] = "v1",
    device: Annotated[str, typer.Option(help="cpu or gpu; the plan needs neither.", metavar="DEVICE")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Pictures a step.")] = 64,
    threads: Threads = None,
) -> None:
    """Print the network: shapes, parameters, FLOPs, receptive fields; a version's memory and, on a GPU, its kernels."""
    info = find(backend)
    if device not in DEVICES:
        raise UsageError(f"unknown device {device!r}: choose from {', '.join(DEVICES)}")
    check_number("batch size", batch_size, 1)
    architecture = autoencoder()
    console = Console()
    console.print(tables.stages_table(architecture))
    console.print(tables.receptive_field_table(architecture))
    console.print(f"  {tables.DOCUMENT_FIELDS}\n", highlight=False, soft_wrap=True)
    console.print(tables.memory_table(architecture, batch_size, info, device, check_threads(threads)))
    if device == "gpu":
        work = tables.work_table(architecture, batch_size, info)
        if work is None:
            print(f"{info.label} does not state the work of its kernels.")
        else:
            wide_console().print(work)


@app.command("readme")
def readme_command(
    file: Annotated[
        Path | None, typer.Argument(help="Results file; the one that the README names by default.", metavar="FILE")
    ] = None,
    readme: Annotated[Path, typer.Option(help="The README.")] = Path("README.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if it is stale.")] = False,
) -> None:
    """Write the README's chart and table of results, between its two markers, from a results file."""
    from bench.views.readme import named_file, replace, written

    present, wanted = written(readme, file or named_file(readme))
    if present == wanted:
        print(f"{readme} says what its results file does")
    elif check:
        print(f"{readme} is stale: convbench readme writes it anew", file=sys.stderr)
        raise typer.Exit(1)
    else:
        replace(readme, wanted)
        print(f"{readme} is written anew")


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(help="Results files.", metavar="FILE...")],
    out: Annotated[Path | None, typer.Option(help="Folder; by default charts/ beside the file's runs/.")] = None,
) -> None:
    """Draw the charts of results files again."""
    from bench.records import layers
    from bench.records.run import OLD_SCHEMA, SCHEMA, read_json, read_record
    from bench.views.charts import draw_charts
    from bench.views.layer_charts import draw_layer_charts

    of_layers = [read_json(path, SCHEMA, OLD_SCHEMA, layers.SCHEMA)["schema"] == layers.SCHEMA for path in files]
    for path, is_layers in zip(files, of_layers, strict=True):
        layers.read_layers(path) if is_layers else read_record(path)  # all of them before any is drawn
    for path, is_layers in zip(files, of_layers, strict=True):
        draw = draw_layer_charts if is_layers else draw_charts
        for chart in draw(path, out or path.resolve().parent.parent / "charts"):
            print(f"chart: {chart}")


@app.command("report")
def report_command(
    files: Annotated[list[Path], typer.Argument(help="Files of run, layers and kernels.", metavar="FILE...")],
    out: Annotated[Path, typer.Option(help="The page, .html; never written over another file.", metavar="PAGE.html")],
    force: Annotated[bool, typer.Option("--force", help="Write over an older page.")] = False,
) -> None:
    """Write one self-contained HTML page from results files."""
    from bench.views.page import write_report

    print(f"page: {write_report(files, out, force=force)}")


@app.command("compare")
def compare_command(
    old: Annotated[Path, typer.Argument(help="Of run, layers or pytest-benchmark.", metavar="OLD")],
    new: Annotated[Path, typer.Argument(help="Of the same kind.", metavar="NEW")],
    alpha: Annotated[float, typer.Option(help="Largest chance of one false alarm in the whole comparison.")] = 0.05,
    effect: Annotated[float, typer.Option(help="Least difference of medians that counts; 0.05 is 5 %.")] = 0.05,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", help="Compare although it differs: machine, gpu, threads, data, math.", metavar="WHAT"),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option("--fail-on", help="Exit with 1 if any row is: slower, unclear, missing.", metavar="VERDICT"),
    ] = None,
) -> None:
    """Say of each row in two files of measurements: SAME, FASTER, SLOWER or UNCLEAR.

    By a Mann-Whitney U test with Holm's correction for the number of rows, a least effect, and a bootstrap interval.
    """
    from bench.records import compare

    fail_on = fail_on or []
    found = compare.compare_files(old, new, alpha=alpha, effect=effect, allow=allow or [], fail_on=fail_on)
    console = wide_console()
    console.print(compare.comparison_table(found))
    for line in compare.comparison_lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    failed = {what: rows for what in dict.fromkeys(fail_on) if (rows := found.failing(what))}
    for what, rows in failed.items():
        print(f"{what}: {', '.join(rows)}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Try everything that the suite needs, for real, and say what to install."""
    console = Console()
    ok = True
    for what, action in (("Numba on the CPU", _try_numba), ("BLAS for V4", _try_blas), ("pictures", _try_pictures)):
        try:
            detail = action()
        except Exception as error:  # whatever is wrong with an installation is the answer
            ok = False
            console.print(f"[bold red]no[/]   {what}: {escape(str(error))}", highlight=False, soft_wrap=True)
        else:
            console.print(f"[green]yes[/]  {what}: {escape(detail)}", highlight=False, soft_wrap=True)
    for probe in probe_gpu():
        mark = "[green]yes[/]" if probe.ok else "[yellow]no[/] "
        console.print(f"{mark}  GPU, {probe.what}: {escape(probe.detail)}", highlight=False, soft_wrap=True)
    if not ok:
        print("the CPU versions cannot run: python -m pip install -e . installs what they need", file=sys.stderr)
        raise typer.Exit(1)


@data_app.command("download")
def download(data_dir: DataDir = Path("data")) -> None:
    """Fetch CIFAR-10's binary version (163 MB), checked by its MD5."""
    there = find_cifar10(data_dir)
    folder = download_cifar10(data_dir)
    print(f"CIFAR-10 is {'already ' if there else ''}in {folder}")


def _try_numba() -> str:
    import numba

    double = numba.njit(parallel=True)(lambda x: x + x)
    if double(np.ones(8, np.float32)).sum() != 16:
        raise RuntimeError("a parallel function gave a wrong sum")
    return f"Numba {numba.__version__}, {numba.threading_layer()} threads, {usable_cores()} cores"


def _try_blas() -> str:
    from numba.extending import get_cython_function_address

    get_cython_function_address("scipy.linalg.cython_blas", "sgemm")
    import scipy
    from threadpoolctl import threadpool_info

    libraries = sorted(
        {f"{info['internal_api']} {info['version']}" for info in threadpool_info() if info["user_api"] == "blas"}
    )
    return f"SciPy {scipy.__version__} with {', '.join(libraries) or 'an unknown BLAS'}"


def _try_pictures() -> str:
    from common.dataset import photo_crops

    return f"photo crops {photo_crops(2, 0).shape[1:]}"


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
