"""Faults on demand: each piece is lost, late, corrupted or cut exactly where the test said."""

from __future__ import annotations

import gc
import time
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest

from snowskin.transport.api import RemoteRegion, Run
from snowskin.transport.errors import (
    GrantRefused,
    LandingQuarantined,
    PeerLost,
    RegionReadOnly,
    TransferTimedOut,
    TransportClosed,
)
from snowskin.transport.loopback import LoopbackFaults, LoopbackNetwork, LoopbackTransport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snowskin.transport.memory import MemoryRegion

PIECE = 100
SHORT_S = 0.01


class Pair:
    def __init__(self) -> None:
        self.transport = LoopbackTransport()
        self.source = np.arange(1, 1001, dtype=np.int64).astype(np.uint8) | 1
        self.owned = self.transport.register(self.source)
        self.remote: RemoteRegion = self.transport.attach(self.transport.describe(self.owned))
        self.target = np.zeros(1000, dtype=np.uint8)
        self.local: MemoryRegion = self.transport.register(self.target)

    def pull(self, *, nbytes: int = 1000, within_s: float = 60.0) -> None:
        self.transport.pull(
            self.remote,
            self.local,
            [Run(0, 0, nbytes)],
            deadline_s=time.monotonic() + within_s,
            piece_nbytes=PIECE,
        )


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.transport.close()


def test_lost_piece_times_out_and_the_earlier_ones_are_there(pair: Pair) -> None:
    pair.transport.set_faults(LoopbackFaults(lost=frozenset({2})))
    with pytest.raises(TransferTimedOut, match="piece 2"):
        pair.pull(within_s=SHORT_S)
    assert np.array_equal(pair.target[:200], pair.source[:200])
    assert not pair.target[200:].any()
    assert pair.local.quarantined_nbytes == 0
    pair.pull()  # pieces count on: number 2 is gone by


def test_late_piece_keeps_its_range_in_quarantine_until_it_has_landed(pair: Pair) -> None:
    pair.transport.set_faults(LoopbackFaults(delay_s={1: 1e6}))
    with pytest.raises(TransferTimedOut, match="piece 1"):
        pair.pull(within_s=SHORT_S)
    assert pair.local.quarantined_nbytes == PIECE
    with pytest.raises(LandingQuarantined):
        pair.pull()
    pair.pull(nbytes=PIECE)
    assert not pair.target[100:].any()
    pair.transport.release()
    assert np.array_equal(pair.target[:200], pair.source[:200]), "it lands after all"
    assert pair.local.quarantined_nbytes == 0
    pair.pull()
    assert np.array_equal(pair.target, pair.source)


def test_late_piece_does_not_land_in_a_closed_region(pair: Pair) -> None:
    pair.transport.set_faults(LoopbackFaults(delay_s={0: 1e6}))
    with pytest.raises(TransferTimedOut):
        pair.pull(within_s=SHORT_S)
    pair.local.close()
    pair.transport.release()
    assert not pair.target.any()


def test_short_delay_only_delays(pair: Pair) -> None:
    pair.transport.set_faults(LoopbackFaults(delay_s={0: SHORT_S}))
    started_s = time.monotonic()
    pair.pull()
    assert time.monotonic() - started_s >= SHORT_S
    assert np.array_equal(pair.target, pair.source)


def test_corrupted_piece_differs_in_one_bit_when_it_is_told(pair: Pair) -> None:
    pair.transport.set_faults(LoopbackFaults(corrupted=frozenset({3})))
    pair.pull()
    assert np.flatnonzero(pair.target != pair.source).tolist() == [300]
    assert pair.target[300] ^ pair.source[300] == 1


def test_cut_way_stays_cut_until_the_region_is_attached_anew(pair: Pair) -> None:
    pair.transport.set_faults(LoopbackFaults(cut_at=4))
    with pytest.raises(PeerLost, match="piece 4"):
        pair.pull()
    pair.transport.set_faults(LoopbackFaults())
    with pytest.raises(PeerLost, match="cut"):
        pair.pull()
    assert pair.transport.statistics().num_lost == 2
    pair.remote = pair.transport.attach(pair.transport.describe(pair.owned))
    pair.pull()
    assert np.array_equal(pair.target, pair.source)


def test_owner_that_closes_its_region_is_a_lost_peer(pair: Pair) -> None:
    descriptor = pair.transport.describe(pair.owned)
    pair.owned.close()
    with pytest.raises(PeerLost, match="closed"):
        pair.pull()
    with pytest.raises(GrantRefused):
        pair.transport.attach(descriptor)


def test_capability_that_was_not_granted_is_refused(pair: Pair) -> None:
    foreign = LoopbackTransport()
    region = foreign.register(bytearray(10))
    with pytest.raises(GrantRefused, match="no such grant"):
        pair.transport.attach(foreign.describe(region))
    foreign.close()


def test_read_only_memory_cannot_be_attached_for_writing(pair: Pair) -> None:
    region = pair.transport.register(bytes(10))
    with pytest.raises(RegionReadOnly):
        pair.transport.attach(pair.transport.describe(region), writable=True)


def test_closing_the_transport_wakes_who_waits_for_a_lost_piece(pair: Pair) -> None:
    pair.transport.set_faults(LoopbackFaults(lost=frozenset({0})))
    pair.transport._closing.set()
    pair.transport.closed = True
    with pytest.raises(TransportClosed):
        pair.transport._move_with_faults(pair.local, 0, pair.owned, 0, 10, time.monotonic() + 1e6)


def test_network_keeps_nothing_of_those_who_have_left() -> None:
    network = LoopbackNetwork()
    transport = LoopbackTransport(network)
    left = weakref.ref(transport)
    transport.close()
    del transport
    gc.collect()
    assert left() is None
