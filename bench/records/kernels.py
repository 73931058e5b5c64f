"""What the compilers made of every GPU kernel, as a file: registers, memory, occupancy and inner loop.

``convbench kernels --out`` leaves it behind. A row is one use of a kernel, with the argument types it is given,
compiled for one target; a row that was refused has no figures. Nothing in it is a speed, and no GPU was needed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.kernels.ptx import LoopCounts
from bench.machine.environment import describe_environment
from bench.records.run import read_json, start_time, write_json
from common.device import usable_cores
from common.validation import all_texts, is_count, is_number, validating, want

if TYPE_CHECKING:  # only the command that compiles kernels needs it
    from bench.kernels.launches import CompiledKernel, KernelUse

SCHEMA = "convbench-kernels/1"
NOTES = {
    "registers": "32-bit registers a thread; stated_registers: the bound that the kernel declares",
    "spill_bytes": "stored and loaded by a thread for want of registers; stack_bytes: its local memory",
    "shared_bytes": "of a block",
    "occupancy": "warps that can run at once, as a share of the most, for each block size; computed from the limits",
    "loop": "one turn of the inner loop with the most multiply-adds, in PTX; loads are instructions",
}
SIZES = ("registers", "shared_bytes", "stack_bytes", "spill_bytes")
PTXAS_PACKAGES = ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc")


def kernels_record(
    uses: list[KernelUse],
    compiled: Mapping[tuple[int, str], CompiledKernel],
    targets: list[str],
    faults: list[str],
    command_line: list[str],
) -> dict[str, Any]:
    """The record of a compilation; ``compiled`` is as for ``bench.views.tables.kernels_table``, targets as ``sm_90``."""
    from bench.kernels.launches import BATCH_SIZE

    environment = describe_environment("cpu", usable_cores(), command_line)
    for package in PTXAS_PACKAGES:
        try:
            environment["libraries"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "schema": SCHEMA,
        "started": start_time(),
        "environment": environment,
        "config": {"batch_size": BATCH_SIZE, "targets": targets},
        "rows": [_row(use, target, compiled.get((i, target))) for i, use in enumerate(uses) for target in targets],
        "faults": faults,
        "notes": NOTES,
    }


def _row(use: KernelUse, target: str, kernel: CompiledKernel | None) -> dict[str, Any]:
    row = {
        "name": use.name,
        "versions": list(use.versions),
        "operations": [list(pair) for pair in use.operations],
        "threads": list(use.threads),
        "blocks": list(use.blocks),
        "target": target,
        "refused": kernel is None,
    }
    if kernel is not None:
        row |= {name: value for name, value in asdict(kernel).items() if name not in ("name", "target")}
        row["occupancy"] = list(kernel.occupancy)
    return row


def write_kernels(record: dict[str, Any], runs: Path) -> Path:
    """Write the record under a name of its own; a file that exists is never touched."""
    targets = "-".join(record["config"]["targets"])
    return write_json(record, runs, f"{record['started']}_{record['environment']['commit']}_kernels_{targets}")


def read_kernels(path: Path) -> dict[str, Any]:
    """Read a file of ``convbench kernels --out``; UsageError if it is not one or lacks what is shown of it."""
    record = read_json(path, SCHEMA)
    with validating(path):
        _check(record)
    return record


def _check(record: dict[str, Any]) -> None:
    environment, config = record["environment"], record["config"]
    texts = [record["started"], environment["cpu"], environment["commit"], *config["targets"], *record["faults"]]
    want(all_texts(texts), "start, processor, commit, targets and faults must be texts")
    want(is_count(environment["threads"]) and is_count(config["batch_size"]), "threads and batch size: counts")
    want(isinstance(config["targets"], list) and isinstance(record["faults"], list), "targets and faults: lists")
    want(isinstance(record["rows"], list) and bool(record["rows"]), "it has no rows")
    for row in record["rows"]:
        name = row["name"]
        want(all_texts([name, row["target"], *row["versions"]]), "kernel, target and versions must be texts")
        want(bool(row["versions"]) and isinstance(row["versions"], list), f"{name} belongs to no version")
        want(row["target"] in config["targets"], f"{name} was compiled for a target that is not listed")
        want(all(all_texts(pair) and len(pair) == 2 for pair in row["operations"]), f"operations of {name}: pairs")
        for key in ("threads", "blocks"):
            want(bool(row[key]) and all(map(is_count, row[key])), f"{key} of {name} must be counts")
        want(isinstance(row["refused"], bool), f"refused of {name} must be true or false")
        if not row["refused"]:
            _check_figures(row)


def _check_figures(row: dict[str, Any]) -> None:
    name = row["name"]
    want(all(is_count(row[key]) for key in SIZES), f"{', '.join(SIZES)} of {name} must be counts")
    want(row["stated_registers"] is None or is_count(row["stated_registers"]), f"the bound of {name}: a count")
    want(isinstance(row["uses_float64"], bool), f"uses_float64 of {name} must be true or false")
    shares = row["occupancy"]
    want(isinstance(shares, list) and all(_is_share(share) for share in shares), f"occupancy of {name}: shares")
    if row["loop"] is not None:
        counts = [row["loop"][field.name] for field in fields(LoopCounts)]
        want(all(map(is_count, counts)) and row["loop"]["fma"] > 0, f"the loop of {name} must be counts")


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1
