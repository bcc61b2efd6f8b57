"""The laws of `Transport`, on every backend; the number in a test's name is the law's."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from snowskin.kvstore.pool.arena import Arena
from snowskin.transport.addresses import Address
from snowskin.transport.api import RemoteRegion, Run, TrafficClass, Transport
from snowskin.transport.copying import INLINE_NBYTES
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import (
    BadDescriptor,
    LandingQuarantined,
    OutOfBounds,
    RegionExpired,
    RegionReadOnly,
    TransferTimedOut,
    TransportClosed,
    TransportError,
)
from snowskin.transport.loopback import LoopbackNetwork, LoopbackTransport
from snowskin.transport.memory import Memfd, MemoryRegion
from snowskin.transport.shm import ShmTransport
from snowskin.transport.tcp import TcpTransport
from snowskin.transport.tcp_settings import TcpSettings
from snowskin.transport.ucp.binding import why_unavailable
from snowskin.transport.ucx import UcxTransport
from snowskin.transport.ucx_settings import UcxSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NBYTES = 64 * 1024
LARGE_NBYTES = 4 * INLINE_NBYTES
FAR_S = 1e9
WAIT_S = 5.0


class Rig:
    """An owner and a reader of one backend, with one region between them."""

    def __init__(self, scheme: str, nbytes: int = NBYTES) -> None:
        self.scheme = scheme
        self.time_s = 100.0
        self.nbytes = nbytes
        self.owner, self.reader = self._transports()
        self.arena = Arena(nbytes, name="rig", tenant="t")
        self.fd = self.arena.open_read_write()
        self.owned = self.owner.register(Memfd(fd=self.fd))
        self.owned.buffer[:] = np.random.default_rng(7).integers(0, 256, nbytes, dtype=np.uint8)
        self.target = np.zeros(nbytes, dtype=np.uint8)
        self.local = self.reader.register(self.target)

    def _transports(self) -> tuple[Transport, Transport]:
        def now_s() -> float:
            return self.time_s

        if self.scheme == "shm":
            return ShmTransport(now_s=now_s), ShmTransport(now_s=now_s)
        if self.scheme == "tcp":
            here = TcpSettings(listen=(Address("127.0.0.1", 0),))
            return TcpTransport(here, now_s=now_s), TcpTransport(
                now_s=now_s, inline_nbytes=INLINE_NBYTES
            )
        if self.scheme.startswith("ucx"):
            ucx = UcxSettings(net_devices="lo", trusted_network=self.scheme == "ucx-one-sided")
            return UcxTransport(ucx, now_s=now_s), UcxTransport(ucx, now_s=now_s)
        network = LoopbackNetwork()
        return LoopbackTransport(network, now_s=now_s), LoopbackTransport(network, now_s=now_s)

    def attach(
        self, descriptor: RegionDescriptor | None = None, *, writable: bool = True
    ) -> RemoteRegion:
        descriptor = descriptor or self.owner.describe(self.owned, writable=True)
        return self.reader.attach(descriptor, fd=self.fd, writable=writable)

    def close(self) -> None:
        self.reader.close()
        self.owner.close()
        self.local.close()
        self.owned.close()
        os.close(self.fd)
        self.arena.close()


NO_UCX = why_unavailable()
WITH_UCX = pytest.mark.skipif(NO_UCX is not None, reason=f"NO UCX HERE: {NO_UCX}")


@pytest.fixture(
    params=[
        "loopback",
        "shm",
        "tcp",
        pytest.param("ucx", marks=WITH_UCX),
        pytest.param("ucx-one-sided", marks=WITH_UCX),
    ]
)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rig(scheme: str) -> Iterator[Rig]:
    made = Rig(scheme)
    yield made
    made.close()


@pytest.fixture
def large(scheme: str) -> Iterator[Rig]:
    made = Rig(scheme, LARGE_NBYTES)
    yield made
    made.close()


def test_1_registered_memory_is_the_callers_own(rig: Rig) -> None:
    remote = rig.attach()
    rig.reader.pull(remote, rig.local, [Run(0, 0, 4096)], deadline_s=FAR_S)
    assert np.array_equal(rig.target[:4096], rig.owned.buffer[:4096])
    rig.owned.buffer[0] ^= 255
    rig.reader.pull(remote, rig.local, [Run(0, 1, 1)], deadline_s=FAR_S)
    assert rig.target[1] == rig.owned.buffer[0]


runs_strategy = st.lists(
    st.builds(
        Run, st.integers(0, NBYTES - 1), st.integers(0, NBYTES - 1), st.integers(1, 20_000)
    ).map(lambda run: run._replace(nbytes=min(run.nbytes, NBYTES - max(run[0], run[1])))),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=runs_strategy, piece_nbytes=st.sampled_from([1000, 16_384, 1 << 20]), pulls=st.booleans()
)
def test_2_exactly_the_bytes_of_all_runs_move(
    rig: Rig, runs: list[Run], piece_nbytes: int, pulls: bool
) -> None:
    remote = rig.attach()
    rig.target[:] = np.arange(NBYTES) % 251
    expected = (rig.target if pulls else rig.owned.buffer).copy()
    for remote_offset, local_offset, nbytes in runs:
        if pulls:
            source = rig.owned.buffer[remote_offset : remote_offset + nbytes]
            expected[local_offset : local_offset + nbytes] = source
        else:
            source = rig.target[local_offset : local_offset + nbytes]
            expected[remote_offset : remote_offset + nbytes] = source
    if pulls:
        report = rig.reader.pull(
            remote, rig.local, runs, deadline_s=FAR_S, piece_nbytes=piece_nbytes
        )
    else:
        report = rig.reader.push(
            rig.local, remote, runs, deadline_s=FAR_S, piece_nbytes=piece_nbytes
        )
    assert np.array_equal(rig.target if pulls else rig.owned.buffer, expected)
    assert report.nbytes == sum(run.nbytes for run in runs)
    remote.close()


@pytest.mark.parametrize(
    "bad",
    [
        Run(-1, 0, 10),
        Run(0, -1, 10),
        Run(0, 0, 0),
        Run(0, 0, -5),
        Run(NBYTES, 0, 1),
        Run(0, NBYTES - 5, 6),
        Run(1 << 64, 0, 1),
        Run(0, 0, 1 << 64),
    ],
)
def test_3_one_run_out_of_bounds_moves_nothing(rig: Rig, bad: Run) -> None:
    remote = rig.attach()
    before = rig.owned.buffer.copy()
    with pytest.raises(OutOfBounds, match="run 1 of 2"):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 10), bad], deadline_s=FAR_S)
    with pytest.raises(OutOfBounds):
        rig.reader.push(rig.local, remote, [bad], deadline_s=FAR_S)
    assert not rig.target.any()
    assert np.array_equal(rig.owned.buffer, before)
    assert rig.reader.statistics().num_refused == 2


def test_3_what_is_read_only_takes_no_bytes(rig: Rig) -> None:
    remote = rig.attach(writable=False)
    with pytest.raises(RegionReadOnly):
        rig.reader.push(rig.local, remote, [Run(0, 0, 10)], deadline_s=FAR_S)
    fixed = rig.reader.register(bytes(10))
    with pytest.raises(RegionReadOnly):
        rig.reader.pull(remote, fixed, [Run(0, 0, 10)], deadline_s=FAR_S)
    fixed.close()


def test_4_landed_is_told_each_piece_once_in_order_within_its_run(rig: Rig) -> None:
    remote = rig.attach()
    runs = [Run(0, 0, 2500), Run(2500, 2500, 500), Run(9000, 8000, 1000)]
    pieces: list[tuple[int, int]] = []

    def landed(offset: int, nbytes: int) -> None:
        pieces.append((offset, nbytes))
        here = rig.target[offset : offset + nbytes]
        assert here.any(), "told before it landed"
        assert not rig.target[offset + nbytes : 8000].any(), "a later piece had landed already"

    rig.reader.pull(remote, rig.local, runs, deadline_s=FAR_S, piece_nbytes=1000, landed=landed)
    assert pieces == [(0, 1000), (1000, 1000), (2000, 500), (2500, 500), (8000, 1000)]
    pieces.clear()
    rig.reader.push(
        rig.local,
        remote,
        runs,
        deadline_s=FAR_S,
        piece_nbytes=2000,
        landed=lambda offset, nbytes: pieces.append((offset, nbytes)),
    )
    assert pieces == [(0, 2000), (2000, 500), (2500, 500), (8000, 1000)]


def test_4_adjacent_runs_count_as_one(rig: Rig) -> None:
    remote = rig.attach()
    runs = [Run(0, 50, 10), Run(10, 60, 5), Run(15, 70, 5)]
    report = rig.reader.pull(remote, rig.local, runs, deadline_s=FAR_S)
    assert (report.num_runs, report.nbytes) == (2, 20)


def test_4_error_in_landed_stops_the_transfer(rig: Rig) -> None:
    remote = rig.attach()

    def landed(offset: int, nbytes: int) -> None:
        raise ArithmeticError("bad checksum")

    with pytest.raises(ArithmeticError, match="bad checksum"):
        rig.reader.pull(
            remote, rig.local, [Run(0, 0, 3000)], deadline_s=FAR_S, piece_nbytes=1000, landed=landed
        )
    assert not rig.target[1000:].any()


def test_5_deadline_is_looked_at_before_every_piece(rig: Rig) -> None:
    remote = rig.attach()
    with pytest.raises(TransferTimedOut):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 10)], deadline_s=rig.time_s)
    assert not rig.target.any()

    def landed(offset: int, nbytes: int) -> None:
        rig.time_s += 1

    with pytest.raises(TransferTimedOut):
        rig.reader.pull(
            remote,
            rig.local,
            [Run(0, 0, 3000)],
            deadline_s=rig.time_s + 2,
            piece_nbytes=1000,
            landed=landed,
        )
    assert not rig.target[2000:].any()
    assert rig.reader.statistics().num_timed_out == 2


def test_5_grant_that_ran_out_is_refused_before_and_after_the_bytes(rig: Rig) -> None:
    remote = rig.attach(rig.owner.describe(rig.owned, writable=True, expires_in_s=3))

    def landed(offset: int, nbytes: int) -> None:
        rig.time_s += 4

    with pytest.raises(RegionExpired):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 9)], deadline_s=FAR_S, landed=landed)
    rig.target[:] = 0
    with pytest.raises(RegionExpired):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 9)], deadline_s=FAR_S)
    assert not rig.target.any()


def test_5_grant_counts_from_when_it_was_asked_for(rig: Rig) -> None:
    descriptor = rig.owner.describe(rig.owned, expires_in_s=3)
    remote = rig.reader.attach(descriptor, fd=rig.fd, asked_at_s=rig.time_s - 3)
    with pytest.raises(RegionExpired):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 9)], deadline_s=FAR_S)


class Stuck:
    """A `landed` that holds the worker thread after the first piece until `go`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()

    def __call__(self, offset: int, nbytes: int) -> None:
        self.reached.set()
        assert self.go.wait(WAIT_S)


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - a worker thread makes it true, and tells nobody
            await asyncio.sleep(0)


@pytest.mark.parametrize("pulls", [True, False])
async def test_6_cancelled_landing_range_is_quarantined_until_its_thread_has_ended(
    large: Rig, pulls: bool
) -> None:
    remote = large.attach()
    stuck = Stuck()
    runs = [Run(0, 0, 2 * INLINE_NBYTES)]
    if pulls:
        transfer = large.reader.pull_async(
            remote, large.local, runs, deadline_s=FAR_S, piece_nbytes=4096, landed=stuck
        )
    else:
        transfer = large.reader.push_async(
            large.local, remote, runs, deadline_s=FAR_S, piece_nbytes=4096, landed=stuck
        )
    task = asyncio.ensure_future(transfer)
    await wait_until(stuck.reached.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    def again(run: Run) -> None:
        if pulls:
            large.reader.pull(remote, large.local, [run], deadline_s=FAR_S)
        else:
            large.reader.push(large.local, remote, [run], deadline_s=FAR_S)

    edge = 2 * INLINE_NBYTES
    with pytest.raises(LandingQuarantined):
        again(Run(edge - 1, edge - 1, 2))
    again(Run(edge, edge, 10))
    stuck.go.set()
    await wait_until(lambda: large.reader.statistics().num_cancelled == 1)

    def is_free() -> bool:
        with contextlib.suppress(LandingQuarantined):
            again(Run(0, 0, 10))
            return True
        return False

    await wait_until(is_free)


async def test_6_cancelling_usually_leaves_nothing_in_quarantine(large: Rig) -> None:
    remote = large.attach()
    first = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(
        large.reader.pull_async(
            remote,
            large.local,
            [Run(0, 0, LARGE_NBYTES)],
            deadline_s=FAR_S,
            piece_nbytes=64,
            landed=lambda offset, nbytes: loop.call_soon_threadsafe(first.set),
        )
    )
    async with asyncio.timeout(WAIT_S):
        await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert large.local.quarantined_nbytes == 0


def close_local(rig: Rig, remote: RemoteRegion) -> None:
    rig.local.close()


def close_remote(rig: Rig, remote: RemoteRegion) -> None:
    remote.close()


def close_reader(rig: Rig, remote: RemoteRegion) -> None:
    rig.reader.close()


CLOSERS = [close_local, close_remote, close_reader]


@pytest.mark.parametrize("close", CLOSERS)
def test_7_after_closing_every_transfer_is_refused(
    rig: Rig, close: Callable[[Rig, RemoteRegion], None]
) -> None:
    remote = rig.attach()
    close(rig, remote)
    close(rig, remote)
    with pytest.raises(TransportClosed):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 10)], deadline_s=FAR_S)
    with pytest.raises(TransportClosed):
        rig.reader.push(rig.local, remote, [Run(0, 0, 10)], deadline_s=FAR_S)
    assert not rig.target.any()


@pytest.mark.parametrize("close", CLOSERS)
def test_7_closing_fails_the_transfer_under_way_at_its_next_piece(
    rig: Rig, close: Callable[[Rig, RemoteRegion], None]
) -> None:
    remote = rig.attach()
    with pytest.raises(TransportClosed):
        rig.reader.pull(
            remote,
            rig.local,
            [Run(0, 0, 30_000)],
            deadline_s=FAR_S,
            piece_nbytes=1000,
            landed=lambda offset, nbytes: close(rig, remote),
        )
    assert not rig.target[1000:].any()


async def test_7_nothing_lands_once_close_of_the_landing_region_returned(large: Rig) -> None:
    remote = large.attach()
    stuck = Stuck()
    task = asyncio.ensure_future(
        large.reader.pull_async(
            remote,
            large.local,
            [Run(0, 0, LARGE_NBYTES)],
            deadline_s=FAR_S,
            piece_nbytes=4096,
            landed=stuck,
        )
    )
    await wait_until(stuck.reached.is_set)
    large.local.close()
    large.target[:] = 0
    stuck.go.set()
    with pytest.raises(TransportClosed):
        await task
    assert not large.target.any()


def num_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def mappings() -> str:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return maps.read()


async def test_8_closed_transport_holds_no_descriptor_mapping_or_thread(scheme: str) -> None:
    descriptors, threads = num_descriptors(), threading.active_count()
    rig = Rig(scheme, LARGE_NBYTES)
    remotes = [rig.attach(), rig.attach(writable=False)]
    runs = [Run(0, 0, LARGE_NBYTES)]
    await rig.reader.pull_async(remotes[0], rig.local, runs, deadline_s=FAR_S)
    assert np.array_equal(rig.target, rig.owned.buffer)
    assert rig.reader.statistics().num_attached == 2
    rig.reader.close()
    rig.reader.close()
    assert all(remote.closed for remote in remotes)
    assert rig.reader.statistics().num_attached == 0
    assert not rig.local.closed, "registered memory stays its owner's"
    rig.close()
    assert (num_descriptors(), threading.active_count()) == (descriptors, threads)
    assert "memfd:snowskin-rig" not in mappings()


def test_8_closed_transport_takes_nothing_new(rig: Rig) -> None:
    descriptor = rig.owner.describe(rig.owned)
    rig.reader.close()
    for use in (
        lambda: rig.reader.register(bytearray(3)),
        lambda: rig.reader.describe(rig.owned),
        lambda: rig.reader.attach(descriptor, fd=rig.fd),
    ):
        with pytest.raises(TransportClosed):
            use()


def test_9_descriptor_of_another_size_or_scheme_is_refused(rig: Rig) -> None:
    descriptor = rig.owner.describe(rig.owned, writable=True, epoch=3, generation=9)
    with pytest.raises(BadDescriptor):
        rig.attach(replace(descriptor, scheme="carrier-pigeon"))
    for wrong_nbytes in (NBYTES - 1, 2 * NBYTES):
        wrong = replace(descriptor, nbytes=wrong_nbytes)
        if rig.scheme != "tcp":
            with pytest.raises(BadDescriptor):
                rig.attach(wrong)
            continue
        # The owner alone knows the size; it refuses what is not there.
        remote = rig.attach(wrong)
        with pytest.raises(OutOfBounds):
            rig.reader.pull(remote, rig.local, [Run(NBYTES - 9, 0, 10)], deadline_s=FAR_S)
        remote.close()
    assert rig.reader.statistics().num_attached == 0
    remote = rig.attach(RegionDescriptor.from_bytes(descriptor.to_bytes()))
    assert remote.descriptor == descriptor
    assert remote.nbytes == NBYTES


def test_9_regions_of_another_transport_are_refused(rig: Rig) -> None:
    class Foreign:
        closed = False

    with pytest.raises(BadDescriptor):
        rig.reader.pull(Foreign(), rig.local, [], deadline_s=FAR_S)  # type: ignore[arg-type]


async def test_10_transfers_from_many_threads_move_the_right_bytes(large: Rig) -> None:
    remote = large.attach()
    share = LARGE_NBYTES // 4
    await asyncio.gather(
        *(
            large.reader.pull_async(
                remote,
                large.local,
                [Run(part * share, part * share, share)],
                deadline_s=FAR_S,
                piece_nbytes=1000,
                traffic=TrafficClass(part % 3),
            )
            for part in range(4)
        )
    )
    assert np.array_equal(large.target, large.owned.buffer)
    statistics = large.reader.statistics()
    assert (statistics.num_pulls, statistics.pulled_nbytes) == (4, LARGE_NBYTES)
    assert statistics.nbytes_by_traffic == (2 * share, share, share)


async def test_small_async_transfers_move_the_same_bytes(rig: Rig) -> None:
    remote = rig.attach()
    report = await rig.reader.pull_async(remote, rig.local, [Run(5, 0, 77)], deadline_s=FAR_S)
    assert report.nbytes == 77
    assert np.array_equal(rig.target[:77], rig.owned.buffer[5:82])
    rig.target[:77] = 9
    await rig.reader.push_async(rig.local, remote, [Run(0, 0, 77)], deadline_s=FAR_S)
    assert (rig.owned.buffer[:77] == 9).all()


def test_populated_region_moves_the_same_bytes(rig: Rig) -> None:
    remote = rig.reader.attach(rig.owner.describe(rig.owned), fd=rig.fd, populate=True)
    rig.reader.pull(remote, rig.local, [Run(0, 0, NBYTES)], deadline_s=FAR_S)
    assert np.array_equal(rig.target, rig.owned.buffer)


def test_every_refusal_is_a_transport_error_with_a_region_left_usable(rig: Rig) -> None:
    remote = rig.attach()
    for runs in ([Run(0, 0, 0)], [Run(0, NBYTES, 1)]):
        with pytest.raises(TransportError):
            rig.reader.pull(remote, rig.local, runs, deadline_s=FAR_S)
    rig.reader.pull(remote, rig.local, [Run(0, 0, NBYTES)], deadline_s=FAR_S)
    assert np.array_equal(rig.target, rig.owned.buffer)


def test_closed_region_cannot_be_described(rig: Rig) -> None:
    region: MemoryRegion = rig.owner.register(bytearray(4096))
    region.close()
    with pytest.raises(TransportClosed):
        rig.owner.describe(region)
