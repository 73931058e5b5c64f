"""Charts of the parts of a training step: time by stage, and every operation under the measured ceilings.

Both show only verified rows with credible times. In the bars, the colour is the stage's and a hatch marks the backward
pass; in the roofline, the colour is the version's and the marker the operation's.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.records.layers import LayersRecord, LayerSummary, OperationSummary, read_layers, summarise_layers
from bench.views.charts import COLOURS, Charts, colours_of, entitle, name_bars, origin, save_charts, shade, write_beside
from bench.views.words import figure as figure_words
from bench.views.words import fine_percent, label_of
from common.operations import WHOLE_STEP, Operation

STAGE_COLOURS = {f"conv{i + 1}": COLOURS[i] for i in range(5)}
OTHER_SHADE, OVERHEAD_SHADE = 0.45, 0.85
BACKWARD_HATCH = "////"
LEAST_LABELLED = 0.065  # of the axis: a narrower segment has no room for its name
MARKERS = dict(zip(Operation, ">ov^h<8DpsdPX*", strict=True))
CONVOLUTIONS = {Operation.FORWARD: 1 / 1.3, Operation.BACKWARD_FILTER: 1, Operation.BACKWARD_DATA: 1.3}
"""How far sideways each is drawn: the three of a stage have one intensity."""
NO_FLOPS_AT = 0.03
"""Intensity at which an operation without FLOPs is drawn: below the memory's ceiling by its share of the bandwidth."""


def layers_charts(record: LayersRecord) -> Charts:
    """The charts of a layers file; none without a row that has times."""
    if not summarise_layers(record):
        return {}
    return {"steps": partial(layers_figure, record), "roofline": partial(roofline_figure, record)}


def draw_layer_charts(results: Path, folder: Path) -> list[Path]:
    """Draw the charts of a layers file into ``folder``; returns the files."""
    record = read_layers(results)
    return save_charts(results, record.rows, folder, layers_charts(record))


def layers_figure(record: LayersRecord) -> Figure:
    """Two bars for each version, cut by stage and direction: in time, and as shares of its own step."""
    summaries = summarise_layers(record)
    figure = Figure(figsize=(9.5, 2.6 + 2 * 0.62 * len(summaries)), layout="constrained")
    times, shares = figure.subplots(2, 1)
    times.set_xlim(0, 1.25 * 1000 * max(max(summary.step_s, summary.operations_s) for summary in summaries))
    times.set_xlabel("milliseconds of a training step, less is better")
    shares.set_xlim(0, 125)
    shares.set_xticks(range(0, 101, 20))
    shares.set_xlabel("per cent of the version's own step")
    for i, summary in enumerate(summaries):
        _stack(times, i, summary, 1000, f"{figure_words(1000 * summary.step_s)} ms", noisy=summary.noisy)
        overhead = f"overhead {fine_percent(summary.overhead_s / summary.step_s)}"
        _stack(shares, i, summary, 100 / summary.step_s, overhead, noisy=summary.overhead_noisy)
    for axes in (times, shares):
        name_bars(axes, [summary.row for summary in summaries])
    handles = [Patch(facecolor=colour, label=stage) for stage, colour in STAGE_COLOURS.items()]
    handles += [
        Patch(facecolor=shade(1), edgecolor=shade(0.3), label="forward"),
        Patch(facecolor=shade(1), edgecolor=shade(0.3), hatch=BACKWARD_HATCH, label="backward"),
        Patch(facecolor=shade(OTHER_SHADE), label="gather, loss, SGD"),
        Patch(facecolor=shade(OVERHEAD_SHADE), label="overhead"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    entitle(times, "Time of a training step by stage", *origin(record))
    return figure


def _stack(axes: Axes, place: int, summary: LayerSummary, scale: float, text: str, *, noisy: bool) -> None:
    """One version's bar, in the order of the step's stages; ``scale`` turns seconds into the axis's unit."""
    start = 0.0
    segments = summary.seconds_by_direction()
    segments["", "overhead"] = max(0.0, summary.overhead_s)  # below zero there is nothing to draw; its figure is given
    for (stage, direction), took in segments.items():
        grey = shade(OVERHEAD_SHADE if direction == "overhead" else OTHER_SHADE)
        bar = axes.barh(
            place,
            took * scale,
            height=0.62,
            left=start,
            color=STAGE_COLOURS.get(stage, grey),
            hatch=BACKWARD_HATCH if direction == "backward" else "",
            edgecolor=shade(1),
            linewidth=0.6,
        )
        if stage and took * scale >= LEAST_LABELLED * axes.get_xlim()[1]:
            box = {"boxstyle": "round,pad=0.15", "facecolor": shade(1), "edgecolor": "none", "alpha": 0.85}
            axes.bar_label(bar, [stage], label_type="center", fontsize=8, bbox=box)
        start += took * scale
    write_beside(axes, place, scale * max(summary.step_s, summary.operations_s), f"{text}{', noisy' if noisy else ''}")


def roofline_figure(record: LayersRecord) -> Figure:
    """Every operation of every version by its intensity and speed, under the measured ceilings."""
    summaries = summarise_layers(record)
    colours = colours_of(record.rows)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="FLOPs for each byte that has to move", ylabel="GFLOP/s")
    shown = set()
    for i, summary in enumerate(summaries):
        for line in summary.operations:
            if line.seconds > 0 and line.work.least_bytes:
                _point(axes, line, colours[summary.row.id], 1.05**i)
                shown.add(line.operation)
    _ceilings(axes, summaries)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("")
    axes.grid(color=shade(0.92))
    versions = [(label_of(summary.row), "o", colours[summary.row.id]) for summary in summaries]
    operations = [(name.words, marker, shade(0.5)) for name, marker in MARKERS.items() if name in shown]
    for legend, where, ncols in ((versions, "outside lower left", 1), (operations, "outside lower right", 4)):
        handles = [
            Line2D([], [], linestyle="", marker=marker, color=colour, markersize=8, label=label)
            for label, marker, colour in legend
        ]
        figure.legend(handles=handles, loc=where, ncols=ncols, frameon=False, fontsize=9)
    notes = f"number: stage; markers are set apart sideways; without FLOPs: at {NO_FLOPS_AT}"
    entitle(axes, "Every operation under the measured ceilings", *origin(record), notes)
    return figure


def _point(axes: Axes, line: OperationSummary, colour: str, sideways: float) -> None:
    """One operation of one version, moved sideways a little so that equal ones do not cover each other."""
    intensity = line.work.flops / line.work.least_bytes or NO_FLOPS_AT
    number = line.stage.removeprefix("conv")
    if line.operation in CONVOLUTIONS and number.isdigit():
        sideways *= CONVOLUTIONS[line.operation] * 1.07 ** (int(number) - 3)
    where, marker = (intensity * sideways, intensity * line.gb_per_s), MARKERS[line.operation]
    axes.plot(*where, marker, markersize=11, color=colour, markeredgecolor=shade(0), markeredgewidth=0.5)
    if line.stage != WHOLE_STEP:
        ink = "white" if colour == COLOURS[0] else "black"
        axes.annotate(number, where, ha="center", va="center_baseline", fontsize=7, fontweight="bold", color=ink)


def _ceilings(axes: Axes, summaries: list[LayerSummary]) -> None:
    """The roof, once for each arithmetic that occurs."""
    left, right = axes.get_xlim()
    for precision, ceilings in {summary.ceilings.precision: summary.ceilings for summary in summaries}.items():
        peak, memory = ceilings.gemm_flop_per_s / 1e9, ceilings.memory_bytes_per_s / 1e9
        xs = [left, peak / memory, right]
        axes.plot(xs, [min(peak, x * memory) for x in xs], color=shade(0), linewidth=1.3)
        name = "GEMM, TF32" if precision == "tf32" else "GEMM"
        text = f"{name}: {figure_words(peak)} GFLOP/s, measured"
        axes.annotate(text, (right, peak), (-4, 5), textcoords="offset points", ha="right", fontsize=9.5)
    text = f"memory: {figure_words(memory)} GB/s, measured"
    axes.annotate(text, (peak / memory / 4, peak / 4), (-10, 0), textcoords="offset points", ha="right", fontsize=9.5)
    axes.set_xlim(left, right)
