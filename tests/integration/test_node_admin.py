"""NodeAdmin over a real gRPC server: pages that cannot be forged, requests that are refused, a log of who took away."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.errors import BadRequest, LeaseUnknown, LimitExceeded, NamespaceMismatch
from snowskin.kvstore.messages import Matched, MatchRequest
from snowskin.kvstore.node import admin
from snowskin.kvstore.rpc import CLIENT_HEADER, open_channel, translating
from snowskin.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from tests.support.served_node import BLOCK, NAMESPACE, key_of, served_node

if TYPE_CHECKING:
    from snowskin.transport.errors import SnowskinError


@pytest.fixture
async def node():
    async with served_node() as served:
        served.publish(range(10))
        yield served


@pytest.fixture
def ask(node):
    """Calls a method of the node's NodeAdmin; raises what it raised."""

    async def call(method, **fields):
        request = getattr(admin_pb2, f"{method}Request")(**fields)
        channel = open_channel(node.address)
        try:
            with translating("node"):
                return await getattr(admin_pb2_grpc.NodeAdminStub(channel), method)(
                    request, metadata=((CLIENT_HEADER, "kvctl anna@here"),)
                )
        finally:
            await channel.close(None)

    return call


def lease(node, first, last):
    keys = KeyColumn.of([key_of(number) for number in range(first, last)])
    matched = node.request(MatchRequest(namespaces=(NAMESPACE,), keys=keys))
    assert isinstance(matched, Matched)
    assert matched.lease is not None
    return matched.lease.id


async def test_pages_of_blocks_and_of_leases_go_on_where_the_last_one_ended(node, ask):
    pages, token = [], b""
    while True:
        page = await ask("ListBlocks", page_size=4, page_token=token)
        pages.append([block.key for block in page.blocks])
        token = page.next_page_token
        if not token:
            break
    assert pages == [[key_of(n) for n in range(i, min(i + 4, 10))] for i in (0, 4, 8)]
    whole = await ask("ListBlocks", page_size=10)
    assert (len(whole.blocks), whole.next_page_token) == (10, b"")

    ids = [lease(node, i, i + 1) for i in range(5)]
    first = await ask("ListLeases", page_size=3)
    rest = await ask("ListLeases", page_size=3, page_token=first.next_page_token)
    assert [one.id for one in (*first.leases, *rest.leases)] == ids
    assert rest.next_page_token == b""


async def test_a_token_that_the_node_did_not_give_for_these_filters_is_refused(node, ask):
    for number in range(3):
        lease(node, number, number + 1)
    token = (await ask("ListBlocks", page_size=2)).next_page_token
    of_leases = (await ask("ListLeases", page_size=2)).next_page_token
    forged = [
        b"x",
        token[:-1],
        token + b"x",
        bytes([token[0] ^ 1]) + token[1:],
        token[:-1] + bytes([token[-1] ^ 1]),
        of_leases,
        bytes(100_000),
    ]
    for one in forged:
        with pytest.raises(BadRequest, match="not of this node and these filters"):
            await ask("ListBlocks", page_token=one)
    for filters in ({"namespace": NAMESPACE}, {"key_prefix": b"\0"}, {"leased_only": True}):
        with pytest.raises(BadRequest, match="these filters"):
            await ask("ListBlocks", page_token=token, **filters)
    for one in (token, of_leases[:-1], b"x"):
        with pytest.raises(BadRequest, match="these filters"):
            await ask("ListLeases", page_token=one)
    with pytest.raises(BadRequest, match="these filters"):
        await ask("ListLeases", page_token=of_leases, client="writer")
    async with served_node() as other:
        channel = open_channel(other.address)
        with pytest.raises(BadRequest), translating("other"):
            await admin_pb2_grpc.NodeAdminStub(channel).ListBlocks(
                admin_pb2.ListBlocksRequest(page_token=token)
            )
        await channel.close(None)
    assert len((await ask("ListBlocks", page_token=token)).blocks) == 8


SENSELESS: list[tuple[str, dict[str, Any], type[SnowskinError]]] = [
    ("ListBlocks", {"namespace": b"short"}, NamespaceMismatch),
    ("ListBlocks", {"key_prefix": bytes(65)}, BadRequest),
    ("ListBlocks", {"page_size": 1001}, LimitExceeded),
    ("ListLeases", {"page_size": 1001}, LimitExceeded),
    ("ListLeases", {"kind": 9}, BadRequest),
    ("ShowBlock", {"key": b""}, BadRequest),
    ("ShowBlock", {"key": b"short"}, BadRequest),
    ("ShowBlock", {"key": key_of(1), "namespace": b"short"}, NamespaceMismatch),
    ("RevokeLease", {"lease_id": 77}, LeaseUnknown),
    ("RevokeLease", {"lease_id": 2**64 - 1}, LeaseUnknown),
    ("Evict", {}, BadRequest),
    ("Evict", {"namespace": b"short", "all": True}, NamespaceMismatch),
    ("Evict", {"keys": {"packed": bytes(33), "width": 32}}, BadRequest),
    ("Evict", {"keys": {"packed": bytes(32), "width": 32}, "all": True}, BadRequest),
    ("Evict", {"keys": {"packed": bytes(32 * 8193), "width": 32}}, LimitExceeded),
]


async def test_a_request_that_makes_no_sense_is_refused_and_changes_nothing(node, ask):
    before = node.shell.stat()
    for method, fields, error in SENSELESS:
        with pytest.raises(error) as refused:
            await ask(method, **fields)
        assert refused.value.hint, (method, fields)
    assert node.shell.stat() == before


async def test_taking_away_is_logged_with_who_asked(node, ask, caplog):
    lease_id = lease(node, 0, 1)
    with caplog.at_level(logging.WARNING):
        revoked = (await ask("RevokeLease", lease_id=lease_id)).lease
        assert revoked.state == admin_pb2.LEASE_STATE_GRACE
        keys = common_pb2.KeyColumn(packed=key_of(3) + key_of(99), width=32)
        gone = await ask("Evict", keys=keys)
        await ask("Evict", all=True, dry_run=True)
        await ask("Drain")
    # Its reader, of another host, is served nothing any more, so nothing is held for it.
    assert (gone.num_blocks, gone.num_held, gone.num_unknown) == (1, 0, 1)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3, "a dry run takes nothing away"
    assert all("kvctl anna@here" in line and "127.0.0.1" in line for line in lines)
    assert all(
        word in line
        for word, line in zip(("revoked", key_of(3).hex(), "drains"), lines, strict=True)
    )


async def test_a_drain_is_told_to_whoever_asks_for_the_node_s_health(node, ask):
    told = asyncio.Event()

    async def tell():
        told.set()

    node.admin.on_drain = tell
    lease(node, 0, 1)
    answer = await ask("Drain")
    assert (answer.num_read_leases, answer.num_write_leases) == (1, 0)
    assert told.is_set()
    assert node.shell.state.draining


class NobodysContext:
    """A call without a network."""

    def peer(self):
        return "nobody"

    def invocation_metadata(self):
        return ()


async def turns_during(call):
    """How often somebody else had its turn, and the answer."""
    turns = 0

    async def neighbour():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(neighbour())
    answer = await call
    task.cancel()
    await asyncio.wait([task])
    return turns, answer


async def test_large_lists_and_evictions_let_others_in_between(node):
    node.publish(range(100, 8292))  # 2 pieces of a listing, 16 of an eviction
    asked = admin_pb2.ListBlocksRequest(namespace=NAMESPACE)
    turns, page = await turns_during(node.admin.ListBlocks(asked, NobodysContext()))
    assert (turns >= 3, len(page.blocks)) == (True, 100)
    everything = admin_pb2.EvictRequest(all=True)
    turns, evicted = await turns_during(node.admin.Evict(everything, NobodysContext()))
    assert (turns >= 17, evicted.num_blocks, evicted.nbytes) == (True, 8202, 8202 * BLOCK)
    assert not node.keys


async def test_keys_that_may_be_in_many_shards_are_evicted_in_smaller_pieces(node, monkeypatch):
    namespaces = [bytes([number]) * 32 for number in range(64)]
    monkeypatch.setattr(admin, "shards", lambda _index, _tenant: [NAMESPACE, *namespaces])
    evict, num_looked_at = node.shell.evict, []

    def watched(namespaces, keys, *, dry_run):
        num_looked_at.append(len(namespaces) * len(keys))
        return evict(namespaces, keys, dry_run=dry_run)

    monkeypatch.setattr(node.shell, "evict", watched)
    keys = KeyColumn.of([key_of(number) for number in range(600)])
    column = common_pb2.KeyColumn(packed=keys.packed, width=keys.width)
    evicted = await node.admin.Evict(admin_pb2.EvictRequest(keys=column), NobodysContext())
    assert (evicted.num_blocks, evicted.num_unknown) == (10, 590)
    assert max(num_looked_at) <= admin.EVICT_PIECE
