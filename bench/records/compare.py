"""Two files of measurements against one another: which rows got faster, which slower, and which nobody can tell.

A row is SLOWER or FASTER if the samples of the two files differ (Mann-Whitney U, two-sided, p < alpha), their medians
lie apart by the least effect or more, and the bootstrap interval of the ratio of medians, where there are samples
enough for one, leaves out 1. It is SAME if that interval lies within the least effect: a difference that matters is
ruled out. Everything else is UNCLEAR, with what it would take; "no difference found" is not SAME.

Of a hundred rows, five would differ by chance alone at an alpha of 0.05. So p is corrected for the number of rows
(Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979): one false alarm or more in the whole comparison
has at most the chance alpha.

Both tests know the scatter within each file, not what changes from one run to the next: memory that lies elsewhere, a
machine that is warmer. The least effect is there for that. Two runs of the same commit show how large it has to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from scipy import stats

from bench.records.samples import GROUPS, MEMORY, Measured, Settings, read_measured
from bench.records.statistics import CONFIDENCE, FEWEST_SAMPLES, ratio_interval
from common.errors import UsageError

FASTER, SLOWER, SAME, UNCLEAR = VERDICTS = ("FASTER", "SLOWER", "SAME", "UNCLEAR")
FAILURES = ("slower", "unclear", "missing")
STYLES = {FASTER: "green", SLOWER: "bold red", SAME: "", UNCLEAR: "yellow"}

MOST_ARRANGEMENTS = 20_000  # up to 8 against 8 samples p is counted out where samples are tied
MOST_SAMPLES = 200
SAME_MEMORY = 0.05  # a system holds back a little more or less of it from start to start


@dataclass(frozen=True)
class Judgement:
    """One row of both files; times in seconds."""

    name: str
    old_s: float
    new_s: float
    interval: tuple[float, float] | None
    """In which the ratio of medians lies with 95 % confidence; None with too few samples for one."""
    p: float
    """Corrected for the number of rows."""
    verdict: str
    why: str = ""
    """Why it is UNCLEAR."""

    @property
    def ratio(self) -> float:
        """New over old: above 1 is slower."""
        return self.new_s / self.old_s


@dataclass(frozen=True)
class Comparison:
    """Everything that ``convbench compare`` says."""

    alpha: float
    effect: float
    judgements: list[Judgement]
    not_timed: dict[str, str]
    """Rows of both files without a time in at least one, with the reason."""
    only_old: list[str]
    only_new: list[str]
    missing: list[str]
    """Rows that have a time in OLD and none in NEW."""
    notes: list[str] = field(default_factory=list)
    """What else differs between the files."""
    warnings: list[str] = field(default_factory=list)
    """What was wrong when either was measured."""

    @property
    def summary(self) -> str:
        """A sentence: ``2 slower, 1 same; 1 not timed``."""
        verdicts = [judgement.verdict for judgement in self.judgements]
        counts = [f"{verdicts.count(verdict)} {verdict.lower()}" for verdict in VERDICTS if verdict in verdicts]
        others = {"not timed": self.not_timed, "only in OLD": self.only_old, "only in NEW": self.only_new}
        rest = [f"{len(rows)} {what}" for what, rows in others.items() if rows]
        return "; ".join(filter(None, [", ".join(counts) or "nothing to judge", ", ".join(rest)]))

    def failing(self, what: str) -> list[str]:
        """The rows for which ``--fail-on slower``, ``unclear`` or ``missing`` fails."""
        if what == "missing":
            return self.missing
        return [judgement.name for judgement in self.judgements if judgement.verdict == what.upper()]


def compare_files(
    old: Path, new: Path, *, alpha: float, effect: float, allow: Sequence[str] = (), fail_on: Sequence[str] = ()
) -> Comparison:
    """Read both files and judge every row that they share.

    UsageError if a file cannot be compared, if they are of different kinds or share no row, if what they were measured
    with differs beyond ``allow``, or if an argument is not one of its choices.
    """
    for name, values, choices in (("--allow", allow, GROUPS), ("--fail-on", fail_on, FAILURES)):
        for value in values:
            if value not in choices:
                raise UsageError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")
    if not 0 < alpha < 1:
        raise UsageError(f"alpha {alpha}: must be above 0 and below 1")
    if not (effect > 0 and math.isfinite(effect)):
        raise UsageError(f"effect {effect}: must be above 0, as 0.05 for five per cent")
    before, after = read_measured(old), read_measured(new)
    if before.kind != after.kind:
        raise UsageError(f"{old} is of {before.kind}, {new} of {after.kind}: both must be of the same kind")
    return compare(before, after, alpha=alpha, effect=effect, allow=allow)


def compare(old: Measured, new: Measured, *, alpha: float, effect: float, allow: Sequence[str] = ()) -> Comparison:
    """Judge every row that two files of one kind share; UsageError as ``compare_files``."""
    old, new = _without_file(old, new)
    common = [name for name in old.rows if name in new.rows]
    if not common:
        raise UsageError(
            f"{old.path} and {new.path} have no row in common: {_some(list(old.rows))} and {_some(list(new.rows))}"
        )
    notes = _refuse(old, new, common, allow)
    software = {**old.software, **new.software}
    changed = [name for name in software if old.software.get(name) != new.software.get(name)]
    notes += [f"{name}: {_said(old.software.get(name))} -> {_said(new.software.get(name))}" for name in changed]

    pairs, not_timed = {}, {}
    for name in common:
        before, after = old.rows[name], new.rows[name]
        reasons = [f"{which}: {row.reason}" for which, row in (("OLD", before), ("NEW", after)) if row.reason]
        if reasons:
            not_timed[name] = "; ".join(reasons)
        else:
            pairs[name] = before.samples, after.samples
    had_time = [name for name, row in old.rows.items() if not row.reason]
    return Comparison(
        alpha=alpha,
        effect=effect,
        judgements=judge(pairs, alpha, effect),
        not_timed=not_timed,
        only_old=[name for name in old.rows if name not in new.rows],
        only_new=[name for name in new.rows if name not in old.rows],
        missing=[name for name in had_time if name not in new.rows or new.rows[name].reason],
        notes=notes,
        warnings=[f"{which}: {remark}" for which, file in (("OLD", old), ("NEW", new)) for remark in file.remarks],
    )


def _without_file(old: Measured, new: Measured) -> tuple[Measured, Measured]:
    """Benchmarks that are all of one file of tests need not say so in each name."""
    if len({name.partition("::")[:2] for name in (*old.rows, *new.rows)}) > 1:
        return old, new
    short = [{name.partition("::")[2] or name: row for name, row in file.rows.items()} for file in (old, new)]
    return replace(old, rows=short[0]), replace(new, rows=short[1])


# What may be compared -----------------------------------------------------------------------------------------------


def _refuse(old: Measured, new: Measured, common: list[str], allow: Sequence[str]) -> list[str]:
    """UsageError if a setting differs that is not allowed to; what is allowed comes back as notes."""
    found = dict(_differences(old.settings, new.settings))  # the difference in words, and its group
    of_rows: dict[tuple[str, str], list[str]] = {}
    for name in common:
        for difference in _differences(old.rows[name].settings, new.rows[name].settings):
            of_rows.setdefault(difference, []).append(name)
    for (text, group), names in of_rows.items():
        found[text if len(names) == len(common) else f"{text} ({_some(names)})"] = group
    refused = {text: group for text, group in found.items() if group not in allow}
    if refused:
        flags = " ".join(f"--allow {group}" for group in dict.fromkeys(refused.values()))
        raise UsageError(
            f"{old.path} and {new.path} were not measured with the same: {'; '.join(refused)}. "
            f"To compare them nevertheless: {flags}"
        )
    return [f"{text} (allowed)" for text in found]


def _differences(old: Settings, new: Settings) -> Iterator[tuple[str, str]]:
    """Each setting that is not the same, in words, and its group."""
    for group in GROUPS:
        for what in {**old.get(group, {}), **new.get(group, {})}:
            values = old.get(group, {}).get(what), new.get(group, {}).get(what)
            if not _agree(what, *values):
                yield f"{what}: {_said(values[0])} -> {_said(values[1])}", group


def _agree(what: str, old: Any, new: Any) -> bool:
    if what == MEMORY and all(isinstance(value, int) for value in (old, new)):
        return abs(old - new) <= SAME_MEMORY * max(old, new)
    return old == new


def _said(value: Any) -> str:
    return "not said" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Statistics ---------------------------------------------------------------------------------------------------------


def judge(pairs: dict[str, tuple[Sequence[float], Sequence[float]]], alpha: float, effect: float) -> list[Judgement]:
    """Verdicts on (old samples, new samples) by name, all positive and in the order they were taken.

    A verdict is the same, the other way round, if old and new change places.
    """
    thinned = {name: (_thinned(old), _thinned(new)) for name, (old, new) in pairs.items()}
    p_values = holm([p_value(old, new) for old, new in thinned.values()])
    # What p could be at best, with samples as many as there are: if that is not below alpha, no samples could be.
    best = holm([least_p(len(old), len(new)) for old, new in thinned.values()])
    judgements = []
    for name, p, best_p in zip(pairs, p_values, best, strict=True):
        old_s, new_s = (median(samples) for samples in pairs[name])
        interval = _interval(*thinned[name])
        verdict, why = UNCLEAR, ""
        differs = p < alpha and not (interval and interval[0] <= 1 <= interval[1])
        if differs and max(old_s, new_s) / min(old_s, new_s) >= 1 + effect:
            verdict = SLOWER if new_s > old_s else FASTER
        elif interval is not None and 1 / (1 + effect) <= interval[0] and interval[1] <= 1 + effect:
            verdict = SAME
        elif interval is None or best_p >= alpha:
            old, new = map(len, pairs[name])
            rows = f"with {len(pairs)} rows to judge, " if len(pairs) > 1 else ""
            why = (
                f"{old} and {new} samples are too few: {rows}{samples_needed(alpha, len(pairs))} of each can show a "
                f"difference, {FEWEST_SAMPLES} that there is none"
            )
        elif differs:
            why = f"a difference, but whether it is {100 * effect:g} % the interval leaves open: take more samples"
        else:
            least, most = 1 / (1 + effect), 1 + effect
            why = f"the interval reaches beyond {least:.3g} to {most:.3g}: take more samples, or a calmer machine"
        judgements.append(Judgement(name, old_s, new_s, interval, p, verdict, why))
    return judgements


def p_value(old: Sequence[float], new: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney U test; counted out for small samples, also where samples are tied."""
    if max(*old, *new) == min(*old, *new):
        return 1.0  # nothing to rank
    method = "auto"
    tied = len({*old, *new}) < len(old) + len(new)
    if tied and math.comb(len(old) + len(new), len(old)) <= MOST_ARRANGEMENTS:
        method = stats.PermutationMethod(n_resamples=MOST_ARRANGEMENTS)
    first, second = sorted((list(old), list(new)))  # rounding, too, is then the same from both sides
    found = float(stats.mannwhitneyu(first, second, alternative="two-sided", method=method).pvalue)
    return max(found, least_p(len(old), len(new)))  # the normal approximation can promise more than there is


def least_p(old: int, new: int) -> float:
    """The smallest two-sided p that so many samples can have: all of one file below all of the other."""
    return 2 / math.comb(old + new, old)


def samples_needed(alpha: float, rows: int) -> int:
    """How many samples each file needs before p, corrected for so many rows, can be below alpha at all."""
    count = 1
    while rows * least_p(count, count) >= alpha:
        count += 1
    return count


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p: the smallest times their number, the next times one less, never falling, at most 1."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        corrected[place] = min(1.0, largest)
    return corrected


def _thinned(samples: Sequence[float]) -> list[float]:
    """At most ``MOST_SAMPLES``: medians of neighbours, an odd number of them, which keeps the median where it was.

    pytest-benchmark times short functions thousands of times over. Neighbours say much the same, which tests of
    independent samples would take for certainty, and resampling all of them would take minutes.
    """
    size = math.ceil(len(samples) / MOST_SAMPLES)
    size += 1 - size % 2
    return [median(samples[i : i + size]) for i in range(0, len(samples) - size + 1, size)]


def _interval(old: Sequence[float], new: Sequence[float]) -> tuple[float, float] | None:
    """Interval of new over old. Resampled from the larger over the smaller, so that it is the same from both sides."""
    turned = (median(old), sorted(old)) > (median(new), sorted(new))
    interval = ratio_interval(*((old, new) if turned else (new, old)), paired=False)
    return (1 / interval[1], 1 / interval[0]) if interval and turned else interval


# What is printed ----------------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison) -> Table:
    """One line a row of both files; fits 100 columns."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("name", overflow="fold", max_width=35)
    for name in ("old\nmedian", "new\nmedian", "new /\nold", f"{100 * CONFIDENCE:.0f} %\ninterval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in comparison.judgements:
        table.add_row(
            Text(row.name),
            _time(row.old_s),
            _time(row.new_s),
            f"{row.ratio:.3g}",
            "-" if row.interval is None else f"{row.interval[0]:.3g}-{row.interval[1]:.3g}",
            "<0.001" if row.p < 0.001 else f"{row.p:.3f}",
            Text(row.verdict, style=STYLES[row.verdict]),
        )
    for name in comparison.not_timed:
        table.add_row(Text(name), *["-"] * 5, "not timed")
    return table


def comparison_lines(comparison: Comparison) -> list[str]:
    """What stands below the table: how it was judged, why rows have no verdict, what else differs; the summary last."""
    count, effect = len(comparison.judgements), comparison.effect
    lines = [
        f"SLOWER, FASTER: p < {comparison.alpha:g} (Mann-Whitney U, two-sided{_corrected(count)}), medians apart by "
        f"{100 * effect:g} % or more, 1 outside the interval.",
        f"SAME: the ratio's interval lies within {1 / (1 + effect):.3g} to {1 + effect:.3g}. UNCLEAR: neither.",
    ]
    unclear: dict[str, list[str]] = {}
    for row in comparison.judgements:
        if row.why:
            unclear.setdefault(row.why, []).append(row.name)
    lines += [f"UNCLEAR, {_some(names)}: {why}." for why, names in unclear.items()]
    lines += [f"not timed, {name}: {reason}" for name, reason in comparison.not_timed.items()]
    for which, names in (("OLD", comparison.only_old), ("NEW", comparison.only_new)):
        lines += [f"only in {which}: {_some(names)}"] if names else []
    lines += [f"note: {note}" for note in comparison.notes]
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    return [*lines, comparison.summary]


def _corrected(rows: int) -> str:
    return f", Holm's correction for {rows} rows" if rows > 1 else ""


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"
