"""Everything that a GPU has to show, in one command: ``python -m bench.gpu_campaign --out FOLDER``.

Five parts, each in processes of its own, so that one that fails leaves the others alone: the GPU tests, a run of all
versions beside PyTorch, the layers, the pytest-benchmark suite's steps and operations, and NVIDIA's compute-sanitizer
over one tiny step of each version. Time on a GPU is often short, so ``--only`` takes some of them and each has a limit.
Everything goes to one folder: results files, charts, the report's page, each part's output under ``logs/``, and
``campaign.json``; a short table comes last. The exit code is 1 if a part failed.

With ``--simulator`` the tests, and only they, run in Numba's simulator, on tiny networks: that needs no GPU, proves
indexing and barriers, and is no measurement.
"""

from __future__ import annotations

import contextlib
import importlib.util
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

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.environment import describe_environment
from bench.layers import SCHEMA as LAYERS_SCHEMA
from bench.layers import read_layers, summarise_layers
from bench.options import TABLE_COLUMNS, check_number
from bench.records import SCHEMA as RUN_SCHEMA
from bench.records import prepare_folder, read_json_object, read_record, start_time, summarise, write_json
from common.architecture import autoencoder
from common.device import ROOT, child_environment, choose_device, usable_cores
from common.errors import UsageError
from versions.registry import BASELINE, names

SCHEMA = "convbench-campaign/1"
SANITIZER = "compute-sanitizer"
SANITIZED = ("memcheck", "racecheck")
MISSED = 9  # the sanitizer's exit code for an error that it found
LIMITS_S = {"tests": 150, "run": 220, "layers": 60, "bench": 90, "sanitize": 80}
"""The most seconds that each part may take; together ten minutes."""
SIMULATOR_LIMIT_S = 600
LAST_WORDS_S = 20  # for a command to keep what it has, when its time is up

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"


@dataclass
class Part:
    """What came of one part."""

    name: str
    outcome: str = NOT_RUN
    words: str = ""
    seconds: float = 0.0
    figures: list[str] = field(default_factory=list)
    """Lines for the table at the end, made from the files that the part wrote."""
    limit_s: float = 0.0
    begun: float = field(default_factory=perf_counter)
    """A reading of ``perf_counter``."""

    def as_record(self) -> dict[str, Any]:
        """What of it is kept."""
        return {key: getattr(self, key) for key in ("name", "outcome", "words", "seconds", "figures", "limit_s")}


@dataclass(frozen=True)
class Campaign:
    """What was asked for."""

    out: Path
    samples: int
    epochs: int
    math: str
    data: str
    data_dir: Path
    simulator: bool

    @property
    def device_options(self) -> list[str]:
        """Where and in which arithmetic the measuring commands run."""
        return ["--device", "gpu", "--math", self.math]


def main(
    out: Annotated[Path, typer.Option(help="Folder for everything.", metavar="FOLDER")],
    only: Annotated[
        str, typer.Option(help="Some of tests,run,layers,bench,sanitize; all by default.", metavar="PARTS")
    ] = ",".join(LIMITS_S),
    samples: Annotated[int, typer.Option(help="Pictures an epoch of the run.")] = 50_000,
    epochs: Annotated[int, typer.Option(help="Timed epochs of the run.")] = 6,
    math: Annotated[str, typer.Option(help="fp32 or tf32, in everything that is timed.")] = "fp32",
    data: Annotated[str, typer.Option(help="auto, cifar10 or photos.")] = "auto",
    data_dir: Annotated[Path, typer.Option(help="Folder with CIFAR-10's binary files.")] = Path("data"),
    simulator: Annotated[bool, typer.Option("--simulator", help="The tests in Numba's simulator; no GPU.")] = False,
) -> None:
    """Test, run, take apart, benchmark and sanitize all versions on a GPU."""
    try:
        asked = [name.strip() for name in only.split(",") if name.strip()]
        for name in asked:
            if name not in LIMITS_S:
                raise UsageError(f"unknown part {name!r}: choose from {', '.join(LIMITS_S)}")
        if not asked:
            raise UsageError(f"--only names no part: choose from {', '.join(LIMITS_S)}")
        check_number("samples", samples, 1)
        check_number("epochs", epochs, 1)
        if math not in ("fp32", "tf32"):
            raise UsageError(f"unknown math {math!r}: choose from fp32, tf32")
        if simulator and asked != ["tests"]:
            raise UsageError("--simulator takes --only tests: what it runs is never to be timed or called a GPU")
        device = "Numba's simulator" if simulator else choose_device("gpu").name
        runs = prepare_folder(out)
        (out / "logs").mkdir(exist_ok=True)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    campaign = Campaign(out.resolve(), samples, epochs, math, data, data_dir.resolve(), simulator)
    started = start_time()
    parts = []
    for name in LIMITS_S:
        if name in asked:
            print(f"{name} ...", flush=True)
            parts.append(run_part(name, campaign))
        else:
            parts.append(Part(name, words="not asked for"))
    page = _report(campaign) if not simulator else ""
    record = {
        "schema": SCHEMA,
        "started": started,
        "environment": describe_environment(
            "cpu" if simulator else "gpu", usable_cores(), ["python", "-m", "bench.gpu_campaign", *sys.argv[1:]]
        ),
        "device": device,
        "parts": [part.as_record() for part in parts],
    }
    path = write_json(record, runs.parent, f"{started}_campaign")
    _print(device, parts, [f"record: {path}", *([f"page: {page}"] if page else [])])
    if any(part.outcome == FAILED for part in parts):
        raise typer.Exit(1)


def run_part(name: str, campaign: Campaign) -> Part:
    """Run one part; whatever goes wrong in it is its outcome, never an exception."""
    part = Part(name, limit_s=SIMULATOR_LIMIT_S if campaign.simulator else LIMITS_S[name])
    try:
        PARTS[name](campaign, part)
    except PartError as error:
        part.outcome, part.words = FAILED, str(error)
    except Exception as error:  # a part must not cost the others, whatever its files look like
        part.outcome, part.words = FAILED, f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    part.seconds = perf_counter() - part.begun
    return part


class PartError(RuntimeError):
    """A part did not do what it should; the message says what."""


# The parts ------------------------------------------------------------------------------------------------------------


def _tests(campaign: Campaign, part: Part) -> None:
    results = campaign.out / "tests.xml"
    results.unlink(missing_ok=True)
    what = ["tests/simulator"] if campaign.simulator else ["tests", "-m", "gpu"]
    environment = {"NUMBA_ENABLE_CUDASIM": "1"} if campaign.simulator else {}
    code = _ask(
        campaign, part, "-m", "pytest", "-q", "-p", "no:cacheprovider", *what, f"--junitxml={results}", **environment
    )
    suite = next(ElementTree.parse(results).getroot().iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(key, 0)) for key in keys) for keys in (["tests"], ["failures", "errors"], ["skipped"])
    )
    part.words = f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped"
    if code or failed or total == skipped:
        raise PartError(part.words)
    part.outcome = PASSED


def _run(campaign: Campaign, part: Part) -> None:
    peers = ["--peer", "torch"] if importlib.util.find_spec("torch") else []
    options = ["--samples", campaign.samples, "--epochs", campaign.epochs, "--data", campaign.data]
    options += ["--data-dir", campaign.data_dir, "--out", campaign.out, *campaign.device_options, *peers]
    path, code = _command(campaign, part, RUN_SCHEMA, "run", *options)
    record = read_record(path)
    flops = record.config["samples"] * autoencoder().training_flops
    ceiling = (record.ceilings or {}).get("gemm_flop_per_s")
    for summary in summarise(record.rows, BASELINE):
        rate = flops / summary.median_s
        share = f", {100 * rate / ceiling:.1f} % of the measured GEMM" if ceiling else ""
        over = "" if summary.speedup is None else f", {summary.speedup:.3g} times {BASELINE}"
        memory = f", {summary.row.peak_bytes / 1e6:,.0f} MB"
        part.figures.append(
            f"{summary.row.id}: epoch {summary.median_s:.4g} s{over}, {rate / 1e12:.3g} TFLOP/s{share}{memory}"
        )
    reasons = [f"{row.id}: {row.reason}" for row in record.rows if row.reason]
    if code or reasons:
        raise PartError("; ".join(reasons) or f"exit code {code}")
    part.outcome = PASSED
    part.words = path.name if peers else f"{path.name}; PyTorch is not installed, so it was not measured"


def _layers(campaign: Campaign, part: Part) -> None:
    path, code = _command(campaign, part, LAYERS_SCHEMA, "layers", "--out", campaign.out, *campaign.device_options)
    record = read_layers(path)
    for summary in summarise_layers(record):
        part.figures.append(_overhead(summary))
    reasons = [f"{row['id']}: {row['reason']}" for row in record["rows"] if row["reason"]]
    if code or reasons:
        raise PartError("; ".join(reasons) or f"exit code {code}")
    part.outcome, part.words = PASSED, path.name


def _overhead(summary: Any) -> str:
    share = 100 * summary.overhead_s / summary.step_s
    return f"{summary.row['id']}: step {1e3 * summary.step_s:.4g} ms, {share:.1f} % of it outside the operations"


def _bench(campaign: Campaign, part: Part) -> None:
    path = campaign.out / "benchmarks.json"
    path.unlink(missing_ok=True)
    code = _ask(
        campaign, part, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/benchmarks", "--benchmark-only",
        "-k", "not epoch and not encode", f"--benchmark-json={path}", *campaign.device_options,
    )  # fmt: skip
    count = len(read_json_object(path)["benchmarks"]) if path.exists() else 0
    part.words = f"{count} benchmarks in {path.name}"
    if code or not count:
        raise PartError(f"exit code {code}, {part.words}")
    part.outcome = PASSED


def _sanitize(campaign: Campaign, part: Part) -> None:
    tool = shutil.which(SANITIZER)
    if tool is None:
        part.words = f"{SANITIZER} is not installed: not measured"
        return
    found = []
    for check in SANITIZED:
        for name in names():
            code = _ask(
                campaign, part, "-m", "bench.tiny_step", "--backend", name,
                before=[tool, "--tool", check, "--error-exitcode", str(MISSED)],
            )  # fmt: skip
            if code:
                found.append(f"{check} of {name}: {'errors' if code == MISSED else f'exit code {code}'}")
    if found:
        raise PartError("; ".join(found))
    part.outcome, part.words = PASSED, f"{' and '.join(SANITIZED)} of {', '.join(names())}: clean"


PARTS: dict[str, Callable[[Campaign, Part], None]] = {
    "tests": _tests,
    "run": _run,
    "layers": _layers,
    "bench": _bench,
    "sanitize": _sanitize,
}


# Processes and files --------------------------------------------------------------------------------------------------


def _command(campaign: Campaign, part: Part, schema: str, *arguments: Any) -> tuple[Path, int]:
    """Run a command of ``convbench`` that writes one results file; returns that and the exit code."""
    before = set((campaign.out / "runs").iterdir())
    code = _ask(campaign, part, "-m", "bench", *arguments)
    written = sorted(set((campaign.out / "runs").iterdir()) - before)
    for path in written:
        if path.suffix == ".json" and read_json_object(path).get("schema") == schema:
            return path, code
    raise PartError(f"exit code {code}, no results file: {_last_line(campaign, part)}")


def _ask(campaign: Campaign, part: Part, *arguments: Any, before: list[str] | None = None, **environment: str) -> int:
    """Run Python with these arguments, its output into the part's log; PartError when the part's time is up.

    The process is then asked to end as by Ctrl-C, upon which a run keeps the epochs that it has, or killed.
    """
    command = [*(before or []), sys.executable, *map(str, arguments)]
    with (campaign.out / "logs" / f"{part.name}.log").open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**child_environment(), **environment}, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(max(0.0, part.begun + part.limit_s - perf_counter()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS_S)
            raise PartError(f"not done after {part.limit_s:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # itself, and whatever it left running
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(campaign: Campaign, part: Part) -> str:
    lines = (campaign.out / "logs" / f"{part.name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _report(campaign: Campaign) -> str:
    """Write the page of all results files; nothing, if there are none or they cannot be shown."""
    from bench.report import write_report

    files = sorted((campaign.out / "runs").glob("*.json"))
    try:
        return str(write_report(files, campaign.out / "report.html", force=True)) if files else ""
    except UsageError as error:
        print(f"no page: {error}", file=sys.stderr)
        return ""


def _print(device: str, parts: list[Part], lines: list[str]) -> None:
    console = Console(width=TABLE_COLUMNS)
    for part in parts:
        for line in part.figures:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    table = Table(title=f"{escape(device)}", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("part", "outcome", "seconds", ""):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for part in parts:
        seconds = f"{part.seconds:.0f}" if part.seconds else ""
        table.add_row(part.name, part.outcome, seconds, escape(part.words))
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
