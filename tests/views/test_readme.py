"""The README says what is so: its links lead somewhere, its commands exist, its figures are in the files it names."""

import re
import sys

import numpy as np
import pytest

from bench import cli
from bench.machine.devices import ROOT
from bench.records.run import prepare_folder, write_record
from bench.training.checkpoint import Checkpoint, save_checkpoint
from bench.views.charts import draw_charts
from bench.views.readme import BEGIN, END, named_file, replace, written
from common import reference
from common.architecture import autoencoder
from common.errors import UsageError
from common.network import initial_parameters
from common.training import Position
from tests.records.test_records import record, row
from versions.registry import REGISTRY

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)]+)\)", TEXT))
def test_links_lead_somewhere(target):
    if target.startswith("#"):
        headings = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
        assert target[1:] in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    else:
        assert (ROOT / target).is_file()


def test_every_command_exists():
    from typer.main import get_command

    from bench.cli import app

    known = get_command(app).commands
    named = set(re.findall(r"convbench ([a-z]+)", TEXT))
    assert {"run", "list", "doctor", "check", "plot", "describe", "kernels", "data"} <= named
    assert named <= known.keys()


def test_every_version_is_told():
    for info in REGISTRY:
        assert f"| {info.name} | " in TEXT


def test_the_results_are_the_files(tmp_path):
    results = named_file(ROOT / "README.md")
    present, wanted = written(ROOT / "README.md", results)
    assert present == wanted, "the README is stale: convbench readme writes it anew"
    # The picture's twin in SVG has its words as text; its lines are drawn a little differently by each matplotlib.
    drawn = {path.name: path for path in draw_charts(results, tmp_path)}
    name = f"{results.stem}_speedup.svg"
    committed = ROOT / "results" / "charts" / name
    assert committed.with_suffix(".png").is_file()
    words = [re.findall(r"<text [^>]*>([^<]*)</text>", path.read_text()) for path in (committed, drawn[name])]
    assert len(words[0]) > 10
    assert words[0] == words[1], "the chart is stale: convbench plot draws it anew"


@pytest.fixture
def small(tmp_path):
    """A README of its own, with a results file and its charts beside it."""
    rows = [row("v1", [8.0] * 6), row("v4", [2.0] * 6), row("v2", [], first_epoch_s=None, reason="it | *crashed*")]
    results = write_record(record(*rows), prepare_folder(tmp_path / "results"))
    draw_charts(results, tmp_path / "results" / "charts")
    readme = tmp_path / "README.md"
    readme.write_bytes(f"before\r\n{BEGIN}old{END}\r\nafter".encode())
    return readme, results


def test_only_what_is_between_the_markers_changes(small):
    readme, results = small
    present, wanted = written(readme, results)
    assert present != wanted
    replace(readme, wanted)
    text = readme.read_bytes().decode()
    assert text.startswith(f"before\r\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\r\nafter")
    assert "| 4 (4 to 4) |" in text
    assert r"no time: it \| \*crashed\*" in text
    assert "On a GPU: not measured." in text
    assert named_file(readme) == results
    assert written(readme, results)[0] == written(readme, results)[1]
    assert sorted(path.name for path in readme.parent.iterdir()) == ["README.md", "results"]


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, BEGIN + BEGIN + END, BEGIN + END + END])
def test_markers_missing_doubled_or_turned_are_refused(small, text):
    readme, results = small
    readme.write_text(text)
    with pytest.raises(UsageError, match="must have one"):
        written(readme, results)
    assert readme.read_text() == text


def test_what_cannot_be_linked_or_shown_is_refused(small, tmp_path_factory):
    readme, results = small
    with pytest.raises(UsageError, match="names no results file"):
        named_file(readme)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / results.name
    elsewhere.write_bytes(results.read_bytes())
    with pytest.raises(UsageError, match="not beneath"):
        written(readme, elsewhere)
    next((readme.parent / "results" / "charts").glob("*_speedup.png")).unlink()
    with pytest.raises(UsageError, match="convbench plot"):
        written(readme, results)


def test_check_writes_nothing_and_ends_with_1(small, monkeypatch, capsys):
    readme, results = small
    stale = readme.read_bytes()
    ends = []
    for arguments in (["--check", results], [results], ["--check"], ["--check", readme]):
        monkeypatch.setattr(sys, "argv", ["convbench", "readme", "--readme", str(readme), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        ends.append((ended.value.code, readme.read_bytes() == stale, capsys.readouterr().err.count("\n")))
    assert ends == [(1, True, 1), (0, False, 0), (0, False, 0), (2, False, 1)]


def test_a_checkpoint_opens_in_pytorch_as_the_readme_shows(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: peers)")
    (code,) = re.findall(r"```python\n(from safetensors\.torch import (?:.|\n)*?)```\n", TEXT)
    (model,) = re.findall(r"`(nn\.Sequential\(.*\))`", TEXT)
    assert len([line for line in code.splitlines() if line]) == 5
    architecture = autoencoder()
    parameters = initial_parameters(architecture, 3)
    pictures = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
    made = Checkpoint(
        parameters, architecture, Position(), seed=3, order_sha256="", batch_size=64, samples=64, learning_rate=0.001,
        data={}, asked={}, backend="v4", device="cpu", math="fp32", threads=1, commit="", epoch_seconds=0.0, history=[],
        best=None,
    )  # fmt: skip
    path = tmp_path / "best.safetensors"
    save_checkpoint(made, path)
    scope = {}
    exec(code.replace("runs/first/best.safetensors", str(path)), scope)
    with torch.no_grad():
        found = eval(model, scope)(torch.from_numpy(pictures)).numpy()
    expected = reference.forward_backward(architecture, parameters, pictures.astype(np.float64)).prediction
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
