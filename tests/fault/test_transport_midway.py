"""What ends a `tcp` transfer half-way though both peers live: a grant taken back or run out, a region or a side closed.

The transfer stands still in the middle, by a relay, while it happens; then it goes on.
"""

from __future__ import annotations

import threading
import time

import pytest

from snowskin.transport.errors import (
    GrantRefused,
    PeerLost,
    RegionExpired,
    TransferCancelled,
    TransferTimedOut,
    TransportClosed,
)
from tests.support.raw_tcp import RawOwner, greeted, reachable
from tests.support.relay import Relay
from tests.support.tcp_pair import NOTE, Reader, stages, through
from tests.support.transfer_child import TestMemory, TransferChild
from tests.support.waiting import eventually

MOVED = 16 << 20  # more than all buffers on the way hold
NBYTES = 20 << 20
ENDS_S = 1.5
SETTLE_S = 5.0


@pytest.fixture(scope="module")
def owned():
    with TestMemory(NBYTES, granted=[(0, MOVED)], seed=4) as memory:
        yield memory


@pytest.fixture(scope="module")
def landing():
    with TestMemory(NBYTES) as memory:
        yield memory


@pytest.fixture(scope="module")
def owner(owned):
    with TransferChild("tcp", owned, frame_timeout_s=1.0) as child:
        yield child


@pytest.fixture(scope="module")
def middle(owner, landing):
    return {
        is_push: stages(owner, landing, MOVED, is_push=is_push)["in the middle"]
        for is_push in (False, True)
    }


class Halfway:
    """A transfer in a thread, held in the middle; `with` lets it go on and joins it."""

    def __init__(self, owner, landing, stage, *, is_push, within_s=8.0, **granted):
        self.descriptor = owner.describe(writable=True, notify=True, **granted)
        self.hexed = self.descriptor.to_bytes().hex()
        self.reader = Reader(landing)
        self.relay = Relay(reachable(self.descriptor))
        self.error: BaseException | None = None
        self.took_s = 0.0  # after it was let go
        self._stage, self._is_push, self._within_s = stage, is_push, within_s
        self._thread = threading.Thread(target=self._run, name="transfer")

    def _run(self):
        try:
            self.reader.move(
                through(self.relay, self.descriptor),
                MOVED,
                is_push=self._is_push,
                within_s=self._within_s,
                note=NOTE,
            )
        except BaseException as error:  # noqa: BLE001  looked at by the test
            self.error = error
        self.ended_s = time.monotonic()

    def __enter__(self):
        self.relay.__enter__()
        self.relay.command("hold", direction=self._stage.direction, at=self._stage.at)
        self._thread.start()
        self.relay.wait_held()
        return self

    def __exit__(self, *_):
        let_go_s = time.monotonic()
        self.relay.command("let_go")
        self._thread.join(self._within_s + SETTLE_S)
        assert not self._thread.is_alive()
        self.took_s = self.ended_s - let_go_s
        self.relay.__exit__()
        self.reader.close()
        self.reader.local.close()


@pytest.mark.parametrize("is_push", [False, True])
def test_a_grant_that_is_taken_back_half_way_ends_the_transfer_by_name(
    owner, owned, landing, middle, is_push
):
    before = owner.statistics()
    with Halfway(owner, landing, middle[is_push], is_push=is_push) as halfway:
        took_s = owner.ask("revoke", descriptor=halfway.hexed)["took_s"]
        at_revoke = owned.bytes_at(0, MOVED)
    assert took_s < ENDS_S
    assert isinstance(halfway.error, GrantRefused), repr(halfway.error)
    assert halfway.took_s < ENDS_S
    assert owned.bytes_at(0, MOVED) == at_revoke, "written after `revoke` had returned"
    assert owner.statistics()["num_served_failed"] > before["num_served_failed"]
    assert not owner.ask("completions")["completions"], "told of as done"
    owned.fill()


@pytest.mark.parametrize("is_push", [False, True])
def test_a_grant_that_runs_out_half_way_ends_the_transfer_by_name(
    owner, owned, landing, middle, is_push
):
    life_s = 0.4
    with Halfway(owner, landing, middle[is_push], is_push=is_push, expires_in_s=life_s) as halfway:
        threading.Event().wait(life_s)
    assert isinstance(halfway.error, RegionExpired), repr(halfway.error)
    assert halfway.took_s < ENDS_S
    assert not owner.ask("completions")["completions"]
    owned.fill()


@pytest.mark.parametrize("is_push", [False, True])
@pytest.mark.parametrize("what", ["region", "transport"])
def test_an_owner_that_closes_half_way_waits_for_nobody(owned, landing, middle, is_push, what):
    with TransferChild("tcp", owned) as closing:
        with Halfway(closing, landing, middle[is_push], is_push=is_push) as halfway:
            took_s = closing.ask("close_region" if what == "region" else "close")["took_s"]
        assert took_s < ENDS_S
        assert isinstance(halfway.error, GrantRefused | PeerLost | TransportClosed), repr(
            halfway.error
        )
        assert halfway.took_s < ENDS_S
        if what == "transport":
            assert closing.sockets() == 0
    owned.fill()


@pytest.mark.parametrize("is_push", [False, True])
@pytest.mark.parametrize("what", ["landing", "transport"])
def test_a_reader_that_closes_half_way_waits_for_nobody_and_nothing_lands_later(
    owner, owned, landing, middle, is_push, what
):
    landing.fill()
    with Halfway(owner, landing, middle[is_push], is_push=is_push) as halfway:
        began_s = time.monotonic()
        halfway.reader.local.close() if what == "landing" else halfway.reader.transport.close()
        took_s = time.monotonic() - began_s
        at_close = landing.bytes_at(0, NBYTES)
    assert took_s < ENDS_S
    assert isinstance(halfway.error, TransportClosed | PeerLost), repr(halfway.error)
    assert landing.bytes_at(0, NBYTES) == at_close
    eventually(lambda: owner.statistics()["num_connections"] == 0, SETTLE_S)
    owned.fill()


def test_a_push_that_was_given_up_is_over_though_its_owner_talks_on_and_on(landing):
    """What an owner still says after a broken push is thrown away, but not for ever, nor instead of everything else."""
    flooding = threading.Event()

    def flood(stream):
        greeted(stream)
        stream.send(b"\x05\0\0\0\0\0\0\x01" + bytes(8))  # CLEAR of op 1
        stream.socket.recv(1 << 20)
        flooding.wait(SETTLE_S)
        for _ in range(10_000):
            stream.send(bytes(1 << 20))
            if stream.ended or flooded.is_set():
                return

    flooded = threading.Event()
    with Reader(landing, pong_timeout_s=0.5, heartbeat_s=0.3) as reader, RawOwner(flood) as owner:
        with pytest.raises((TransferTimedOut, TransferCancelled, PeerLost)):
            reader.move(owner.descriptor(NBYTES, writable=True), MOVED, is_push=True, within_s=0.3)
        flooding.set()
        try:
            eventually(
                lambda: reader.transport.statistics().num_connections == 0, 2.0, "the flood is left"
            )
        finally:
            flooded.set()
