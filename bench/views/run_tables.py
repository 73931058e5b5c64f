"""The table of a run: one row for each version and peer; for the terminal, the page and the README."""

from __future__ import annotations

from bench.records.run import RunRecord, RunRow, Summary, summarise
from bench.records.statistics import FEWEST_PAIRS
from bench.views import words
from bench.views.table import NOTHING, Cell, Column, Group, Row, Table, columns, row
from versions.registry import BASELINE

NAME_WIDTH = 14  # characters of a version's name on a terminal; the figures need the others of the 80


def results_table(record: RunRecord) -> Table:
    """Every row of the run, also those without a time; fits 80 characters."""
    summaries = summarise(record.rows, BASELINE)
    found = {summary.row.id: summary for summary in summaries}
    base = next((summary.row.id for summary in summaries if summary.is_baseline), None)
    fastest = min((summary.median_s for summary in summaries), default=None)
    rows = [_row(row, found.get(row.id), fastest) for row in record.rows]
    headers = ["checks\npassed", "first\nepoch", "median\nepoch", "spread", "images\nper s"]
    headers += [f"speedup\nover {base or BASELINE}", "final\nloss", "peak\nMB"]
    caption = (
        f"{record.config.samples:,} pictures an epoch, batch {record.config.batch_size}, on the {record.rows[0].device}"
    )
    shown = [Column("version", text=True, fold=NAME_WIDTH), *columns("", headers)[1:]]
    return Table(caption, shown, [Group(rows)], _notes(record, summaries, base), tight=True)


def _row(run_row: RunRow, summary: Summary | None, fastest: float | None) -> Row:
    name = Cell(run_row.id, below=_idea(run_row))
    checks = Cell(f"{run_row.checks}") if run_row.verified else Cell("NO", tone="bad")
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
        f"{run_row.peak_bytes / 1e6:,.0f}",
        strong=summary.median_s == fastest,
    )


def _idea(run_row: RunRow) -> str:
    """Idea and layout of a version; a peer's id says its idea."""
    idea = run_row.label.removeprefix(f"{run_row.backend} ").removesuffix(f" ({run_row.layout})")
    below = run_row.layout if run_row.peer else f"{idea} {run_row.layout}"
    return f"{below}, TF32" if run_row.precision == "tf32" else below


def _speedup(summary: Summary) -> Cell:
    if summary.speedup is None:
        return Cell(NOTHING)
    if summary.is_baseline:
        return Cell("1")
    return Cell(words.ratio(summary.speedup), below=words.interval(summary.interval) if summary.interval else "")


def _notes(record: RunRecord, summaries: list[Summary], base: str | None) -> list[str]:
    notes = [
        "First epoch: the warm-up in a fresh process, with compilation. Spread: the range of the epochs as a share of "
        "their median; above 10 % it is noisy."
    ]
    compared = [summary for summary in summaries if summary.speedup is not None and not summary.is_baseline]
    if compared:
        below = "below it, its 95 % interval"
        if not all(summary.interval for summary in compared):
            below = f"an interval needs {FEWEST_PAIRS} epochs or more"
        notes.append(f"Speedup: the median epoch of {base} divided by the row's; {below}.")
    if any(summary.speedup is None for summary in summaries):
        why = f"it ran on another device or in other arithmetic than {base}" if base else "no version finished"
        notes.append(f"A row without a speedup is not compared: {why}.")
    notes.append("Peak: on a CPU the largest resident set of the process, on a GPU the device memory that it added.")
    changing = [run_row.id for run_row in record.rows if run_row.deterministic is False]
    if changing:
        notes.append(f"The same step twice gave different bits: {words.joined(changing)}.")
    return notes
