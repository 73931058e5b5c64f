"""Checkpoints are read as they were written; damaged, truncated and foreign files are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from bench.training import checkpoint as module
from bench.training.checkpoint import SCHEMA, load_checkpoint, metadata_of, save_checkpoint
from bench.training.folder import BEST, LAST
from common.architecture import autoencoder
from common.errors import UsageError
from common.network import initial_parameters
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


def test_a_checkpoint_is_read_as_it_was_written(checkpoint, tmp_path):
    middle = replace(checkpoint, step=3, losses=(0.1, 1 / 3, 7e-8), epoch_seconds=0.1)
    save_checkpoint(middle, tmp_path / LAST)
    again = load_checkpoint(tmp_path / LAST, ARCHITECTURE)
    assert replace(again, parameters={}) == replace(middle, parameters={})
    for name, value in middle.parameters.items():
        np.testing.assert_array_equal(again.parameters[name], value)


def test_metadata_too_large_for_the_format_is_an_error_of_the_file(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "metadata_of", lambda checkpoint: {"losses": "0" * 101_000_000})
    with pytest.raises(OSError, match="does not fit its format"):
        save_checkpoint(checkpoint, tmp_path / LAST)
    assert list(tmp_path.iterdir()) == []


def test_the_safetensors_library_reads_it(trained):
    """Canonical names, shapes and order, and metadata as JSON texts."""
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
def test_damage_is_detected_and_no_file_changes(trained, tmp_path, damage):
    path = tmp_path / LAST
    whole = (trained / LAST).read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    (tmp_path / BEST).write_bytes((trained / BEST).read_bytes())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"last\.safetensors .*best\.safetensors \(epoch \d\) is intact") as caught:
        train_tiny(tmp_path, tiny_config(3, "v4"))
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_another_architecture_is_refused_with_its_first_different_stage(trained):
    with pytest.raises(UsageError, match=r"another architecture: .*conv1.* out_channels=3,.* there, .*conv1.*256"):
        load_checkpoint(trained / LAST, autoencoder())


def test_other_files_are_not_checkpoints(tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.numpy.save({"x": np.zeros(3)}))
    with pytest.raises(UsageError, match="not one of the suite's checkpoints: its schema is None"):
        load_checkpoint(path, ARCHITECTURE)
    for missing, words in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError, match=words):
            load_checkpoint(missing, ARCHITECTURE)


WRONG = {
    "a step that the epoch does not have": {"step": 4, "losses": [1.0] * 4},
    "steps without losses": {"step": 3, "losses": []},
    "a loss that is not finite": {"step": 1, "losses": [float("inf")]},
    "an epoch that is not an integer": {"epoch": 2.5},
    "an epoch that is a truth value": {"epoch": True},
    "an empty batch": {"batch_size": 0},
    "a learning rate of zero": {"learning_rate": 0},
    "a negative seed": {"seed": -1},
    "a backend that is not text": {"backend": 4},
    "an unknown device": {"device": "tpu"},
    "an unknown arithmetic": {"math": "fp8"},
    "an epoch without figures": {"history": []},
    "figures that are not numbers": {"history": [{"epoch": 1, "train_mse": "low"}, {}]},
    "data without a name": {"data": {}},
    "a best epoch without an error": {"best": {"epoch": 1}},
    "a field too many": {"momentum": 0.9},
    "a field of another kind": {"asked": [[[]]]},
}


@pytest.fixture
def forge(checkpoint, tmp_path, monkeypatch):
    """Writes a checkpoint with other metadata or parameters, and with a digest that matches them."""
    kept = metadata_of(checkpoint)

    def write(changes, parameters=None):
        monkeypatch.setattr(module, "metadata_of", lambda _: {**kept, **changes})
        save_checkpoint(
            replace(checkpoint, parameters={**checkpoint.parameters, **(parameters or {})}), tmp_path / LAST
        )
        return tmp_path / LAST

    return write


def refusal(path):
    """The error that reading a checkpoint ends in, which must be one line."""
    with pytest.raises(UsageError) as caught:
        load_checkpoint(path, ARCHITECTURE)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_impossible_metadata_is_refused_even_with_a_valid_digest(forge, changes):
    load_checkpoint(forge({}), ARCHITECTURE)
    path = forge({name: json.dumps(value) for name, value in changes.items()})
    assert refusal(path).startswith(f"{path} is not a valid checkpoint: ")


PARAMETERS = {
    "a value that is not a number": {"conv1.bias": np.full(3, np.nan, "f4")},
    "another shape": {"conv1.bias": np.zeros(4, "f4")},
    "a parameter too many": {"conv6.bias": np.zeros(4, "f4")},
}


@pytest.mark.parametrize("changes", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_impossible_parameters_are_refused_even_with_a_valid_digest(forge, changes):
    path = forge({}, changes)
    assert refusal(path).startswith(f"{path} is not a valid checkpoint: ")


def test_the_first_wrong_field_is_named(forge, checkpoint):
    asked = json.loads(metadata_of(checkpoint)["asked"])
    assert "asked.epochs: Input should be a valid integer" in refusal(
        forge({"asked": json.dumps(asked | {"epochs": "many"})})
    )


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "NaN", "1" * 5000], ids=len)
def test_metadata_that_is_not_json_is_refused(forge, text):
    path = forge({"seed": text})
    assert refusal(path).startswith(f"{path} is not a valid checkpoint: ")
