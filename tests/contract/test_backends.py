"""What every contestant of the transfer benchmark must do: a benchmark of wrong bytes is no benchmark.

Both ends live in one process here; peers run where they are installed.
"""

from __future__ import annotations

import fcntl
import os

import numpy as np
import pytest

from snowskin.kvstore.checksum import RunningChecksums
from snowskin.tools.bench.transfer.backends import registry
from snowskin.tools.bench.transfer.backends.api import ContestantMissing
from snowskin.tools.bench.transfer.end import shared_memory
from snowskin.transport.runs import Run

NBYTES = 3 << 20
CASES: dict[str, tuple[str, dict[str, str | int | bool]]] = {
    "memcpy": ("memcpy", {}),
    "sockets": ("sockets", {}),
    "sockets unpaced": ("sockets", {"congestion": "reno"}),
    "sockets sendfile": ("sockets", {"call": "sendfile"}),
    "sockets 2 streams": ("sockets", {"streams": 2}),
    "unix sockets": ("sockets", {"family": "unix"}),
    "shm": ("ours", {"scheme": "shm"}),
    "tcp": ("ours", {"scheme": "tcp"}),
    "ucx": ("ours", {"scheme": "ucx"}),
    "ucx gets": ("ucx_gets", {}),
}
RUNS = {
    "one": [Run(4096, 0, NBYTES - 4096)],
    "odd": [Run(1, 3, 100_001)],
    "many": [Run(65_536 * 2 * index, 65_536 * index, 65_536) for index in range(20)],
}


@pytest.fixture(scope="module")
def memories():
    fds = []
    for name in ("pool", "landing"):
        fds.append(os.memfd_create(name, os.MFD_ALLOW_SEALING))
        os.ftruncate(fds[-1], NBYTES)
        fcntl.fcntl(fds[-1], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    pool, landing = map(shared_memory, fds)
    pool.bytes[:] = np.random.default_rng(7).integers(0, 256, NBYTES, np.uint8)
    yield pool, landing
    for fd in fds:
        os.close(fd)


@pytest.fixture(params=CASES)
def reader(request, memories):
    backend, options = CASES[request.param]
    module, (pool, landing) = registry.load(backend), memories
    try:
        owner = module.open_owner(pool, options)
    except ContestantMissing as error:
        pytest.skip(f"{request.param}: {error}")
    reader = module.open_reader(owner.offer, pool, landing, options)
    yield reader
    reader.close()
    owner.close()


def prepared(reader, runs, begin=None):
    try:
        return reader.prepare(runs, begin)
    except ContestantMissing as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", RUNS)
def test_a_pull_lands_exactly_its_runs_each_time(reader, memories, name):
    pool, landing = memories
    pull = prepared(reader, RUNS[name])
    for _ in range(2):
        landing.bytes[:] = 0xA5
        pull()
        expected = np.full(NBYTES, 0xA5, np.uint8)
        for remote, local, nbytes in RUNS[name]:
            expected[local : local + nbytes] = pool.bytes[remote : remote + nbytes]
        assert np.array_equal(landing.bytes, expected)


@pytest.mark.parametrize("name", RUNS)
def test_a_checked_pull_tells_all_bytes_in_order_after_they_landed(reader, memories, name):
    pool, landing = memories
    landing.bytes[:] = 0xA5
    told, checks = [], []

    def begin():
        checks.append(RunningChecksums(landing.bytes, 64 << 10))

        def landed(offset, nbytes):
            told.append((offset, nbytes))
            checks[-1].landed(offset, nbytes)

        return landed

    prepared(reader, RUNS[name], begin)()
    assert max(nbytes for _, nbytes in told) <= 1 << 20
    assert told == sorted(told)
    assert sum(nbytes for _, nbytes in told) == sum(run.nbytes for run in RUNS[name])
    expected = RunningChecksums(pool.bytes, 64 << 10)
    for remote, _, nbytes in RUNS[name]:
        expected.landed(remote, nbytes)
    assert checks[-1].records(b"", b"\0" * 32 * 99, 32).tolist() == (
        expected.records(b"", b"\0" * 32 * 99, 32).tolist()
    )


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(KeyError, match="mooncake, nixl"):
        registry.load("nccl")
