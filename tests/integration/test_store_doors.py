"""A node process by both of its doors and both clients: the same calls bring the same bytes."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import threading

import numpy as np
import pytest

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.client.conversation import Conversation
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.errors import BadRequest, ClientClosed, NodeUnavailable, TailUnknown
from snowskin.kvstore.messages import Access, WakeReason
from snowskin.kvstore.node import door as door_module
from snowskin.kvstore.node.daemon import NodeSettings, serve_node
from snowskin.transport.errors import OutOfBounds, RegionReadOnly, TransportClosed
from tests.support.node_process import NodeProcess
from tests.support.roles import running
from tests.support.store_drivers import (
    ALL_WAYS,
    DRIVERS,
    address_by,
    connected,
    keys_of,
    namespace_of,
    noise,
    way_of,
)
from tests.support.waiting import eventually

NODE = {"dram_nbytes": 64 << 20, "log_level": "warning", "grace_s": 0.1}


def pytest_generate_tests(metafunc):
    """Every test that names a way or a driver runs with each."""
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", ALL_WAYS)
    if "driver" in metafunc.fixturenames:
        metafunc.parametrize("driver", DRIVERS)


@pytest.fixture(scope="module")
def node():
    with NodeProcess(dict(NODE)) as process:
        yield process


@pytest.fixture
def address(node, way):
    return address_by(node.facts, way)


@pytest.fixture
def baseline(node):
    """Afterwards nothing is leased, reserved or waiting."""
    before = node.stat()
    yield
    after = node.stat()
    for name in ("num_read_leases", "num_write_leases", "num_sessions", "num_waiting_matches"):
        assert getattr(after, name) == getattr(before, name), name
    pool = after.pools[0]
    assert (pool.reserved_nbytes, pool.quarantined_nbytes, pool.leased_nbytes) == (0, 0, 0)
    assert pool.capacity_nbytes == pool.free_nbytes + pool.committed_nbytes


@pytest.fixture
def namespace(request):
    return namespace_of(hash(request.node.name) & 0xFFFF_FFFF_FFFF)


def test_the_node_hears_of_the_end_only_when_no_store_can_land_any_more(
    node, driver, baseline, monkeypatch
):
    # The node gives a session's room to others at once: a piece that is under way must have landed by then.
    with connected(driver, node.door) as client:
        connection = client._connection
        door, let_go = connection._door, connection._transport.close
        was_open = []

        def closing() -> None:
            was_open.append(is_open(door))
            let_go()

        monkeypatch.setattr(connection._transport, "close", closing)
        client.close()
        assert was_open[0], "the session ended while the pools were mapped"
        assert not is_open(door)


def is_open(door: socket.socket) -> bool:
    """Whether neither side has ended the connection."""
    try:
        return bool(door.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except (BlockingIOError, TimeoutError):
        return True
    except OSError:
        return False


def side_by_side(num_blocks, block_nbytes):
    return range(0, num_blocks * block_nbytes, block_nbytes)


def publish(client, namespace, keys, data, **arguments):
    block_nbytes = data.nbytes // len(keys)
    return client.publish(
        namespace=namespace,
        keys=keys,
        block_nbytes=block_nbytes,
        local=client.register(data),
        local_offsets=side_by_side(len(keys), block_nbytes),
        **arguments,
    )


def pull(client, namespace, keys, block_nbytes, num_blocks=None, **arguments):
    num_blocks = num_blocks or len(keys)
    landing = np.zeros(num_blocks * block_nbytes, np.uint8)
    pulled = client.pull(
        namespace=namespace,
        keys=keys,
        block_nbytes=block_nbytes,
        local=client.register(landing),
        local_offsets=side_by_side(num_blocks, block_nbytes),
        **arguments,
    )
    return pulled, landing


@pytest.mark.parametrize("block_nbytes", [1, 1000, 4096])
def test_what_is_published_is_pulled(driver, address, namespace, block_nbytes, baseline):
    keys, data = keys_of(1, 7), noise(1, 7 * block_nbytes)
    with connected(driver, address) as client:
        published = publish(client, namespace, keys, data)
        assert (published.num_blocks, published.num_blocks_existing) == (7, 0)
        assert published.nbytes == data.nbytes
        pulled, landed = pull(client, namespace, keys, block_nbytes)
        assert (pulled.num_blocks, pulled.nbytes, pulled.corrupt_blocks) == (7, data.nbytes, ())
        assert pulled.num_extents == 1
        assert pulled.wake_reason is WakeReason.SATISFIED
        assert 0 < pulled.first_byte_s <= pulled.seconds
        assert (landed == data).all()


def test_blocks_far_larger_than_a_chunk_arrive_whole(driver, address, namespace, baseline):
    block_nbytes = (3 << 20) + 17
    keys, data = keys_of(2, 3), noise(2, 3 * block_nbytes)
    with connected(driver, address) as client:
        publish(client, namespace, keys, data)
        pulled, landed = pull(client, namespace, keys, block_nbytes)
    assert pulled.num_blocks == 3
    assert (landed == data).all()


def test_a_pull_ends_where_the_committed_run_ends(driver, address, namespace, baseline):
    keys, data = keys_of(3, 6), noise(3, 6 * 500)
    with connected(driver, address) as client:
        publish(client, namespace, keys[:2], data[:1000])
        publish(client, namespace, keys[4:], data[2000:], parent_key=keys[3])
        pulled, landed = pull(client, namespace, keys, 500)
        assert pulled.num_blocks == 2
        assert (landed[:1000] == data[:1000]).all()
        assert not landed[1000:].any()
        published = publish(client, namespace, keys, data)
        assert (published.num_blocks, published.num_blocks_existing) == (2, 4)
        assert published.nbytes == 2 * 500
        pulled, landed = pull(client, namespace, keys, 500)
        assert pulled.num_blocks == 6
        assert (landed == data).all()
        again = publish(client, namespace, keys, data)
        assert (again.num_blocks, again.num_blocks_existing, again.nbytes) == (0, 6, 0)


def test_a_pull_asks_for_no_more_blocks_than_it_has_room_for(driver, address, namespace, baseline):
    keys, data = keys_of(4, 6), noise(4, 6 * 500)
    with connected(driver, address) as client:
        publish(client, namespace, keys, data)
        pulled, landed = pull(client, namespace, keys, 500, num_blocks=4, wait_blocks=4)
    assert pulled.num_blocks == 4
    assert (landed == data[:2000]).all()


def test_nothing_here_is_no_error(driver, address, namespace, baseline):
    with connected(driver, address) as client:
        pulled, _ = pull(client, namespace, keys_of(5, 3), 500)
        assert (pulled.num_blocks, pulled.nbytes, pulled.num_extents) == (0, 0, 0)
        assert pulled.first_byte_s is None


def test_local_blocks_may_lie_anywhere(driver, address, namespace, baseline):
    keys, data = keys_of(6, 5), noise(6, 10 * 300)
    there, back = [2700, 0, 1500, 301, 900], [5, 2400, 1205, 605, 1805]
    landing = np.zeros(3000, np.uint8)
    with connected(driver, address) as client:
        local = client.register(data)
        client.publish(
            namespace=namespace, keys=keys, block_nbytes=300, local=local, local_offsets=there
        )
        pulled = client.pull(
            namespace=namespace,
            keys=keys,
            block_nbytes=300,
            local=client.register(landing),
            local_offsets=back,
        )
    assert pulled.num_blocks == 5
    wanted = np.zeros(3000, np.uint8)
    for source, target in zip(there, back, strict=True):
        wanted[target : target + 300] = data[source : source + 300]
    assert (landing == wanted).all()


def test_a_tail_is_for_one_reader(driver, address, namespace, baseline):
    data = noise(7, 777)
    landing = np.zeros(777, np.uint8)
    tail = {"namespace": namespace, "tail_id": f"{driver}-{address}", "nbytes": 777}
    with connected(driver, address) as client:
        free_nbytes = client.stat().pools[0].free_nbytes
        assert (
            client.publish_tail(**tail, local=client.register(data), local_offset=0).nbytes == 777
        )
        with pytest.raises(BadRequest, match="here already"):
            client.publish_tail(**tail, local=client.register(data), local_offset=0)
        local = client.register(landing)
        assert client.pull_tail(**tail, local=local, local_offset=0).num_blocks == 1
        assert (landing == data).all()
        with pytest.raises(TailUnknown) as caught:
            client.pull_tail(**tail, local=local, local_offset=0)
        assert caught.value.status == "NOT_FOUND"
        assert client.stat().pools[0].free_nbytes == free_nbytes


def test_a_tail_can_be_waited_for(driver, address, namespace, baseline):
    data, landing = noise(8, 100), np.zeros(100, np.uint8)
    tail = {"namespace": namespace, "tail_id": f"later-{driver}-{address}", "nbytes": 100}

    def read():
        with connected(driver, address, client_name="reader") as reader:
            local = reader.register(landing)
            reader.pull_tail(**tail, local=local, local_offset=0, timeout_s=10.0)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        with connected(driver, address) as writer:
            eventually(lambda: writer.stat().num_waiting_matches, 5.0)
            writer.publish_tail(**tail, local=writer.register(data), local_offset=0)
    finally:
        thread.join()
    assert (landing == data).all()


def test_probe_sees_what_a_match_would_and_more(driver, address, namespace, baseline):
    keys, data = keys_of(9, 11), noise(9, 11 * 64)
    with connected(driver, address) as client:
        publish(client, namespace, keys[:3], data[: 3 * 64])
        publish(client, namespace, keys[8:10], data[8 * 64 : 10 * 64])
        probed = client.probe(namespaces=[namespace], keys=keys)
        assert probed.num_blocks == 3
        bits = np.unpackbits(np.frombuffer(probed.present_bitmap, np.uint8), bitorder="little")
        assert bits[:11].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]
        assert probed.node_epoch == client.node_epoch
        assert client.probe(namespaces=[namespace, namespace_of(1)], keys=keys).num_blocks == 0


def test_stat_sums_up(driver, node, address, namespace, baseline):
    with connected(driver, address) as client:
        publish(client, namespace, keys_of(10, 4), noise(10, 4096))
        stat = client.stat()
        assert stat.node_id == client.node_id == node.facts["id"]
        assert stat.node_epoch == client.node_epoch
        (pool,) = stat.pools
        used = pool.committed_nbytes + pool.reserved_nbytes + pool.quarantined_nbytes
        assert pool.capacity_nbytes == pool.free_nbytes + used == 64 << 20
        assert stat.counters["blocks_committed"] >= 4
        assert client.connected


@pytest.mark.parametrize("num_first", [1, 5])
def test_a_pull_waits_for_what_another_client_publishes(
    driver, address, namespace, baseline, num_first
):
    keys, data = keys_of(11, 8), noise(11, 8 * 1000)
    results = []

    def read():
        with connected(driver, address, client_name="reader") as reader:
            results.append(pull(reader, namespace, keys, 1000, wait_blocks=6, timeout_s=10.0))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        with connected(driver, address, client_name="writer") as writer:
            eventually(lambda: writer.stat().num_waiting_matches, 5.0)
            split = num_first * 1000
            publish(writer, namespace, keys[:num_first], data[:split])
            assert writer.stat().num_waiting_matches == 1
            publish(
                writer, namespace, keys[num_first:], data[split:], parent_key=keys[num_first - 1]
            )
    finally:
        thread.join()
    ((pulled, landed),) = results
    assert pulled.num_blocks >= 6
    assert pulled.wake_reason is WakeReason.SATISFIED
    assert (landed[:6000] == data[:6000]).all()


def test_a_pull_that_waited_in_vain_brings_what_is_there(driver, address, namespace, baseline):
    keys, data = keys_of(12, 4), noise(12, 4 * 100)
    with connected(driver, address) as client:
        publish(client, namespace, keys[:2], data[:200])
        pulled, _ = pull(client, namespace, keys, 100, wait_blocks=4, timeout_s=0.05)
        assert (pulled.num_blocks, pulled.wake_reason) == (2, WakeReason.TIMEOUT)
        assert pulled.seconds >= 0.05


async def test_many_pulls_at_once_on_one_connection(address, namespace, baseline):
    keys, data = keys_of(13, 64), noise(13, 64 * 10_000)
    address, by_way = way_of(address)
    async with await StoreClient.connect(address, client_name="many", **by_way) as client:
        await client.publish(
            namespace=namespace,
            keys=keys,
            block_nbytes=10_000,
            local=client.register(data),
            local_offsets=side_by_side(64, 10_000),
        )
        landing = np.zeros((60, 640_000), np.uint8)
        local = client.register(landing)

        async def one(index):
            first, count = (
                index % 7,
                1 + index,
            )  # from one block (copied inline) to 60 (in a worker)
            count = min(count, 64 - first)
            start = index * 640_000
            pulled = await client.pull(
                namespace=namespace,
                keys=keys[first : first + count],
                block_nbytes=10_000,
                local=local,
                local_offsets=range(start, start + count * 10_000, 10_000),
            )
            wanted = data[first * 10_000 : (first + count) * 10_000]
            assert pulled.num_blocks == count
            assert (landing[index, : count * 10_000] == wanted).all()

        await asyncio.gather(*(one(index) for index in range(60)))


def test_the_first_of_two_writers_wins_and_the_other_costs_no_room(
    driver, address, namespace, baseline
):
    keys, data = keys_of(14, 16), noise(14, 16 << 16)
    barrier = threading.Barrier(2)
    results = []

    def write(name):
        with connected(driver, address, client_name=name) as client:
            barrier.wait(5.0)
            results.append(publish(client, namespace, keys, data))

    with connected(driver, address) as observer:
        committed_nbytes = observer.stat().pools[0].committed_nbytes
        threads = [threading.Thread(target=write, args=(f"writer-{i}",)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert observer.stat().pools[0].committed_nbytes == committed_nbytes + data.nbytes
        pulled, landed = pull(observer, namespace, keys, 1 << 16)
    assert sum(result.num_blocks for result in results) == 16
    assert sum(result.num_blocks_existing for result in results) == 16
    assert pulled.num_blocks == 16
    assert (landed == data).all()


def test_blocks_for_one_reader_go_with_it(driver, address, namespace, baseline):
    keys, data = keys_of(15, 5), noise(15, 5 * 800)
    with connected(driver, address) as client:
        before = client.stat()
        publish(client, namespace, keys, data, one_reader=True)
        pulled, landed = pull(client, namespace, keys, 800)
        assert pulled.num_blocks == 5
        assert (landed == data).all()
        assert pull(client, namespace, keys, 800)[0].num_blocks == 0
        after = client.stat()
        assert after.num_blocks == before.num_blocks
        assert after.pools[0].free_nbytes == before.pools[0].free_nbytes


@pytest.mark.parametrize("width", [8, 30, 64])
def test_the_largest_column_passes(driver, address, namespace, baseline, width):
    keys, data = keys_of(16, 8192, width=width), noise(16, 8192 * 16)
    with connected(driver, address) as client:
        # Laid down backwards each block is a run of its own: the longest answer that there is.
        backwards = KeyColumn(packed=b"".join(reversed(list(keys))), width=width)
        published = publish(
            client, namespace, backwards, data.reshape(8192, 16)[::-1].reshape(-1).copy()
        )
        assert (published.num_blocks, published.num_blocks_existing) == (8192, 0)
        assert client.probe(namespaces=[namespace], keys=keys).num_blocks == 8192
        pulled, landed = pull(client, namespace, keys, 16)
        assert (pulled.num_blocks, pulled.num_extents) == (8192, 8192)
        assert (landed == data).all()


def test_memory_that_the_caller_got_wrong_is_refused_and_costs_nothing(
    driver, address, namespace, baseline
):
    keys, data = keys_of(17, 2), noise(17, 200)
    call = {"namespace": namespace, "keys": keys, "block_nbytes": 100}
    with connected(driver, address) as client:
        local = client.register(data)
        for offsets in ([0, 101], [-1, 100], range(1, 201, 100)):
            with pytest.raises(OutOfBounds):
                client.publish(**call, local=local, local_offsets=offsets)
        publish(client, namespace, keys, data)
        for offsets in ([0, 101], range(1, 201, 100)):
            with pytest.raises(OutOfBounds):
                client.pull(**call, local=local, local_offsets=offsets)
        frozen = data.copy()
        frozen.flags.writeable = False
        with pytest.raises(RegionReadOnly):
            client.pull(**call, local=client.register(frozen), local_offsets=[0, 100])
        local.close()
        with pytest.raises(TransportClosed):
            client.pull(**call, local=local, local_offsets=[0, 100])
        assert client.connected
        assert pull(client, namespace, keys, 100)[0].num_blocks == 2


def test_a_closed_client_says_so(driver, address, namespace, baseline):
    with connected(driver, address) as client:
        client.close()
        client.close()
        assert not client.connected
        with pytest.raises(ClientClosed):
            client.stat()


def test_closing_fails_the_call_that_waits(driver, address, namespace, node):
    errors = []
    opened = threading.Event()
    if driver == "asyncio":

        async def both():
            to, by_way = way_of(address)
            client = await StoreClient.connect(to, client_name="closing", **by_way)
            waiting = asyncio.create_task(
                client.pull(
                    namespace=namespace,
                    keys=keys_of(18, 1),
                    block_nbytes=10,
                    local=client.register(np.zeros(10, np.uint8)),
                    local_offsets=[0],
                    wait_blocks=1,
                    timeout_s=30.0,
                )
            )
            async with asyncio.timeout(5.0):
                while not (await client.stat()).num_waiting_matches:
                    pass
            await client.close()
            with pytest.raises(NodeUnavailable):
                await waiting

        asyncio.run(both())
        return

    clients = []

    def wait():
        with connected(driver, address, client_name="closing") as client:
            clients.append(client)
            opened.set()
            try:
                pull(client, namespace, keys_of(18, 1), 10, wait_blocks=1, timeout_s=30.0)
            except NodeUnavailable as error:
                errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert opened.wait(5.0)
    eventually(lambda: node.stat().num_waiting_matches, 5.0)
    clients[0].close()
    thread.join(5.0)
    assert len(errors) == 1
    eventually(lambda: not node.stat().num_waiting_matches, 2.0)


def greeted_descriptors(door, access):
    """What a session of `access` is passed, as a client that does not use our transport gets it."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5.0)
        client.connect(door.removeprefix("unix:"))
        conversation = Conversation()
        client.sendall(conversation.hello("curious", access))
        descriptors = []
        while conversation.greeting is None:
            data, received, _, _ = socket.recv_fds(client, 65536, 8)
            descriptors += received
            conversation.greeted(data)
        return descriptors, conversation.greeting


def test_a_reader_cannot_write_into_the_pool(node):
    (descriptor, board), greeting = greeted_descriptors(node.door, Access.READ)
    os.close(board)  # that one is the session's own, and writable
    try:
        nbytes = greeting.pools[0].nbytes
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ) as mapped:
            assert len(mapped) == nbytes
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(OSError, match=r"Operation not permitted|Invalid argument"):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def test_a_session_for_reading_reads_and_does_not_reserve(driver, node, namespace):
    keys, data = keys_of(19, 2), noise(19, 200)
    with (
        connected(driver, node.door) as writer,
        connected(driver, node.door, access=Access.READ) as reader,
    ):
        publish(writer, namespace, keys, data)
        assert (pull(reader, namespace, keys, 100)[1] == data).all()
        with pytest.raises(BadRequest, match="opened for reading"):
            publish(reader, namespace, keys_of(20, 2), data)


async def test_another_users_process_is_not_let_in(monkeypatch, tmp_path):
    monkeypatch.setattr(door_module, "_who_is", lambda peer: (4711, os.geteuid() + 12345))
    async with running(serve_node, NodeSettings, dram_nbytes=1 << 20, door=f"{tmp_path}/d") as role:
        with pytest.raises(NodeUnavailable, match="see the node's log"):
            await StoreClient.connect(role.facts["door"], client_name="stranger")


def test_a_column_of_no_keys_asks_for_nothing(driver, address, namespace, baseline):
    none = KeyColumn(packed=b"")
    with connected(driver, address) as client:
        assert client.probe(namespaces=[namespace], keys=none).num_blocks == 0
        with pytest.raises(BadRequest):
            client.publish(
                namespace=namespace,
                keys=none,
                block_nbytes=10,
                local=client.register(np.zeros(10, np.uint8)),
                local_offsets=[],
            )


def test_a_client_that_never_pauses_leaves_the_others_their_turn(node):
    """The door looks a little longer for a client that asks back to back, and no longer than a little."""
    stop = threading.Event()
    counts = []

    def hammer():
        with connected("blocking", node.door) as client:
            num_calls = 0
            while not stop.is_set():
                client.stat()
                num_calls += 1
            counts.append(num_calls)

    hammering = threading.Thread(target=hammer)
    hammering.start()
    try:
        with connected("blocking", node.door) as other, connected("blocking", node.address) as far:
            for _ in range(50):
                other.stat()  # each within its second, or DeadlineExceeded
                far.stat()
    finally:
        stop.set()
        hammering.join()
    assert counts[0] > 50
