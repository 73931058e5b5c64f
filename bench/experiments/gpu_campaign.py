"""Everything that a GPU has to show, in one command: ``python -m bench.experiments.gpu_campaign --out FOLDER``.

Five parts, each in processes of its own, so that one that fails leaves the others alone: the GPU tests, a run of all
versions beside PyTorch, the layers, the pytest-benchmark suite's steps and operations, and NVIDIA's compute-sanitizer
over one tiny step of each version. Time on a GPU is often short: ``--only`` takes some of them, and ``--minutes`` is
shared out among them, what one leaves over going to the next. Everything goes to one folder: results files, charts, the
report's page, each part's output under ``logs/``, and a record that is written anew after each part; a short table
comes last. The exit code is 1 if a part failed.

With ``--simulator`` the tests, and only they, run in Numba's simulator, on tiny networks: that needs no GPU, proves
indexing and barriers, and is no measurement.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any
from xml.etree import ElementTree

import psutil
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.commands.options import MATHS, TABLE_COLUMNS, run_script
from bench.machine.devices import ROOT, child_environment, choose_device
from bench.machine.environment import describe_environment
from bench.records.files import replace_file
from bench.records.layers import SCHEMA as LAYERS_SCHEMA
from bench.records.layers import LayerSummary, read_layers, summarise_layers
from bench.records.run import SCHEMA as RUN_SCHEMA
from bench.records.run import RunRecord, prepare_folder, read_json_object, read_record, start_time, summarise
from common.architecture import autoencoder
from common.dataset import SOURCES
from common.device import usable_cores
from common.errors import UsageError
from common.validation import check_number
from versions.registry import BASELINE, names

SCHEMA = "convbench-campaign/1"
SANITIZER = "compute-sanitizer"
SANITIZER_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
SANITIZED = ("memcheck", "racecheck")
MISSED = 9  # the sanitizer's exit code for an error that it found
SHARES = {"tests": 2.0, "run": 4.0, "layers": 1.0, "bench": 1.5, "sanitize": 1.5}
"""Each part's share of the time that is left for it and those after it."""
MOST_S = 7 * 24 * 3600
LEAST_S = 5  # for a part to be begun at all
RESERVE_S = 30  # of the whole time: for the page and the table
LAST_WORDS_S = 20  # for a command to keep what it has, when its time is up

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"


@dataclass
class Part:
    """What came of one part."""

    name: str
    outcome: str = NOT_RUN
    words: str = "not asked for"
    seconds: float = 0.0
    figures: list[str] = field(default_factory=list)
    """Lines for the table at the end, made from the files that the part wrote."""
    limit_s: float = 0.0

    def as_record(self) -> dict[str, Any]:
        """What of it is kept."""
        return {key: getattr(self, key) for key in ("name", "outcome", "words", "seconds", "figures", "limit_s")}


@dataclass
class Campaign:
    """What was asked for, and when its time is up."""

    out: Path
    samples: int
    epochs: int
    math: str
    data: str
    data_dir: Path
    simulator: bool
    ends: float
    """A reading of ``perf_counter``."""
    part_ends: float = 0.0
    """The same, for the part that is running."""
    files: list[Path] = field(default_factory=list)
    """Results files written so far."""
    interrupted: bool = False

    @property
    def device_options(self) -> list[str]:
        """Where and in which arithmetic the measuring commands run."""
        return ["--device", "gpu", "--math", self.math]

    def log(self, part: Part) -> Path:
        """Where the output of a part goes."""
        return self.out / "logs" / f"{part.name}.log"


def main(
    out: Annotated[Path, typer.Option(help="Folder for everything.", metavar="FOLDER")],
    only: Annotated[
        str, typer.Option(help="Some of tests,run,layers,bench,sanitize; all by default.", metavar="PARTS")
    ] = ",".join(SHARES),
    minutes: Annotated[float, typer.Option(help="For all of it.")] = 10.0,
    samples: Annotated[int, typer.Option(help="Pictures an epoch of the run.")] = 50_000,
    epochs: Annotated[int, typer.Option(help="Timed epochs of the run, fewer if time is up; one at least.")] = 6,
    math: Annotated[str, typer.Option(help="fp32 or tf32, in everything that is timed.")] = "fp32",
    data: Annotated[str, typer.Option(help="auto, cifar10 or photos.")] = "auto",
    data_dir: Annotated[Path, typer.Option(help="Folder with CIFAR-10's binary files.")] = Path("data"),
    simulator: Annotated[bool, typer.Option("--simulator", help="The tests in Numba's simulator; no GPU.")] = False,
) -> None:
    """Test, run, take apart, benchmark and sanitize all versions on a GPU."""
    begun = perf_counter()
    asked = [name.strip() for name in only.split(",") if name.strip()]
    for name in asked or [""]:
        if name not in SHARES:
            raise UsageError(f"unknown part {name!r}: choose from {', '.join(SHARES)}")
    check_number("samples", samples, 1)
    check_number("epochs", epochs, 1)
    if not RESERVE_S < 60 * minutes < MOST_S:
        raise UsageError(f"minutes {minutes}: must be more than {RESERVE_S / 60} and less than {MOST_S / 60:g}")
    for what, value, known in (("math", math, MATHS), ("data source", data, SOURCES)):
        if value not in known:
            raise UsageError(f"unknown {what} {value!r}: choose from {', '.join(known)}")
    if simulator and asked != ["tests"]:
        raise UsageError("--simulator takes --only tests: what it runs is never to be timed or called a GPU")
    device = "Numba's simulator" if simulator else choose_device("gpu").name
    prepare_folder(out)
    (out / "logs").mkdir(exist_ok=True)
    ends = begun + 60 * minutes - RESERVE_S
    campaign = Campaign(out.resolve(), samples, epochs, math, data, data_dir.resolve(), simulator, ends)
    command = ["python", "-m", "bench.experiments.gpu_campaign", *sys.argv[1:]]
    started = start_time()
    record = {
        "schema": SCHEMA,
        "started": started,
        "environment": describe_environment("cpu" if simulator else "gpu", usable_cores(), command),
        "device": device,
    }
    parts = [Part(name, words="not reached" if name in asked else "not asked for") for name in SHARES]
    path = campaign.out / f"{started}_campaign.json"
    lines = [f"record: {path}"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which keeps what there is
    try:
        for part in parts:
            if part.name not in asked or campaign.interrupted:
                continue
            _share_out(campaign, part, asked)
            if part.limit_s < LEAST_S:
                part.words = "no time was left"
                continue
            print(f"{part.name}: {part.limit_s:.0f} s at most", flush=True)
            run_part(part, campaign)
            _keep(record, parts, path)
        if campaign.files:
            lines += _page(campaign)
    except KeyboardInterrupt:
        campaign.interrupted = True
    _keep(record, parts, path)
    _print(device, parts, lines)
    if campaign.interrupted:
        raise typer.Exit(130)
    if any(part.outcome == FAILED for part in parts):
        raise typer.Exit(1)


def _share_out(campaign: Campaign, part: Part, asked: list[str]) -> None:
    """Give a part its share of what is left."""
    later = list(SHARES)[list(SHARES).index(part.name) :]
    left = max(0.0, campaign.ends - perf_counter())
    part.limit_s = left * SHARES[part.name] / sum(SHARES[name] for name in later if name in asked)


def run_part(part: Part, campaign: Campaign) -> None:
    """Run one part; whatever goes wrong in it is its outcome, never an exception."""
    part.words = ""
    begun = perf_counter()
    campaign.part_ends = begun + part.limit_s
    campaign.log(part).unlink(missing_ok=True)
    try:
        PARTS[part.name](campaign, part)
    except PartError as error:
        part.outcome, part.words = FAILED, str(error)
    except KeyboardInterrupt:
        part.outcome, part.words = FAILED, f"interrupted{f'; {part.words}' if part.words else ''}"
        raise
    except Exception as error:  # a part must not cost the others, whatever its files look like
        part.outcome, part.words = FAILED, f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    finally:
        part.seconds = perf_counter() - begun


class PartError(RuntimeError):
    """A part did not do what it should; the message says what."""


# The parts ------------------------------------------------------------------------------------------------------------


def _tests(campaign: Campaign, part: Part) -> None:
    results = campaign.out / "tests.xml"
    results.unlink(missing_ok=True)
    what = ["tests/simulator"] if campaign.simulator else ["tests", "-m", "gpu"]
    environment = {"NUMBA_ENABLE_CUDASIM": "1"} if campaign.simulator else {}
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *what, f"--junitxml={results}"]
    code = _ask(campaign, part, *arguments, **environment)
    if not results.exists():
        raise PartError(f"{_ended(campaign, code)}: {_last_line(campaign, part)}")
    suite = next(ElementTree.parse(results).getroot().iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(key, 0)) for key in keys) for keys in (["tests"], ["failures", "errors"], ["skipped"])
    )
    part.words = f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped"
    if code != 0 or failed or total == skipped:
        raise PartError(f"{part.words}{'' if code in (0, 1) else f'; {_ended(campaign, code)}'}")
    part.outcome = PASSED


def _run(campaign: Campaign, part: Part) -> None:
    peers = ["--peer", "torch"] if importlib.util.find_spec("torch") else []
    options = ["--samples", campaign.samples, "--epochs", campaign.epochs, "--data", campaign.data]
    options += ["--data-dir", campaign.data_dir, *campaign.device_options, *peers]
    # It ends by itself after the round in which its share is over; only then may it take from the parts that follow.
    options += ["--time-limit", max(1, round(part.limit_s))]
    campaign.part_ends = campaign.ends
    path, code = _command(campaign, part, RUN_SCHEMA, "run", *options)
    record = read_record(path)
    part.figures += _run_figures(record)
    reasons = [f"{row.id}: {row.reason}" for row in record.rows if row.reason]
    if code != 0 or reasons:
        raise PartError(f"{path.name}; {'; '.join(reasons) or _ended(campaign, code)}")
    part.outcome = PASSED
    notes = [warning for warning in record.warnings if warning.startswith("time was up")]
    part.words = "; ".join([path.name, *notes, *([] if peers else ["PyTorch is not installed: not measured"])])


def _run_figures(record: RunRecord) -> list[str]:
    """A line a row, and how the fastest version stands to each peer."""
    flops = record.config["samples"] * autoencoder().training_flops
    ceilings = record.ceilings or {}
    found = []
    summaries = summarise(record.rows, BASELINE)
    for summary in summaries:
        row, rate = summary.row, flops / summary.median_s
        words = [f"{row.id} {row.math}: epoch {summary.median_s:.4g} s", f"{rate / 1e12:.3g} TFLOP/s"]
        if ceilings.get("math") == row.math:
            words.append(f"{100 * rate / ceilings['gemm_flop_per_s']:.1f} % of the measured GEMM")
        if summary.speedup is not None and not summary.is_baseline:
            words.append(f"{summary.speedup:.3g} times {summary.baseline.id}")
        found.append(", ".join([*words, f"{row.peak_bytes / 1e6:,.0f} MB"]))
    ours = [summary for summary in summaries if not summary.row.peer]
    fastest = min(ours, key=lambda summary: summary.median_s, default=None)
    for summary in summaries:
        if fastest and summary.row.peer and summary.row.math == fastest.row.math:
            ratio = summary.median_s / fastest.median_s
            found.append(f"{fastest.row.id} is {ratio:.3g} times as fast as {summary.row.id}")
    return found


def _layers(campaign: Campaign, part: Part) -> None:
    path, code = _command(campaign, part, LAYERS_SCHEMA, "layers", *campaign.device_options)
    record = read_layers(path)
    part.figures += map(_overhead, summarise_layers(record))
    reasons = [f"{row['id']}: {row['reason']}" for row in record["rows"] if row["reason"]]
    if code != 0 or reasons:
        raise PartError(f"{path.name}; {'; '.join(reasons) or _ended(campaign, code)}")
    part.outcome, part.words = PASSED, path.name


def _overhead(summary: LayerSummary) -> str:
    share = 100 * summary.overhead_s / summary.step_s
    return f"{summary.row['id']}: step {1e3 * summary.step_s:.4g} ms, {share:.1f} % of it outside the operations"


def _bench(campaign: Campaign, part: Part) -> None:
    path = campaign.out / "benchmarks.json"
    path.unlink(missing_ok=True)
    code = _ask(
        campaign, part, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/benchmarks", "--benchmark-only",
        "-k", "not epoch and not encode", "--benchmark-max-time=0.1", f"--benchmark-json={path}",
        *campaign.device_options,
    )  # fmt: skip
    if not path.exists() or not path.stat().st_size:
        raise PartError(f"{_ended(campaign, code)}: {_last_line(campaign, part)}")
    part.words = f"{len(read_json_object(path)['benchmarks'])} benchmarks in {path.name}"
    if code != 0:
        raise PartError(f"{part.words}; {_ended(campaign, code)}")
    part.outcome = PASSED


def _sanitize(campaign: Campaign, part: Part) -> None:
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), *SANITIZER_PLACES])
    tool = shutil.which(SANITIZER, path=places)
    if tool is None:
        part.words = f"{SANITIZER} is not installed: not measured"
        return
    clean, wrong, refused = [], [], []
    for check in SANITIZED:
        for name in names():
            said_before = campaign.log(part).stat().st_size if campaign.log(part).exists() else 0
            # CuPy and cuBLAS try calls that may fail: those are no errors of a kernel.
            before = [tool, "--tool", check, "--report-api-errors", "no", "--error-exitcode", str(MISSED)]
            code = _ask(campaign, part, "-m", "bench.experiments.tiny_step", "--backend", name, before=before)
            unsupported = code != 0 and b"Device not supported" in campaign.log(part).read_bytes()[said_before:]
            if code == 0:
                clean.append(f"{check} of {name}")
            elif unsupported:
                refused.append(f"{check}: {SANITIZER} does not support this device, not measured")
            else:
                why = "errors, see the log"
                if code != MISSED:
                    why = f"{_ended(campaign, code)}: {_last_line(campaign, part)}"
                wrong.append(f"{check} of {name}: {why}")
            part.words = "; ".join([*wrong, *refused, f"clean: {', '.join(clean) or 'none'}"])
            if unsupported:
                break
            if code is None:
                raise PartError(part.words)
    if wrong:
        raise PartError(part.words)
    if clean:
        part.outcome = PASSED


PARTS: dict[str, Callable[[Campaign, Part], None]] = {
    "tests": _tests,
    "run": _run,
    "layers": _layers,
    "bench": _bench,
    "sanitize": _sanitize,
}


# Processes and files --------------------------------------------------------------------------------------------------


def _command(campaign: Campaign, part: Part, schema: str, *arguments: Any) -> tuple[Path, int | None]:
    """Run a command of ``convbench`` that writes one results file; returns that and the exit code."""
    runs = campaign.out / "runs"
    before = set(runs.iterdir())
    code = _ask(campaign, part, "-m", "bench", *arguments, "--out", campaign.out)
    for path in sorted(set(runs.iterdir()) - before):
        if path.suffix == ".json" and read_json_object(path).get("schema") == schema:
            campaign.files.append(path)
            return path, code
    raise PartError(f"{_ended(campaign, code)}, no results file: {_last_line(campaign, part)}")


def _ask(
    campaign: Campaign, part: Part, *arguments: Any, before: list[str] | None = None, **environment: str
) -> int | None:
    """Run Python with these arguments, its output into the part's log; its exit code, None if its time was up.

    Then it is asked to end as by Ctrl-C, upon which a command keeps what it has, and if it won't is killed with all
    that it started.
    """
    command = [*(before or []), sys.executable, *map(str, arguments)]
    with campaign.log(part).open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**child_environment(), **environment}, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
            # Where Ctrl-C is ignored, as behind nohup, a child would ignore it too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        started: list[psutil.Process] = []
        try:
            return process.wait(max(0.0, campaign.part_ends - perf_counter()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            campaign.interrupted = campaign.interrupted or isinstance(reason, KeyboardInterrupt)
            started = _descendants(process)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS_S)
            return None
        finally:
            _end(process, started)


def _descendants(process: subprocess.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _end(process: subprocess.Popen, started: list[psutil.Process]) -> None:
    """Kill what is still there of a process, of its group, and of what it is known to have started."""
    for child in [*started, *_descendants(process)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ended(campaign: Campaign, code: int | None) -> str:
    if code is not None:
        return f"exit code {code}"
    return "interrupted" if campaign.interrupted else "its time was up"


def _last_line(campaign: Campaign, part: Part) -> str:
    lines = campaign.log(part).read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _keep(record: dict[str, Any], parts: list[Part], path: Path) -> None:
    """Write the record as far as it goes."""
    document = {**record, "parts": [part.as_record() for part in parts]}
    try:
        replace_file(path, (json.dumps(document, indent=1) + "\n").encode())
    except OSError as error:  # the parts that follow, and the table, are worth more
        print(f"warning: cannot write {path}: {error.strerror or error}", file=sys.stderr)


def _page(campaign: Campaign) -> list[str]:
    """Write the page of the results files; a line that says where, or why there is none."""
    from bench.views.page import write_report

    try:
        return [f"page: {write_report(campaign.files, campaign.out / 'report.html', force=True)}"]
    except Exception as error:  # the files are what counts
        return [f"no page: {error}"]


def _print(device: str, parts: list[Part], lines: list[str]) -> None:
    console = Console(width=TABLE_COLUMNS)
    for part in parts:
        for line in part.figures:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    table = Table(title=escape(device), title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("part", "outcome", "seconds", ""):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for part in parts:
        seconds = f"{part.seconds:.0f}" if part.seconds else ""
        table.add_row(part.name, part.outcome, seconds, escape(part.words))
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_script(main)
