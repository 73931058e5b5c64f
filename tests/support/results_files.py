"""Small results files and records for tests: a run, its layers, its kernels; and a parser that checks a page."""

import base64
import io
import json
from html.parser import HTMLParser

from PIL import Image

from bench.model import adapter
from bench.records.kernels import KernelsRecord
from bench.records.layers import LayersRecord
from bench.records.run import RunRecord
from common.architecture import autoencoder

VOID = {"meta", "img", "br", "link", "hr", "input", "source"}
ENVIRONMENT = {
    "cpu": "Example CPU",
    "cores": 4,
    "memory_bytes": 8 * 2**30,
    "system": "Linux x86_64",
    "python": "3.12.1",
    "libraries": {"numpy": "2.0.0", "numba": "0.61.0"},
    "threads": 4,
    "numba_opt": "2",
    "commit": "0123456789",
    "dirty": False,
    "command_line": ["convbench", "run", "--out", "my results"],
}
GPU = {"name": "Example GPU", "memory_bytes": 80 * 2**30, "driver": "570", "cuda": "12.8", "compute_capability": "9.0"}
CEILINGS = {
    "device": "cpu",
    "math": "fp32",
    "threads": 4,
    "gemm_flop_per_s": 2e11,
    "copy_bytes_per_s": 4e10,
    "read_bytes_per_s": 5e10,
    "cache_bytes": 32 * 2**20,
}
CONDITIONS = {
    "before": {"cpu_busy_share": 0.02, "load_1_min": 0.1},
    "after": {"cpu_busy_share": 0.03, "load_1_min": 1.2},
}
NO_TIME = {
    "verified": False, "reason": "failed verification: conv2 is wrong", "epoch_s": [], "first_epoch_s": None,
    "images_per_s": None, "loss": [], "peak_bytes": None,
}  # fmt: skip
"""Changes to a ``row`` of a version that failed its checks."""


def png(width=256, height=32, colour=(200, 80, 40)):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def run_record(*rows, **changes):
    """The record of ``run_file``."""
    return _record(RunRecord, run_file(*rows, **changes))


def layers_record(*rows, **changes):
    """The record of ``layers_file``."""
    return _record(LayersRecord, layers_file(*rows, **changes))


def kernels_record(*rows, **changes):
    """The record of ``new_kernels_file``."""
    return _record(KernelsRecord, new_kernels_file(*rows, **changes))


def _record(model, data):
    return adapter(model).validate_json(json.dumps(data), strict=True)


def row(backend, median, *, precision="fp32", device="cpu", epochs=6, **changes):
    return {
        "backend": backend,
        "label": f"{backend} example (NHWC)",
        "device": device,
        "layout": "NHWC",
        "math": precision,
        "verified": True,
        "reason": "",
        "first_epoch_s": 3 * median,
        "epoch_s": [median * (1 + 0.004 * (i % 3 - 1)) for i in range(epochs)],
        "images_per_s": 128 / median,
        "loss": [0.9 - 0.1 * i + 1e-8 * len(backend) for i in range(epochs + 1)],
        "peak_bytes": 400_000_000,
        "deterministic": True,
        "checks": 182,
        "id": backend,
        "peer": backend.startswith("torch"),
        "reconstruction_png": png(colour=(90, 90, 90)),
        **changes,
    }


def run_file(*rows, **changes):
    return {
        "schema": "convbench-run/2",
        "environment": ENVIRONMENT,
        "config": {
            "data": "photos",
            "data_description": "photo crops",
            "samples": 128,
            "batch_size": 64,
            "epochs": 6,
            "learning_rate": 0.001,
            "seed": 0,
            "math": "fp32",
        },
        "rows": list(rows) or [row("v1", 14.0), row("v2", 3.5), row("v4", 2.0)],
        "started": "2026-01-02T030405Z",
        "interrupted": False,
        "ceilings": CEILINGS,
        "conditions": CONDITIONS,
        "warnings": [],
        "originals_png": png(),
        "notes": {"epoch_s": "every timed epoch"},
        **changes,
    }


def layer_row(backend, step, **changes):
    stages = [stage.name for stage in autoencoder().stages]
    operations = [
        {"stage": stage, "operation": name, "flops": 10**9, "least_bytes": 10**7, "seconds": [0.06 * step] * 3}
        for stage in stages
        for name in ("forward", "backward_data", "backward_filter")
    ]
    operations.append(
        {"stage": "step", "operation": "sgd", "flops": 10**6, "least_bytes": 10**7, "seconds": [0.01 * step] * 3}
    )
    return {
        "id": backend,
        "backend": backend,
        "label": f"{backend} example (NHWC)",
        "device": "cpu",
        "layout": "NHWC",
        "math": "fp32",
        "verified": True,
        "checks": 182,
        "deterministic": True,
        "reason": "",
        "step_s": [step, 1.02 * step, 0.99 * step],
        "operations": operations,
        "losses": [0.9, 0.8],
        "memory": {
            "planned": [
                {"name": "parameters", "shape": [751875], "purpose": "weights and biases", "bytes": 3_007_500},
                {"name": "columns", "shape": [4, 27, 1024], "purpose": "workspace", "bytes": 442_368},
            ],
            "peak": {"process_bytes": 300_000_000, "pool_bytes": None, "device_bytes": None},
        },
        **changes,
    }


def layers_file(*rows, **changes):
    return {
        "schema": "convbench-layers/1",
        "started": "2026-01-02T040000Z",
        "environment": ENVIRONMENT | {"command_line": ["convbench", "layers"]},
        "config": {"batch_size": 64, "math": "fp32", "device": "cpu", "threads": 4, "rounds": 3, "seed": 0},
        "ceilings": CEILINGS,
        "other_ceilings": [],
        "conditions": CONDITIONS,
        "warnings": [],
        "rows": list(rows) or [layer_row("v1", 1.2), layer_row("v4", 0.3)],
        "notes": {"step_s": "whole training steps"},
        **changes,
    }


RESOURCES = {
    "registers": 96,
    "stated_registers": 128,
    "shared_bytes": 9504,
    "stack_bytes": 0,
    "spill_bytes": 0,
    "uses_float64": False,
    "occupancy": [0.25],
    "loop": {"fma": 192, "shared_loads": 29, "shared_floats": 34, "global_loads": 0, "global_floats": 0},
}


MACHINE = {
    "straight": {"instructions": 500, "ffma": 0, "memory": {"STG.128": 8}, "loads_together": 0, "parent": None},
    "loops": [
        {"instructions": 246, "ffma": 0, "memory": {"LDG.32": 4, "STS.32": 4}, "loads_together": 1, "parent": None},
        {
            "instructions": 224,
            "ffma": 192,
            "memory": {"LDS.64": 5, "LDS.128": 6},
            "loads_together": 0,
            "parent": 0,
        },
    ],
}


def kernel_row(name, target="sm_90", **changes):
    """A row of the first schema, which has the resources beside the other fields."""
    return {
        "name": name,
        "versions": ["v2"],
        "operations": [["conv1", "forward"], ["conv2", "forward"]],
        "threads": [128],
        "blocks": [256, 1024],
        "target": target,
        "refused": False,
        **RESOURCES,
        **changes,
    }


def kernels_file(*rows, **changes):
    """A file of the first schema, whose rows are ``kernel_row``."""
    rows = list(rows) or [kernel_row("tiled_kernel"), kernel_row("sgd_kernel", versions=["v2", "v4"], loop=None)]
    return {
        "schema": "convbench-kernels/1",
        "started": "2026-01-02T050000Z",
        "environment": ENVIRONMENT | {"command_line": ["convbench", "kernels", "--out", "results"]},
        "config": {"batch_size": 64, "targets": list(dict.fromkeys(row["target"] for row in rows))},
        "rows": rows,
        "faults": [],
        "notes": {"registers": "32-bit registers a thread"},
        **changes,
    }


def new_kernel_row(name, target="sm_90", refused=False, resources=None, **changes):
    """A row of the third schema; ``resources`` are changes to ``RESOURCES``, the second schema's fields."""
    old = kernel_row(name, target)
    kept = {key: value for key, value in old.items() if key not in RESOURCES and key != "refused"}
    return {**kept, "resources": None if refused else RESOURCES | (resources or {}), **changes}


def new_kernels_file(*rows, **changes):
    """A file of the third schema, whose rows are ``new_kernel_row``."""
    shared = {"versions": ["v2", "v4"], "operations": [["step", "sgd"]], "resources": {"loop": None}}
    read = {"stated_ffma": 0.8, "machine": MACHINE}
    rows = list(rows) or [new_kernel_row("tiled_kernel", resources=read), new_kernel_row("sgd_kernel", **shared)]
    return kernels_file(*rows, **{"schema": "convbench-kernels/3", **changes})


def write(folder, name, data):
    path = folder / name
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


class Page(HTMLParser):
    """Parses a page as a browser would, and collects its faults."""

    def __init__(self, text):
        super().__init__()
        self.open, self.faults, self.ids, self.links, self.tags = [], [], [], [], []
        self.headings, self.texts, self.images, self.charts = [], [], [], []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]
        self.faults += [f"id {name} comes twice" for name in set(self.ids) if self.ids.count(name) > 1]
        self.faults += [f"link to #{name} leads nowhere" for name in self.links if name not in self.ids]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes, alone=True)

    def handle_starttag(self, tag, attributes, *, alone=False):
        self.tags.append(tag)
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form"):
            self.faults.append(f"<{tag}>")
        for name, value in attributes:
            self._attribute(tag, name, value or "")
        if not alone and tag not in VOID:
            self.open.append(tag)
        if tag == "th" and "scope" not in dict(attributes):
            self.faults.append("<th> without scope")
        if tag == "img" and not dict(attributes).get("alt"):
            self.faults.append("<img> without alt")

    def _attribute(self, tag, name, value):
        if name == "id":
            self.ids.append(value)
        if name.startswith("on"):
            self.faults.append(f"{tag} {name}")
        if name in ("href", "src", "xlink:href", "srcset", "action"):
            if tag == "img" and value.startswith("data:image/png;base64,"):
                self.images.append(value)
            elif tag in ("img", "source") and value.startswith("data:image/svg+xml;base64,"):
                self.charts.append(value)
            elif value.startswith("#"):
                self.links.append(value[1:])
            else:
                self.faults.append(f"{tag} loads {value[:60]}")
        if name in ("style", "clip-path", "fill") and "url(" in value:
            target = value.split("url(", 1)[1].split(")")[0]
            self.links.append(target.removeprefix("#")) if target.startswith("#") else self.faults.append(value)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            self.faults += [word for word in ("@import", "url(", "http") if word in data]
            return
        self.texts.append(data)
        if inside in ("h1", "h2", "h3"):
            self.headings.append(data)
