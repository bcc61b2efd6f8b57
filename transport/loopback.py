"""`loopback`: both peers in one process, and every way a transfer can go wrong, on demand.

Rules kept here: the same laws as every other transport, by the same contract suite; faults strike
by piece number, counted from when they were set, so that a test says exactly what happens.

Not a mock: it is what a single process uses to talk to itself, and it is the reference.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.transport.copying import AttachedMemory, CopyingTransport, move_piece
from snowskin.transport.descriptor import RegionDescriptor, new_capability
from snowskin.transport.errors import (
    BadDescriptor,
    PeerLost,
    RegionReadOnly,
    TransferTimedOut,
    TransportClosed,
    TransportError,
)
from snowskin.transport.memory import LandingRange, MemoryRegion, region_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


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
    """Where the transports of one process find each other's regions, by capability."""

    def __init__(self) -> None:
        """An empty network."""
        self._granted: dict[bytes, tuple[RegionDescriptor, MemoryRegion]] = {}

    def grant(self, descriptor: RegionDescriptor, region: MemoryRegion) -> None:
        """Makes `region` reachable under the descriptor's capability."""
        self._granted[descriptor.capability] = (descriptor, region)

    def find(self, descriptor: RegionDescriptor) -> MemoryRegion:
        """The owner's region; BadDescriptor for any other descriptor than the one granted."""
        granted, region = self._granted.get(descriptor.capability, (None, None))
        if region is None or granted != descriptor:
            raise BadDescriptor("no region was granted by this descriptor")
        return region


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
            self.scheme,
            now_s=now_s,
            move=self._move_with_faults,
            inline_nbytes=0,  # a delayed piece must not hold the event loop
            silent_piece_nbytes=0,  # faults count pieces as they were asked for
        )
        self._clock_s = now_s
        self._network = network or LoopbackNetwork()
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

    def register(self, memory: object, *, writable: bool = True) -> MemoryRegion:
        """Registers host memory without copying."""
        self.check_open()
        return region_of(memory, writable=writable)

    def describe(
        self,
        region: MemoryRegion,
        *,
        epoch: int = 0,
        generation: int = 0,
        expires_in_s: float = math.inf,
    ) -> RegionDescriptor:
        """Grants the region to whoever brings this descriptor."""
        self.check_open()
        if region.closed:
            raise TransportClosed("a closed region cannot be described")
        descriptor = RegionDescriptor(
            scheme=self.scheme,
            capability=new_capability(),
            nbytes=region.nbytes,
            epoch=epoch,
            generation=generation,
            expires_in_s=expires_in_s,
        )
        self._network.grant(descriptor, region)
        return descriptor

    def attach(
        self,
        descriptor: RegionDescriptor,
        *,
        fd: int | None = None,
        writable: bool = False,
        asked_at_s: float | None = None,
        populate: bool = False,
    ) -> AttachedMemory:
        """Finds the owner's region; `fd` means nothing here."""
        self.check_open()
        if descriptor.scheme != self.scheme:
            raise BadDescriptor(f"a descriptor of {descriptor.scheme!r} came to loopback")
        owned = self._network.find(descriptor)
        if owned.closed:
            raise TransportClosed("the owner closed this region")
        if writable and not owned.writable:
            raise RegionReadOnly("the owner registered this region for reading only")
        memory = MemoryRegion(owned.buffer, owned, writable=writable, shared=owned.shared)
        return self.keep_attached(descriptor, memory, asked_at_s=asked_at_s, populate=populate)

    def close(self) -> None:
        """Closes what is attached and wakes what waits; idempotent."""
        self.closed = True
        self._closing.set()
        self._released.set()
        self._late.clear()
        super().close()

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
            with _peer_bracket(source), _peer_bracket(target):
                move_piece(target, target_offset, source, source_offset, nbytes, deadline_s)
            if number in faults.corrupted:
                target.buffer[target_offset] ^= 1

        if number in faults.lost:
            self._closing.wait(min(deadline_s - self._clock_s(), threading.TIMEOUT_MAX))
            self.check_open()
            raise TransferTimedOut(f"piece {number} of {nbytes} bytes was lost")
        delay_s = faults.delay_s.get(number, 0.0)
        remaining_s = deadline_s - self._clock_s()
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
def _peer_bracket(region: MemoryRegion) -> Iterator[None]:
    """The landing bracket of the owner's own region, where `region` is an attached one."""
    owned = region.owner
    if not isinstance(owned, MemoryRegion):
        yield
        return
    try:
        owned.begin_landing()
    except TransportClosed:
        raise PeerLost("the peer closed this region", hint="attach another replica") from None
    try:
        yield
    finally:
        owned.end_landing()
