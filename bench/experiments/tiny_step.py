"""One training step of one version on the GPU, on a tiny network: ``python -m bench.experiments.tiny_step --backend v2``.

For tools that watch every memory access, such as compute-sanitizer, under which the real network would take hours. The
network has several tiles of every axis and uneven rests; its loss and gradients are checked against the reference, so a
tool that breaks something is noticed.
"""

from __future__ import annotations

import sys
from typing import Annotated

import numpy as np
import typer

from bench.commands.options import run_script
from common import reference
from common.architecture import autoencoder
from common.device import in_simulator
from common.errors import UsageError
from common.network import Network, initial_parameters
from common.training import Trainer
from versions.registry import find

BATCH = 3


def main(backend: Annotated[str, typer.Option(help="The version.", metavar="NAME")]) -> None:
    """Take the step and compare it with the float64 reference."""
    info = find(backend)
    if not in_simulator():
        _plain_allocation()
    try:
        instance = info.load("gpu")
    except Exception as error:  # whatever is missing is an answer
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
        apart = np.linalg.norm(gradient - wanted) / np.linalg.norm(wanted)
        if not apart < 1e-3:
            sys.exit(f"the gradient of {name} is {apart:.2g} of its norm away from the reference")
    print(f"{info.label}: one step of {BATCH} pictures, loss {expected.loss:.6f}, as the reference has it")


def _plain_allocation() -> None:
    """Let every buffer be an allocation of the driver's: in CuPy's pool, what lies behind one is allocated too."""
    try:
        import cupy
    except ImportError:
        return  # which loading the version will say
    cupy.cuda.set_allocator(None)


if __name__ == "__main__":
    run_script(main)
