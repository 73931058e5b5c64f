"""The tables of ``convbench describe`` and ``list``: the network, a version's memory and work, and the versions."""

from __future__ import annotations

from collections.abc import Sequence

from bench.machine.devices import DeviceStatus
from bench.records.layers import planned_buffers
from bench.records.predictions import StepPrediction
from bench.views.table import NOTHING, Cell, Column, Group, Row, Table, columns, row
from bench.views.words import kernel_name, megabytes
from common.architecture import Architecture, autoencoder, receptive_fields
from common.backend import Device
from common.work import CEILING_BYTES_PER_S, CEILING_FLOP_PER_S, KernelWork
from versions.registry import REGISTRY, BackendInfo

DOCUMENT_FIELDS = "The network's design document differs: it gives 3, 6, 10, 14, 14, 14, 18, 18, 22 in this order."
DOCUMENT_BUDGET_MB = 625
BUDGET_BATCH = 64
BUDGET_MB = {
    "weights and biases": 3,
    "their gradients": 3,
    "activation, gradient": 150 + 290,
    "batch of pictures": 100,
    "workspace": 75,
}
"""The design document's limits at ``BUDGET_BATCH``, by purpose of a buffer. Their sum is 621; the document gives 625.

Its "activations" and "gradient buffers" are one here. "batch of pictures" stands for its "other buffers".
"""

RESAMPLING = {"maxpool": "ReLU, pool", "upsample": "ReLU, up", None: "nothing"}


def _texts(*headers: str) -> list[Column]:
    return [Column(header, text=True) for header in headers]


def versions_table(statuses: Sequence[DeviceStatus]) -> Table:
    """Every version, and for each device whether it can run here."""
    cells = ["yes" if status.available else "no" for status in statuses]
    rows = [row(info.name, info.idea, info.layout, *cells) for info in REGISTRY]
    shown = _texts("version", "idea", "layout", *(status.device for status in statuses))
    return Table("", shown, [Group(rows)])


def stages_table(architecture: Architecture) -> Table:
    """Shapes, parameters and FLOPs of every stage."""
    rows = []
    for i, stage in enumerate(architecture.stages):
        passes = 2 if i == 0 else 3  # nothing needs the gradient to the picture
        rows.append(
            row(
                stage.name,
                RESAMPLING[stage.resample],
                f"{stage.in_channels}x{stage.height}x{stage.width}",
                f"{stage.out_channels}x{stage.out_height}x{stage.out_width}",
                f"{stage.parameter_count:,}",
                f"{stage.flops / 1e6:,.1f}",
                f"{passes * stage.flops / 1e6:,.1f}",
            )
        )
    flops = [f"{count / 1e6:,.1f}" for count in (architecture.forward_flops, architecture.training_flops)]
    total = row("total", "", "", "", f"{architecture.parameter_count:,}", *flops, strong=True)
    shown = [*_texts("stage", "then", "in"), *columns("out", ["parameters", "forward\nMFLOP", "training\nMFLOP"])]
    return Table("stages, one picture (C x H x W)", shown, [Group(rows), Group([total])])


def receptive_field_table(architecture: Architecture) -> Table:
    """The exact, computed receptive field of every layer."""
    rows = [
        row(name, f"{max(sizes)}", " or ".join(map(str, sorted(sizes))) if len(sizes) > 1 else "")
        for name, sizes in receptive_fields(architecture)
    ]
    shown = columns("layer", ["largest", "by position"])
    notes = [DOCUMENT_FIELDS] if architecture == autoencoder() else ["The same at every width."]
    return Table("receptive field, pixels", shown, [Group(rows)], notes)


def memory_table(architecture: Architecture, batch_size: int, info: BackendInfo, device: Device, threads: int) -> Table:
    """Every buffer that a version allocates for training, in the version's layout."""
    plans = planned_buffers(info, architecture, batch_size, device, threads)
    rows = [row(plan.name, " x ".join(map(str, plan.shape)), plan.purpose, megabytes(plan.bytes, 2)) for plan in plans]
    total = row("total", "", "without pictures", megabytes(sum(plan.bytes for plan in plans), 2), strong=True)
    shown = [*_texts("buffer", "shape"), *columns("purpose", ["MB"])]
    budget = f"The design document's budget at batch {BUDGET_BATCH} is {DOCUMENT_BUDGET_MB} MB."
    caption = f"memory of {info.label} on the {device}, batch {batch_size}"
    budgeted = batch_size == BUDGET_BATCH and architecture == autoencoder()
    return Table(caption, shown, [Group(rows), Group([total])], [budget] if budgeted else [])


def work_table(architecture: Architecture, batch_size: int, info: BackendInfo) -> Table | None:
    """The work of every GPU kernel of a training step, and its shortest possible time; None if it is not stated."""
    work = info.gpu_work(architecture, batch_size)
    if work is None:
        return None
    shared = info.shared_gpu_work(architecture, batch_size)
    groups = [Group([_work_row(part) for part in parts]) for parts in (work, shared)]
    flops, least, bound_s = (
        sum(getattr(part, name) for part in work + shared) for name in ("flops", "least_bytes", "bound_s")
    )
    sums = [f"{flops / 1e6:,.1f}", megabytes(least), "", "", f"{bound_s * 1e6:,.1f}", "", ""]
    groups.append(Group([row("total", *sums, strong=True)]))
    headers = ["MFLOP", "least\nMB", "asked\nMB", "asked /\nleast", "bound\nµs", "bound\nby", "shared\nan FMA"]
    notes = [
        f"Bound: the shortest time on a card with {CEILING_FLOP_PER_S / 1e12:g} TFLOP/s in float32 and "
        f"{CEILING_BYTES_PER_S / 1e12:g} TB/s; computed, not measured.",
        "Least: every operand crosses global memory once. Asked: what the threads load and store, unknown for cuBLAS;"
        " caches serve the rest.",
        "Shared an FMA: floats read from shared memory for one multiply-add.",
    ]
    caption = f"GPU kernels of {info.label} in a training step, batch {batch_size}"
    return Table(caption, columns("operation, kernel", headers), groups, notes, tight=True)


def _work_row(work: KernelWork) -> Row:
    asked, per_fma = work.asked_bytes, work.shared_loads_per_fma
    return row(
        Cell(f"{work.stage} {work.operation.words}", below=kernel_name(work.kernel)),
        f"{work.flops / 1e6:,.1f}",
        megabytes(work.least_bytes),
        NOTHING if asked is None else megabytes(asked),
        "" if asked is None else f"{asked / work.least_bytes:,.1f}",
        f"{work.bound_s * 1e6:,.1f}",
        work.bound_by,
        "" if per_fma is None else f"{per_fma:.3f}",
    )


def prediction_table(step: StepPrediction, info: BackendInfo, batch_size: int) -> Table:
    """The predicted time of every kernel of a training step on one card, what limits it, and the step's."""
    rows = [
        row(
            Cell(f"{part.stage} {part.operation.words}", below=kernel_name(part.kernel)),
            f"{part.launches}",
            *(f"{seconds * 1e6:,.1f}" for seconds in (part.compute_s, part.bytes_s)),
            f"{'≥ ' if part.at_least else ''}{part.time_s * 1e6:,.1f}",
            part.limit,
        )
        for part in step.parts
    ]
    launches, total_s = sum(part.launches for part in step.parts), sum(part.time_s for part in step.parts)
    least = "≥ " if any(part.at_least for part in step.parts) else ""
    total = row("total", f"{launches}", "", "", f"{least}{total_s * 1e6:,.1f}", "", strong=True)
    shown = columns("operation, kernel", ["launches", "compute\nµs", "memory\nµs", "predicted\nµs", "limit"])
    caption = f"Predicted: {info.label}, {step.card}, batch {batch_size}"
    return Table(caption, shown, [Group(rows), Group([total])], step.assumptions, tight=True)
