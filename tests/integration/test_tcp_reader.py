"""The reader's side of `tcp` against owners that do as they are told: connections, requests, waiting and its end."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from snowskin.transport.api import Run, TrafficClass, TransferControl
from snowskin.transport.errors import (
    GrantRefused,
    LandingQuarantined,
    PeerLost,
    TransferCancelled,
    TransferTimedOut,
    TransportClosed,
)
from snowskin.transport.frames import Clear, Data, Done, Fail, Hello, Ping, encode
from snowskin.transport.tcp import connection as tcp_connection
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.transport import TcpTransport
from tests.support.raw_tcp import WELCOME, RawOwner, greeted, next_ask
from tests.support.waiting import eventually

NBYTES, WITHIN_S, AT_ONCE_S = 1 << 20, 5.0, 0.5
SOURCE = np.random.default_rng(5).integers(0, 256, NBYTES, dtype=np.uint8)


def answer(stream, ask, *, nbytes=None):
    """The DATA of a PULL, as one frame; the first `nbytes` of it where the rest is to be missing."""
    payload = b"".join(SOURCE[offset : offset + size].tobytes() for offset, size in ask.ranges)
    stream.send(encode(Data(op=ask.op, nbytes=len(payload))) + payload[:nbytes])


def serve_all(stream):
    ask = greeted(stream)
    while ask is not None:
        answer(stream, ask)
        ask = next_ask(stream)


class Script:
    """An owner that serves its n-th connection by the n-th function, and keeps what it was asked."""

    def __init__(self, *connections):
        self.connections = connections
        self.asked = []

    def __call__(self, stream):
        index = min(len(self.asked), len(self.connections) - 1)
        mine = []
        self.asked.append(mine)
        self.connections[index](stream, mine)


class Rig:
    """A reader of a scripted owner."""

    def __init__(self, owner, **settings):
        self.transport = TcpTransport(TcpSettings(**settings))
        self.target = np.zeros(NBYTES, np.uint8)
        self.local = self.transport.register(self.target)
        self.remote = self.transport.attach(owner.descriptor(NBYTES, writable=True), writable=True)

    def pull(self, *runs, within_s=WITHIN_S, **values):
        runs = runs or (Run(0, 0, 1000),)
        deadline_s = time.monotonic() + within_s
        return self.transport.pull(self.remote, self.local, runs, deadline_s=deadline_s, **values)

    async def pull_async(self, *runs, within_s=WITHIN_S, **values):
        deadline_s = time.monotonic() + within_s
        return await self.transport.pull_async(
            self.remote, self.local, runs or (Run(0, 0, 1000),), deadline_s=deadline_s, **values
        )

    def push(self, *runs, within_s=WITHIN_S, **values):
        deadline_s = time.monotonic() + within_s
        return self.transport.push(
            self.local, self.remote, runs or (Run(0, 0, 1000),), deadline_s=deadline_s, **values
        )

    def holds(self, *runs):
        return all(
            np.array_equal(self.target[here : here + size], SOURCE[there : there + size])
            for there, here, size in runs or (Run(0, 0, 1000),)
        )

    @property
    def statistics(self):
        return self.transport.statistics()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.transport.close()
        self.local.close()


class InThread:
    """A transfer in a thread of its own; what came of it."""

    def __init__(self, transfer):
        self.error = None
        self._transfer = transfer
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self._transfer()
        except Exception as error:  # noqa: BLE001  whatever it is, the test looks at it
            self.error = error

    def ended(self, within_s=AT_ONCE_S):
        self._thread.join(within_s)
        assert not self._thread.is_alive(), f"not ended within {within_s} s"
        return self.error


# Connections.


def test_attaching_waits_for_nobody_and_one_connection_serves_one_after_the_other():
    with RawOwner(serve_all) as owner, Rig(owner) as rig:
        assert owner.num_connections == 0
        for index in range(5):
            rig.pull(Run(index, index, 100))
        assert (owner.num_connections, rig.statistics.num_connected) == (1, 1)
        assert (rig.remote.link.gate.num_inside, rig.remote.link.gate.nbytes_inside) == (0, 0)


def test_a_connection_that_died_in_the_pool_is_replaced_once_in_silence():
    def once(stream, asked):
        answer(stream, greeted(stream))
        asked.append(next_ask(stream))  # and ends without an answer

    script = Script(once, lambda stream, _: serve_all(stream))
    with RawOwner(script) as owner, Rig(owner) as rig:
        rig.pull()
        rig.pull(Run(50, 50, 100))
        assert rig.holds(Run(50, 50, 100))
        assert (owner.num_connections, rig.statistics.num_lost) == (2, 0)


def test_a_new_connection_that_dies_is_the_peers_loss_and_names_it():
    def serve(stream):
        greeted(stream)

    with RawOwner(serve) as owner, Rig(owner) as rig:
        with pytest.raises(PeerLost, match=r"tcp://127\.0\.0\.1:"):
            rig.pull()
        assert (owner.num_connections, rig.statistics.num_lost) == (1, 1)


@pytest.mark.parametrize("landed_nbytes", [100_000, 150_000])
def test_what_broke_half_way_goes_on_once_with_the_rest_alone(landed_nbytes):
    def a_third(stream, asked):
        asked.append(greeted(stream))
        answer(stream, asked[0], nbytes=landed_nbytes)

    def rest(stream, asked):
        asked.append(greeted(stream))
        answer(stream, asked[0])
        next_ask(stream)

    script, done = Script(a_third, rest), landed_nbytes - 100_000
    runs = (Run(0, 0, 100_000), Run(200_000, 300_000, 200_000))
    with RawOwner(script) as owner, Rig(owner) as rig:
        rig.pull(*runs)
        assert rig.holds(*runs)
    assert script.asked[1][0].ranges == ((200_000 + done, 200_000 - done),)


def test_what_broke_half_way_twice_is_the_peers_loss():
    def a_bit(stream, asked):
        asked.append(greeted(stream))
        answer(stream, asked[0], nbytes=100)

    with RawOwner(Script(a_bit)) as owner, Rig(owner) as rig:
        with pytest.raises(PeerLost):
            rig.pull(Run(0, 0, 500_000))
        assert owner.num_connections == 2


def test_pieces_that_were_told_are_not_told_again_after_a_break():
    def five_and_a_half(stream, asked):
        asked.append(greeted(stream))
        answer(stream, asked[0], nbytes=5500)

    script = Script(five_and_a_half, lambda stream, _: serve_all(stream))
    told = []
    with RawOwner(script) as owner, Rig(owner) as rig:
        rig.pull(Run(0, 0, 10_000), piece_nbytes=1000, landed=lambda *piece: told.append(piece))
        assert rig.holds(Run(0, 0, 10_000))
    assert told == [(start, 1000) for start in range(0, 10_000, 1000)]


def test_a_peer_that_cannot_be_reached_is_left_alone_for_a_while_and_then_tried_again():
    with RawOwner(serve_all) as owner:
        port = owner.address[1]
        rig = Rig(owner)
    with rig:
        with pytest.raises(PeerLost, match="cannot be reached"):
            rig.pull()
        with pytest.raises(PeerLost, match="tried again in") as left_alone:
            rig.pull()
        assert 0 < (left_alone.value.retry_after_s or 0.0) <= 0.1
        with RawOwner(serve_all, port=port):

            def works_again():
                try:
                    rig.pull()
                except PeerLost:
                    return False
                return True

            eventually(works_again, WITHIN_S)


# What is asked and said.


def test_a_batch_of_many_runs_is_several_requests_and_one_notice():
    heard = []

    def serve(stream):
        assert isinstance(stream.hear(), Hello)
        stream.say(replace(WELCOME, max_ranges=2))
        while (frame := stream.hear()) is not None:
            heard.append(frame)
            if not isinstance(frame, (Done, Ping)):
                answer(stream, frame)

    runs = [Run(index * 2000, index * 1000, 1000) for index in range(5)]
    with RawOwner(serve) as owner, Rig(owner) as rig:
        rig.pull(*runs, note=b"thanks")
        assert rig.holds(*runs)
        eventually(lambda: len(heard) == 4, WITHIN_S)
    assert [len(ask.ranges) for ask in heard[:3]] == [2, 2, 1]
    assert [ask.wants_done for ask in heard[:3]] == [False, False, True]
    assert heard[3] == Done(op=heard[2].op, note=b"thanks")


def test_runs_that_touch_are_asked_as_one_range():
    script = Script(lambda stream, asked: (asked.append(greeted(stream)), answer(stream, asked[0])))
    with RawOwner(script) as owner, Rig(owner) as rig:
        rig.pull(Run(0, 50, 10), Run(10, 60, 10), Run(30, 70, 10))
    assert script.asked[0][0].ranges == ((0, 20), (30, 10))


def test_data_may_be_cut_anywhere():
    def serve(stream):
        ask = greeted(stream)
        while ask is not None:
            payload = b"".join(SOURCE[there : there + size].tobytes() for there, size in ask.ranges)
            for start in range(0, len(payload), 777):
                part = payload[start : start + 777]
                stream.send(encode(Data(op=ask.op, nbytes=len(part))) + part)
            ask = next_ask(stream)

    runs = [Run(0, 0, 50_000), Run(60_000, 50_000, 3), Run(70_000, 60_000, 1), Run(5, 70_000, 900)]
    with RawOwner(serve) as owner, Rig(owner) as rig:
        rig.pull(*runs)
        assert rig.holds(*runs)
        for again in (runs, runs[:1]):  # on a connection that was used before
            rig.target[:] = 0
            rig.pull(*again)
            assert rig.holds(*again)


def test_a_refusal_leaves_the_connection_usable_and_the_target_alone():
    def serve(stream):
        ask = greeted(stream)
        fail = Fail(op=ask.op, reason="GRANT_REFUSED", retry_after_ms=0, message="no such grant")
        stream.say(fail)
        answer(stream, next_ask(stream))
        next_ask(stream)

    with RawOwner(serve) as owner, Rig(owner) as rig:
        with pytest.raises(GrantRefused, match=r"tcp://127.0.0.1:\d+: no such grant"):
            rig.pull()
        assert not rig.target.any()
        rig.pull()
        assert (owner.num_connections, rig.statistics.num_refused) == (1, 1)


# The keeper.

LIVELY = {"heartbeat_s": 0.05, "pong_timeout_s": 0.1}


def test_idle_connections_say_ping_and_live_on():
    pings = []

    def serve(stream):
        answer(stream, greeted(stream))
        while isinstance(frame := stream.hear(), Ping):
            pings.append(frame.op)
            pong = encode(frame).replace(b"\x09", b"\x0a", 1)
            for part in (pong[:5], pong[5:]):  # two segments, at two times
                stream.send(part)
                time.sleep(0.01)
        answer(stream, frame)
        next_ask(stream)

    with RawOwner(serve) as owner, Rig(owner, **LIVELY) as rig:
        rig.pull()
        eventually(lambda: len(pings) >= 3, WITHIN_S)
        eventually(lambda: rig.remote.link.idle[rig.remote.link.path_names[0]], WITHIN_S)
        rig.pull()
        assert (owner.num_connections, rig.statistics.num_peers_lost) == (1, 0)


def test_an_owner_that_is_less_patient_hears_more_often():
    pings = []

    def serve(stream):
        assert isinstance(stream.hear(), Hello)
        stream.say(replace(WELCOME, idle_timeout_ms=100))
        answer(stream, next_ask(stream))
        while isinstance(frame := stream.hear(0.5), Ping):
            pings.append(time.monotonic())
            stream.send(encode(frame).replace(b"\x09", b"\x0a", 1))

    with RawOwner(serve) as owner, Rig(owner) as rig:
        rig.pull()
        eventually(lambda: len(pings) >= 4, WITHIN_S)
        assert pings[3] - pings[1] < 0.4


def test_an_owner_that_does_not_answer_a_ping_is_lost():
    def serve(stream):
        answer(stream, greeted(stream))
        stream.is_over(WITHIN_S)

    with RawOwner(serve) as owner, Rig(owner, **LIVELY) as rig:
        rig.pull()
        eventually(lambda: rig.statistics.num_connections == 0, WITHIN_S)
        assert rig.statistics.num_peers_lost == 1
        with pytest.raises(PeerLost, match="tried again in"):
            rig.pull()


def test_an_idle_connection_that_its_owner_ends_is_closed_at_once():
    end = threading.Event()

    def serve(stream):
        answer(stream, greeted(stream))
        end.wait(WITHIN_S)

    with RawOwner(serve) as owner, Rig(owner) as rig:
        rig.pull()
        assert rig.statistics.num_connections == 1
        end.set()
        eventually(lambda: rig.statistics.num_connections == 0, AT_ONCE_S)


def test_what_nobody_uses_is_closed_and_then_no_thread_is_left():
    with RawOwner(serve_all) as owner, Rig(owner, max_idle_s=0.1, heartbeat_s=0.05) as rig:
        rig.pull()
        assert any(thread.name == "snowskin-tcp-keeper" for thread in threading.enumerate())
        eventually(lambda: rig.statistics.num_connections == 0, WITHIN_S)
        eventually(
            lambda: all(thread.name != "snowskin-tcp-keeper" for thread in threading.enumerate()),
            WITHIN_S,
        )
        rig.pull()
        assert owner.num_connections == 2


@pytest.mark.parametrize(
    ("settings", "num_kept"),
    [({"max_idle_connections_to_peer": 2}, 2), ({"max_spare_idle_s": 0.1}, 1)],
)
def test_of_many_idle_connections_a_few_are_kept(settings, num_kept):
    barrier = threading.Barrier(4)

    def serve(stream):
        ask = greeted(stream)
        barrier.wait(WITHIN_S)
        answer(stream, ask)
        next_ask(stream)

    with RawOwner(serve) as owner, Rig(owner, heartbeat_s=0.05, **settings) as rig:
        others = [InThread(rig.pull) for _ in range(4)]
        assert [other.ended(WITHIN_S) for other in others] == [None] * 4
        eventually(lambda: rig.statistics.num_connections == num_kept, WITHIN_S)


# Waiting, and what ends it.


def silent(stream):
    greeted(stream)
    stream.is_over(WITHIN_S)


HALF = Run(0, 0, 200_000)


def half_silent(stream):
    answer(stream, greeted(stream), nbytes=100_000)
    stream.is_over(WITHIN_S)


@pytest.mark.parametrize("serve", [silent, half_silent])
@pytest.mark.parametrize("ends", ["cancel", "remote", "transport", "region"])
def test_a_pull_that_waits_is_ended_at_once_from_another_thread(serve, ends, monkeypatch):
    if ends != "region":  # which is looked at each time that the wait ends by itself
        monkeypatch.setattr(tcp_connection, "WAIT_S", 0.9)
    control = TransferControl()
    with RawOwner(serve) as owner, Rig(owner) as rig:
        pulling = InThread(lambda: rig.pull(HALF, control=control))
        eventually(lambda: rig.remote.link.busy, WITHIN_S)
        if serve is half_silent:
            eventually(lambda: control.moved_nbytes, WITHIN_S)
        end = {
            "cancel": control.cancel,
            "remote": rig.remote.close,
            "transport": rig.transport.close,
            "region": rig.local.close,
        }[ends]
        end()
        rig.target[:] = 0
        error = pulling.ended()
        assert isinstance(error, TransferCancelled if ends == "cancel" else TransportClosed)
        assert not rig.target.any(), "something landed after the end"
        assert not rig.remote.link.busy


def test_cancelling_a_transfer_that_has_ended_hurts_nobody():
    control = TransferControl()
    with RawOwner(serve_all) as owner, Rig(owner) as rig:
        rig.pull(control=control)
        control.cancel()
        rig.pull(Run(0, 0, 1000))
        assert owner.num_connections == 1


def test_there_may_be_no_deadline():
    with RawOwner(serve_all) as owner, Rig(owner) as rig:
        rig.pull(within_s=float("inf"))
        rig.pull(Run(0, 0, 500_000), within_s=float("inf"))
        assert rig.holds(Run(0, 0, 500_000))


def test_the_deadline_is_kept_to_a_few_milliseconds():
    with RawOwner(silent) as owner, Rig(owner) as rig:
        for within_s in (0.02, 0.12):
            began_s = time.monotonic()
            with pytest.raises(TransferTimedOut, match=r"tcp://127\.0\.0\.1:"):
                rig.pull(within_s=within_s)
            assert within_s <= time.monotonic() - began_s < within_s + AT_ONCE_S


def in_turn(settings, classes, **values):
    """In which order transfers of these classes are asked for while one of another stands in their way."""
    asked, go = [], threading.Event()

    def serve(stream):
        ask = greeted(stream)
        while ask is not None:
            asked.append(TrafficClass(ask.traffic))
            go.wait(WITHIN_S)
            answer(stream, ask)
            ask = next_ask(stream)

    with RawOwner(serve) as owner, Rig(owner, **settings) as rig:
        first = InThread(lambda: rig.pull(traffic=TrafficClass.PREFETCH, **values))
        eventually(lambda: asked, WITHIN_S)
        others = []
        for index, traffic in enumerate(classes):
            others.append(
                InThread(lambda traffic=traffic: rig.pull(Run(0, 2000, 1000), traffic=traffic))
            )
            eventually(lambda n=index + 1: rig.remote.link.gate.num_waiting == n, WITHIN_S)
        go.set()
        assert [each.ended(WITHIN_S) for each in (first, *others)] == [None] * (1 + len(others))
    return asked[1:]


@pytest.mark.parametrize(
    "settings", [{"max_connections_to_peer": 1}, {"max_nbytes_in_flight": 1000}]
)
def test_those_that_wait_for_a_place_go_by_their_class(settings):
    urgent, prefetch, replication = TrafficClass
    assert in_turn(settings, [replication, prefetch, urgent]) == [urgent, prefetch, replication]


def test_a_transfer_that_waits_for_a_place_keeps_its_deadline():
    with RawOwner(silent) as owner, Rig(owner, max_connections_to_peer=1) as rig:
        first = InThread(lambda: rig.pull(within_s=0.4))
        eventually(lambda: rig.remote.link.busy, WITHIN_S)
        began_s = time.monotonic()
        with pytest.raises(TransferTimedOut):
            rig.pull(within_s=0.1)
        assert time.monotonic() - began_s < AT_ONCE_S
        assert rig.remote.link.gate.num_waiting == 0
        assert isinstance(first.ended(WITHIN_S), TransferTimedOut)


async def test_a_small_pull_does_not_hold_the_event_loop():
    go = threading.Event()

    def serve(stream):
        ask = greeted(stream)
        while ask is not None:
            assert go.wait(WITHIN_S), "the loop that sets this was held"
            answer(stream, ask)
            ask = next_ask(stream)

    with RawOwner(serve) as owner, Rig(owner) as rig:
        for _ in range(2):  # while connecting, and on a kept connection
            pulling = asyncio.ensure_future(rig.pull_async())
            await asyncio.sleep(0.02)
            assert not pulling.done()
            go.set()
            await pulling
            assert rig.holds()
            go.clear()
        assert owner.num_connections == 1


async def test_many_small_pulls_of_one_loop_share_a_few_connections():
    runs = [Run(index * 1000, index * 1000, 1000) for index in range(100)]
    with RawOwner(serve_all) as owner, Rig(owner, max_connections_to_peer=4) as rig:
        await asyncio.gather(*(rig.pull_async(run) for run in runs))
        assert rig.holds(*runs)
        assert owner.num_connections <= 4


@pytest.mark.parametrize("serve", [silent, half_silent, lambda stream: stream.is_over(WITHIN_S)])
async def test_a_cancelled_small_pull_leaves_no_connection_and_nothing_lands(serve):
    with RawOwner(serve) as owner, Rig(owner) as rig:
        pulling = asyncio.ensure_future(rig.pull_async(HALF))
        await asyncio.sleep(0.05)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        rig.target[:] = 0
        assert rig.local.quarantined_nbytes == 0
        assert rig.statistics.num_cancelled == 1
        eventually(lambda: rig.statistics.num_connections == 0, WITHIN_S)
        assert not rig.target.any()


async def test_the_deadline_of_a_small_pull_on_the_loop_is_kept():
    with RawOwner(half_silent) as owner, Rig(owner) as rig:
        began_s = time.monotonic()
        with pytest.raises(TransferTimedOut):
            await rig.pull_async(HALF, within_s=0.1)
        assert time.monotonic() - began_s < 0.1 + AT_ONCE_S


def test_an_abandoned_push_is_in_quarantine_until_its_owner_has_ended_the_connection():
    go = threading.Event()

    def serve(stream):
        ask = greeted(stream)
        if ask.op == 1 and not go.is_set():
            stream.say(Clear(op=ask.op))
            go.wait(WITHIN_S)
            return
        while ask is not None:
            stream.say(Clear(op=ask.op))
            assert isinstance(stream.hear(), Data)
            stream.payload(1000)
            stream.say(Done(op=ask.op, note=b""))
            ask = next_ask(stream)

    with RawOwner(serve) as owner, Rig(owner) as rig:
        with pytest.raises(TransferTimedOut):
            rig.push(within_s=0.1)
        with pytest.raises(LandingQuarantined):
            rig.push(Run(999, 0, 1000))
        go.set()
        eventually(lambda: not rig.remote.quarantined.held, WITHIN_S)
        rig.push(Run(999, 0, 1000))


def test_a_connection_that_was_interrupted_too_late_is_not_kept():
    control, go = TransferControl(), threading.Event()

    def serve(stream):
        ask = greeted(stream)
        stream.say(Clear(op=ask.op))
        assert isinstance(stream.hear(), Data)
        stream.say(Done(op=ask.op, note=b""))
        go.wait(WITHIN_S)

    with RawOwner(serve) as owner, Rig(owner) as rig:
        rig.push(control=control, landed=lambda *_: control.cancel())
        assert rig.statistics.num_connections == 0
        go.set()
