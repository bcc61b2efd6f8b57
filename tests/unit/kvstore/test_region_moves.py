"""What a copy promises its caller when it ends early, and how its errors are said."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from snowskin.kvstore.client.machine import Move
from snowskin.kvstore.client.region_moves import RegionMoves, until_settled
from snowskin.kvstore.client.transports import ClientTransports
from snowskin.kvstore.errors import (
    DeadlineExceeded,
    LeaseExpired,
    LeaseUnknown,
    NodeUnavailable,
    ProtocolViolation,
)
from snowskin.kvstore.messages import GrantedRegion, Lease, LeaseId
from snowskin.transport.api import Range, TrafficClass
from snowskin.transport.errors import TransportClosed
from snowskin.transport.loopback import LoopbackFaults, LoopbackNetwork, LoopbackTransport
from snowskin.transport.memory import region_of
from snowskin.transport.runs import Run
from tests.support.served_node import advertisement_of, stat_of


async def test_a_cancelled_copy_is_over_when_nothing_of_it_can_land_any_more():
    with region_of(np.zeros(100, np.uint8)) as target:
        target.quarantine("piece", [(0, 100)])
        task = asyncio.create_task(until_settled(asyncio.Event().wait(), target))
        for _ in range(3):  # however often it is cancelled
            await asyncio.sleep(0)
            task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.02)
        assert not done
        target.lift_quarantine("piece")
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_copy_that_ended_well_is_not_waited_for():
    with region_of(np.zeros(100, np.uint8)) as target:
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        await asyncio.wait_for(until_settled(done, target), 5)


@pytest.fixture
def opened():
    """An owner with one leased region, and a client's move of it."""
    network = LoopbackNetwork()
    owner = LoopbackTransport(network)
    memory = region_of(np.arange(4096, dtype=np.uint8))
    descriptor = owner.describe(memory, ranges=[Range(0, 100)])
    transports = ClientTransports(
        "loopback", factories={"loopback": lambda: LoopbackTransport(network)}
    )
    moves = RegionMoves(transports, node="node n")
    moves.meet(stat_of(["loopback"], advertisement_of([owner])))
    lease = Lease(
        id=LeaseId(7),
        ttl_s=10.0,
        regions=(GrantedRegion(pool_id=0, descriptors=(descriptor.to_bytes(),)),),
    )
    landing = region_of(np.zeros(4096, np.uint8))
    step = Move(False, lease, [(0, [Run(0, 0, 100)])], landing, None, 5.0, TrafficClass.PREFETCH)
    yield SimpleNamespace(
        owner=owner, memory=memory, descriptor=descriptor, moves=moves, step=step,
        client=transports.get("loopback"),
    )  # fmt: skip
    transports.close()
    owner.close()


async def test_a_move_brings_the_bytes_in_its_traffic_class_and_lets_the_region_go(opened):
    await opened.moves.move(opened.step)
    opened.moves.move_blocking(opened.step)
    assert (opened.step.local.buffer[:100] == opened.memory.buffer[:100]).all()
    counted = opened.client.statistics()
    assert counted.nbytes_by_traffic[TrafficClass.PREFETCH] == 200
    assert counted.num_attached == 0


def revoked(opened):
    opened.owner.revoke(opened.descriptor)


def expired(opened):
    opened.owner.renew(opened.descriptor, expires_in_s=0.0)


def lost(opened):
    opened.client.set_faults(LoopbackFaults(cut_at=0))


def silent(opened):
    opened.client.set_faults(LoopbackFaults(lost=frozenset(range(9))))
    opened.step = replace(opened.step, timeout_s=0.01)


def closed(opened):
    opened.moves.close()


def garbled(opened):
    lease = replace(opened.step.lease, regions=(GrantedRegion(pool_id=0, descriptors=(b"?",)),))
    opened.step = replace(opened.step, lease=lease)


def of_another_pool(opened):
    opened.step = replace(opened.step, runs=[(5, [Run(0, 0, 100)])])


def of_another_scheme(opened):
    lease = replace(opened.step.lease, regions=(GrantedRegion(pool_id=0, descriptors=()),))
    opened.step = replace(opened.step, lease=lease)


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (revoked, LeaseUnknown),
        (expired, LeaseExpired),
        (lost, NodeUnavailable),
        (silent, DeadlineExceeded),
        (closed, NodeUnavailable),
        (garbled, ProtocolViolation),
        (of_another_pool, ProtocolViolation),
        (of_another_scheme, ProtocolViolation),
    ],
    ids=lambda each: each.__name__,
)
async def test_what_goes_wrong_is_said_as_grpc_would_say_it(opened, trouble, said):
    trouble(opened)
    with pytest.raises(said):
        await opened.moves.move(opened.step)
    with pytest.raises(said):
        opened.moves.move_blocking(opened.step)
    assert opened.client.statistics().num_attached == 0


async def test_a_region_that_its_own_caller_closed_is_no_loss_of_the_node(opened):
    opened.step.local.close()
    with pytest.raises(TransportClosed):
        await opened.moves.move(opened.step)


async def test_closing_ends_a_move_under_way(opened):
    opened.client.set_faults(LoopbackFaults(delay_s={0: 60.0}))
    moving = asyncio.create_task(opened.moves.move(replace(opened.step, timeout_s=60.0)))
    async with asyncio.timeout(5):
        while not opened.client.statistics().num_attached:  # noqa: ASYNC110
            await asyncio.sleep(0)
    opened.moves.close()
    opened.client.release()
    with pytest.raises(NodeUnavailable):
        await moving
