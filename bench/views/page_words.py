"""What a report says in sentences: which version is fastest, by how much, how sure that is, and what stands against it.

Every sentence follows from the file's rows alone. Rows are only set against rows of the same run, on the same device
and in the same arithmetic, and a difference that the epochs do not bear out is not called one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from bench.records.run import Row, RunRecord, Summary, summarise
from bench.records.statistics import FEWEST_PAIRS, NOISY_SPREAD, ratio_interval
from bench.views.charts import row_label
from bench.views.page_charts import LossDifference
from versions.registry import BASELINE

NBSP = "\u00a0"  # between a number and its unit
MATH_WORDS = {"fp32": "float32", "tf32": "TF32"}


def machine_words(environment: dict[str, Any]) -> str:
    """``NVIDIA H200``, or the processor with its threads."""
    gpu = environment.get("gpu")
    threads = environment["threads"]
    cpu = environment["cpu"].replace("(R)", "").replace("(TM)", "")
    return gpu["name"] if gpu else f"{cpu}, {threads} thread{'s' if threads != 1 else ''}"


def date_words(started: Any) -> str:
    """``24 November 2026, 01:41 UTC``; what is no such time is given as it is."""
    try:
        when = datetime.strptime(str(started), "%Y-%m-%dT%H%M%SZ")
    except ValueError:
        return str(started)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def seconds(value: float) -> str:
    """Three figures, in seconds or milliseconds."""
    if value < 1:
        return milliseconds(value)
    return f"{value:,.3g}{NBSP}s" if value < 1000 else f"{value:,.0f}{NBSP}s"


def milliseconds(value: float) -> str:
    """Three figures or all before the point, in milliseconds."""
    return f"{1000 * value:,.0f}{NBSP}ms" if value >= 0.1 else f"{1000 * value:.3g}{NBSP}ms"


def ratio(value: float) -> str:
    """Three figures."""
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.2g}{NBSP}%" if share < 0.095 else f"{100 * share:,.0f}{NBSP}%"


def joined(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def summary_paragraphs(record: RunRecord) -> list[str]:
    """What a run found: which is fastest first; then what it is set against; then how that was measured."""
    summaries = summarise(record.rows, BASELINE)
    fastest, *others = _speed_sentences(record, summaries)
    others += _peer_sentences(summaries)
    measured = [_machine_sentence(record), *_verified_sentences(record, summaries)]
    noisy = [summary for summary in summaries if summary.noisy]
    if noisy:
        named = joined([f"{_name(summary)} ({percent(summary.spread)})" for summary in noisy])
        measured.append(f"Noisy: the epochs of {named} lie further apart than {percent(NOISY_SPREAD)} of their median.")
    elif summaries:
        quiet = "The epochs of no row lie" if len(summaries) > 1 else "Its epochs do not lie"
        measured.append(f"{quiet} further apart than {percent(NOISY_SPREAD)} of their median.")
    if record.interrupted:
        measured.append("The run was interrupted, so this is a part of what was asked for.")
    return [" ".join(sentences) for sentences in ([fastest], others, measured) if sentences]


def _speed_sentences(record: RunRecord, summaries: list[Summary]) -> list[str]:
    versions = [summary for summary in summaries if not summary.row.peer]
    if not versions:
        return ["No version finished, so there is no speed to report."]
    pictures = f"an epoch of {record.config['samples']:,} pictures"
    sentences = []
    maths = list(dict.fromkeys(summary.row.math for summary in versions))
    for math in maths:
        of_math = sorted((s for s in versions if s.row.math == math), key=lambda summary: summary.median_s)
        fastest = of_math[0]
        among = f" in {MATH_WORDS.get(math, math)}" if len(maths) > 1 else ""
        if len(of_math) == 1:
            only = f"Only {_name(fastest)} finished{among}: {pictures} takes it {seconds(fastest.median_s)}"
            sentences.append(f"{only}, and there is nothing to compare it with.")
            continue
        base = next((s for s in of_math if s.is_baseline), None)
        other = base if base is not None and base is not fastest else of_math[1]
        start = f"The fastest of {len(of_math)} {_kind(of_math)}{among} is {_name(fastest)}"
        time = f"{pictures} takes it {seconds(fastest.median_s)}"
        sentences.append(f"{start}: {time}, {_against(other, fastest)}.")
        if other is not of_math[1]:
            sentences.append(f"The next, {_name(of_math[1])}, takes {_slower(of_math[1], fastest)}.")
    if len(maths) > 1:
        sentences.append(f"{joined([MATH_WORDS.get(math, math) for math in maths])} are not compared with each other.")
    return sentences


def _kind(summaries: list[Summary]) -> str:
    return "versions" if len({summary.row.backend for summary in summaries}) == len(summaries) else "rows"


def _against(other: Summary, fastest: Summary) -> str:
    """``7.07 times as fast as v1 naive with 14.4 s (95 % interval: 6.9 to 7.2)``."""
    how_sure, apart = _sureness(other, fastest)
    them = f"{_name(other)} with {seconds(other.median_s)}"
    if not apart:
        return f"which this run cannot tell apart from {them} ({how_sure})"
    return f"{ratio(other.median_s / fastest.median_s)} times as fast as {them} ({how_sure})"


def _slower(other: Summary, fastest: Summary) -> str:
    how_sure, apart = _sureness(other, fastest)
    if not apart:
        return f"{seconds(other.median_s)}, which this run cannot tell apart ({how_sure})"
    sure = f" ({how_sure})" if how_sure.startswith("95") else ""  # that there are too few epochs was said before
    return f"{ratio(other.median_s / fastest.median_s)} times as long{sure}"


def _sureness(above: Summary, below: Summary) -> tuple[str, bool]:
    """The interval of above / below in words, and whether it leaves 1 out, which is assumed where there is none."""
    interval = ratio_interval(above.row.epoch_s, below.row.epoch_s, paired=True)
    if interval is None:
        count = min(len(above.row.epoch_s), len(below.row.epoch_s))
        epochs = f"{count} epoch{'s are' if count > 1 else ' is'} too few for an interval"
        return f"{epochs}, which takes {FEWEST_PAIRS}", True
    low, high = interval
    return f"95{NBSP}% interval: {ratio(low)} to {ratio(high)}", not low <= 1 <= high


def _peer_sentences(summaries: list[Summary]) -> list[str]:
    """The fastest version against the fastest form of each peer library, in the same arithmetic."""
    peers = [summary for summary in summaries if summary.row.peer]
    sentences = []
    for library in dict.fromkeys(summary.row.backend.partition("-")[0] for summary in peers):
        forms = [summary for summary in peers if summary.row.backend.partition("-")[0] == library]
        peer = min(forms, key=lambda summary: summary.median_s)
        same = [
            s for s in summaries if not s.row.peer and (s.row.device, s.row.math) == (peer.row.device, peer.row.math)
        ]
        if not same:
            continue
        ours = min(same, key=lambda summary: summary.median_s)
        known = {"torch": "PyTorch"}.get(library, library)
        forms_words = f", the fastest of {len(forms)} forms of it here," if len(forms) > 1 else ""
        start = f"Against {known} on the same batches: {_name(peer)}{forms_words} takes {seconds(peer.median_s)}"
        if peer.median_s >= ours.median_s:
            how_sure, apart = _sureness(peer, ours)
            factor = ratio(peer.median_s / ours.median_s)
            verdict = f"{_name(ours)} is {factor} times as fast"
        else:
            how_sure, apart = _sureness(ours, peer)
            factor = ratio(ours.median_s / peer.median_s)
            verdict = f"{_name(ours)} takes {factor} times as long"
        verdict = verdict if apart else f"this run cannot tell it apart from {_name(ours)}"
        sentences.append(f"{start}; {verdict} ({how_sure}).")
    return sentences


def _machine_sentence(record: RunRecord) -> str:
    devices = joined(sorted({row.device for row in record.rows})).replace("cpu", "CPU").replace("gpu", "GPU")
    maths = joined(list(dict.fromkeys(MATH_WORDS.get(row.math, row.math) for row in record.rows)))
    where = f"on the {devices} of one machine ({machine_words(record.environment)})"
    batch = f"batches of {record.config['batch_size']}"
    return f"Measured {where}, in {maths}, in {batch}, on {date_words(record.started)}."


def _verified_sentences(record: RunRecord, summaries: list[Summary]) -> list[str]:
    sentences = []
    if summaries:
        checks = sorted({summary.row.checks for summary in summaries if isinstance(summary.row.checks, int)})
        number = f" ({_range(checks)} of them)" if checks else ""
        who = "Every row with a time" if len(summaries) > 1 else "It"
        sentences.append(f"{who} passed its checks against the float64 reference{number} before it was timed.")
    for row in record.rows:
        if not row.finished:
            sentences.append(f"{row_label(row)} has no time: {reason(row)}.")
    return sentences


def _range(counts: list[int]) -> str:
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def reason(row: Row) -> str:
    """Why a row has no time."""
    return row.reason.rstrip(".") or ("it was not verified" if not row.verified else "no epoch of it was timed")


def loss_sentence(rows: list[Row], difference: LossDifference | None) -> str:
    """How far apart the losses of rows are, in words."""
    if len(rows) < 2:
        return "There is only one curve, and nothing that it could lie on."
    if difference is None:
        return "The rows have no epoch in common, or a loss that is not above zero, so no difference is given."
    when = "in the warm-up epoch" if difference.epoch == 0 else f"in epoch {difference.epoch}"
    if difference.share == 0:
        return f"All {len(rows)} curves have the same losses to the last digit."
    who = f"{row_label(difference.first)} and {row_label(difference.second)}"
    return (
        f"The largest difference between any two rows in any epoch is {_share(difference.share)} of the loss, "
        f"{when}, between {who}."
    )


def _share(share: float) -> str:
    """A small share so that it can be read: per cent, or parts per million."""
    if share >= 1e-4:
        return f"{100 * share:.2g}{NBSP}%"
    return f"{1e6 * share:.2g} parts per million"


def _name(summary: Summary) -> str:
    return row_label(summary.row)
