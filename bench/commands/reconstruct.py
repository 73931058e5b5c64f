"""``convbench reconstruct``: pictures and what the network makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bench.commands.networks import CheckpointOptions, counted
from bench.training.outputs import npy_chunks, write_new
from bench.views.pictures import grid_png, to_bytes
from common.errors import UsageError
from common.picture_files import first_pictures
from common.training import forward_batches

MOST_SHOWN = 256  # pictures in a grid


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(CheckpointOptions):
    """The options of ``convbench reconstruct``."""

    out: Annotated[
        Path, typer.Option(help="A grid, .png, or all as bytes, .npy; never overwrites a file.", metavar="FILE")
    ]
    samples: Annotated[int, typer.Option(help="How many pictures.")] = 32


def reconstruct_command(options: ReconstructOptions) -> None:
    """Write reconstructions: a grid of them below their originals, or an array (N, 3, 32, 32) of bytes.

    Reconstructs test pictures unless --split says otherwise.
    """
    out = options.out
    if out.suffix not in (".png", ".npy"):
        raise UsageError(f"--out {out}: must end in .png, a grid, or .npy, an array")
    if out.suffix == ".png" and options.samples > MOST_SHOWN:
        raise UsageError(
            f"samples {options.samples}: a grid shows at most {MOST_SHOWN}; an array (.npy) takes any number"
        )
    split = options.split
    if split is None and not options.data.endswith(".npy"):
        split = "test"
    network, pictures, description = options.load(out, split, options.samples)
    parts = counted("reconstructing", len(pictures), map(to_bytes, forward_batches(network, pictures)))
    if out.suffix == ".npy":
        write_new(out, npy_chunks(parts, (len(pictures), *network.architecture.output_shape), "|u1"))
    else:
        write_new(out, grid_png(first_pictures(pictures, len(pictures)), np.concatenate(list(parts))))
    print(f"{out}: {len(pictures)} pictures of {description}")
