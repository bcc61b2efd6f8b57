"""The writers' side of a node: room, commits in order, fencing, and the queue before a full pool."""

from __future__ import annotations

import pytest

from snowskin.kvstore.errors import (
    BadRequest,
    CommitRefused,
    LeaseExpired,
    LeaseUnknown,
    LimitExceeded,
    NamespaceMismatch,
    PoolExhausted,
)
from snowskin.kvstore.messages import Committed, Reserved
from tests.support.node_driver import (
    BLOCK,
    NAMESPACE,
    OTHER_NAMESPACE,
    NodeDriver,
    lease_of,
    matching,
    ranges,
    reserving,
    reserving_tail,
)

# --- reservations and commits


def test_reserved_blocks_are_not_visible():
    node = NodeDriver()
    writer = node.session()
    node.reserve(writer, "a b")
    assert node.probe(writer, "a b") == ".."
    assert node.books() == {"free": 6, "reserved": 2}


def test_blocks_become_visible_in_prefix_order_commit_by_commit():
    node = NodeDriver()
    writer = node.session()
    lease = lease_of(node.reserve(writer, "a b c"))
    first = node.commit(writer, lease, "a")
    assert (first, node.probe(writer, "a b c")) == (
        Committed(existing_block_indices=(), num_blocks_left=2),
        "x..",
    )
    last = node.commit(writer, lease, "b c")
    assert last == Committed(existing_block_indices=(), num_blocks_left=0)
    assert node.books() == {"free": 5, "committed": 3}


def test_write_lease_ends_with_the_last_commit():
    node = NodeDriver()
    writer = node.session()
    lease = lease_of(node.publish(writer, "a"))
    with pytest.raises(LeaseUnknown):
        node.commit(writer, lease, "a")


def test_more_blocks_than_are_left_are_refused_and_none_committed():
    node = NodeDriver()
    writer = node.session()
    lease = lease_of(node.reserve(writer, "a b"))
    node.commit(writer, lease, "a")
    with pytest.raises(CommitRefused, match="2 blocks committed, but only 1"):
        node.commit(writer, lease, "b c")
    assert node.probe(writer, "a b") == "x."


def test_lease_of_another_session_is_unknown():
    node = NodeDriver()
    writer, other = node.session(), node.session("other")
    lease = lease_of(node.reserve(writer, "a"))
    with pytest.raises(LeaseUnknown):
        node.commit(other, lease, "a")
    with pytest.raises(LeaseUnknown):
        node.abort(other, lease)


def test_only_what_is_new_is_reserved():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "a b")
    reserved = node.reserve(writer, "a b c d")
    assert [(run.first_block_index, run.num_blocks) for run in reserved.runs] == [(2, 2)]
    node.commit(writer, lease_of(reserved), "c d")
    assert node.reserve(writer, "a b c d") == Reserved(lease=None, runs=())


def test_runs_leave_out_what_is_here_in_the_middle():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "b")
    reserved = node.reserve(writer, "a b c")
    assert [(run.first_block_index, run.num_blocks) for run in reserved.runs] == [(0, 1), (2, 1)]


def test_run_continues_right_behind_its_parent():
    node = NodeDriver()
    writer = node.session()
    parent = node.publish(writer, "a b")
    node.publish(writer, "x")  # lies behind b: c must go elsewhere, and d behind c
    child = node.publish(writer, "c", parent="b")
    grandchild = node.reserve(writer, "d", parent="c")
    assert ranges(parent)[0][1] < ranges(child)[0][0]
    assert ranges(child)[0][1] == ranges(grandchild)[0][0]


def test_room_behind_the_parent_comes_before_the_smallest_hole():
    node = NodeDriver()
    writer = node.session()
    hole = lease_of(node.reserve(writer, "x"))
    parent = node.publish(writer, "a")
    node.abort(writer, hole)
    assert ranges(node.reserve(writer, "b", parent="a"))[0][0] == ranges(parent)[0][1]


def test_extents_are_no_longer_than_the_limit():
    node = NodeDriver(max_extent_nbytes=2 * BLOCK)
    writer = node.session()
    reserved = node.reserve(writer, "a b c d e")
    assert [run.num_blocks for run in reserved.runs] == [2, 2, 1]
    assert all(run.extent.nbytes == run.num_blocks * BLOCK for run in reserved.runs)
    node.commit(writer, lease_of(reserved), "a b c d e")
    assert [run.num_blocks for run in node.match(writer, "a b c d e").runs] == [2, 2, 1]


def test_run_is_cut_where_only_small_holes_are_left():
    node = NodeDriver(blocks=5)
    writer = node.session()
    for name in "vwxyz":
        node.publish(writer, name, one_reader=True)
    for name in "wy":
        node.release(writer, lease_of(node.match(writer, name)))
    reserved = node.reserve(writer, "a b")
    assert sorted(ranges(reserved)) == [(BLOCK, 2 * BLOCK), (3 * BLOCK, 4 * BLOCK)]


def test_each_range_has_a_generation_of_its_own():
    node = NodeDriver()
    writer = node.session()
    first = node.reserve(writer, "a")
    node.abort(writer, lease_of(first))
    second = node.reserve(writer, "b")
    assert ranges(first) == ranges(second)
    assert second.runs[0].extent.generation > first.runs[0].extent.generation


# --- two writers


def test_first_commit_wins_and_the_losers_bytes_are_free():
    node = NodeDriver()
    one, two = node.session("one"), node.session("two")
    first, second = node.reserve(one, "a b"), node.reserve(two, "a b")
    node.commit(two, lease_of(second), "a")
    assert node.commit(one, lease_of(first), "a b") == Committed(
        existing_block_indices=(0,), num_blocks_left=0
    )
    lost = node.commit(two, lease_of(second), "b")
    assert lost == Committed(existing_block_indices=(1,), num_blocks_left=0)
    assert node.books() == {"free": 6, "committed": 2}
    matched = node.match(one, "a b")
    assert ranges(matched) == [
        (ranges(second)[0][0], ranges(second)[0][0] + BLOCK),
        (BLOCK, 2 * BLOCK),
    ]


# --- abort, end of session


def test_abort_gives_back_what_was_not_committed():
    node = NodeDriver()
    writer = node.session()
    lease = lease_of(node.reserve(writer, "a b c"))
    node.commit(writer, lease, "a")
    assert node.abort(writer, lease).freed_nbytes == 2 * BLOCK
    assert node.books() == {"free": 7, "committed": 1}
    with pytest.raises(LeaseUnknown):
        node.abort(writer, lease)


def test_namespace_without_blocks_and_writers_is_forgotten_with_its_block_size():
    node = NodeDriver()
    writer = node.session()
    node.abort(writer, lease_of(node.reserve(writer, "a")))
    reserved = node.ask(writer, reserving("a", block_nbytes=512), Reserved)
    with pytest.raises(NamespaceMismatch, match="512 bytes, not 4096"):
        node.reserve(writer, "b")
    node.abort(writer, lease_of(reserved))
    node.reserve(writer, "b")


@pytest.mark.parametrize("maps", [True, False])
def test_dead_writers_reservations_are_free_at_once(maps):
    node = NodeDriver()
    writer = node.session(maps=maps)
    lease = lease_of(node.reserve(writer, "a b"))
    node.commit(writer, lease, "a")
    node.end(writer)
    assert node.books() == {"free": 7, "committed": 1}
    assert node.state.stat().num_write_leases == 0


# --- time


def test_nothing_is_committed_after_expiry():
    node = NodeDriver(write_lease_s=30)
    writer = node.session()
    reserved = node.reserve(writer, "a")
    assert reserved.lease is not None
    assert reserved.lease.ttl_s == 30
    node.wait(30)
    with pytest.raises(LeaseExpired):
        node.commit(writer, reserved.lease.id, "a")
    assert node.probe(writer, "a") == "."


def test_commit_just_before_expiry_counts():
    node = NodeDriver(write_lease_s=30)
    writer = node.session()
    reserved = node.reserve(writer, "a")
    node.wait(29.999)
    node.commit(writer, lease_of(reserved), "a")
    assert node.probe(writer, "a") == "x"


def test_renewed_write_lease_lives_on():
    node = NodeDriver(write_lease_s=30, lease_life_s=70)
    writer = node.session()
    lease = lease_of(node.reserve(writer, "a"))
    for expected_s in (30, 30, 10):
        node.wait(20)
        (life_s,) = node.renew(writer, lease)
        assert life_s == pytest.approx(expected_s)
    node.wait(9)
    node.commit(writer, lease, "a")


def test_late_writer_that_maps_memory_is_quarantined_after_the_grace():
    node = NodeDriver(write_lease_s=30, grace_s=10)
    writer = node.session(maps=True)
    lease = lease_of(node.reserve(writer, "a b c"))
    node.commit(writer, lease, "a")
    node.wait(39.9)
    assert node.books() == {"free": 5, "committed": 1, "reserved": 2}
    node.wait(0.1)
    assert node.books() == {"free": 5, "committed": 1, "quarantined": 2}
    node.wait(1000)
    assert node.num_blocks("quarantined") == 2
    with pytest.raises(LeaseExpired):
        node.commit(writer, lease, "b")
    assert node.renew(writer, lease) == (0.0,)


def test_quarantine_ends_when_the_writer_says_that_it_stopped():
    node = NodeDriver()
    writer = node.session(maps=True)
    lease = lease_of(node.reserve(writer, "a b"))
    node.wait(100)
    assert node.abort(writer, lease).freed_nbytes == 2 * BLOCK
    assert node.books() == {"free": 8}


def test_quarantine_ends_with_the_writers_session():
    node = NodeDriver()
    writer = node.session(maps=True)
    node.reserve(writer, "a b")
    node.wait(100)
    node.end(writer)
    assert node.books() == {"free": 8}


def test_the_room_of_a_late_writer_that_cannot_reach_memory_is_free_when_its_lease_ends():
    node = NodeDriver(write_lease_s=30, grace_s=10)
    writer = node.session(maps=False)
    lease = lease_of(node.reserve(writer, "a b"))
    node.wait(29.9)
    assert node.num_blocks("reserved") == 2
    node.wait(0.1)
    assert node.books() == {"free": 8}
    with pytest.raises(LeaseUnknown):
        node.commit(writer, lease, "a")


# --- parents


def test_write_lease_pins_its_parent():
    node = NodeDriver(blocks=3)
    writer = node.session()
    node.publish(writer, "a")
    lease = lease_of(node.reserve(writer, "b", parent="a"))
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "x y")
    assert node.probe(writer, "a") == "x"
    node.abort(writer, lease)
    node.publish(writer, "x y z")
    assert node.probe(writer, "a") == "."


def test_write_lease_pins_the_named_blocks_that_are_here():
    node = NodeDriver(blocks=3)
    writer = node.session()
    node.publish(writer, "a")
    node.reserve(writer, "a b")
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "x y")
    assert node.probe(writer, "a") == "x"


def test_parent_survives_the_eviction_that_makes_room_for_its_child():
    node = NodeDriver(blocks=2)
    writer = node.session()
    node.publish(writer, "a")
    node.publish(writer, "x")
    node.publish(writer, "b", parent="a")
    assert node.probe(writer, "a x b") == "x.x"


def test_fenced_writer_pins_no_parent_any_more():
    node = NodeDriver(blocks=3)
    writer = node.session(maps=True)
    node.publish(writer, "a")
    node.reserve(writer, "b", parent="a")
    node.wait(100)
    node.publish(writer, "x y")
    assert node.books() == {"committed": 2, "quarantined": 1}


# --- a full pool


def test_full_pool_names_who_holds_it_and_when_to_retry():
    node = NodeDriver(blocks=4, read_lease_s=10, write_lease_s=30)
    writer, reader = node.session("prefill-0"), node.session("decode-1")
    node.publish(writer, "a b")
    node.match(reader, "a b")
    node.reserve(writer, "c d")
    with pytest.raises(PoolExhausted) as refused:
        node.reserve(writer, "e")
    assert "prefill-0 8192 bytes" in refused.value.message
    assert "decode-1 8192 bytes" in refused.value.message
    assert refused.value.retry_after_s == pytest.approx(10)
    assert node.state.stat().counters["reserves_refused"] == 1


def test_quarantine_does_not_promise_room_soon():
    node = NodeDriver(blocks=2, write_lease_s=30)
    stuck, writer = node.session("stuck"), node.session()
    node.reserve(stuck, "a b")
    node.wait(100)
    with pytest.raises(PoolExhausted, match="stuck 8192 bytes") as refused:
        node.reserve(writer, "c")
    assert refused.value.retry_after_s == pytest.approx(30)


def test_holders_of_another_tenants_pool_are_not_named():
    node = NodeDriver(blocks=1, tenants=("default", "other"))
    writer, stranger = node.session(), node.session("stranger", tenant="other")
    node.reserve(stranger, "s")
    node.reserve(writer, "a")
    with pytest.raises(PoolExhausted) as refused:
        node.reserve(writer, "b")
    assert "stranger" not in str(refused.value)


def test_unread_blocks_for_one_reader_name_their_writer_as_holder():
    node = NodeDriver(blocks=1)
    writer = node.session("prefill-0")
    node.publish(writer, "a", one_reader=True)
    with pytest.raises(PoolExhausted, match="prefill-0 4096 bytes"):
        node.reserve(writer, "b")


def test_queue_is_served_in_order_of_arrival_and_nobody_overtakes():
    node = NodeDriver(blocks=4)
    holder, writer = node.session("holder"), node.session()
    leases = [lease_of(node.reserve(holder, name)) for name in "wxyz"]
    large = node.call(writer, reserving("a b", timeout_s=60))
    small = node.call(writer, reserving("c", timeout_s=60))
    node.abort(holder, leases[0])
    assert (node.answer(writer, large), node.answer(writer, small)) == (None, None)
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "d")
    node.abort(holder, leases[1])
    assert isinstance(node.answer(writer, large), Reserved)
    assert node.answer(writer, small) is None
    node.abort(holder, leases[2])
    assert isinstance(node.answer(writer, small), Reserved)


def test_reservation_without_new_blocks_needs_no_room_and_does_not_queue():
    node = NodeDriver(blocks=2)
    writer = node.session()
    node.publish(writer, "a")
    node.reserve(writer, "b", parent="a")
    node.call(writer, reserving("c d", timeout_s=60))
    assert node.reserve(writer, "a").lease is None


def test_queued_reservation_fails_at_its_deadline_and_the_next_is_served():
    node = NodeDriver(blocks=2)
    holder, writer = node.session("holder"), node.session()
    node.reserve(holder, "x")
    large = node.call(writer, reserving("a b", timeout_s=5))
    small = node.call(writer, reserving("c", timeout_s=60))
    node.wait(5)
    error = node.answer(writer, large)
    assert isinstance(error, PoolExhausted)
    assert "holder 4096 bytes" in error.message
    assert isinstance(node.answer(writer, small), Reserved)


@pytest.mark.parametrize("how", ["cancel", "end"])
def test_who_leaves_the_queue_lets_the_next_one_through(how):
    node = NodeDriver(blocks=2)
    holder, impatient, writer = node.session("holder"), node.session("impatient"), node.session()
    node.reserve(holder, "x")
    large = node.call(impatient, reserving("a b", timeout_s=60))
    small = node.call(writer, reserving("c", timeout_s=60))
    if how == "cancel":
        node.cancel(impatient, large)
    else:
        node.end(impatient)
    assert isinstance(node.answer(writer, small), Reserved)
    assert node.answer(impatient, large) is None


def test_queued_reservation_is_served_when_a_reader_releases():
    node = NodeDriver(blocks=1)
    writer = node.session()
    node.publish(writer, "a")
    lease = lease_of(node.match(writer, "a"))
    waiting = node.call(writer, reserving("b", timeout_s=60))
    node.release(writer, lease)
    assert isinstance(node.answer(writer, waiting), Reserved)


def test_queued_reservation_is_served_when_a_commit_makes_blocks_evictable():
    node = NodeDriver(blocks=1)
    writer = node.session()
    lease = lease_of(node.reserve(writer, "a"))
    waiting = node.call(writer, reserving("b", timeout_s=60))
    node.commit(writer, lease, "a")
    assert isinstance(node.answer(writer, waiting), Reserved)


def test_queued_reservation_is_served_when_a_read_lease_and_its_grace_are_over():
    node = NodeDriver(blocks=1, read_lease_s=10, grace_s=5)
    writer = node.session()
    node.publish(writer, "a")
    node.match(writer, "a")
    waiting = node.call(writer, reserving("b", timeout_s=60))
    node.wait(14.9)
    assert node.answer(writer, waiting) is None
    node.wait(0.1)
    assert isinstance(node.answer(writer, waiting), Reserved)


def test_queued_reservation_is_served_when_nobody_fetched_a_block_for_one_reader():
    node = NodeDriver(blocks=1, write_lease_s=30, grace_s=10)
    writer = node.session()
    node.publish_tail(writer, "r1")
    waiting = node.call(writer, reserving("a", timeout_s=60))
    node.wait(40)
    assert isinstance(node.answer(writer, waiting), Reserved)


def test_full_queue_is_refused():
    node = NodeDriver(blocks=1, max_waiting=1)
    writer = node.session()
    node.reserve(writer, "a")
    node.call(writer, reserving("b", timeout_s=60))
    with pytest.raises(LimitExceeded, match="1 reservations wait"):
        node.ask(writer, reserving("c", timeout_s=60), Reserved)


def test_one_tenants_queue_does_not_hold_up_another():
    node = NodeDriver(blocks=1, tenants=("default", "other"))
    writer, stranger = node.session(), node.session("stranger", tenant="other")
    node.reserve(writer, "a")
    waiting = node.call(writer, reserving("b", timeout_s=60))
    lease = lease_of(node.reserve(stranger, "s"))
    second = node.call(stranger, reserving("t", timeout_s=60))
    node.abort(stranger, lease)
    assert isinstance(node.answer(stranger, second), Reserved)
    assert node.answer(writer, waiting) is None


# --- what is refused before anything is allocated


def test_what_can_never_fit_is_refused_and_does_not_queue():
    node = NodeDriver(blocks=4, max_extent_nbytes=2 * BLOCK)
    writer = node.session()
    for request in (
        reserving("a", block_nbytes=3 * BLOCK, timeout_s=60),
        reserving("a b c d e", timeout_s=60),
        reserving_tail("r", nbytes=3 * BLOCK, timeout_s=60),
    ):
        with pytest.raises(LimitExceeded):
            node.ask(writer, request, Reserved)
    assert node.books() == {"free": 4}


def test_namespace_has_one_block_size():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "a")
    with pytest.raises(NamespaceMismatch, match="4096 bytes, not 512"):
        node.ask(writer, reserving("b", block_nbytes=512), Reserved)
    node.ask(writer, reserving("b", block_nbytes=512, namespace=OTHER_NAMESPACE), Reserved)


def test_failed_reservation_does_not_fix_the_block_size():
    node = NodeDriver(blocks=2)
    writer = node.session()
    lease = lease_of(node.reserve(writer, "a b", namespace=OTHER_NAMESPACE))
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "c", namespace=NAMESPACE)
    node.abort(writer, lease)
    node.ask(writer, reserving("c", block_nbytes=512, namespace=NAMESPACE), Reserved)


def test_block_size_is_checked_again_when_a_queued_reservation_is_served():
    node = NodeDriver(blocks=2)
    writer = node.session()
    lease = lease_of(node.reserve(writer, "x y", namespace=OTHER_NAMESPACE))
    node.call(writer, reserving("z", namespace=OTHER_NAMESPACE, timeout_s=60))
    first = node.call(writer, reserving("a", block_nbytes=BLOCK // 2, timeout_s=60))
    second = node.call(writer, reserving("b", block_nbytes=BLOCK // 4, timeout_s=60))
    node.abort(writer, lease)
    assert isinstance(node.answer(writer, first), Reserved)
    assert isinstance(node.answer(writer, second), NamespaceMismatch)


def test_session_for_reading_reserves_nothing():
    node = NodeDriver()
    reader = node.session("reader", may_write=False)
    with pytest.raises(BadRequest, match="for reading"):
        node.reserve(reader, "a")


def test_block_is_not_its_own_ancestor():
    node = NodeDriver()
    writer = node.session()
    for names, parent in (("a", "a"), ("a b", "b")):
        with pytest.raises(BadRequest, match="parent"):
            node.reserve(writer, names, parent=parent)


def test_session_holds_no_more_leases_than_the_limit():
    node = NodeDriver(max_leases_per_session=2)
    writer, other = node.session(), node.session("other")
    node.publish(writer, "a")
    node.match(writer, "a")
    node.reserve(writer, "b")
    with pytest.raises(LimitExceeded, match="2 leases"):
        node.reserve(writer, "c")
    with pytest.raises(LimitExceeded, match="2 leases"):
        node.ask(writer, matching("a"), object)
    node.match(other, "a")
