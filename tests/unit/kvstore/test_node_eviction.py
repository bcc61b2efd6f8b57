"""Eviction as a node does it: leaf first, least recently used first, never under a lease, and never in vain."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from snowskin.kvstore.errors import PoolExhausted
from snowskin.kvstore.messages import Reserved
from tests.support.node_driver import (
    BLOCK,
    OTHER_NAMESPACE,
    NodeDriver,
    lease_of,
    reserving,
)


def test_leaf_leaves_before_its_prefix():
    node = NodeDriver(blocks=3)
    writer = node.session()
    node.publish(writer, "a b c")
    node.publish(writer, "x")
    assert node.probe(writer, "a b c x") == "xx.x"
    assert node.state.stat().counters["blocks_evicted"] == 1


def test_least_recently_matched_leaves_first():
    node = NodeDriver(blocks=3)
    writer = node.session()
    for name in "abc":
        node.publish(writer, name)
    node.release(writer, lease_of(node.match(writer, "a")))
    node.publish(writer, "x")
    assert node.probe(writer, "a b c x") == "x.xx"


def test_probe_touches_no_recency_and_pins_nothing():
    node = NodeDriver(blocks=2)
    writer = node.session()
    node.publish(writer, "a")
    node.publish(writer, "b")
    node.probe(writer, "a")
    assert node.num_blocks("leased") == 0
    node.publish(writer, "x")
    assert node.probe(writer, "a b") == ".x"


def test_leased_blocks_stay_whatever_is_wanted():
    node = NodeDriver(blocks=3)
    writer = node.session()
    node.publish(writer, "a")
    lease = lease_of(node.match(writer, "a"))
    node.publish(writer, "x")
    node.publish(writer, "y")
    node.publish(writer, "z")
    assert node.probe(writer, "a x y z") == "x.xx"
    node.release(writer, lease)
    node.publish(writer, "u v w")
    assert node.probe(writer, "a y z") == "..."


def test_leased_blocks_stay_until_lease_and_grace_are_over():
    node = NodeDriver(blocks=1, read_lease_s=10, grace_s=5)
    writer = node.session()
    node.publish(writer, "a")
    node.match(writer, "a")
    node.wait(14.9)
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "b")
    node.wait(0.1)
    node.reserve(writer, "b")


def test_call_that_cannot_be_served_evicts_nothing():
    node = NodeDriver(blocks=4)
    writer = node.session()
    node.publish(writer, "a")
    node.match(writer, "a")
    node.publish(writer, "x y")
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "p q r s")
    assert node.probe(writer, "a x y") == "xxx"


def test_blocks_for_one_reader_are_no_promise_of_room():
    node = NodeDriver(blocks=3)
    writer = node.session()
    node.publish(writer, "s t", one_reader=True)
    node.publish(writer, "x")
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "p q")
    assert node.probe(writer, "s t x") == "xxx"


def test_prefix_of_a_leased_block_is_no_promise_of_room():
    node = NodeDriver(blocks=3)
    writer = node.session()
    node.publish(writer, "a")
    node.publish(writer, "b", parent="a")
    node.publish(writer, "x")
    node.match(writer, "b")  # a has no lease, but it is no leaf
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "p q")
    assert node.probe(writer, "a b x") == "xxx"
    node.reserve(writer, "p")
    assert node.probe(writer, "a b x") == "xx."


def test_order_of_leaving_outlives_a_call_that_could_not_be_served():
    node = NodeDriver(blocks=4)
    writer = node.session()
    node.publish(writer, "s", one_reader=True)
    for name in "xyz":
        node.publish(writer, name)
    node.release(writer, lease_of(node.match(writer, "x")))
    with pytest.raises(PoolExhausted):
        node.reserve(writer, "p q r u")
    node.publish(writer, "p")
    node.publish(writer, "q")
    assert node.probe(writer, "x y z") == "x.."


def test_huge_reservation_evicts_all_that_it_may():
    node = NodeDriver(blocks=6)
    writer = node.session()
    node.publish(writer, "a b c")
    node.publish(writer, "d e", parent="c")
    node.publish(writer, "x")
    node.reserve(writer, "p q r s t u")
    assert node.books() == {"reserved": 6}
    assert node.state.stat().num_blocks == 0


def test_blocks_of_several_sizes_share_a_pool():
    node = NodeDriver(blocks=4)
    writer = node.session()
    node.publish(writer, "a b c d")
    large = reserving("l", block_nbytes=2 * BLOCK, namespace=OTHER_NAMESPACE)
    lease = lease_of(node.ask(writer, large, Reserved))
    assert node.probe(writer, "a b c d") == "xx.."
    node.commit(writer, lease, "l")
    assert node.books() == {"committed": 4}


def test_one_tenant_evicts_nothing_of_another():
    node = NodeDriver(blocks=1, tenants=("default", "other"))
    writer, stranger = node.session(), node.session("stranger", tenant="other")
    node.publish(stranger, "s")
    node.publish(writer, "a")
    node.publish(writer, "b")
    assert (node.probe(stranger, "s"), node.probe(writer, "a b")) == ("x", ".x")


def test_parents_that_go_round_in_a_circle_over_several_reservations_leave_as_others_do():
    node = NodeDriver(blocks=3)
    writer = node.session()
    node.publish(writer, "a", parent="c")
    node.publish(writer, "b", parent="a")
    node.publish(writer, "c", parent="b")
    node.reserve(writer, "p q r")
    assert node.books() == {"reserved": 3}


def test_namespaces_that_nobody_has_anything_in_are_forgotten():
    node = NodeDriver(blocks=2)
    writer = node.session()
    for number in range(50):
        node.publish(writer, "a", namespace=number.to_bytes(32, "big"))
        lease = lease_of(node.reserve(writer, "b", namespace=(100 + number).to_bytes(32, "big")))
        node.abort(writer, lease)
    assert len(node.state.residence.index._scopes) == 1


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_probing_a_hundred_times_as_often_as_reading_changes_nothing_of_what_is_evicted(data):
    """The same acts with and without probes: the same blocks leave, in the same order."""
    names = [f"{chain}{i}" for chain in "abc" for i in range(4)]
    act = st.tuples(st.sampled_from(["publish", "match"]), st.sampled_from(names))
    acts = data.draw(st.lists(act, min_size=10, max_size=40))
    asked = data.draw(st.lists(st.sampled_from(names), min_size=100, max_size=100))
    assert leaving(acts, probes=[]) == leaving(acts, probes=asked)


def leaving(acts: list[tuple[str, str]], *, probes: list[str]) -> list[tuple[str, ...]]:
    """Which blocks are gone after each act; the pool holds a third of all blocks."""
    node = NodeDriver(blocks=4)
    node.checks_books = False
    writer, prober = node.session(), node.session("prober")
    gone: list[tuple[str, ...]] = []
    here: set[str] = set()
    for what, name in acts:
        if what == "publish" and name not in here:
            parent = f"{name[0]}{int(name[1]) - 1}" if name[1] != "0" else ""
            node.publish(writer, name, parent=parent)
            here.add(name)
        elif what == "match":
            matched = node.match(writer, name)
            if matched.lease is not None:
                node.release(writer, matched.lease.id)
        for asked in probes:
            node.probe(prober, asked)
        left = {name for name in here if node.probe(writer, name) == "."}
        gone.append(tuple(sorted(left)))
        here -= left
    node.check()
    return gone
