"""``convbench encode``: the latents of pictures as an array."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.networks import CheckpointOptions, counted
from bench.training.features import latents
from bench.training.outputs import npy_chunks, write_new
from common.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(CheckpointOptions):
    """The options of ``convbench encode``."""

    out: Annotated[Path, typer.Option(help="The array, .npy; never overwrites a file.", metavar="FILE.npy")]
    samples: Annotated[int | None, typer.Option(help="How many pictures; all by default.")] = None


def encode_command(options: EncodeOptions) -> None:
    """Write the latents of pictures to an array: 8,192 float32 values for each picture, in (C, H, W) order.

    Encodes the training pictures unless --split says otherwise. The array is written batch by batch, so it may be
    larger than memory.
    """
    out = options.out
    if out.suffix != ".npy":
        raise UsageError(f"--out {out}: must end in .npy")
    network, pictures, description = options.load(out, options.split, options.samples)
    shape = (len(pictures), prod(network.architecture.latent_shape))
    write_new(out, npy_chunks(counted("encoding", len(pictures), latents(network, pictures)), shape, "<f4"))
    print(f"{out}: float32 {shape}, latents of {description}")
