"""Charts and pictures of the report: matplotlib's SVG made part of a page, loss curves, checked PNG strips.

A figure is drawn in neutral colours that stand for others: what is black, white or grey becomes a variable of the
page's style sheet, so that one drawing serves a light and a dark page. Its text stays text, in the page's font.
Identifiers get a prefix of their own, since a page must not have the same one twice, and those that nothing refers to
are left out.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib.figure import Figure

from bench.records.run import Row, RunRecord
from bench.views.charts import COLOURS, STYLE, row_label

INK = "#010203"  # stands for the page's text colour, as plain black is also asked for on coloured ground
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
PAGE_STYLE = STYLE | dict.fromkeys(INKED, INK)
LONGEST_NAME = 44
NARROW_INCHES = 4.1
MARKERS = "osD^v<>PXph*"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MOST_PICTURE_BYTES = 512 * 1024
MOST_PICTURE_SIDES = (2048, 256)

_SVG = "{http://www.w3.org/2000/svg}"
_XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
_DROPPED = (f"{_SVG}metadata", f"{_SVG}style")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")


@contextlib.contextmanager
def page_colours() -> Iterator[None]:
    """Inside, figures are drawn in the colours that ``inline_svg`` turns into the page's."""
    with plt.rc_context(PAGE_STYLE), warnings.catch_warnings():
        # The browser has the glyphs: text stays text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        # A chart of one epoch, or of a machine's every version failing but one, has little to lay out.
        warnings.filterwarnings("ignore", message="constrained_layout not applied", category=UserWarning)
        yield


def inline_svg(figure: Figure, prefix: str, description: str) -> Markup:
    """Turn a figure into an ``<svg>`` element for a page, and close it.

    ``prefix`` is the page's own for this chart, ``description`` says in words what is drawn. Titles inside are taken
    out: a heading on the page says them.
    """
    file = io.StringIO()
    with page_colours():
        for axes in figure.axes:
            _untitle(axes)
        # Tight: a long figure beside a bar may reach over the edge.
        figure.savefig(
            file, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.03, metadata={"Date": None}
        )
    plt.close(figure)
    return Markup(svg_of_page(file.getvalue(), prefix, description))  # ElementTree escapes what it writes


def _untitle(axes: plt.Axes) -> None:
    """Take out title and subtitle, and let the lines of an axis label start where the axis does."""
    axes.set_title("", loc="left")
    for text in list(axes.texts):
        if text.get_transform() == axes.transAxes and text.get_position()[1] > 1:
            text.remove()
    if "\n" in axes.get_xlabel():  # set with one font and shown in another, several lines cannot be centred
        axes.xaxis.label.set(horizontalalignment="left", x=0)


def narrowed(figure: Figure) -> Figure:
    """The same bars for a narrow page: less wide, each with its name above it instead of beside it."""
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    for position, name in zip(axes.get_yticks(), names, strict=True):
        axes.text(0, position - 0.36, name, transform=axes.get_yaxis_transform(), va="bottom", fontsize=10)
    axes.set_yticklabels([""] * len(names))
    axes.set_ylim(len(names) - 0.6, -0.85)
    figure.set_size_inches(NARROW_INCHES, 1.15 * figure.get_size_inches()[1])
    return figure


def svg_of_page(svg: str, prefix: str, description: str) -> str:
    """Rewrite matplotlib's SVG for use inside HTML."""
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    for parent in root.iter():
        for child in [child for child in parent if child.tag in _DROPPED]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.tail = None
        if element.tag != "text":
            element.text = None
        _rewrite(element, used, prefix)
    for parent in root.iter():
        for child in [child for child in parent if child.tag in ("defs", "text") and not len(child) and not child.text]:
            parent.remove(child)
    width = float(root.attrib["viewBox"].split()[2])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": description, "style": f"max-width: {1.3 * width:.0f}px"}
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite(element: ElementTree.Element, used: set[str], prefix: str) -> None:
    """Give an element the page's identifiers, colours and font."""
    attributes = element.attrib
    identifier = attributes.pop("id", None)
    if identifier in used:
        attributes["id"] = prefix + identifier
    if _XLINK_HREF in attributes:
        attributes["href"] = "#" + prefix + attributes.pop(_XLINK_HREF).removeprefix("#")
    for name in ("clip-path", "style", "fill", "stroke"):
        if name in attributes:
            attributes[name] = attributes[name].replace("url(#", f"url(#{prefix}")
    for name in ("d", "x", "y", "transform", "points", "width", "height"):
        if name in attributes:
            text = _NUMBER.sub(lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), attributes[name])
            attributes[name] = " ".join(text.split())
    style = dict(part.split(": ", 1) for part in attributes.get("style", "").split("; ") if part)
    style.pop("font-family", None)
    if element.tag == "text":
        # Black, which SVG means by no fill, and white were chosen for the ground they stand on.
        fill = style.get("fill", "#000000")
        style["fill"] = fill if fill in ("#000000", "#ffffff") else _variable(fill)
    else:
        style = {name: _COLOUR.sub(lambda colour: _variable(colour[0]), value) for name, value in style.items()}
    if style:
        attributes["style"] = "; ".join(f"{name}: {value}" for name, value in style.items())


def _variable(colour: str) -> str:
    """Name the style sheet's variable for a neutral colour; any other stays as it is."""
    if colour in (INK, "#000000"):
        return "var(--ink)"
    if colour == "#ffffff":
        return "var(--paper)"
    return f"var(--grey-{colour[1:3]})" if colour[1:3] == colour[3:5] == colour[5:7] else colour


def greys(pages: str) -> list[int]:
    """The levels, 0 to 255, of the greys that the charts in a text ask for."""
    return sorted({int(level, 16) for level in re.findall(r"var\(--grey-([0-9a-f]{2})\)", pages)})


def mixed(level: int, ink: str, paper: str) -> str:
    """A grey of that level between a page's ink (0) and paper (255), as ``#rrggbb``."""
    parts = [(int(ink[i : i + 2], 16), int(paper[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(dark + (light - dark) * level / 255):02x}" for dark, light in parts)


def with_short_names(record: RunRecord) -> RunRecord:
    """The record with labels that a chart has room for."""
    return replace(record, rows=[replace(row, label=shortened(row.label)) for row in record.rows])


def shortened(text: str) -> str:
    """At most ``LONGEST_NAME`` characters on one line."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


# Loss ---------------------------------------------------------------------------------------------------------------


def loss_figure(rows: list[Row], width: float = 8) -> Figure:
    """Loss over epochs, ``width`` inches wide; curves on one another are told apart by width, dash and marker."""
    with plt.rc_context(PAGE_STYLE | {"axes.spines.left": True}):
        figure, axes = plt.subplots(figsize=(width, 3.9), layout="constrained")
        last = len(rows) - 1
        for i, row in enumerate(rows):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(
                range(len(row.loss)),
                row.loss,
                color=colour,
                linestyle=DASHES[i % len(DASHES)] if i else "-",
                linewidth=1.6 + 1.7 * (last - i),
                marker=MARKERS[i % len(MARKERS)],
                markersize=5.5 + 3.2 * (last - i),
                markerfacecolor="none" if i < last else colour,
                markeredgewidth=1.4,
                label=shortened(row_label(row)),
            )
        most = max(len(row.loss) for row in rows)
        step = -(-most // round(1.5 * width))
        ticks = list(range(0, most, step))
        axes.set_xticks(ticks, ["warm-up" if tick == 0 else str(tick) for tick in ticks])
        axes.set_xlabel("epoch")
        axes.set_ylabel("mean squared error")
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9.5, handlelength=3.6, labelspacing=0.9)
    return figure


@dataclass(frozen=True)
class LossDifference:
    """Where two rows' losses lie furthest apart, as a share of the smaller."""

    share: float
    first: Row
    second: Row
    epoch: int
    """0 is the warm-up."""


def largest_loss_difference(rows: list[Row]) -> LossDifference | None:
    """Over every epoch that all rows have; None with fewer than two rows, or where a loss is not above zero."""
    found = None
    epochs = min((len(row.loss) for row in rows), default=0)
    for epoch in range(epochs if len(rows) > 1 else 0):
        ordered = sorted(rows, key=lambda row: row.loss[epoch])
        low, high = ordered[0], ordered[-1]
        if low.loss[epoch] <= 0:
            return None
        share = (high.loss[epoch] - low.loss[epoch]) / low.loss[epoch]
        if found is None or share > found.share:
            found = LossDifference(share, low, high, epoch)
    return found


# Pictures -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A PNG that may stand on a page."""

    uri: str
    width: int
    height: int


def checked_picture(text: str | None) -> Picture | None:
    """The picture of a base64 text; None if that is no PNG, or one of a size that no strip of pictures has."""
    if text is None or len(text) > 2 * MOST_PICTURE_BYTES:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(data) > MOST_PICTURE_BYTES or len(data) < 33 or not data.startswith(PNG_MAGIC) or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", data[16:24])
    if not (0 < width <= MOST_PICTURE_SIDES[0] and 0 < height <= MOST_PICTURE_SIDES[1]):
        return None
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            warnings.simplefilter("ignore")
            image.load()
    except Exception:  # whatever is wrong with it, it is not shown
        return None
    return Picture("data:image/png;base64," + base64.b64encode(data).decode("ascii"), width, height)


def file_name(path: Path) -> str:
    """A file's name as a page can show it."""
    return clean(path.name)


_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]"
)  # control characters, changes of direction, halves of a character


def clean(value: Any) -> Any:
    """The value with every character replaced, in any text in it, that a page or a chart cannot hold."""
    if isinstance(value, str):
        return _UNSHOWN.sub("\ufffd", value)
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value
