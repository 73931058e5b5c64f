"""Compare two files of samples: which rows became faster, which slower, and which cannot be decided.

A row is SLOWER or FASTER if its samples differ (Mann-Whitney U, two-sided, corrected for the number of rows), its
medians differ by the least effect or more, and the bootstrap interval of their ratio, if any, excludes 1. It is SAME if
the interval lies within the least effect, else UNCLEAR, with the reason. The tests see the scatter within each file;
the least effect covers changes between two runs, such as other memory addresses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.records.samples import SampleFile, read_samples
from bench.records.statistics import FEWEST_SAMPLES, ratio_interval
from common.errors import UsageError

FASTER, SLOWER, SAME, UNCLEAR = VERDICTS = ("FASTER", "SLOWER", "SAME", "UNCLEAR")
GROUPS = {
    "machine": ("cpu", "cores", "memory_bytes", "system"),
    "gpu": ("device", "GPU", "driver"),
    "threads": ("threads",),
    "data": ("data", "samples", "batch_size", "learning_rate", "seed", "network", "width", "epoch_pictures"),
    "math": ("--math", "math"),
}
"""The settings that two rows must share, under the names that ``--allow`` takes."""

FAILURES = ("slower", "unclear", "missing")

MOST_ARRANGEMENTS = 20_000  # up to 8 against 8 samples, the p of tied samples is exact
MOST_SAMPLES = 200
SAME_MEMORY = 0.05  # the memory that a system reserves changes a little with each boot


@dataclass(frozen=True)
class Judgement:
    """One row of both files; times in seconds."""

    name: str
    old_s: float
    new_s: float
    interval: tuple[float, float] | None
    """95 % confidence interval of the ratio of medians; None with too few samples."""
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
    """The result of ``convbench compare``."""

    alpha: float
    effect: float
    judgements: list[Judgement]
    not_timed: dict[str, str]
    """Rows of both files that have no time in at least one of them, with the reason."""
    only_old: list[str]
    only_new: list[str]
    missing: list[str]
    """Rows that have a time in OLD and none in NEW."""
    notes: list[str] = field(default_factory=list)
    """Other differences between the files."""
    warnings: list[str] = field(default_factory=list)
    """Warnings that the files themselves hold."""

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

    UsageError if a file cannot be compared, if the files are of different kinds or share no row, if their settings
    differ in a group that ``allow`` does not name, or if an argument is invalid.
    """
    _check_arguments(alpha, effect, allow, fail_on)
    before, after = _shorten_names(read_samples(old), read_samples(new))
    if before.kind != after.kind:
        raise UsageError(f"{old} is of {before.kind}, {new} of {after.kind}: both must be of the same kind")
    common = [name for name in before.rows if name in after.rows]
    if not common:
        names = f"{first_names(list(before.rows))} and {first_names(list(after.rows))}"
        raise UsageError(f"{old} and {new} have no row in common: {names}")
    pairs, not_timed = {}, {}
    for name in common:
        rows = {"OLD": before.rows[name], "NEW": after.rows[name]}
        reasons = [f"{which}: {row.reason}" for which, row in rows.items() if row.reason]
        if reasons:
            not_timed[name] = "; ".join(reasons)
        else:
            pairs[name] = rows["OLD"].samples, rows["NEW"].samples
    software = _changes(before.software, after.software, {**before.software, **after.software})
    had_time = [name for name, row in before.rows.items() if not row.reason]
    return Comparison(
        alpha=alpha,
        effect=effect,
        notes=_check_settings(before, after, common, allow) + list(software),
        judgements=judge(pairs, alpha, effect),
        not_timed=not_timed,
        only_old=[name for name in before.rows if name not in after.rows],
        only_new=[name for name in after.rows if name not in before.rows],
        missing=[name for name in had_time if name not in after.rows or after.rows[name].reason],
        warnings=[f"{which}: {text}" for which, file in (("OLD", before), ("NEW", after)) for text in file.warnings],
    )


def _check_arguments(alpha: float, effect: float, allow: Sequence[str], fail_on: Sequence[str]) -> None:
    for name, values, choices in (("--allow", allow, GROUPS), ("--fail-on", fail_on, FAILURES)):
        for value in values:
            if value not in choices:
                raise UsageError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")
    if not 0 < alpha < 1:
        raise UsageError(f"alpha {alpha}: must be above 0 and below 1")
    if not (effect > 0 and math.isfinite(effect)):
        raise UsageError(f"effect {effect}: must be above 0, as 0.05 for five per cent")


def _shorten_names(old: SampleFile, new: SampleFile) -> tuple[SampleFile, SampleFile]:
    """Drop the file of tests from the benchmarks' names if it is the same for all."""
    if len({name.partition("::")[:2] for name in (*old.rows, *new.rows)}) > 1:
        return old, new
    short = [{name.partition("::")[2] or name: row for name, row in file.rows.items()} for file in (old, new)]
    return replace(old, rows=short[0]), replace(new, rows=short[1])


def _check_settings(old: SampleFile, new: SampleFile, common: list[str], allow: Sequence[str]) -> list[str]:
    """Raise UsageError for a difference that is not allowed; return the allowed ones as notes."""
    found: dict[tuple[str, str], list[str]] = {}  # rows by group and difference in words
    for name, (group, settings) in itertools.product(common, GROUPS.items()):
        for text in _changes(old.rows[name].settings, new.rows[name].settings, settings):
            found.setdefault((group, text), []).append(name)
    refused, notes = {}, []
    for (group, text), names in found.items():
        where = "" if len(names) == len(common) else f" ({first_names(names)})"
        notes.append(f"{text}{where} (allowed)")
        if group not in allow:
            refused[f"{text}{where}"] = f"--allow {group}"
    if refused:
        raise UsageError(
            f"OLD and NEW were not measured with the same: {'; '.join(refused)}. "
            f"To compare them nevertheless: {' '.join(dict.fromkeys(refused.values()))}"
        )
    return notes


def _changes(old: dict[str, Any], new: dict[str, Any], names: Iterable[str]) -> Iterator[str]:
    """Each of these values that differs, in words: ``cores: 2 -> 4``."""
    for name in names:
        before, after = old.get(name), new.get(name)
        alike = before == after
        if name == "memory_bytes" and before and after:
            alike = abs(before - after) <= SAME_MEMORY * max(before, after)
        if not alike:
            yield f"{name}: {_in_words(before)} -> {_in_words(after)}"


def _in_words(value: Any) -> str:
    return "not stated" if value in (None, "") else f"{value:,}" if isinstance(value, int) else str(value)


def first_names(names: list[str], most: int = 6) -> str:
    """The first few names and the number of the others: ``a, b and 3 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Statistics -----------------------------------------------------------------------------------------------------------


def judge(pairs: dict[str, tuple[Sequence[float], Sequence[float]]], alpha: float, effect: float) -> list[Judgement]:
    """Verdicts on (old samples, new samples) by name; the samples are positive and in the order of measurement.

    Exchanging old and new reverses each verdict and changes nothing else.
    """
    thinned = {name: (_thinned(old), _thinned(new)) for name, (old, new) in pairs.items()}
    p_values = holm([p_value(old, new) for old, new in thinned.values()])
    # The smallest p that this number of samples allows. If it is not below alpha, no samples could show a difference.
    best = holm([least_p(len(old), len(new)) for old, new in thinned.values()])
    least, most = 1 / (1 + effect), 1 + effect
    judgements = []
    for name, p, best_p in zip(pairs, p_values, best, strict=True):
        old_s, new_s = (median(samples) for samples in pairs[name])
        interval = _interval(*thinned[name])
        verdict, why = UNCLEAR, ""
        differs = p < alpha and not (interval and interval[0] <= 1 <= interval[1])
        if differs and max(old_s, new_s) / min(old_s, new_s) >= most:
            verdict = SLOWER if new_s > old_s else FASTER
        elif interval and least <= interval[0] and interval[1] <= most:
            verdict = SAME
        elif interval is None or best_p >= alpha:
            old, new = map(len, pairs[name])
            rows = f"with {len(pairs)} rows to judge, " if len(pairs) > 1 else ""
            why = (
                f"{old} and {new} samples are too few: {rows}{samples_needed(alpha, len(pairs))} of each can show a "
                f"difference, {FEWEST_SAMPLES} that there is none"
            )
        elif differs:
            why = f"there is a difference, but it may be less than {100 * effect:g} %: take more samples"
        else:
            why = f"the interval extends beyond {least:.3g} to {most:.3g}: take more samples, or use an idle machine"
        judgements.append(Judgement(name, old_s, new_s, interval, p, verdict, why))
    return judgements


def p_value(old: Sequence[float], new: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney U test; exact for small samples, tied ones included."""
    from scipy import stats  # slow to import

    if max(*old, *new) == min(*old, *new):
        return 1.0  # nothing to rank
    method = "auto"
    tied = len({*old, *new}) < len(old) + len(new)
    if tied and math.comb(len(old) + len(new), len(old)) <= MOST_ARRANGEMENTS:
        method = stats.PermutationMethod(n_resamples=MOST_ARRANGEMENTS)
    first, second = sorted((list(old), list(new)))  # exchanging old and new then does not change the rounding
    found = float(stats.mannwhitneyu(first, second, alternative="two-sided", method=method).pvalue)
    return max(found, least_p(len(old), len(new)))  # the normal approximation can fall below the smallest possible p


def least_p(old: int, new: int) -> float:
    """The smallest two-sided p of so many samples: all samples of one file below all of the other."""
    return 2 / math.comb(old + new, old)


def samples_needed(alpha: float, rows: int) -> int:
    """The fewest samples of each file with which p, corrected for so many rows, can be below alpha."""
    count = 1
    while rows * least_p(count, count) >= alpha:
        count += 1
    return count


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the k-th smallest of n p-values times n - k + 1, made monotonic, at most 1.

    See "A Simple Sequentially Rejective Multiple Test Procedure", 1979. The chance of one or more false alarms in the
    whole comparison is at most alpha.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        corrected[place] = min(1.0, largest)
    return corrected


def _thinned(samples: Sequence[float]) -> list[float]:
    """At most ``MOST_SAMPLES``: medians of consecutive samples, an odd number of them to keep the overall median.

    pytest-benchmark times short functions thousands of times. Consecutive samples are correlated, so a test that
    assumes independence would be overconfident; and resampling all of them would take minutes.
    """
    size = math.ceil(len(samples) / MOST_SAMPLES)
    size += 1 - size % 2
    return [median(samples[i : i + size]) for i in range(0, len(samples) - size + 1, size)]


def _interval(old: Sequence[float], new: Sequence[float]) -> tuple[float, float] | None:
    """Interval of new over old, always computed from the larger over the smaller, so that it has one value."""
    inverted = (median(old), sorted(old)) > (median(new), sorted(new))
    interval = ratio_interval(*((old, new) if inverted else (new, old)), paired=False)
    return (1 / interval[1], 1 / interval[0]) if interval and inverted else interval
