"""The command line: ``convbench``, or ``python -m bench``. It puts the commands together; each has a file of its own.

Exit codes: 2 for bad input, before anything is written; 1 where a version failed or work could not be finished; 130
after Ctrl-C.
"""

from __future__ import annotations

from typing import Annotated

import typer

from bench import __version__
from bench.commands import (
    check,
    compare,
    data,
    describe,
    doctor,
    encode,
    kernels,
    layers,
    plot,
    probe,
    readme,
    reconstruct,
    report,
    run,
    train,
    versions,
)
from bench.commands.console import run_app
from bench.commands.options import VersionOptions, options_of

MEASURE, INSPECT, TRAIN, RESULTS = "Measure", "Inspect", "Train", "Results"

app = typer.Typer(
    help="Train one convolutional autoencoder with interchangeable backends: verify each, time its epochs, chart them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Get the CIFAR-10 pictures.", no_args_is_help=True)


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        print(f"convbench {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train one convolutional autoencoder with interchangeable backends: verify each, time its epochs, chart them."""


# In the order in which a newcomer wants them.
app.command("run", rich_help_panel=MEASURE)(options_of(run.run_command, run.RunOptions))
app.command("layers", rich_help_panel=MEASURE)(options_of(layers.layers_command, layers.LayersOptions))
app.command("check", rich_help_panel=MEASURE)(options_of(check.check_command, VersionOptions))

app.command("list", rich_help_panel=INSPECT)(versions.list_command)
app.command("doctor", rich_help_panel=INSPECT)(doctor.doctor_command)
app.command("describe", rich_help_panel=INSPECT)(options_of(describe.describe_command, describe.DescribeOptions))
app.command("kernels", rich_help_panel=INSPECT)(options_of(kernels.kernels_command, kernels.KernelsOptions))

app.command("train", rich_help_panel=TRAIN)(options_of(train.train_command, train.TrainOptions))
app.command("encode", rich_help_panel=TRAIN)(options_of(encode.encode_command, encode.EncodeOptions))
app.command("reconstruct", rich_help_panel=TRAIN)(
    options_of(reconstruct.reconstruct_command, reconstruct.ReconstructOptions)
)
app.command("probe", rich_help_panel=TRAIN)(options_of(probe.probe_command, probe.ProbeOptions))
app.add_typer(data_app, name="data", rich_help_panel=TRAIN)
data_app.command("download")(data.download_command)

app.command("compare", rich_help_panel=RESULTS)(options_of(compare.compare_command, compare.CompareOptions))
app.command("plot", rich_help_panel=RESULTS)(plot.plot_command)
app.command("report", rich_help_panel=RESULTS)(report.report_command)
app.command("readme", rich_help_panel=RESULTS)(readme.readme_command)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
