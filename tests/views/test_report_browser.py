"""The report's page in a browser, narrow and wide, light and dark: no overflow, and no message on the console."""

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from bench.views.page import read_sources, render
from tests.support.results_files import NO_TIME, kernel_row, kernels_file, layers_file, row, run_file, write

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

WIDTHS = (320, 360, 768, 1280, 1600)
FRAME = '<iframe style="border:0;display:block" width="{width}" height="{height}" srcdoc="{page}"></iframe>'
MEASURE = """<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement, sticking = [];
    for (const element of page.body.querySelectorAll("*")) {
      const scrolls = element.parentElement.closest(".scroll, .quiet");
      const box = element.getBoundingClientRect();
      if (!scrolls && box.width && (box.right > root.clientWidth + 1 || box.left < -1)) sticking.push(element.outerHTML.slice(0, 120));
    }
    return {width: root.clientWidth, scroll: Math.max(root.scrollWidth, page.body.scrollWidth), sticking,
            height: root.scrollHeight, drawings: [...page.querySelectorAll("picture img")].filter((img) => img.naturalWidth).length};
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""  # noqa: E501


def chromium(folder, page, *options):
    """Open a page in headless Chromium; returns what it wrote to standard output, and its log."""
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    arguments += ["--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *options]
    done = subprocess.run(
        [CHROMIUM, *arguments, page.as_uri()], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with everything on it, and names as long as they get."""
    folder = tmp_path_factory.mktemp("page")
    long = "an_unbroken_name_" * 6
    failed = row("v3", 1.0, **(NO_TIME | {"reason": long}))
    rows = [row("v1", 14.0), row("v4", 2.0, label=long), row("torch-eager", 3.0), failed]
    files = [run_file(*rows, warnings=[long]), layers_file(), kernels_file(kernel_row(long), kernel_row("k", "sm_80"))]
    text = render(read_sources([write(folder, f"{long}{i}.json"[-90:], data) for i, data in enumerate(files)]))
    return text.replace("<details>", "<details open>")


def frames(folder, page, sizes, extra=""):
    inside = "".join(FRAME.format(width=width, height=height, page=html.escape(page)) for width, height in sizes)
    path = folder / "frames.html"
    head = '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    path.write_text(f'{head}<body style="margin:0">{inside}<p id="found"></p>{extra}', encoding="utf-8")
    return path


def test_nothing_overflows_at_any_width(tmp_path, page):
    path = frames(tmp_path, page, [(width, 900) for width in WIDTHS], MEASURE)
    dom, log = chromium(tmp_path, path, "--window-size=1700,4600", "--dump-dom")
    found = json.loads(html.unescape(re.search(r'<p id="found">(.*?)</p>', dom).group(1)))
    assert [frame["width"] for frame in found] == list(WIDTHS)
    for frame in found:
        assert frame["scroll"] <= frame["width"], frame
        assert frame["sticking"] == []
        assert frame["drawings"] == 5  # speedup, epochs and loss; steps and roofline
    assert "CONSOLE" not in log, log


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(tmp_path, page, scheme):
    path = frames(tmp_path, page, [(360, 1500), (1280, 1500)])
    picture = tmp_path / f"{scheme}.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    _, log = chromium(tmp_path, path, "--window-size=1280,3000", f"--screenshot={picture}", *dark)
    assert "CONSOLE" not in log, log
    with Image.open(picture) as image:
        shown = image.convert("L")
    assert shown.size == (1280, 3000)
    for left, top, right, bottom in ((0, 0, 360, 1500), (0, 1500, 1280, 3000)):
        part = shown.crop((left, top, right, bottom))
        levels = part.histogram()
        paper = max(range(256), key=levels.__getitem__)
        assert paper > 240 if scheme == "light" else paper < 40
        assert sum(levels[128:]) < 0.5 * sum(levels) if scheme == "dark" else sum(levels[:128]) < 0.5 * sum(levels)
        assert len([level for level in levels if level]) > 50  # something is drawn on it
