"""The table and the lines that ``convbench compare`` prints."""

from __future__ import annotations

from bench.records.compare import FASTER, SAME, SLOWER, UNCLEAR, Comparison, first_names
from bench.records.statistics import CONFIDENCE
from bench.views.table import NOTHING, Cell, Group, Table, Tone, columns, row
from bench.views.words import interval, ratio, seconds

TONES: dict[str, Tone] = {FASTER: "good", SLOWER: "bad", SAME: "", UNCLEAR: "warning"}
NAME_WIDTH = 35
HEADERS = ("old\nmedian", "new\nmedian", "new /\nold", f"{100 * CONFIDENCE:.0f} %\ninterval", "p")


def comparison_table(found: Comparison) -> Table:
    """A line for each row that both files have."""
    rows = [
        row(
            judgement.name,
            seconds(judgement.old_s),
            seconds(judgement.new_s),
            ratio(judgement.ratio),
            interval(judgement.interval) if judgement.interval else NOTHING,
            "<0.001" if judgement.p < 0.001 else f"{judgement.p:.3f}",
            Cell(judgement.verdict, tone=TONES[judgement.verdict]),
        )
        for judgement in found.judgements
    ]
    rows += [row(name, *[NOTHING] * len(HEADERS), Cell("not timed", tone="quiet")) for name in found.not_timed]
    return Table("", columns("name", [*HEADERS, "verdict"], NAME_WIDTH), [Group(rows)])


def comparison_lines(found: Comparison) -> list[str]:
    """The lines below the table: the criteria, the rows without a verdict, other differences; the summary last."""
    count, effect = len(found.judgements), found.effect
    corrected = f", Holm's correction for {count} rows" if count > 1 else ""
    lines = [
        f"SLOWER, FASTER: p < {found.alpha:g} (Mann-Whitney U, two-sided{corrected}), medians differ by "
        f"{100 * effect:g} % or more, the interval excludes 1.",
        f"SAME: the interval of the ratio lies within {1 / (1 + effect):.3g} to {1 + effect:.3g}. UNCLEAR: neither.",
    ]
    unclear: dict[str, list[str]] = {}
    for judgement in found.judgements:
        if judgement.why:
            unclear.setdefault(judgement.why, []).append(judgement.name)
    lines += [f"UNCLEAR, {first_names(names)}: {why}." for why, names in unclear.items()]
    lines += [f"not timed, {name}: {reason}" for name, reason in found.not_timed.items()]
    for which, names in (("OLD", found.only_old), ("NEW", found.only_new)):
        lines += [f"only in {which}: {first_names(names)}"] if names else []
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"warning: {warning}" for warning in found.warnings]
    return [*lines, found.summary]
