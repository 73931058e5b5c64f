"""The rooms of bench/ and the order of imports: each room imports only from those below it."""

import ast

import pytest

from bench.machine.devices import ROOT

ORDER = (
    {"bench.cli", "bench.__main__"},
    {"bench.commands", "bench.experiments"},
    {"bench.measure", "bench.training", "bench.kernels"},
    {"bench.views"},
    {"bench.records"},
    {"bench.machine"},
    {"bench.model"},
    {"versions"},
    {"common"},
)
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
APART = {"bench.measure", "bench.training", "bench.kernels"}
"""Rooms of one floor that do not import one another."""

FILES = [path for package in ("bench", "versions", "common") for path in sorted((ROOT / package).rglob("*.py"))]
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 8


def room_of(module):
    """``bench.records`` for ``bench.records.run``, ``versions`` for any version."""
    first, _, rest = module.partition(".")
    if rest == "__version__":
        return "bench.model"
    return f"bench.{rest.partition('.')[0]}" if first == "bench" and rest else first


def imported(path):
    """Every module of the project that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which says less about its room"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("bench", "versions", "common"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    room = room_of(module)
    if room == "bench":
        return
    for name in imported(path):
        other = room_of(name)
        assert FLOOR[other] >= FLOOR[room], f"{module} imports {name}, which stands above it"
        assert other == room or not {room, other} <= APART, f"{module} imports {name}: the two stand apart"


def test_a_version_imports_no_other():
    for path in (ROOT / "versions").glob("*/*.py"):
        others = {name.split(".")[1] for name in imported(path) if name.startswith("versions.")}
        assert others <= {path.parent.name, "registry"}, path


def test_the_cpu_side_imports_no_gpu_code():
    for path in (ROOT / "versions").glob("*/cpu.py"):
        text = path.read_text(encoding="utf-8")
        assert "numba.cuda" not in text
        assert "import cuda" not in text
        assert "cupy" not in text


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "bench")], ids=str)
def test_files_and_functions_stay_readable(path):
    """A sense of proportion: whoever needs more room splits the file, or says here why not."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
            count -= bool(arguments.args) and arguments.args[0].arg in ("self", "cls")
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
            assert count <= MOST_PARAMETERS, node.name
