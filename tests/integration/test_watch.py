"""Watch over a real gRPC server: snapshots, changes as they happen, slow subscribers, restarts, drains."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from snowskin.kvstore import wire
from snowskin.kvstore.blocks import KeyColumn, digest_number, digest_part
from snowskin.kvstore.errors import LimitExceeded, NodeDraining, WatcherTooSlow
from snowskin.kvstore.messages import CommitRequest, Reserved, ReserveRequest, WatchRequest
from snowskin.kvstore.node.daemon import NodeSettings, make_shell
from snowskin.kvstore.node.service import StoreService
from snowskin.kvstore.rpc import open_channel, serving, translating
from snowskin.v1 import store_pb2_grpc

BLOCK = 64
NAMESPACE = b"N" * 32


class Node:
    """A shell with a gRPC server; blocks are published into its state."""

    def __init__(self, **settings):
        settings = {"dram_nbytes": 1 << 20, "watch_beat_s": 30.0, "watch_stall_s": 30.0, **settings}
        self.settings = NodeSettings(**settings)
        self.shell = make_shell(self.settings)
        self.service = StoreService(self.shell, self.settings.watch_limits())
        self.replies = []
        self.session = self.shell.open_session(
            "writer", lambda _, reply: self.replies.append(reply), maps_memory=False
        )
        self.calls = 0
        self.address = ""

    def publish(self, numbers) -> None:
        """Commits blocks of these numbers, as one run."""
        keys = KeyColumn.of([key_of(number) for number in numbers])
        request = ReserveRequest(namespace=NAMESPACE, keys=keys, block_nbytes=BLOCK)
        self.shell.request(self.session.id, 1, request)
        reserved = self.replies.pop()
        assert isinstance(reserved, Reserved)
        assert reserved.lease is not None
        commit = CommitRequest(
            lease_id=reserved.lease.id, num_blocks=len(keys), checksums=bytes(4 * len(keys))
        )
        self.shell.request(self.session.id, 2, commit)

    @property
    def keys(self) -> set[bytes]:
        return {entry.key for entry in self.shell.state.residence.index}


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "little") * 4


@asynccontextmanager
async def node(**settings):
    served = Node(**settings)
    async with serving(
        [(store_pb2_grpc.add_StoreServicer_to_server, served.service)],
        host="127.0.0.1",
        port=0,
        service_names=[],
        role="node",
    ) as server:
        served.address = server.address
        try:
            yield served
        finally:
            served.shell.drain()
            served.service.close()
    served.shell.close()


@dataclass
class Subscriber:
    """Takes a stream in, in its order."""

    call: object
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
async def watching(node, epoch=0, sequence=0, keys=()):
    channel = open_channel(node.address)
    request = wire.watch_request_to(WatchRequest(node_epoch=epoch, sequence=sequence))
    call = store_pb2_grpc.StoreStub(channel).Watch(request)
    try:
        yield Subscriber(call, keys=set(keys))
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
