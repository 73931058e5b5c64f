"""The README's chart and table of results, written from a results file.

They are between two markers; everything outside them is kept byte for byte. The block between the markers also names
the file, so that ``convbench readme --check`` finds out without an argument whether the README is up to date.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench.records.files import replace_file
from bench.records.run import read_run, summarise
from bench.views.run_tables import results_table
from bench.views.table import plain, to_markdown
from common.errors import UsageError
from versions.registry import BASELINE

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
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
    folder = readme.resolve().parent
    try:
        file = results.resolve().relative_to(folder)
    except ValueError:
        raise UsageError(f"{results} is not beneath {folder}: the README cannot link to it") from None
    record = read_run(results)
    if record.config.width != 1:
        raise UsageError(f"{results} has width {record.config.width:.10g}: the README shows the network, of width 1")
    chart = file.parent.parent / "charts" / f"{file.stem}_speedup.png"
    if not (folder / chart).is_file():
        raise UsageError(f"{chart} is missing: draw it with convbench plot {results}")
    base = next((s.row.id for s in summarise(record.rows, BASELINE) if s.is_baseline), BASELINE)
    environment, config = record.environment, record.config
    elsewhere = "" if environment.gpu else " On a GPU: not measured."
    caption = (
        f"*{record.started[:10]}, {plain(environment.machine)}, commit {plain(environment.commit)}: epochs of "
        f"{config.samples:,} pictures ({plain(config.data)}), batch {config.batch_size}, from [this results file]"
        f"({file.as_posix()}). In parentheses: idea and layout; the 95 % interval of the speedup.{elsewhere}*"
    )
    picture = f"![Speedup over {base}]({chart.as_posix()})"
    text = f"{picture}\n\n{caption}\n\n{to_markdown(results_table(record))}"
    return before + block + after, f"{before}\n{text}\n{after}"


def replace(readme: Path, text: str) -> None:
    """Write the README whole or not at all; UsageError if it cannot be written."""
    try:
        replace_file(readme, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {readme}: {error.strerror or error}") from error


def _split(readme: Path) -> tuple[str, str, str]:
    """The text up to and with the first marker, between them, and from the second one on."""
    try:
        text = readme.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {readme}: {getattr(error, 'strerror', None) or error}") from error
    parts = re.split(f"({BEGIN}|{END})", text)
    if parts[1::2] != [BEGIN, END]:
        raise UsageError(f"{readme} must have one {BEGIN} and after it one {END}")
    return parts[0] + BEGIN, parts[2], END + parts[4]
