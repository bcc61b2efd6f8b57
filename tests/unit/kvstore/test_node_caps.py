"""Caps: what readers may keep from eviction, in all and each, and what may be in quarantine."""

from __future__ import annotations

from typing import Any

import pytest

from snowskin.kvstore.errors import BadSetting, LeaseShareExceeded, QuarantineShareExceeded
from snowskin.kvstore.messages import Matched, Reserved
from snowskin.kvstore.node.limits import NodeLimits
from tests.support.node_driver import (
    BLOCK,
    OTHER_NAMESPACE,
    NodeDriver,
    lease_of,
    matching,
    reserving,
)

HALF_AND_QUARTER: dict[str, Any] = {"max_leased_ratio": 0.5, "max_client_leased_ratio": 0.25}


def make_node(blocks: int = 16, **limits: Any) -> NodeDriver:
    return NodeDriver(blocks=blocks, max_extent_nbytes=2 * BLOCK, **(HALF_AND_QUARTER | limits))


def published(node: NodeDriver, *chains: str) -> None:
    """Chains of blocks in segments of two."""
    writer = node.session("publisher")
    for chain in chains:
        node.publish(writer, chain)
    node.end(writer)


# --- one client


def test_a_client_leases_its_share_and_is_told_what_it_was_not_given():
    node = make_node()
    published(node, "a b c d e f g h")
    reader = node.session("reader")
    matched = node.match(reader, "a b c d e f g h i")
    assert (matched.num_blocks, matched.num_blocks_withheld) == (4, 4)
    assert node.num_blocks("leased") == 4
    assert node.state.stat().counters["matches_cut"] == 1


def test_what_was_withheld_can_be_leased_once_the_rest_is_released():
    node = make_node()
    published(node, "a b c d e f g h")
    reader = node.session("reader")
    node.release(reader, lease_of(node.match(reader, "a b c d e f g h")))
    matched = node.match(reader, "e f g h")
    assert (matched.num_blocks, matched.num_blocks_withheld) == (4, 0)


def test_a_client_with_its_share_is_refused_and_told_who_holds_what():
    node = make_node(read_lease_s=8)
    published(node, "a b c d e f")
    reader = node.session("reader")
    node.match(reader, "a b c d")
    node.wait(3)
    with pytest.raises(LeaseShareExceeded) as caught:
        node.match(reader, "e f")
    assert caught.value.status == "RESOURCE_EXHAUSTED"
    assert caught.value.retry_after_s == pytest.approx(5)
    assert f"leases {4 * BLOCK} bytes" in str(caught.value)
    assert f"held by: reader {4 * BLOCK} bytes" in str(caught.value)
    assert node.state.stat().counters["matches_refused"] == 1
    assert node.num_blocks("leased") == 4


def test_what_one_client_holds_does_not_count_for_another():
    node = make_node()
    published(node, "a b c d e f g h")
    first, second = node.session("first"), node.session("second")
    node.match(first, "a b c d")
    assert node.match(second, "e f g h").num_blocks == 4


def test_a_segment_counts_once_for_the_pool_and_once_for_each_client():
    node = make_node()
    published(node, "a b c d e f")
    first, second = node.session("first"), node.session("second")
    for session in (first, second):
        for _ in range(3):
            assert node.match(session, "a b c d").num_blocks == 4
    assert node.num_blocks("leased") == 4
    assert node.match(node.session("third"), "e f").num_blocks == 2
    assert node.match(second, "a b c d").num_blocks == 4
    with pytest.raises(LeaseShareExceeded):
        node.match(second, "e")


def test_a_segment_counts_whole_whatever_is_read_of_it():
    node = make_node()
    published(node, "a b", "c d", "e f")
    reader = node.session("reader")
    node.match(reader, "a")
    node.match(reader, "c")
    with pytest.raises(LeaseShareExceeded):
        node.match(reader, "e")
    assert node.match(reader, "b").num_blocks == 1


def test_a_client_that_reads_nothing_may_begin_with_one_segment_of_any_size():
    node = NodeDriver(blocks=8, **HALF_AND_QUARTER)
    published(node, "a b c d e f g", "x")
    reader = node.session("reader")
    matched = node.match(reader, "a b c d e f g")
    assert (matched.num_blocks, matched.num_blocks_withheld) == (7, 0)
    with pytest.raises(LeaseShareExceeded):
        node.match(reader, "x")
    node.release(reader, lease_of(matched))
    assert node.match(reader, "x").num_blocks == 1


def test_a_lone_client_reads_a_pool_of_two_blocks_from_end_to_end():
    node = NodeDriver(blocks=2, max_extent_nbytes=BLOCK, **HALF_AND_QUARTER)
    published(node, "a b")
    reader = node.session("reader")
    for left in ("a b", "b"):
        matched = node.match(reader, left)
        assert (matched.num_blocks, matched.num_blocks_withheld) == (1, len(left.split()) - 1)
        node.release(reader, lease_of(matched))


def test_a_run_over_several_shards_ends_at_the_same_block_in_each():
    node = make_node()
    writer = node.session("writer")
    node.publish(writer, "a b c d")
    node.publish(writer, "a b c d", namespace=OTHER_NAMESPACE)
    reader = node.session("reader")
    both = matching("a b c d", namespaces=(b"N" * 32, OTHER_NAMESPACE))
    matched = node.ask(reader, both, Matched)
    assert (matched.num_blocks, matched.num_blocks_withheld) == (2, 2)
    assert [len(packed) for packed in matched.checksums] == [8, 8]
    assert [run.first_block_index for run in matched.runs] == [0, 0]


def test_parents_that_a_writer_has_pinned_count_but_do_not_keep_it_from_reading():
    node = make_node()
    published(node, "a b c d e f g h")
    client = node.session("client")
    node.ask(client, reserving("x", parent="b"), Reserved)
    node.ask(client, reserving("y", parent="d"), Reserved)
    assert node.num_blocks("leased") == 4
    matched = node.match(client, "e f g h")
    assert (matched.num_blocks, matched.num_blocks_withheld) == (2, 2)
    assert node.num_blocks("leased") == 6


def test_tails_do_not_ask_for_a_share():
    node = make_node(blocks=4)
    writer, reader = node.session("writer"), node.session("reader")
    node.publish(writer, "a b")
    for name in ("r", "q"):
        node.publish_tail(writer, name)
    node.match(reader, "a b")
    for name in ("r", "q"):
        assert node.match_tail(reader, name).num_blocks == 1


# --- all clients together


def test_all_clients_together_lease_their_share_of_a_pool():
    node = make_node()
    published(node, "a b c d e f g h i j k l")
    first, second, third = (node.session(name) for name in ("first", "second", "third"))
    node.match(first, "a b c d")
    node.match(second, "e f g h")
    with pytest.raises(LeaseShareExceeded, match=f"{8 * BLOCK} are leased in all"):
        node.match(third, "i j k l")
    assert node.match(third, "a b c d i").num_blocks == 4  # these are leased anyhow
    assert node.num_blocks("leased") == 8


def test_a_pool_is_not_closed_to_readers_by_what_writers_have_pinned():
    node = make_node(blocks=10)
    published(node, "a b c d", "e f", "g")
    writer, reader, late = (node.session(name) for name in ("writer", "reader", "late"))
    node.ask(writer, reserving("x", parent="b"), Reserved)
    node.ask(writer, reserving("y", parent="d"), Reserved)
    assert node.match(reader, "e f").num_blocks == 2
    with pytest.raises(LeaseShareExceeded):
        node.match(late, "g")


def test_leases_that_ran_out_count_until_their_grace_is_over():
    node = make_node(read_lease_s=4, grace_s=2)
    published(node, "a b c d e")
    reader = node.session("reader")
    node.match(reader, "a b c d")
    node.wait(5.9)
    with pytest.raises(LeaseShareExceeded):
        node.match(reader, "e")
    node.wait(0.1)
    assert node.match(reader, "e").num_blocks == 1


def test_a_match_that_waited_is_cut_too():
    node = make_node()
    writer, reader = node.session("writer"), node.session("reader")
    call = node.call(reader, matching("a b c d e f", wait_blocks=6, timeout_s=5))
    node.publish(writer, "a b c d e f")
    answer = node.answer(reader, call)
    assert isinstance(answer, Matched)
    assert (answer.num_blocks, answer.num_blocks_withheld) == (4, 2)
    refused = node.call(reader, matching("g", wait_blocks=1, timeout_s=5))
    node.publish(writer, "g")
    assert isinstance(node.answer(reader, refused), LeaseShareExceeded)


def test_what_readers_have_released_without_telling_is_settled_before_anybody_is_cut():
    node = make_node()
    published(node, "a b c d e f")
    reader = node.session("reader")
    lease = lease_of(node.match(reader, "a b c d"))
    settled = []

    def settle(now_s: float) -> None:
        settled.append(now_s)
        node.release(reader, lease)

    node.state.settle_leases_by(settle)
    assert node.match(reader, "e f").num_blocks == 2
    assert settled == [node.now_s]
    node.match(reader, "e f")
    assert settled == [node.now_s]


# --- quarantine


def fenced(node: NodeDriver, name: str, blocks: str):
    """A client whose write lease ran out in the middle; its session and the lease."""
    session = node.session(name)
    lease = lease_of(node.reserve(session, blocks))
    return session, lease


def test_who_has_too_much_in_quarantine_gets_no_more_room_and_others_do():
    node = NodeDriver(blocks=8, max_quarantined_ratio=0.25, write_lease_s=2, grace_s=1)
    late, lease = fenced(node, "late", "a b c")
    node.wait(3)
    assert node.books() == {"free": 5, "quarantined": 3}
    with pytest.raises(QuarantineShareExceeded) as caught:
        node.reserve(late, "d")
    assert (caught.value.status, caught.value.retry_after_s) == ("RESOURCE_EXHAUSTED", 1)
    assert f"{3 * BLOCK} bytes of pool 0 are in quarantine, {2 * BLOCK} may be" in str(caught.value)
    node.publish(node.session("other"), "d e")
    assert node.reserve(late, "d e").lease is None  # nothing of it is new
    node.abort(late, lease)
    node.reserve(late, "f")


def test_below_the_cap_a_late_writer_may_go_on():
    node = NodeDriver(blocks=8, max_quarantined_ratio=0.25, write_lease_s=2, grace_s=1)
    late, _ = fenced(node, "late", "a b")
    node.wait(3)
    node.reserve(late, "c")


def test_who_queued_before_its_writes_went_into_quarantine_is_refused_in_its_turn():
    node = NodeDriver(blocks=4, max_quarantined_ratio=0.25, write_lease_s=2, grace_s=1)
    late, _ = fenced(node, "late", "a b c")
    other = node.session("other")
    lease = lease_of(node.ask(other, reserving("x", ttl_s=1.5), Reserved))
    calls = [node.call(session, reserving("p", timeout_s=9)) for session in (late, other)]
    node.wait(3)
    assert node.books() == {"quarantined": 4}
    node.abort(other, lease)
    assert isinstance(node.answer(late, calls[0]), QuarantineShareExceeded)
    assert isinstance(node.answer(other, calls[1]), Reserved)


def test_who_is_to_be_refused_is_refused_when_its_writes_go_into_quarantine():
    node = NodeDriver(blocks=4, max_quarantined_ratio=0.25, write_lease_s=60, grace_s=1)
    late, other = node.session("late"), node.session("other")
    node.reserve(late, "a b", ttl_s=2)
    node.reserve(other, "c d")
    call = node.call(late, reserving("p", timeout_s=50))
    node.wait(2.9)
    assert node.answer(late, call) is None
    node.wait(0.1)
    assert isinstance(node.answer(late, call), QuarantineShareExceeded)


@pytest.mark.parametrize(
    "name", ["max_leased_ratio", "max_client_leased_ratio", "max_quarantined_ratio"]
)
@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5])
def test_a_share_is_above_nothing_and_at_most_all(name, ratio):
    with pytest.raises(BadSetting, match=name):
        NodeLimits(**{name: ratio})
