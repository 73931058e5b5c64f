"""What the page shows of a results file: under each heading a list of items, each drawn by one macro of the template.

An item is the macro's name and what it draws: a text, a table, a chart, a strip of pictures.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from bench.model import to_json
from bench.records.kernels import KernelsRecord
from bench.records.layers import LayersRecord, summarise_layers
from bench.records.run import RunRecord, RunRow, Summary, summarise
from bench.records.statistics import FEWEST_PAIRS, ratio_interval
from bench.views.charts import drawn, loss_figure, run_charts
from bench.views.kernel_tables import kernel_summary, kernel_tables
from bench.views.layer_charts import layers_charts
from bench.views.layer_tables import layer_memory_table, operations_table, steps_table
from bench.views.pictures import picture_uri
from bench.views.run_tables import results_table
from bench.views.table import NOTHING, Column, Group, Table, row
from bench.views.words import PRECISION_WORDS, figure, interval, label_of, seconds
from versions.registry import BASELINE

LIGHT = {"ink": "#1d1c1a", "paper": "#fbfaf7"}
DARK = {"ink": "#e8e5de", "paper": "#171614"}

Item = tuple[str, Any]
Parts = dict[str, list[Item]]
"""Items by heading; those under the empty heading come first."""

# Control characters, changes of direction, halves of a character.
UNPRINTABLE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]"


def run_parts(record: RunRecord) -> Parts:
    """The result in sentences, charts and table of a run, its losses and its pictures."""
    finished = [row for row in record.rows if row.finished]
    charts = [_chart(name, draw) for name, draw in run_charts(record).items()]
    parts = {
        "": [("lede", summary_text(record)), ("warnings", record.warnings), *charts],
        "Results": [("table", results_table(record))],
    }
    if not any(row.peer for row in record.rows):
        parts["Results"].append(("missing", ("PyTorch in this run", "convbench run --peer torch")))
    if finished:
        parts["Loss"] = [_chart("loss", lambda: loss_figure(record, finished))]
    difference = largest_loss_difference(finished)
    if difference is not None:
        words = f"The largest difference between two rows in any epoch is {difference:.2g} of the loss."
        parts["Loss"].append(("text", words))
    texts = {"originals": record.originals_png}
    texts |= {f"{label_of(row)}, after the last epoch": row.reconstruction_png for row in finished}
    strips = [("strip", (name, uri)) for name, text in texts.items() if (uri := picture_uri(text))]
    command = f"convbench run --device {record.rows[0].device}"
    parts["Pictures before and after"] = strips or [("missing", ("Pictures that can be shown", command))]
    return parts


def summary_text(record: RunRecord) -> str:
    """The fastest version of each arithmetic, and how much longer the second, the baseline and the best peer take."""
    sentences = []
    summaries = sorted(summarise(record.rows, BASELINE), key=lambda summary: summary.median_s)
    for precision in dict.fromkeys(measured.precision for measured in record.rows):
        asked = {row.backend for row in record.rows if row.precision == precision and not row.peer}
        group = [summary for summary in summaries if summary.row.precision == precision]
        versions = [summary for summary in group if not summary.row.peer]
        peers = [summary for summary in group if summary.row.peer]
        done = len({summary.row.backend for summary in versions})
        sentences.append(f"{done} of {len(asked)} versions finished in {PRECISION_WORDS.get(precision, precision)}.")
        for summary in group if versions else ():
            name, time = label_of(summary.row), seconds(summary.median_s)
            if summary is versions[0]:
                sentences.append(f"The fastest is {name}: an epoch of {record.config.samples:,} pictures takes {time}.")
            elif summary.is_baseline or summary in versions[1:2]:
                role = "the baseline" if summary.is_baseline else "the second"
                sentences.append(f"{name}, {role}, takes {time}, {_compared(summary, versions[0])}.")
            elif summary in peers[:1]:
                role = f"the fastest peer of {len(peers)}"
                sentences.append(f"{name}, {role}, takes {time}, {_compared(summary, versions[0])}.")
    if record.config.width != 1:
        sentences.append(f"The inner convolutions have {record.config.width:.10g} times the filters of the network.")
    if record.interrupted:
        sentences.append("The run was interrupted: rows may have fewer epochs than asked for.")
    return " ".join(sentences)


def _compared(other: Summary, fastest: Summary) -> str:
    """``7.07 times as long (95 % interval: 6.9-7.2)``."""
    bounds = ratio_interval(other.row.epoch_s, fastest.row.epoch_s, paired=True)
    sure = f"95 % interval: {interval(bounds)}" if bounds else f"no interval: it needs {FEWEST_PAIRS} epochs"
    if bounds and bounds[0] <= 1 <= bounds[1]:
        return f"which this run cannot tell apart ({sure})"
    return f"{figure(other.median_s / fastest.median_s)} times as long ({sure})"


def largest_loss_difference(rows: Sequence[RunRow]) -> float | None:
    """The largest difference in an epoch that all rows have, as a share of the smaller loss.

    None with fewer than two rows, or with a loss that is not above zero.
    """
    epochs = list(zip(*(row.loss for row in rows), strict=False))
    if len(rows) < 2 or min(map(min, epochs)) <= 0:
        return None
    return max((max(losses) - min(losses)) / min(losses) for losses in epochs)


def layers_parts(record: LayersRecord) -> Parts:
    """Charts and tables of a layers file, and the memory."""
    summaries = summarise_layers(record)
    charts = {name: [_chart(name, draw)] for name, draw in layers_charts(record).items()}
    fastest = min((summary.step_s for summary in summaries), default=None)
    tables = [("table", steps_table(record))]
    tables += [("details", (operations_table(summary), summary.step_s == fastest)) for summary in summaries]
    return {
        "": [("warnings", record.warnings), *charts.get("steps", []), *tables],
        "Roofline": charts.get("roofline", []),
        "Memory": [("table", layer_memory_table(record))],
    }


def kernels_parts(record: KernelsRecord) -> Parts:
    """What the compilers say of the kernels."""
    tables = [("table", table) for table in kernel_tables(record)]
    return {"": [("lede", kernel_summary(record)), ("warnings", record.faults), *tables]}


def _chart(name: str, draw: Callable[[], Figure]) -> Item:
    """A figure in the colours of the light and of the dark page, as data URIs; the browser shows one of them."""
    uris = []
    for colours in (LIGHT, DARK):
        svg = printable(drawn(draw, "svg", **colours).decode())
        uris.append("data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii"))
    return "chart", (name, *uris)


def printable(text: str) -> str:
    """The text without characters that a page or a drawing cannot hold."""
    return re.sub(UNPRINTABLE, "\ufffd", text)


# Environment and settings ---------------------------------------------------------------------------------------------

UNITS = {
    "_flop_per_s": (1e9, "GFLOP/s"),
    "_bytes_per_s": (1e9, "GB/s"),
    "_bytes": (1e6, "MB"),
    "_share": (0.01, "%"),
}
"""The unit in which a field is shown, by the end of its name, and its size."""


def facts_table(records: dict[str, Any]) -> Table:
    """Environment, settings, ceilings and conditions of every file, side by side."""
    groups = []
    documents = {name: json.loads(to_json(record)) for name, record in records.items()}
    for document in documents.values():
        document["other_ceilings"] = {other["math"]: other for other in document.get("other_ceilings", [])}
    for part in ("environment", "config", "ceilings", "other_ceilings", "conditions"):
        facts: dict[str, dict[str, str]] = {}
        for name, document in documents.items():
            for key, words in _flattened(document.get(part) or {}):
                facts.setdefault(key, {})[name] = words
        rows = [row(key, *(words.get(name, NOTHING) for name in records)) for key, words in facts.items()]
        groups.append(Group(rows, part.replace("_", " ")))
    notes = [f"{NOTHING}: not recorded, or not something that the command has."]
    return Table("Environment and settings", [Column(name, text=True) for name in ("", *records)], groups, notes)


def _flattened(facts: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Names and values in words; the name of a value within another one begins with that one's."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{above}{key} ")
        elif key != "command_line":  # commands have a section of their own
            suffix = next((suffix for suffix in UNITS if key.endswith(suffix)), "")
            yield f"{above}{key.removesuffix(suffix)}".replace("_", " "), _in_words(value, *UNITS.get(suffix, (1, "")))


def _in_words(value: Any, size: float, unit: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, str):
        return value
    return f"{figure(value / size)} {unit}" if unit else f"{value:,}"
