"""What a transport promises: bytes move between registered memories, exactly, or it says why not.

Words: a *region* is registered memory; the owner *describes* it, the peer *attaches* it; a *run* is
one contiguous range moved; a *piece* is what moves at once, at most `piece_nbytes` of one run.

Transports know no blocks, no leases and no gRPC. Descriptors travel by whatever the caller has.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.memory import MemoryRegion
from snowskin.transport.runs import Run

__all__ = [
    "PIECE_NBYTES",
    "Landed",
    "MemoryRegion",
    "RegionDescriptor",
    "RemoteRegion",
    "Run",
    "TrafficClass",
    "TransferReport",
    "Transport",
    "TransportStatistics",
]

PIECE_NBYTES = 1 << 20

Landed = Callable[[int, int], object]
"""Called as `landed(local_offset, nbytes)` right after a piece moved, while it is in the cache."""


class TrafficClass(enum.IntEnum):
    """How urgent a transfer is; lower goes first where a transport queues."""

    DECODE_CRITICAL = 0
    PREFETCH = 1
    REPLICATION = 2


class TransferReport(NamedTuple):
    """What one pull or push did; `num_runs` counts runs after adjacent ones were joined."""

    nbytes: int
    num_runs: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportStatistics:
    """Counters since the transport was opened, and what is held now."""

    num_pulls: int
    num_pushes: int
    pulled_nbytes: int
    pushed_nbytes: int
    nbytes_by_traffic: tuple[int, ...]  # indexed by TrafficClass
    num_refused: int  # bounds, closed, expired, read-only: nothing moved
    num_timed_out: int
    num_cancelled: int
    num_lost: int  # the peer, or a part on the way
    num_attached: int  # remote regions open now
    attached_nbytes: int


class RemoteRegion(Protocol):
    """A peer's memory, attached: what pulls read and pushes write."""

    @property
    def descriptor(self) -> RegionDescriptor:
        """What it was attached from."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    @property
    def writable(self) -> bool:
        """Whether `push` may write into it."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""

    def close(self) -> None:
        """Ends the attachment; when it returns, no push lands there any more. Idempotent."""


class Transport(Protocol):
    """Moves bytes between registered memories of two peers.

    Laws, each a test in `tests/contract/test_transport.py`:

    1. Registering copies nothing: what is pulled lies in the caller's own memory.
    2. A pull or push moves exactly the bytes of all its runs, or raises a TransportError.
    3. All bounds are checked before the first byte moves (OutOfBounds: nothing was moved), and so
       are closed, expired, read-only and quarantined regions.
    4. `landed` is called once per piece, right after it moved; pieces are at most `piece_nbytes`,
       never cross a run's boundary, keep the order of the runs, and together are all runs. If it
       raises, the transfer stops there and raises the same.
    5. `deadline_s` is absolute, on the clock of `time.monotonic`; when it passes, TransferTimedOut.
       A grant that ran out by the end of the transfer is RegionExpired, even if all bytes moved.
    6. A landing range belongs to the transport until the transfer's end. After a time-out or a
       cancellation it is quarantined (`MemoryRegion.quarantined_nbytes`; transfers into it raise
       LandingQuarantined) until nothing can land there any more.
    7. When `close` of a landing region has returned, nothing lands there. Closing either region, or
       the transport, fails transfers under way at their next piece with TransportClosed, and all
       later ones.
    8. `close` is idempotent everywhere, and afterwards the transport holds no descriptor, mapping
       or thread. Closing a transport closes what it attached; registered memory stays its owner's.
    9. An attached region is of exactly the size and scheme that its descriptor says, or attaching
       raises BadDescriptor.
    10. Methods may be called from any thread; the `_async` ones from any event loop.
    """

    @property
    def scheme(self) -> str:
        """The name in descriptors and in the registry."""

    def register(self, memory: object, *, writable: bool = True) -> MemoryRegion:
        """Registers numpy arrays, torch CPU tensors, `Memfd`s and any buffer, without copying."""

    def describe(
        self,
        region: MemoryRegion,
        *,
        epoch: int = 0,
        generation: int = 0,
        expires_in_s: float = float("inf"),
    ) -> RegionDescriptor:
        """Grants a peer the whole region, under a fresh capability."""

    def attach(
        self,
        descriptor: RegionDescriptor,
        *,
        fd: int | None = None,
        writable: bool = False,
        asked_at_s: float | None = None,
        populate: bool = False,
    ) -> RemoteRegion:
        """Opens a peer's region.

        Args:
            descriptor: what the owner sent.
            fd: the owner's memfd where the scheme passes one; stays the caller's, who closes it.
            writable: whether this side wants to push.
            asked_at_s: when this side asked for the grant, from where its life counts; now if None.
            populate: fault the pages in, in a thread.
        """

    def pull(
        self,
        remote: RemoteRegion,
        local: MemoryRegion,
        runs: Sequence[Run],
        *,
        deadline_s: float,
        piece_nbytes: int = PIECE_NBYTES,
        landed: Landed | None = None,
        traffic: TrafficClass = TrafficClass.DECODE_CRITICAL,
    ) -> TransferReport:
        """Reads all runs from the peer into local memory, on the calling thread."""

    def push(
        self,
        local: MemoryRegion,
        remote: RemoteRegion,
        runs: Sequence[Run],
        *,
        deadline_s: float,
        piece_nbytes: int = PIECE_NBYTES,
        landed: Landed | None = None,
        traffic: TrafficClass = TrafficClass.DECODE_CRITICAL,
    ) -> TransferReport:
        """Writes all runs from local memory to the peer; `landed` still says local offsets."""

    async def pull_async(
        self,
        remote: RemoteRegion,
        local: MemoryRegion,
        runs: Sequence[Run],
        *,
        deadline_s: float,
        piece_nbytes: int = PIECE_NBYTES,
        landed: Landed | None = None,
        traffic: TrafficClass = TrafficClass.DECODE_CRITICAL,
    ) -> TransferReport:
        """As `pull`, without holding the event loop; `landed` may run in a worker thread."""

    async def push_async(
        self,
        local: MemoryRegion,
        remote: RemoteRegion,
        runs: Sequence[Run],
        *,
        deadline_s: float,
        piece_nbytes: int = PIECE_NBYTES,
        landed: Landed | None = None,
        traffic: TrafficClass = TrafficClass.DECODE_CRITICAL,
    ) -> TransferReport:
        """As `push`, without holding the event loop; `landed` may run in a worker thread."""

    def statistics(self) -> TransportStatistics:
        """The counters, as of now."""

    def close(self) -> None:
        """Ends everything; idempotent."""
