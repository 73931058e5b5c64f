"""The table of a run: one row for each version and peer; for the terminal, the page and the README."""

from __future__ import annotations

from bench.records.run import RunRecord, RunRow, Summary, summarise
from bench.records.statistics import FEWEST_PAIRS
from bench.views import words
from bench.views.table import Cell, Group, Row, Table, columns, row
from versions.registry import BASELINE

NAME_WIDTH = 14  # characters of a version's name on a terminal; the figures need the others of the 80


def results_table(record: RunRecord) -> Table:
    """Every row of the run, also those without a time; fits 80 characters."""
    summaries = {summary.row.id: summary for summary in summarise(record.rows, BASELINE)}
    base = next((name for name, summary in summaries.items() if summary.is_baseline), BASELINE)
    fastest = min((summary.median_s for summary in summaries.values()), default=None)
    rows = [_row(row, summaries.get(row.id), fastest) for row in record.rows]
    headers = ["checks\npassed", "first\nepoch", "median\nepoch", "spread", "images\nper s"]
    headers += [f"speedup\nover {base}", "final\nloss", "peak\nMB"]
    config = record.config
    width = words.network_of(config.width)
    settings = [f"{config.samples:,} pictures an epoch", f"batch {config.batch_size}", width]
    caption = f"{', '.join(filter(None, settings))}, on the {record.rows[0].device}"
    notes = [
        "First epoch: the warm-up in a fresh process, with compilation. Spread: the range of the epochs as a share of "
        "their median; above 10 % it is noisy.",
        f"Speedup: the median epoch of {base} divided by the row's, and its 95 % interval, which needs {FEWEST_PAIRS} "
        f"epochs. A row without one is not compared: it ran on another device or in other arithmetic than {base}.",
        "Peak: on a CPU the largest resident set of the process, on a GPU the device memory that it added.",
    ]
    if width:
        notes.append(f"Width: the inner convolutions have {config.width:.10g} times the filters of the network.")
    if any(run_row.error_factor != 1 for run_row in record.rows):
        notes.append("Bound xN: the version was held to its own error bound, N times that of a direct sum.")
    changing = [run_row.id for run_row in record.rows if run_row.deterministic is False]
    if changing:
        notes.append(f"The same step twice gave different bits: {', '.join(changing)}.")
    return Table(caption, columns("version", headers, NAME_WIDTH), [Group(rows)], notes, tight=True)


def _row(run_row: RunRow, summary: Summary | None, fastest: float | None) -> Row:
    name = Cell(run_row.id, below=_idea(run_row))
    bound = f"bound x{run_row.error_factor:.0f}" if run_row.error_factor != 1 else ""
    checks = Cell(f"{run_row.checks}", below=bound) if run_row.verified else Cell("NO", tone="bad")
    if summary is None:
        return row(name, checks, Cell("no time", below=words.why_no_time(run_row), tone="bad", span=7))
    return row(
        name,
        checks,
        words.seconds(run_row.first_epoch_s),
        words.seconds(summary.median_s),
        Cell(words.percent(summary.spread), below="noisy" if summary.noisy else ""),
        f"{run_row.images_per_s:,.0f}",
        _speedup(summary),
        f"{run_row.loss[-1]:.5f}",
        words.megabytes(run_row.peak_bytes, 0),
        strong=summary.median_s == fastest,
    )


def _idea(run_row: RunRow) -> str:
    """Idea and layout of a version; a peer's id says its idea."""
    idea = run_row.label.removeprefix(f"{run_row.backend} ").removesuffix(f" ({run_row.layout})")
    below = run_row.layout if run_row.peer else f"{idea} {run_row.layout}"
    return f"{below}, TF32" if run_row.precision == "tf32" else below


def _speedup(summary: Summary) -> str | Cell:
    if summary.is_baseline:
        return "1"
    below = words.interval(summary.interval) if summary.interval else ""
    return Cell(words.optional(summary.speedup), below=below)
