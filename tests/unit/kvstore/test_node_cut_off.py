"""Who is cut off while it lives keeps only what its stores may still land in, and that as nobody's."""

from __future__ import annotations

import pytest

from snowskin.kvstore.errors import PoolExhausted
from snowskin.kvstore.messages import Reserved
from tests.support.node_driver import NodeDriver, lease_of, matching, reserving


def test_what_a_writer_that_is_cut_off_may_still_write_into_is_nobodys_until_its_session_ends():
    node = NodeDriver(write_lease_s=30, grace_s=10)
    writer, other = node.session(maps=True), node.session("other")
    lease = lease_of(node.reserve(writer, "a b c"))
    node.commit(writer, lease, "a")
    node.fence(writer)
    assert node.books() == {"free": 5, "committed": 1, "quarantined": 2}
    assert not node.state.holds_nothing(writer.id)
    node.reserve(other, "b c d e f")
    with pytest.raises(PoolExhausted, match="writer 8192 bytes"):
        node.reserve(other, "g h")
    node.wait(1000)
    assert node.num_blocks("quarantined") == 2 + 5
    assert node.state.fence_session(writer.id, node.now_s) == []
    node.end(writer)
    assert node.num_blocks("quarantined") == 5
    assert node.state.fence_session(writer.id, node.now_s) == []


@pytest.mark.parametrize("maps", [True, False])
def test_who_is_cut_off_keeps_nothing_that_no_store_of_it_can_harm(maps):
    node = NodeDriver(max_leased_ratio=0.5)
    client, other = node.session(maps=maps), node.session("other")
    node.publish(client, "a", one_reader=True)
    node.publish(client, "b c")
    node.match(client, "b c")
    unread = node.call(client, matching("x", wait_blocks=1, timeout_s=5))
    queued = node.call(other, reserving("1 2 3 4 5 6", timeout_s=5))
    mine = node.call(client, reserving("7 8 9 10 11", timeout_s=5))
    assert node.answer(other, queued) is None
    node.fence(client)
    assert isinstance(node.answer(other, queued), Reserved), "the reader's blocks may go"
    stat = node.state.stat()
    assert (stat.num_read_leases, stat.num_waiting_matches, stat.num_waiting_reserves) == (0, 0, 0)
    assert node.state.holds_nothing(client.id)
    node.publish(other, "x")
    assert node.answer(client, unread) is node.answer(client, mine) is None


def test_a_reservation_of_who_is_cut_off_and_cannot_reach_memory_is_free():
    node = NodeDriver()
    writer = node.session(maps=False)
    node.reserve(writer, "a b")
    node.fence(writer)
    assert node.books() == {"free": 8}
