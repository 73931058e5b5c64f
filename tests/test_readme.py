"""The README says what is so: its links lead somewhere, its commands exist, its figures are in the files it names."""

import json
import re
from pathlib import Path
from statistics import median

import pytest

from bench.charts import draw_charts
from versions.registry import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
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


def test_the_chart_is_of_the_results_file_beside_it(tmp_path):
    (chart,) = re.findall(r"!\[[^]]*\]\((results/charts/[^)]+_speedup\.png)\)", TEXT)
    results = ROOT / "results" / "runs" / (Path(chart).stem.removesuffix("_speedup") + ".json")
    assert f"({results.relative_to(ROOT).as_posix()})" in TEXT
    assert {path.name for path in draw_charts(results, tmp_path)} >= {Path(chart).name}


def test_the_ratio_to_pytorch_is_the_files():
    (name,) = re.findall(r"\((results/runs/[^)]*step-against-torch\.json)\)", TEXT)
    samples = json.loads((ROOT / name).read_text())["step_s"]
    ratio = median(samples["v4"]) / median(samples["torch"])
    rounds = [a / b for a, b in zip(samples["v4"], samples["torch"], strict=True)]
    assert f"took {ratio:.2f} of the time" in TEXT.replace("\n", " ")
    assert f"{min(rounds):.2f} to {max(rounds):.2f} round by round" in TEXT.replace("\n", " ")
    assert f"{len(rounds)} rounds" in TEXT
    shares = {f"{median(samples[name]) / median(samples['v1']):.2f}" for name in ("v2", "v3")}
    assert shares == set(re.findall(r"V2 and V3 each took (0\.\d\d) of V1's time", TEXT.replace("\n", " ")))
