"""The suite runner over real pytest processes: all suites run, and the exit status tells."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from snowskin.tools.suites import main


@pytest.fixture
def tests(tmp_path, monkeypatch):
    """A folder of suites of its own, with pytest settings of its own."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half of the time of these pytests
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    soak\n    gpu\n    rdma\naddopts = -p no:cacheprovider\n"
    )
    folder = tmp_path / "tests"
    for name, body in {"unit": "assert True", "contract": "assert False"}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / f"test_{name}_toy.py").write_text(f"def test_it():\n    {body}\n")
    (folder / "e2e").mkdir()
    (folder / "e2e" / "test_soaked.py").write_text(
        "import pytest\n\n@pytest.mark.soak\ndef test_it():\n    pass\n"
    )
    return folder


def test_every_suite_runs_and_one_failure_fails_the_whole(tests, capfd):
    ran = CliRunner().invoke(main, ["--tests", str(tests)])
    assert ran.exit_code == 1
    assert ran.output.rstrip().splitlines()[-1].startswith("1 passed, 1 failed in ")


def test_named_suites_run_alone_and_succeed(tests):
    ran = CliRunner().invoke(main, ["unit", "--tests", str(tests)])
    assert ran.exit_code == 0
    assert "contract" not in ran.output


def test_soak_tests_run_only_at_night(tests):
    run = CliRunner().invoke
    by_day = run(main, ["e2e", "--tests", str(tests)])
    assert by_day.exit_code == 1
    assert run(main, ["e2e", "--nightly", "--tests", str(tests)]).exit_code == 0
