"""How a `tcp` reader waits: not in a loop, not beyond its deadline, and not as often as an owner would like."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from snowskin.transport.api import Run
from snowskin.transport.errors import TransferTimedOut
from snowskin.transport.frames import Data, Fail, Hello, Ping, encode
from snowskin.transport.tcp import TcpTransport
from snowskin.transport.tcp_connection import MIN_HEARTBEAT_S
from tests.support.raw_tcp import WELCOME, RawOwner, greeted, next_ask

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
