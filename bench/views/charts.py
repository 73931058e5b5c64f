"""Charts of a run: epoch time, speedup over the baseline and loss; and what all charts share.

Only rows that were verified and finished are drawn. The colours are those of Okabe and Ito, which colour-blind readers
can tell apart. A figure takes ink and paper from matplotlib's settings, so ``drawn`` can make it light or dark.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from bench.records.rows import Measurement, VersionRow
from bench.records.run import RunRecord, RunRow, Summary, read_run, summarise
from bench.views.words import label_of, network_of, percent, ratio, seconds, why_no_time
from common.errors import UsageError
from versions.registry import BASELINE, names

# Okabe and Ito, 2008, with a grey that is seen on dark paper too instead of their black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8A8A8A")
MARKERS = "osD^v<>PXph*"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "convbench",
    "svg.fonttype": "none",
    "hatch.linewidth": 0.6,
    "text.parse_math": False,
}
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
PAPERED = ("figure.facecolor", "axes.facecolor")
WITHOUT_DATE = {"png": {"Software": None}, "svg": {"Date": None}}  # the same figure is the same file, byte by byte

Charts = dict[str, Callable[[], Figure]]
"""Functions that draw figures, by the chart's name."""


def drawn(draw: Callable[[], Figure], kind: str, ink: str = "black", paper: str = "white") -> bytes:
    """The figure that ``draw`` makes, in these colours, as the content of a ``png`` or ``svg`` file."""
    colours = dict.fromkeys(INKED, ink) | dict.fromkeys(PAPERED, paper)
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE | colours), warnings.catch_warnings():
        # The font lacks a glyph, or a chart with a single bar has too little to lay out.
        warnings.simplefilter("ignore", UserWarning)
        draw().savefig(file, format=kind, dpi=160, bbox_inches="tight", metadata=WITHOUT_DATE[kind])
    return file.getvalue()


def save_charts(results: Path, rows: Iterable[VersionRow], folder: Path, charts: Charts) -> list[Path]:
    """Write charts into ``folder``, each as PNG and SVG. UsageError if there are none, with the reason of each row."""
    if not charts:
        reasons = "; ".join(f"{row.id}: {why_no_time(row)}" for row in rows)
        raise UsageError(f"nothing to draw in {results}: {reasons}")
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in charts.items():
            for kind in WITHOUT_DATE:
                path = folder / f"{results.stem}_{name}.{kind}"
                path.write_bytes(drawn(draw, kind))
                written.append(path)
    except OSError as error:
        raise UsageError(f"cannot write charts to {folder}: {error.strerror or error}") from error
    return written


# What figures share ---------------------------------------------------------------------------------------------------


def shade(share: float) -> str:
    """A colour between the ink (0) and the paper (1) of the figure."""
    ink, paper = (to_rgb(matplotlib.rcParams[name]) for name in ("text.color", "figure.facecolor"))
    return to_hex([dark + share * (light - dark) for dark, light in zip(ink, paper, strict=True)])


def colours_of(rows: Sequence[VersionRow]) -> dict[str, str]:
    """The colour of each row, by id: a version's own, and those after them for all other rows in order."""
    order = [*names(), *(row.id for row in rows if row.id not in names())]
    return {row.id: COLOURS[order.index(row.id) % len(COLOURS)] for row in rows}


def name_bars(axes: Axes, rows: Sequence[VersionRow]) -> None:
    """Put names beside horizontal bars, the first on top, and a grid behind them."""
    axes.set_yticks(range(len(rows)), [label_of(row) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.spines.left.set_visible(False)
    axes.grid(axis="x", color=shade(0.9))


def write_beside(axes: Axes, place: int, end: float, text: str) -> None:
    """Write a bar's figure beside its end."""
    axes.annotate(text, (end, place), (8, 0), textcoords="offset points", va="center")


def entitle(axes: Axes, title: str, *facts: str) -> None:
    """Give a chart its title, and below it in small print what it was measured with."""
    axes.set_title(title, loc="left", fontweight="bold", pad=22)
    axes.annotate("; ".join(filter(None, facts)), (0, 1), (0, 7), "axes fraction", "offset points", fontsize=9)


def origin(record: Measurement) -> list[str]:
    """Machine, batch size and commit, as every chart names them."""
    return [record.environment.machine, f"batch {record.config.batch_size}", f"commit {record.environment.commit}"]


# Charts of a run ------------------------------------------------------------------------------------------------------


def run_charts(record: RunRecord) -> Charts:
    """Speedup, if there is something to compare, and epoch time; none without a finished row."""
    summaries = summarise(record.rows, BASELINE)
    compared = any(summary.speedup is not None and not summary.is_baseline for summary in summaries)
    charts = {"speedup": speedup_figure} if compared else {}
    charts |= {"epoch-time": epoch_time_figure} if summaries else {}
    return {name: partial(draw, record, summaries) for name, draw in charts.items()}


def draw_charts(results: Path, folder: Path) -> list[Path]:
    """Draw the charts of a run's results file into ``folder``; returns the files."""
    record = read_run(results)
    return save_charts(results, record.rows, folder, run_charts(record))


def epoch_time_figure(record: RunRecord, summaries: list[Summary]) -> Figure:
    """The median as a bar, every epoch as a dot, the range as a line."""
    bars = []
    for summary in summaries:
        noisy = f", noisy: spread {percent(summary.spread)}" if summary.noisy else ""
        bars.append((summary.row, summary.median_s, summary.row.epoch_s, seconds(summary.median_s) + noisy))
    words = f"seconds for one epoch of {record.config.samples:,} pictures, less is better"
    return _bar_chart(record, "Epoch time", f"{words}\nbar: median; dots: every epoch", bars, "o-")


def speedup_figure(record: RunRecord, summaries: list[Summary]) -> Figure:
    """The ratio of medians, with its interval where there are enough epochs for one."""
    bars, line = [], "too few epochs for an interval"
    for summary in summaries:
        if summary.is_baseline:
            base = summary.row
            bars.append((base, 1.0, (), "1 (baseline)"))
        elif summary.speedup is not None:
            noisy = ", noisy" if summary.noisy or summary.baseline_noisy else ""
            text = f"{ratio(summary.speedup)}x{noisy}"
            bars.append((summary.row, summary.speedup, summary.interval or (), text))
            line = "line: 95 % interval" if summary.interval else line
    words = f"speedup over {base.id}, more is better\nbar: ratio of medians; {line}"
    figure = _bar_chart(record, f"Speedup over {base.label}", words, bars, "|-")
    figure.axes[0].axvline(1, color=shade(0.4), linewidth=0.8, linestyle="--")
    return figure


def _bar_chart(
    record: RunRecord, title: str, words: str, bars: list[tuple[RunRow, float, Sequence[float], str]], marker: str
) -> Figure:
    """A bar for each row with its length, the samples that are marked over it, and its figure in words."""
    figure = Figure(figsize=(8, 2.0 + 0.62 * len(bars)), layout="constrained")
    axes = figure.subplots()
    colours = colours_of(record.rows)
    for i, (row, length, samples, text) in enumerate(bars):
        axes.barh(i, length, height=0.6, color=colours[row.id])
        axes.plot(samples, [i] * len(samples), marker, color=shade(0), markerfacecolor=shade(1), markersize=5)
        write_beside(axes, i, max([length, *samples]), text)
    axes.set_xlim(0, 1.22 * axes.dataLim.xmax)  # room for the figures
    axes.set_xlabel(words)
    name_bars(axes, [row for row, *_ in bars])
    entitle(axes, title, *origin(record), network_of(record.config.width))
    return figure


def loss_figure(record: RunRecord, rows: Sequence[RunRow]) -> Figure:
    """Loss over epochs; curves that coincide are told apart by width and marker."""
    figure = Figure(figsize=(8, 3.9), layout="constrained")
    axes = figure.subplots()
    colours = colours_of(record.rows)
    for i, row in enumerate(rows):
        above = len(rows) - 1 - i
        axes.plot(
            row.loss,
            color=colours[row.id],
            linewidth=1.6 + 1.7 * above,
            marker=MARKERS[i % len(MARKERS)],
            markersize=5.5 + 3.2 * above,
            fillstyle="none",
            label=label_of(row),
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch; 0 is the warm-up", ylabel="mean squared error")
    axes.grid(axis="y", color=shade(0.9))
    axes.legend(frameon=False, fontsize=9.5, handlelength=3.6, labelspacing=0.9)
    return figure
