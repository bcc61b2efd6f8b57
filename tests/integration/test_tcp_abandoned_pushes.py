"""What an abandoned push over `tcp` had sent may land for a moment longer: nobody else writes there meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np
import pytest

from snowskin.transport.api import Run
from snowskin.transport.errors import LandingQuarantined, TransferTimedOut, TransportClosed
from snowskin.transport.frames import Clear
from snowskin.transport.tcp.keeper import Keeper
from snowskin.transport.tcp.transport import TcpTransport
from tests.support.raw_tcp import RawOwner, greeted
from tests.support.waiting import eventually

NBYTES, WITHIN_S = 4096, 5.0


class Rig:
    """An owner that lets a push begin and ends its connection when `go` is set, and who pushes to it."""

    def __init__(self):
        self.go = threading.Event()
        self.owner = RawOwner(self._serve)
        self.transport = TcpTransport()
        self.local = self.transport.register(np.ones(NBYTES, np.uint8))

    def _serve(self, stream):
        ask = greeted(stream)
        if ask is not None:
            stream.say(Clear(op=ask.op))
            self.go.wait(WITHIN_S)

    def attach(self):
        return self.transport.attach(self.owner.descriptor(NBYTES, writable=True), writable=True)

    def push(self, remote, offset, *, within_s=WITHIN_S, landed=None):
        deadline_s = time.monotonic() + within_s
        runs = [Run(offset, 0, 1000)]
        self.transport.push(self.local, remote, runs, deadline_s=deadline_s, landed=landed)

    def __enter__(self):
        self.owner.__enter__()
        return self

    def __exit__(self, *values):
        self.go.set()
        self.transport.close()
        self.owner.__exit__(*values)


class Patient:
    """Waits for as long as any test does."""

    def check(self):
        return WITHIN_S


def test_attaching_anew_is_no_way_around_the_quarantine():
    with Rig() as rig:
        with contextlib.closing(rig.attach()) as remote, pytest.raises(TransferTimedOut):
            rig.push(remote, 0, within_s=0.1)
        again = rig.attach()
        with pytest.raises(LandingQuarantined):
            rig.push(again, 999)
        rig.go.set()
        eventually(lambda: not again.quarantined.held, WITHIN_S)


def test_closing_the_region_of_a_push_under_way_ends_no_quarantine():
    sent = threading.Event()
    errors = []

    def push(remote):
        try:
            rig.push(remote, 0, landed=lambda *_: sent.set())
        except TransportClosed as error:
            errors.append(error)

    with Rig() as rig:
        remote, again = rig.attach(), rig.attach()
        pushing = threading.Thread(target=push, args=[remote])
        pushing.start()
        assert sent.wait(WITHIN_S)
        remote.close()
        pushing.join(WITHIN_S)
        assert len(errors) == 1
        with pytest.raises(LandingQuarantined):
            rig.push(again, 999)
        rig.go.set()
        eventually(lambda: not again.quarantined.held, WITHIN_S)


def test_a_push_that_its_owner_ends_while_it_is_given_up_is_only_too_late(monkeypatch):
    """The keeper may close a connection that drains before its user has told all of it."""
    watch_end = Keeper.watch_end

    def after_the_end(self, connection):
        rig.go.set()
        eventually(lambda: connection.closed or connection.is_dead(), WITHIN_S)
        time.sleep(0.05)
        return watch_end(self, connection)

    monkeypatch.setattr(Keeper, "watch_end", after_the_end)
    with Rig() as rig:
        remote = rig.attach()
        other = remote.link.connect_any(Patient())  # with the last one the keeper would end
        with pytest.raises(TransferTimedOut):
            rig.push(remote, 0, within_s=0.1)
        eventually(lambda: not remote.quarantined.held, WITHIN_S)
        remote.link.give_back(other)
        assert rig.transport.statistics().num_connections == 1
