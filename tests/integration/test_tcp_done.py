"""When a `tcp` reader says that it has all, so that its owner may send by reference."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time

import numpy as np
import pytest

from snowskin.transport.errors import BadFrame
from snowskin.transport.frames import Data, Done, Fail, encode
from snowskin.transport.runs import Run
from snowskin.transport.tcp.connection import WAIT_S
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.sockets import is_on_this_host
from snowskin.transport.tcp.transport import TcpTransport
from tests.support.raw_tcp import RawOwner, greeted, next_ask
from tests.support.waiting import eventually

NBYTES, DONE_FROM_NBYTES, WITHIN_S = 1 << 18, 100_000, 5.0
SOURCE = np.random.default_rng(5).integers(0, 256, NBYTES, dtype=np.uint8)


class Answers:
    """An owner that pauses before the last bytes of each pull, and then hears what the reader says."""

    def __init__(self, *, pause_s=0.0, frame_nbytes=NBYTES):
        self.pause_s, self.frame_nbytes = pause_s, frame_nbytes
        self.asked, self.heard = [], []

    def __call__(self, stream):
        ask = greeted(stream)
        while ask is not None:
            self.asked.append(ask)
            payload = b"".join(SOURCE[there : there + size].tobytes() for there, size in ask.ranges)
            frames = b""
            for start in range(0, len(payload), self.frame_nbytes):
                part = payload[start : start + self.frame_nbytes]
                frames += encode(Data(op=ask.op, nbytes=len(part))) + part
            stream.send(frames[:-100])
            if self.pause_s and stream.is_over(self.pause_s):
                break
            stream.send(frames[-100:])
            if ask.wants_done:
                self.heard.append(stream.hear())
            ask = next_ask(stream)


@contextlib.contextmanager
def pulls_from(owner):
    """`pull(runs, on_loop=…, landed=…)` from this owner, which compares the bytes."""
    transport = TcpTransport(TcpSettings(done_from_nbytes=DONE_FROM_NBYTES))
    target = np.zeros(NBYTES, np.uint8)
    local = transport.register(target)
    remote = transport.attach(owner.descriptor(NBYTES))

    def pull(runs, *, on_loop=False, **values):
        target[:] = 0
        values["deadline_s"] = time.monotonic() + WITHIN_S
        if on_loop:
            asyncio.run(transport.pull_async(remote, local, runs, **values))
        else:
            transport.pull(remote, local, runs, **values)
        for there, here, size in runs:
            assert np.array_equal(target[here : here + size], SOURCE[there : there + size])

    try:
        yield pull
    finally:
        transport.close()
        local.close()


LARGE = {
    "in one go": ([Run(0, 0, DONE_FROM_NBYTES)], {}, 0.0),
    "standing still near its end": ([Run(0, 0, DONE_FROM_NBYTES)], {}, 2.5 * WAIT_S),
    "in two runs": ([Run(0, 0, 60_000), Run(70_000, 70_000, 60_000)], {}, 0.0),
}


@pytest.mark.parametrize(("runs", "values", "pause_s"), LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("on_loop", [False, True], ids=["on a thread", "on the loop"])
def test_who_pulls_much_says_when_it_has_all_and_keeps_its_connection(
    runs, values, pause_s, on_loop
):
    answers = Answers(pause_s=pause_s)
    with RawOwner(answers) as owner, pulls_from(owner) as pull:
        for _ in range(2):
            pull(runs, on_loop=on_loop, **values)
        eventually(lambda: len(answers.heard) == 2, WITHIN_S)
        assert owner.num_connections == 1
    assert answers.heard == [Done(op=ask.op, note=b"") for ask in answers.asked]


def test_who_pulls_little_announces_no_done():
    answers = Answers()
    with RawOwner(answers) as owner, pulls_from(owner) as pull:
        pull([Run(0, 0, DONE_FROM_NBYTES - 1)])
    assert [ask.wants_done for ask in answers.asked] == [False]


def test_whose_pieces_are_looked_at_announces_done_as_well():
    answers = Answers()
    with RawOwner(answers) as owner, pulls_from(owner) as pull:
        pull([Run(0, 0, DONE_FROM_NBYTES)], landed=lambda offset, nbytes: None)
        pull([Run(0, 0, DONE_FROM_NBYTES)], landed=lambda offset, nbytes: None, on_loop=True)
        eventually(lambda: len(answers.heard) == 2, WITHIN_S)
    assert answers.heard == [Done(op=ask.op, note=b"") for ask in answers.asked]


@pytest.mark.parametrize("frame_nbytes", [NBYTES, 7_001, DONE_FROM_NBYTES - 50])
@pytest.mark.parametrize("piece_nbytes", [30_000, 99_950, NBYTES])
@pytest.mark.parametrize("on_loop", [False, True], ids=["on a thread", "on the loop"])
def test_pieces_are_told_whole_and_once_though_one_stands_still(
    piece_nbytes, frame_nbytes, on_loop
):
    answers, told = Answers(pause_s=2.5 * WAIT_S, frame_nbytes=frame_nbytes), []
    with RawOwner(answers) as owner, pulls_from(owner) as pull:
        pull(
            [Run(7, 5, DONE_FROM_NBYTES)],
            on_loop=on_loop,
            landed=lambda offset, nbytes: told.append((offset, nbytes)),
            piece_nbytes=piece_nbytes,
        )
    ends = [*range(5, 5 + DONE_FROM_NBYTES, piece_nbytes), 5 + DONE_FROM_NBYTES]
    assert told == [(start, end - start) for start, end in itertools.pairwise(ends)]


def refuses(op):
    return Fail(op=op, reason="TRANSFER_TIMED_OUT", retry_after_ms=0, message="no DONE came")


def test_an_owner_that_gave_a_done_up_is_asked_for_the_next_one_on_another_connection():
    connections = []

    def gives_up_late(stream):
        connections.append(stream)
        if len(connections) == 2:
            Answers()(stream)
            return
        ask = greeted(stream)
        stream.say(Data(op=ask.op, nbytes=NBYTES))
        stream.send(SOURCE.tobytes())
        stream.hear()
        next_ask(stream)
        stream.say(refuses(ask.op))

    with RawOwner(gives_up_late) as owner, pulls_from(owner) as pull:
        for _ in range(2):
            pull([Run(0, 0, NBYTES)])
    assert len(connections) == 2


def test_who_refuses_what_was_never_asked_for_broke_the_rules():
    with (
        RawOwner(lambda stream: stream.say(refuses(greeted(stream).op + 1))) as owner,
        pulls_from(owner) as pull,
        pytest.raises(BadFrame),
    ):
        pull([Run(0, 0, NBYTES)])


def test_nobody_is_near_on_a_connection_that_is_gone():
    with socket.socket() as gone:
        assert not is_on_this_host(gone)
