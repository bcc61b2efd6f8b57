"""The suite runner: order, what it counts, and when it fails."""

from __future__ import annotations

from collections import Counter

import pytest
from click.testing import CliRunner

from snowskin.tools.suites import (
    ORDER,
    SuiteResult,
    count_outcomes,
    main,
    run_suite,
    suite_files,
    summarise,
)


def suite(name, exit_status=0, **counts):
    return SuiteResult(name=name, exit_status=exit_status, counts=Counter(counts), duration_s=1.5)


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("===== 3 passed in 0.12s =====", {"passed": 3}),
        (
            "= 1 failed, 2 passed, 2 errors in 63.20s (0:01:03) =",
            {"failed": 1, "passed": 2, "error": 2},
        ),
        ("4 passed, 1 skipped, 2 warnings in 0.50s", {"passed": 4, "skipped": 1}),
        ("5 passed was a good number", {}),
        ("tests/unit/test_x.py::test_7 passed in 1s", {}),
        ("", {}),
    ],
)
def test_only_pytests_closing_line_is_counted(line, counts):
    assert count_outcomes(line) == counts


def test_the_last_line_counts_everything():
    results = [suite("unit", passed=3), suite("contract", 1, passed=1, failed=2, error=1)]
    lines = summarise([*results, suite("e2e", None)])
    assert lines[-1] == "4 passed, 3 failed in 4.5 s"
    assert "unit             1.5 s  ok       3 passed" in lines
    assert lines[1].split()[:4] == ["contract", "1.5", "s", "FAILED"]
    assert "no tests" in lines[2]


def test_a_crash_without_a_failed_test_counts_as_failed():
    lines = summarise([suite("unit", 2)])
    assert lines[-2:] == ["unit: pytest ended with status 2", "0 passed, 1 failed in 1.5 s"]


def test_suites_without_files_are_skipped(tmp_path, capfd):
    assert suite_files("unit", tmp_path) == []
    result = run_suite("unit", markers="", tests=tmp_path)
    assert (result.exit_status, result.failed) == (None, False)
    assert "unit: no tests yet, skipped" in capfd.readouterr().out


def test_an_unknown_suite_is_refused_with_the_known_ones():
    ran = CliRunner().invoke(main, ["units"])
    assert ran.exit_code == 2
    assert ", ".join(ORDER) in ran.output
