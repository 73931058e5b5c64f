"""The loss curve of a training run, from the figures in its checkpoint."""

from __future__ import annotations

import io

from matplotlib.ticker import LogLocator, MaxNLocator

from bench.records.training import EpochFigures
from bench.views.charts import COLOURS, STYLE, plt


def training_png(history: list[EpochFigures], samples: int, batch_size: int) -> bytes:
    """Draw the training loss within and over epochs, and the held-out error after each; PNG."""
    with plt.rc_context(STYLE | {"axes.spines.left": True}):
        figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
        within = [
            (row.epoch - 1 + (i + 0.5) / len(row.curve), loss) for row in history for i, loss in enumerate(row.curve)
        ]
        epochs = [row.epoch for row in history]
        axes.plot(
            *zip(*within, strict=True), color=COLOURS[0], alpha=0.35, linewidth=1, label="training, within epochs"
        )
        marker = "o" if len(epochs) < 50 else ""
        # The mean over an epoch belongs to its middle.
        middles = [epoch - 0.5 for epoch in epochs]
        trained = [row.train_mse for row in history]
        axes.plot(
            middles, trained, color=COLOURS[0], marker=marker, markersize=4, label="training, mean over the epoch"
        )
        held_out = [(row.epoch, row.held_out_mse) for row in history if row.held_out_mse is not None]
        if held_out:
            label = "held out, after the epoch"
            axes.plot(
                *zip(*held_out, strict=True), color=COLOURS[5], marker=marker and "s", markersize=4, linestyle="--",
                label=label,
            )  # fmt: skip
        axes.set_yscale("log")
        # Plain numbers: the default, powers of ten in mathematical type, is not parsed in this style.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(0, max(epochs))
        axes.set_xlabel("epochs")
        axes.set_ylabel("mean squared error")
        axes.grid(axis="y", which="both", color="0.92")
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        axes.set_title("Training\n", loc="left", fontweight="bold")
        places = ", then ".join(dict.fromkeys(f"{row.backend} on the {row.device}" for row in history))
        rates = ", then ".join(dict.fromkeys(f"{row.learning_rate:g}" for row in history))
        words = f"{places}; {samples:,} pictures an epoch, batch {batch_size}, learning rate {rates}"
        axes.text(0, 1.03, words, transform=axes.transAxes, fontsize=9)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
        plt.close(figure)
    return file.getvalue()
