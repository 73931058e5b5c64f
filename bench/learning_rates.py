"""What the learning rate does: ``python -m bench.learning_rates --out results``.

Trains the network anew at each rate, from the same weights on the same batches, and writes one JSON file: the loss of
every step, the held-out error after each epoch, or the step in which it ceased to be a number. With ``--resume-at`` a
last run is trained for an epoch at the smallest rate first and goes on at that one. One version is enough: the losses
of all lie on one another (``convbench run`` holds them to that).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.environment import describe_environment, worker_environment
from bench.options import check_learning_rate, check_threads, run_script
from bench.records import prepare_folder, start_time, write_json
from bench.train import psnr_db
from common.architecture import autoencoder
from common.network import Network, initial_parameters
from common.training import Evaluator, Trainer, mean_loss
from common.training_data import TrainingData, load_training_data
from common.validation import check_number
from versions.registry import BackendInfo, find

SCHEMA = "convbench-learning-rates/1"
BATCH = 64
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


def measure(
    rate: Annotated[list[float] | None, typer.Option(help="Learning rates; 0.001 to 0.1 by default.")] = None,
    resume_at: Annotated[float | None, typer.Option(help="Also this one, after an epoch at the smallest.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of each.")] = 3,
    samples: Annotated[int, typer.Option(help="Pictures to learn from.")] = 2048,
    held_out: Annotated[int, typer.Option(help="Pictures to be judged by.")] = 256,
    backend: Annotated[str, typer.Option(help="The version, on the CPU.")] = "v4",
    data: Annotated[str, typer.Option(help="auto, cifar10, photos or a FILE.npy.")] = "auto",
    data_dir: Annotated[Path, typer.Option(help="Folder with CIFAR-10's binary files.")] = Path("data"),
    seed: Annotated[int, typer.Option(help="Of weights, order and photo crops.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for runs/.")] = None,
) -> None:
    """Train at each rate and print where it came to."""
    for value in (*(rate or ()), resume_at):
        check_learning_rate(value)
    for name, value, least in (("epochs", epochs, 1), ("held-out pictures", held_out, 1), ("seed", seed, 0)):
        check_number(name, value, least)
    info = find(backend)
    pictures = load_training_data(data, data_dir, samples, held_out, seed)
    folder = prepare_folder(out) if out is not None else None
    threads = check_threads(None)
    os.environ.update(worker_environment(threads))
    started = start_time()
    courses = [[each] * epochs for each in rate or RATES]
    if resume_at is not None:
        courses.append([min(rate or RATES)] + [resume_at] * (epochs - 1))
    found = []
    for course in courses:
        found.append(train_at(info, course, pictures, seed, threads))
        print(words(found[-1]), flush=True)
    if folder is not None:
        command = ["python", "-m", "bench.learning_rates", *sys.argv[1:]]
        document = {
            "schema": SCHEMA,
            "started": started,
            "environment": describe_environment("cpu", threads, command),
            "config": {
                "backend": info.name, "data": pictures.source, "data_description": pictures.description,
                "samples": samples, "held_out": held_out, "batch_size": BATCH, "epochs": epochs, "seed": seed,
            },
            "rows": found,
        }  # fmt: skip
        print(f"results: {write_json(document, folder, f'{started}_learning-rates')}")


def train_at(info: BackendInfo, course: list[float], pictures: TrainingData, seed: int, threads: int) -> dict[str, Any]:
    """Train an epoch at each rate of ``course``; the row ends where the loss is no number."""
    architecture = autoencoder()
    network = Network(info.load("cpu", threads=threads), architecture, BATCH, initial_parameters(architecture, seed))
    trainer = Trainer(network, pictures.train, learning_rate=course[0], seed=seed)
    evaluator = Evaluator(network, pictures.held_out)
    row: dict[str, Any] = {"rates": course, "step_loss": [], "train_mse": [], "held_out_mse": [], "diverged": None}
    for epoch, rate in enumerate(course):
        trainer.learning_rate = rate
        for step in range(trainer.steps):
            trainer.take_steps(1)
            loss = float(trainer.read_losses()[step])
            if not np.isfinite(loss):
                row["diverged"] = {"epoch": epoch + 1, "step": step + 1}
                return row
            row["step_loss"].append(loss)
        row["train_mse"].append(mean_loss(trainer.read_losses(), trainer.samples, BATCH))
        row["held_out_mse"].append(evaluator.mse())
    return row


def words(row: dict[str, Any]) -> str:
    """One course in a line."""
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(row["rates"]))
    if row["diverged"]:
        return f"{rates}: diverges in step {row['diverged']['step']} of epoch {row['diverged']['epoch']}"
    error = row["held_out_mse"][-1]
    return f"{rates}: held-out MSE {error:.5f}, PSNR {psnr_db(error):.2f} dB after {len(row['held_out_mse'])} epochs"


if __name__ == "__main__":
    run_script(measure)
