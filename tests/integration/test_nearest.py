"""The shortest way to a node: its door where that is on this host and is the same node's, else gRPC."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from snowskin.engines.nearest import connect_nearest
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.client.transports import ClientTransports
from snowskin.kvstore.errors import NodeUnavailable
from snowskin.kvstore.node.door import LocalDoor
from snowskin.transport.advertisement import Advertisement, HostIdentity
from snowskin.transport.errors import TransportUnavailable
from tests.support.served_node import served_node

AUTO = ClientTransports()


@asynccontextmanager
async def with_door(path):
    async with served_node() as node:
        door = LocalDoor(node.shell, path)
        door.open()
        node.shell.state.door = f"unix:{path}"
        try:
            yield node
        finally:
            door.close()


class Connects:
    """Remembers whom it connected to, and that all but the answer were closed again."""

    def __init__(self, transports=AUTO):
        self.clients = []
        self.transports = transports

    async def __call__(self, address):
        client = await StoreClient.connect(address, client_name="test", transports=self.transports)
        self.clients.append((address, client))
        return client

    @property
    def open(self):
        return [address for address, client in self.clients if client.connected]


@pytest.fixture
def connects():
    made = Connects()
    yield made
    made.clients.clear()  # a channel that somebody knows of is not gone


async def test_a_node_with_a_door_on_this_host_is_reached_by_it(connects, tmp_path):
    async with (
        with_door(tmp_path / "door") as node,
        await connect_nearest(node.address, connects, AUTO) as client,
    ):
        assert connects.open == [f"unix:{tmp_path / 'door'}"]
        assert client.way.scheme == "shm"
        assert client.node_epoch == node.shell.state.epoch


@pytest.mark.parametrize("door", ["", "unix:/nowhere/door", "tcp:odd"])
async def test_a_node_without_a_door_here_is_reached_by_grpc(connects, door):
    async with served_node() as node:
        node.shell.state.door = door
        async with await connect_nearest(node.address, connects, AUTO):
            assert connects.open == [node.address]


async def test_a_door_behind_which_another_node_answers_is_not_taken(connects, tmp_path):
    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(with_door(tmp_path / "door"))
        node = await stack.enter_async_context(served_node())
        node.shell.state.door = other.shell.state.door
        async with await connect_nearest(node.address, connects, AUTO) as client:
            assert connects.open == [node.address]
            assert client.node_epoch == node.shell.state.epoch


async def test_a_door_of_another_host_is_not_knocked_at(connects, tmp_path):
    async with with_door(tmp_path / "door") as node:
        for host, num_tried in ((b"another kernel..", 1), (bytes(16), 2)):
            told = Advertisement(identity=HostIdentity(host=host))
            node.shell.state.advertisement = told.to_bytes()
            connects.clients.clear()
            async with await connect_nearest(node.address, connects, AUTO):
                assert len(connects.clients) == num_tried


async def test_an_address_that_is_a_door_is_taken_as_it_is(connects, tmp_path):
    async with (
        with_door(tmp_path / "door"),
        await connect_nearest(f"unix:{tmp_path / 'door'}", connects, AUTO),
    ):
        assert len(connects.clients) == 1


async def test_a_node_that_does_not_answer_is_an_error(connects):
    with pytest.raises(NodeUnavailable):
        await connect_nearest("127.0.0.1:1", connects, AUTO)


async def test_who_is_cancelled_while_a_wrong_door_closes_leaves_no_connection(
    connects, tmp_path, monkeypatch
):
    closing = asyncio.Event()
    close = StoreClient.close

    async def slow(client):
        await close(client)
        closing.set()
        await asyncio.sleep(0)

    monkeypatch.setattr(StoreClient, "close", slow)
    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(with_door(tmp_path / "door"))
        node = await stack.enter_async_context(served_node())
        node.shell.state.door = other.shell.state.door
        connecting = asyncio.create_task(connect_nearest(node.address, connects, AUTO))
        await closing.wait()
        connecting.cancel()
        await asyncio.wait([connecting])
        assert connecting.cancelled()
        assert connects.open == []


async def test_where_another_transport_was_demanded_no_door_is_looked_for(tmp_path):
    slow = ClientTransports("grpc")
    connects = Connects(slow)
    async with (
        with_door(tmp_path / "door") as node,
        await connect_nearest(node.address, connects, slow),
    ):
        assert connects.open == [node.address]
    connects.clients.clear()


async def test_where_shared_memory_was_demanded_there_must_be_a_door(tmp_path):
    mapped = ClientTransports("shm")
    connects = Connects(mapped)
    async with (
        with_door(tmp_path / "door") as node,
        await connect_nearest(node.address, connects, mapped),
    ):
        assert connects.open == [f"unix:{tmp_path / 'door'}"]
    async with served_node() as node:
        with pytest.raises(TransportUnavailable, match="--transport auto"):
            await connect_nearest(node.address, connects, mapped)
        assert connects.open == []
    connects.clients.clear()
