"""Cost against work: what is measured and what is kept, the table and the chart, and what is refused."""

import copy
import json
import sys

import pytest

from bench.commands.console import run_script
from bench.commands.options import options_of
from bench.experiments import cost_of_work
from bench.experiments.cost_of_work import CostOptions, measure_cost_of_work, pictures_an_epoch
from bench.machine.environment import Environment
from bench.records.run import RunRecord, RunSettings
from bench.views.charts import drawn
from bench.views.cost_views import cost_figure, cost_table
from tests.support.results_files import row, run_record
from tests.views.test_network_tables import assert_words_whole


class Machine:
    """Stands for the machine: verifies and runs nothing, and keeps what it was asked for."""

    def __init__(self):
        self.environment = Environment("AMD EPYC", 2, 2, "abc1234567")
        self.verified, self.measured = [], []
        self.rates = {"v1": 20.0, "v4": 200.0}
        self.broken, self.interrupted_at = (), None

    def verify(self, setup):
        self.verified.append((setup.width, setup.verified_sizes))
        rows = cost_of_work.new_rows(setup)
        for found in rows:
            found.verified = found.backend not in self.broken
            found.reason = "" if found.verified else "failed verification: conv2"
        return rows

    def run(self, setup, pictures, epochs, command_line, report, *, time_limit_s, verified):
        report("measuring")
        self.measured.append((setup.batch_size, setup.width))
        samples = len(pictures.images)
        rows = copy.deepcopy(verified)
        for found in rows:
            if not found.reason:
                found.images_per_s = self.rates[found.id] / setup.width**2
                found.epoch_s = [samples / found.images_per_s] * epochs
                found.first_epoch_s, found.loss, found.peak_bytes = 9.0, [0.5] * (epochs + 1), 1
        environment = copy.deepcopy(self.environment)
        environment.command_line = command_line
        config = RunSettings("photos", samples, setup.batch_size, epochs=epochs, seed=setup.seed, width=setup.width)
        started = f"2026-01-02T{len(self.measured):06}Z"
        interrupted = self.interrupted_at == self.measured[-1]
        return RunRecord(environment, config, rows, started, interrupted=interrupted)


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(cost_of_work, "verify", made.verify)
    monkeypatch.setattr(cost_of_work, "run", made.run)
    monkeypatch.setattr(cost_of_work, "describe_environment", lambda *arguments: made.environment)
    return made


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the program in this process; gives exit code and output."""

    def called(*arguments):
        arguments = ["--device", "cpu", "--threads", 1, "--out", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["cost_of_work", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_script(options_of(measure_cost_of_work, CostOptions))
        return ended.value.code, capsys.readouterr()

    return called


SMALL = ("--backend", "v1", "--backend", "v4", "--batch", 4, "--batch", 1, "--width", 1)


def test_an_epoch_has_whole_batches_of_about_the_same_flops():
    assert [pictures_an_epoch(1, batch, "cpu") for batch in (1, 4, 16, 64, 256)] == [16, 16, 16, 64, 256]
    assert [pictures_an_epoch(width, 4, "cpu") for width in (0.5, 2)] == [60, 4]
    assert pictures_an_epoch(1 / 128, 1, "cpu") == 1024
    assert pictures_an_epoch(1, 256, "gpu") == 8192


def test_each_batch_and_width_is_measured_once_and_what_is_there_is_kept(machine, call, tmp_path):
    code, printed = call(*SMALL, "--width", 0.5, "--only", "measure")
    assert code == 0
    assert machine.verified == [(0.5, (4, 1)), (1.0, (4, 1))]
    assert machine.measured == [(1, 0.5), (4, 0.5), (1, 1.0), (4, 1.0)]
    assert list((tmp_path / "out" / "charts").iterdir()) == []
    files = sorted((tmp_path / "out" / "runs").iterdir())
    command = json.loads(files[1].read_text())["environment"]["command_line"]
    assert " ".join(command[:7]) == "python -m bench.experiments.cost_of_work --batch 4 --width 0.5"
    files[1].unlink()
    machine.verified.clear()
    code, printed = call(*SMALL, "--width", 0.5)
    assert (code, printed.out.count(": kept")) == (0, 3)
    assert machine.verified == [(0.5, (4,))]
    assert machine.measured[4:] == [(4, 0.5)]
    assert "width 0.5" in printed.out
    assert len(list((tmp_path / "out" / "charts").iterdir())) == 2
    call("--backend", "v4", "--batch", 16, "--width", 2, "--only", "measure")
    code, printed = call(*SMALL, "--width", 0.5)
    assert (code, printed.out.count(": kept"), "width 2" in printed.out) == (0, 4, False)  # records of other rows
    code, printed = call("--only", "draw")  # without more, it draws what is newest
    assert (code, "width 2" in printed.out) == (0, True)


@pytest.mark.parametrize(
    ("changes", "more"),
    [({"commit": "fff"}, ()), ({"cores": 4}, ()), ({"dirty": True}, ()), ({}, ("--epochs", 7))],
    ids=["commit", "machine", "changed code", "epochs"],
)
def test_records_of_other_code_machines_or_settings_are_not_kept(machine, call, changes, more):
    assert call(*SMALL, "--only", "measure")[0] == 0
    for name, value in changes.items():
        setattr(machine.environment, name, value)
    code, printed = call(*SMALL, *more, "--only", "measure")
    assert (code, len(machine.measured)) == (0, 4)
    assert "kept" not in printed.out
    assert ("the code has changes" in printed.err) is machine.environment.dirty


def test_a_slow_version_is_left_out_with_the_reason_and_no_estimate(machine, call):
    code, printed = call(*SMALL, "--batch", 256)
    assert code == 0  # 256 pictures take V1 12.8 s
    assert "- v1 at batch 256, width 1: left out: " in printed.out
    assert "longer than 10 s" in " ".join(printed.out.split())
    assert "12.8" not in printed.out
    lines = [line.split() for line in printed.out.splitlines()]
    assert ["v1", "naive", "(NHWC)", "20", "20", "-"] in lines
    code, printed = call(*SMALL, "--batch", 256, "--epoch-limit", 13, "--epochs", 7)
    assert (code, "left out" in printed.out) == (0, False)


def test_a_failed_row_has_no_figure_and_ends_with_1(machine, call):
    machine.broken = ("v1",)
    code, printed = call(*SMALL)
    assert code == 1
    assert printed.err.count("v1: failed verification: conv2") == 2
    words = " ".join(printed.out.split())
    assert "- v1 at batch 1, width 1; v1 at batch 4, width 1: failed verification: conv2." in words


def test_ctrl_c_keeps_the_records_before_it(machine, call, tmp_path):
    machine.interrupted_at = (4, 1.0)
    assert call(*SMALL)[0] == 130
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    machine.interrupted_at = None
    assert call(*SMALL, "--only", "measure")[1].out.count(": kept") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "0.3"], "width 0.3: must be from 1/128 to 4"),
        (["--batch", "0"], "batch size 0"),
        (["--epochs", "0"], "epochs 0"),
        (["--backend", "v9"], "'v9'"),
        (["--peer", "jax"], "'jax'"),
        (["--time-limit", "nan"], "time limit nan"),
        (["--epoch-limit", "-1"], "epoch limit -1.0"),
        (["--only", "paint"], "'paint': choose from measure, draw"),
        (["--only", "draw"], "measure first"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(call, tmp_path, arguments, words):
    code, printed = call(*arguments)
    assert code == 2
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Table and chart ------------------------------------------------------------------------------------------------------


@pytest.fixture
def records():
    """All batch sizes and widths but one, eight rows; V2 failed in one of them."""
    names = ["v1", "v2", "v3", "v4", "v5", "torch-eager", "torch-channels-last", "torch-compiled"]
    made = []
    for width in (0.5, 1.0, 2.0):
        for batch in (1, 4, 16, 64, 256):
            speeds = {name: 12_345.6 * (i + 1) / width for i, name in enumerate(names)}
            rows = [row(name, 1.0, images_per_s=speed) for name, speed in speeds.items()]
            rows[2] |= {"epoch_s": [1.0, 1.2, 1.0]}
            if (batch, width) == (16, 1.0):
                rows[1] |= {"reason": "the process crashed (SIGSEGV)"}
            record = run_record(*rows)
            record.config.batch_size, record.config.width = batch, width
            if (batch, width) != (256, 2.0):
                made.append(record)
    return made


def test_the_table_has_every_cell_or_a_reason_and_fits_80_columns(records):
    table = cost_table(records)
    assert_words_whole(table, 80)
    assert [group.heading for group in table.groups] == ["width 0.5", "width 1", "width 2"]
    assert [[len(line.cells) for line in group.rows] for group in table.groups] == [[6] * 8] * 3
    half, whole, double = table.groups
    assert [cell.text for cell in half.rows[0].cells] == ["v1 example (NHWC)", *["24,691"] * 5]
    assert [cell.tone for cell in half.rows[7].cells[1:]] == ["good"] * 5
    assert {cell.below for cell in half.rows[2].cells[1:]} == {"noisy"}
    assert [cell.text for cell in whole.rows[1].cells[1:]].index("-") == 2
    assert {line.cells[5].text for line in double.rows} == {"-"}
    assert "- v2 at batch 16, width 1: the process crashed (SIGSEGV)." in table.notes
    assert "- batch 256, width 2: not measured." in table.notes


def test_the_last_record_of_a_cell_counts(records):
    again = copy.deepcopy(records[0])
    again.rows[0].images_per_s = 7.0
    table = cost_table([*records, again])
    assert table.groups[0].rows[0].cells[1].text == "7"


def test_the_chart_has_a_panel_for_each_width_and_a_line_for_each_version(records):
    figure = cost_figure(records)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["width 0.5", "width 1", "width 2"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [8] * 3
    second = {line.get_label(): line for line in figure.axes[1].get_lines()}
    assert list(second["v2 example (NHWC)"].get_xdata()) == [1, 4, 64, 256]
    assert second["torch-eager example (NHWC)"].get_linestyle() == "--"
    drawing = drawn(lambda: cost_figure(records), "svg").decode()
    for words in ("Training speed by batch size and width", "more is better", "commit 0123456789"):
        assert words in drawing
