"""Transfers by memory copy: what `shm` and `loopback` have in common.

Rules kept here: before each piece the transfer looks at its deadline and at whether it was cancelled; a region that was
closed refuses the piece; a piece lands inside the landing region's bracket and nothing else does; `landed` runs outside
of it.

The callers' thread copies. From 256 KiB on, the `_async` forms copy in a worker thread, because the copy releases the
GIL; a hop into a thread and back costs about as much as 1 MiB of copying.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from snowskin.transport.api import TrafficClass
from snowskin.transport.cuda_copy import move_piece_by_gpu
from snowskin.transport.errors import (
    OutOfBounds,
    PeerLost,
    RegionExpired,
    TransportClosed,
    TransportError,
    TransportUnavailable,
)
from snowskin.transport.memory import MemoryRegion
from snowskin.transport.memory_kind import MemoryKind
from snowskin.transport.ordered import AttachedRegion, Order, OrderedTransport
from snowskin.transport.pages import Population
from snowskin.transport.runs import Run, check_bounds, joined, pieces
from snowskin.transport.views import RegionView
from snowskin.transport.words import Completion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.grants import Grant, GrantedRanges

log = logging.getLogger("snowskin.transport.copying")

INLINE_NBYTES = 256 * 1024
SILENT_PIECE_NBYTES = 16 << 20  # about 1 ms: how late a deadline or a cancellation may be seen

_SMALL_NBYTES = 16 * 1024

MovePiece = Callable[[MemoryRegion, int, MemoryRegion, int, int, float], None]
"""`(target, target_offset, source, source_offset, nbytes, deadline_s)`: lands one piece."""


class MemoryLink(Protocol):
    """What goes between the two sides of memory that both can reach, beside the bytes."""

    def check(self, now_s: float) -> None:
        """Raises GrantRefused, RegionExpired or PeerLost where the owner's word is no good any more."""

    def tell(self, nbytes: int, *, is_push: bool, note: bytes, deadline_s: float) -> None:
        """Tells the owner that a transfer is complete."""

    def close(self) -> None:
        """Says that this side has closed the region. Idempotent."""


def move_piece(
    target: MemoryRegion,
    target_offset: int,
    source: MemoryRegion,
    source_offset: int,
    nbytes: int,
    _deadline_s: float,
) -> None:
    """Copies one piece inside the target's bracket.

    A memoryview holds the GIL but costs 0.1 µs; numpy releases it. `bench spine` compares both.
    """
    gate = target.gate
    gate.begin()
    try:
        # Not by their properties: these are attached and checked, and a piece can be 4 KiB.
        if nbytes <= _SMALL_NBYTES:
            target._view[target_offset : target_offset + nbytes] = source._view[  # type: ignore[index]
                source_offset : source_offset + nbytes
            ]
        else:  # half the price of np.copyto
            target._buffer[target_offset : target_offset + nbytes] = source._buffer[  # type: ignore[index]
                source_offset : source_offset + nbytes
            ]
    except ValueError:
        # A source that closed in between has no bytes left (the target's bracket looks for itself);
        # anything else is a bug. The transport's own close closes one of the two.
        if not source.closed:
            raise
        raise TransportClosed("the source region was closed during the transfer") from None
    finally:
        gate.end()


class AttachedMemory(AttachedRegion):
    """A peer's region in this process's address space.

    Attributes:
        link: to its owner; None where nothing but the grant's life ends it.
        ranges: what of it is granted; None where all is.
    """

    __slots__ = ("_confirmed", "_population", "link", "ranges")

    memory: MemoryRegion

    def __init__(
        self,
        descriptor: RegionDescriptor,
        memory: MemoryRegion,
        *,
        peer: str,
        expires_at_s: float,
        forget: Callable[[AttachedRegion], None],
        confirmed: Callable[[AttachedMemory, int], None],
        link: MemoryLink | None,
        ranges: GrantedRanges | None,
        population: Population | None = None,
    ) -> None:
        """`forget` is called once, when the region is closed; `confirmed` whenever a view's reader looks back."""
        super().__init__(
            descriptor,
            peer=peer,
            writable=memory.writable,
            expires_at_s=expires_at_s,
            forget=forget,
            memory=memory,
        )
        self.link = link
        self.ranges = ranges
        self._confirmed = confirmed
        self._population = population

    def view(self, offset: int, nbytes: int) -> RegionView:
        """Shows a range where it lies, without a copy; what is read counts once its `confirm` returned.

        Raises:
            OutOfBounds: outside the region, or not granted. RegionExpired, GrantRefused, PeerLost,
            TransportClosed: as a transfer would.
        """
        array = self.memory.buffer  # taken first: what is closed later stays readable
        self._confirmed(self, 0)
        check_bounds([Run(offset, 0, nbytes)], remote_nbytes=self.nbytes, local_nbytes=self.nbytes)
        self.check_ranges([Run(offset, 0, nbytes)])
        return RegionView(array[offset : offset + nbytes], functools.partial(self._confirmed, self))

    def check_ranges(self, runs: Sequence[Run]) -> None:
        """Raises OutOfBounds where a run leaves what was granted."""
        if self.ranges is None:
            return
        for index, (offset, _, nbytes) in enumerate(runs):
            if not self.ranges.contain(offset, nbytes):
                raise OutOfBounds(
                    f"run {index} of {len(runs)}: {nbytes} bytes at {offset} were not granted; "
                    "nothing was moved",
                    hint="ask for what the grant covers",
                )

    def check_owner(self, now_s: float) -> None:
        """Raises TransportClosed, PeerLost where the owner is gone, and what its link says."""
        if self.closed:
            raise TransportClosed("the peer's region was closed")
        if self.lost:
            raise PeerLost(f"{self.peer} is gone", hint="attach another replica")
        if self.link is not None:
            self.link.check(now_s)

    def populated(self, timeout_s: float) -> bool:
        """Whether the pages that `populate` asked for are in, after at most `timeout_s`."""
        return self._population is None or self._population.wait(timeout_s)

    def close(self) -> None:
        """Ends the attachment; the mapping goes with the last copy or view that uses it. Idempotent."""
        if self._population is not None:
            self._population.stop()
            self._population = None
        super().close()
        self.memory.close()
        if self.link is not None:
            self.link.close()


class CopyingTransport(OrderedTransport):
    """All of a transport but how memory is granted and attached: its subclasses say that."""

    def __init__(
        self,
        *,
        now_s: Callable[[], float] = time.monotonic,
        move: MovePiece = move_piece,
        inline_nbytes: int = INLINE_NBYTES,
        silent_piece_nbytes: int = SILENT_PIECE_NBYTES,
    ) -> None:
        """Starts no thread yet.

        Args:
            now_s: the clock of deadlines.
            move: what lands a piece; `loopback` puts its faults here.
            inline_nbytes: from how many bytes on the async forms use a thread.
            silent_piece_nbytes: least piece where no `landed` wants to see it in the cache.
        """
        super().__init__(now_s=now_s, inline_nbytes=inline_nbytes)
        self._move = move
        self._silent_piece_nbytes = silent_piece_nbytes

    def keep_attached(
        self,
        descriptor: RegionDescriptor,
        memory: MemoryRegion,
        *,
        peer: str,
        asked_at_s: float | None,
        populate: bool,
        link: MemoryLink | None = None,
        ranges: GrantedRanges | None = None,
    ) -> AttachedMemory:
        """Keeps `memory` as the peer's region until it, or the transport, is closed."""
        expires_at_s = self.end_of_life_s(descriptor, asked_at_s)
        population = Population(memory.buffer, writable=memory.writable) if populate else None
        region = AttachedMemory(
            descriptor,
            memory,
            peer=peer,
            expires_at_s=expires_at_s,
            forget=self.forget,
            confirmed=self._confirmed,
            link=link,
            ranges=ranges,
            population=population,
        )
        self.keep(region)
        return region

    def carry_out(self, order: Order) -> None:
        """Copies piece by piece, on the calling thread."""
        remote, local, runs, is_pull, deadline_s, piece_nbytes, landed, _, note, control = order
        assert isinstance(remote, AttachedMemory), "what is attached here is memory"
        link = remote.link
        if note and link is None:
            raise TransportUnavailable(
                f"{remote.peer} cannot be told that a transfer is complete",
                hint="give `describe` an on_done, and `attach` the link that comes of it",
            )
        if remote.ranges is not None:
            remote.check_ranges(runs)
        memory = remote.memory
        if landed is None:
            # With a callback the caller's runs stay apart: a piece never crosses their boundaries.
            if piece_nbytes < self._silent_piece_nbytes:
                piece_nbytes = self._silent_piece_nbytes
            if len(runs) > 1:
                runs = joined(runs)
        now_s = self.now_s
        move = move_piece_by_gpu if local.kind is MemoryKind.CUDA else self._move
        told = landed is not None or control is not None
        for remote_offset, local_offset, size in pieces(runs, piece_nbytes):
            if told or now_s() >= deadline_s:
                order.check(now_s())
            if link is not None:
                remote.check_owner(now_s())
            if is_pull:
                move(local, local_offset, memory, remote_offset, size, deadline_s)
            else:
                move(memory, remote_offset, local, local_offset, size, deadline_s)
            if told:
                order.moved(local_offset, size)
        if link is not None:  # what was read before it took the grant back is good, no later byte
            remote.check_owner(now_s())

    def tell_owner(self, order: Order, nbytes: int) -> None:
        """Tells the owner at once."""
        assert isinstance(order.remote, AttachedMemory), "carry_out looked"
        assert order.remote.link is not None, "carry_out looked"
        order.remote.link.tell(
            nbytes, is_push=not order.is_pull, note=order.note, deadline_s=order.deadline_s
        )

    def complete(self, grant: Grant, nbytes: int, *, is_push: bool, note: bytes) -> None:
        """A peer says that it completed a transfer; what the owner's callback raises is the owner's."""
        if grant.on_done is None:
            return
        try:
            grant.on_done(
                Completion(
                    capability=grant.descriptor.capability,
                    nbytes=nbytes,
                    is_push=is_push,
                    note=note,
                )
            )
        except Exception:
            log.exception("on_done failed")

    def _confirmed(self, region: AttachedMemory, nbytes: int) -> None:
        """What a view says before (0 bytes) and after its bytes were read; counted as a pull, or by why not."""
        try:
            now_s = self.now_s()
            if self.closed or region.closed:
                raise TransportClosed("the region of this view is closed")
            if now_s >= region.expires_at_s:
                raise RegionExpired(
                    f"the grant ran out {now_s - region.expires_at_s:.3f} s ago",
                    hint="match again and read under the new lease",
                )
            region.check_owner(now_s)
        except TransportError as error:
            self.count_failure(error)
            raise
        if nbytes:
            self.count_moved(True, TrafficClass.DECODE_CRITICAL, nbytes)
