"""Every bug on record has its test still, so that the record cannot outlive what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| .+ \| .+ \| .+ \| `(?P<path>tests/[^`:]+\.py)(?:::(?P<name>\w+))?` \|$")

pytestmark = pytest.mark.house


def rows() -> list[str]:
    lines = (ROOT / "docs" / "track-record.md").read_text().splitlines()
    return [
        line for line in lines if line.startswith("| ") and not line.startswith(("| bug", "| -"))
    ]


def test_there_is_a_record():
    assert len(rows()) > 20


def test_every_bug_names_a_test_that_is_there():
    for row in rows():
        match = ROW.match(row)
        assert match, f"not `bug | found by | since | test`: {row}"
        path = ROOT / match["path"]
        assert path.is_file(), f"no such file: {row}"
        if match["name"]:
            assert re.search(rf"^\s*(async )?def {match['name']}\(", path.read_text(), re.M), row
