"""Figures in words: the one place that decides how many digits a time, a ratio or a size has."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from bench.records.rows import VersionRow
from bench.views.table import NOTHING

PRECISION_WORDS = {"fp32": "float32", "tf32": "TF32"}
LONGEST_NAME = 44


def seconds(value: float) -> str:
    """A time with three figures, in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{figure(value / size)} {unit}"
    return f"{figure(value / 1e-9)} ns"


def duration(value: float) -> str:
    """A length of time in its two largest units: ``2 h 1 min``."""
    whole = round(value)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def figure(value: float) -> str:
    """Three figures, or all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(value: float) -> str:
    """A speedup, as ``figure`` writes it."""
    return figure(value)


def interval(bounds: tuple[float, float]) -> str:
    """``3.26-3.39``."""
    return f"{figure(bounds[0])}-{figure(bounds[1])}"


def percent(share: float) -> str:
    """A share in whole per cent."""
    return f"{100 * share:,.0f} %"


def fine_percent(share: float) -> str:
    """A share in tenths of a per cent."""
    return f"{100 * share:,.1f} %"


def megabytes(size: int | None, digits: int = 1) -> str:
    """Millions of bytes; ``not measured`` for None."""
    return "not measured" if size is None else f"{size / 1e6:,.{digits}f}"


def optional(value: float | None) -> str:
    """Three figures, or a dash where there is nothing to measure."""
    return NOTHING if value is None else figure(value)


def span(values: Sequence[float], unit: str = "") -> str:
    """The one value, or the smallest and the largest: ``64`` or ``64-256``."""
    low, high = min(values), max(values)
    return f"{low:,}{unit}" if low == high else f"{low:,}-{high:,}{unit}"


def date(started: str) -> str:
    """``24 November 2026, 01:41 UTC``; the text itself if it is no such time."""
    try:
        when = datetime.strptime(started, "%Y-%m-%dT%H%M%SZ")
    except ValueError:
        return started
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def network_of(width: float) -> str:
    """``width 0.5``; nothing for width 1, which is the network."""
    return "" if width == 1 else f"width {width:.10g}"


def label_of(row: VersionRow) -> str:
    """A row's label; a second row of a backend has its number, and TF32 is named."""
    repeat = f", row {row.id.partition('#')[2]}" if "#" in row.id else ""
    return f"{row.label}{repeat}{', TF32' if row.precision == 'tf32' else ''}"


def why_no_time(row: VersionRow) -> str:
    """The reason why a row has no time."""
    return row.reason.rstrip(".") or ("it was timed for no epoch or step" if row.verified else "it was not verified")


def shortened(text: str) -> str:
    """The text on one line, cut to ``LONGEST_NAME`` characters: charts have no room for more."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def kernel_name(name: str) -> str:
    """A kernel's name without the suffix that all of them have; its variant stands apart."""
    name, bracket, variant = name.partition("_kernel[")
    return f"{name} [{variant}" if bracket else name.removesuffix("_kernel")
