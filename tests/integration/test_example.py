"""The example of a client by stubs alone works as it stands."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.node_process import NodeProcess

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "store_by_stubs.py"


@pytest.fixture(scope="module")
def node():
    with NodeProcess({"dram_nbytes": 1 << 20, "log_level": "error"}) as process:
        yield process


def test_the_example_publishes_and_pulls_and_leaves_no_lease(node):
    for num_blocks in (2, 4):  # its keys are new each time
        ended = subprocess.run(
            [sys.executable, EXAMPLE, node.address],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == "published and pulled 2 blocks, 8192 bytes\n"
        stat = node.stat()
        assert (stat.num_blocks, stat.num_read_leases, stat.num_write_leases) == (num_blocks, 0, 0)


def test_the_example_needs_nothing_of_ours_but_the_stubs():
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"grpc", "os", "snowskin.v1", "struct", "sys"}
