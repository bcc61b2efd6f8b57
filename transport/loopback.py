"""`loopback`: both peers in one process, and every way a transfer can go wrong, on demand.

Rules kept here: the same laws as every other transport, by the same contract suite; faults strike
by piece number, counted from when they were set, so that a test says exactly what happens.

Not a mock: it is what a single process uses to talk to itself, and it is the reference.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.transport.copying import AttachedMemory, CopyingTransport, move_piece
from snowskin.transport.errors import (
    BadDescriptor,
    GrantRefused,
    PeerLost,
    TransferTimedOut,
    TransportClosed,
    TransportError,
)
from snowskin.transport.grants import Grant
from snowskin.transport.memory import LandingRange, MemoryRegion
from snowskin.transport.ordered import check_writable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.ordered import Order


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopbackFaults:
    """What happens to which piece; pieces count from 0 when the faults are set.

    Attributes:
        lost: never arrive; the transfer waits for them until its deadline.
        delay_s: arrive after so many seconds, or when `release` is called. One that is still on its
            way at the deadline lands when `release` is called, if its region still takes it.
        corrupted: arrive with their first bit flipped.
        cut_at: the way is cut before this piece, for good.
    """

    lost: frozenset[int] = frozenset()
    delay_s: Mapping[int, float] = field(default_factory=dict)
    corrupted: frozenset[int] = frozenset()
    cut_at: int | None = None


class LoopbackNetwork:
    """Where the transports of one process find each other's grants, by capability."""

    def __init__(self) -> None:
        """An empty network."""
        self._owners: list[LoopbackTransport] = []

    def join(self, owner: LoopbackTransport) -> None:
        """Makes what is granted there reachable."""
        self._owners.append(owner)

    def leave(self, owner: LoopbackTransport) -> None:
        """Keeps nothing of an owner that is closed. Idempotent."""
        with contextlib.suppress(ValueError):
            self._owners.remove(owner)

    def find(self, descriptor: RegionDescriptor) -> tuple[LoopbackTransport, Grant]:
        """The owner and its grant; GrantRefused where nobody gave it."""
        for owner in list(self._owners):
            with contextlib.suppress(GrantRefused):
                grant = owner.grants.find(
                    descriptor.capability,
                    epoch=descriptor.epoch,
                    generation=descriptor.generation,
                )
                return owner, grant
        raise GrantRefused("no such grant in this process", hint="it was taken back, or forged")


class LoopbackTransport(CopyingTransport):
    """Copies between regions of one process; loses, delays, cuts and corrupts where told."""

    scheme = "loopback"

    def __init__(
        self,
        network: LoopbackNetwork | None = None,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Joins `network`, or makes one of its own: then it is its own only peer."""
        super().__init__(
            now_s=now_s,
            move=self._move_with_faults,
            inline_nbytes=0,  # a delayed piece must not hold the event loop
            silent_piece_nbytes=0,  # faults count pieces as they were asked for
        )
        self._network = network or LoopbackNetwork()
        self._network.join(self)
        self._faults = LoopbackFaults()
        self._num_pieces = 0
        self._released = threading.Event()
        self._closing = threading.Event()
        self._late: list[Callable[[], None]] = []

    def set_faults(self, faults: LoopbackFaults) -> None:
        """From now on pieces count from 0 and `faults` strike them."""
        self._faults = faults
        self._num_pieces = 0
        self._released.clear()

    def release(self) -> None:
        """Lets delayed pieces arrive now, and those land that came too late for their deadline."""
        self._released.set()
        late, self._late = self._late, []
        for land in late:
            land()

    def attach(
        self,
        descriptor: RegionDescriptor,
        *,
        fd: int | None = None,
        link_fd: int | None = None,
        writable: bool = False,
        asked_at_s: float | None = None,
        populate: bool = False,
    ) -> AttachedMemory:
        """Finds the owner's grant; descriptors (`fd`, `link_fd`) mean nothing here."""
        self.check_scheme(descriptor)
        owner, grant = self._network.find(descriptor)
        if grant.region.nbytes != descriptor.nbytes:
            raise BadDescriptor(
                f"the region has {grant.region.nbytes} bytes, {descriptor.nbytes} were described"
            )
        check_writable(grant.descriptor, writable)
        memory = MemoryRegion(
            grant.region.buffer, grant, writable=writable, shared=grant.region.shared
        )
        return self.keep_attached(
            descriptor,
            memory,
            peer="this process",
            asked_at_s=asked_at_s,
            populate=populate,
            link=_GrantLink(owner, grant),
            ranges=grant.ranges,
        )

    def carry_out(self, order: Order) -> None:
        """Copies what the owner's grant allows."""
        assert isinstance(order.remote, AttachedMemory), "what is attached here is memory"
        assert isinstance(order.remote.link, _GrantLink), "what is attached here is another's grant"
        link = order.remote.link
        ranges = [(run.remote_offset, run.nbytes) for run in order.runs]
        try:
            nbytes = link.grant.check(ranges, is_push=not order.is_pull, now_s=self.now_s())
        except TransportError as error:
            link.owner.count_refused(error.reason)
            raise
        try:
            super().carry_out(order)
        except PeerLost:
            order.remote.lost = True
            raise
        link.owner.count_served(nbytes)

    def close(self) -> None:
        """Closes what is attached and wakes what waits; idempotent."""
        self.closed = True
        self._closing.set()
        self._released.set()
        self._late.clear()
        super().close()
        self._network.leave(self)

    def _move_with_faults(
        self,
        target: MemoryRegion,
        target_offset: int,
        source: MemoryRegion,
        source_offset: int,
        nbytes: int,
        deadline_s: float,
    ) -> None:
        number, faults = self._num_pieces, self._faults
        self._num_pieces += 1
        if faults.cut_at is not None and number >= faults.cut_at:
            raise PeerLost(f"loopback was cut before piece {number}", hint="attach the region anew")

        def land() -> None:
            with _piece_of_peer(source, self.now_s()), _piece_of_peer(target, self.now_s()):
                move_piece(target, target_offset, source, source_offset, nbytes, deadline_s)
            if number in faults.corrupted:
                target.buffer[target_offset] ^= 1

        if number in faults.lost:
            self._closing.wait(min(deadline_s - self.now_s(), threading.TIMEOUT_MAX))
            self.check_open()
            raise TransferTimedOut(f"piece {number} of {nbytes} bytes was lost")
        delay_s = faults.delay_s.get(number, 0.0)
        remaining_s = deadline_s - self.now_s()
        if delay_s and not self._released.wait(min(delay_s, remaining_s, threading.TIMEOUT_MAX)):
            self.check_open()
            if delay_s > remaining_s:
                self._land_late(target, (target_offset, nbytes), land)
                raise TransferTimedOut(f"piece {number} of {nbytes} bytes came too late")
        self.check_open()
        land()

    def _land_late(
        self, target: MemoryRegion, landing: LandingRange, land: Callable[[], None]
    ) -> None:
        """Keeps a piece that missed its deadline: it lands on `release`, until then quarantined."""
        key = object()
        target.quarantine(key, [landing])

        def land_at_last() -> None:
            with contextlib.suppress(TransportError):  # a closed region takes nothing any more
                land()
            target.lift_quarantine(key)

        self._late.append(land_at_last)


@contextlib.contextmanager
def _piece_of_peer(region: MemoryRegion, now_s: float) -> Iterator[None]:
    """The bracket of the owner's grant, where `region` is an attached one."""
    grant = region.owner
    if not isinstance(grant, Grant):
        yield
        return
    try:
        grant.begin_piece(now_s)
    except TransportClosed:
        raise PeerLost("the peer closed this region", hint="attach another replica") from None
    try:
        yield
    finally:
        grant.end_piece()


class _GrantLink:
    """The owner is in this process: it is asked, and told, at once."""

    def __init__(self, owner: LoopbackTransport, grant: Grant) -> None:
        self.owner = owner
        self.grant = grant

    def check(self, now_s: float) -> None:
        if self.grant.region.closed:
            raise PeerLost("the peer closed this region", hint="attach another replica")
        self.grant.check((), is_push=False, now_s=now_s)

    def tell(self, nbytes: int, *, is_push: bool, note: bytes, deadline_s: float) -> None:
        self.owner.complete(self.grant, nbytes, is_push=is_push, note=note)

    def close(self) -> None:
        pass
