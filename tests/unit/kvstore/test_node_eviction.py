"""Eviction as a node does it: leaf first, least recently used first, never under a lease, and never in vain."""

from __future__ import annotations

import pytest

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
