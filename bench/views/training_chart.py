"""The loss curve of a training run, from the figures in its checkpoint."""

from __future__ import annotations

from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from bench.records.training import EpochFigures
from bench.views.charts import COLOURS, drawn, entitle, shade


def training_png(history: list[EpochFigures], samples: int, batch_size: int) -> bytes:
    """Draw the training loss within and over epochs, and the held-out error after each; PNG."""
    return drawn(partial(_figure, history, samples, batch_size), "png")


def _figure(history: list[EpochFigures], samples: int, batch_size: int) -> Figure:
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    within = [(row.epoch - 1 + (i + 0.5) / len(row.curve), loss) for row in history for i, loss in enumerate(row.curve)]
    axes.plot(*zip(*within, strict=True), color=COLOURS[0], alpha=0.35, linewidth=1, label="training, within epochs")
    marker = "o" if len(history) < 50 else ""
    # The mean over an epoch belongs to its middle.
    means = [(row.epoch - 0.5, row.train_mse) for row in history]
    label = "training, mean over the epoch"
    axes.plot(*zip(*means, strict=True), color=COLOURS[0], marker=marker, markersize=4, label=label)
    held_out = [(row.epoch, row.held_out_mse) for row in history if row.held_out_mse is not None]
    if held_out:
        style = {"color": COLOURS[5], "marker": marker and "s", "markersize": 4, "linestyle": "--"}
        axes.plot(*zip(*held_out, strict=True), label="held out, after the epoch", **style)
    axes.set_yscale("log")
    # Plain numbers: the default, powers of ten in mathematical type, is not parsed in this style.
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, history[-1].epoch)
    axes.set(xlabel="epochs", ylabel="mean squared error")
    axes.grid(axis="y", which="both", color=shade(0.92))
    axes.legend(frameon=False)
    places = ", then ".join(dict.fromkeys(f"{row.backend} on the {row.device}" for row in history))
    rates = ", then ".join(dict.fromkeys(f"{row.learning_rate:g}" for row in history))
    entitle(axes, "Training", places, f"{samples:,} pictures an epoch, batch {batch_size}, learning rate {rates}")
    return figure
