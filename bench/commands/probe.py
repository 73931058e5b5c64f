"""``convbench probe``: how well a linear classifier reads the latents of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bench.commands.console import say, show, wide_console
from bench.commands.networks import NetworkOptions
from bench.commands.options import check_choice
from bench.training.data import load_labelled
from bench.training.features import FEATURES, probe_checkpoints
from bench.views.table import Group, Table, columns, row
from bench.views.words import fine_percent
from common.architecture import autoencoder


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(NetworkOptions):
    """The options of ``convbench probe``."""

    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints.", metavar="CHECKPOINT...")]
    data: Annotated[str, typer.Option("--data", help="auto, cifar10 or photos.", metavar="SOURCE")] = "auto"
    seed: Annotated[int, typer.Option("--seed", help="Of the untrained network and the photo crops.")] = 0
    samples: Annotated[int, typer.Option(help="Pictures that the classifier is trained on.")] = 5000
    test_samples: Annotated[int, typer.Option(help="Pictures that it is tested on.")] = 2000
    features: Annotated[str, typer.Option(help="pooled, the mean of each channel, or whole latents.")] = "pooled"


def probe_command(options: ProbeOptions) -> None:
    """Fit a linear classifier on the latents of each checkpoint, on an untrained network's, and on raw pixels."""
    check_choice("features", options.features, FEATURES)
    settings = options.settings()
    counts = {"train": options.samples, "test": options.test_samples}
    train, test = (
        load_labelled(options.data, options.data_dir, split, count, options.seed) for split, count in counts.items()
    )
    rows = []
    for result in probe_checkpoints(
        options.checkpoints, autoencoder(), settings, train, test, features=options.features, seed=options.seed
    ):
        low, high = (100 * bound for bound in result.interval)
        name = result.features if result.converged else f"{result.features} (not converged)"
        rows.append(row(name, f"{result.dimensions:,}", fine_percent(result.accuracy), f"{low:.1f} to {high:.1f}"))
    most_frequent = fine_percent(float(np.bincount(test[1]).max() / len(test[1])))
    note = f"interval: Wilson's, 95 %; always the most frequent class: {most_frequent}"
    console = wide_console()
    sizes = f"trained on {options.samples:,} pictures, tested on {options.test_samples:,}"
    say(console, f"linear classifier, {options.features} latents: {sizes}")
    show(Table("", columns("features", ("values", "accuracy", "95 % interval")), [Group(rows)], [note]), console)
