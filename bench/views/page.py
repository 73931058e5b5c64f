"""One HTML page from results files: for readers who were not there when they were measured.

Any mix of files of ``convbench run``, ``layers`` and ``kernels`` goes in. Each gets its own section, headed by its
machine and date, because figures of different machines are not comparable. The page is self-contained: the charts are
inside it, it loads nothing and runs no script, and the same files give the same page, byte by byte.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bench.records import kernels, layers, run
from bench.records.documents import read_object
from bench.records.files import create_file, replace_file
from bench.views import page_parts
from bench.views.words import date, shortened
from common.errors import UsageError

SUFFIXES = (".html", ".htm")
METHOD = (
    "Every row was checked against a float64 reference before it was timed. Rows take turns, epoch by epoch or step by "
    "step. The clock of an epoch runs from the shuffle to the last synchronisation; the time of a row is the median.",
    "A speedup is the ratio of two medians of one run, on one device and in one arithmetic; its 95 % interval takes "
    "the n-th epochs of both rows together. Ceilings are a large matrix product, copy and read, timed on the same "
    "machine; a row that failed its checks, or is faster than the ceilings allow, has no time.",
)


@dataclass(frozen=True)
class Kind:
    """A kind of results file: how it is read and shown, and the command that writes one."""

    name: str
    title: str
    read: Callable[[Path], Any]
    parts: Callable[[Any], page_parts.Parts]
    command: str


RUN = Kind("run", "Training epochs", run.read_run, page_parts.run_parts, "run --device {device}")
LAYERS = Kind("layers", "Layers", layers.read_layers, page_parts.layers_parts, "layers --device {device}")
KERNELS = Kind("kernels", "Kernel resources", kernels.read_kernels, page_parts.kernels_parts, "kernels")
ORDER = (RUN, LAYERS, KERNELS)
KINDS = {
    run.SCHEMA: RUN,
    run.OLD_SCHEMA: RUN,
    layers.SCHEMA: LAYERS,
    kernels.SCHEMA: KERNELS,
    **dict.fromkeys(kernels.OLD_SCHEMAS, KERNELS),
}


@dataclass(frozen=True)
class Source:
    """A file that was read."""

    kind: Kind
    name: str
    """``run``, or ``run 2`` where there are several."""
    file: str
    record: Any


Section = tuple[str, str, str, page_parts.Parts]
"""Id, title, measurement settings, and contents."""


def write_report(files: list[Path], out: Path, *, force: bool = False) -> Path:
    """Write the page of results files to ``out``, whole or not at all; returns ``out``. UsageError if it cannot."""
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{out} is no name for a page: it must end in {' or '.join(SUFFIXES)}")
    resolved = [path.resolve() for path in files]
    for path in files:
        if resolved.count(path.resolve()) > 1:
            raise UsageError(f"{path} is given twice")
    if out.resolve() in resolved:
        raise UsageError(f"{out} is one of the files to be read")
    if os.path.lexists(out) and not force:
        raise UsageError(f"{out} exists; --force writes over it")
    text = render(read_sources(files))
    try:
        (replace_file if force else create_file)(out, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from error
    return out


def read_sources(files: list[Path]) -> list[Source]:
    """Read the files: runs first, then layers, then kernels, the oldest first. UsageError for any other file."""
    found = []
    for path in files:
        schema, _ = read_object(path)
        if schema not in KINDS:
            raise UsageError(f"{path} has schema {schema!r}; a report is made from {', '.join(KINDS)}")
        kind = KINDS[schema]
        record = kind.read(path)
        for row in record.rows if kind is not KERNELS else ():
            row.label = shortened(row.label)
        found.append((kind, path.name, record))
    sources = []
    for kind in ORDER:
        of_kind = sorted((item for item in found if item[0] is kind), key=lambda item: (item[2].started, item[1]))
        for i, (_, file, record) in enumerate(of_kind, 1):
            sources.append(Source(kind, kind.name if len(of_kind) == 1 else f"{kind.name} {i}", file, record))
    return sources


def render(sources: list[Source]) -> str:
    """The page's text; UsageError if a figure is too large or too small to be drawn."""
    environment = Environment(
        loader=PackageLoader("bench.views"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        sections = _sections(sources)
    except (ArithmeticError, ValueError) as error:
        raise UsageError(f"a figure in the files cannot be shown: {error}") from error
    measured = [source.record for source in sources if source.kind is not KERNELS]
    first, *others = {record.environment.machine for record in measured} or {"GPU kernels"}
    text = environment.get_template("report.html.j2").render(
        title=f"Convolution backends: {'several machines' if others else shortened(first)}",
        several=bool(others),
        sections=sections,
        light=page_parts.LIGHT,
        dark=page_parts.DARK,
    )
    return page_parts.printable(text)


def _sections(sources: list[Source]) -> list[Section]:
    """A section for every file, or for what no file has, and what all of them share."""
    device = "gpu" if any(source.record.environment.gpu for source in sources) else "cpu"
    sections: list[Section] = []
    commands: list[page_parts.Item] = []
    for kind in ORDER:
        found = [source for source in sources if source.kind is kind]
        for source in found:
            environment = source.record.environment
            title = kind.title if len(found) == 1 else f"{kind.title}, {source.name}"
            commit = f"commit {environment.commit}{', with changes' if environment.dirty else ''}"
            origin = f"{environment.machine} · {date(source.record.started)} · {commit} · {source.file}"
            sections.append((source.name.replace(" ", "-"), title, origin, kind.parts(source.record)))
            commands.append(("text", f"{source.name.capitalize()}, at {commit}:"))
            commands.append(("code", shlex.join(environment.command_line) or "not recorded"))
        if not found:
            command = f"convbench {kind.command.format(device=device)} --out results"
            sections.append((kind.name, kind.title, "", {"": [("missing", (kind.title, command))]}))
    page = shlex.join(["convbench", "report", *(source.file for source in sources), "--out", "PAGE.html"])
    facts = page_parts.facts_table({source.name: source.record for source in sources})
    return [
        *sections,
        ("facts", "Environment and settings", "", {"": [("table", facts)]}),
        ("method", "How it was measured", "", {"": [("text", text) for text in METHOD]}),
        ("commands", "Commands", "", {"": [*commands, ("text", "This page:"), ("code", page)]}),
    ]
