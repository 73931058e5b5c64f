"""Charts of a run: epoch time with its spread, speedup over the baseline, and loss; PNG and SVG.

Only rows that were verified and finished are drawn. The colours are those of Okabe and Ito, which colour-blind readers
can tell apart; each version also has its own hatch, for print in black and white. Ink and paper are matplotlib's
``text.color`` and ``figure.facecolor``, so the page draws the same chart in light and in dark colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from bench.machine.environment import Environment
from bench.records.rows import VersionRow
from bench.records.run import RunRecord, RunRow, Summary, read_run, summarise
from bench.views.words import label_of, percent, ratio, seconds, shortened, why_no_time
from common.errors import UsageError
from versions.registry import BASELINE, names

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")  # Okabe and Ito, 2008
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
MARKERS = "osD^v<>PXph*"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
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
GRID = 0.9


def shade(share: float) -> str:
    """A colour between the ink (0) and the paper (1) of the figure."""
    ink, paper = (to_rgb(plt.rcParams[name]) for name in ("text.color", "figure.facecolor"))
    return to_hex([dark + share * (light - dark) for dark, light in zip(ink, paper, strict=True)])


def places(rows: Iterable[VersionRow]) -> dict[str, int]:
    """The place of each row's colour, by id: a version's own, and those after them for all other rows in order."""
    known, found, others = names(), {}, len(names())
    for row in rows:
        if row.backend in known and row.id == row.backend:
            found[row.id] = known.index(row.backend)
        else:
            found[row.id] = others
            others += 1
    return found


def draw_charts(results: Path, folder: Path) -> list[Path]:
    """Draw both charts of a results file into ``folder``; returns the files.

    UsageError if the file is not a results file, if it has no row to draw, or if the folder cannot be written.
    """
    record = read_run(results)
    summaries = summarise(record.rows, BASELINE)
    if not summaries:
        reasons = "; ".join(f"{row.id}: {why_no_time(row)}" for row in record.rows)
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
    """The median as a bar, every sample as a dot, the range as a line."""
    with plt.rc_context(STYLE):
        figure, axes = _canvas(len(summaries))
        longest = max(max(summary.row.epoch_s) for summary in summaries)
        order = places(record.rows)
        for i, summary in enumerate(summaries):
            samples = summary.row.epoch_s
            _bar(axes, i, summary.median_s, order[summary.row.id])
            axes.hlines(i, min(samples), max(samples), color=shade(0), linewidth=1.4)
            axes.plot(samples, [i] * len(samples), "o", markersize=4, color=shade(0), markerfacecolor=shade(1))
            noisy = f", noisy: spread {percent(summary.spread)}" if summary.noisy else ""
            text = f"{seconds(summary.median_s)}{noisy}"
            axes.annotate(text, (max(samples), i), (8, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 1.35 * longest)
        axes.set_xlabel(
            f"seconds for one epoch of {record.config.samples:,} pictures, less is better\n"
            "bar: median; dots: every epoch"
        )
        _finish(axes, record, summaries, "Epoch time")
    return figure


def speedup_figure(record: RunRecord, summaries: list[Summary]) -> Figure:
    """The ratio of medians, with its interval where there are enough epochs for one."""
    summaries = [summary for summary in summaries if summary.speedup is not None]
    (base,) = (summary for summary in summaries if summary.is_baseline)
    with plt.rc_context(STYLE):
        figure, axes = _canvas(len(summaries))
        order = places(record.rows)
        for i, summary in enumerate(summaries):
            _bar(axes, i, summary.speedup, order[summary.row.id])
            if summary.interval is not None and not summary.is_baseline:
                axes.hlines(i, *summary.interval, color=shade(0), linewidth=1.4)
                axes.plot(summary.interval, [i, i], "|", color=shade(0), markersize=9)
            noisy = ", noisy" if summary.noisy or summary.baseline_noisy else ""
            text = "1 (baseline)" if summary.is_baseline else f"{ratio(summary.speedup)}x{noisy}"
            axes.annotate(text, (_reach(summary), i), (8, 0), textcoords="offset points", va="center")
        axes.axvline(1, color=shade(0.4), linewidth=0.8, linestyle="--")
        axes.set_xlim(0, 1.22 * max(map(_reach, summaries)))
        with_intervals = any(summary.interval is not None and not summary.is_baseline for summary in summaries)
        line = "line: 95 % interval" if with_intervals else "too few epochs for an interval"
        axes.set_xlabel(f"speedup over {base.row.id}, more is better\nbar: ratio of medians; {line}")
        _finish(axes, record, summaries, f"Speedup over {base.row.label}")
    return figure


def loss_figure(record: RunRecord, rows: Sequence[RunRow]) -> Figure:
    """Loss over epochs; curves that coincide are told apart by width, dash and marker."""
    with plt.rc_context(STYLE | {"axes.spines.left": True}):
        figure, axes = plt.subplots(figsize=(8, 3.9), layout="constrained")
        order, last = places(record.rows), len(rows) - 1
        for i, row in enumerate(rows):
            colour = COLOURS[order[row.id] % len(COLOURS)]
            axes.plot(
                range(len(row.loss)),
                row.loss,
                color=colour,
                linestyle=DASHES[i % len(DASHES)],
                linewidth=1.6 + 1.7 * (last - i),
                marker=MARKERS[i % len(MARKERS)],
                markersize=5.5 + 3.2 * (last - i),
                markerfacecolor="none" if i < last else colour,
                markeredgewidth=1.4,
                label=shortened(label_of(row)),
            )
        most = max(len(row.loss) for row in rows)
        ticks = range(0, most, -(-most // 12))
        axes.set_xticks(ticks, ["warm-up" if tick == 0 else str(tick) for tick in ticks])
        axes.set_xlabel("epoch")
        axes.set_ylabel("mean squared error")
        axes.grid(axis="y", color=shade(GRID))
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9.5, handlelength=3.6, labelspacing=0.9)
    return figure


def subtitle(environment: Environment, batch_size: int, note: str = "") -> str:
    """Machine, batch size and commit, as every chart names them."""
    return "; ".join(filter(None, (environment.machine, f"batch {batch_size}", f"commit {environment.commit}", note)))


def name_bars(axes: plt.Axes, labels: Sequence[str]) -> None:
    """Put names beside horizontal bars, the first on top, and a grid behind them."""
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color=shade(GRID))
    axes.set_axisbelow(True)


def _reach(summary: Summary) -> float:
    """How far to the right a speedup's bar and interval go."""
    return max(summary.speedup, summary.interval[1] if summary.interval else 0)


def _canvas(bars: int) -> tuple[Figure, plt.Axes]:
    return plt.subplots(figsize=(8, 2.0 + 0.62 * bars), layout="constrained")


def _bar(axes: plt.Axes, position: int, length: float, place: int) -> None:
    colour, hatch = COLOURS[place % len(COLOURS)], HATCHES[place % len(HATCHES)]
    axes.barh(position, length, height=0.6, color=colour, hatch=hatch, edgecolor=shade(1), linewidth=0)


def _finish(axes: plt.Axes, record: RunRecord, summaries: list[Summary], title: str) -> None:
    name_bars(axes, [label_of(summary.row) for summary in summaries])
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    text = subtitle(record.environment, record.config.batch_size)
    axes.text(0, 1.03, text, transform=axes.transAxes, fontsize=9)
