"""Leases on the data plane: what they open, for how long, and that nothing else is reached; on every transport."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from snowskin.engines.conductor.daemon import _connect as connect_as_conductor
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.client.transports import ClientTransports
from snowskin.kvstore.messages import (
    AbortRequest,
    CommitRequest,
    MatchRequest,
    ReleaseRequest,
    RenewRequest,
    ReserveRequest,
)
from snowskin.transport.addresses import Address
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import (
    GrantRefused,
    OutOfBounds,
    RegionExpired,
    RegionReadOnly,
    TransportUnavailable,
)
from snowskin.transport.frames import Data
from snowskin.transport.loopback import LoopbackNetwork, LoopbackTransport
from snowskin.transport.memory import region_of
from snowskin.transport.runs import Run
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.transport import TcpTransport
from tests.support.raw_tcp import RawReader, ask_of, reachable
from tests.support.served_node import served_node
from tests.support.store_drivers import keys_of, namespace_of, noise

BLOCK = 4096
NAMESPACE = namespace_of(1)
CANARY = 0xA5
PULL_S = 5.0


class Loopback:
    """Both sides in one process, without a wire."""

    def __init__(self, kind=LoopbackTransport):
        self.network = LoopbackNetwork()
        self.kind = kind

    def owner(self):
        return self.kind(self.network)

    def reader(self):
        return ClientTransports("loopback", factories={"loopback": self.owner})


class Tcp:
    """Both sides over loopback's TCP."""

    def __init__(self):
        self.port = 0

    def owner(self):
        """The same port in each life."""
        transport = TcpTransport(TcpSettings(listen=(Address("127.0.0.1", self.port),)))
        self.port = transport.reachability.addresses[0].port
        return transport

    def reader(self):
        return ClientTransports("tcp")


@pytest.fixture(params=[Loopback, Tcp], ids=["loopback", "tcp"])
def wire(request):
    return request.param()


@asynccontextmanager
async def node_and_client(wire, **settings):
    """A node with a data plane, and a client that uses it."""
    settings = {"dram_nbytes": 8 << 20, **settings}
    async with served_node(transports=[wire.owner()], **settings) as node:
        transports = wire.reader()
        node.shell.arenas[0].buffer[:] = CANARY
        try:
            async with await StoreClient.connect(
                node.address, client_name="one", transports=transports
            ) as client:
                yield node, client
        finally:
            transports.close()


class Holder:
    """Leases by the client's own calls, and transfers with what they brought: what a hostile client could do."""

    def __init__(self, client):
        self.connection = client._connection
        scheme = client.way.scheme
        self.transport = self.connection._moves._transports.get(scheme)
        self.memory = region_of(noise(7, 64 * BLOCK))

    async def call(self, request, lease=None):
        return await self.connection.call(request, timeout_s=2, lease=lease, request_id="")

    async def reserve(self, seed, num_blocks, **arguments):
        return await self.call(
            ReserveRequest(
                namespace=NAMESPACE, keys=keys_of(seed, num_blocks), block_nbytes=BLOCK, **arguments
            )
        )

    async def match(self, seed, num_blocks, **arguments):
        return await self.call(
            MatchRequest(namespaces=(NAMESPACE,), keys=keys_of(seed, num_blocks), **arguments)
        )

    async def commit(self, lease, num_blocks):
        return await self.call(
            CommitRequest(
                lease_id=lease.id, num_blocks=num_blocks, checksums=bytes(4 * num_blocks)
            ),
            lease,
        )

    async def published(self, seed, num_blocks):
        """Commits blocks of the node's own bytes, as they lie there."""
        reserved = await self.reserve(seed, num_blocks)
        await self.commit(reserved.lease, num_blocks)

    def pull(self, lease, offset, nbytes, **changes):
        descriptor = replace(described(lease), **changes)
        remote = self.transport.attach(descriptor)
        try:
            self.transport.pull(
                remote, self.memory, [Run(offset, 0, nbytes)], deadline_s=self.soon()
            )
        finally:
            remote.close()

    def push(self, lease, offset, nbytes, **changes):
        descriptor = replace(described(lease), **changes)
        remote = self.transport.attach(descriptor, writable=descriptor.writable)
        try:
            self.transport.push(
                self.memory, remote, [Run(offset, 0, nbytes)], deadline_s=self.soon()
            )
        finally:
            remote.close()

    def soon(self):
        return self.transport.now_s() + PULL_S


def described(lease):
    ((data,),) = [region.descriptors for region in lease.regions]
    return RegionDescriptor.from_bytes(data)


def place(reply):
    (run,) = reply.runs
    return run.extent.offset, run.extent.nbytes


async def test_bytes_go_by_the_data_plane_and_not_by_grpc(wire):
    async with node_and_client(wire) as (node, client):
        data = noise(1, 4 * BLOCK)
        where = range(0, data.nbytes, BLOCK)
        await client.publish(
            namespace=NAMESPACE, keys=keys_of(1, 4), block_nbytes=BLOCK,
            local=client.register(data), local_offsets=where,
        )  # fmt: skip
        landing = np.zeros_like(data)
        pulled = await client.pull(
            namespace=NAMESPACE, keys=keys_of(1, 4), block_nbytes=BLOCK,
            local=client.register(landing), local_offsets=where,
        )  # fmt: skip
        assert pulled.num_blocks == 4
        assert (landing == data).all()
        assert (node.service.read_nbytes, node.service.written_nbytes) == (0, 0)
        moved = Holder(client).transport.statistics()
        assert (moved.pulled_nbytes, moved.pushed_nbytes) == (data.nbytes, data.nbytes)


async def test_a_lease_opens_its_own_extents_and_no_neighbours(wire):
    async with node_and_client(wire) as (node, client):
        holder = Holder(client)
        before, mine, behind = [await holder.reserve(seed, 2) for seed in (1, 2, 3)]
        offset, nbytes = place(mine)
        assert place(before)[0] + 2 * BLOCK == offset == place(behind)[0] - 2 * BLOCK
        holder.push(mine.lease, offset, nbytes)
        for wrong_offset, wrong_nbytes in [
            (offset - 1, 1), (offset - 1, nbytes), (offset, nbytes + 1), (offset + nbytes, 1),
            (offset + nbytes - 1, 2), (0, 1), (node.shell.arenas[0].nbytes - 1, 1),
        ]:  # fmt: skip
            with pytest.raises(OutOfBounds):
                holder.push(mine.lease, wrong_offset, wrong_nbytes)
            with pytest.raises(OutOfBounds):
                holder.pull(mine.lease, wrong_offset, wrong_nbytes)
        buffer = node.shell.arenas[0].buffer
        assert (buffer[offset : offset + nbytes] == holder.memory.buffer[:nbytes]).all()
        assert (buffer[:offset] == CANARY).all(), "a neighbour's bytes were written"
        assert (buffer[offset + nbytes :] == CANARY).all(), "a neighbour's bytes were written"


async def test_a_match_opens_for_reading_only(wire):
    async with node_and_client(wire) as (_, client):
        holder = Holder(client)
        await holder.published(1, 2)
        matched = await holder.match(1, 2)
        holder.pull(matched.lease, *place(matched))
        with pytest.raises(RegionReadOnly):
            holder.push(matched.lease, *place(matched))


async def released(_, holder):
    await holder.published(1, 1)
    matched = await holder.match(1, 1)
    await holder.call(ReleaseRequest(lease_ids=(matched.lease.id,)), matched.lease)
    return matched


async def aborted(_, holder):
    reserved = await holder.reserve(1, 1)
    await holder.call(AbortRequest(lease_id=reserved.lease.id), reserved.lease)
    return reserved


async def committed(_, holder):
    reserved = await holder.reserve(1, 1)
    await holder.commit(reserved.lease, 1)
    return reserved


async def revoked_reader(node, holder):
    await holder.published(1, 1)
    matched = await holder.match(1, 1)
    node.shell.revoke_lease(matched.lease.id)
    return matched


async def revoked_writer(node, holder):
    reserved = await holder.reserve(1, 1)
    node.shell.revoke_lease(reserved.lease.id)
    return reserved


async def fenced(node, holder):
    reserved = await holder.reserve(1, 1)
    node.shell.fence_session(session_of(node, reserved))
    return reserved


async def session_ended(node, holder):
    reserved = await holder.reserve(1, 1)
    node.shell.end_session(session_of(node, reserved))
    return reserved


def session_of(node, reply):
    state = node.shell.state
    return state.sessions.get(state.holder_of(reply.lease.id))


ENDINGS = (
    released, aborted, committed, revoked_reader, revoked_writer, fenced, session_ended,
)  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS, ids=[ending.__name__ for ending in ENDINGS])
async def test_what_ends_a_lease_ends_what_it_opened(wire, ending):
    async with node_and_client(wire) as (node, client):
        holder = Holder(client)
        reply = await ending(node, holder)
        with pytest.raises(GrantRefused):
            holder.pull(reply.lease, *place(reply))
        with pytest.raises((GrantRefused, RegionReadOnly)):
            holder.push(reply.lease, *place(reply))
        assert not len(node.shell.data_plane)


@pytest.mark.parametrize("grace_s", [0.05, 60.0])
async def test_a_lease_that_ran_out_serves_nothing_and_a_renewed_one_does(wire, grace_s):
    async with node_and_client(wire, read_lease_s=0.2, grace_s=grace_s) as (node, client):
        holder = Holder(client)
        await holder.published(1, 1)
        kept, left = [await holder.match(1, 1) for _ in range(2)]
        wrongly = {"expires_in_s": float("inf")}  # what a client that counts wrongly believes

        async def renew():
            request = RenewRequest(lease_ids=(kept.lease.id,), ttl_s=0.2)
            assert (await holder.call(request, kept.lease)).ttl_s[0] > 0

        await until_refused(lambda: holder.pull(left.lease, *place(left), **wrongly), renew)
        holder.pull(kept.lease, *place(kept), **wrongly)
        await until_refused(lambda: holder.pull(kept.lease, *place(kept), **wrongly), yielding)
        async with asyncio.timeout(5):
            while grace_s < 1.0 and len(node.shell.data_plane):  # noqa: ASYNC110  its grace ends too
                await asyncio.sleep(0.01)


async def yielding():
    await asyncio.sleep(0.001)


async def until_refused(move, meanwhile):
    """Moves again and again until it is refused, and returns then."""
    async with asyncio.timeout(5):
        while True:
            try:
                move()
            except (GrantRefused, RegionExpired):
                return
            await meanwhile()


async def test_a_commit_of_a_part_ends_what_was_open_and_opens_the_rest(wire):
    async with node_and_client(wire) as (_, client):
        holder = Holder(client)
        reserved = await holder.reserve(1, 3)
        offset, nbytes = place(reserved)
        holder.push(reserved.lease, offset, nbytes)
        committed = await holder.commit(reserved.lease, 1)
        assert committed.num_blocks_left == 2
        with pytest.raises(GrantRefused):
            holder.push(reserved.lease, offset + BLOCK, BLOCK)
        rest = replace(reserved.lease, regions=committed.regions)
        holder.push(rest, offset + BLOCK, 2 * BLOCK)
        with pytest.raises(OutOfBounds):
            holder.push(rest, offset, BLOCK)
        done = await holder.commit(reserved.lease, 2)
        assert (done.num_blocks_left, done.regions) == (0, ())
        with pytest.raises(GrantRefused):
            holder.push(rest, offset + BLOCK, BLOCK)


async def test_forged_words_open_nothing(wire):
    async with node_and_client(wire) as (node, client):
        holder = Holder(client)
        await holder.published(1, 1)
        matched = await holder.match(1, 1)
        true = described(matched.lease)
        for changes in (
            {"capability": bytes(16)},
            {"epoch": true.epoch ^ 1},
            {"generation": true.generation + 1},
        ):
            with pytest.raises(GrantRefused):
                holder.pull(matched.lease, *place(matched), **changes)
        assert true.epoch == node.shell.state.epoch


async def test_room_that_was_given_to_another_is_not_written_by_whom_it_was_taken_from(wire):
    """The next owner of the bytes asks in the very call that ends the lease of the first."""
    async with node_and_client(wire, dram_nbytes=1 << 20) as (node, client):
        holder = Holder(client)
        num_blocks = (1 << 20) // BLOCK
        first = await holder.reserve(1, num_blocks)
        waiting = asyncio.create_task(holder.reserve(2, num_blocks, timeout_s=5.0))
        async with asyncio.timeout(5):
            while not node.shell.state.has_waiting_reserves:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await holder.call(AbortRequest(lease_id=first.lease.id), first.lease)
        second = await waiting
        assert place(first) == place(second)
        with pytest.raises(GrantRefused):
            holder.push(first.lease, place(first)[0], BLOCK)
        assert (node.shell.arenas[0].buffer == CANARY).all()
        holder.push(second.lease, place(second)[0], BLOCK)


async def test_a_client_without_schemes_gets_no_regions_and_goes_the_slow_path(wire):
    async with node_and_client(wire) as (node, _):
        transports = ClientTransports("grpc")
        async with await StoreClient.connect(
            node.address, client_name="slow", transports=transports
        ) as client:
            holder_calls = client._connection.call
            reserved = await holder_calls(
                ReserveRequest(namespace=NAMESPACE, keys=keys_of(9, 1), block_nbytes=BLOCK),
                timeout_s=2, lease=None, request_id="",
            )  # fmt: skip
            assert reserved.lease.regions == ()
            assert not len(node.shell.data_plane)
            data = noise(2, BLOCK)
            await client.publish(
                namespace=NAMESPACE, keys=keys_of(3, 1), block_nbytes=BLOCK,
                local=client.register(data), local_offsets=[0],
            )  # fmt: skip
        assert node.service.written_nbytes == BLOCK


async def test_what_was_demanded_and_is_not_served_is_said_with_what_to_do():
    async with served_node() as node:
        with pytest.raises(TransportUnavailable, match="--transport auto"):
            await StoreClient.connect(
                node.address, client_name="one", transports=ClientTransports("tcp")
            )
    with pytest.raises(TransportUnavailable, match="HOST:PORT"):
        await StoreClient.connect(
            "unix:/nowhere", client_name="one", transports=ClientTransports("tcp")
        )


async def test_by_shared_memory_only_an_address_moves_no_bytes():
    async with served_node() as node:
        async with await StoreClient.connect(
            node.address, client_name="one", transports=ClientTransports("shm")
        ) as client:
            with pytest.raises(TransportUnavailable, match="local door"):
                await client.publish(
                    namespace=NAMESPACE, keys=keys_of(3, 1), block_nbytes=BLOCK,
                    local=client.register(noise(2, BLOCK)), local_offsets=[0],
                )  # fmt: skip
        assert node.shell.state.stat().pools[0].reserved_nbytes == 0
        assert node.service.written_nbytes == 0


async def test_a_node_that_started_anew_refuses_the_grants_of_its_former_life(wire):
    async with node_and_client(wire) as (_, client):
        holder = Holder(client)
        await holder.published(1, 1)
        before = await holder.match(1, 1)
    async with node_and_client(wire) as (_, client):
        holder = Holder(client)
        await holder.published(1, 1)
        after = await holder.match(1, 1)
        assert place(before) == place(after)
        with pytest.raises(GrantRefused):
            holder.pull(before.lease, *place(before))
        holder.pull(after.lease, *place(after))


async def test_nothing_is_opened_for_the_conductor_which_moves_no_bytes(wire):
    async with node_and_client(wire) as (node, client):
        await Holder(client).published(1, 2)
        async with await connect_as_conductor(node.address) as conductor:
            assert conductor.way.scheme == "grpc"
            request = MatchRequest(namespaces=(NAMESPACE,), keys=keys_of(1, 2))
            matched = await conductor._connection.call(
                request, timeout_s=2, lease=None, request_id=""
            )
            assert matched.num_blocks == 2
            assert matched.lease.regions == ()


async def refused_in_the_end(holder, reserved):
    """Writes under a reservation until its lease has run out."""
    while True:
        try:
            holder.push(reserved.lease, place(reserved)[0], BLOCK)
        except (RegionExpired, GrantRefused):
            return
        await asyncio.sleep(0.01)


class OneSided(LoopbackTransport):
    """As if peers moved the bytes by themselves, once they were let in."""

    is_one_sided = True


@pytest.mark.parametrize("kind", [LoopbackTransport, OneSided])
async def test_what_peers_move_one_sidedly_has_a_grace_before_its_room_is_anothers(kind):
    wire = Loopback(kind)
    lives = {"write_lease_s": 0.1, "read_lease_s": 0.1, "grace_s": 60.0}
    async with node_and_client(wire, **lives) as (_, client):
        holder = Holder(client)
        await holder.published(2, 1)
        await holder.match(2, 1)
        reserved = await holder.reserve(1, 1)
        async with asyncio.timeout(5):
            await refused_in_the_end(holder, reserved)
        stat = await client.stat()
        held = (1, 1) if kind is OneSided else (0, 0)
        assert (stat.num_read_leases, stat.num_write_leases) == held


@pytest.mark.parametrize("kind", [LoopbackTransport, OneSided])
async def test_room_that_is_given_back_while_one_sided_bytes_may_come_is_nobodys_for_a_grace(kind):
    wire = Loopback()
    wire.owner = lambda: kind(wire.network)  # type: ignore[method-assign]
    async with node_and_client(wire, grace_s=0.2) as (node, client):
        holder = Holder(client)
        reserved = await holder.reserve(1, 1)
        for _ in range(2):  # the second is a retry whose first answer was lost
            await holder.call(AbortRequest(lease_id=reserved.lease.id), reserved.lease)
            (pool,) = node.shell.stat().pools
            assert pool.quarantined_nbytes == (BLOCK if kind is OneSided else 0)
            assert pool.reserved_nbytes == 0
            node.shell.state.check()
            if kind is not OneSided:
                break
        async with asyncio.timeout(5):
            while node.shell.stat().num_write_leases:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        node.shell.state.check()
        (pool,) = node.shell.stat().pools
        assert pool.quarantined_nbytes == 0
        assert pool.free_nbytes == pool.capacity_nbytes


BIG_BLOCK, NUM_BIG = 256 << 10, 64


class Trusting(Tcp):
    """As a node that trusts the processes of its host: large pulls go by reference."""

    def owner(self):
        settings = TcpSettings(listen=(Address("127.0.0.1", 0),), lend_to_this_host=True)
        return TcpTransport(settings)


@pytest.mark.parametrize("huge_pages", ["never", "auto"])
async def test_room_that_a_socket_still_refers_to_is_given_away_with_other_pages(huge_pages):
    async with node_and_client(
        Trusting(), dram_nbytes=NUM_BIG * BIG_BLOCK, lend_pages="trusted", huge_pages=huge_pages
    ) as (node, client):
        lending = node.shell.arenas[0].lending
        if lending is None:
            pytest.skip(f"NOT TESTED: NOTHING IS LENT HERE: {node.shell.arenas[0].why_not_lent}")

        async def publish(seed):
            data = noise(seed, NUM_BIG * BIG_BLOCK)
            await client.publish(
                namespace=NAMESPACE,
                keys=keys_of(seed, NUM_BIG),
                block_nbytes=BIG_BLOCK,
                local=client.register(data),
                local_offsets=range(0, data.nbytes, BIG_BLOCK),
            )
            return data

        first = await publish(1)
        target = np.zeros_like(first)
        pulled = await client.pull(
            namespace=NAMESPACE,
            keys=keys_of(1, NUM_BIG),
            block_nbytes=BIG_BLOCK,
            local=client.register(target),
            local_offsets=range(0, target.nbytes, BIG_BLOCK),
        )
        assert pulled.num_blocks == NUM_BIG
        assert np.array_equal(target, first)

        holder = Holder(client)
        matched = await holder.match(1, NUM_BIG)
        offset, nbytes = place(matched)
        descriptor = described(matched.lease)
        before = node.shell.arenas[0].buffer[offset : offset + nbytes].tobytes()
        with RawReader(reachable(descriptor)) as reader:
            reader.say(ask_of(descriptor, [(offset, nbytes)], wants_done=True))
            async with asyncio.timeout(PULL_S):
                while not lending.lent_nbytes:  # noqa: ASYNC110  the serving thread tells nobody
                    await asyncio.sleep(0.01)
            head = reader.hear()
            await holder.call(ReleaseRequest(lease_ids=(matched.lease.id,)), matched.lease)
            second = await publish(2)  # in all of the room
            payload = reader.payload(head.nbytes)
            while isinstance(head := reader.hear(), Data):
                payload += reader.payload(head.nbytes)
        assert payload
        assert payload == before[: len(payload)]
        assert lending.num_reclaimed
        assert not lending.is_refused
        assert node.shell.arenas[0].buffer.tobytes() == second.tobytes()
