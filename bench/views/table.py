"""The one table model, and how it is drawn on a terminal and in Markdown. The page's template draws it as HTML."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

Tone = Literal["", "good", "bad", "warning", "quiet"]
STYLES = {"": "", "good": "green", "bad": "bold red", "warning": "yellow", "quiet": "dim"}
NOTHING = "-"
"""Stands where there is nothing to measure."""


@dataclass(frozen=True)
class Cell:
    """One cell, which takes ``span`` columns."""

    text: str
    below: str = ""
    """A second, smaller line; with a span, the long form, which has no room on a terminal."""
    tone: Tone = ""
    span: int = 1


@dataclass(frozen=True)
class Column:
    """A column's header, which may have a line break, and whether its cells are texts or figures."""

    header: str
    text: bool = False
    fold: int | None = None
    """The most characters a line of it has on a terminal."""


@dataclass(frozen=True)
class Row:
    """A line of cells; the first one names the row."""

    cells: tuple[Cell, ...]
    strong: bool = False


@dataclass(frozen=True)
class Group:
    """Rows that belong together, under a heading where there is one."""

    rows: list[Row]
    heading: str = ""


@dataclass(frozen=True)
class Table:
    """A caption, the columns, groups of rows, and notes below."""

    caption: str
    columns: list[Column]
    groups: list[Group]
    notes: list[str] = field(default_factory=list)
    tight: bool = False
    """Whether a terminal has one space between columns rather than two."""


def row(*cells: str | Cell, strong: bool = False) -> Row:
    """A row of cells, texts among them as they are."""
    return Row(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells), strong)


def columns(words: str, figures: Iterable[str], fold: int | None = None) -> list[Column]:
    """The column that names the rows, and columns of figures."""
    return [Column(words, text=True, fold=fold), *map(Column, figures)]


def to_rich(table: Table) -> RenderableType:
    """The table for a rich console: title above, notes below, no line wrapped inside a word."""
    drawn = RichTable(
        title=Text(table.caption, style="italic") if table.caption else None,
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 0 if table.tight else 1, 0, 0),
        pad_edge=False,
    )
    for column in table.columns:
        # Text may fold at spaces; a figure must stay in one piece.
        drawn.add_column(
            Text(column.header),
            justify="left" if column.text else "right",
            no_wrap=not column.text,
            max_width=column.fold,
            overflow="fold",
        )
    for group in table.groups:
        drawn.add_section()
        if group.heading:
            drawn.add_row(Text(group.heading, style="bold"))
        for line in group.rows:
            cells: list[Text] = []
            for cell in line.cells:
                cells += _rich_cells(cell, table.columns[len(cells)].fold)
            drawn.add_row(*cells, style="bold" if line.strong else "")
    return Lines(drawn, *(Text(note, style="dim") for note in table.notes))


def _rich_cells(cell: Cell, fold: int | None) -> list[Text]:
    text = Text(_folded(cell.text, fold), style=STYLES[cell.tone])
    if cell.below and cell.span == 1:
        text.append(f"\n{_folded(cell.below, fold)}", style=STYLES[cell.tone] or "dim")
    return [text, *[Text(NOTHING)] * (cell.span - 1)]


def _folded(text: str, width: int | None) -> str:
    """The text in lines of at most ``width`` characters, cut at spaces and after hyphens; a longer word stays whole."""
    return textwrap.fill(text, width, break_long_words=False) if width else text


def to_markdown(table: Table) -> str:
    """The table's columns and rows as Markdown, without caption and notes."""
    lines = [
        f"| {' | '.join(plain(column.header) for column in table.columns)} |",
        f"|{'|'.join('---' if column.text else '---:' for column in table.columns)}|",
    ]
    for group in table.groups:
        for line in group.rows:
            cells = [text for cell in line.cells for text in _markdown_cells(cell)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _markdown_cells(cell: Cell) -> list[str]:
    below = f": {cell.below}" if cell.span > 1 else f" ({cell.below})"
    return [plain(cell.text + below if cell.below else cell.text), *[NOTHING] * (cell.span - 1)]


def plain(text: str) -> str:
    """Text that Markdown takes as it is, on one line of a table."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(str(text).split()))
