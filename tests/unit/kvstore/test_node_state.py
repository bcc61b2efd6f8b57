"""The node as a whole: sessions, leases' lives, draining, and what it says of itself."""

from __future__ import annotations

import pytest

from snowskin.kvstore.errors import BadRequest, NodeDraining, SessionEnded
from snowskin.kvstore.messages import LeaseId, NodeStat, StatRequest
from tests.support.node_driver import (
    BLOCK,
    NodeDriver,
    lease_of,
    matching,
    reserving,
)


def test_call_of_a_session_that_is_not_open_is_refused():
    node = NodeDriver()
    writer = node.session()
    node.end(writer)
    with pytest.raises(SessionEnded):
        node.ask(writer, StatRequest(), NodeStat)
    assert node.state.end_session(writer.id, node.now_s) == []


def test_session_ids_are_not_used_twice():
    node = NodeDriver()
    first = node.session()
    node.end(first)
    assert node.session().id != first.id


def test_what_is_no_request_is_refused():
    node = NodeDriver()
    with pytest.raises(BadRequest, match="int is not a request"):
        node.ask(node.session(), 7, object)  # type: ignore[arg-type]


def test_renewing_answers_for_each_lease_in_order():
    node = NodeDriver(read_lease_s=10, write_lease_s=30)
    writer, other = node.session(), node.session("other")
    node.publish(writer, "a")
    read, write = lease_of(node.match(writer, "a")), lease_of(node.reserve(writer, "b"))
    foreign = lease_of(node.reserve(other, "c"))
    node.wait(5)
    assert node.renew(writer, read, LeaseId(999), foreign, write) == (10, 0, 0, 30)


def test_renewing_may_ask_for_less_but_takes_nothing_away():
    node = NodeDriver(read_lease_s=10)
    writer = node.session()
    node.publish(writer, "a")
    lease = lease_of(node.match(writer, "a"))
    node.wait(6)
    assert node.renew(writer, lease, ttl_s=2) == (4,)
    assert node.renew(writer, lease, ttl_s=5) == (5,)


def test_lease_that_is_over_cannot_be_renewed_in_its_grace():
    node = NodeDriver(read_lease_s=10, grace_s=10)
    writer = node.session()
    node.publish(writer, "a")
    lease = lease_of(node.match(writer, "a"))
    node.wait(10)
    assert node.renew(writer, lease) == (0,)
    node.wait(10)
    assert node.num_blocks("leased") == 0


def test_no_lease_lives_longer_than_the_longest_life():
    node = NodeDriver(read_lease_s=10, lease_life_s=25, grace_s=1)
    writer = node.session()
    node.publish(writer, "a")
    lease = lease_of(node.match(writer, "a"))
    lives = []
    for _ in range(4):
        node.wait(8)
        lives.append(node.renew(writer, lease)[0])
    assert lives == [10, 9, 1, 0]


def test_draining_node_grants_nothing_and_lets_the_rest_end():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    node.publish(writer, "a")
    read, write = lease_of(node.match(reader, "a")), lease_of(node.reserve(writer, "b"))
    assert not node.state.is_idle()
    node.take(node.state.drain())
    with pytest.raises(NodeDraining):
        node.match(reader, "a")
    with pytest.raises(NodeDraining):
        node.reserve(writer, "c")
    assert node.renew(reader, read) == (10,)
    node.commit(writer, write, "b")
    assert node.probe(reader, "a b") == "xx"
    node.release(reader, read)
    assert node.state.is_idle()
    assert node.state.stat().draining


def test_draining_node_tells_those_who_wait():
    node = NodeDriver(blocks=1)
    writer, reader = node.session(), node.session("reader")
    lease = lease_of(node.reserve(writer, "a"))
    match = node.call(reader, matching("a", wait_blocks=1, timeout_s=60))
    reserve = node.call(writer, reserving("b", timeout_s=60))
    node.take(node.state.drain())
    assert isinstance(node.answer(reader, match), NodeDraining)
    assert isinstance(node.answer(writer, reserve), NodeDraining)
    node.commit(writer, lease, "a")
    assert node.state.is_idle()


def test_cancelling_what_was_answered_changes_nothing():
    node = NodeDriver()
    writer = node.session()
    call_id = node.call(writer, reserving("a"))
    assert node.state.cancel(writer.id, call_id, node.now_s) == []
    assert node.num_blocks("reserved") == 1


def test_cancelling_takes_one_session_s_call_only():
    node = NodeDriver()
    one, two = node.session("one"), node.session("two")
    first = node.call(one, matching("a", wait_blocks=1, timeout_s=60))
    second = node.call(two, matching("a", wait_blocks=1, timeout_s=60))
    node.state.cancel(two.id, first, node.now_s)
    assert node.state.stat().num_waiting_matches == 2
    node.cancel(two, second)
    assert node.state.stat().num_waiting_matches == 1


def test_time_is_asked_for_only_while_something_can_run_out():
    node = NodeDriver(read_lease_s=10, grace_s=5)
    writer = node.session()
    assert node.state.next_time_s() is None
    node.publish(writer, "a")
    lease = lease_of(node.match(writer, "a"))
    assert node.state.next_time_s() == node.now_s + 15
    node.call(writer, matching("b", wait_blocks=1, timeout_s=4))
    assert node.state.next_time_s() == node.now_s + 4
    node.wait(4)
    node.release(writer, lease)
    assert node.state.next_time_s() is None


def test_waiting_is_bounded_by_the_node():
    node = NodeDriver(max_timeout_s=3)
    reader = node.session()
    node.call(reader, matching("a", wait_blocks=1, timeout_s=1e9))
    assert node.state.next_time_s() == node.now_s + 3


def test_stat_counts_what_is_there():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    node.publish(writer, "a b")
    node.match(reader, "a b c")
    node.reserve(writer, "c")
    node.call(reader, matching("c", wait_blocks=1, timeout_s=60))
    stat = node.ask(reader, StatRequest(), NodeStat)
    assert (stat.node_id, stat.node_epoch, stat.num_blocks, stat.num_sessions) == ("n", 7, 2, 2)
    assert (stat.num_read_leases, stat.num_write_leases, stat.num_waiting_matches) == (1, 1, 1)
    (pool,) = stat.pools
    assert (pool.committed_nbytes, pool.reserved_nbytes) == (2 * BLOCK, BLOCK)
    assert (pool.leased_nbytes, pool.largest_hole_nbytes) == (2 * BLOCK, 5 * BLOCK)
    assert stat.counters["blocks_committed"] == 2
    assert stat.counters["blocks_matched"] == 2
