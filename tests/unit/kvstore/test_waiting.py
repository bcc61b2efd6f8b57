"""The waiting room: found by block, by session, by deadline, in order of arrival."""

from __future__ import annotations

import gc

from snowskin.kvstore.messages import SessionId
from snowskin.kvstore.node.waiting import MAX_STALE, WaitingCall, WaitingRoom, WaitKey
from tests.support.node_driver import matching

A: WaitKey = ("t", b"n", b"a")
B: WaitKey = ("t", b"n", b"b")


def waiting(call_id: int, deadline_s: float, at: WaitKey | None = None, session: int = 1):
    request = matching("a", wait_blocks=1)
    return WaitingCall(SessionId(session), call_id, request, deadline_s, at=at)


def room_of(*calls: WaitingCall) -> WaitingRoom:
    room = WaitingRoom()
    for call in calls:
        room.add(call)
    return room


def test_calls_are_kept_in_order_of_arrival():
    one, two = waiting(1, 9.0), waiting(2, 5.0)
    room = room_of(one, two)
    assert (list(room), len(room)) == ([one, two], 2)
    room.remove(one)
    assert list(room) == [two]
    room.remove(two)
    assert len(room) == 0


def test_calls_may_be_removed_while_they_are_gone_through():
    room = room_of(waiting(1, 9.0), waiting(2, 9.0), waiting(3, 9.0))
    for call in room:
        room.remove(call)
    assert len(room) == 0


def test_commit_finds_only_those_who_wait_for_that_block():
    one, two, three = waiting(1, 9.0, A), waiting(2, 9.0, B), waiting(3, 9.0, A)
    room = room_of(one, two, three)
    assert room.waiting_at(A) == [one, three]
    room.move(one, B)
    assert (room.waiting_at(A), room.waiting_at(B)) == ([three], [two, one])
    room.remove(three)
    assert room.waiting_at(A) == []


def test_moving_to_the_same_block_keeps_the_call():
    one = waiting(1, 9.0, A)
    room = room_of(one)
    room.move(one, A)
    assert room.waiting_at(A) == [one]


def test_session_finds_its_calls():
    one, two = waiting(1, 9.0, session=1), waiting(2, 9.0, session=2)
    room = room_of(one, two)
    assert room.of_session(SessionId(2)) == [two]


def test_overdue_calls_come_once_and_by_deadline():
    one, two, three = waiting(1, 9.0), waiting(2, 5.0), waiting(3, 5.0)
    room = room_of(one, two, three)
    assert room.next_deadline_s() == 5.0
    assert room.overdue(4.9) == []
    assert room.overdue(5.0) == [two, three]
    assert room.overdue(5.0) == []
    assert room.next_deadline_s() == 9.0


def test_answered_call_has_no_deadline_any_more():
    one, two = waiting(1, 5.0), waiting(2, 9.0)
    room = room_of(one, two)
    room.remove(one)
    assert room.next_deadline_s() == 9.0
    assert room.overdue(7.0) == []
    room.remove(two)
    assert (room.next_deadline_s(), room.overdue(99.0)) == (None, [])


def test_calls_that_are_over_are_not_kept_behind_one_that_waits_on():
    room = room_of(waiting(1, 5.0))
    for call_id in range(2, 1000):
        call = waiting(call_id, 600.0)
        room.add(call)
        room.remove(call)
    gc.collect()
    assert sum(type(thing) is WaitingCall for thing in gc.get_objects()) <= MAX_STALE + 4
    assert room.next_deadline_s() == 5.0
