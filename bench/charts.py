"""Charts of a results file: epoch time with its spread, and speedup over the baseline; PNG and SVG.

Only rows that were verified and finished are drawn. Colours are Okabe and Ito's, told apart by colour-blind eyes, and
each version has a hatch of its own for print in black and white; bars are labelled by name, idea and figure.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.records import RunRecord, Summary, read_record, summarise
from common.errors import UsageError
from versions.registry import BASELINE, names

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")  # Okabe and Ito, 2008
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "svg.hashsalt": "convbench",
    "svg.fonttype": "none",
    "hatch.linewidth": 0.6,
    "text.parse_math": False,
}


def draw_charts(results: Path, folder: Path) -> list[Path]:
    """Draw both charts of a results file into ``folder``; returns the files.

    UsageError if the file is not a results file, if no row of it can be drawn, or if the folder cannot be written.
    """
    record = read_record(results)
    summaries = summarise(record.rows, BASELINE)
    if not summaries:
        reasons = "; ".join(f"{row.backend}: {row.reason or 'no epochs'}" for row in record.rows) or "it has no rows"
        raise UsageError(f"nothing to draw in {results}: {reasons}")
    charts = {"epoch-time": _draw_epoch_times}
    if any(summary.speedup is not None for summary in summaries):
        charts["speedup"] = _draw_speedups
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in charts.items():
            with plt.rc_context(STYLE):
                figure, axes = plt.subplots(figsize=(8, 2.0 + 0.62 * len(summaries)), layout="constrained")
                draw(axes, record, summaries)
                for kind in ("png", "svg"):
                    path = folder / f"{results.stem}_{name}.{kind}"
                    figure.savefig(path, dpi=160, metadata={"Date": None} if kind == "svg" else None)
                    written.append(path)
                plt.close(figure)
    except OSError as error:
        raise UsageError(f"cannot write charts to {folder}: {error.strerror or error}") from error
    return written


def _draw_epoch_times(axes: plt.Axes, record: RunRecord, summaries: list[Summary]) -> None:
    """Median bars, every sample as a dot, the range as a line."""
    longest = max(max(summary.row.epoch_s) for summary in summaries)
    for i, summary in enumerate(summaries):
        samples = summary.row.epoch_s
        _bar(axes, i, summary, summary.median_s)
        axes.hlines(i, min(samples), max(samples), color="black", linewidth=1.4)
        axes.plot(samples, [i] * len(samples), "o", markersize=4, color="black", markerfacecolor="white")
        noisy = f", noisy: spread {100 * summary.spread:.0f} %" if summary.noisy else ""
        axes.annotate(
            f"{_seconds(summary.median_s)}{noisy}", (max(samples), i), (8, 0), textcoords="offset points", va="center"
        )
    axes.set_xlim(0, 1.35 * longest)
    pictures = record.config["samples"]
    axes.set_xlabel(f"seconds for one epoch of {pictures:,} pictures, less is better\nbar: median; dots: every epoch")
    _finish(axes, record, summaries, "Epoch time")


def _draw_speedups(axes: plt.Axes, record: RunRecord, summaries: list[Summary]) -> None:
    """Ratio of medians, with the range of the ratios epoch by epoch."""
    summaries = [summary for summary in summaries if summary.speedup is not None]
    for i, summary in enumerate(summaries):
        _bar(axes, i, summary, summary.speedup)
        baseline = summary.row.backend == BASELINE
        if not baseline:
            axes.hlines(i, summary.speedup_low, summary.speedup_high, color="black", linewidth=1.4)
            axes.plot([summary.speedup_low, summary.speedup_high], [i, i], "|", color="black", markersize=9)
        noisy = ", noisy" if summary.noisy or summary.baseline_noisy else ""
        text = "1 (baseline)" if baseline else f"{summary.speedup:.3g}x{noisy}"
        axes.annotate(text, (summary.speedup_high, i), (8, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1.22 * max(summary.speedup_high for summary in summaries))
    axes.set_xlabel(f"speedup over {BASELINE}, more is better\nbar: ratio of medians; line: range over the epochs")
    _finish(axes, record, summaries, f"Speedup over {summaries[0].row.label}")


def _bar(axes: plt.Axes, position: int, summary: Summary, length: float) -> None:
    order = names().index(summary.row.backend) if summary.row.backend in names() else position
    colour, hatch = COLOURS[order % len(COLOURS)], HATCHES[order % len(HATCHES)]
    axes.barh(position, length, height=0.6, color=colour, hatch=hatch, edgecolor="white", linewidth=0)


def _finish(axes: plt.Axes, record: RunRecord, summaries: list[Summary], title: str) -> None:
    labels = [f"{s.row.label}{', TF32' if s.row.math == 'tf32' else ''}" for s in summaries]
    axes.set_yticks(range(len(summaries)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    environment = record.environment
    gpu = environment.get("gpu")
    machine = gpu["name"] if gpu else f"{environment['cpu']}, {environment['threads']} threads"
    batch = f"batch {record.config['batch_size']}"
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    axes.text(0, 1.03, f"{machine}; {batch}; commit {environment['commit']}", transform=axes.transAxes, fontsize=9)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
