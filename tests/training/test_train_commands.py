"""train, encode, reconstruct and probe as commands: the real network on a few pictures."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import cli
from bench.commands import probe as probe_module
from bench.machine.devices import ROOT
from bench.records import files
from bench.records.training import Requested
from bench.training import outputs
from bench.training.checkpoint import load_checkpoint, save_checkpoint
from bench.training.folder import BEST, LAST, LOSS_CHART, METRICS, PICTURES
from bench.views.words import duration
from common import reference
from common.architecture import autoencoder
from common.dataset import labelled_crops, photo_crops
from common.errors import RunError, UsageError
from tests.common.test_dataset import write_batches

ARCHITECTURE = autoencoder()


@pytest.fixture
def convbench(monkeypatch, capsys):
    """Run a command in this process, where everything is compiled already: exit code, output, errors."""
    before = dict(os.environ)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        return ended.value.code, written.out, written.err

    yield run
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder from ``convbench train``: two epochs of ten photo crops on V4."""
    out = tmp_path_factory.mktemp("trained") / "run"
    code = "from bench.cli import main; main()"
    options = ["--samples", "10", "--held-out", "5", "--batch-size", "4", "--epochs", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--out", str(out), "--device", "cpu", *options],
        cwd=out.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_lines_and_files_of_a_run(trained):
    out, done = trained
    assert {path.name for path in out.iterdir()} == {BEST, LAST, METRICS, LOSS_CHART, PICTURES}
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "data: photo crops, 10 of the left four fifths of scikit-learn's two sample photographs; 5 held out"
    )
    assert lines[1].startswith("device: cpu (")
    figures = r"train MSE 0\.\d+, PSNR \d+\.\d\d dB, held out MSE 0\.\d+, PSNR \d+\.\d\d dB( \(best\))?, \d+ images/s"
    assert re.fullmatch(f"epoch 1 of 2: {figures}, .* left", lines[3]), lines[3]
    assert re.fullmatch(f"epoch 2 of 2: {figures}", lines[4]), lines[4]
    assert done.stderr == ""
    assert len((out / METRICS).read_text().splitlines()) == 3
    with Image.open(out / PICTURES) as image:
        assert image.size == (2 * 5 * 34, 2 * 2 * 34)


def test_a_resumed_run_keeps_its_settings_unless_they_are_given(trained, tmp_path, convbench):
    out = tmp_path / "run"
    out.mkdir()
    (out / LAST).write_bytes((trained[0] / LAST).read_bytes())
    before = load_checkpoint(out / LAST, ARCHITECTURE)
    options = ["--resume", "--out", out, "--device", "cpu", "--data", "photos"]
    code, printed, errors = convbench("train", *options, "--epochs", "3", "--backend", "v1", "--learning-rate", "0.002")
    assert (code, errors) == (0, "")
    assert "resumed after 2 epochs and 0 steps of v4 on the cpu" in printed
    assert "now v1 on the cpu, fp32" in printed
    assert "equal within rounding, not bit for bit" in printed
    after = load_checkpoint(out / LAST, ARCHITECTURE)
    assert (after.batch_size, after.samples, after.data) == (before.batch_size, before.samples, before.data)
    assert [(row.backend, row.learning_rate) for row in after.history[1:]] == [("v4", 0.001), ("v1", 0.002)]
    # Without --backend the run keeps its backend; and nothing is left to do.
    code, printed, _ = convbench("train", *options, "--epochs", "3")
    assert code == 0
    assert "on the same backend" in printed
    assert "already has 3 epochs: nothing was left to train" in printed


BAD = {
    "no folder": (["train"], ["--out"]),
    "unknown backend": (["train", "--out", "new", "--backend", "v9"], ["'v9'", "v1", "v4"]),
    "unknown device": (["train", "--out", "new", "--device", "tpu"], ["'tpu'", "cpu", "gpu"]),
    "unknown data": (["train", "--out", "new", "--data", "mnist"], ["'mnist'", "cifar10", "photos"]),
    "a missing array": (["train", "--out", "new", "--data", "none.npy"], ["none.npy", "no such file"]),
    "an array of something else": (["train", "--out", "new", "--data", "file.npy"], ["file.npy", "uint8 (N, 3, 32"]),
    "no CIFAR-10": (["train", "--out", "new", "--data", "cifar10", "--data-dir", "none"], ["convbench data download"]),
    "no epochs": (["train", "--out", "new", "--epochs", "0"], ["epochs 0", "at least 1"]),
    "no pictures": (["train", "--out", "new", "--samples", "0"], ["samples 0", "at least 1"]),
    "held out below zero": (["train", "--out", "new", "--held-out", "-1"], ["held-out pictures -1"]),
    "learning rate zero": (["train", "--out", "new", "--learning-rate", "0"], ["learning rate 0"]),
    "batch of nothing": (["train", "--out", "new", "--batch-size", "0"], ["batch size 0"]),
    "negative seed": (["train", "--out", "new", "--seed", "-1"], ["seed -1"]),
    "negative checkpoint steps": (["train", "--out", "new", "--checkpoint-steps", "-1"], ["checkpoint steps -1"]),
    "streamed crops": (["train", "--out", "new", "--data", "photos", "--stream"], ["--stream needs pictures in files"]),
    "a file in the way": (["train", "--out", "file"], ["cannot write to file"]),
    "nothing to resume": (["train", "--out", "new", "--resume"], ["nothing to resume", "new/last.safetensors"]),
    "more than there is": (["train", "--out", "new", "--data", "cifar10", "--samples", "99"], ["99", "holds 8"]),
    "more held out than there is": (
        ["train", "--out", "new", "--data", "cifar10", "--samples", "5", "--held-out", "9"], ["9", "holds 3"]
    ),
    "encode no checkpoint": (["encode", "file", "--out", "l.npy"], ["file is damaged or no safetensors file"]),
    "encode nothing": (["encode", "none", "--out", "l.npy"], ["cannot read none: No such file"]),
    "encode to text": (["encode", "file", "--out", "l.txt"], ["l.txt", ".npy"]),
    "encode over a file": (["encode", "file", "--out", "file.npy"], ["file.npy exists"]),
    "encode to nowhere": (["encode", "file", "--out", "no/l.npy"], ["there is no folder no"]),
    "encode an unknown split": (["encode", "GOOD", "--out", "l.npy", "--split", "all"], ["'all'", "train, test"]),
    "encode a split of an array": (
        ["encode", "GOOD", "--out", "l.npy", "--data", "pictures.npy", "--split", "test"], ["has no splits"]
    ),
    "encode with a negative seed": (["encode", "GOOD", "--out", "l.npy", "--seed", "-1"], ["seed -1"]),
    "encode in impossible batches": (
        ["encode", "GOOD", "--out", "l.npy", "--data", "photos", "--batch-size", "1000000000"],
        ["not enough memory", "smaller batches"],
    ),
    "encode a name that is too long": (["encode", "n" * 300, "--out", "l.npy"], ["File name too long"]),
    "train in a name that is too long": (["train", "--out", "n" * 300], ["File name too long"]),
    "probe with a negative seed": (["probe", "GOOD", "--seed", "-1"], ["seed -1"]),
    "encode no pictures": (["encode", "GOOD", "--out", "l.npy", "--samples", "0"], ["samples 0"]),
    "reconstruct to text": (["reconstruct", "file", "--out", "p.txt"], ["p.txt", ".png", ".npy"]),
    "reconstruct too many": (["reconstruct", "file", "--out", "p.png", "--samples", "999"], ["999", "at most 256"]),
    "probe unknown features": (["probe", "GOOD", "--features", "some"], ["'some'", "pooled, whole"]),
    "probe without labels": (["probe", "GOOD", "--data", "file.npy"], ["file.npy has no labels"]),
    "probe one picture": (["probe", "GOOD", "--samples", "1", "--data", "photos"], ["pictures are of one class"]),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "wanted"), BAD.values(), ids=BAD.keys())
def test_bad_input(trained, tmp_path, monkeypatch, convbench, arguments, wanted):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("something")
    np.save("file.npy", np.zeros((3, 5)))
    np.save("pictures.npy", np.zeros((3, 3, 32, 32), np.uint8))
    write_batches(Path("data"), counts=(4, 4), test=3)
    before = sorted(Path().rglob("*"))
    code, printed, errors = convbench(*[trained[0] / LAST if word == "GOOD" else word for word in arguments])
    assert code == 2, errors + printed
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in wanted), errors
    assert sorted(Path().rglob("*")) == before


def test_a_new_run_does_not_overwrite_another(trained, convbench):
    out, _ = trained
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for options in ([], ["--resume", "--seed", "1"], ["--resume", "--samples", "9"], ["--resume", "--held-out", "4"]):
        code, _, errors = convbench("train", "--out", out, "--data", "photos", "--epochs", "9", *options)
        assert code == 2
        assert errors.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_divergence_ends_in_exit_code_1_and_one_line(tmp_path, convbench):
    options = ["--device", "cpu", "--data", "photos", "--samples", "8", "--batch-size", "4", "--learning-rate", "1e20"]
    code, _, errors = convbench("train", "--out", tmp_path / "run", *options)
    assert code == 1
    assert errors.startswith("error: training diverged: ")
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_writes_a_checkpoint_to_resume_from(tmp_path):
    out = tmp_path / "run"
    options = ["--device=cpu", "--data=photos", "--samples=100000", "--held-out=4", "--batch-size=4", "--backend=v4"]
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench", "train", f"--out={out}", "--checkpoint-steps=1", *options],
            cwd=ROOT, stdout=printed, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 200
            while not (out / LAST).exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            errors = process.communicate(timeout=60)[1]
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert errors == ""
    position = load_checkpoint(out / LAST, ARCHITECTURE).position
    assert position.epoch == 0
    assert position.step > 0
    said = f"stopped after 0 epochs and {position.step} steps; {out / LAST} holds epoch 0, step {position.step}\n"
    assert f"{said}convbench train --resume --out {out} continues the run\n" in (tmp_path / "printed").read_text()


def test_latents_equal_those_of_the_reference(trained, tmp_path, monkeypatch, convbench):
    """8,192 values a picture in C, H, W order, from every version."""
    monkeypatch.chdir(tmp_path)
    crops, _ = labelled_crops(6, 0, "test")
    parameters = load_checkpoint(trained[0] / BEST, ARCHITECTURE).parameters
    x = crops / 255.0
    for stage in ARCHITECTURE.stages[:2]:
        weights = parameters[f"{stage.name}.weight"].astype(np.float64), parameters[f"{stage.name}.bias"]
        x = reference.maxpool_forward(reference.relu(reference.conv2d_forward(x, *weights)))
    for name in ("v1", "v4"):
        options = ["--backend", name, "--device", "cpu", "--data", "photos", "--split", "test", "--samples", "6"]
        code, printed, errors = convbench(
            "encode", trained[0] / BEST, "--out", f"{name}.npy", "--batch-size", 4, *options
        )
        assert (code, errors) == (0, "")
        assert f"{name}.npy: float32 (6, 8192), latents of photo crops" in printed
        found = np.load(f"{name}.npy", mmap_mode="r")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, x.reshape(6, 8192), rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1.npy", "v4.npy"]


def test_latents_are_written_part_by_part(tmp_path):
    """An array of 800 MB is written with less than 10 MB of memory."""
    import tracemalloc

    def parts():
        for i in range(400):
            yield np.full((64, 8192), i, np.float32)

    tracemalloc.start()
    try:
        outputs.write_new(tmp_path / "large.npy", outputs.npy_chunks(parts(), (400 * 64, 8192), "<f4"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6
    written = np.load(tmp_path / "large.npy", mmap_mode="r")
    assert written.shape == (25600, 8192)
    assert (written[-1, -1], written[64, 0]) == (399, 1)


def test_an_array_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "latents.npy"

    def truncated():
        yield np.zeros((2, 2))
        raise RunError("pictures.npy was truncated")

    with pytest.raises(RunError, match="was truncated"):
        outputs.write_new(path, outputs.npy_chunks(truncated(), (3, 2), "<f4"))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*latents\.npy: No space left on device"):
        outputs.write_new(path, outputs.npy_chunks([np.zeros((3, 2))], (3, 2), "<f4"))
    assert list(tmp_path.iterdir()) == []
    path.write_text("something")
    with pytest.raises(UsageError, match="exists"):
        outputs.write_new(path, outputs.npy_chunks([np.zeros((3, 2))], (3, 2), "<f4"))
    assert path.read_text() == "something"


def test_reconstructions(trained, tmp_path, monkeypatch, convbench):
    monkeypatch.chdir(tmp_path)
    write_batches(Path("data"), counts=(4, 4), test=11)
    options = ["--device", "cpu", "--data", "cifar10", "--batch-size", "4", "--samples", "10"]
    code, printed, _ = convbench("reconstruct", trained[0] / BEST, "--out", "grid.png", *options)
    assert code == 0
    assert printed.startswith("grid.png: 10 pictures of data, test")
    with Image.open("grid.png") as image:
        assert image.size == (2 * 8 * 34, 2 * 2 * 2 * 34)
    code, _, _ = convbench("reconstruct", trained[0] / BEST, "--out", "all.npy", *options)
    assert code == 0
    found = np.load("all.npy")
    assert (found.shape, found.dtype) == ((10, 3, 32, 32), np.uint8)
    code, _, errors = convbench("reconstruct", trained[0] / BEST, "--out", "all.npy", *options)
    assert (code, errors) == (2, "error: all.npy exists: choose another name\n")


def accuracies(printed):
    """Number of values and accuracy by the name of the features, in the table's order."""
    rows = [line.split() for line in printed.splitlines() if re.search(r"\d\.\d %", line)]
    rows = [row for row in rows if row[-2] == "to"]
    for row in rows:
        assert float(row[-3]) <= float(row[-5]) <= float(row[-1])
    return {row[0]: (row[-6], float(row[-5])) for row in rows}


@pytest.mark.parametrize("kind", ["pooled", "whole"])
def test_probe_finds_the_same_accuracy_whichever_version_trained(trained, tmp_path, convbench, kind):
    """V1 trains from the same weights on the same batches as V4; latents of zeros hold nothing to learn."""
    begun = ["--samples", "10", "--held-out", "5", "--batch-size", "4", "--epochs", "2", "--data", "photos"]
    code, _, errors = convbench("train", "--out", tmp_path / "v1", "--device", "cpu", "--backend", "v1", *begun)
    assert (code, errors) == (0, "")
    nothing = load_checkpoint(trained[0] / LAST, ARCHITECTURE)
    zeros = {name: np.zeros_like(value) for name, value in nothing.parameters.items()}
    save_checkpoint(replace(nothing, parameters=zeros), tmp_path / "zeros")
    options = ["--device", "cpu", "--data", "photos", "--samples", "120", "--test-samples", "40", "--features", kind]
    files = [trained[0] / LAST, tmp_path / "v1" / LAST, tmp_path / "zeros"]
    code, printed, errors = convbench("probe", *files, *options)
    assert (code, errors) == (0, "")
    assert f"{kind} latents: trained on 120 pictures, tested on 40" in printed
    found = accuracies(printed)
    values = "128" if kind == "pooled" else "8,192"
    assert [count for count, _ in found.values()] == ["3,072", *[values] * 4]
    raw, _, v4, v1, zero = (accuracy for _, accuracy in found.values())
    assert min(raw, v4) > 70
    assert abs(v4 - v1) <= 2.5  # a picture in forty
    assert zero < 62


def test_probe_is_tested_on_pictures_that_it_was_not_trained_on(trained, convbench, monkeypatch):
    """Random labels can be memorised but not predicted."""
    real = probe_module.load_labelled

    def random_labels(source, data_dir, split, count, seed):
        images, labels = real(source, data_dir, split, count, seed)
        return images, np.random.default_rng(len(split)).integers(0, 2, len(labels)).astype(np.uint8)

    monkeypatch.setattr(probe_module, "load_labelled", random_labels)
    options = ["--device=cpu", "--data=photos", "--samples=100", "--test-samples=200", "--features=whole"]
    code, printed, _ = convbench("probe", trained[0] / BEST, *options)
    assert code == 0
    assert all(35 < accuracy < 65 for _, accuracy in accuracies(printed).values())


def test_resume_needs_no_other_option(tmp_path, convbench):
    """Pictures, epochs, steps and threads are in the checkpoint: --resume and --out are enough, in any folder."""
    np.save(tmp_path / "p.npy", photo_crops(9, 0))
    out = tmp_path / "run"
    begun = ["--epochs", "1", "--batch-size", "4", "--checkpoint-steps", "1", "--threads", "1", "--held-out", "2"]
    code, _, errors = convbench("train", "--out", out, "--device", "cpu", "--data", tmp_path / "p.npy", *begun)
    assert (code, errors) == (0, "")
    kept = load_checkpoint(out / LAST, ARCHITECTURE)
    assert kept.asked == Requested(1, 1, str(tmp_path / "p.npy"), str(Path("data").resolve()))
    save_checkpoint(replace(kept, asked=replace(kept.asked, epochs=3)), out / LAST)  # as if it had been stopped
    assert kept.device == "cpu"
    code, printed, errors = convbench("train", "--resume", "--out", out)
    assert (code, errors) == (0, "")
    assert "7 pictures from" in printed
    assert "1 threads" in printed
    assert "on the same backend" in printed
    assert load_checkpoint(out / LAST, ARCHITECTURE).position.epoch == 3


def test_a_run_on_photographs_stays_on_photographs(trained, tmp_path, monkeypatch, convbench):
    """The run began without CIFAR-10 and is resumed where CIFAR-10 is present."""
    monkeypatch.chdir(tmp_path)
    write_batches(Path("data"))
    Path("run").mkdir()
    kept = load_checkpoint(trained[0] / LAST, ARCHITECTURE)
    assert kept.asked.data == "photos"
    save_checkpoint(replace(kept, asked=replace(kept.asked, data_dir=str(Path("data").resolve()))), Path("run") / LAST)
    code, printed, errors = convbench("train", "--resume", "--out", "run", "--epochs", "2")
    assert (code, errors) == (0, "")
    assert "photo crops" in printed


def test_foreign_files_are_not_overwritten(tmp_path, convbench):
    (tmp_path / "loss.png").write_text("mine")
    code, _, errors = convbench("train", "--out", tmp_path, "--data", "photos")
    assert (code, errors.count("\n")) == (2, 1)
    assert "already has loss.png, which would be overwritten" in errors
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_without_a_last_checkpoint_the_best_one_is_suggested(trained, tmp_path, convbench):
    (tmp_path / BEST).write_bytes((trained[0] / BEST).read_bytes())
    code, _, errors = convbench("train", "--resume", "--out", tmp_path)
    assert code == 2
    assert "best.safetensors (epoch 1) is intact: copy it to last.safetensors to resume from it" in errors


def test_training_and_held_out_crops_share_no_pixel(monkeypatch):
    """The colour of these photographs is a quarter of the column's number, so it shows where a crop comes from."""
    np.testing.assert_array_equal(labelled_crops(20, 3, "whole")[0], photo_crops(20, 3))
    columns = np.broadcast_to((np.arange(640) // 4).astype(np.uint8)[:, None], (427, 640, 3))
    found = type("Images", (), {"images": [columns, columns]})
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: found)
    seen = {}
    for split in ("train", "test", "whole"):
        crops, labels = labelled_crops(3000, 3, split)
        assert set(labels) == {0, 1}
        seen[split] = (int(crops.min()), int(crops.max()))
    assert seen == {"train": (0, 127), "test": (128, 159), "whole": (0, 159)}


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59.7, 61, 3599, 7300)] == [
        "0 s", "1 min 0 s", "1 min 1 s", "59 min 59 s", "2 h 1 min",
    ]  # fmt: skip


def test_the_metadata_of_a_checkpoint_is_json(trained):
    import safetensors

    with safetensors.safe_open(trained[0] / LAST, "numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["data"])["source"] == "photos"
    assert json.loads(metadata["learning_rate"]) == 0.001
