"""The laws of `Transport` on traffic classes and lost peers (15, 16), on every backend.

The number in a test's name is the law's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from snowskin.transport.api import Run, TrafficClass
from snowskin.transport.errors import PeerLost
from snowskin.transport.loopback import LoopbackFaults, LoopbackTransport
from snowskin.transport.ucp.binding import why_unavailable
from tests.support.transfer_child import TestMemory, TransferChild
from tests.support.transport_rigs import (
    BACKENDS,
    FAR_S,
    NBYTES,
    WAIT_S,
    Rig,
    Stuck,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from snowskin.transport.api import Landed, RemoteRegion, TransferReport


SHARE_NBYTES = 1 << 20  # more than any backend moves on the event loop itself


def push_part(
    rig: Rig, remote: RemoteRegion, index: int, traffic: TrafficClass, landed: Landed
) -> asyncio.Future[TransferReport]:
    """Begins to push the `index`-th share, as one piece."""
    offset = index * SHARE_NBYTES
    return asyncio.ensure_future(
        rig.reader.push_async(
            rig.local,
            remote,
            [Run(offset, offset, SHARE_NBYTES)],
            deadline_s=FAR_S,
            piece_nbytes=SHARE_NBYTES,
            landed=landed,
            traffic=traffic,
        )
    )


@contextlib.asynccontextmanager
async def all_let_go(
    stuck: list[Stuck], moving: list[asyncio.Future[TransferReport]]
) -> AsyncIterator[None]:
    """Whatever happens inside, what is stuck comes free and ends."""
    try:
        yield
    finally:
        for one in stuck:
            one.go.set()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*moving, return_exceptions=True)


async def test_15_of_what_waits_the_lower_class_goes_first(huge: Rig) -> None:
    remote = huge.attach()
    stuck = [Stuck() for _ in range(huge.backend.num_at_once)]
    urgent = TrafficClass.DECODE_CRITICAL
    moving = [push_part(huge, remote, i, urgent, one) for i, one in enumerate(stuck)]
    async with all_let_go(stuck, moving):
        for one in stuck:
            await wait_until(one.reached.is_set)
        order: list[TrafficClass] = []
        for traffic in [*list(TrafficClass)[::-1], *TrafficClass]:
            moving.append(
                push_part(
                    huge,
                    remote,
                    len(moving),
                    traffic,
                    lambda *_, traffic=traffic: order.append(traffic),
                )
            )
        await asyncio.sleep(0)  # all of them wait now
        stuck[0].go.set()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*moving[len(stuck) :])
        assert order == sorted([*TrafficClass] * 2)


async def test_15_most_urgent_waits_for_nothing_less_urgent(huge: Rig) -> None:
    remote = huge.attach()
    stuck = [Stuck() for _ in range(huge.backend.num_at_once)]
    late = TrafficClass.REPLICATION
    moving = [push_part(huge, remote, i, late, one) for i, one in enumerate(stuck)]
    async with all_let_go(stuck, moving):
        for one in stuck[:-1]:
            await wait_until(one.reached.is_set)
        async with asyncio.timeout(WAIT_S):
            await push_part(huge, remote, len(stuck), TrafficClass.DECODE_CRITICAL, lambda *_: None)
        assert not stuck[-1].reached.is_set()


def pull_from(reader: Rig, remote: RemoteRegion, within_s: float = 5.0) -> None:
    reader.reader.pull(remote, reader.local, [Run(0, 0, 100)], deadline_s=reader.now_s() + within_s)


def pull_until_lost(reader: Rig, remote: RemoteRegion) -> None:
    """Memory that is mapped can be read for the moment until the owner's end is seen."""
    deadline_s = time.monotonic() + 2
    while time.monotonic() < deadline_s:
        pull_from(reader, remote)


def test_16_way_that_is_cut_is_a_lost_peer() -> None:
    with contextlib.closing(Rig("loopback")) as rig:
        remote = rig.attach()
        assert isinstance(rig.reader, LoopbackTransport)
        for faults in (LoopbackFaults(cut_at=0), LoopbackFaults()):  # for good, healed or not
            rig.reader.set_faults(faults)
            with pytest.raises(PeerLost):
                pull_from(rig, remote)
        assert rig.reader.statistics().num_lost == 2


KILLED = [
    pytest.param("shm", {}, id="shm"),
    pytest.param("tcp", {}, id="tcp"),
    pytest.param(
        "ucx",
        {"net_devices": "lo"},
        id="ucx",
        marks=pytest.mark.skipif(why_unavailable() is not None, reason=f"{why_unavailable()}"),
    ),
]


@pytest.mark.parametrize(("scheme", "settings"), KILLED)
def test_16_killed_owner_is_a_lost_peer_with_a_name(scheme: str, settings: dict[str, Any]) -> None:
    assert scheme in BACKENDS
    ours, theirs = socket.socketpair()
    with (
        ours,
        TestMemory(NBYTES, granted=[(0, NBYTES)]) as memory,
        TransferChild(scheme, memory, lent=[theirs.fileno()], **settings) as owner,
        contextlib.closing(Rig(scheme)) as rig,
    ):
        descriptor = owner.describe(notify=True)
        link_fd = None
        if scheme == "shm":
            owner.ask("pass_link", descriptor=descriptor.to_bytes().hex(), over=theirs.fileno())
            _, (link_fd, *_), _, _ = socket.recv_fds(ours, 1, 1)
        theirs.close()
        remote = rig.reader.attach(descriptor, fd=memory.fd, link_fd=link_fd)
        if link_fd is not None:
            os.close(link_fd)
        pull_from(rig, remote)
        assert np.array_equal(rig.target[:100], memory.array[:100])
        if scheme == "shm":
            assert remote.peer == f"process {owner.pid} on this host"
        owner.kill()
        killed_s = time.monotonic()
        with pytest.raises(PeerLost) as lost:
            pull_until_lost(rig, remote)
        assert time.monotonic() - killed_s < 1.0
        assert remote.peer in str(lost.value)
        statistics = rig.reader.statistics()
        assert statistics.num_lost >= 1
        assert statistics.num_peers_lost == 1
