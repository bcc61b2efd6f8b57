"""How a `tcp` reader waits: not in a loop, not beyond its deadline, not as often as an owner would like; and what it
does not wait for, because it will not come.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.api import Run
from snowskin.transport.errors import (
    PeerLost,
    TransferTimedOut,
    TransportClosed,
    TransportUnavailable,
)
from snowskin.transport.frames import Data, Fail, Hello, Ping, encode
from snowskin.transport.tcp.connection import MIN_HEARTBEAT_S
from snowskin.transport.tcp.keeper import Keeper
from snowskin.transport.tcp.transport import NUM_DIALING, TcpTransport
from tests.support.raw_tcp import WELCOME, RawOwner, changed, greeted, next_ask
from tests.support.waiting import eventually

NBYTES, WITHIN_S = 4096, 5.0
RUNS = [Run(0, 0, 1000)]


def answer(stream, ask):
    stream.send(encode(Data(op=ask.op, nbytes=1000)) + bytes(1000))


class Rig:
    """A reader of one owner, that counts how often it looks at the clock."""

    def __init__(self, owner):
        self.num_looks = 0
        self.transport = TcpTransport(now_s=self.now_s)
        self.local = self.transport.register(np.zeros(NBYTES, np.uint8))
        self.remote = self.transport.attach(owner.descriptor(NBYTES))

    def now_s(self):
        self.num_looks += 1
        return time.monotonic()

    def pull(self, within_s=WITHIN_S):
        deadline_s = time.monotonic() + within_s
        self.transport.pull(self.remote, self.local, RUNS, deadline_s=deadline_s)

    def pull_on_a_loop(self):
        deadline_s = time.monotonic() + WITHIN_S
        asyncio.run(self.transport.pull_async(self.remote, self.local, RUNS, deadline_s=deadline_s))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.transport.close()
        self.local.close()


def test_a_thread_sleeps_while_it_waits_on_a_connection_that_a_loop_has_used():
    def serve(stream):
        answer(stream, greeted(stream))
        ask = next_ask(stream)
        time.sleep(0.3)
        answer(stream, ask)
        next_ask(stream)

    with RawOwner(serve) as owner, Rig(owner) as rig:
        rig.pull_on_a_loop()
        rig.num_looks = 0
        rig.pull()
        assert rig.num_looks < 50
        assert owner.num_connections == 1


@pytest.mark.parametrize("in_head", [True, False])
def test_an_owner_that_drips_a_refusal_is_left_at_the_deadline(in_head):
    refusal = encode(Fail(op=1, reason="GRANT_REFUSED", retry_after_ms=0, message="x" * 900))

    def serve(stream):
        if greeted(stream) is None:
            return
        if not in_head:
            stream.send(refusal[:16])
        for value in refusal[0 if in_head else 16 :]:
            stream.send(bytes([value]))
            if stream.is_over(0.045):
                return

    with RawOwner(serve) as owner, Rig(owner) as rig:
        began_s = time.monotonic()
        with pytest.raises(TransferTimedOut):
            rig.pull(within_s=0.3)
        assert time.monotonic() < began_s + 0.5


def test_an_owner_without_any_patience_makes_nobody_speak_without_end():
    num_pings = 0

    def serve(stream):
        nonlocal num_pings
        assert isinstance(stream.hear(), Hello)
        stream.say(replace(WELCOME, idle_timeout_ms=1))
        answer(stream, next_ask(stream))
        while isinstance(frame := stream.hear(), Ping):
            num_pings += 1
            stream.send(encode(frame).replace(b"\x09", b"\x0a", 1))

    with RawOwner(serve) as owner, Rig(owner) as rig:
        rig.pull()
        time.sleep(0.5)
        assert num_pings <= 0.5 / (0.75 * MIN_HEARTBEAT_S)


@contextlib.contextmanager
def nowhere():
    """An address that answers nobody: a listener that is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield Reachability(addresses=(Address(*listener.getsockname()),)).to_bytes()


@pytest.mark.parametrize("num_lost", [1, NUM_DIALING])
def test_owners_that_cannot_be_reached_hold_up_nobody_beyond_the_deadline(num_lost):
    """16 pulls of one such owner: a living one is reached at once. Of very many: the deadline holds."""

    def serve(stream):
        with contextlib.suppress(AssertionError):  # one whose deadline came first says no HELLO
            if (ask := greeted(stream)) is not None:
                answer(stream, ask)

    async def pull(rig, remote, within_s):
        deadline_s = time.monotonic() + within_s
        await rig.transport.pull_async(remote, rig.local, RUNS, deadline_s=deadline_s)

    async def pull_behind_the_lost(rig, lost):
        lost = [rig.transport.attach(each) for each in lost]
        dialing = [asyncio.ensure_future(pull(rig, each, 1.0)) for each in lost]
        await asyncio.sleep(0.05)
        began_s = time.monotonic()
        with contextlib.suppress(TransferTimedOut):
            await pull(rig, rig.remote, 0.2)
        took_s = time.monotonic() - began_s
        for each in lost:
            each.close()
        await asyncio.gather(*dialing, return_exceptions=True)
        return took_s

    with RawOwner(serve) as owner, Rig(owner) as rig, nowhere() as extra:
        found = Reachability.from_bytes(extra).addresses[0]
        lost = [
            # Ports beside each other would be others' own; more addresses make it another owner.
            Reachability(addresses=(found,) * (1 + index % 16)).to_bytes()
            for index in range(num_lost)
        ]
        descriptors = [changed(owner.descriptor(NBYTES), extra=each) for each in lost]
        if num_lost == 1:
            descriptors *= 16
        assert asyncio.run(pull_behind_the_lost(rig, descriptors)) < 0.4


@pytest.mark.parametrize("way", ["reset", "end"])
def test_a_note_that_its_owner_does_not_wait_for_is_no_success(way):
    has_ended = threading.Event()

    def serve(stream):
        if (ask := greeted(stream)) is not None:
            answer(stream, ask)
            stream.reset() if way == "reset" else stream.socket.shutdown(socket.SHUT_RDWR)
        has_ended.set()

    def landed(_offset, _nbytes):
        assert has_ended.wait(WITHIN_S)
        time.sleep(0.02)

    with RawOwner(serve) as owner, Rig(owner) as rig, pytest.raises(PeerLost):
        rig.transport.pull(
            rig.remote,
            rig.local,
            RUNS,
            deadline_s=time.monotonic() + WITHIN_S,
            note=b"all here",
            landed=landed,
        )


@pytest.mark.parametrize("what", ["socket.socket", "select.epoll", "os.eventfd"])
def test_who_is_out_of_descriptors_says_so_and_goes_on_when_there_are_some(what, monkeypatch):
    def serve(stream):
        ask = greeted(stream)
        while ask is not None:
            answer(stream, ask)
            ask = next_ask(stream)

    def refuse(*_values, **_names):
        raise OSError(errno.EMFILE, "Too many open files")

    with RawOwner(serve) as owner:
        with Rig(owner) as rig:
            with monkeypatch.context() as patch:
                module = "dialing.socket.socket" if what == "socket.socket" else f"keeper.{what}"
                patch.setattr(f"snowskin.transport.tcp.{module}", refuse)
                with pytest.raises(TransportUnavailable, match="Too many open files"):
                    rig.pull()
            assert rig.transport.statistics().num_connections == 0
            rig.pull()
            assert rig.transport.statistics().num_connections == 1
        assert rig.transport.statistics().num_connections == 0


def test_a_transport_that_is_closed_counts_no_connection_that_was_wanted_too_late():
    with RawOwner(lambda stream: stream.hear()) as owner, Rig(owner) as rig:
        link = rig.remote.link
        rig.transport.close()
        with pytest.raises(TransportClosed):
            link.connect_any(rig)
        assert link.num_open == 0


@pytest.mark.parametrize("is_seen_by_keeper", [False, True])
def test_an_owner_that_went_is_counted_once_whoever_meets_it_first(is_seen_by_keeper, monkeypatch):
    if not is_seen_by_keeper:
        monkeypatch.setattr(Keeper, "_look", lambda keeper, fd: None)

    def serve_once(stream):
        answer(stream, greeted(stream))
        next_ask(stream)

    with contextlib.ExitStack() as living:
        owner = living.enter_context(RawOwner(serve_once))
        with Rig(owner) as rig:
            rig.pull()
            living.close()
            for _ in range(2):
                with pytest.raises(PeerLost):
                    rig.pull()
            assert rig.transport.statistics().num_peers_lost == 1


def test_an_owner_that_went_is_counted_once_though_two_pulls_met_its_end_one_after_the_other():
    asked, cut = threading.Semaphore(0), [threading.Event(), threading.Event()]

    def begin(stream):
        ask = greeted(stream)
        stream.send(encode(Data(op=ask.op, nbytes=1000)) + bytes(10))
        mine = cut[0 if stream is owner._streams[0] else 1]
        asked.release()
        mine.wait(WITHIN_S)

    with contextlib.ExitStack() as living:
        owner = living.enter_context(RawOwner(begin))
        with Rig(owner) as rig:
            errors = []

            def pull():
                try:
                    rig.pull()
                except PeerLost as error:
                    errors.append(error)

            pulls = [threading.Thread(target=pull) for _ in cut]
            for thread in pulls:
                thread.start()
                assert asked.acquire(timeout=WITHIN_S)
            owner.stop_listening()
            for number, ended in enumerate(cut, 1):
                ended.set()
                eventually(lambda number=number: len(errors) == number, WITHIN_S)
            for thread in pulls:
                thread.join(WITHIN_S)
            assert rig.transport.statistics().num_peers_lost == 1


def test_of_idle_connections_the_oldest_is_used_first():
    barrier, num_asked = threading.Barrier(3), []

    def serve(stream):
        number = len(num_asked)
        num_asked.append(0)
        ask = greeted(stream)
        barrier.wait(WITHIN_S)
        while ask is not None:
            answer(stream, ask)
            num_asked[number] += 1
            ask = next_ask(stream)

    with RawOwner(serve) as owner, Rig(owner) as rig:
        pulls = [threading.Thread(target=rig.pull) for _ in range(3)]
        for number, thread in enumerate(pulls, 1):
            thread.start()
            eventually(lambda number=number: len(num_asked) == number, WITHIN_S)
        for thread in pulls:
            thread.join(WITHIN_S)
        for _ in range(4):
            rig.pull()
    assert num_asked == [5, 1, 1]


def test_an_owner_that_was_never_reached_is_not_lost():
    with RawOwner(lambda stream: None) as owner:
        pass
    with Rig(owner) as rig, pytest.raises(PeerLost):
        rig.pull()
    assert rig.transport.statistics().num_peers_lost == 0
