"""Charts of a results file: epoch time with its spread, and speedup over the baseline; PNG and SVG.

Only rows that were verified and finished are drawn. Colours are Okabe and Ito's, told apart by colour-blind eyes, and
each version has a hatch of its own for print in black and white; bars are labelled by name, idea and figure.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.machine.environment import machine_label
from bench.measure.peers import PEERS
from bench.records.run import Row, RunRecord, Summary, read_record, summarise
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
    charts = {"epoch-time": epoch_time_figure}
    if any(not summary.is_baseline and summary.speedup is not None for summary in summaries):
        charts["speedup"] = speedup_figure
    return save_charts(folder, results.stem, {name: draw(record, summaries) for name, draw in charts.items()})


def save_charts(folder: Path, stem: str, charts: dict[str, Figure]) -> list[Path]:
    """Save each chart as ``stem_name``, PNG and SVG, and close it; UsageError if the folder cannot be written."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in charts.items():
            with plt.rc_context(STYLE):
                for kind in ("png", "svg"):
                    path = folder / f"{stem}_{name}.{kind}"
                    figure.savefig(path, dpi=160, metadata={"Date": None} if kind == "svg" else None)
                    written.append(path)
            plt.close(figure)
    except OSError as error:
        raise UsageError(f"cannot write charts to {folder}: {error.strerror or error}") from error
    return written


def epoch_time_figure(record: RunRecord, summaries: list[Summary]) -> Figure:
    """Median bars, every sample as a dot, the range as a line."""
    with plt.rc_context(STYLE):
        figure, axes = _canvas(len(summaries))
        longest = max(max(summary.row.epoch_s) for summary in summaries)
        for i, summary in enumerate(summaries):
            samples = summary.row.epoch_s
            _bar(axes, i, summary, summary.median_s)
            axes.hlines(i, min(samples), max(samples), color="black", linewidth=1.4)
            axes.plot(samples, [i] * len(samples), "o", markersize=4, color="black", markerfacecolor="white")
            noisy = f", noisy: spread {100 * summary.spread:.0f} %" if summary.noisy else ""
            text = f"{_seconds(summary.median_s)}{noisy}"
            axes.annotate(text, (max(samples), i), (8, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 1.35 * longest)
        pictures = record.config["samples"]
        axes.set_xlabel(
            f"seconds for one epoch of {pictures:,} pictures, less is better\nbar: median; dots: every epoch"
        )
        _finish(axes, record, summaries, "Epoch time")
    return figure


def speedup_figure(record: RunRecord, summaries: list[Summary]) -> Figure:
    """Ratio of medians, with its interval where there are epochs enough for one."""
    summaries = [summary for summary in summaries if summary.speedup is not None]
    (base,) = (summary for summary in summaries if summary.is_baseline)
    with plt.rc_context(STYLE):
        figure, axes = _canvas(len(summaries))
        for i, summary in enumerate(summaries):
            _bar(axes, i, summary, summary.speedup)
            if summary.interval is not None and not summary.is_baseline:
                axes.hlines(i, *summary.interval, color="black", linewidth=1.4)
                axes.plot(summary.interval, [i, i], "|", color="black", markersize=9)
            noisy = ", noisy" if summary.noisy or summary.baseline_noisy else ""
            text = "1 (baseline)" if summary.is_baseline else f"{summary.speedup:.3g}x{noisy}"
            axes.annotate(text, (_reach(summary), i), (8, 0), textcoords="offset points", va="center")
        axes.axvline(1, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_xlim(0, 1.22 * max(map(_reach, summaries)))
        with_intervals = any(summary.interval is not None and not summary.is_baseline for summary in summaries)
        line = "line: 95 % interval" if with_intervals else "too few epochs for an interval"
        axes.set_xlabel(f"speedup over {base.row.id}, more is better\nbar: ratio of medians; {line}")
        _finish(axes, record, summaries, f"Speedup over {base.row.label}")
    return figure


def _reach(summary: Summary) -> float:
    """How far to the right a speedup's bar and interval go."""
    return max(summary.speedup, summary.interval[1] if summary.interval else 0)


def _canvas(bars: int) -> tuple[Figure, plt.Axes]:
    return plt.subplots(figsize=(8, 2.0 + 0.62 * bars), layout="constrained")


def _bar(axes: plt.Axes, position: int, summary: Summary, length: float) -> None:
    # Each keeps its colour in every chart.
    known = [*names(), *(peer.name for peers in PEERS.values() for peer in peers)]
    order = known.index(summary.row.backend) if summary.row.backend in known else position
    colour, hatch = COLOURS[order % len(COLOURS)], HATCHES[order % len(HATCHES)]
    axes.barh(position, length, height=0.6, color=colour, hatch=hatch, edgecolor="white", linewidth=0)


def row_label(row: Row) -> str:
    """A row of a run as charts name it."""
    return full_label(row.label, row.id, row.math)


def full_label(label: str, row_id: str, math: str) -> str:
    """A row's label, with what tells a second row of a backend, and TF32, apart."""
    again = f", row {row_id.partition('#')[2]}" if "#" in row_id else ""
    return f"{label}{again}{', TF32' if math == 'tf32' else ''}"


def _finish(axes: plt.Axes, record: RunRecord, summaries: list[Summary], title: str) -> None:
    labels = [row_label(summary.row) for summary in summaries]
    axes.set_yticks(range(len(summaries)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    environment = record.environment
    batch = f"batch {record.config['batch_size']}"
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    axes.text(
        0,
        1.03,
        f"{machine_label(environment)}; {batch}; commit {environment['commit']}",
        transform=axes.transAxes,
        fontsize=9,
    )


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
