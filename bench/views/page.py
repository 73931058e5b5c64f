"""One HTML page from results files: what a person reads who was not there.

Any mix of files of ``convbench run``, ``layers`` and ``kernels`` goes in. Each gets a part of its own, headed by its
machine and date, since figures of different machines say nothing about each other. What no file has is said to be not
measured, with the command that would measure it. The page is whole in itself: drawings are inside it, it loads nothing
and runs nothing, and the same files give the same page.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bench.records import kernels as kernel_records
from bench.records import layers
from bench.records import run as records
from bench.records.files import create_file, replace_file
from bench.records.run import Row, RunRecord, summarise
from bench.records.statistics import FEWEST_PAIRS
from bench.views.charts import epoch_time_figure, row_label, speedup_figure
from bench.views.layer_charts import layer_label, layers_figure, roofline_figure
from bench.views.page_charts import (
    NARROW_INCHES,
    Picture,
    checked_picture,
    clean,
    file_name,
    greys,
    inline_svg,
    largest_loss_difference,
    loss_figure,
    mixed,
    narrowed,
    page_colours,
    shortened,
    with_short_names,
)
from bench.views.page_tables import (
    NOTHING,
    Table,
    buffers_table,
    finished_layers,
    kernel_sentence,
    kernel_tables,
    memory_table,
    operations_table,
    results_table,
    side_by_side,
    steps_table,
)
from bench.views.page_words import (
    date_words,
    joined,
    loss_sentence,
    machine_words,
    milliseconds,
    percent,
    ratio,
    reason,
    seconds,
    summary_paragraphs,
)
from common.errors import UsageError
from versions.registry import BASELINE

SUFFIXES = (".html", ".htm")
KINDS: dict[str, str] = {
    records.SCHEMA: "run",
    records.OLD_SCHEMA: "run",
    layers.SCHEMA: "layers",
    kernel_records.SCHEMA: "kernels",
}
READERS: dict[str, Callable[[Path], Any]] = {
    "run": records.read_record,
    "layers": layers.read_layers,
    "kernels": kernel_records.read_kernels,
}

# Ink and paper of the light and of the dark page; the greys of the charts lie between them.
LIGHT = {"ink": "#1d1c1a", "paper": "#fbfaf7"}
DARK = {"ink": "#e8e5de", "paper": "#171614"}


@dataclass(frozen=True)
class Source:
    """A file that was read; ``record`` is a RunRecord for a run and the file's mapping otherwise."""

    kind: str
    name: str
    """``run``, or ``run 2`` where there are several."""
    file: str
    record: Any

    def part(self, name: str) -> Any:
        """``environment``, ``config`` and the like, whichever kind it is."""
        return getattr(self.record, name, None) if isinstance(self.record, RunRecord) else self.record.get(name)

    @property
    def id(self) -> str:
        """For anchors on the page."""
        return self.name.replace(" ", "-")

    @property
    def heading(self) -> str:
        """Machine and date; for kernels, which no machine has run, their targets."""
        date = date_words(self.part("started"))
        if self.kind == "kernels":
            return f"compiled for {', '.join(self.part('config')['targets'])}, {date}"
        return f"{machine_words(self.part('environment'))}, {date}"

    @property
    def shuffled(self) -> bool:
        """Whether its rows were timed in an order of its own each time; older files' were in a fixed one."""
        return bool(self.part("order"))

    @property
    def commit(self) -> str:
        """With a word where the code was not the commit's."""
        environment = self.part("environment")
        return f"{environment['commit']}{', with changes' if environment.get('dirty') else ''}"

    @property
    def command(self) -> str | None:
        """The command line as a shell takes it; None where it is not recorded."""
        command = self.part("environment").get("command_line")
        if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
            return None
        return shlex.join(command)

    @property
    def machine(self) -> tuple[str, ...]:
        """What has to be equal for two files to be of one machine."""
        environment = self.part("environment")
        gpu = (environment.get("gpu") or {}).get("name", "")
        return (environment["cpu"], str(environment.get("cores")), str(environment["threads"]), gpu)


@dataclass
class Chart:
    """A drawing, the sentence under it, and the same drawing for a narrow page where that is another one."""

    svg: Markup
    caption: str
    narrow: Markup | None = None

    @property
    def drawings(self) -> str:
        """All that is drawn."""
        return self.svg + (self.narrow or "")


@dataclass
class RunPart:
    """What the page shows of a run; a chart that is None is replaced by its ``why`` sentence."""

    source: Source
    paragraphs: list[str]
    results: Table
    speedup: Chart | None
    speedup_why: str
    epochs: Chart | None
    loss: Chart | None
    loss_words: str
    originals: Picture | None
    reconstructions: list[tuple[str, Picture]]
    pictures_why: str
    has_peers: bool


@dataclass
class LayersPart:
    """What the page shows of a layers file."""

    source: Source
    steps: Table
    operations: list[tuple[str, Table, bool]]
    """With a line that says what is in it, and whether it is the fastest's."""
    where: Chart | None
    roofline: Chart | None
    memory: Table
    buffers: list[tuple[str, Table]]


@dataclass
class Page:
    """Everything that the template asks for."""

    title: str
    sources: list[Source]
    runs: list[RunPart]
    layers: list[LayersPart]
    kernels: list[tuple[Source, str, list[Table]]]
    environment: Table
    settings: list[Table] = field(default_factory=list)
    machines: int = 1
    device: str = "cpu"
    light: dict[str, str] = field(default_factory=dict)
    dark: dict[str, str] = field(default_factory=dict)


def write_report(files: list[Path], out: Path, *, force: bool = False) -> Path:
    """Write the page of some results files to ``out``, whole or not at all; returns ``out``.

    UsageError if a file is not a results file or is given twice, if ``out`` is no name for a page or cannot be written,
    or if it exists and ``force`` is not set.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{out} is no name for a page: it must end in {' or '.join(SUFFIXES)}")
    resolved = [path.resolve() for path in files]
    for path, full in zip(files, resolved, strict=True):
        if resolved.count(full) > 1:
            raise UsageError(f"{path} is given twice")
    if out.resolve() in resolved:
        raise UsageError(f"{out} is one of the files to be read")
    _check_target(out, force=force)
    text = render(read_sources(files))
    _write(text, out, force=force)
    return out


def _check_target(out: Path, *, force: bool) -> None:
    """Fail before anything is drawn rather than afterwards."""
    if out.is_dir():
        raise UsageError(f"cannot write {out}: it is a folder")
    if os.path.lexists(out) and not force:
        raise UsageError(f"{out} exists; --force writes over it")
    if not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: there is no folder {out.parent}")


def _write(text: str, out: Path, *, force: bool) -> None:
    try:
        (replace_file if force else create_file)(out, text.encode())
    except FileExistsError:
        raise UsageError(f"{out} exists; --force writes over it") from None
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from error


# Reading ------------------------------------------------------------------------------------------------------------


def read_sources(files: list[Path]) -> list[Source]:
    """Read the files: runs first, then layers, then kernels, the oldest first. UsageError for any other file."""
    found: list[tuple[str, str, Any]] = []
    for path in files:
        try:
            kind = _kind_of(path)
            record = _cleaned(READERS[kind](path))
        except RecursionError as error:
            raise UsageError(f"{path} is not a valid results file: {error}") from error
        found.append((kind, file_name(path), record))
    kinds = list(READERS)
    found.sort(key=lambda item: (kinds.index(item[0]), _started(item[2]), item[1]))
    sources = []
    for kind, file, record in found:
        number = sum(source.kind == kind for source in sources) + 1
        several = sum(other == kind for other, _, _ in found) > 1
        sources.append(Source(kind, f"{kind} {number}" if several else kind, file, record))
    return sources


def _kind_of(path: Path) -> str:
    """Which kind of file it is, by the schema it names."""
    known = ", ".join(KINDS)
    data = records.read_json_object(path)
    if records.is_pytest_benchmark(data):
        raise UsageError(f"{path} is a file of pytest-benchmark, which has no part in a report; known are {known}")
    schema = records.named_schema(path, data)
    if not isinstance(schema, str) or schema not in KINDS:
        raise UsageError(f"{path} has schema {schema!r}; a report is made from {known}")
    return KINDS[schema]


def _cleaned(record: Any) -> Any:
    if not isinstance(record, RunRecord):
        return clean(record)
    fields = clean(asdict(record))
    return RunRecord(**fields | {"rows": [Row(**row) for row in fields["rows"]]})


def _started(record: Any) -> str:
    return str(record.started if isinstance(record, RunRecord) else record["started"])


# The page -----------------------------------------------------------------------------------------------------------


def render(sources: list[Source]) -> str:
    """The page's text; UsageError if a figure in it is too large for any page."""
    environment = Environment(
        loader=PackageLoader("bench.views"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shell"] = shlex.quote
    try:
        page = make_page(sources)
    except OverflowError as error:  # JSON has integers of any size
        raise UsageError(f"a figure in the files is too large to be shown: {error}") from error
    levels = greys("".join(chart.drawings for part in (*page.runs, *page.layers) for chart in _charts(part)))
    page.light = LIGHT | {f"grey-{level:02x}": mixed(level, **LIGHT) for level in levels}
    page.dark = DARK | {f"grey-{level:02x}": mixed(level, **DARK) for level in levels}
    return environment.get_template("report.html.j2").render(page=page, fewest_pairs=FEWEST_PAIRS)


def _charts(part: RunPart | LayersPart) -> list[Chart]:
    found = (part.speedup, part.epochs, part.loss) if isinstance(part, RunPart) else (part.where, part.roofline)
    return [chart for chart in found if chart is not None]


def make_page(sources: list[Source]) -> Page:
    """Everything the page shows, in words and drawings."""
    measured = [source for source in sources if source.kind != "kernels"]
    first = next((source for source in measured), sources[0])
    runs = [source for source in sources if source.kind == "run"]
    device = next(
        (row.device for source in runs for row in source.record.rows),
        next((source.record["config"]["device"] for source in measured if source.kind == "layers"), "cpu"),
    )
    machines = len({source.machine for source in measured})
    subject = machine_words(first.part("environment")) if measured else first.heading
    if machines > 1:
        subject = f"{machines} machines or settings"
    return Page(
        title=f"Convolution backends: {shortened(subject)}",
        sources=sources,
        runs=[_run_part(source) for source in runs],
        layers=[_layers_part(source) for source in sources if source.kind == "layers"],
        kernels=[
            (source, kernel_sentence(source.record), kernel_tables(source.record))
            for source in sources
            if source.kind == "kernels"
        ],
        environment=side_by_side("Environment of each file", {source.name: _environment(source) for source in sources}),
        settings=_settings(sources),
        machines=machines,
        device=device if device in ("cpu", "gpu") else "cpu",
    )


def _environment(source: Source) -> dict[str, Any]:
    environment = source.part("environment")
    return {name: value for name, value in environment.items() if name != "command_line"}


def _settings(sources: list[Source]) -> list[Table]:
    configs = {source.name: source.part("config") for source in sources}
    tables = [side_by_side("Settings of each file", configs, absent=NOTHING)]
    measured = [source for source in sources if source.kind != "kernels"]
    ceilings = {source.name: source.part("ceilings") for source in measured if source.part("ceilings")}
    for source in measured:
        for other in source.part("other_ceilings") or []:
            ceilings[f"{source.name}, {other['math']}"] = other
    if ceilings:
        tables.append(side_by_side("Ceilings, measured in the same run", ceilings))
    conditions = {source.name: source.part("conditions") for source in measured if source.part("conditions")}
    if conditions:
        tables.append(side_by_side("Conditions before and after", conditions))
    return tables


def _run_part(source: Source) -> RunPart:
    record = with_short_names(source.record)
    summaries = summarise(record.rows, BASELINE)
    finished = [summary.row for summary in summaries]
    compared = [summary for summary in summaries if summary.speedup is not None]
    speedup = epochs = loss = None
    with page_colours():
        if len(compared) > 1:
            base = next(row_label(summary.row) for summary in compared if summary.is_baseline)
            described = joined([f"{row_label(s.row)} {ratio(s.speedup)}" for s in compared])
            speedup = _bars(
                lambda: speedup_figure(record, summaries),
                f"{source.id}-speedup-",
                f"Bar chart of the speedup over {base}: {described}",
                f"How many times as fast as {base} each row trains an epoch: the ratio of their medians.",
            )
        if summaries:
            described = joined([f"{row_label(s.row)} {seconds(s.median_s)}" for s in summaries])
            epochs = _bars(
                lambda: epoch_time_figure(record, summaries),
                f"{source.id}-epochs-",
                f"Bar chart of the median time of an epoch: {described}",
                "Every dot is an epoch that was run; the bar is their median and the line their range.",
            )
            described = f"Line chart of the loss over the epochs of {joined([row_label(row) for row in finished])}"
            loss = Chart(
                inline_svg(loss_figure(finished), f"{source.id}-loss-", described),
                "The first row's curve is the widest, and each one after it narrower, so that those that lie on one"
                " another can all be seen.",
                inline_svg(loss_figure(finished, NARROW_INCHES), f"narrow-{source.id}-loss-", described),
            )
    originals = checked_picture(record.originals_png)
    reconstructions = [(row_label(row), checked_picture(row.reconstruction_png)) for row in finished]
    shown = [(label, picture) for label, picture in reconstructions if picture is not None]
    why = ""
    texts = [record.originals_png, *(row.reconstruction_png for row in finished)]
    if originals is None or not shown:
        why = "unusable" if any(text is not None for text in texts) else "missing"
    elif len(shown) < len(reconstructions):
        lacking = [label for label, picture in reconstructions if picture is None]
        why = f"There are no pictures that can be shown of {joined(lacking)}."
    return RunPart(
        source=source,
        paragraphs=summary_paragraphs(record),
        results=results_table(record),
        speedup=speedup,
        speedup_why=_no_speedup(record, finished),
        epochs=epochs,
        loss=loss,
        loss_words=loss_sentence(finished, largest_loss_difference(finished)) if finished else "",
        originals=originals,
        reconstructions=shown,
        pictures_why=why,
        has_peers=any(row.peer for row in record.rows),
    )


def _bars(draw: Callable[[], Figure], prefix: str, description: str, caption: str) -> Chart:
    """A bar chart, drawn for a wide and for a narrow page."""
    narrow = inline_svg(narrowed(draw()), f"narrow-{prefix}", description)
    return Chart(inline_svg(draw(), prefix, description), caption, narrow)


def _no_speedup(record: RunRecord, finished: list[Row]) -> str:
    if not finished:
        return f"No row has a time: {'; '.join(f'{row_label(row)}: {reason(row)}' for row in record.rows)}."
    return "No two rows finished on one device and in one arithmetic, so there is nothing to compare."


def _layers_part(source: Source) -> LayersPart:
    record = source.record
    short = record | {"rows": [row | {"label": shortened(row["label"])} for row in record["rows"]]}
    summaries = layers.summarise_layers(short)
    where = roofline = None
    if finished_layers(short):
        with page_colours():
            described = joined([f"{layer_label(s.row)} {milliseconds(s.step_s)}" for s in summaries])
            where = Chart(
                inline_svg(
                    layers_figure(short),
                    f"{source.id}-steps-",
                    f"Stacked bars of a training step by stage and direction: {described}",
                ),
                "Above in milliseconds, below as shares of each version's own step. What the operations do not account"
                " for is overhead, and drawn as such.",
            )
            roofline = Chart(
                inline_svg(
                    roofline_figure(short),
                    f"{source.id}-roofline-",
                    f"Roofline chart: speed over arithmetic intensity of every operation of {len(summaries)} versions,"
                    " under the measured ceilings",
                ),
                "The nearer to the line, the nearer to what this machine was measured to do. FLOPs and bytes are the"
                " least that the result needs, whoever computes it.",
            )
    operations = []
    fastest = min((summary.step_s for summary in summaries), default=None)
    for summary in summaries:
        share = summary.flops / summary.step_s / summary.ceilings.gemm_flop_per_s
        line = f"{milliseconds(summary.step_s)} a step, {percent(share)} of the ceiling"
        operations.append((f"{layer_label(summary.row)}: {line}", operations_table(summary), summary.step_s == fastest))
    buffers = []
    for row in short["rows"]:
        total = sum(buffer["bytes"] for buffer in row["memory"]["planned"])
        line = f"{len(row['memory']['planned'])} buffers, {total / 1e6:,.1f} MB"
        buffers.append((f"{layer_label(row)}: {line}", buffers_table(row)))
    return LayersPart(source, steps_table(short, summaries), operations, where, roofline, memory_table(short), buffers)
