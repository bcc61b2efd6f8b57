"""Whose turn it is: the lowest traffic class, round robin within it, and nobody who takes nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from types import SimpleNamespace

import pytest

from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import PeerBusy
from snowskin.transport.frames import Fail, encode
from snowskin.transport.grants import GrantTable
from snowskin.transport.memory import Lendable, region_of
from snowskin.transport.tcp import served_transfer, serving_loop
from snowskin.transport.tcp.admission import Admission
from snowskin.transport.tcp.serving import ServedConnection
from snowskin.transport.tcp.serving_loop import Link, ServingLoop
from snowskin.transport.tcp.settings import TcpSettings
from tests.support.raw_tcp import HELLO, RawStream, ask_of

CHUNK_NBYTES = 100_000
NBYTES = 3 * CHUNK_NBYTES
SETTINGS = TcpSettings(chunk_nbytes=CHUNK_NBYTES, lend_from_nbytes=NBYTES)


class Ledger:
    """Counts nothing."""

    def count_served(self, nbytes):
        pass

    def count_served_failed(self):
        pass

    def count_refused(self, reason):
        pass


class WrittenDown:
    """A stream that takes all payload at once, or none, and writes down whose it was."""

    def __init__(self, name, near, order):
        self.name, self.near, self.order = name, near, order
        self.takes = True

    def sendmsg(self, parts, ancillary=(), flags=0, /):
        if not self.takes:
            raise BlockingIOError
        self.order.append(self.name)
        return sum(map(len, parts))

    def __getattr__(self, name):
        return getattr(self.near, name)


class House:
    """A loop whose turns the test takes, and its readers by name."""

    def __init__(self, stack, lending=None):
        self.stack = stack
        self.lends = lending is not None
        self.now_s = 100.0
        self.order = []
        self.admission = Admission(most=99, most_per_peer=99, is_busy=lambda link: link.is_busy)
        self.loop = ServingLoop("never started", self.admission, now_s=lambda: self.now_s)
        self.grants = GrantTable()
        self.descriptor = RegionDescriptor(scheme="tcp", capability=b"c" * 16, nbytes=NBYTES)
        memory = bytearray(NBYTES)
        registered = Lendable(memory=memory, lending=lending) if self.lends else memory
        region = stack.enter_context(region_of(registered))
        self.grants.add(self.descriptor, region, None, now_s=0.0)
        self.links, self.readers = {}, {}
        stack.callback(self.loop.close)

    def add(self, name):
        near, far = socket.socketpair()
        near.setblocking(False)
        self.readers[name] = self.stack.enter_context(RawStream(far))
        served = ServedConnection(
            self.grants,
            SETTINGS,
            Ledger(),
            peer=name,
            now_s=self.now_s,
            may_lend=lambda: self.lends,
        )
        link = Link(WrittenDown(name, near, self.order), served, self.loop, holds_bytes=False)
        self.links[name] = link
        self.admission.enter(link, name)
        self.loop.adopt(link)
        self.readers[name].say(HELLO)
        self.turn()
        self.readers[name].hear()

    def ask(self, name, traffic, nbytes=NBYTES):
        ask = ask_of(self.descriptor, [(0, nbytes)], traffic=traffic, wants_done=self.lends)
        self.readers[name].say(ask)

    def turn(self):
        self.loop.call(lambda: None)  # so that it waits for nothing
        self.loop._turn()

    def turns(self):
        for _ in range(100):
            self.turn()
        return "".join(self.order)


class AllLent:
    """Lends whatever it is asked for."""

    fd = -1

    def lendable(self, offset, nbytes):
        return offset, nbytes

    def lend(self, ranges):
        return SimpleNamespace(ranges=tuple(ranges))

    def settle(self, loan):
        pass

    forsake = settle


@pytest.fixture
def house():
    with contextlib.ExitStack() as stack:
        yield House(stack)


def test_the_most_urgent_go_first_and_those_of_a_class_take_turns(house):
    for name in "abcdef":
        house.add(name)
    for name, traffic in zip("abcdef", (2, 0, 1, 0, 2, 1), strict=True):
        house.ask(name, traffic)
    order = house.turns()
    assert sorted(order[:6]) == list("bbbddd")
    assert order[0] != order[1]
    assert order[:2] * 3 == order[:6]
    assert order[6:8] * 3 == order[6:12]
    assert sorted(order[6:8]) == ["c", "f"]
    assert order[12:14] * 3 == order[12:]
    assert sorted(order[12:14]) == ["a", "e"]


def test_what_is_urgent_overtakes_what_has_begun(house, monkeypatch):
    monkeypatch.setattr("snowskin.transport.tcp.serving_loop.TURN_NBYTES", 1)
    house.add("a")
    house.add("b")
    house.ask("a", 2)
    house.turn()
    house.ask("b", 0)
    assert house.turns() in ("abbbaa", "aabbba")


def test_who_waits_long_for_a_turn_is_not_taken_for_a_peer_that_does_not_move(house, monkeypatch):
    monkeypatch.setattr("snowskin.transport.tcp.serving_loop.TURN_NBYTES", 1)
    house.add("a")
    house.add("b")
    house.ask("a", 2)
    house.turn()
    house.ask("b", 0)
    house.turn()
    house.now_s += SETTINGS.frame_timeout_s + 0.1
    house.turn()
    assert sorted(house.turns()) == list("aaabbb")


def test_a_connection_that_cannot_be_watched_is_ended_and_holds_no_place(house, monkeypatch):
    class Full:
        def register(self, *_):
            raise OSError(28, "No space left on device")

        def unregister(self, *_):
            raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(house.loop, "_epoll", Full())
        near, far = socket.socketpair()
        reader = house.stack.enter_context(RawStream(far))
        served = ServedConnection(house.grants, SETTINGS, Ledger(), peer="a", now_s=house.now_s)
        link = Link(near, served, house.loop, holds_bytes=False)
        house.admission.enter(link, "a")
        house.loop.adopt(link)
    assert (len(house.admission), house.loop.num_links) == (0, 0)
    assert reader.hear() is None


def test_only_who_is_alone_sends_much_by_reference_at_once(monkeypatch):
    asked_for = []

    def sendfile(fd, source, offset, nbytes):
        asked_for.append(nbytes)
        return min(nbytes, 1000)  # and waits until the stream takes more

    monkeypatch.setattr(os, "sendfile", sendfile)
    monkeypatch.setattr(served_transfer, "LENT_NBYTES", 2000)
    monkeypatch.setattr(served_transfer, "LENT_ALONE_NBYTES", 8000)
    with contextlib.ExitStack() as stack:
        house = House(stack, AllLent())
        for name in "ab":
            house.add(name)
        house.ask("a", 0)
        house.turn()
        assert asked_for == [8000]
        house.ask("b", 0)
        house.turn()  # in which both have a turn
        assert sorted(asked_for[1:]) == [2000, 8000]  # the last one has no other behind it


def test_a_small_one_waits_for_nobody(house, monkeypatch):
    monkeypatch.setattr("snowskin.transport.tcp.serving_loop.TURN_NBYTES", 1)
    house.add("a")
    house.add("b")
    house.ask("a", 0)
    house.turn()
    house.ask("b", 2, nbytes=100)
    house.turn()
    assert "b" in house.order[:3]


def test_who_takes_nothing_has_no_turn_until_it_does(house):
    house.add("a")
    house.add("b")
    house.links["a"].stream.takes = False
    house.ask("a", 0)
    house.ask("b", 2)
    assert house.turns() == "bbb"
    assert not house.loop._turns
    house.links["a"].stream.takes = True
    assert house.turns() == "bbbaaa"


def test_what_is_due_is_served_in_its_time_and_nothing_is_due_before(house):
    house.add("a")
    house.now_s += SETTINGS.idle_timeout_s - 0.01
    house.turn()
    assert len(house.admission) == 1
    assert 0 < house.loop._wait_s() < 0.02
    house.now_s += 0.02
    house.turn()
    assert len(house.admission) == 0
    assert house.readers["a"].hear() is None
    assert house.loop._wait_s() == -1


def test_who_is_dropped_hears_why(house):
    house.add("a")
    house.loop.drop(house.links["a"], PeerBusy("no room", retry_after_s=1.0))
    told = house.readers["a"].hear()
    assert isinstance(told, Fail)
    assert (told.reason, told.retry_after_ms) == ("PEER_BUSY", 1000)
    assert house.readers["a"].hear() is None


def test_a_closed_loop_takes_nobody_in(house):
    house.loop.close()
    assert not house.loop.call(lambda: None)
    house.loop.close()


def test_a_request_that_comes_in_pieces_is_served_when_it_is_whole(house):
    house.add("a")
    data = encode(ask_of(house.descriptor, [(0, 1)] * 4096))
    for at in range(0, len(data), 1000):
        house.readers["a"].send(data[at : at + 1000])
        assert not house.order
        house.turn()
    assert house.turns() == "aaaaa"  # 1,023 ranges in each


class Looks:
    """The loop's epoll, which writes down how long each look may wait, in seconds."""

    def __init__(self, epoll, waits):
        self.epoll, self.waits = epoll, waits

    def poll(self, timeout_s, most):
        self.waits.append(timeout_s)
        return self.epoll.poll(timeout_s, most)

    def __getattr__(self, name):
        return getattr(self.epoll, name)


def test_who_is_asked_back_to_back_looks_before_it_sleeps_and_sleeps_once_that_was_in_vain(
    house, monkeypatch
):
    monkeypatch.setattr(serving_loop, "BACK_TO_BACK_S", 0.5)
    house.add("asks")
    waits = []
    house.loop._epoll = Looks(house.loop._epoll, waits)
    house.loop._timers.insert(0, (house.now_s + 0.01, 0, int))  # so that none waits for long

    def slept():
        return [wait_s > 0 for wait_s in waits]

    house.loop._turn()  # in vain, whatever was before
    del waits[:]
    house.ask("asks", 0, nbytes=10)
    house.loop._turn()
    assert slept() == [True], "nobody had asked so soon before"
    del waits[:]
    house.ask("asks", 0, nbytes=10)
    house.loop._turn()
    assert slept() == [False], "it slept, though it had been asked back to back"
    del waits[:]
    house.loop._turn()
    assert slept()[-1], "it looks for ever"
    assert not any(slept()[:-1])
    del waits[:]
    house.loop._turn()
    assert slept() == [True], "it looks on, though that was in vain"


def test_others_run_after_each_piece_and_seldom_where_they_take_long(house, monkeypatch):
    monkeypatch.setattr(serving_loop, "TURN_NBYTES", CHUNK_NBYTES)
    others_take_s = [0.0]
    let_through = []

    def let_others_run():
        let_through.append(len(house.order))
        house.now_s += others_take_s[0]

    monkeypatch.setattr(serving_loop, "_let_others_run", let_others_run)
    house.add("slow")
    house.add("fast")
    house.ask("slow", 0)
    house.ask("fast", 0)
    house.turn()
    house.turn()
    assert let_through == list(range(1, len(house.order) + 1)), "after each piece"

    others_take_s[0] = 0.002
    house.turn()
    del let_through[:]
    house.turn()
    assert not let_through, "they took long, and are let through again at once"
    house.now_s += 32 * 0.002
    house.turn()
    assert len(let_through) == 1
