"""The transfer benchmark, as small as it goes: every part answers, and nothing of it stays."""

from __future__ import annotations

import psutil
import pytest

from snowskin.tools.bench import registry
from snowskin.tools.bench.transfer.pair import Contestant, Memory, PairFailed, open_pairs
from snowskin.tools.bench.transfer.shape import contiguous


def test_a_brief_run_answers_in_every_part_and_leaves_no_process():
    report = registry.load("transfer").run(registry.BenchOptions(runs=1, smoke=True))
    names = [row.name for row in report.rows]
    for part in (
        "shm: pull 4 KiB under a held lease against memcpy",
        "control round trip beside it",
        "tcp: pull 1 MiB, verified against sockets",
        "ours: idle, both ends",
        "calls per request: segment",
        "late joiner",
        "control call beside tcp",
        "probe of a node beside its data plane",
        "pull: reserved and idle decode memory",
    ):
        assert [name for name in names if name.startswith(part)], part
    assert not [
        child
        for child in psutil.Process().children()
        if "transfer.end" in " ".join(child.cmdline())
    ]


def test_an_end_that_dies_fails_the_run_and_takes_nothing_with_it():
    sockets = [Contestant(name="sockets", backend="sockets", pair="limits")]
    with Memory(1 << 20) as memory, open_pairs(sockets, memory) as pairs:
        pair, shape = pairs["limits"], contiguous(4096, repeat=1)
        assert pair.prepare("sockets", shape, checked=False)
        pair.owner.process.kill()
        with pytest.raises(PairFailed):
            pair.pull("sockets", shape, checked=False)
