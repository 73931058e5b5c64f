"""Checkpoints: what goes in comes out, and what is damaged, cut or of something else is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from bench.training.checkpoint import SCHEMA, checkpoint_bytes, load_checkpoint, save_checkpoint
from bench.training.folder import BEST, LAST
from common.architecture import autoencoder
from common.errors import UsageError
from common.network import initial_parameters
from common.training import Position
from tests.support.tiny_training import ARCHITECTURE, tiny_config, train_tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of two epochs."""
    out = tmp_path_factory.mktemp("trained")
    train_tiny(out, tiny_config(2, "v4"))
    return out


@pytest.fixture
def checkpoint(trained):
    return load_checkpoint(trained / LAST, ARCHITECTURE)


def test_what_goes_in_comes_out(checkpoint, tmp_path):
    middle = replace(checkpoint, position=Position(2, 3, (0.1, 1 / 3, 7e-8)), epoch_seconds=0.1)
    save_checkpoint(middle, tmp_path / LAST)
    again = load_checkpoint(tmp_path / LAST, ARCHITECTURE)
    assert replace(again, parameters={}) == replace(middle, parameters={})
    for name, value in middle.parameters.items():
        np.testing.assert_array_equal(again.parameters[name], value)


def test_anybody_can_read_it(trained):
    """With the format's own library: canonical names, shapes and order, and texts that say what it is."""
    with safetensors.safe_open(trained / BEST, "numpy") as file:
        metadata = file.metadata()
        shapes = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    assert shapes == {name: value.shape for name, value in initial_parameters(ARCHITECTURE, 0).items()}
    assert metadata["schema"] == SCHEMA
    assert metadata["format"] == "pt"
    assert json.loads(metadata["architecture"])["stages"][1]["in_channels"] == 3
    stated = {name: json.loads(metadata[name]) for name in ("epoch", "step", "seed", "backend", "device", "batch_size")}
    assert stated == {"epoch": 2, "step": 0, "seed": 0, "backend": "v4", "device": "cpu", "batch_size": 2}
    assert len(json.loads(metadata["order_sha256"])) == 64
    assert json.loads(metadata["commit"])


def cut(share):
    return lambda data: data[: int(share * len(data))]


DAMAGES = {f"cut to {share}": cut(share) for share in (0, 0.001, 0.3, 0.9999)} | {
    "bit flipped in a parameter": lambda data: data[:-40] + bytes([data[-40] ^ 4]) + data[-39:],
    "bit flipped in the header's length": lambda data: data[:1] + bytes([data[1] ^ 4]) + data[2:],
    "one more byte": lambda data: data + b"0",
    "another learning rate": lambda data: data.replace(b'"learning_rate":"0.1"', b'"learning_rate":"0.2"'),
    "other text": lambda data: b"this is no checkpoint" * 50,
    "a header longer than the file": lambda data: (10**15).to_bytes(8, "little") + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_told_and_nothing_is_lost(trained, tmp_path, damage):
    path = tmp_path / LAST
    whole = (trained / LAST).read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    (tmp_path / BEST).write_bytes((trained / BEST).read_bytes())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"last\.safetensors .*best\.safetensors \(epoch \d\) is sound") as caught:
        train_tiny(tmp_path, tiny_config(3, "v4"))
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_another_architecture_is_told_by_its_stage(trained):
    with pytest.raises(UsageError, match=r"another architecture: conv1 is .*'out_channels': 3.* there and .*256"):
        load_checkpoint(trained / LAST, autoencoder())


def test_other_files_are_not_checkpoints(tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.numpy.save({"x": np.zeros(3)}))
    with pytest.raises(UsageError, match="not one of the suite's checkpoints: its schema is None"):
        load_checkpoint(path, ARCHITECTURE)
    for missing, words in ((tmp_path / "none", "no such file"), (tmp_path, "not a file")):
        with pytest.raises(UsageError, match=words):
            load_checkpoint(missing, ARCHITECTURE)


WRONG = {
    "a value that is no number": {"parameters": lambda c: {**c.parameters, "conv1.bias": np.full(3, np.nan, "f4")}},
    "a parameter of another shape": {"parameters": lambda c: {**c.parameters, "conv1.bias": np.zeros(4, "f4")}},
    "a parameter too many": {"parameters": lambda c: {**c.parameters, "conv6.bias": np.zeros(4, "f4")}},
    "a step that the epoch does not have": {"position": lambda c: Position(2, 4, (1.0,) * 4)},
    "steps without losses": {"position": lambda c: Position(2, 3, ())},
    "an epoch that is no count": {"position": lambda c: Position(2.5, 0, ())},
    "a batch of nothing": {"batch_size": lambda c: 0},
    "no learning rate": {"learning_rate": lambda c: 0},
    "a backend that is no text": {"backend": lambda c: 4},
    "an epoch without figures": {"history": lambda c: c.history[:1]},
    "figures that are none": {"history": lambda c: [{**row, "train_mse": "low"} for row in c.history]},
    "data without a name": {"data": lambda c: {}},
    "a best epoch that is none": {"best": lambda c: {"epoch": 1}},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_content_that_cannot_be_is_refused_even_if_its_digest_is_right(checkpoint, tmp_path, changes):
    path = tmp_path / LAST
    path.write_bytes(
        checkpoint_bytes(replace(checkpoint, **{name: make(checkpoint) for name, make in changes.items()}))
    )
    with pytest.raises(UsageError, match="is not a valid checkpoint"):
        load_checkpoint(path, ARCHITECTURE)
