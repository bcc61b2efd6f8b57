"""The readers' side of a node: longest runs, waiting for more, tails, leases and complaints."""

from __future__ import annotations

import pytest

from snowskin.kvstore.errors import (
    BadRequest,
    LeaseExpired,
    LeaseUnknown,
    LimitExceeded,
    TailUnknown,
)
from snowskin.kvstore.messages import Matched, Probed, ProbeRequest, Reserved, WakeReason
from tests.support.node_driver import (
    BLOCK,
    NAMESPACE,
    OTHER_NAMESPACE,
    NodeDriver,
    column,
    lease_of,
    matching,
    matching_tail,
    ranges,
    record,
    reserving_tail,
)

BOTH = (NAMESPACE, OTHER_NAMESPACE)

# --- matches that answer at once


def test_match_leases_the_longest_run_from_the_first_key():
    node = NodeDriver()
    writer = node.session()
    published = node.publish(writer, "a b c")
    node.publish(writer, "e")
    matched = node.match(writer, "a b c d e")
    assert (matched.num_blocks, matched.wake_reason) == (3, WakeReason.SATISFIED)
    assert ranges(matched) == ranges(published)
    assert matched.checksums == (record("a") + record("b") + record("c"),)
    assert matched.node_epoch == 7
    assert node.num_blocks("leased") == 3


def test_blocks_that_do_not_lie_side_by_side_are_two_runs():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "a b c")
    assert ranges(node.match(writer, "a c")) == [(0, BLOCK), (2 * BLOCK, 3 * BLOCK)]
    assert len(node.match(writer, "b a").runs) == 2


def test_match_of_nothing_has_no_lease():
    node = NodeDriver()
    reader = node.session()
    matched = node.match(reader, "a")
    assert (matched.num_blocks, matched.lease, matched.runs, matched.checksums) == (0, None, (), ())


def test_suffix_without_its_prefix_is_found():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "c d", parent="b")
    assert node.match(writer, "c d").num_blocks == 2
    assert node.match(writer, "b c").num_blocks == 0


def test_match_takes_no_more_than_asked_for():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "a b c")
    matched = node.ask(writer, matching("a b c", max_blocks=2), Matched)
    assert (matched.num_blocks, len(matched.checksums[0])) == (2, 8)
    assert ranges(matched) == [(0, 2 * BLOCK)]


def test_match_that_may_not_wait_says_that_it_is_less():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "a")
    matched = node.ask(writer, matching("a b", wait_blocks=2), Matched)
    assert (matched.num_blocks, matched.wake_reason) == (1, WakeReason.TIMEOUT)


def test_probe_says_which_blocks_are_here_and_leases_nothing():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "a b")
    node.publish(writer, "d")
    probed = node.ask(writer, ProbeRequest(namespaces=(NAMESPACE,), keys=column("a b c d")), Probed)
    assert (probed.num_blocks, probed.present_bitmap) == (2, bytes([0b1011]))
    assert node.state.stat().num_read_leases == 0


def test_tenants_do_not_see_one_another():
    node = NodeDriver(tenants=("default", "other"))
    writer, stranger = node.session(), node.session("stranger", tenant="other")
    node.publish(writer, "a")
    assert node.match(stranger, "a").num_blocks == 0
    assert node.reserve(stranger, "a").lease is not None


# --- shards


def test_hit_is_what_every_shard_has():
    node = NodeDriver()
    writer = node.session()
    one = node.publish(writer, "a b c")
    two = node.publish(writer, "a b", namespace=OTHER_NAMESPACE)
    matched = node.ask(writer, matching("a b c", namespaces=BOTH), Matched)
    assert matched.num_blocks == 2
    assert [(run.shard_index, run.num_blocks) for run in matched.runs] == [(0, 2), (1, 2)]
    assert ranges(matched) == [(ranges(one)[0][0], ranges(one)[0][0] + 2 * BLOCK), *ranges(two)]
    assert matched.checksums == (record("a") + record("b"),) * 2
    probe = ProbeRequest(namespaces=BOTH, keys=column("a b c"))
    assert node.ask(writer, probe, Probed).present_bitmap == bytes([0b011])


def test_shard_that_was_never_written_makes_it_a_miss():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "a")
    assert node.ask(writer, matching("a", namespaces=BOTH), Matched).num_blocks == 0
    probe = ProbeRequest(namespaces=BOTH, keys=column("a"))
    assert node.ask(writer, probe, Probed).present_bitmap == b"\0"


def test_match_waits_for_the_last_shard():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    waiting = node.call(reader, matching("a b", namespaces=BOTH, wait_blocks=2, timeout_s=60))
    node.publish(writer, "a b")
    lease = lease_of(node.reserve(writer, "a b", namespace=OTHER_NAMESPACE))
    node.commit(writer, lease, "a")
    assert node.answer(reader, waiting) is None
    node.commit(writer, lease, "b")
    answer = node.answer(reader, waiting)
    assert isinstance(answer, Matched)
    assert answer.num_blocks == 2


# --- matches that wait


def test_waiting_match_wakes_at_the_commit_that_makes_it_enough():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    waiting = node.call(reader, matching("a b c d", wait_blocks=3, timeout_s=60))
    lease = lease_of(node.reserve(writer, "a b c d"))
    for name in "ab":
        node.commit(writer, lease, name)
        assert node.answer(reader, waiting) is None
    node.commit(writer, lease, "c")
    answer = node.answer(reader, waiting)
    assert isinstance(answer, Matched)
    assert (answer.num_blocks, answer.wake_reason) == (3, WakeReason.SATISFIED)


def test_waiting_match_gets_what_is_there_at_its_deadline():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    lease = lease_of(node.reserve(writer, "a b"))
    node.commit(writer, lease, "a")
    waiting = node.call(reader, matching("a b", wait_blocks=2, timeout_s=5))
    node.wait(4.9)
    assert node.answer(reader, waiting) is None
    node.wait(0.1)
    answer = node.answer(reader, waiting)
    assert isinstance(answer, Matched)
    assert (answer.num_blocks, answer.wake_reason) == (1, WakeReason.TIMEOUT)


@pytest.mark.parametrize("how", ["session end", "abort", "fence", "fence without memory"])
def test_waiting_match_is_told_that_the_writer_is_gone(how):
    node = NodeDriver(write_lease_s=30, grace_s=10)
    writer, reader = node.session(maps=how != "fence without memory"), node.session("reader")
    lease = lease_of(node.reserve(writer, "a b"))
    node.commit(writer, lease, "a")
    waiting = node.call(reader, matching("a b c", wait_blocks=3, timeout_s=100))
    if how == "session end":
        node.end(writer)
    elif how == "abort":
        node.abort(writer, lease)
    else:
        node.wait(29 if how == "fence without memory" else 39)
        assert node.answer(reader, waiting) is None
        node.wait(1)
    answer = node.answer(reader, waiting)
    assert isinstance(answer, Matched)
    assert (answer.num_blocks, answer.wake_reason) == (1, WakeReason.WRITER_GONE)


def test_waiting_match_waits_on_while_another_writer_has_the_block():
    node = NodeDriver()
    one, two, reader = node.session("one"), node.session("two"), node.session("reader")
    first, second = lease_of(node.reserve(one, "a")), lease_of(node.reserve(two, "a"))
    waiting = node.call(reader, matching("a", wait_blocks=1, timeout_s=100))
    node.abort(one, first)
    assert node.answer(reader, waiting) is None
    node.commit(two, second, "a")
    answer = node.answer(reader, waiting)
    assert isinstance(answer, Matched)
    assert answer.num_blocks == 1


def test_fenced_writer_gives_its_readers_up_only_once():
    node = NodeDriver()
    one, two, reader = node.session("one"), node.session("two"), node.session("reader")
    first = lease_of(node.reserve(one, "a"))
    node.wait(100)
    node.reserve(two, "a")
    waiting = node.call(reader, matching("a", wait_blocks=1, timeout_s=100))
    node.abort(one, first)
    assert node.answer(reader, waiting) is None


def test_waiting_match_falls_back_to_an_earlier_block_that_was_evicted():
    node = NodeDriver(blocks=3)
    writer, reader = node.session(), node.session("reader")
    node.publish(writer, "a")
    waiting = node.call(reader, matching("a b", wait_blocks=2, timeout_s=60))
    node.publish(writer, "x y z")
    node.publish(writer, "b")
    assert node.answer(reader, waiting) is None
    node.publish(writer, "a")
    answer = node.answer(reader, waiting)
    assert isinstance(answer, Matched)
    assert answer.num_blocks == 2


def test_cancelled_match_is_not_answered():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    waiting = node.call(reader, matching("a", wait_blocks=1, timeout_s=60))
    node.cancel(reader, waiting)
    node.publish(writer, "a")
    assert node.answer(reader, waiting) is None
    assert node.num_blocks("leased") == 0


def test_too_many_waiting_matches_are_refused():
    node = NodeDriver(max_waiting=1)
    reader = node.session()
    node.call(reader, matching("a", wait_blocks=1, timeout_s=60))
    with pytest.raises(LimitExceeded, match="1 matches wait"):
        node.ask(reader, matching("b", wait_blocks=1, timeout_s=60), Matched)


# --- read leases


def test_released_lease_is_unknown_the_second_time():
    node = NodeDriver()
    writer, other = node.session(), node.session("other")
    node.publish(writer, "a")
    lease = lease_of(node.match(writer, "a"))
    assert node.release(other, lease) == 1
    assert node.num_blocks("leased") == 1
    assert node.release(writer, lease) == 0
    assert node.release(writer, lease) == 1
    assert node.num_blocks("leased") == 0


def test_lease_that_ran_out_is_counted_as_unknown_and_ends():
    node = NodeDriver(read_lease_s=10, grace_s=10)
    writer = node.session()
    node.publish(writer, "a")
    lease = lease_of(node.match(writer, "a"))
    node.wait(10)
    assert node.num_blocks("leased") == 1
    assert node.release(writer, lease) == 1
    assert node.num_blocks("leased") == 0


def test_read_lease_ends_with_its_grace():
    node = NodeDriver(read_lease_s=10, grace_s=5)
    writer = node.session()
    node.publish(writer, "a")
    node.match(writer, "a", ttl_s=2)
    node.wait(6.9)
    assert node.num_blocks("leased") == 1
    node.wait(0.1)
    assert node.num_blocks("leased") == 0
    assert node.state.stat().counters["read_leases_expired"] == 1


def test_session_end_ends_read_leases_and_waiting_matches():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    node.publish(writer, "a")
    node.match(reader, "a")
    node.call(reader, matching("b", wait_blocks=1, timeout_s=60))
    node.end(reader)
    stat = node.state.stat()
    assert (stat.num_read_leases, stat.num_waiting_matches, stat.num_sessions) == (0, 0, 1)
    node.publish(writer, "b")


def test_bytes_are_readable_as_long_as_the_lease_lives():
    node = NodeDriver(read_lease_s=10)
    writer = node.session()
    node.publish(writer, "a b")
    lease = lease_of(node.match(writer, "a b"))
    entries = node.state.readable(lease, 0, node.now_s)
    assert [entry.offset for entry in entries] == [0, BLOCK]
    with pytest.raises(BadRequest, match="shard 1"):
        node.state.readable(lease, 1, node.now_s)
    node.wait(10)
    with pytest.raises(LeaseExpired):
        node.state.readable(lease, 0, node.now_s)
    node.release(writer, lease)
    with pytest.raises(LeaseUnknown):
        node.state.readable(lease, 0, node.now_s)


# --- complaints


def test_complained_block_leaves_the_index_and_its_bytes_come_back():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "a b c")
    node.release(writer, lease_of(node.match(writer, "a b c")), wrong=(1,))
    assert node.probe(writer, "a b c") == "x.x"
    assert node.books() == {"free": 6, "committed": 2}
    assert node.state.stat().counters["blocks_corrupt"] == 1
    node.publish(writer, "b", parent="a")


def test_complained_bytes_stay_until_the_other_reader_is_done():
    node = NodeDriver()
    writer, other = node.session(), node.session("other")
    node.publish(writer, "a")
    held = lease_of(node.match(other, "a"))
    node.release(writer, lease_of(node.match(writer, "a")), wrong=(0,))
    assert node.probe(writer, "a") == "."
    assert node.num_blocks("committed") == 1
    node.release(other, held)
    assert node.books() == {"free": 8}


def test_complaint_needs_a_lease_and_an_index_of_its_own():
    node = NodeDriver()
    writer, other = node.session(), node.session("other")
    node.publish(writer, "a b")
    lease = lease_of(node.match(writer, "a"))
    node.release(other, lease, wrong=(0,))
    node.release(writer, lease, wrong=(1, 99))
    assert node.probe(writer, "a b") == "xx"


def test_late_complaint_does_not_hit_the_block_that_came_anew():
    node = NodeDriver()
    writer, other = node.session(), node.session("other")
    node.publish(writer, "a")
    late = lease_of(node.match(other, "a"))
    node.release(writer, lease_of(node.match(writer, "a")), wrong=(0,))
    node.publish(writer, "a")
    node.release(other, late, wrong=(0,))
    assert node.probe(writer, "a") == "x"


# --- blocks for one reader, and tails


def test_tail_goes_with_its_reader():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    reserved = node.publish_tail(writer, "r1")
    matched = node.match_tail(reader, "r1")
    assert ranges(matched) == ranges(reserved)
    assert matched.checksums == (record("r1"),)
    node.release(reader, lease_of(matched))
    assert node.books() == {"free": 8}


def test_tail_has_one_reader():
    node = NodeDriver()
    writer, reader, second = node.session(), node.session("reader"), node.session("second")
    node.publish_tail(writer, "r1")
    node.match_tail(reader, "r1")
    with pytest.raises(TailUnknown):
        node.match_tail(second, "r1")


def test_of_two_that_wait_for_a_tail_one_gets_it():
    node = NodeDriver()
    writer, reader, second = node.session(), node.session("reader"), node.session("second")
    calls = [node.call(s, matching_tail("r1", timeout_s=9)) for s in (reader, second)]
    node.publish_tail(writer, "r1")
    assert isinstance(node.answer(reader, calls[0]), Matched)
    assert node.answer(second, calls[1]) is None
    node.wait(9)
    assert isinstance(node.answer(second, calls[1]), TailUnknown)


def test_tail_whose_writer_gave_up_is_unknown_at_once():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    lease = lease_of(node.ask(writer, reserving_tail("r1"), Reserved))
    waiting = node.call(reader, matching_tail("r1", timeout_s=60))
    node.abort(writer, lease)
    assert isinstance(node.answer(reader, waiting), TailUnknown)


def test_tail_goes_with_its_writers_session():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    node.publish_tail(writer, "r1")
    node.end(writer)
    assert node.books() == {"free": 8}
    with pytest.raises(TailUnknown):
        node.match_tail(reader, "r1")


def test_tail_under_a_lease_outlives_its_writer():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    node.publish_tail(writer, "r1")
    lease = lease_of(node.match_tail(reader, "r1"))
    node.end(writer)
    assert node.num_blocks("committed") == 1
    node.release(reader, lease)
    assert node.books() == {"free": 8}


def test_tail_that_nobody_fetches_goes_after_a_while():
    node = NodeDriver(write_lease_s=30, grace_s=10)
    writer = node.session()
    node.publish_tail(writer, "r1")
    node.wait(39.9)
    assert node.num_blocks("committed") == 1
    node.wait(0.1)
    assert node.books() == {"free": 8}


def test_tail_whose_reader_stops_goes_with_the_lease():
    node = NodeDriver(read_lease_s=10, grace_s=5)
    writer, reader = node.session(), node.session("reader")
    node.publish_tail(writer, "r1")
    node.match_tail(reader, "r1")
    node.wait(15)
    assert node.books() == {"free": 8}


def test_request_has_one_tail_at_a_time():
    node = NodeDriver()
    writer, reader = node.session(), node.session("reader")
    node.publish_tail(writer, "r1")
    with pytest.raises(BadRequest, match="'r1' is here already"):
        node.publish_tail(writer, "r1")
    node.release(reader, lease_of(node.match_tail(reader, "r1")))
    node.publish_tail(writer, "r1")


def test_of_two_writers_of_a_tail_the_first_commit_wins():
    node = NodeDriver()
    one, two = node.session("one"), node.session("two")
    leases = [lease_of(node.ask(s, reserving_tail("r1"), Reserved)) for s in (one, two)]
    assert node.commit(two, leases[1], "r1").existing_block_indices == ()
    assert node.commit(one, leases[0], "r1").existing_block_indices == (0,)
    assert node.books() == {"free": 7, "committed": 1}


def test_blocks_for_one_reader_go_when_the_first_reader_releases():
    node = NodeDriver()
    writer, reader, second = node.session(), node.session("reader"), node.session("second")
    node.publish(writer, "a b", one_reader=True)
    first = lease_of(node.match(reader, "a b"))
    other = lease_of(node.match(second, "a"))
    node.release(reader, first)
    assert node.probe(writer, "a b") == ".."
    assert node.num_blocks("committed") == 2  # one segment: it waits for the second reader
    node.release(second, other)
    assert node.books() == {"free": 8}


def test_blocks_for_one_reader_go_with_their_writers_session():
    node = NodeDriver()
    writer = node.session()
    node.publish(writer, "a b", one_reader=True)
    node.end(writer)
    assert node.books() == {"free": 8}
