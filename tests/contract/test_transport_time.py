"""The laws of `Transport` on deadlines, cancellation and closing (5 to 8), on every backend.

The number in a test's name is the law's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from snowskin.transport.api import RemoteRegion, Run, TransferControl
from snowskin.transport.copying import INLINE_NBYTES
from snowskin.transport.errors import (
    LandingQuarantined,
    RegionExpired,
    TransferCancelled,
    TransferTimedOut,
    TransportClosed,
)
from tests.support.transport_rigs import FAR_S, LARGE_NBYTES, WAIT_S, Rig, Stuck, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.api import Landed, TransferReport

SHARE_NBYTES = 1 << 20  # more than any backend moves on the event loop itself


def test_5_deadline_is_looked_at_before_every_piece(rig: Rig) -> None:
    remote = rig.attach()
    with pytest.raises(TransferTimedOut):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 10)], deadline_s=rig.now_s())
    assert not rig.target.any()

    def landed(offset: int, nbytes: int) -> None:
        rig.advance(1)

    with pytest.raises(TransferTimedOut):
        rig.reader.pull(
            remote,
            rig.local,
            [Run(0, 0, 3000)],
            deadline_s=rig.now_s() + 2,
            piece_nbytes=1000,
            landed=landed,
        )
    assert not rig.target[2000:].any()
    assert rig.reader.statistics().num_timed_out == 2


@pytest.mark.parametrize("ended_by", ["deadline", "cancellation", "closed region"])
@pytest.mark.parametrize("piece_nbytes", [1000, LARGE_NBYTES // 2])
def test_5_7_and_14_the_last_piece_is_no_exception(
    large: Rig, piece_nbytes: int, ended_by: str
) -> None:
    remote = large.attach()
    control = TransferControl()
    told: list[int] = []

    def landed(offset: int, nbytes: int) -> None:
        told.append(nbytes)
        if ended_by == "deadline":
            large.advance(2)
        elif ended_by == "cancellation":
            control.cancel()
        else:
            remote.close()

    with pytest.raises((TransferTimedOut, TransferCancelled, TransportClosed)):
        large.reader.pull(
            remote,
            large.local,
            [Run(0, 0, 2 * piece_nbytes)],
            deadline_s=large.now_s() + 1,
            piece_nbytes=piece_nbytes,
            landed=landed,
            control=control,
        )
    assert told == [piece_nbytes]


def test_5_grant_that_ran_out_is_refused_before_and_after_the_bytes(rig: Rig) -> None:
    remote = rig.attach(rig.describe(writable=True, expires_in_s=3))

    def landed(offset: int, nbytes: int) -> None:
        rig.advance(4)

    with pytest.raises(RegionExpired):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 9)], deadline_s=FAR_S, landed=landed)
    rig.target[:] = 0
    with pytest.raises(RegionExpired):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 9)], deadline_s=FAR_S)
    assert not rig.target.any()


def test_5_grant_counts_from_when_it_was_asked_for(rig: Rig) -> None:
    descriptor = rig.describe(expires_in_s=3)
    remote = rig.attach(descriptor, writable=False, asked_at_s=rig.now_s() - 3)
    with pytest.raises(RegionExpired):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 9)], deadline_s=FAR_S)


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_5_and_14_hold_while_all_workers_are_busy(huge: Rig, is_cancelled: bool) -> None:
    """Neither a deadline nor a cancellation waits for a worker."""
    remote = huge.attach()
    control = TransferControl()
    stuck = [Stuck() for _ in range(huge.backend.num_at_once)]

    def push(landed: Landed, index: int, **values: Any) -> asyncio.Future[TransferReport]:
        offset = index * SHARE_NBYTES
        return asyncio.ensure_future(
            huge.reader.push_async(
                huge.local,
                remote,
                [Run(offset, offset, SHARE_NBYTES)],
                landed=landed,
                piece_nbytes=SHARE_NBYTES,
                **{"deadline_s": FAR_S, **values},
            )
        )

    moving = [push(one, index) for index, one in enumerate(stuck)]
    try:
        for one in stuck:
            await wait_until(one.reached.is_set)
        within_s = WAIT_S if is_cancelled else 0.05
        late = push(
            lambda *_: None, len(stuck), deadline_s=huge.now_s() + within_s, control=control
        )
        await asyncio.sleep(0)
        if is_cancelled:
            control.cancel()
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(TransferCancelled if is_cancelled else TransferTimedOut):
                await late
        counted = huge.reader.statistics()
        assert (counted.num_cancelled, counted.num_timed_out) == (is_cancelled, not is_cancelled)
    finally:
        for one in stuck:
            one.go.set()
        await asyncio.gather(*moving)


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
    descriptor = rig.describe()
    rig.reader.close()
    for use in (
        lambda: rig.reader.register(bytearray(3)),
        lambda: rig.reader.describe(rig.owned),
        lambda: rig.reader.attach(descriptor, fd=rig.fd),
    ):
        with pytest.raises(TransportClosed):
            use()
