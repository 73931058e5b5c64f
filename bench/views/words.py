"""Figures in words: the one place that decides how many digits a time, a ratio or a size has."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from bench.records.rows import VersionRow
from bench.views.table import NOTHING

NOT_MEASURED = "not measured"
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
    """A speedup: three figures."""
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def interval(bounds: tuple[float, float]) -> str:
    """``3.26-3.39``."""
    return f"{ratio(bounds[0])}-{ratio(bounds[1])}"


def percent(share: float) -> str:
    """A share in whole per cent."""
    return f"{100 * share:,.0f} %"


def fine_percent(share: float) -> str:
    """A share in tenths of a per cent."""
    return f"{100 * share:,.1f} %"


def megabytes(size: int | None) -> str:
    """Millions of bytes with one digit; ``not measured`` for None."""
    return NOT_MEASURED if size is None else f"{size / 1e6:,.1f}"


def optional(value: float | None) -> str:
    """Three figures, or a dash where there is nothing to measure."""
    return NOTHING if value is None else figure(value)


def span(values: Sequence[float], unit: str = "") -> str:
    """The one value, or the smallest and the largest: ``64`` or ``64-256``."""
    low, high = min(values), max(values)
    return f"{low:,}{unit}" if low == high else f"{low:,}-{high:,}{unit}"


def joined(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def date(started: str) -> str:
    """``24 November 2026, 01:41 UTC``; what is no such time is given as it is."""
    try:
        when = datetime.strptime(started, "%Y-%m-%dT%H%M%SZ")
    except ValueError:
        return started
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def row_label(label: str, row_id: str, precision: str) -> str:
    """A row's label, with what tells a second row of a backend, and TF32, apart."""
    repeat = f", row {row_id.partition('#')[2]}" if "#" in row_id else ""
    return f"{label}{repeat}{', TF32' if precision == 'tf32' else ''}"


def label_of(row: VersionRow) -> str:
    """``row_label`` of a row of a results file."""
    return row_label(row.label, row.id, row.precision)


def why_no_time(row: VersionRow) -> str:
    """The reason why a row has no time."""
    return row.reason.rstrip(".") or ("it was timed for no epoch or step" if row.verified else "it was not verified")


def shortened(text: str) -> str:
    """The text on one line, cut to ``LONGEST_NAME`` characters: charts have no room for more."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
