"""The parts of the report's page: sections made of a few kinds of blocks, which the template draws.

A chart is drawn twice, in the colours of the light page and of the dark page; the browser shows the one that suits. A
section without a file says that it was not measured, and names the command that would measure it.
"""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.model import to_json
from bench.records.kernels import KernelsRecord
from bench.records.layers import LayersRecord, summarise_layers
from bench.records.run import RunRecord, RunRow, summarise
from bench.views.charts import STYLE, epoch_time_figure, loss_figure, speedup_figure
from bench.views.kernel_tables import kernel_summary, kernel_tables
from bench.views.layer_charts import layers_figure, roofline_figure
from bench.views.layer_tables import layer_memory_table, operations_table, steps_table
from bench.views.pictures import checked_picture
from bench.views.run_tables import results_table
from bench.views.table import NOTHING, Column, Group, Table, row
from bench.views.words import figure, joined, label_of, ratio, seconds
from versions.registry import BASELINE

LIGHT = {"ink": "#1d1c1a", "paper": "#fbfaf7"}
DARK = {"ink": "#e8e5de", "paper": "#171614"}
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


@dataclass(frozen=True)
class Block:
    """A piece of a section: ``kind`` says which macro of the template draws it."""

    kind: str
    text: str = ""
    body: Any = None
    id: str = ""
    open: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own; ``origin`` names the file it is from."""

    id: str
    title: str
    blocks: list[Block] = field(default_factory=list)
    origin: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing in light and in dark colours, as data URIs, and what it shows in words."""

    light: str
    dark: str
    description: str


def run_blocks(record: RunRecord, part: str) -> list[Block]:
    """Charts and table of a run, its losses and its pictures; ``part`` begins the identifiers."""
    summaries = summarise(record.rows, BASELINE)
    finished = [summary.row for summary in summaries]
    compared = [summary for summary in summaries if summary.speedup is not None]
    blocks = []
    if len(compared) > 1:
        described = joined([f"{label_of(s.row)} {ratio(s.speedup)}" for s in compared])
        blocks.append(_chart(lambda: speedup_figure(record, summaries), f"Speedup: {described}"))
    if finished:
        described = joined([f"{label_of(s.row)} {seconds(s.median_s)}" for s in summaries])
        blocks.append(_chart(lambda: epoch_time_figure(record, summaries), f"Median time of an epoch: {described}"))
    else:
        blocks.append(Block("text", "No row has a time, so there is nothing to draw; the table says why."))
    blocks += [Block("heading", "Results", id=f"{part}-results"), Block("table", body=results_table(record))]
    if not any(row.peer for row in record.rows):
        blocks.append(Block("missing", "PyTorch in this run", "convbench run --peer torch"))
    blocks.append(Block("heading", "Loss", id=f"{part}-loss"))
    if finished:
        described = f"Loss over the epochs of {joined([label_of(row) for row in finished])}"
        blocks += [_chart(lambda: loss_figure(record, finished), described), Block("note", loss_sentence(finished))]
    else:
        blocks.append(Block("text", "No row finished, so there is no curve to show."))
    blocks.append(Block("heading", "Pictures before and after", id=f"{part}-pictures"))
    return blocks + _picture_blocks(record, finished)


def loss_sentence(rows: Sequence[RunRow]) -> str:
    """How far apart the losses of the rows are."""
    largest = largest_loss_difference(rows)
    if largest is None:
        return "No difference between curves is given: there is only one, or a loss that is not above zero."
    return f"The largest difference between two rows in any epoch is {largest:.2g} of the loss."


def largest_loss_difference(rows: Sequence[RunRow]) -> float | None:
    """The largest difference in an epoch that all rows have, as a share of the smaller loss.

    None with fewer than two rows, or with a loss that is not above zero.
    """
    epochs = list(zip(*(row.loss for row in rows), strict=False))
    if len(rows) < 2 or not epochs or min(map(min, epochs)) <= 0:
        return None
    return max((max(losses) - min(losses)) / min(losses) for losses in epochs)


def _picture_blocks(record: RunRecord, finished: Sequence[RunRow]) -> list[Block]:
    if record.originals_png is None and not any(row.reconstruction_png for row in record.rows):
        return [Block("missing", "This file holds no pictures", f"convbench run --device {record.rows[0].device}")]
    originals = checked_picture(record.originals_png)
    made = {label_of(row): checked_picture(row.reconstruction_png) for row in finished}
    shown = {label: picture for label, picture in made.items() if picture}
    if not originals or not shown:
        return [Block("text", "The pictures of this file are not shown: they are no PNG of a sensible size.")]
    blocks = [Block("picture", "originals", originals)]
    blocks += [Block("picture", f"{label}, after the last epoch", picture) for label, picture in shown.items()]
    lacking = [label for label in made if label not in shown]
    if lacking:
        blocks.append(Block("note", f"The file holds no pictures that can be shown of {joined(lacking)}."))
    return blocks


def layers_blocks(record: LayersRecord, part: str) -> list[Block]:
    """Charts and tables of a layers file, and the memory."""
    summaries = summarise_layers(record)
    blocks = []
    if summaries:
        names = joined([label_of(summary.row) for summary in summaries])
        described = f"Time of a training step by stage and direction, of {names}; the tables give every figure"
        blocks.append(_chart(lambda: layers_figure(record), described))
    else:
        blocks.append(Block("text", "No row has a time, so there is nothing to draw; the table says why."))
    blocks.append(Block("table", body=steps_table(record)))
    fastest = min((summary.step_s for summary in summaries), default=None)
    for summary in summaries:
        about = f"Every operation of {label_of(summary.row)}"
        blocks.append(Block("details", about, operations_table(summary), open=summary.step_s == fastest))
    if summaries:
        described = f"Roofline: speed over arithmetic intensity of every operation of {names}"
        blocks.append(Block("heading", "Roofline", id=f"{part}-roofline"))
        blocks.append(_chart(lambda: roofline_figure(record), described))
    blocks.append(Block("heading", "Memory", id=f"{part}-memory"))
    return [*blocks, Block("table", body=layer_memory_table(record))]


def kernels_blocks(record: KernelsRecord, part: str) -> list[Block]:
    """What the compilers say of the kernels."""
    return [Block("text", kernel_summary(record)), *(Block("table", body=table) for table in kernel_tables(record))]


def _chart(draw: Callable[[], Figure], description: str) -> Block:
    """Draw a figure in the colours of the light and of the dark page."""
    return Block("chart", body=Chart(*(_drawn(draw, **colours) for colours in (LIGHT, DARK)), description))


def _drawn(draw: Callable[[], Figure], ink: str, paper: str) -> str:
    colours = dict.fromkeys(INKED, ink) | {"figure.facecolor": paper, "axes.facecolor": paper}
    file = io.BytesIO()
    with plt.rc_context(STYLE | colours), warnings.catch_warnings():
        # The browser has the glyphs: text stays text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        # A chart with a single row has little to lay out.
        warnings.filterwarnings("ignore", message="constrained_layout not applied", category=UserWarning)
        figure = draw()
        # Tight: a long figure beside a bar may reach over the edge.
        figure.savefig(file, format="svg", bbox_inches="tight", pad_inches=0.03, metadata={"Date": None})
        plt.close(figure)
    svg = re.sub(rb"\d+\.\d{3,}", lambda number: b"%.2f" % float(number[0]), file.getvalue())
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


# Environment and settings ---------------------------------------------------------------------------------------------

PARTS = {"environment": "environment", "config": "settings", "ceilings": "ceilings", "conditions": "conditions"}
LEFT_OUT = ("command_line",)  # commands have a section of their own
NAMES = {"dirty": "changes since the commit", "cpu": "CPU", "gpu": "GPU", "python": "Python", "numba opt": "NUMBA_OPT"}


def facts_table(records: dict[str, Any]) -> Table:
    """Environment, settings, ceilings and conditions of every file, side by side."""
    facts: dict[str, dict[str, dict[str, str]]] = {heading: {} for heading in PARTS.values()}
    for name, record in records.items():
        document = json.loads(to_json(record))
        for other in document.get("other_ceilings", []):
            document["ceilings"][f"in {other['math']}"] = other
        for part, heading in PARTS.items():
            for key, value in _flattened(document.get(part) or {}).items():
                facts[heading].setdefault(key, {})[name] = value
    groups = []
    for heading, lines in facts.items():
        rows = [row(key, *(values.get(name, NOTHING) for name in records)) for key, values in lines.items()]
        groups.append(Group(rows, heading))
    notes = [f"{NOTHING}: not recorded, or not something that the command has."]
    shown = [Column(name, text=True) for name in ("", *records)]
    return Table("Environment and settings", shown, groups, notes)


def _flattened(mapping: dict[str, Any], above: str = "") -> dict[str, str]:
    """Values in words under their keys, those of a mapping within under both keys."""
    found: dict[str, str] = {}
    for key, value in mapping.items():
        if key in LEFT_OUT:
            continue
        if isinstance(value, dict):
            found |= _flattened(value, "" if key == "libraries" else f"{above}{key} ")
        else:
            name, words = _fact(key, value)
            name = f"{above}{name}".replace("_", " ")
            found[NAMES.get(name, name)] = words
    return found


UNITS = {
    "_flop_per_s": (1e9, "GFLOP/s"),
    "_bytes_per_s": (1e9, "GB/s"),
    "_bytes": (1e6, "MB"),
    "_share": (0.01, "%"),
    "_mhz": (1, "MHz"),
    "_c": (1, "°C"),
    "_w": (1, "W"),
}
"""The unit in which a field is shown, by the end of its name, and its size."""


def _fact(key: str, value: Any) -> tuple[str, str]:
    """A field's name without its unit, and its value with it."""
    suffix = next((suffix for suffix in UNITS if key.endswith(suffix)), "")
    size, unit = UNITS.get(suffix, (1, ""))
    if value is None:
        words = NOTHING
    elif isinstance(value, bool):
        words = "yes" if value else "no"
    elif isinstance(value, list):
        words = ", ".join(map(str, value)) or "none"
    elif isinstance(value, str) or key == "seed":
        words = str(value)
    else:
        words = f"{figure(value / size)} {unit}" if unit else f"{value:,}"
    return key.removesuffix(suffix), words
