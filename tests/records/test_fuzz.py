"""A thousand damaged files: every reader either accepts a file or reports one clear error, and does so quickly.

Any other result is a defect: another exception, a crash, a hang, an attempt to unpickle. Mutations are seeded, so the
number in a failure reproduces it.
"""

import copy
import json
import pickle
import random
import signal
import struct
from contextlib import contextmanager

import numpy as np
import pytest

from bench.records import layers
from bench.records.compare import compare_files
from bench.records.kernels import read_kernels
from bench.records.run import read_run
from bench.records.samples import read_samples
from bench.training.checkpoint import _digest, load_checkpoint
from bench.training.folder import LAST
from bench.views import page as report
from bench.views.charts import drawn, run_charts
from bench.views.run_tables import results_table
from common.dataset import read_cifar10
from common.errors import RunError, UsageError
from common.picture_files import open_cifar10, open_npy
from tests.common.test_dataset import write_batches
from tests.support.results_files import kernels_file, layers_file, new_kernels_file, row, run_file
from tests.support.tiny_training import ARCHITECTURE, tiny_config, train_tiny

LONGEST_S = 20
DRAWN = 6  # of the damaged results that are still valid; only so many are drawn, because drawing is slow
ODD = [None, True, -1, 0, 1e308, -1e-320, 2**70, "", "x" * 300, "\ud800", "nan", [], [[]], {}, {"a": 1}, float("nan")]

COUNTS = {
    "checkpoint": 350,
    "run": 150,
    "layers": 130,
    "kernels": 30,
    "new kernels": 30,
    "pytest-benchmark": 60,
    "cifar10": 150,
    "npy": 100,
}
assert sum(COUNTS.values()) == 1000


def bytes_mutated(data, rng):
    """Flip a bit, overwrite, truncate, delete or repeat a part, or insert random bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 400) + 1)
        length = rng.choice([1, 2, 8, 64, 1000])
        match rng.randrange(6):
            case 0:
                if place < len(data):
                    data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + length] = rng.randbytes(min(length, max(0, len(data) - place)))
            case 2:
                del data[place:]
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                data[place:place] = rng.randbytes(length)
        if not data:
            break
    return bytes(data)


def json_mutated(document, rng):
    """Replace some value by an unusual one, add one, or delete it."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2])):
        places = []

        def walk(value, places=places):
            for key in value if isinstance(value, dict) else range(len(value)):
                places.append((value, key))
                if isinstance(value[key], dict | list):
                    walk(value[key])

        walk(document)
        if not places:
            break
        holder, key = rng.choice(places)
        if rng.random() < 0.2:
            del holder[key]
        elif rng.random() < 0.2 and isinstance(holder, dict):
            holder[rng.choice(["", "schema", "x", key + "?"])] = rng.choice(ODD)
        else:
            holder[key] = rng.choice(ODD)
    return document


def text_of(document):
    return json.dumps(document).encode("utf-8", "surrogatepass")


def checkpoint_mutated(data, rng):
    """Damage the bytes, or the metadata with a correct digest, as a forger would."""
    if rng.random() < 0.5:
        return bytes_mutated(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.3:
        header = json_mutated(header, rng)
    else:
        metadata = header["__metadata__"]
        name = rng.choice(sorted(set(metadata) - {"schema", "format", "sha256"}))
        value = json.loads(metadata[name])
        mutated = json_mutated({"value": value}, rng).get("value", 0)
        metadata[name] = json.dumps(mutated) if rng.random() < 0.9 else rng.choice(["", "{", "[" * 100_000, "NaN"])
        tensors = {
            key: np.frombuffer(data[8 + length :][slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
            for key, entry in header.items()
            if key != "__metadata__"
        }
        metadata["sha256"] = _digest(metadata, tensors)
    text = text_of(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


# Reading --------------------------------------------------------------------------------------------------------------


@contextmanager
def guarded(monkeypatch):
    """Inside, a hang or an attempt to unpickle fails the test."""

    def too_long(number, frame):
        raise AssertionError(f"reading took more than {LONGEST_S} s")

    def unpickled(*arguments, **options):
        raise AssertionError("something was unpickled")

    with monkeypatch.context() as patched:
        for name in ("load", "loads", "Unpickler"):
            patched.setattr(pickle, name, unpickled)
        before = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(LONGEST_S)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


def whole(mutate, original):
    """A function that mutates until the content has changed."""

    def mutated(rng):
        while (data := mutate(original, rng)) == original:
            pass
        return data

    return mutated


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A valid file of each kind with the functions that damage and read it: (content, mutate, file name, read)."""
    folder = tmp_path_factory.mktemp("sound")
    train_tiny(folder, tiny_config(2, "v4"))
    write_batches(folder / "cifar", counts=(3, 3), test=2)
    np.save(folder / "pictures.npy", np.arange(4 * 3072, dtype=np.uint32).astype(np.uint8).reshape(4, 3, 32, 32))
    run = run_file(row("v1", 8.0), row("v4", 2.0), row("torch-eager", 3.0, peer=True))
    benchmark = {
        "machine_info": {"cpu": {"brand_raw": "Example"}, "node": "n"},
        "benchmarks": [
            {"fullname": "t.py::test[v4-cpu-step]", "name": "test", "params": {}, "extra_info": {"math": "fp32"},
             "stats": {"data": [0.1, 0.11, 0.12, 0.1, 0.1, 0.11], "min": 0.1, "rounds": 6}},
        ],
        "commit_info": {"id": "0123456789", "dirty": False}, "datetime": "2026-01-01T00:00:00", "version": "5.3",
    }  # fmt: skip
    documents = {"run": run, "layers": layers_file(), "kernels": kernels_file(), "pytest-benchmark": benchmark}
    documents["new kernels"] = new_kernels_file()

    def json_or_bytes(document):
        return lambda original, rng: (
            text_of(json_mutated(document, rng)) if rng.random() < 0.7 else bytes_mutated(original, rng)
        )

    left = {"charts": DRAWN, "pages": 2 * DRAWN}

    def seldom(what):
        left[what] -= 1
        return left[what] >= 0

    def read_any(path):
        sources = report.read_sources([path])
        if seldom("pages"):
            report.render(sources)

    def read_run_file(path):
        record = read_run(path)
        results_table(record)
        charts = run_charts(record)
        if charts and seldom("charts"):
            drawn(charts["epoch-time"], "svg")
        compare_files(path, path, alpha=0.05, effect=0.05)
        read_any(path)

    def read_layers_file(path):
        layers.summarise_layers(layers.read_layers(path))
        read_samples(path)
        read_any(path)

    def read_kernel_file(path):
        read_kernels(path)
        read_any(path)

    def read_cifar(path):
        images, labels = read_cifar10(path.parent)
        mapped = open_cifar10(path.parent, "train")
        assert images.shape == (len(labels), 3, 32, 32)
        np.testing.assert_array_equal(mapped.load(), images)

    def read_pictures(path):
        assert open_npy(path).load().shape[1:] == (3, 32, 32)

    readers = {
        "checkpoint": ((folder / LAST).read_bytes(), checkpoint_mutated, LAST, read_checkpoint),
        "cifar10": ((folder / "cifar/data_batch_2.bin").read_bytes(), bytes_mutated, "data_batch_2.bin", read_cifar),
        "npy": ((folder / "pictures.npy").read_bytes(), bytes_mutated, "pictures.npy", read_pictures),
    }
    reads = {
        "run": read_run_file,
        "layers": read_layers_file,
        "kernels": read_kernel_file,
        "new kernels": read_kernel_file,
        "pytest-benchmark": read_samples,
    }
    for kind, document in documents.items():
        readers[kind] = (text_of(document), json_or_bytes(document), f"{kind}.json", reads[kind])
    return folder, readers


def read_checkpoint(path):
    checkpoint = load_checkpoint(path, ARCHITECTURE)
    assert all(np.isfinite(value).all() for value in checkpoint.parameters.values())


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files(originals, tmp_path, monkeypatch, kind):
    folder, readers = originals
    original, mutate, name, read = readers[kind]
    for path in (folder / "cifar").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / name
    path.write_bytes(original)
    read(path)  # the undamaged file
    messages = []
    mutated = whole(mutate, original)
    for number in range(COUNTS[kind]):
        rng = random.Random(f"{kind}:{number}")
        path.unlink()  # a new file: the previous one may still be mapped into memory
        path.write_bytes(mutated(rng))
        try:
            with guarded(monkeypatch):
                read(path)
        except (UsageError, RunError) as error:
            messages.append(str(error))
        except BaseException as error:
            raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
    assert all(message.strip() and "\n" not in message for message in messages), "an error is one line"
    assert len(messages) > COUNTS[kind] / 3, "most damage should be detected"


def test_objects_are_never_unpickled(tmp_path):
    """An array of objects is a pickle; it is refused without being read."""

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.save(tmp_path / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="not a valid array of pictures"):
        open_npy(tmp_path / "trap.npy")
    assert not (tmp_path / "sprung").exists()
