"""Charts of a step taken apart: where every version's time goes, and its operations under the measured ceilings.

Both show only rows that were verified and are believed. Stages have Okabe and Ito's colours, the backward pass a hatch;
in the roofline the colour is the version's and the marker the operation's. Bars and ceilings carry their figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import atan, degrees
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.machine.ceilings import Ceilings
from bench.machine.environment import machine_label
from bench.records.layers import LayerSummary, Line, figures, read_layers, summarise_layers
from bench.views.charts import COLOURS, STYLE, full_label, save_charts
from common.errors import UsageError
from common.operations import WHOLE_STEP
from versions.registry import names

STAGE_COLOURS = {f"conv{i + 1}": COLOURS[i] for i in range(5)}
OTHER_COLOUR, OVERHEAD_COLOUR = "0.45", "0.85"
BACKWARD_HATCH = "////"
LEAST_LABELLED = 0.065  # of the longest bar: a narrower segment has no room for its name

# Marker and name of a kind of operation in the roofline; those of one kind differ by stage.
KINDS = {
    "forward": ("o", "forward"),
    "backward_data": ("s", "backward data"),
    "backward_filter": ("D", "backward filter"),
    "backward_bias": ("^", "backward bias"),
    "maxpool": ("v", "pooling, upsampling"),
    "upsample": ("v", "pooling, upsampling"),
    "maxpool_backward": ("<", "their backward"),
    "upsample_backward": ("<", "their backward"),
    "stage_forward_rest": ("P", "fused forward"),
    "stage_backward_rest": ("X", "fused backward"),
    "gather": (">", "gather"),
    "loss": ("h", "loss"),
    "sgd": ("*", "SGD"),
}
CONVOLUTIONS = ("forward", "backward_data", "backward_filter", "stage_forward_rest", "stage_backward_rest")
SIDEWAYS = {"forward": 1 / 1.13, "backward_data": 1.13}  # beside the filter gradient, which has the same intensity
NO_FLOPS_AT = 0.03  # FLOP a byte


def draw_layer_charts(results: Path, folder: Path) -> list[Path]:
    """Draw both charts of a layers file into ``folder``, as PNG and SVG; returns the files.

    UsageError if it is not such a file, if no row of it can be drawn, or if the folder cannot be written.
    """
    record = read_layers(results)
    if not summarise_layers(record):
        reasons = "; ".join(f"{row['id']}: {row['reason'] or 'no times'}" for row in record["rows"])
        raise UsageError(f"nothing to draw in {results}: {reasons}")
    charts = {"steps": layers_figure(record), "roofline": roofline_figure(record)}
    return save_charts(folder, results.stem, charts)


def layers_figure(record: dict[str, Any]) -> Figure:
    """Two bars a version, cut by stage and direction: in time, and as shares of its own step."""
    summaries = summarise_layers(record)
    with plt.rc_context(STYLE):
        height = 2.6 + 2 * 0.62 * len(summaries)
        figure, (times, shares) = plt.subplots(2, 1, figsize=(9.5, height), layout="constrained")
        longest = max(max(summary.step_s, summary.operations_s) for summary in summaries)
        for i, summary in enumerate(summaries):
            _stack(times, i, summary, 1000, 1000 * longest)
            noisy = ", noisy" if summary.noisy else ""
            text = f"{_ms(summary.step_s)}{noisy}"
            end = 1000 * max(summary.step_s, summary.operations_s)
            times.annotate(text, (end, i), (8, 0), textcoords="offset points", va="center")
            _stack(shares, i, summary, 100 / summary.step_s, 100)
            overhead = 100 * summary.overhead_s / summary.step_s
            end = max(100, 100 * summary.operations_s / summary.step_s)
            text = f"overhead {overhead:.1f} %{', noisy' if summary.overhead_noisy else ''}"
            shares.annotate(text, (end, i), (8, 0), textcoords="offset points", va="center")
        times.set_xlim(0, 1.25 * 1000 * longest)
        times.set_xlabel("milliseconds of a training step, less is better")
        shares.set_xlim(0, 125)
        shares.set_xticks(range(0, 101, 20))
        shares.set_xlabel("per cent of the version's own step")
        for axes in (times, shares):
            axes.set_yticks(range(len(summaries)), [layer_label(summary.row) for summary in summaries])
            axes.tick_params(axis="y", length=0)
            axes.invert_yaxis()
            axes.grid(axis="x", color="0.9")
            axes.set_axisbelow(True)
        handles = [Patch(facecolor=colour, label=stage) for stage, colour in STAGE_COLOURS.items()]
        handles += [
            Patch(facecolor="white", edgecolor="0.3", label="forward"),
            Patch(facecolor="white", edgecolor="0.3", hatch=BACKWARD_HATCH, label="backward"),
            Patch(facecolor=OTHER_COLOUR, label="gather, loss, SGD"),
            Patch(facecolor=OVERHEAD_COLOUR, label="overhead"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        _title(figure, times, record, "Where a training step goes")
    return figure


def roofline_figure(record: dict[str, Any]) -> Figure:
    """Every operation of every version by its intensity and speed, under the ceilings that were measured.

    Two panels, because nothing lies between them: what does little arithmetic, and the convolutions.
    """
    summaries = summarise_layers(record)
    with plt.rc_context(STYLE | {"axes.spines.left": True}):
        figure, panels = plt.subplots(
            1, 2, figsize=(11, 6.8), layout="constrained", gridspec_kw={"width_ratios": (1, 1.25)}
        )
        kinds: dict[str, str] = {}
        for axes, wanted, title in zip(panels, (False, True), ("around the convolutions", "convolutions"), strict=True):
            points = [point for point in _points(summaries) if (point.line.operation.name in CONVOLUTIONS) == wanted]
            if not points:
                axes.set_axis_off()
                continue
            _panel(axes, points, summaries)
            axes.set_xlabel("FLOPs for each byte that has to move")
            axes.annotate(title, (0.02, 0.98), xycoords="axes fraction", va="top", fontstyle="italic")
            kinds |= {kind: marker for point in points for marker, kind in [KINDS[point.line.operation.name]]}
        panels[0].set_ylabel("GFLOP/s")
        handles = [
            Line2D([], [], linestyle="", marker="o", markersize=9, color=_colour(s.row, i), label=layer_label(s.row))
            for i, s in enumerate(summaries)
        ]
        figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=9)
        handles = [
            Line2D([], [], linestyle="", marker=marker, markersize=8, color="0.5", label=kind)
            for kind, marker in kinds.items()
        ]
        if any(point.without_flops for point in _points(summaries)):
            handles.append(Line2D([], [], linestyle=":", color="0.5", label="left of it: no FLOPs, placed by GB/s"))
        figure.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False, fontsize=9)
        note = "line: measured ceilings; number: stage; markers are set apart a little sideways"
        _title(figure, panels[0], record, "Every operation under the measured ceilings", note)
    return figure


@dataclass(frozen=True)
class _Point:
    """One operation of one version in the roofline."""

    line: Line
    colour: str
    version: int
    """Place of its version among those drawn."""

    @property
    def without_flops(self) -> bool:
        """Whether it only moves data: it has no place on the axis of intensities."""
        return not self.line.operation.flops

    @property
    def x(self) -> float:
        """FLOP a byte; at the edge for what has no FLOPs."""
        operation = self.line.operation
        return NO_FLOPS_AT if self.without_flops else operation.flops / operation.least_bytes

    @property
    def y(self) -> float:
        """GFLOP/s; for what has no FLOPs as far below the memory's ceiling as its traffic is."""
        return self.x * self.line.operation.least_bytes / self.line.seconds / 1e9

    @property
    def shown_x(self) -> float:
        """Moved sideways a little, so that equal ones do not cover each other.

        Convolutions of a version are alike and differ between versions; the rest is alike between versions.
        """
        operation = self.line.operation
        if operation.name not in CONVOLUTIONS:
            return self.x * 1.05**self.version
        stage = int(operation.stage[-1]) if operation.stage[-1].isdigit() else 3
        return self.x * SIDEWAYS.get(operation.name, 1.0) * 1.03 ** (stage - 3)


def _points(summaries: list[LayerSummary]) -> list[_Point]:
    return [
        _Point(line, _colour(summary.row, i), i)
        for i, summary in enumerate(summaries)
        for line in summary.lines
        if line.seconds > 0 and line.operation.least_bytes
    ]


def _panel(axes: plt.Axes, points: list[_Point], summaries: list[LayerSummary]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    left, right = min(point.shown_x for point in points) / 2, max(point.shown_x for point in points) * 2
    axes.set_xlim(left, right)
    for point in points:
        marker, _ = KINDS[point.line.operation.name]
        where = (point.shown_x, point.y)
        axes.plot(*where, marker, markersize=11, color=point.colour, markeredgecolor="black", markeredgewidth=0.5)
        if point.line.stage != WHOLE_STEP:
            text = point.line.stage.removeprefix("conv")
            colour = "white" if point.colour == COLOURS[0] else "black"
            axes.annotate(text, where, ha="center", va="center_baseline", fontsize=7, fontweight="bold", color=colour)
    if any(point.without_flops for point in points):
        axes.axvline(NO_FLOPS_AT * 1.5, color="0.5", linestyle=":")
    _ceilings(axes, summaries, left, right)
    bottom, top = axes.get_ylim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if top < 1000 * bottom:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def _stack(axes: plt.Axes, position: int, summary: LayerSummary, scale: float, longest: float) -> None:
    """One version's bar, in the order of the step's stages; ``scale`` turns seconds into the axis's unit."""
    start = 0.0
    segments = summary.seconds_by_direction()
    segments["", "overhead"] = max(0.0, summary.overhead_s)  # below zero there is nothing to draw; its figure is given
    for (stage, direction), seconds in segments.items():
        length = seconds * scale
        colour = OVERHEAD_COLOUR if direction == "overhead" else STAGE_COLOURS.get(stage, OTHER_COLOUR)
        hatch = BACKWARD_HATCH if direction == "backward" else ""
        axes.barh(position, length, 0.62, start, color=colour, hatch=hatch, edgecolor="white", linewidth=0.6)
        if length >= LEAST_LABELLED * longest and stage:
            axes.annotate(
                stage, (start + length / 2, position), ha="center", va="center", fontsize=8,
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            )  # fmt: skip
        start += length


def _ceilings(axes: plt.Axes, summaries: list[LayerSummary], left: float, right: float) -> None:
    """The roof, once for each arithmetic that occurs."""
    drawn: dict[str, Ceilings] = {summary.ceilings.math: summary.ceilings for summary in summaries}
    for math, ceilings in drawn.items():
        peak, memory = ceilings.gemm_flop_per_s / 1e9, ceilings.memory_bytes_per_s / 1e9
        knee = peak / memory
        sloped, flat = left < knee, right > knee
        xs = [left, *([knee] if sloped and flat else []), right]
        axes.plot(xs, [min(peak, x * memory) for x in xs], color="black", linewidth=1.3)
        if flat:
            name = "GEMM, TF32" if math == "tf32" else "GEMM"
            text = f"{name}: {figures(peak)} GFLOP/s, measured"
            axes.annotate(text, (right, peak), (-4, 5), textcoords="offset points", ha="right", fontsize=9.5)
        if sloped and math == next(iter(drawn)):
            # Along the line: the angle is given in data, and there y has to grow by y for each x.
            x, y = left * 1.15, 1.5 * left * 1.15 * memory
            axes.text(
                x, y, f"memory: {figures(memory)} GB/s, measured", fontsize=9.5,
                rotation=degrees(atan(y / x)), rotation_mode="anchor", transform_rotates_text=True,
            )  # fmt: skip
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, 2 * top)  # room for the texts


def _colour(row: dict[str, Any], position: int) -> str:
    """The version's colour; a second row of a version gets the next that no version has."""
    known = names()
    place = known.index(row["backend"]) if row["backend"] in known and "#" not in row["id"] else len(known) + position
    return COLOURS[place % len(COLOURS)]


def layer_label(row: dict[str, Any]) -> str:
    """A row of a layers file as charts name it."""
    return full_label(row["label"], row["id"], row["math"])


def _title(figure: Figure, axes: plt.Axes, record: dict[str, Any], title: str, note: str = "") -> None:
    environment = record["environment"]
    batch = f"batch {record['config']['batch_size']}"
    text = "; ".join(filter(None, (machine_label(environment), batch, f"commit {environment['commit']}", note)))
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    # It may be longer than the axes are wide, and is not to make them narrower.
    axes.text(0, 1.02, text, transform=axes.transAxes, fontsize=9, va="bottom").set_in_layout(False)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.4g} ms"
