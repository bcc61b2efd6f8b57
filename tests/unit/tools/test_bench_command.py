"""The bench command: benchmarks by name, their file, their goals, and two files side by side."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from snowskin.tools.bench import registry
from snowskin.tools.bench.__main__ import main
from snowskin.tools.bench.host import host_facts
from snowskin.tools.bench.report import Goal, Report, make_row
from snowskin.transport.errors import SnowskinError


class Toy:
    """A benchmark with one row, whose goal it misses."""

    QUESTION = "How fast is nothing?"

    def __init__(self):
        self.asked = []

    def run(self, options):
        self.asked.append(options)
        goal = Goal(of="value", relation="<=", bound=1)
        return Report(bench="toy", host=host_facts(), rows=(make_row("x", [2.0], "s", goal=goal),))


class Broken:
    QUESTION = "What if it fails?"

    def run(self, options):
        raise SnowskinError("no memory", hint="free some")


@pytest.fixture
def toy(monkeypatch):
    benches = {"toy": Toy()}
    monkeypatch.setattr(registry, "BENCHES", dict.fromkeys(benches, "unused"))
    monkeypatch.setattr(registry, "load", benches.__getitem__)
    return benches["toy"]


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_a_benchmark_runs_by_its_name_and_writes_its_file(toy, tmp_path):
    ran = run("toy", "--json", tmp_path / "a.json", "--runs", "3")
    assert ran.exit_code == 0, ran.output
    assert "How fast is nothing?" in ran.output
    assert "value <= 1" in ran.output
    assert toy.asked == [registry.BenchOptions(runs=3, smoke=False)]
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["holds"] is False


def test_a_missed_goal_fails_only_a_strict_run(toy):
    assert run("toy").exit_code == 0
    strict = run("toy", "--strict")
    assert strict.exit_code == 1
    assert "1 goals do not hold: x: value <= 1" in strict.output


def test_smoke_runs_every_benchmark_briefly(toy):
    assert run("smoke").exit_code == 0
    assert toy.asked == [registry.BenchOptions(runs=1, smoke=True)]


def test_help_lists_the_benchmarks_without_importing_them(monkeypatch):
    monkeypatch.setattr(registry, "BENCHES", {"ghost": "snowskin.no.such.module"})
    ran = run("--help")
    assert ran.exit_code == 0
    assert all(name in ran.output for name in ("ghost", "compare", "smoke"))


def test_an_error_of_a_benchmark_is_one_line(monkeypatch):
    monkeypatch.setattr(registry, "BENCHES", {"broken": "unused"})
    monkeypatch.setattr(registry, "load", lambda _name: Broken())
    for command in (["broken"], ["smoke"]):
        ran = run(*command)
        assert ran.exit_code == 1
        assert "no memory. free some" in ran.output


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(registry.BenchUnknown, match=r"known: .*spine"):
        registry.load("spin")
    assert run("spin").exit_code == 2


def test_two_files_are_compared(toy, tmp_path):
    for name in ("a", "b"):
        assert run("toy", "--json", tmp_path / f"{name}.json").exit_code == 0
    ran = run("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert ran.exit_code == 0
    assert "1.00" in ran.output
    assert "not the same host" not in ran.output


def test_a_file_that_is_no_report_is_refused(tmp_path):
    ran = run("compare", tmp_path / "none.json", tmp_path / "none.json")
    assert ran.exit_code == 1
    assert "none.json: No such file" in ran.output
