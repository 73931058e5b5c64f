"""Memory-mapped pictures: equal to loaded ones, larger than memory, and truncated while they are read."""

import numpy as np
import psutil
import pytest

from bench.training.data import load_split, load_training_data
from common.architecture import autoencoder
from common.dataset import read_cifar10
from common.errors import RunError, UsageError
from common.network import Network, initial_parameters
from common.picture_files import first_pictures, open_cifar10, open_npy
from common.training import Trainer
from tests.common.test_dataset import write_batches
from versions.registry import find


def test_gathered_from_several_files_in_any_order(tmp_path):
    write_batches(tmp_path, counts=(4, 4, 3, 3))
    expected, _ = read_cifar10(tmp_path)
    files = open_cifar10(tmp_path, "train")
    assert len(files) == 14
    assert files.nbytes == expected.nbytes
    np.testing.assert_array_equal(files.load(), expected)
    chosen = np.array([13, 0, 7, 7, 3, 11], np.int32)
    out = np.empty((6, 3, 32, 32), np.uint8)
    files.gather(chosen, out)
    np.testing.assert_array_equal(out, expected[chosen])
    part = files.part(5, 6)
    assert len(part) == 6
    np.testing.assert_array_equal(part.load(), expected[5:11])
    np.testing.assert_array_equal(first_pictures(part.part(1, 3), 2), expected[6:8])
    np.testing.assert_array_equal(first_pictures(expected, 2), expected[:2])


def test_labels_of_mapped_files_are_checked(tmp_path):
    write_batches(tmp_path)
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(UsageError, match=r"data_batch_2\.bin: record 0 has label 10"):
        open_cifar10(tmp_path, "train")


def test_a_file_truncated_while_mapped_is_an_error_and_no_crash(tmp_path):
    write_batches(tmp_path)
    files = open_cifar10(tmp_path, "train")
    out = np.empty((1, 3, 32, 32), np.uint8)
    (tmp_path / "data_batch_1.bin").unlink()  # the mapping keeps the data
    files.gather(np.array([0]), out)
    with (tmp_path / "data_batch_3.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(RunError, match=r"data_batch_3\.bin was truncated"):
        files.gather(np.array([9]), out)


WRONG = {
    "of floats": np.zeros((2, 3, 32, 32), np.float32),
    "of other pictures": np.zeros((2, 3, 28, 28), np.uint8),
    "of one picture": np.zeros((3, 32, 32), np.uint8),
    "empty": np.zeros((0, 3, 32, 32), np.uint8),
}


@pytest.mark.parametrize("array", WRONG.values(), ids=WRONG.keys())
def test_other_arrays_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UsageError, match=r"a\.npy is not a valid array of pictures, uint8 \(N, 3, 32, 32\): "):
        open_npy(tmp_path / "a.npy")


def test_the_last_pictures_of_an_array_are_held_out(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (13, 3, 32, 32), np.uint8)
    np.save(tmp_path / "a.npy", pictures)
    source = str(tmp_path / "a.npy")
    for stream in (False, True):
        data = load_training_data(source, tmp_path, None, None, 0, stream=stream)
        assert (len(data.train), len(data.held_out)) == (11, 2)  # one held out for five
        np.testing.assert_array_equal(first_pictures(data.train, 11), pictures[:11])
        np.testing.assert_array_equal(first_pictures(data.held_out, 2), pictures[11:])
    data = load_training_data(source, tmp_path, 4, 0, 0)
    assert (len(data.train), len(data.held_out)) == (4, 0)
    assert len(load_training_data(source, tmp_path, 13, None, 0).train) == 13
    for samples, held_out in ((13, 1), (None, 13), (14, None)):
        with pytest.raises(UsageError, match="holds 13 pictures"):
            load_training_data(source, tmp_path, samples, held_out, 0)
    with pytest.raises(UsageError, match="has no splits"):
        load_split(source, tmp_path, "test", 5, 0)
    images, words = load_split(source, tmp_path, None, 5, 0)
    np.testing.assert_array_equal(images.load(), pictures[:5])
    assert "a.npy" in words


def test_pictures_that_do_not_fit_into_memory_stay_in_their_files(tmp_path):
    write_batches(tmp_path, counts=(4, 4), test=3)
    sizes = {}
    for room in (10**9, 2 * 11 * 3072, 2 * 11 * 3072 - 1):
        data = load_training_data("cifar10", tmp_path, None, 3, 0, room_bytes=room)
        sizes[room] = [isinstance(part, np.ndarray) for part in (data.train, data.held_out)]
    assert list(sizes.values()) == [[True, True], [True, True], [False, False]]


def private_bytes():
    """Memory of this process that the system cannot drop, that is, without mapped files."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def test_training_on_a_file_larger_than_memory(tmp_path):
    """A sparse file 1.5 times as large as the machine's memory; training needs one batch of it at a time."""
    count = int(1.5 * psutil.virtual_memory().total / 3072)
    path = tmp_path / "large.npy"
    mapped = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 3, 32, 32))
    known = np.array([0, 1, count // 3, count - 2, count - 1])
    mapped[known] = np.arange(1, 6, dtype=np.uint8)[:, None, None, None]
    mapped.flush()
    del mapped
    if psutil.disk_usage(str(tmp_path)).free < 1e9 or path.stat().st_blocks * 512 > 1e9:
        pytest.skip("no sparse files on this file system")
    data = load_training_data(str(path), tmp_path, None, 0, 0)
    assert len(data.train) == count
    architecture = autoencoder((32, 32), (3, 2))
    network = Network(find("v4").load("cpu"), architecture, 64, initial_parameters(architecture, 0))
    trainer = Trainer(network, data.train, learning_rate=0.1, seed=0)
    trainer.take_steps(2)
    before = private_bytes()
    trainer.take_steps(30)
    assert trainer.steps_done == 32
    assert np.isfinite(trainer.read_losses()[:32]).all()
    assert private_bytes() - before < 20e6
    found = np.empty((5, 3, 32, 32), np.uint8)
    data.train.gather(known, found)
    np.testing.assert_array_equal(found[:, 1, 5, 7], [1, 2, 3, 4, 5])
