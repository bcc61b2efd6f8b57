"""Watch over a real gRPC server: snapshots, changes as they happen, slow subscribers, restarts, drains."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from snowskin.kvstore import wire
from snowskin.kvstore.blocks import digest_number, digest_part
from snowskin.kvstore.errors import LimitExceeded, NodeDraining, WatcherTooSlow
from snowskin.kvstore.messages import WatchRequest
from snowskin.kvstore.rpc import channel_options, translating
from snowskin.v1 import store_pb2_grpc
from tests.support.served_node import NAMESPACE, key_of
from tests.support.served_node import served_node as node


@dataclass
class Subscriber:
    """Takes a stream in, in its order."""

    call: Any
    epoch: int = 0
    sequence: int = 0
    in_sync: bool = False
    keys: set[bytes] = field(default_factory=set)
    num_snapshots: int = 0
    num_messages: int = 0

    async def hear(self) -> None:
        with translating("node"):
            message = wire.watched_from(await anext(aiter(self.call)))
        self.num_messages += 1
        if message.snapshot_begins:
            self.keys.clear()
            self.num_snapshots += 1
        for change in message.changes:
            for key in change.keys:
                self.keys.discard(key) if change.removed else self.keys.add(key)
        self.epoch, self.sequence, self.in_sync = (
            message.node_epoch,
            message.sequence,
            message.in_sync,
        )
        if message.in_sync:
            digest = 0
            for key in self.keys:
                digest ^= digest_part(digest_number(NAMESPACE), key)
            assert (message.num_blocks, message.digest) == (len(self.keys), digest)

    async def hear_until(self, is_enough) -> None:
        async with asyncio.timeout(10):
            while not is_enough(self):
                await self.hear()


@asynccontextmanager
async def watching(node, like=None):
    """A subscriber that knows nothing, or what another one knew."""
    before = like or Subscriber(None)
    # Flow control without guessing: who does not read is noticed after kilobytes, not megabytes.
    options = [*channel_options(), ("grpc.http2.bdp_probe", 0)]
    channel = grpc.aio.insecure_channel(node.address, options=options)
    request = WatchRequest(node_epoch=before.epoch, sequence=before.sequence)
    call = store_pb2_grpc.StoreStub(channel).Watch(wire.watch_request_to(request))
    try:
        yield Subscriber(call, before.epoch, before.sequence, keys=set(before.keys))
    finally:
        call.cancel()
        await channel.close(None)


def knows_all(subscriber):
    return subscriber.in_sync


async def test_a_subscriber_hears_what_is_here_and_what_comes():
    async with node() as served:
        served.publish(range(100))
        async with watching(served) as subscriber:
            await subscriber.hear()
            assert subscriber.num_snapshots == 1, "the first message is there at once"
            await subscriber.hear_until(knows_all)
            assert subscriber.keys == served.keys
            assert len(subscriber.keys) == 100
            served.publish([200, 201])
            served.publish([202])
            await subscriber.hear_until(lambda s: key_of(202) in s.keys)
            assert subscriber.keys == served.keys
            assert subscriber.num_snapshots == 1


async def test_who_waits_is_woken_by_a_change(monkeypatch):
    monkeypatch.setattr("snowskin.kvstore.node.watching.GAP_S", 0.0)
    async with node() as served, watching(served) as subscriber:
        await subscriber.hear_until(knows_all)
        async with watching(served) as another:
            await another.hear()  # by when the first one's stream has nothing left to look at
        served.publish([1])
        await subscriber.hear_until(lambda s: s.keys)


async def test_who_comes_back_in_time_goes_on_behind_what_it_has():
    async with node() as served:
        served.publish(range(10))
        async with watching(served) as subscriber:
            await subscriber.hear_until(knows_all)
        served.publish([20])
        served.publish([21])
        async with watching(served, like=subscriber) as again:
            await again.hear_until(lambda s: key_of(21) in s.keys)
            assert again.num_snapshots == 0
            assert again.keys == served.keys
        async with watching(served, like=again) as unchanged:
            await unchanged.hear()
            assert unchanged.in_sync, "the first message comes at once, also with nothing to say"


async def test_who_comes_back_too_late_or_to_another_life_of_the_node_begins_anew():
    async with node(watch_ring_nbytes=4096) as served:
        async with watching(served) as subscriber:
            await subscriber.hear_until(knows_all)
        served.publish(range(1000))  # more than the node keeps changes for
        async with watching(served, like=subscriber) as late:
            await late.hear_until(knows_all)
            assert late.num_snapshots == 1
            assert late.keys == served.keys
    async with node() as restarted:
        restarted.publish([7])
        async with watching(restarted, like=late) as again:
            await again.hear_until(knows_all)
            assert (again.num_snapshots, again.keys) == (1, {key_of(7)})
            assert again.epoch != late.epoch


async def test_a_slow_subscriber_is_dropped_and_comes_again_while_others_hear_everything():
    async with (
        node(dram_nbytes=4 << 20, watch_ring_nbytes=512 << 10, watch_stall_s=0.3) as served,
        watching(served) as slow,
        watching(served) as other,
    ):
        await slow.hear_until(knows_all)
        await other.hear_until(knows_all)
        number = 0
        async with asyncio.timeout(20):
            while not served.service.watchers.num_dropped:
                served.publish(range(number, number + 2048))
                number += 2048
                last = key_of(number - 1)
                await other.hear_until(lambda s, last=last: last in s.keys)
        assert len(served.service.watchers) == 1
        with pytest.raises(WatcherTooSlow, match="watch again with what you have"):
            await slow.hear_until(lambda _: False)
        assert other.keys == served.keys
        assert other.num_snapshots == 1, "nobody else was dropped"
        async with watching(served, like=slow) as again:
            await again.hear_until(lambda s: s.in_sync and s.keys == served.keys)


async def test_silence_is_broken_by_beats():
    async with node(watch_beat_s=0.02) as served, watching(served) as subscriber:
        await subscriber.hear_until(lambda s: s.num_messages >= 4)
        assert subscriber.in_sync


async def test_more_subscribers_than_agreed_are_refused_until_one_goes():
    async with node(max_watchers=1) as served:
        async with watching(served) as first:
            await first.hear()
            async with watching(served) as second:
                with pytest.raises(LimitExceeded, match="1 subscribers"):
                    await second.hear()
        async with asyncio.timeout(5), watching(served) as third:
            while not third.num_messages:  # the node hears of the end after us
                with contextlib.suppress(LimitExceeded):
                    await third.hear()


async def test_a_drain_ends_the_streams_and_begins_no_more():
    async with node() as served, watching(served) as subscriber:
        await subscriber.hear_until(knows_all)
        served.shell.drain()
        with pytest.raises(NodeDraining):
            await subscriber.hear()
        async with watching(served) as late:
            with pytest.raises(NodeDraining):
                await late.hear()
    assert not len(served.service.watchers)
