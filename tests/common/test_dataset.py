"""Pictures: the binary format, damaged files, photo crops, and the download."""

import functools
import hashlib
import http.server
import tarfile
import threading

import numpy as np
import pytest

from common.dataset import (
    RECORD_BYTES,
    download_cifar10,
    load_pictures,
    photo_crops,
    read_cifar10,
)
from common.errors import UsageError


def write_batches(folder, counts=(4, 4, 4, 4, 4), test=3, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i, count in enumerate(counts, 1):
        data = rng.integers(0, 256, (count, RECORD_BYTES), np.uint8)
        data[:, 0] %= 10
        data.tofile(folder / f"data_batch_{i}.bin")
        records.append(data)
    data = rng.integers(0, 256, (test, RECORD_BYTES), np.uint8)
    data[:, 0] %= 10
    data.tofile(folder / "test_batch.bin")
    return np.concatenate(records)


def test_reads_records_in_order_as_planes(tmp_path):
    records = write_batches(tmp_path)
    images, labels = read_cifar10(tmp_path)
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(labels, records[:, 0])
    # Green, row 2, column 5 of the record in the second file.
    assert images[6, 1, 2, 5] == records[6, 1 + 1024 + 2 * 32 + 5]


def test_reads_a_prefix_and_the_test_split(tmp_path):
    records = write_batches(tmp_path)
    images, _ = read_cifar10(tmp_path, "train", 6)
    np.testing.assert_array_equal(images.reshape(6, -1), records[:6, 1:])
    assert len(read_cifar10(tmp_path, "test")[0]) == 3


def test_reads_the_first_files_alone(tmp_path):
    write_batches(tmp_path, counts=(4, 4))
    assert len(read_cifar10(tmp_path)[0]) == 8


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[: 2 * RECORD_BYTES]), "truncated"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(bytes(10_001 * RECORD_BYTES)), "oversized"),
        (lambda path: path.write_bytes(b"\x0a" + path.read_bytes()[1:]), "label 10"),
        (lambda path: path.unlink(), "missing"),
    ],
    ids=["cut record", "cut between records", "empty", "oversized", "label", "gone"],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    write_batches(tmp_path)
    damage(tmp_path / "data_batch_2.bin")
    with pytest.raises(UsageError, match=message) as caught:
        read_cifar10(tmp_path, "train", 8)
    assert "data_batch_2.bin" in str(caught.value)


def test_too_many_samples_are_refused(tmp_path):
    write_batches(tmp_path)
    with pytest.raises(UsageError, match=r"21 samples asked for, but .* holds 20"):
        load_pictures("cifar10", tmp_path, 21, 0)
    with pytest.raises(UsageError, match="different crops"):
        photo_crops(10_000_000, 0)


def test_auto_prefers_cifar10_and_names_the_source(tmp_path):
    found = load_pictures("auto", tmp_path, 5, 0)
    assert found.source == "photos"
    write_batches(tmp_path / "cifar-10-batches-bin")
    found = load_pictures("auto", tmp_path, 5, 0)
    assert found.source == "cifar10"
    assert str(tmp_path) in found.description
    assert load_pictures("photos", tmp_path, 5, 0).source == "photos"


def test_missing_cifar10_names_the_searched_files(tmp_path):
    with pytest.raises(UsageError) as caught:
        load_pictures("cifar10", tmp_path, 5, 0)
    assert str(tmp_path / "data_batch_1.bin") in str(caught.value)
    assert "convbench data download" in str(caught.value)


@pytest.mark.parametrize("samples", [0, -3])
def test_counts_below_one_are_refused(tmp_path, samples):
    with pytest.raises(UsageError, match="at least 1"):
        load_pictures("photos", tmp_path, samples, 0)


def test_photo_crops_are_seeded_distinct_and_prefixes():
    crops = photo_crops(64, 3)
    assert crops.shape == (64, 3, 32, 32)
    assert crops.dtype == np.uint8
    np.testing.assert_array_equal(photo_crops(16, 3), crops[:16])
    assert not np.array_equal(photo_crops(64, 4), crops)
    assert len({crop.tobytes() for crop in crops}) == 64
    assert crops.std() > 20  # pictures, not a constant colour


@pytest.fixture
def served(tmp_path):
    """An archive like the real one on a local server; yields its address and MD5."""
    write_batches(tmp_path / "server" / "cifar-10-batches-bin")
    archive = tmp_path / "server" / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "server" / "cifar-10-batches-bin", "cifar-10-batches-bin")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "server")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/archive.tar.gz", hashlib.md5(archive.read_bytes()).hexdigest()
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_checks_and_unpacks(tmp_path, served):
    url, md5 = served
    folder = download_cifar10(tmp_path / "data", url, md5, progress=False)
    assert len(read_cifar10(folder)[0]) == 20
    # Only the finished folder is left, and a second call does nothing.
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-bin"]
    assert download_cifar10(tmp_path / "data", "http://127.0.0.1:9/none", md5, progress=False) == folder


@pytest.mark.parametrize("wrong", ["checksum", "address"])
def test_download_that_fails_leaves_nothing(tmp_path, served, wrong):
    url, md5 = served
    data = tmp_path / "data"
    address, checksum = (url, "0" * 32) if wrong == "checksum" else (url + ".gone", md5)
    with pytest.raises(UsageError, match="could not download"):
        download_cifar10(data, address, checksum, progress=False)
    assert list(data.iterdir()) == []
    assert download_cifar10(data, url, md5, progress=False).exists()
