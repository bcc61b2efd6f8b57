"""Who may stay when an owner is full."""

from __future__ import annotations

import pytest

from snowskin.transport.errors import PeerBusy
from snowskin.transport.tcp.admission import Admission


@pytest.fixture
def busy():
    return set()


@pytest.fixture
def house(busy):
    return Admission(most=4, most_per_peer=2, is_busy=busy.__contains__)


def test_who_comes_to_a_full_house_takes_the_place_of_the_oldest_that_did_nothing(house):
    for guest, peer in (("a", "x"), ("b", "y"), ("c", "z"), ("d", "z")):
        assert house.enter(guest, peer) is None
    house.prove("a")
    assert house.enter("e", "w") == "b"
    assert len(house) == 4


def test_who_comes_from_a_crowded_address_takes_a_place_of_that_address(house):
    house.enter("a", "x")
    house.enter("b", "y")
    house.enter("c", "y")
    assert house.enter("d", "y") == "b"
    assert len(house) == 3


def test_who_is_at_work_stays(house, busy):
    house.enter("a", "x")
    house.enter("b", "x")
    busy.add("a")
    assert house.enter("c", "x") == "b"
    house.prove("c")
    with pytest.raises(PeerBusy, match="2 connections from x"):
        house.enter("d", "x")
    busy.clear()
    assert house.enter("d", "x") == "a"


def test_a_house_full_of_readers_at_work_refuses(house):
    for guest in "abcd":
        house.enter(guest, guest)
        house.prove(guest)
    with pytest.raises(PeerBusy, match="4 connections in all") as refusal:
        house.enter("e", "e")
    assert refusal.value.retry_after_s
    assert house.make_room() is None
    house.leave("b")
    assert house.enter("e", "e") is None


def test_who_left_counts_no_more_and_may_leave_twice(house):
    house.enter("a", "x")
    house.leave("a")
    house.leave("a")
    house.prove("a")
    assert len(house) == 0
    for guest in "bc":
        assert house.enter(guest, "x") is None
    assert house.make_room() == "b"
    assert len(house) == 1


def test_who_was_refused_leaves_no_trace(house):
    for guest in "ab":
        house.enter(guest, "x")
        house.prove(guest)
    with pytest.raises(PeerBusy):
        house.enter("c", "x")
    assert len(house) == 2
    house.leave("a")
    house.leave("b")
    assert len(house) == 0
    assert not house._by_peer
