"""The Markdown documents are true: links lead somewhere, commands and flags exist, figures are those of the records."""

import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from typer.main import get_command

import bench
from bench.cli import app
from bench.machine.devices import ROOT
from bench.records.training import DataIdentity, Requested
from bench.training.checkpoint import Checkpoint, save_checkpoint
from bench.views.charts import draw_charts
from bench.views.readme import named_file, written
from common import reference
from common.architecture import autoencoder
from common.network import initial_parameters
from versions.registry import REGISTRY

ROOMS = ("bench", "common", "results", "tests", "versions")
README, CHANGELOG, BENCH = ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "bench" / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.md"))])
README_WORDS = 1_300
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def read(path):
    return path.read_text(encoding="utf-8")


def test_the_documents_are_found():
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert names >= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"{room}/README.md" for room in ROOMS[2:])}


# Links ----------------------------------------------------------------------------------------------------------------


def anchors(text):
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path, text):
    """The links of a document that lead nowhere; links to other sites are not followed."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text)):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        found = file.exists() and (not anchor or anchor in anchors(text if file == path else read(file)))
        broken += [] if found else [link]
    return broken


@each_document
def test_links_lead_somewhere(path):
    assert broken_links(path, read(path)) == []


@pytest.mark.parametrize("link", ["missing.md", "#no-heading", "bench/README.md#no-heading", "http://example.org"])
def test_a_broken_link_is_found(link):
    assert broken_links(README, f"# A heading\n[text]({link})") == [link]


# Commands -------------------------------------------------------------------------------------------------------------


def commands(text):
    """Every command that a document shows, in words: lines of plain code blocks, and code within a sentence."""
    lines = [line for language, block in FENCED.findall(text) if not language for line in block.splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    for line in lines:
        if re.match(r"(\w+=\S+ )*(convbench|python|pytest) ", line):
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    del words[0]
                yield words


def fault(words, pytestconfig):
    """What is wrong with a command; empty if nothing is."""
    match words:
        case ["convbench", *rest] | ["python", "-m", "bench", *rest]:
            return convbench_fault(rest)
        case ["python", "-m", "pytest", *rest]:
            return pytest_fault(rest, pytestconfig)
        case ["python", "-m", "pip", "install", *rest]:
            return pip_fault(rest)
        case ["python", "-m", module, *rest]:
            return module_fault(module, rest)
    return "no document should show this"


def convbench_fault(words):
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if words and hasattr(command, "commands") and not words[0].startswith("-"):
        return f"no command {words[0]}"
    known = {"--help", *(flag for parameter in command.params for flag in parameter.opts)}
    return unknown_flags(words, known)


def unknown_flags(words, known):
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    return f"no flag {unknown[0]}" if unknown else ""


def pytest_fault(words, pytestconfig):
    for word in words:
        if word.startswith("--"):
            try:
                pytestconfig.getoption(word.partition("=")[0])
            except ValueError:
                return f"no flag {word}"
        elif "/" in word and not (ROOT / word.partition("::")[0]).exists():
            return f"no file {word}"
    return ""


def pip_fault(words):
    extras = {extra for word in words for group in re.findall(r"^\.\[(.+)\]$", word) for extra in group.split(",")}
    unknown = extras - PROJECT["optional-dependencies"].keys()
    return f"no extra {sorted(unknown)}" if unknown else ""


def module_fault(module, words):
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        return f"no module {module}"
    return unknown_flags(words, flags_of_module(module)) if any(word.startswith("--") for word in words) else ""


@functools.cache
def flags_of_module(module):
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"], env=environment, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--[a-z][a-z-]*", shown.stdout))


# The changelog also tells of what is gone.
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != CHANGELOG], ids=lambda path: path.parent.name)
def test_commands_and_flags_exist(path, pytestconfig):
    found = [(shlex.join(words), why) for words in commands(read(path)) if (why := fault(words, pytestconfig))]
    assert found == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("convbench rum", "no command rum"),
        ("convbench data upload", "no command upload"),
        ("python -m bench run --bakend v1", "no flag --bakend"),
        ("FIRST=1 convbench run --backend=v1 && convbench plot --in x", "no flag --in"),
        ("python -m pytest tests/nowhere.py", "no file tests/nowhere.py"),
        ("python -m pytest --benchmark-never", "no flag --benchmark-never"),
        ('python -m pip install -e ".[test,nothing]"', "no extra ['nothing']"),
        ("python -m bench.nothing.at_all", "no module bench.nothing.at_all"),
        ("python -m bench.experiments.aa_test --times 3", "no flag --times"),
        ("python setup.py", "no document should show this"),
    ],
)
@pytest.mark.parametrize("form", ["```\n{}\n```\n", "text `{}` text"])
def test_a_wrong_command_is_found(form, line, expected, pytestconfig):
    assert [why for words in commands(form.format(line)) if (why := fault(words, pytestconfig))] == [expected]


def test_every_command_is_explained():
    named = {words[1] for words in commands(read(BENCH)) if words[0] == "convbench" and len(words) > 1}
    assert named >= get_command(app).commands.keys()


def missing_paths(text):
    """Files and folders that a document names as code, from the root; not the placeholders in capitals."""
    spans = re.findall(r"`([^`\s]+)`", FENCED.sub("", text))
    paths = [span for span in spans if re.match(rf"({'|'.join(ROOMS)})/", span) and not re.search("FILE|FOLDER", span)]
    return [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]


@each_document
def test_named_files_exist(path):
    made_by_a_command = ["results/benchmarks/"]
    assert [name for name in missing_paths(read(path)) if name not in made_by_a_command] == []


def test_a_missing_file_is_found():
    assert missing_paths("`bench/cli.py` `tests/*/test_files.py` `results/runs/FILE.json` `bench/gone.py`") == [
        "bench/gone.py"
    ]


# The README -----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(read(README).split()) <= README_WORDS


@pytest.mark.parametrize(
    "command",
    [
        "python -m pip install -e . && convbench run",
        'python -m pip install -e ".[test]" && python -m pytest',
    ],
)
def test_the_two_commands_are_in_the_readme(command):
    assert f"```\n{command}\n```" in read(README)


def test_every_version_is_in_the_tour():
    tour = read(ROOT / "versions" / "README.md")
    for info in REGISTRY:
        assert f"| {info.name} | " in tour
        assert info.package.rpartition(".")[2] in tour


def test_the_results_are_the_files(tmp_path):
    results = named_file(README)
    present, wanted = written(README, results)
    assert present == wanted, "README.md is stale: run convbench readme"
    # The SVG beside the PNG has its words as text; each matplotlib draws its lines a little differently.
    drawn = {path.name: path for path in draw_charts(results, tmp_path)}
    name = f"{results.stem}_speedup.svg"
    committed = ROOT / "results" / "charts" / name
    assert committed.with_suffix(".png").is_file()
    words = [re.findall(r"<text [^>]*>([^<]*)</text>", path.read_text()) for path in (committed, drawn[name])]
    assert len(words[0]) > 10
    assert words[0] == words[1], "the chart is stale: run convbench plot"


def test_the_changelog_begins_with_this_version():
    assert re.search(r"^## \[(.+?)\]", read(CHANGELOG), re.MULTILINE).group(1) == bench.__version__


# Figures in the text --------------------------------------------------------------------------------------------------


def test_the_readme_says_whether_a_gpu_was_measured():
    records = [json.loads(read(file)) for file in (ROOT / "results" / "runs").glob("*.json")]
    measured = any(record["environment"].get("gpu") for record in records)
    assert ("GPU figures are not measured yet" in read(README)) != measured


def test_the_learning_rates_are_the_records():
    text = read(BENCH)
    (name,) = set(re.findall(r"\(\.\./(results/runs/\S+_learning-rates\.json)\)", text))
    for row in json.loads(read(ROOT / name))["rows"]:
        rates, diverged = row["rates"], row["diverged"]
        label = f"{rates[0]:g}" if len(set(rates)) == 1 else f"{rates[0]:g}, then {rates[1]:g} from epoch 2"
        outcome = "diverges in step {step} of epoch {epoch}".format_map(diverged) if diverged else None
        outcome = outcome or f"held-out MSE {row['held_out_mse'][-1]:.5f} after {len(rates)} epochs"
        assert f"| {label} | {outcome} |" in text


def test_the_aa_tests_are_the_records():
    text = " ".join(read(BENCH).split())
    stated = re.findall(r"in (\d+) of \[twenty[^\]]*\]\(\.\./([^)]+)\)", text)
    assert len(stated) == 3
    records = [json.loads(read(ROOT / name)) for _, name in stated]
    assert [int(held) for held, _ in stated] == [record["held"] for record in records]
    assert [len(record["runs"]) for record in records] == [20] * 3
    ratios = [run["ratio"] for run in records[0]["runs"]]
    assert f"from {min(ratios):.2f} to {max(ratios):.2f}" in text
    assert all(any("noisy" in warning for warning in run["warnings"]) for run in records[0]["runs"])


# Programs -------------------------------------------------------------------------------------------------------------


def program(start):
    (code,) = re.findall(rf"```python\n({start}(?:.|\n)*?)```\n", read(BENCH))
    return code


def test_the_program_runs(capsys):
    code = program("from common.architecture import")
    assert "photo_crops(256," in code
    exec(code.replace("photo_crops(256,", "photo_crops(16,"), {})
    assert 0 < float(capsys.readouterr().out) < 10


def test_a_checkpoint_opens_in_pytorch_as_shown(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: peers)")
    code = program(r"from safetensors\.torch import")
    (model,) = re.findall(r"`(nn\.Sequential\(.*\))`", read(BENCH))
    assert len([line for line in code.splitlines() if line]) == 5
    architecture = autoencoder()
    parameters = initial_parameters(architecture, 3)
    pictures = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
    made = Checkpoint(
        parameters=parameters,
        architecture=architecture,
        epoch=0,
        step=0,
        losses=(),
        seed=3,
        order_sha256="",
        batch_size=64,
        samples=64,
        learning_rate=0.001,
        data=DataIdentity("photos", 0, ""),
        asked=Requested(1, 0, "photos", "data"),
        backend="v4",
        device="cpu",
        precision="fp32",
        threads=1,
        commit="",
        epoch_seconds=0.0,
        history=[],
        best=None,
    )
    path = tmp_path / "best.safetensors"
    save_checkpoint(made, path)
    scope = {}
    exec(code.replace("runs/first/best.safetensors", str(path)), scope)
    with torch.no_grad():
        found = eval(model, scope)(torch.from_numpy(pictures)).numpy()
    expected = reference.forward_backward(architecture, parameters, pictures.astype(np.float64)).prediction
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
