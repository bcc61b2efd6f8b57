"""What an operator sees of a node, and what becomes of what is taken away."""

from __future__ import annotations

import pytest

from snowskin.kvstore.admin_messages import LeaseKind, LeaseState
from snowskin.kvstore.errors import LeaseExpired, LeaseUnknown
from snowskin.kvstore.messages import CommitRequest, Committed, Matched, Reserved, WakeReason
from snowskin.kvstore.node import inspection
from tests.support.node_driver import (
    BLOCK,
    NAMESPACE,
    OTHER_NAMESPACE,
    NodeDriver,
    key,
    lease_of,
    matching,
    reserving,
)

TENANT = "default"
GRACE_S = 2.0


@pytest.fixture
def node():
    return NodeDriver(
        blocks=16, read_lease_s=4.0, write_lease_s=6.0, grace_s=GRACE_S, max_leased_ratio=1.0,
        max_client_leased_ratio=1.0,
    )  # fmt: skip


def listed(node, *, namespace=b"", key_prefix=b"", leased_only=False, behind=None, limit=100):
    listing = node.state.inspection.list_blocks(
        TENANT,
        namespace=namespace,
        key_prefix=key_prefix,
        leased_only=leased_only,
        behind=behind,
        limit=limit,
    )
    while listing.step():
        node.check()
    return listing.found


def info(node, name, namespace=NAMESPACE):
    (found,) = node.state.inspection.describe(TENANT, [(namespace, key(name))], node.now_s)
    return found


def leases(node, **filters):
    wished = {"kind": None, "client": "", "behind": 0, "limit": 100, **filters}
    return node.state.inspection.list_leases(now_s=node.now_s, **wished)


def evict(node, names, *, namespaces=(NAMESPACE,), dry_run=False):
    keys = [key(name) for name in names.split()]
    evicted, effects = node.state.evict(namespaces, keys, node.now_s, dry_run=dry_run)
    node.take(effects)
    return evicted


def revoke(node, lease_id):
    revoked, effects = node.state.revoke_lease(lease_id, node.now_s)
    node.take(effects)
    return revoked


# --- blocks


@pytest.mark.parametrize("piece", [1, 2, 1000])
@pytest.mark.parametrize("limit", [1, 3, 100])
def test_pages_tell_every_block_once_in_order(node, monkeypatch, piece, limit):
    monkeypatch.setattr(inspection, "PIECE_KEYS", piece)
    writer = node.session()
    node.publish(writer, "d b a c e")
    node.publish(writer, "b z", namespace=OTHER_NAMESPACE)
    node.publish_tail(writer, "r")
    pages, behind = [], None
    while page := listed(node, behind=behind, limit=limit):
        assert len(page) <= limit
        pages += page
        behind = page[-1]
    wanted = [(OTHER_NAMESPACE, key(n)) for n in "bz"] + [(NAMESPACE, key(n)) for n in "abcde"]
    assert pages == wanted


def test_filters_narrow_a_listing(node):
    writer = node.session()
    node.publish(writer, "aa ab b")
    node.publish(writer, "aa", namespace=OTHER_NAMESPACE)
    assert listed(node, namespace=OTHER_NAMESPACE) == [(OTHER_NAMESPACE, key("aa"))]
    assert [k for _, k in listed(node, namespace=NAMESPACE, key_prefix=b"a")] == [
        key("aa"),
        key("ab"),
    ]
    assert listed(node, leased_only=True) == []
    node.match(writer, "b")
    assert (NAMESPACE, key("b")) in listed(node, leased_only=True)
    assert (OTHER_NAMESPACE, key("aa")) not in listed(node, leased_only=True)


def test_blocks_that_come_or_go_between_two_pages_are_never_told_twice(node):
    writer = node.session()
    node.publish(writer, "b d f")
    first = listed(node, limit=2)
    node.publish(writer, "a c e", parent="f")
    evict(node, "d")
    rest = listed(node, behind=first[-1])
    assert [k for _, k in rest] == [key("e"), key("f")]


def test_a_block_is_told_with_its_place_its_family_and_its_ages(node):
    writer = node.session()
    reserved = node.publish(writer, "a b")
    node.publish(writer, "c", parent="b")
    node.publish(writer, "d", parent="b")
    node.wait(3.0)
    found = info(node, "b")
    assert found.extent.offset == reserved.runs[0].extent.offset + BLOCK
    assert found.extent.nbytes == BLOCK
    assert (found.parent_key, found.num_children) == (key("a"), 2)
    assert (info(node, "a").parent_key, info(node, "a").num_children) == (b"", 1)
    assert (found.age_s, found.idle_s, found.num_read_leases) == (3.0, 3.0, 0)
    node.match(writer, "a b")
    node.match(node.session("other"), "a")
    node.wait(1.0)
    assert (info(node, "b").age_s, info(node, "b").idle_s) == (4.0, 1.0)
    assert info(node, "b").num_read_leases == 2, "both hold the segment"
    assert not info(node, "a").one_reader
    node.publish(writer, "x", one_reader=True)
    assert info(node, "x").one_reader


def test_looking_is_no_use(node):
    writer = node.session()
    node.publish(writer, "b")
    node.publish(writer, "a")
    before = node.state.stat()
    node.state.inspection.describe(TENANT, listed(node), node.now_s)
    node.state.inspection.show_block(TENANT, b"", key("b"), node.now_s)
    leases(node)
    assert node.state.stat() == before
    node.publish(writer, " ".join(f"c{i}" for i in range(15)))
    assert node.probe(writer, "a b") == "x.", "the older one went, though it was looked at"


def test_a_block_is_shown_in_every_shard_with_who_reads_it(node):
    writer, reader = node.session(), node.session("reader")
    node.publish(writer, "a b")
    node.publish(writer, "b", namespace=OTHER_NAMESPACE)
    lease_id = lease_of(node.match(reader, "a b"))
    show = node.state.inspection.show_block
    shown = show(TENANT, b"", key("b"), node.now_s)
    assert [one.block.namespace for one in shown] == [OTHER_NAMESPACE, NAMESPACE]
    assert [[lease.id for lease in one.leases] for one in shown] == [[], [lease_id]]
    assert shown[1].leases[0].client == "reader"
    assert shown[1].checksum == b"b---"
    assert len(show(TENANT, NAMESPACE, key("b"), node.now_s)) == 1
    assert show(TENANT, b"", key("nowhere"), node.now_s) == ()


# --- leases


def test_leases_are_told_by_id_with_their_holder_and_state(node):
    writer, reader = node.session("w"), node.session("r")
    node.publish(writer, "a b")
    node.reserve(writer, "c d e", parent="b")
    node.match(reader, "a b")
    write, read = leases(node)
    assert (write.kind, write.client, write.num_blocks, write.nbytes) == (
        LeaseKind.WRITE, "w", 3, 3 * BLOCK,
    )  # fmt: skip
    assert (read.kind, read.client, read.num_blocks, read.nbytes) == (
        LeaseKind.READ, "r", 2, 2 * BLOCK,
    )  # fmt: skip
    assert (read.state, read.age_s, read.seconds_left) == (LeaseState.ACTIVE, 0.0, 4.0)
    node.wait(5.0)
    write, read = leases(node)
    assert (write.state, write.seconds_left) == (LeaseState.ACTIVE, 1.0)
    assert (read.state, read.seconds_left) == (LeaseState.GRACE, 1.0)
    node.wait(4.0)
    (write,) = leases(node)
    assert (write.state, write.seconds_left) == (LeaseState.QUARANTINED, 0.0)


def test_pages_and_filters_of_leases(node):
    writer, reader = node.session("w"), node.session("r")
    node.publish(writer, "a")
    for _ in range(3):
        node.match(reader, "a")
    node.reserve(writer, "b")
    assert [lease.client for lease in leases(node)] == ["r", "r", "r", "w"]
    first = leases(node, limit=2)
    rest = leases(node, behind=first[-1].id)
    assert [*first, *rest] == list(leases(node))
    assert len(leases(node, kind=LeaseKind.WRITE)) == 1
    assert len(leases(node, kind=LeaseKind.READ)) == 3
    assert len(leases(node, client="w")) == 1
    assert leases(node, client="nobody") == ()


# --- revoke


def test_a_revoked_reader_keeps_its_grace_and_no_more(node):
    reader = node.session("r")
    node.publish(node.session(), "a b")
    lease_id = lease_of(node.match(reader, "a b"))
    revoked = revoke(node, lease_id)
    assert (revoked.state, revoked.seconds_left) == (LeaseState.GRACE, GRACE_S)
    assert node.renew(reader, lease_id) == (0.0,)
    node.wait(GRACE_S - 0.1)
    assert evict(node, "a").num_held == 1, "its bytes are there while it may still read"
    assert revoke(node, lease_id).seconds_left == pytest.approx(0.1), "once is enough"
    assert node.state.stat().counters["leases_revoked"] == 1
    node.wait(0.1)
    assert leases(node) == ()
    assert evict(node, "a b").num_blocks == 2
    assert node.release(reader, lease_id) == 1


def test_a_revoked_reader_without_memory_holds_nothing_any_more(node):
    reader = node.session("grpc", maps=False)
    node.publish(node.session(), "a b")
    revoke(node, lease_of(node.match(reader, "a b")))
    assert leases(node) == ()
    assert evict(node, "a b").num_blocks == 2


def test_a_revoked_writer_that_maps_memory_is_fenced_at_once(node):
    writer, reader = node.session("w"), node.session("r")
    reserved = node.reserve(writer, "a b")
    waiting = node.call(reader, matching("a", wait_blocks=1, timeout_s=100.0))
    revoked = revoke(node, lease_of(reserved))
    assert revoked.state is LeaseState.QUARANTINED
    assert node.books() == {"free": 14.0, "quarantined": 2.0}
    answer = node.answer(reader, waiting)
    assert isinstance(answer, Matched)
    assert answer.wake_reason is WakeReason.WRITER_GONE
    with pytest.raises(LeaseExpired):
        node.commit(writer, lease_of(reserved), "a")
    node.wait(100.0)  # what would have fenced it comes by, and finds it done
    assert node.books() == {"free": 14.0, "quarantined": 2.0}
    assert node.abort(writer, lease_of(reserved)).freed_nbytes == 2 * BLOCK
    assert node.books() == {"free": 16.0}


def test_a_revoked_writer_without_memory_gives_its_room_back_at_once(node):
    writer = node.session("grpc", maps=False)
    reserved = node.reserve(writer, "a b")
    assert revoke(node, lease_of(reserved)).state is LeaseState.GRACE
    assert node.books() == {"free": 16.0}
    with pytest.raises(LeaseUnknown):
        node.ask(
            writer,
            CommitRequest(lease_id=lease_of(reserved), num_blocks=1, checksums=b"a---"),
            Committed,
        )


def test_a_lease_that_is_not_there_cannot_be_revoked(node):
    with pytest.raises(LeaseUnknown, match="no lease 99"):
        node.state.revoke_lease(99, node.now_s)


# --- evict


def test_only_what_nobody_holds_is_evicted(node):
    writer, reader = node.session("w"), node.session("r")
    node.publish(writer, "a b")
    node.publish(writer, "c", parent="b")
    node.publish(writer, "p")
    node.publish(writer, "x", one_reader=True)
    node.match(reader, "a")
    node.reserve(writer, "q", parent="p")
    evicted = evict(node, "a b c p x nowhere")
    assert (evicted.num_blocks, evicted.nbytes) == (1, BLOCK)
    assert evicted.num_held == 4, "read, placed with what is read, built on, kept for one reader"
    assert evicted.num_unknown == 1
    assert node.probe(writer, "a b c p x") == "xx.xx"


def test_a_dry_run_counts_the_same_and_touches_nothing(node):
    writer = node.session()
    node.publish(writer, "a b c")
    before = node.state.stat()
    dry = evict(node, "a c nowhere", dry_run=True)
    assert node.state.stat() == before
    assert evict(node, "a c nowhere") == dry
    assert node.probe(writer, "a b c") == ".x."


def test_a_key_goes_from_every_shard_that_is_named(node):
    writer = node.session()
    node.publish(writer, "a")
    node.publish(writer, "a", namespace=OTHER_NAMESPACE)
    both = (NAMESPACE, OTHER_NAMESPACE)
    assert evict(node, "a", namespaces=(OTHER_NAMESPACE,)).num_blocks == 1
    evicted = evict(node, "a", namespaces=both)
    assert (evicted.num_blocks, evicted.num_unknown) == (1, 0)
    assert evict(node, "a", namespaces=both).num_unknown == 1


def test_room_that_a_revoked_lease_held_goes_to_who_queues_for_it(node):
    writer, other = node.session("w"), node.session("other")
    node.publish(writer, " ".join(f"a{i}" for i in range(16)))
    lease_id = lease_of(node.match(writer, "a0"))
    waiting = node.call(other, reserving("b", timeout_s=3.0))
    revoke(node, lease_id)
    assert node.answer(other, waiting) is None
    node.wait(GRACE_S)
    assert isinstance(node.answer(other, waiting), Reserved)


def test_evicted_blocks_can_be_published_again(node):
    writer = node.session()
    node.publish(writer, "a b")
    evict(node, "a")
    assert node.match(writer, "a b").num_blocks == 0
    node.publish(writer, "a")
    assert node.match(writer, "a b").num_blocks == 2
