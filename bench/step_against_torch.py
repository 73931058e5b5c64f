"""Training steps of the CPU versions against PyTorch's, interleaved: ``python -m bench.step_against_torch``.

PyTorch runs eagerly in channels_last, its fastest form here. Each round takes one step of every contestant, in turn, so
that a machine that slows down slows all of them; medians and ratios of medians are printed, and the ratios round by
round as their spread. Every version is verified before it is timed. Writes one JSON file if asked to.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def measure(
    rounds: Annotated[int, typer.Option(help="Timed steps of each.", min=1)] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads of everybody.", min=1)] = 2,
    batch_size: Annotated[int, typer.Option(help="Pictures a step.", min=1)] = 64,
    backend: Annotated[list[str] | None, typer.Option(help="Versions; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a JSON file of all samples.")] = None,
) -> None:
    """Time steps and print medians and ratios."""
    # Before anything reads them; BLAS is single-threaded inside the versions' own threads.
    from bench.environment import worker_environment

    os.environ.update(worker_environment(threads))
    from statistics import median
    from time import perf_counter

    import numpy as np
    import torch

    from bench.environment import describe_environment
    from bench.peers import TorchTrainer, find_peer
    from bench.records import prepare_folder, start_time, write_json
    from common.architecture import autoencoder
    from common.dataset import photo_crops
    from common.errors import UsageError
    from common.network import Network, initial_parameters
    from common.verify import verify
    from versions.registry import find, names

    try:
        for name in backend or ():
            find(name)
        folder = prepare_folder(out) if out is not None else None
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    architecture = autoencoder()
    parameters = initial_parameters(architecture, 0)
    images = photo_crops(batch_size, 0)
    contestants = {}
    for name in backend or names():
        instance = find(name).load("cpu", threads=threads)
        checks = verify(instance, architecture, batch_sizes=(batch_size,))
        failures = [check for check in checks if not check.passed]
        if failures:
            sys.exit(f"{name} failed its verification and is not timed: {failures[0]}")
        network = Network(instance, architecture, batch_size, parameters)
        order, losses = np.arange(batch_size, dtype=np.int32), np.zeros(1, np.float32)

        def step(network=network, order=order, losses=losses) -> float:
            network.step(images, order, 0, batch_size, 0.001, losses, 0)
            return float(losses[0])

        contestants[name] = step

    trainer = TorchTrainer(
        find_peer("torch-channels-last"), architecture, parameters, images,
        device="cpu", math="fp32", threads=threads, batch_size=batch_size, learning_rate=0.001, seed=0,
    )  # fmt: skip

    def torch_step() -> float:
        return trainer.step(slice(None)).item()

    contestants["torch"] = torch_step
    first = {name: step() for name, step in contestants.items()}
    print("loss of the first step: " + ", ".join(f"{name} {loss:.6f}" for name, loss in first.items()))
    if max(first.values()) - min(first.values()) > 1e-4 * max(first.values()):
        sys.exit("the losses differ: not the same network, so nothing is timed")
    for step in contestants.values():
        step()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, step in contestants.items():
            start = perf_counter()
            step()
            samples[name].append(perf_counter() - start)
    reference = samples["torch"]
    print(f"{batch_size} pictures, {threads} threads, {rounds} rounds; ratio to PyTorch's eager channels_last step")
    for name, values in samples.items():
        ratios = [a / b for a, b in zip(values, reference, strict=True)]
        print(
            f"{name:6} median {median(values):.3f} s ({min(values):.3f} to {max(values):.3f}), "
            f"ratio {median(values) / median(reference):.2f} (round by round {min(ratios):.2f} to {max(ratios):.2f})"
        )
    if folder is not None:
        environment = describe_environment("cpu", threads, ["python", "-m", "bench.step_against_torch", *sys.argv[1:]])
        environment["libraries"]["torch"] = torch.__version__
        record = {
            "schema": "convbench-step/1",
            "environment": environment,
            "config": {"batch_size": batch_size, "rounds": rounds, "torch": "eager, channels_last"},
            "step_s": samples,
        }
        print(f"results: {write_json(record, folder, f'{start_time()}_step-against-torch')}")


if __name__ == "__main__":
    typer.run(measure)
