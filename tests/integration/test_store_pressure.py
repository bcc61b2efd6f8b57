"""A full pool, by both clients and both doors: nobody is refused who waits, and caps count client by client."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.errors import LeaseShareExceeded, LimitExceeded
from snowskin.kvstore.messages import Lease, MatchRequest, ReleaseRequest, RenewRequest
from snowskin.kvstore.node.daemon import NodeSettings, make_shell
from snowskin.kvstore.node.peers import PeerSessions
from snowskin.kvstore.rpc import CLIENT_HEADER
from snowskin.v1 import store_pb2, store_pb2_grpc
from tests.support.node_process import NodeProcess
from tests.support.store_drivers import DRIVERS, WAYS, connected, keys_of, namespace_of, noise
from tests.support.waiting import eventually

MIB = 1 << 20
POOL_NBYTES = 64 * MIB
BLOCK_NBYTES = 64 << 10
NUM_PUBLISHES = 200
NAMESPACE = namespace_of(4711)
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def node():
    settings = {"dram_nbytes": POOL_NBYTES, "max_extent_nbytes": 4 * MIB, "log_level": "error"}
    with NodeProcess(settings) as process:
        yield process


@pytest.fixture(autouse=True)
def settled(node):
    yield
    stat = eventually(lambda: (s := node.stat()).num_read_leases == 0 and s, 5.0)
    (pool,) = stat.pools
    assert (stat.num_write_leases, stat.num_waiting_reserves) == (0, 0)
    assert (pool.leased_nbytes, pool.reserved_nbytes, pool.quarantined_nbytes) == (0, 0, 0)
    assert stat.num_sessions == 2  # who asks, and the one of gRPC


def arguments(number: int, num_blocks: int = MIB // BLOCK_NBYTES) -> dict:
    """Blocks that no other number has."""
    return {
        "namespace": NAMESPACE,
        "keys": keys_of(number, num_blocks),
        "block_nbytes": BLOCK_NBYTES,
        "local_offsets": range(0, num_blocks * BLOCK_NBYTES, BLOCK_NBYTES),
    }


def data_of(number: int, num_blocks: int = MIB // BLOCK_NBYTES) -> np.ndarray:
    return noise(number, num_blocks * BLOCK_NBYTES)


# --- the queue


async def publish_all(address: str, name: str, numbers: range) -> list[int]:
    """All at once, through one client; how many blocks each brought."""
    async with await StoreClient.connect(address, client_name=name) as client:
        calls = [
            client.publish(
                **arguments(number), local=client.register(data_of(number)), timeout_s=PATIENCE_S
            )
            for number in numbers
        ]
        return [published.num_blocks for published in await asyncio.gather(*calls)]


@pytest.mark.parametrize("num_clients", [1, 4])
async def test_of_200_mebibytes_at_once_into_64_none_is_refused(node, num_clients):
    before = node.stat().counters
    share, base = NUM_PUBLISHES // num_clients, 10_000 * num_clients
    batches = await asyncio.gather(
        *(
            publish_all(node.door, f"c{start}", range(start, start + share))
            for start in range(base, base + NUM_PUBLISHES, share)
        )
    )
    assert [num for batch in batches for num in batch] == [16] * NUM_PUBLISHES
    after = node.stat().counters
    assert after.get("reserves_refused", 0) == before.get("reserves_refused", 0)
    assert after["blocks_evicted"] - before.get("blocks_evicted", 0) >= 16 * (NUM_PUBLISHES - 64)


@pytest.mark.parametrize("num_clients", [1, 4])
def test_of_200_mebibytes_one_after_the_other_none_is_refused(node, num_clients):
    share, base = NUM_PUBLISHES // num_clients, 20_000 * num_clients + 1000
    brought: list[int] = []

    def publish(start: int) -> None:
        with connected("blocking", node.door, client_name=f"b{start}") as client:
            for number in range(start, start + share):
                local = client.register(data_of(number))
                published = client.publish(**arguments(number), local=local, timeout_s=PATIENCE_S)
                brought.append(published.num_blocks)

    starts = range(base, base + NUM_PUBLISHES, share)
    threads = [threading.Thread(target=publish, args=(start,)) for start in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert brought == [16] * NUM_PUBLISHES


# --- the caps


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_lone_client_pulls_more_than_its_share_whole(node, driver, way):
    num_blocks = 40 * MIB // BLOCK_NBYTES  # a client may lease 16 MiB of this pool
    data = data_of(7, num_blocks)
    before = node.stat().counters.get("matches_cut", 0)
    with connected(driver, node.facts[way], client_name="lone") as client:
        landing = np.zeros_like(data)
        with connected("blocking", node.door, client_name="writer") as writer:
            writer.publish(**arguments(7, num_blocks), local=writer.register(data))
        pulled = client.pull(**arguments(7, num_blocks), local=client.register(landing))
        assert (pulled.num_blocks, pulled.num_blocks_withheld) == (num_blocks, 0)
        assert np.array_equal(landing, data)
        assert node.stat().counters["matches_cut"] == before + 2


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_a_reader_has_left_on_its_board_is_no_lease_any_more(node, driver):
    share = 16 * MIB // BLOCK_NBYTES
    numbers = [40 + 3 * DRIVERS.index(driver) + index for index in range(3)]
    with connected(driver, node.door, client_name="reader") as client:
        for number in numbers:
            client.publish(
                **arguments(number, share), local=client.register(data_of(number, share))
            )
        before = node.stat().counters.get("matches_cut", 0)
        landing = client.register(np.zeros(16 * MIB, np.uint8))
        for number in numbers:
            assert client.pull(**arguments(number, share), local=landing).num_blocks == share
        assert node.stat().counters.get("matches_cut", 0) == before


def hold(client, number: int, num_blocks: int) -> Lease:
    """Leases blocks and keeps them; the lease."""
    match = MatchRequest(namespaces=(NAMESPACE,), keys=keys_of(number, num_blocks))
    call = client._connection.call
    lease: Lease = call(match, timeout_s=5.0, lease=None, request_id="").lease
    return lease


def release(client, lease) -> None:
    request = ReleaseRequest(lease_ids=(lease.id,))
    client._connection.call(request, timeout_s=5.0, lease=lease, request_id="")


def test_callers_by_grpc_are_clients_of_their_own(node):
    share = 16 * MIB // BLOCK_NBYTES
    for number in (21, 22, 23):
        with connected("blocking", node.door) as writer:
            writer.publish(
                **arguments(number, share), local=writer.register(data_of(number, share))
            )
    with (
        connected("blocking", node.address, client_name="first") as first,
        connected("blocking", node.address, client_name="second") as second,
    ):
        leases = [hold(first, 21, share), hold(second, 22, share)]
        assert node.stat().num_sessions == 4
        with pytest.raises(LeaseShareExceeded) as caught:
            hold(first, 23, 1)
        assert f"first {16 * MIB} bytes" in str(caught.value)
        assert f"second {16 * MIB} bytes" in str(caught.value)
        assert caught.value.retry_after_s
        release(first, leases[0])
        release(first, hold(first, 23, 1))
        release(second, leases[1])


def test_a_lease_belongs_to_who_proves_it_whatever_it_calls_itself(node):
    """A connection that came anew, or a caller that names itself in some calls only."""
    share = 4
    with connected("blocking", node.door) as writer:
        writer.publish(**arguments(31, share), local=writer.register(data_of(31, share)))
    with (
        connected("blocking", node.address, client_name="before") as before,
        connected("blocking", node.address, client_name="after") as after,
        grpc.insecure_channel(node.address) as channel,
    ):
        mine, other = hold(before, 31, share), hold(after, 31, share)
        stub = store_pb2_grpc.StoreStub(channel)
        refs = [{"id": lease.id, "capability": lease.capability} for lease in (mine, other)]
        renewed = stub.Renew(store_pb2.RenewRequest(leases=[refs[1], refs[0], refs[1]], ttl_ms=500))
        assert all(0 < ttl_ms <= 10_000 for ttl_ms in renewed.ttl_ms)
        assert len(renewed.ttl_ms) == 3
        released = stub.Release(store_pb2.ReleaseRequest(leases=refs))
        assert released.num_unknown == 0
        assert stub.Release(store_pb2.ReleaseRequest(leases=refs)).num_unknown == 2
        renew = RenewRequest(lease_ids=(mine.id,), ttl_s=1.0)
        reply = before._connection.call(renew, timeout_s=5.0, lease=mine, request_id="")
        assert reply.ttl_s == (0.0,)


# --- how many there may be


def calling(address: str, name: str = "") -> Any:
    """What a servicer's context says of who calls."""
    metadata = ((CLIENT_HEADER, name),) if name else ()
    return SimpleNamespace(peer=lambda: address, invocation_metadata=lambda: metadata)


@pytest.fixture
async def shell():
    shell = make_shell(NodeSettings(dram_nbytes=1 << 20))
    yield shell
    shell.close()


async def test_a_name_is_one_client_of_its_host_and_a_nameless_one_is_its_connection(shell):
    peers = PeerSessions(shell, lambda call_id, reply: None)
    first = peers.caller(calling("ipv4:10.0.0.1:4000", "a"))
    assert peers.caller(calling("ipv4:10.0.0.1:4001", "a")) == first
    others = [("ipv4:10.0.0.2:4000", "a"), ("ipv4:10.0.0.1:4000", "b"), ("ipv4:10.0.0.1:4000", "")]
    sessions = {peers.caller(calling(*other)) for other in (*others, ("ipv4:10.0.0.1:4001", ""))}
    assert len(sessions | {first, peers.common}) == 6
    names = {session.client_name for session in shell.state.sessions}
    assert names == {"grpc", "a", "b", "ipv4:10.0.0.1:4000", "ipv4:10.0.0.1:4001"}
    peers.done()
    assert (len(peers), len(shell.state.sessions)) == (0, 1)
    peers.close()
    assert len(shell.state.sessions) == 0


async def test_clients_that_hold_nothing_make_room_and_beyond_the_bound_newcomers_are_refused(
    shell,
):
    peers = PeerSessions(shell, lambda call_id, reply: None, max_peers=2)
    holder = peers.caller(calling("ipv4:1.1.1.1:1", "holder"))
    match = MatchRequest(
        namespaces=(NAMESPACE,), keys=keys_of(1, 1), wait_blocks=1, timeout_s=PATIENCE_S
    )
    shell.request(holder, 1, match)
    peers.caller(calling("ipv4:1.1.1.1:1", "idle"))
    second = peers.caller(calling("ipv4:1.1.1.1:1", "second"))
    shell.request(second, 2, match)
    with pytest.raises(LimitExceeded, match="2 clients") as caught:
        peers.caller(calling("ipv4:1.1.1.1:1", "third"))
    assert caught.value.retry_after_s
    shell.cancel(holder, 1)
    assert peers.caller(calling("ipv4:1.1.1.1:1", "third")) not in (holder, second)
    peers.close()


async def test_a_session_whose_last_lease_ran_out_ends_by_itself(shell, monkeypatch):
    monkeypatch.setattr("snowskin.kvstore.node.peers.LOOK_S", 0.01)
    peers = PeerSessions(shell, lambda call_id, reply: None)
    peers.caller(calling("ipv4:1.1.1.1:1", "a"))
    ended = asyncio.Event()
    monkeypatch.setattr(shell, "end_session", lambda session: ended.set())
    async with asyncio.timeout(5):
        await ended.wait()
    assert len(peers) == 0
    monkeypatch.undo()
    peers.close()
