"""The queue before a full pool: client by client, in turn; and what it costs while nothing changes."""

from __future__ import annotations

import pytest

from snowskin.kvstore.errors import LimitExceeded, PoolExhausted
from snowskin.kvstore.messages import LeaseId, Matched, RenewRequest, Reserved
from snowskin.kvstore.node.residence import Residence
from snowskin.kvstore.node.writing import Writing
from tests.support.node_driver import NodeDriver, lease_of, matching, reserving

WAIT_S = 60.0


class Crowd:
    """A pool of one block, held by its owner, and clients that queue for it."""

    def __init__(self) -> None:
        self.node = NodeDriver(blocks=1)
        self.owner = self.node.session("owner")
        self.lease = lease_of(self.node.reserve(self.owner, "o"))
        self.calls: dict[tuple, str] = {}

    def queue(self, session, *names: str):
        for name in names:
            call_id = self.node.call(session, reserving(name, timeout_s=WAIT_S))
            self.calls[session.id, call_id] = name
        return session

    def order(self) -> str:
        """Who gets the block, one after the other, each giving it back at once."""
        served = []
        self.node.abort(self.owner, self.lease)
        while True:
            new = [asked for asked in self.node.answers if asked in self.calls]
            if not new:
                return " ".join(served)
            (asked,) = new
            reserved = self.node.answers.pop(asked)
            assert isinstance(reserved, Reserved)
            served.append(self.calls.pop(asked))
            session = self.node.state.sessions.get(asked[0])
            assert session is not None
            self.node.abort(session, lease_of(reserved))


def test_clients_are_served_in_turn_and_each_in_the_order_of_asking():
    crowd = Crowd()
    for name in "abc":
        crowd.queue(crowd.node.session(name), *(f"{name}{i}" for i in range(3)))
    assert crowd.order() == "a0 b0 c0 a1 b1 c1 a2 b2 c2"


def test_a_client_with_a_hundred_reservations_holds_up_another_by_one():
    crowd = Crowd()
    crowd.queue(crowd.node.session("greedy"), *(f"g{i}" for i in range(100)))
    crowd.queue(crowd.node.session("modest"), "m0", "m1")
    assert crowd.order().startswith("g0 m0 g1 m1 g2 g3")


def test_who_comes_back_after_its_turn_stands_behind_all_who_wait():
    crowd = Crowd()
    first, second = crowd.node.session("first"), crowd.node.session("second")
    crowd.queue(first, "a")
    crowd.queue(second, "b", "c")
    crowd.node.abort(crowd.owner, crowd.lease)
    ((asked, reserved),) = [(k, v) for k, v in crowd.node.answers.items() if k in crowd.calls]
    assert crowd.calls.pop(asked) == "a"
    crowd.node.answers.pop(asked)
    crowd.queue(first, "d")
    assert isinstance(reserved, Reserved)
    crowd.owner, crowd.lease = first, lease_of(reserved)
    assert crowd.order() == "b d c"


@pytest.mark.parametrize("how", ["cancelled", "gone"])
def test_who_leaves_before_its_turn_costs_nobody_a_turn(how):
    crowd = Crowd()
    leaver = crowd.node.session("leaver")
    call = crowd.node.call(leaver, reserving("x", timeout_s=WAIT_S))
    crowd.queue(crowd.node.session("a"), "a0", "a1")
    crowd.queue(crowd.node.session("b"), "b0")
    if how == "cancelled":
        crowd.node.cancel(leaver, call)
    else:
        crowd.node.end(leaver)
    assert crowd.order() == "a0 b0 a1"


def test_whose_turn_it_is_nobody_overtakes_with_less():
    node = NodeDriver(blocks=4)
    owner, large, small = (node.session(name) for name in ("owner", "large", "small"))
    lease = lease_of(node.reserve(owner, "a b c"))
    calls = [
        node.call(large, reserving("p q", timeout_s=WAIT_S)),
        node.call(small, reserving("r", timeout_s=WAIT_S)),
    ]
    assert node.answer(small, calls[1]) is None  # it would fit
    node.abort(owner, lease)
    assert all(
        isinstance(node.answers[s.id, c], Reserved)
        for s, c in zip((large, small), calls, strict=True)
    )


def test_one_client_fills_half_of_the_queue_and_no_more():
    node = NodeDriver(blocks=1, max_waiting=8, max_waiting_per_session=4)
    greedy, modest = node.session("greedy"), node.session("modest")
    node.reserve(greedy, "o")
    for i in range(4):
        node.call(greedy, reserving(f"g{i}", timeout_s=WAIT_S))
    with pytest.raises(LimitExceeded, match="4 of them of 'greedy'"):
        node.ask(greedy, reserving("x", timeout_s=WAIT_S), Reserved)
    node.call(modest, reserving("m", timeout_s=WAIT_S))
    for i in range(4):
        node.call(greedy, matching(f"w{i}", wait_blocks=1, timeout_s=60))
    with pytest.raises(LimitExceeded, match="4 matches wait already, 4 of them"):
        node.ask(greedy, matching("y", wait_blocks=1, timeout_s=60), Matched)


# --- what waiting costs


def test_nothing_is_tried_again_while_nothing_has_changed(monkeypatch):
    node = NodeDriver(blocks=3)
    client, other = node.session("client"), node.session("other")
    node.publish(client, "a b")
    held = lease_of(node.match(client, "a b"))
    owned = lease_of(node.reserve(other, "o"))
    waiting = node.call(client, reserving("x y", timeout_s=WAIT_S))
    behind = node.call(other, reserving("z", timeout_s=WAIT_S))
    tries = []
    real = Writing._try_reserve

    def try_reserve(self, *args, **kwargs):
        tries.append(args)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Writing, "_try_reserve", try_reserve)
    for _ in range(10):
        node.probe(client, "a b c")
        node.ask(client, RenewRequest(lease_ids=(held,), ttl_s=5), object)
        node.release(other, LeaseId(9999))
        node.release(other, lease_of(node.match(other, "a")))  # another one's lease is on it still
        node.cancel(other, node.call(other, matching("q", wait_blocks=1, timeout_s=9)))
        node.end(node.session("passer-by"))
        node.wait(0.1)
    assert tries == []
    node.release(client, held)
    assert isinstance(node.answer(client, waiting), Reserved)
    assert len(tries) == 2  # the one, and the one behind it, for which there is no room now
    assert node.answer(other, behind) is None
    node.abort(other, owned)
    assert isinstance(node.answer(other, behind), Reserved)


def test_a_look_in_vain_takes_nothing_out_and_ages_nothing(monkeypatch):
    node = NodeDriver(blocks=5)
    client = node.session("client")
    node.publish(client, "s", one_reader=True)
    for name in "xyz":
        node.publish(client, name)
    node.publish(client, "w")
    evicted = []
    real = Residence._evict

    def evict(self, entry):
        evicted.append(entry.key[:1].decode())
        real(self, entry)

    monkeypatch.setattr(Residence, "_evict", evict)
    for _ in range(3):
        with pytest.raises(PoolExhausted):
            node.reserve(client, "p q r t u")
        node.release(client, lease_of(node.match(client, "w")))
    assert evicted == []
    node.release(client, lease_of(node.match(client, "x")))
    node.publish(client, "p q")
    node.publish(client, "r t")
    assert evicted == ["y", "z", "w", "x"]


# --- blocks for one reader whom nobody sees


def test_a_block_unread_for_as_long_as_a_reader_may_hold_it_makes_room():
    node = NodeDriver(blocks=2, read_lease_s=5, write_lease_s=60)
    writer, client = node.session("writer"), node.session("client")
    node.publish(writer, "s", one_reader=True)
    node.wait(2)
    node.publish(writer, "t", one_reader=True)
    call = node.call(client, reserving("x", timeout_s=WAIT_S))
    node.wait(2.9)
    assert node.answer(client, call) is None
    node.wait(0.1)
    assert isinstance(node.answer(client, call), Reserved)
    assert node.probe(client, "s t") == ".x"
    assert node.state.stat().counters["blocks_evicted_unread"] == 1


def test_who_queues_behind_blocks_that_are_unread_for_long_already_wakes_nobody_for_them():
    node = NodeDriver(blocks=2, read_lease_s=5, write_lease_s=60)
    writer, client = node.session("writer"), node.session("client")
    node.publish(writer, "s", one_reader=True)
    lease = lease_of(node.reserve(writer, "o"))
    node.wait(6)
    call = node.call(client, reserving("x y", timeout_s=WAIT_S))
    due_s = node.state.next_time_s()
    assert due_s is not None
    assert due_s > node.now_s
    node.abort(writer, lease)
    assert isinstance(node.answer(client, call), Reserved)


def test_who_joins_the_queue_takes_from_nobody_the_news_that_a_block_is_unread_for_long():
    node = NodeDriver(blocks=1, read_lease_s=5, write_lease_s=60)
    writer, first, second = (node.session(name) for name in ("writer", "first", "second"))
    node.publish(writer, "s", one_reader=True)
    call = node.call(first, reserving("x", timeout_s=WAIT_S))
    node.now_s += 5.1  # the node is busy, and has not looked at its clock yet
    node.call(second, reserving("y", timeout_s=WAIT_S))
    node.take(node.state.on_time(node.now_s))
    assert isinstance(node.answer(first, call), Reserved)


def test_unread_blocks_go_last_and_only_as_many_as_are_needed():
    node = NodeDriver(blocks=4, read_lease_s=5)
    writer = node.session("writer")
    node.publish(writer, "s t", one_reader=True)
    node.publish(writer, "a b")
    node.wait(6)
    node.publish(writer, "x")
    node.publish(writer, "y")
    assert node.probe(writer, "s t a b x y") == "xx..xx"
    node.publish(writer, "p q r")
    assert node.probe(writer, "s t x y") == ".x.."


def test_unread_blocks_are_not_given_up_in_vain():
    node = NodeDriver(blocks=3, read_lease_s=5, grace_s=10)
    writer = node.session("writer")
    node.publish(writer, "s", one_reader=True)
    node.publish(writer, "a")
    node.match(writer, "a")
    node.wait(6)
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "x y z")
    assert node.probe(writer, "s a") == "xx"


def test_what_is_being_read_is_not_unread():
    node = NodeDriver(blocks=1, read_lease_s=5, grace_s=60, write_lease_s=60)
    writer, reader = node.session("writer"), node.session("reader")
    node.publish_tail(writer, "r")
    node.wait(4.9)
    lease = lease_of(node.match_tail(reader, "r"))
    node.wait(3)
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "x")
    node.release(reader, lease)
    node.reserve(writer, "x")


# --- what quarantine leaves


def test_who_needs_what_is_in_quarantine_waits_for_it_and_holds_up_nobody():
    node = NodeDriver(blocks=4, write_lease_s=2, grace_s=1)
    late, large, small = (node.session(name) for name in ("late", "large", "small"))
    lease = lease_of(node.reserve(late, "a b"))
    call = node.call(large, reserving("p q r", timeout_s=WAIT_S))
    behind = node.call(small, reserving("s", timeout_s=WAIT_S))
    node.wait(2.9)
    assert node.answer(small, behind) is None
    node.wait(0.1)
    assert node.books() == {"free": 1, "quarantined": 2, "reserved": 1}
    served = node.answer(small, behind)
    assert isinstance(served, Reserved)
    node.abort(small, lease_of(served))
    node.publish(small, "t")  # nor does it hold up who comes later
    assert node.answer(large, call) is None
    node.abort(late, lease)
    assert isinstance(node.answer(large, call), Reserved)


def test_nothing_is_kept_of_blocks_that_their_reader_has_read():
    node = NodeDriver(blocks=2, write_lease_s=600, lease_life_s=600)
    node.checks_books = False
    writer, reader = node.session("writer"), node.session("reader")
    for index in range(500):
        node.publish(writer, f"s{index}", one_reader=True)
        node.release(reader, lease_of(node.match(reader, f"s{index}")))
    unread = node.state._writing.unread
    assert (len(unread), len(list(unread)), len(unread._long_at)) == (0, 0, 1)
    assert node.state.holds_nothing(writer.id)
