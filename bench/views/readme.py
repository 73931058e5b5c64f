"""The README's chart and table of results, written from the results file that it names.

They stand between two markers; everything outside them is kept byte for byte. The file is named between the markers
too, so that ``convbench readme --check``, without an argument, can tell whether the README still says what it does.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench.machine.environment import machine_label
from bench.records.files import replace_file
from bench.records.run import RunRecord, Summary, read_record, summarise
from common.errors import UsageError
from versions.registry import BASELINE

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COLUMNS = ("version", "layout", "checks passed", "median epoch", "spread", "images per s")
NAMED = re.compile(r"\]\((?P<file>[^)]+\.json)\)")


def named_file(readme: Path) -> Path:
    """The results file that the README's block names; UsageError if it names none."""
    _, block, _ = _split(readme)
    match = NAMED.search(block)
    if match is None:
        raise UsageError(f"{readme} names no results file between its markers: give one, convbench readme FILE")
    return readme.parent / match["file"]


def written(readme: Path, results: Path) -> tuple[str, str]:
    """The README as it is, and as it should be for these results; UsageError if it cannot be made."""
    before, block, after = _split(readme)
    try:
        relative = results.resolve().relative_to(readme.resolve().parent)
    except ValueError:
        raise UsageError(f"{results} is not beneath {readme.resolve().parent}: the README cannot link to it") from None
    record = read_record(results)
    chart = relative.parent.parent / "charts" / f"{relative.stem}_speedup.png"
    if not (readme.resolve().parent / chart).is_file():
        raise UsageError(f"{chart} is missing: draw it with convbench plot {results}")
    text = block_text(record, relative.as_posix(), chart.as_posix())
    return before + block + after, f"{before}\n{text}\n{after}"


def block_text(record: RunRecord, file: str, chart: str) -> str:
    """What stands between the markers: chart, caption, table, and what was not measured."""
    summaries = {summary.row.id: summary for summary in summarise(record.rows, BASELINE)}
    base = next((summary.row.id for summary in summaries.values() if summary.is_baseline), BASELINE)
    environment, config = record.environment, record.config
    machine = _plain(machine_label(environment))
    elsewhere = "" if environment.get("gpu") else " On a GPU: not measured."
    lines = [
        f"![Speedup over {base}]({chart})",
        "",
        f"*{record.started[:10]}, {machine}, commit {_plain(environment['commit'])}: epochs of "
        f"{config['samples']:,} pictures ({_plain(config['data'])}), batch {config['batch_size']}, from "
        f"[this results file]({file}).{elsewhere}*",
        "",
        f"| {' | '.join((*COLUMNS, f'over {base} (95 % interval)', 'peak MB'))} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record.rows:
        name = f"{_plain(row.label)}{', TF32' if row.math == 'tf32' else ''}"
        name = f"{_plain(row.id)}: {name}" if "#" in row.id else name
        summary = summaries.get(row.id)
        if summary is None:
            checks = row.checks if row.verified else "not verified"
            lines.append(
                f"| {name} | {_plain(row.layout)} | {checks} | no time: {_plain(row.reason)} | - | - | - | - |"
            )
            continue
        cells = (
            name,
            _plain(row.layout),
            f"{row.checks}",
            f"{summary.median_s:.3g} s",
            f"{100 * summary.spread:.0f} %{' (noisy)' if summary.noisy else ''}",
            f"{row.images_per_s:,.0f}",
            _speedup(summary),
            f"{row.peak_bytes / 1e6:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replace(readme: Path, text: str) -> None:
    """Write the README whole or not at all; UsageError if it cannot be written."""
    try:
        replace_file(readme, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {readme}: {error.strerror or error}") from error


def _speedup(summary: Summary) -> str:
    if summary.speedup is None:
        return "not compared"
    if summary.is_baseline:
        return "1"
    interval = summary.interval
    reach = f"{interval[0]:.3g} to {interval[1]:.3g}" if interval else "too few epochs for an interval"
    return f"{summary.speedup:.3g} ({reach})"


def _split(readme: Path) -> tuple[str, str, str]:
    """The text up to and with the first marker, between them, and from the second one on."""
    try:
        with readme.open(encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {readme}: {getattr(error, 'strerror', None) or error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{readme} must have one {BEGIN} and after it one {END}")
    first, last = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:first], text[first:last], text[last:]


def _plain(text: str) -> str:
    """Text that Markdown takes as it is, on one line of a table."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(str(text).split()))
