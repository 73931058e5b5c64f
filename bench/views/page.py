"""One HTML page from results files: for readers who were not there when they were measured.

Any mix of files of ``convbench run``, ``layers`` and ``kernels`` goes in. Each gets its own part, headed by its machine
and date, because figures of different machines are not comparable. The page is self-contained: the charts are inside
it, it loads nothing and runs no script, and the same files give the same page, byte by byte.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bench.model import from_json, to_json
from bench.records import kernels, layers, run
from bench.records.documents import read_bytes, read_object, schema_of
from bench.records.files import create_file, replace_file
from bench.views import page_parts
from bench.views.page_parts import Block, Section
from bench.views.page_words import summary_paragraphs
from bench.views.words import date, shortened
from common.errors import UsageError

SUFFIXES = (".html", ".htm")
KINDS = {
    run.SCHEMA: "run",
    run.OLD_SCHEMA: "run",
    layers.SCHEMA: "layers",
    kernels.SCHEMA: "kernels",
    kernels.OLD_SCHEMA: "kernels",
}


@dataclass(frozen=True)
class Kind:
    """A kind of results file: how it is read and drawn, and what the page says if there is none."""

    title: str
    read: Callable[[Path], Any]
    blocks: Callable[[Any, str], list[Block]]
    missing: str
    command: str


PARTS = {
    "run": Kind(
        "Training epochs",
        run.read_run,
        page_parts.run_blocks,
        "Epoch times, speedup, loss and pictures",
        "convbench run --device {device} --out results",
    ),
    "layers": Kind(
        "Layers",
        layers.read_layers,
        page_parts.layers_blocks,
        "The operations of a training step, ceilings and memory",
        "convbench layers --device {device} --out results",
    ),
    "kernels": Kind(
        "Kernel resources",
        kernels.read_kernels,
        page_parts.kernels_blocks,
        "Registers, spills, memory and occupancy of the GPU kernels",
        "convbench kernels --out results",
    ),
}


@dataclass(frozen=True)
class Source:
    """A file that was read."""

    kind: str
    name: str
    """``run``, or ``run 2`` where there are several."""
    file: str
    record: Any

    @property
    def id(self) -> str:
        """For anchors on the page."""
        return self.name.replace(" ", "-")

    @property
    def where(self) -> str:
        """The machine; for kernels, which no machine has run, their targets."""
        if self.kind == "kernels":
            return f"compiled for {', '.join(self.record.config.targets)}"
        return self.record.environment.machine

    @property
    def heading(self) -> str:
        """Machine and date."""
        return f"{self.where}, {date(self.record.started)}"

    @property
    def commit(self) -> str:
        """The commit; says so if the code differed from it."""
        environment = self.record.environment
        return f"{environment.commit}{', with changes' if environment.dirty else ''}"

    @property
    def command(self) -> str:
        """The command line as a shell takes it; empty if it is not recorded."""
        return shlex.join(self.record.environment.command_line)

    @property
    def warnings(self) -> list[str]:
        """Warnings of a measurement, or the faults of kernels."""
        return self.record.faults if self.kind == "kernels" else self.record.warnings

    @property
    def machine(self) -> tuple[str, int, int, str]:
        """Equal for two files of one machine."""
        environment = self.record.environment
        return environment.cpu, environment.cores, environment.threads, environment.gpu.name if environment.gpu else ""


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
    if out.is_dir():
        raise UsageError(f"cannot write {out}: it is a folder")
    if os.path.lexists(out) and not force:
        raise UsageError(f"{out} exists; --force writes over it")
    if not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: there is no folder {out.parent}")
    text = render(read_sources(files))
    try:
        (replace_file if force else create_file)(out, text.encode())
    except FileExistsError:
        raise UsageError(f"{out} exists; --force writes over it") from None
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from error
    return out


# Reading --------------------------------------------------------------------------------------------------------------


def read_sources(files: list[Path]) -> list[Source]:
    """Read the files: runs first, then layers, then kernels, the oldest first. UsageError for any other file."""
    found = []
    for path in files:
        kind = _kind_of(path)
        found.append((kind, _clean(path.name), _shown(PARTS[kind].read(path), path)))
    kinds = list(PARTS)
    found.sort(key=lambda item: (kinds.index(item[0]), item[2].started, item[1]))
    sources = []
    for kind, file, record in found:
        number = sum(source.kind == kind for source in sources) + 1
        several = sum(other == kind for other, _, _ in found) > 1
        sources.append(Source(kind, f"{kind} {number}" if several else kind, file, record))
    return sources


def _kind_of(path: Path) -> str:
    """The kind of a file, by the schema it names."""
    known = ", ".join(KINDS)
    data = read_bytes(path)
    if {"benchmarks", "machine_info"} <= read_object(path, data).keys():
        raise UsageError(f"{path} is a file of pytest-benchmark, which has no part in a report; known are {known}")
    schema = schema_of(path, data)
    if schema not in KINDS:
        raise UsageError(f"{path} has schema {schema!r}; a report is made from {known}")
    return KINDS[schema]


_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]"
)  # control characters, changes of direction, halves of a character


def _shown(record: Any, path: Path) -> Any:
    """The record with texts that a page and a chart can hold."""
    document = _clean(json.loads(to_json(record)))
    for row in document["rows"]:
        if "label" in row:
            row["label"] = shortened(row["label"])
    return from_json(type(record), json.dumps(document).encode(), path)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _UNSHOWN.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


# The page -------------------------------------------------------------------------------------------------------------


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
        sections = _sections(sources)
    except OverflowError as error:
        raise UsageError(f"a figure in the files is too large to be shown: {error}") from error
    measured = [source for source in sources if source.kind != "kernels"]
    machines = {source.machine for source in measured}
    subject = (measured or sources)[0].where if len(machines) < 2 else f"{len(machines)} machines or settings"
    runs = [source for source in sources if source.kind == "run"]
    return environment.get_template("report.html.j2").render(
        title=f"Convolution backends: {shortened(subject)}",
        sources=sources,
        summaries=[(source, summary_paragraphs(source.record)) for source in runs],
        sections=sections,
        machines=len(machines),
        light=page_parts.LIGHT,
        dark=page_parts.DARK,
    )


def _sections(sources: list[Source]) -> list[Section]:
    """The parts of every file, in order, and what all of them share."""
    device = next((_device(source) for source in sources if source.kind != "kernels"), "cpu")
    sections = []
    for name, kind in PARTS.items():
        found = [source for source in sources if source.kind == name]
        for source in found:
            title = f"{kind.title}, {source.name}" if len(found) > 1 else kind.title
            origin = f"{source.heading} · commit {source.commit} · {source.file}"
            sections.append(Section(source.id, title, kind.blocks(source.record, source.id), origin))
        if not found:
            missing = Block("missing", kind.missing, kind.command.format(device=device))
            sections.append(Section(name, kind.title, [missing]))
    facts = [Block("table", body=page_parts.facts_table({source.name: source.record for source in sources}))]
    lacking = [source for source in sources if source.kind != "kernels" and source.record.ceilings is None]
    facts += [Block("missing", f"Ceilings of the {source.name} file", "convbench run") for source in lacking]
    return [*sections, Section("facts", "Environment and settings", facts)]


def _device(source: Source) -> str:
    """``cpu`` or ``gpu``: where a file was measured."""
    device = source.record.rows[0].device
    return device if device in ("cpu", "gpu") else "cpu"
