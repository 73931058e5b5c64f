"""Run everything that needs a GPU with one command: ``python -m bench.experiments.gpu_campaign --out FOLDER``.

The steps are the GPU tests, a run of all versions beside PyTorch, the layers, the pytest-benchmark suite, and NVIDIA's
compute-sanitizer over one tiny training step of each version. Each step is a process of its own, so a step that fails
does not affect the others. All steps share the ``--minutes``; a step that ends early leaves its time to the later ones.
The folder receives results files, charts, a report page, the output of each step under ``logs/``, and a record that is
rewritten after each step. With ``--simulator`` only the tests run, in Numba's simulator, without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal

import psutil
import pydantic.dataclasses
import typer
from pydantic import Field

from bench.commands.console import run_script, show
from bench.commands.options import DataDir, Math, check_choice, check_precision, options_of
from bench.machine.devices import ROOT, child_environment, choose_device
from bench.machine.environment import Environment, describe_environment
from bench.model import CHECKED, NotNegative, to_json
from bench.records.documents import prepare_folder, start_time
from bench.records.files import replace_file
from bench.views.table import Cell, Column, Group, Table, row
from common.dataset import SOURCES
from common.device import usable_cores
from common.errors import UsageError, check_number
from versions.registry import names

SANITIZER = "compute-sanitizer"
SHARES = {"tests": 2.0, "run": 4.0, "layers": 1.0, "bench": 1.5, "sanitize": 1.5}
"""The share of each kind of step in the time that is left for it and the later kinds."""
MOST_S = 7 * 24 * 3600
LEAST_S = 5  # a step with less time is not started
RESERVE_S = 30  # of the whole time: for the page and the table
INTERRUPT_S = 20  # for an interrupted command to write its results
INTERRUPTED = "interrupted"
TONES = {"passed": "good", "FAILED": "bad", "not run": "quiet"}


@pydantic.dataclasses.dataclass(config=CHECKED)
class Step:
    """A command, and its result; ``kind`` is what ``--only`` calls it."""

    kind: Annotated[str, Field(exclude=True)]
    name: str
    command: Annotated[list[str], Field(exclude=True)]
    """Empty if it cannot run; then ``note`` says why."""
    note: Annotated[str, Field(exclude=True)] = ""
    words: str = ""
    outcome: Literal["passed", "FAILED", "not run"] = "not run"
    seconds: NotNegative = 0.0


@pydantic.dataclasses.dataclass(config=CHECKED, kw_only=True)
class CampaignRecord:
    """The file of a campaign."""

    schema: Literal["convbench-campaign/1"] = "convbench-campaign/1"
    started: str
    environment: Environment
    device: str
    parts: list[Step]


@dataclass(frozen=True, kw_only=True)
class CampaignOptions:
    """The options of a campaign."""

    out: Annotated[Path, typer.Option(help="Folder for all files.", metavar="FOLDER")]
    only: Annotated[
        str, typer.Option(help="Some of tests,run,layers,bench,sanitize; all by default.", metavar="STEPS")
    ] = ",".join(SHARES)
    minutes: Annotated[float, typer.Option(help="Time for the whole campaign.")] = 10.0
    samples: Annotated[int, typer.Option(help="Pictures an epoch of the run.")] = 50_000
    epochs: Annotated[int, typer.Option(help="Timed epochs of the run; fewer if time is up, at least one.")] = 6
    math: Math = "fp32"
    data: Annotated[str, typer.Option(help="auto, cifar10 or photos.")] = "auto"
    data_dir: DataDir = Path("data")
    simulator: Annotated[bool, typer.Option("--simulator", help="Run the tests in Numba's simulator; no GPU.")] = False

    def kinds(self) -> list[str]:
        """Check all options; the kinds of steps to run."""
        asked = [name.strip() for name in self.only.split(",") if name.strip()]
        for name in asked or [""]:
            check_choice("step", name, tuple(SHARES))
        check_number("samples", self.samples, 1)
        check_number("epochs", self.epochs, 1)
        if not RESERVE_S < 60 * self.minutes < MOST_S:
            limits = f"more than {RESERVE_S / 60} and less than {MOST_S / 60:g}"
            raise UsageError(f"minutes {self.minutes}: must be {limits}")
        check_precision(self.math)
        check_choice("data source", self.data, SOURCES)
        if self.simulator and asked != ["tests"]:
            raise UsageError("--simulator needs --only tests: the simulator is not a GPU and is never timed")
        return asked


def campaign_steps(options: CampaignOptions) -> list[Step]:
    """All steps, in order."""
    out, gpu = str(options.out.resolve()), ["--device", "gpu", "--math", options.math]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    convbench = [sys.executable, "-m", "bench"]
    tests = [*pytest, "tests", "-m", "gpu"]
    if options.simulator:
        tests = ["env", "NUMBA_ENABLE_CUDASIM=1", *pytest, "tests/simulator"]
    run = [*convbench, "run", *gpu, "--out", out, "--data", options.data, "--data-dir", str(options.data_dir.resolve())]
    run += ["--samples", str(options.samples), "--epochs", str(options.epochs)]
    note = "PyTorch is not installed: not measured"
    if importlib.util.find_spec("torch"):
        run, note = [*run, "--peer", "torch"], ""
    bench = [*pytest, "tests/benchmarks", *gpu, "--benchmark-only", "--benchmark-max-time=0.1"]
    bench += ["-k", "not epoch and not encode", f"--benchmark-json={out}/benchmarks.json"]
    return [
        Step("tests", "tests", tests),
        Step("run", "run", run, note),
        Step("layers", "layers", [*convbench, "layers", *gpu, "--out", out]),
        Step("bench", "bench", bench),
        *sanitizer_steps(),
    ]


def sanitizer_steps() -> list[Step]:
    """A tiny training step of each version, for each of the sanitizer's tools."""
    folders = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/local/cuda/bin", "/opt/cuda/bin"]
    program = shutil.which(SANITIZER, path=os.pathsep.join(folders))
    if program is None:
        return [Step("sanitize", "sanitize", [], f"{SANITIZER} is not installed: not measured")]
    # CuPy and cuBLAS try API calls that may fail; such a failure is not an error of a kernel.
    options = ["--report-api-errors", "no", "--error-exitcode", "9"]
    tiny = [sys.executable, "-m", "bench.experiments.tiny_step", "--backend"]
    return [
        Step("sanitize", f"{tool}-{name}", [program, "--tool", tool, *options, *tiny, name])
        for tool in ("memcheck", "racecheck")
        for name in names()
    ]


def run_campaign(options: CampaignOptions) -> None:
    """Test, run, take apart, benchmark and sanitize all versions on a GPU."""
    begun = perf_counter()
    asked = options.kinds()
    device = "Numba's simulator" if options.simulator else choose_device("gpu").name
    runs, logs = prepare_folder(options.out), options.out / "logs"
    logs.mkdir(exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # the children of a nohup process would ignore SIGINT
    steps = campaign_steps(options)
    for step in steps:
        step.words = "not reached" if step.kind in asked else "not asked for"
    typed = ["python", "-m", "bench.experiments.gpu_campaign", *sys.argv[1:]]
    record = CampaignRecord(
        started=start_time(),
        environment=describe_environment("cpu" if options.simulator else "gpu", usable_cores(), typed),
        device=device,
        parts=steps,
    )
    path = options.out / f"{record.started}_campaign.json"
    older, end_s = set(runs.glob("*.json")), begun + 60 * options.minutes - RESERVE_S
    interrupted = False
    for step in steps:
        if step.kind in asked and not interrupted:
            left_s = end_s - perf_counter()
            try:
                interrupted = run_step(step, logs, left_s, share_s(left_s, step.kind, asked))
                replace_file(path, f"{to_json(record)}\n".encode())
            except KeyboardInterrupt:
                interrupted = True
            except OSError as error:  # the other steps and the table are still worth having
                print(f"warning: cannot write {path}: {error.strerror or error}", file=sys.stderr)
    files = sorted(set(runs.glob("*.json")) - older)
    page = _write_page(files, (options.out / "report.html").resolve(), logs) if files else "no page: no results files"
    show(_table(record))
    print(f"record: {path}\n{page}")
    if interrupted:
        raise typer.Exit(130)
    if any(step.outcome == "FAILED" for step in steps):
        raise typer.Exit(1)


def share_s(left_s: float, kind: str, asked: Sequence[str]) -> float:
    """The share of a kind of step in the seconds that are left for it and the later kinds."""
    later = list(SHARES)[list(SHARES).index(kind) :]
    return max(0.0, left_s) * SHARES[kind] / sum(SHARES[other] for other in later if other in asked)


def run_step(step: Step, logs: Path, left_s: float, limit_s: float) -> bool:
    """Run one step and fill in its result; whether Ctrl-C ended it. No failure of the step is an exception."""
    if limit_s < LEAST_S or not step.command:
        step.words = "no time was left" if step.command else step.note
        return False
    print(f"{step.name}: {limit_s:.0f} s at most", flush=True)
    command = step.command
    if step.kind == "run":
        # It starts no epoch after its time limit. Only the epoch in progress may use the time of later steps.
        command, limit_s = [*command, "--time-limit", str(round(limit_s))], left_s
    begun = perf_counter()
    try:
        how, output = call(command, logs / f"{step.name}.log", limit_s)
    except OSError as error:  # such as a full disk
        how, output = "it cannot run", error.strerror or str(error)
    step.seconds = perf_counter() - begun
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("warning:")]
    last = lines[-1] if lines else "no output"
    only_skipped = step.kind in ("tests", "bench") and " passed" not in last
    if how == "exit code 0" and not only_skipped:
        file = next((line for line in lines if line.startswith("results: ")), last)
        step.outcome, step.words = "passed", f"{file}; {step.note}" if step.note else file
    elif step.kind == "sanitize" and "Device not supported" in output:
        step.words = f"{SANITIZER} does not support this device: not measured"
    else:
        step.outcome, step.words = "FAILED", f"{how}: {last}"
    return how == INTERRUPTED


def call(command: list[str], log: Path, limit_s: float) -> tuple[str, str]:
    """Run a command; how it ended, and its output, which also goes to ``log``.

    When its time is up, and on Ctrl-C, it receives SIGINT, upon which it writes the results that it has.
    """
    with log.open("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=child_environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            how = f"exit code {process.wait(max(0.0, limit_s))}"
        except subprocess.TimeoutExpired:
            how = "its time was up"
        except KeyboardInterrupt:
            how = INTERRUPTED
        _end(process)
        file.seek(0)
        return how, file.read()


def _end(process: subprocess.Popen) -> None:
    """End a command and what it has left running, workers in sessions of their own too; Ctrl-C cannot interrupt it."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        started = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
        for number in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(INTERRUPT_S)
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    finally:
        signal.signal(signal.SIGINT, previous)


def _write_page(files: list[Path], page: Path, logs: Path) -> str:
    command = [sys.executable, "-m", "bench", "report", *(str(file.resolve()) for file in files)]
    how, output = call([*command, "--out", str(page), "--force"], logs / "page.log", RESERVE_S)
    return f"page: {page}" if how == "exit code 0" else f"no page: {how}: {output.strip()}"


def _table(record: CampaignRecord) -> Table:
    columns = [Column("step", text=True), Column("outcome", text=True), Column("seconds"), Column("", text=True)]
    rows = [
        row(part.name, Cell(part.outcome, tone=TONES[part.outcome]), f"{part.seconds:.0f}", part.words)
        for part in record.parts
    ]
    return Table(record.device, columns, [Group(rows)])


if __name__ == "__main__":
    run_script(options_of(run_campaign, CampaignOptions))
