"""``--width``: describe shows that network, and run verifies and trains it."""

import sys

import pytest

from bench import cli
from bench.commands import run as run_command
from common.errors import RunError


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convbench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_all_tables_of_describe_follow_the_width(monkeypatch, capsys):
    assert called(monkeypatch, "describe", "--width", 0.5) == 0
    half = capsys.readouterr().out
    assert called(monkeypatch, "describe") == 0
    whole = capsys.readouterr().out
    for words in ("stages, one picture (C x H x W), width 0.5", "on the cpu, batch 64, width 0.5", "191,619", "276.0"):
        assert words in half
    for words in ("625 MB", "design document", "751,875"):
        assert words not in half
        assert words in whole
    assert "The same at every width." in half
    assert "width" not in whole


@pytest.mark.parametrize(("arguments", "width"), [(["--width", 2], 2.0), ([], 1.0)])
def test_run_measures_the_network_of_the_width(monkeypatch, capsys, tmp_path, arguments, width):
    found = []

    def keep(setup, *rest, **options):
        found.append(setup)
        raise RunError("enough")

    monkeypatch.setattr(run_command, "run", keep)
    assert called(monkeypatch, "run", *arguments, "--device", "cpu", "--samples", 2, "--out", tmp_path, "--quiet") == 1
    assert [setup.width for setup in found] == [width]
    assert {setup.task(setup.infos[0], None).width for setup in found} == {width}
