"""The summary of a run in sentences: what is fastest and by how much, where it was measured, and what to doubt."""

from __future__ import annotations

from bench.records.run import RunRecord, RunRow, Summary, summarise
from bench.records.statistics import FEWEST_PAIRS, ratio_interval
from bench.views.words import PRECISION_WORDS, date, interval, joined, label_of, ratio, seconds, why_no_time
from versions.registry import BASELINE


def summary_paragraphs(record: RunRecord) -> list[str]:
    """The summary; its first paragraph is the result."""
    summaries = summarise(record.rows, BASELINE)
    precisions = list(dict.fromkeys(row.precision for row in record.rows))
    sentences = []
    for precision in precisions:
        group = [summary for summary in summaries if summary.row.precision == precision]
        among = f" in {PRECISION_WORDS.get(precision, precision)}" if len(precisions) > 1 else ""
        sentences += _fastest_sentences(group, record.config.samples, among)
    if len(precisions) > 1:
        names = joined([PRECISION_WORDS.get(precision, precision) for precision in precisions])
        sentences.append(f"{names} are not compared with each other.")
    if not any(not summary.row.peer for summary in summaries):
        sentences = ["No version finished, so there is no speed to report.", *sentences]
    return [
        " ".join(sentences),
        " ".join([_origin_sentence(record, precisions), *_caution_sentences(record, summaries)]),
    ]


def _fastest_sentences(group: list[Summary], pictures: int, among: str) -> list[str]:
    """The fastest version against the baseline and the fastest peer; all rows are in one arithmetic."""
    versions, peers = (
        sorted((summary for summary in group if summary.row.peer == peer), key=lambda summary: summary.median_s)
        for peer in (False, True)
    )
    if not versions:
        return []
    fastest = versions[0]
    name, time = label_of(fastest.row), f"an epoch of {pictures:,} pictures takes {seconds(fastest.median_s)}"
    if len(versions) == 1:
        sentences = [f"Only {name} finished{among}: {time}, and there is no other version to compare it with."]
    else:
        kind = "versions" if len({summary.row.backend for summary in versions}) == len(versions) else "rows"
        other = next((s for s in versions[1:] if s.is_baseline), versions[1])
        sentences = [f"The fastest of {len(versions)} {kind}{among} is {name}: {time}, {_faster(other, fastest)}."]
        if other is not versions[1]:
            sure, apart = _sureness(versions[1].row, fastest.row)
            factor = f"{ratio(versions[1].median_s / fastest.median_s)} times as long"
            verdict = factor if apart else "which this run cannot tell apart from it"
            second = f"{label_of(versions[1].row)} with {seconds(versions[1].median_s)}"
            sentences.append(f"Second is {second}, {verdict} ({sure}).")
    if peers:
        number = f", the fastest of {len(peers)} peers" if len(peers) > 1 else ""
        sentences.append(f"Against {label_of(peers[0].row)}{number}, with {_against_peer(fastest, peers[0])}.")
    return sentences


def _faster(other: Summary, fastest: Summary) -> str:
    """``7.07 times as fast as v1 naive (NHWC) with 14.4 s (95 % interval: 6.9-7.2)``."""
    sure, apart = _sureness(other.row, fastest.row)
    them = f"{label_of(other.row)} with {seconds(other.median_s)}"
    if not apart:
        return f"which this run cannot tell apart from {them} ({sure})"
    return f"{ratio(other.median_s / fastest.median_s)} times as fast as {them} ({sure})"


def _against_peer(ours: Summary, peer: Summary) -> str:
    time = f"{seconds(peer.median_s)} an epoch"
    slower, faster = (peer, ours) if peer.median_s >= ours.median_s else (ours, peer)
    sure, apart = _sureness(slower.row, faster.row)
    if not apart:
        return f"{time}, this run cannot tell it apart ({sure})"
    factor = ratio(slower.median_s / faster.median_s)
    verdict = f"is {factor} times as fast" if faster is ours else f"takes {factor} times as long"
    return f"{time}, it {verdict} ({sure})"


def _sureness(above: RunRow, below: RunRow) -> tuple[str, bool]:
    """The interval of above / below in words, and whether it leaves out 1, which is assumed where there is none."""
    bounds = ratio_interval(above.epoch_s, below.epoch_s, paired=True)
    if bounds is None:
        return f"no interval: it needs {FEWEST_PAIRS} epochs", True
    return f"95 % interval: {interval(bounds)}", not bounds[0] <= 1 <= bounds[1]


def _origin_sentence(record: RunRecord, precisions: list[str]) -> str:
    devices = joined(sorted({row.device.upper() for row in record.rows}))
    arithmetic = joined([PRECISION_WORDS.get(precision, precision) for precision in precisions])
    return (
        f"Measured on the {devices} of one machine ({record.environment.machine}) in {arithmetic}, in batches of "
        f"{record.config.batch_size}, on {date(record.started)}."
    )


def _caution_sentences(record: RunRecord, summaries: list[Summary]) -> list[str]:
    sentences = []
    noisy = [label_of(summary.row) for summary in summaries if summary.noisy]
    if noisy:
        sentences.append(f"Noisy, with epochs that differ by more than 10 % of their median: {joined(noisy)}.")
    sentences += [f"{label_of(row)} has no time: {why_no_time(row)}." for row in record.rows if not row.finished]
    if record.interrupted:
        sentences.append("The run was interrupted: rows may have fewer epochs than asked for.")
    return sentences
