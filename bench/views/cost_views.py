"""The table and the chart of cost against work: pictures a second by batch size and width, over several runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.records.run import RunRecord, RunRow
from bench.records.statistics import NOISY_SPREAD, spread
from bench.views.charts import MARKERS, colours_of, shade
from bench.views.table import NOTHING, Cell, Group, Row, Table, columns, row
from bench.views.words import figure as figure_words
from bench.views.words import label_of, span, why_no_time

NAME_WIDTH = 24
Cells = dict[tuple[int, float], RunRecord]
"""The record of each batch size and width."""


def cost_table(records: Sequence[RunRecord]) -> Table:
    """Pictures a second: a row for each version, a column for each batch size, a group for each width.

    All records have the same rows. Of several records of one batch size and width the last counts. A cell without a
    time has a note that says why.
    """
    cells, rows = _by_cell(records), _rows_by_id(records)
    batches, widths = _axes_of(cells)
    groups = [
        Group([_row(name, width, batches, cells) for name in rows.items()], f"width {width:.10g}") for width in widths
    ]
    last, ran = records[-1], cells.values()
    epochs = span([len(run_row.epoch_s) for record in ran for run_row in record.rows if run_row.epoch_s] or [0])
    samples = span([record.config.samples for record in ran])
    notes = [
        f"Pictures a second at the median epoch of training, more is better; green: the fastest. Epochs: {epochs} "
        f"timed, of {samples} pictures. Noisy: they spread over more than {100 * NOISY_SPREAD:.0f} % of their median.",
        "Width: filters of the inner convolutions, as a multiple of the network's; FLOPs grow with nearly its square.",
        *_why_nothing(cells, rows),
    ]
    caption = f"training speed on the {last.rows[0].device}, {last.environment.machine}"
    headers = [f"batch\n{batch}" for batch in batches]
    return Table(caption, columns("version", headers, NAME_WIDTH), groups, notes, tight=True)


def _why_nothing(cells: Cells, rows: Mapping[str, RunRow]) -> list[str]:
    """A line for each reason why a cell has no figure, with the cells."""
    places: dict[str, list[str]] = {}
    for width, batch in itertools.product(*reversed(_axes_of(cells))):
        where = f"batch {batch}, width {width:.10g}"
        if (batch, width) not in cells:
            places.setdefault("not measured", []).append(where)
            continue
        found = {run_row.id: run_row for run_row in cells[batch, width].rows}
        for row_id in rows:
            if not found[row_id].finished:
                places.setdefault(why_no_time(found[row_id]), []).append(f"{row_id} at {where}")
    return [f"{NOTHING} {'; '.join(where)}: {reason}." for reason, where in places.items()]


def cost_figure(records: Sequence[RunRecord]) -> Figure:
    """One panel for each width: pictures a second over the batch size, a line for each version."""
    cells, rows = _by_cell(records), _rows_by_id(records)
    batches, widths = _axes_of(cells)
    figure = Figure(figsize=(2.2 + 3.3 * len(widths), 5.4), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for axes, width in zip(panels, widths, strict=True):
        _panel(axes, {batch: record for (batch, of), record in cells.items() if of == width}, rows)
        axes.set_title(f"width {width:.10g}", loc="left", fontsize=11)
        axes.set_xlabel("batch, pictures a step")
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, list(map(str, batches)))
        axes.minorticks_off()
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter("{x:,g}")
    panels[0].set_ylabel("pictures a second, more is better")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    environment = records[-1].environment
    figure.legend(
        handles=[lines[label] for label in map(label_of, rows.values()) if label in lines],
        title=f"median epoch; {environment.machine}; commit {environment.commit}",
        title_fontsize=9,
        loc="outside lower center",
        ncols=2 if len(widths) == 1 else 4,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle("Training speed by batch size and width", x=0.01, ha="left", fontweight="bold", fontsize=13)
    return figure


def _panel(axes: Axes, of_width: dict[int, RunRecord], rows: dict[str, RunRow]) -> None:
    """The lines of one width; only rows with a time are drawn, and another library's lines are dashed."""
    colours = colours_of(list(rows.values()))
    for i, (row_id, first) in enumerate(rows.items()):
        speeds = [
            (batch, run_row.images_per_s)
            for batch, record in sorted(of_width.items())
            for run_row in record.rows
            if run_row.id == row_id and run_row.finished
        ]
        if speeds:
            axes.plot(
                *zip(*speeds, strict=True),
                color=colours[row_id],
                marker=MARKERS[i % len(MARKERS)],
                linestyle="--" if first.peer else "-",
                label=label_of(first),
            )
    axes.grid(color=shade(0.9))


def _row(named: tuple[str, RunRow], width: float, batches: Sequence[int], cells: Cells) -> Row:
    """A version's speeds at one width; the fastest row of a batch size is green."""
    row_id, any_row = named
    shown = []
    for batch in batches:
        finished = (
            [run_row for run_row in cells[batch, width].rows if run_row.finished] if (batch, width) in cells else []
        )
        run_row = next((run_row for run_row in finished if run_row.id == row_id), None)
        if run_row is None:
            shown.append(Cell(NOTHING, tone="quiet"))
            continue
        fastest = run_row.images_per_s == max(other.images_per_s for other in finished)
        noisy = "noisy" if spread(run_row.epoch_s) > NOISY_SPREAD else ""
        shown.append(Cell(figure_words(run_row.images_per_s), below=noisy, tone="good" if fastest else ""))
    return row(label_of(any_row), *shown)


def _axes_of(cells: Cells) -> tuple[list[int], list[float]]:
    """The batch sizes and the widths, in order."""
    return sorted({batch for batch, _ in cells}), sorted({width for _, width in cells})


def _by_cell(records: Sequence[RunRecord]) -> Cells:
    return {(record.config.batch_size, record.config.width): record for record in records}


def _rows_by_id(records: Sequence[RunRecord]) -> dict[str, RunRow]:
    """The first row of each id, in the order of the records."""
    rows: dict[str, RunRow] = {}
    for record in records:
        for run_row in record.rows:
            rows.setdefault(run_row.id, run_row)
    return rows
