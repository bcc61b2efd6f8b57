"""What a transport promises: bytes move between registered memories, exactly, or it says why not.

Words: a *region* is registered memory; the owner *describes* it, which *grants* a peer some ranges of
it; the peer *attaches* the descriptor; a *run* is one contiguous range moved; a *piece* is what moves
at once, at most `piece_nbytes` of one run.

Transports know no blocks, no leases and no gRPC. Descriptors travel by whatever the caller has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import TransferCancelled
from snowskin.transport.memory import MemoryRegion
from snowskin.transport.runs import Run
from snowskin.transport.traffic import TrafficClass
from snowskin.transport.words import MAX_NOTE_NBYTES, Completion, Range

__all__ = [
    "MAX_NOTE_NBYTES",
    "PIECE_NBYTES",
    "Completion",
    "Landed",
    "MemoryRegion",
    "Range",
    "RegionDescriptor",
    "RemoteRegion",
    "Run",
    "TrafficClass",
    "TransferControl",
    "TransferReport",
    "Transport",
    "TransportStatistics",
]

PIECE_NBYTES = 1 << 20

Landed = Callable[[int, int], object]
"""Called as `landed(local_offset, nbytes)` right after a piece moved, while it is in the cache."""


class TransferControl:
    """Looks at one transfer while it runs, and ends it; from any thread. For one transfer only.

    Attributes:
        moved_nbytes: how much of it has moved, by pieces; at its end all of it.
        cancelled: whether `cancel` was called.
    """

    __slots__ = ("_interrupts", "_lock", "cancelled", "moved_nbytes")

    def __init__(self) -> None:
        """Of a transfer that has not begun."""
        self.moved_nbytes = 0
        self.cancelled = False
        self._interrupts: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Ends the transfer with TransferCancelled, at its next piece at the latest. Idempotent."""
        with self._lock:
            self.cancelled = True
            interrupts, self._interrupts = self._interrupts, []
        for interrupt in interrupts:
            interrupt()

    def on_cancel(self, interrupt: Callable[[], object]) -> None:
        """For transports: `cancel` calls `interrupt`, once, from whichever thread; at once if it was called before."""
        with self._lock:
            if not self.cancelled:
                self._interrupts.append(interrupt)
                return
        interrupt()

    def check(self) -> None:
        """Raises TransferCancelled after `cancel`."""
        if self.cancelled:
            raise TransferCancelled("cancelled by the caller")


class TransferReport(NamedTuple):
    """What one pull or push did; `num_runs` counts runs after adjacent ones were joined."""

    nbytes: int
    num_runs: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportStatistics:
    """Counters since the transport was opened, and what is held now.

    What this side asked for comes first; `num_served*` and `served_nbytes` are what peers asked of it, where
    the owner has a part in a transfer.
    """

    num_pulls: int
    num_pushes: int
    pulled_nbytes: int
    pushed_nbytes: int
    nbytes_by_traffic: tuple[int, ...]  # indexed by TrafficClass
    num_refused: int  # bounds, closed, expired, read-only, refused by the owner
    num_timed_out: int
    num_cancelled: int
    num_lost: int  # the peer, or a part on the way
    num_attached: int  # remote regions open now
    attached_nbytes: int
    num_grants: int = 0
    num_served: int = 0  # transfers that peers completed with this side's memory
    served_nbytes: int = 0
    num_served_failed: int = 0  # ended on the way: peer gone, deadline, grant taken back
    refused_by_reason: tuple[
        tuple[str, int], ...
    ] = ()  # what peers were refused, by error's reason
    num_connections: int = 0  # open now, both sides
    num_connected: int = 0  # ever opened by this side
    num_peers_lost: int = 0


class RemoteRegion(Protocol):
    """A peer's memory, attached: what pulls read and pushes write."""

    @property
    def descriptor(self) -> RegionDescriptor:
        """What it was attached from."""

    @property
    def peer(self) -> str:
        """Whose memory it is, for errors and logs."""

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
        """Ends the attachment, and transfers that use it. Idempotent.

        No push begins any more. What one had sent already over a wire may land for a moment longer: that nothing does
        is the owner's to say, by `revoke`.
        """


class Transport(Protocol):
    """Moves bytes between registered memories of two peers.

    Laws, each a test in `tests/contract/`:

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
    8. `close` is idempotent everywhere, and afterwards the transport holds no descriptor, mapping,
       connection or thread. Closing a transport closes what it attached and revokes what it
       granted; registered memory stays its owner's.
    9. An attached region is of exactly the size and scheme that its descriptor says, or attaching
       or the first transfer raises a TransportError.
    10. Methods may be called from any thread; the `_async` ones from any event loop.
    11. A descriptor opens only the ranges it was given for, for writing only where it says so, only
        under its own capability, epoch and generation; else GrantRefused, OutOfBounds or
        RegionReadOnly, and nothing moved.
    12. `revoke`: once it has returned, nothing moves under the grant any more; transfers under way
        fail at their next piece. `renew` gives a living grant a new life. Where `is_one_sided`, the
        peer reaches the memory by itself: then both hold for what is attached later, and the memory
        is free for others only when the peer's attachment is gone, or the grant's life is over.
    13. A transfer with a `note` calls the grant's `on_done` exactly once, soon after its last byte
        moved; one that failed never does. `note` is at most 256 bytes.
    14. `TransferControl.cancel` ends a transfer with TransferCancelled at its next piece, from any
        thread; `moved_nbytes` never falls, and is the whole at the end.
    15. Where transfers wait for each other, the lower `TrafficClass` goes first.
    16. A peer that is gone is PeerLost, and the error names it; within the transfer's deadline.
    """

    @property
    def scheme(self) -> str:
        """The name in descriptors and in the registry."""

    @property
    def is_one_sided(self) -> bool:
        """Whether peers reach granted memory without this side's part in each transfer."""

    def register(self, memory: object, *, writable: bool = True) -> MemoryRegion:
        """Registers numpy arrays, torch tensors, `Memfd`s, mmaps and any buffer, without copying.

        Raises:
            TransportUnavailable: memory of a kind that this transport cannot reach.
        """

    def describe(
        self,
        region: MemoryRegion,
        *,
        ranges: Sequence[Range] | None = None,
        writable: bool = False,
        epoch: int = 0,
        generation: int = 0,
        expires_in_s: float = float("inf"),
        on_done: Callable[[Completion], None] | None = None,
    ) -> RegionDescriptor:
        """Grants a peer some ranges of the region under a fresh capability.

        Args:
            region: registered here.
            ranges: which parts; all of it if None. Offsets stay those of the region.
            writable: whether the peer may push.
            epoch: this owner's life.
            generation: how often this memory was given anew.
            expires_in_s: life from now.
            on_done: called from any thread, short, when a peer completed a transfer with a note.
        """

    def renew(self, descriptor: RegionDescriptor, *, expires_in_s: float) -> None:
        """Gives a grant a new life from now on; GrantRefused where it is over."""

    def revoke(self, descriptor: RegionDescriptor) -> None:
        """Takes a grant back; waits for the piece under way. Idempotent."""

    def attach(
        self,
        descriptor: RegionDescriptor,
        *,
        fd: int | None = None,
        link_fd: int | None = None,
        writable: bool = False,
        asked_at_s: float | None = None,
        populate: bool = False,
    ) -> RemoteRegion:
        """Opens a peer's region; does not wait for the peer.

        Args:
            descriptor: what the owner sent.
            fd: the owner's memfd where the scheme passes one; stays the caller's, who closes it.
            link_fd: this peer's end of the owner's link where the scheme passes one for notes; as `fd`.
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
        note: bytes = b"",
        control: TransferControl | None = None,
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
        note: bytes = b"",
        control: TransferControl | None = None,
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
        note: bytes = b"",
        control: TransferControl | None = None,
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
        note: bytes = b"",
        control: TransferControl | None = None,
    ) -> TransferReport:
        """As `push`, without holding the event loop; `landed` may run in a worker thread."""

    def statistics(self) -> TransportStatistics:
        """The counters, as of now."""

    def close(self) -> None:
        """Ends everything; idempotent."""
