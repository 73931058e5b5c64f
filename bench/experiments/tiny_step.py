"""One training step of one version on the GPU, on a tiny network.

``python -m bench.experiments.tiny_step --backend v2`` is meant for tools that check every memory access, such as
compute-sanitizer, under which the real network would take hours. Along every axis the network has several tiles and a
partial one. Its loss and gradients are checked against the reference.
"""

from __future__ import annotations

import contextlib
from typing import Annotated

import numpy as np
import typer

from bench.commands.console import run_script
from common import reference
from common.architecture import autoencoder
from common.device import in_simulator
from common.errors import RunError, UsageError
from common.network import Network, initial_parameters
from common.training import Trainer
from versions.registry import find

BATCH = 3


def take_tiny_step(backend: Annotated[str, typer.Option(help="The version.", metavar="NAME")]) -> None:
    """Take one training step and compare its loss and gradients with the float64 reference."""
    info = find(backend)
    if not in_simulator():
        with contextlib.suppress(ImportError):  # loading the version reports it
            import cupy

            # The driver allocates every buffer: in CuPy's pool, an access behind a buffer may hit allocated memory.
            cupy.cuda.set_allocator(None)
    try:
        instance = info.load("gpu")
    except Exception as error:  # a driver or a library can fail to load in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"no GPU can be used here: {reason}") from error
    architecture = autoencoder((4, 8), (5, 3)) if in_simulator() else autoencoder((12, 20), (70, 37))
    pictures = np.random.default_rng(0).integers(0, 256, (BATCH, *architecture.input_shape), np.uint8)
    parameters = initial_parameters(architecture, 0)
    network = Network(instance, architecture, BATCH, parameters)
    trainer = Trainer(network, pictures, learning_rate=0.001, seed=0)
    trainer.run_epoch()
    expected = reference.forward_backward(architecture, parameters, pictures / 255.0)
    np.testing.assert_allclose(trainer.read_losses(), [expected.loss], rtol=1e-4)
    for name, gradient in network.read_gradients().items():
        wanted = expected.gradients[name]
        difference = np.linalg.norm(gradient - wanted) / np.linalg.norm(wanted)
        if not difference < 1e-3:
            raise RunError(f"the gradient of {name} differs from the reference by {difference:.2g} of its norm")
    print(f"{info.label}: one step of {BATCH} pictures, loss {expected.loss:.6f}, equal to the reference")


if __name__ == "__main__":
    run_script(take_tiny_step)
