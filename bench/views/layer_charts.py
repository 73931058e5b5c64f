"""Charts of the parts of a training step: time by stage, and every operation under the measured ceilings.

Both show only verified rows with credible times. In the bars, the colour is the stage's and a hatch marks the backward
pass; in the roofline, the colour is the version's and the marker the operation's. Bars and ceilings show their figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import atan, degrees
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.machine.ceilings import Ceilings
from bench.records.layers import LayersRecord, LayerSummary, OperationSummary, read_layers, summarise_layers
from bench.views.charts import COLOURS, STYLE, name_bars, places, save_charts, shade, subtitle
from bench.views.words import figure as figure_words
from bench.views.words import fine_percent, label_of, why_no_time
from common.errors import UsageError
from common.operations import WHOLE_STEP, Operation

STAGE_COLOURS = {f"conv{i + 1}": COLOURS[i] for i in range(5)}
OTHER_SHADE, OVERHEAD_SHADE = 0.45, 0.85
BACKWARD_HATCH = "////"
LEAST_LABELLED = 0.065  # of the longest bar: a narrower segment has no room for its name

# Marker and name of a kind of operation in the roofline; those of one kind differ by stage.
KINDS = {
    Operation.FORWARD: ("o", "forward"),
    Operation.BACKWARD_DATA: ("s", "backward data"),
    Operation.BACKWARD_FILTER: ("D", "backward filter"),
    Operation.BACKWARD_BIAS: ("^", "backward bias"),
    Operation.MAXPOOL: ("v", "pooling, upsampling"),
    Operation.UPSAMPLE: ("v", "pooling, upsampling"),
    Operation.MAXPOOL_BACKWARD: ("<", "their backward"),
    Operation.UPSAMPLE_BACKWARD: ("<", "their backward"),
    Operation.STAGE_FORWARD: ("P", "fused forward"),
    Operation.STAGE_BACKWARD: ("X", "fused backward"),
    Operation.PREPARE: ("p", "preparation"),
    Operation.GATHER: (">", "gather"),
    Operation.LOSS: ("h", "loss"),
    Operation.SGD: ("*", "SGD"),
}
CONVOLUTIONS = (
    Operation.FORWARD,
    Operation.BACKWARD_DATA,
    Operation.BACKWARD_FILTER,
    Operation.STAGE_FORWARD,
    Operation.STAGE_BACKWARD,
)
# Beside the filter gradient, which has the same intensity.
SIDEWAYS = {Operation.FORWARD: 1 / 1.13, Operation.BACKWARD_DATA: 1.13}
NO_FLOPS_AT = 0.03  # FLOP a byte


def draw_layer_charts(results: Path, folder: Path) -> list[Path]:
    """Draw both charts of a layers file into ``folder``, as PNG and SVG; returns the files.

    UsageError if it is not such a file, if it has no row to draw, or if the folder cannot be written.
    """
    record = read_layers(results)
    if not summarise_layers(record):
        reasons = "; ".join(f"{row.id}: {why_no_time(row)}" for row in record.rows)
        raise UsageError(f"nothing to draw in {results}: {reasons}")
    charts = {"steps": layers_figure(record), "roofline": roofline_figure(record)}
    return save_charts(folder, results.stem, charts)


def layers_figure(record: LayersRecord) -> Figure:
    """Two bars for each version, cut by stage and direction: in time, and as shares of its own step."""
    summaries = summarise_layers(record)
    with plt.rc_context(STYLE):
        height = 2.6 + 2 * 0.62 * len(summaries)
        figure, (times, shares) = plt.subplots(2, 1, figsize=(9.5, height), layout="constrained")
        longest = max(max(summary.step_s, summary.operations_s) for summary in summaries)
        for i, summary in enumerate(summaries):
            _stack(times, i, summary, 1000, 1000 * longest)
            end = 1000 * max(summary.step_s, summary.operations_s)
            _figure_beside(times, i, end, f"{figure_words(1000 * summary.step_s)} ms", noisy=summary.noisy)
            _stack(shares, i, summary, 100 / summary.step_s, 100)
            end = max(100, 100 * summary.operations_s / summary.step_s)
            text = f"overhead {fine_percent(summary.overhead_s / summary.step_s)}"
            _figure_beside(shares, i, end, text, noisy=summary.overhead_noisy)
        times.set_xlim(0, 1.25 * 1000 * longest)
        times.set_xlabel("milliseconds of a training step, less is better")
        shares.set_xlim(0, 125)
        shares.set_xticks(range(0, 101, 20))
        shares.set_xlabel("per cent of the version's own step")
        for axes in (times, shares):
            name_bars(axes, [label_of(summary.row) for summary in summaries])
        handles = [Patch(facecolor=colour, label=stage) for stage, colour in STAGE_COLOURS.items()]
        handles += [
            Patch(facecolor=shade(1), edgecolor=shade(0.3), label="forward"),
            Patch(facecolor=shade(1), edgecolor=shade(0.3), hatch=BACKWARD_HATCH, label="backward"),
            Patch(facecolor=shade(OTHER_SHADE), label="gather, loss, SGD"),
            Patch(facecolor=shade(OVERHEAD_SHADE), label="overhead"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        _title(times, record, "Time of a training step by stage")
    return figure


def roofline_figure(record: LayersRecord) -> Figure:
    """Every operation of every version by its intensity and speed, under the measured ceilings.

    Two panels, because no operation lies between them: those with little arithmetic, and the convolutions.
    """
    summaries = summarise_layers(record)
    order = places(record.rows)
    colours = {summary.row.id: COLOURS[order[summary.row.id] % len(COLOURS)] for summary in summaries}
    found = _points(summaries, colours)
    with plt.rc_context(STYLE | {"axes.spines.left": True}):
        figure, panels = plt.subplots(
            1, 2, figsize=(11, 6.8), layout="constrained", gridspec_kw={"width_ratios": (1, 1.25)}
        )
        for axes, wanted, title in zip(panels, (False, True), ("around the convolutions", "convolutions"), strict=True):
            points = [point for point in found if (point.line.operation in CONVOLUTIONS) == wanted]
            if not points:
                axes.set_axis_off()
                continue
            _panel(axes, points, summaries)
            axes.set_xlabel("FLOPs for each byte that has to move")
            axes.annotate(title, (0.02, 0.98), xycoords="axes fraction", va="top", fontstyle="italic")
        panels[0].set_ylabel("GFLOP/s")
        handles = [
            _dot("o", label_of(summary.row), markersize=9, color=colours[summary.row.id]) for summary in summaries
        ]
        figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=9)
        kinds = {name: marker for marker, name in (KINDS[point.line.operation] for point in found)}
        handles = [_dot(marker, name, markersize=8, color=shade(0.5)) for name, marker in kinds.items()]
        if any(point.without_flops for point in found):
            text = "left of it: no FLOPs, placed by GB/s"
            handles.append(Line2D([], [], linestyle=":", color=shade(0.5), label=text))
        figure.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False, fontsize=9)
        note = "line: measured ceilings; number: stage; markers are set apart a little sideways"
        _title(panels[0], record, "Every operation under the measured ceilings", note)
    return figure


@dataclass(frozen=True)
class _Point:
    """One operation of one version in the roofline."""

    line: OperationSummary
    colour: str
    version: int
    """Place of its version among those drawn."""

    @property
    def without_flops(self) -> bool:
        """Whether it only moves data: it has no place on the axis of intensities."""
        return not self.line.work.flops

    @property
    def x(self) -> float:
        """FLOP a byte; at the edge for what has no FLOPs."""
        work = self.line.work
        return NO_FLOPS_AT if self.without_flops else work.flops / work.least_bytes

    @property
    def y(self) -> float:
        """GFLOP/s; for what has no FLOPs as far below the memory's ceiling as its traffic is."""
        return self.x * self.line.work.least_bytes / self.line.seconds / 1e9

    @property
    def shown_x(self) -> float:
        """Moved sideways a little, so that equal ones do not cover each other.

        Convolutions of a version are alike and differ between versions; the rest is alike between versions.
        """
        operation, stage = self.line.operation, self.line.stage
        if operation not in CONVOLUTIONS:
            return self.x * 1.05**self.version
        number = int(stage[-1]) if stage[-1:].isdigit() else 3
        return self.x * SIDEWAYS.get(operation, 1.0) * 1.03 ** (number - 3)


def _points(summaries: list[LayerSummary], colours: dict[str, str]) -> list[_Point]:
    return [
        _Point(line, colours[summary.row.id], i)
        for i, summary in enumerate(summaries)
        for line in summary.operations
        if line.seconds > 0 and line.work.least_bytes
    ]


def _dot(marker: str, label: str, **style: object) -> Line2D:
    """A marker of a legend."""
    return Line2D([], [], linestyle="", marker=marker, label=label, **style)


def _figure_beside(axes: plt.Axes, position: int, end: float, text: str, *, noisy: bool) -> None:
    """Write a bar's figure beside its end."""
    text = f"{text}, noisy" if noisy else text
    axes.annotate(text, (end, position), (8, 0), textcoords="offset points", va="center")


def _panel(axes: plt.Axes, points: list[_Point], summaries: list[LayerSummary]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    left, right = min(point.shown_x for point in points) / 2, max(point.shown_x for point in points) * 2
    axes.set_xlim(left, right)
    for point in points:
        marker, _ = KINDS[point.line.operation]
        where = (point.shown_x, point.y)
        axes.plot(*where, marker, markersize=11, color=point.colour, markeredgecolor=shade(0), markeredgewidth=0.5)
        if point.line.stage != WHOLE_STEP:
            text = point.line.stage.removeprefix("conv")
            colour = "white" if point.colour == COLOURS[0] else "black"
            axes.annotate(text, where, ha="center", va="center_baseline", fontsize=7, fontweight="bold", color=colour)
    if any(point.without_flops for point in points):
        axes.axvline(NO_FLOPS_AT * 1.5, color=shade(0.5), linestyle=":")
    _ceilings(axes, summaries, left, right)
    bottom, top = axes.get_ylim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if top < 1000 * bottom:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color=shade(0.92))
    axes.set_axisbelow(True)


def _stack(axes: plt.Axes, position: int, summary: LayerSummary, scale: float, longest: float) -> None:
    """One version's bar, in the order of the step's stages; ``scale`` turns seconds into the axis's unit."""
    start = 0.0
    segments = summary.seconds_by_direction()
    segments["", "overhead"] = max(0.0, summary.overhead_s)  # below zero there is nothing to draw; its figure is given
    for (stage, direction), took in segments.items():
        length = took * scale
        grey = shade(OVERHEAD_SHADE if direction == "overhead" else OTHER_SHADE)
        colour = STAGE_COLOURS.get(stage, grey)
        hatch = BACKWARD_HATCH if direction == "backward" else ""
        axes.barh(position, length, 0.62, start, color=colour, hatch=hatch, edgecolor=shade(1), linewidth=0.6)
        if length >= LEAST_LABELLED * longest and stage:
            axes.annotate(
                stage, (start + length / 2, position), ha="center", va="center", fontsize=8,
                bbox={"boxstyle": "round,pad=0.15", "facecolor": shade(1), "edgecolor": "none", "alpha": 0.85},
            )  # fmt: skip
        start += length


def _ceilings(axes: plt.Axes, summaries: list[LayerSummary], left: float, right: float) -> None:
    """The roof, once for each arithmetic that occurs."""
    drawn: dict[str, Ceilings] = {summary.ceilings.precision: summary.ceilings for summary in summaries}
    for precision, ceilings in drawn.items():
        peak, memory = ceilings.gemm_flop_per_s / 1e9, ceilings.memory_bytes_per_s / 1e9
        knee = peak / memory
        sloped, flat = left < knee, right > knee
        xs = [left, *([knee] if sloped and flat else []), right]
        axes.plot(xs, [min(peak, x * memory) for x in xs], color=shade(0), linewidth=1.3)
        if flat:
            name = "GEMM, TF32" if precision == "tf32" else "GEMM"
            text = f"{name}: {figure_words(peak)} GFLOP/s, measured"
            axes.annotate(text, (right, peak), (-4, 5), textcoords="offset points", ha="right", fontsize=9.5)
        if sloped and precision == next(iter(drawn)):
            # Along the line: the angle is given in data, and there y has to grow by y for each x.
            x, y = left * 1.15, 1.5 * left * 1.15 * memory
            axes.text(
                x, y, f"memory: {figure_words(memory)} GB/s, measured", fontsize=9.5,
                rotation=degrees(atan(y / x)), rotation_mode="anchor", transform_rotates_text=True,
            )  # fmt: skip
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, 2 * top)  # room for the texts


def _title(axes: plt.Axes, record: LayersRecord, title: str, note: str = "") -> None:
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    # It may be longer than the axes are wide, and is not to make them narrower.
    text = subtitle(record.environment, record.config.batch_size, note)
    axes.text(0, 1.02, text, transform=axes.transAxes, fontsize=9, va="bottom").set_in_layout(False)
