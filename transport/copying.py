"""Transfers by memory copy: what `shm` and `loopback` have in common.

Rules kept here: before each piece the transfer looks at its deadline and at whether it was cancelled; a region that was
closed refuses the piece; a piece lands inside the landing region's bracket and nothing else does; `landed` runs outside
of it.

The callers' thread copies. From 256 KiB on, the `_async` forms copy in a worker thread, because the copy releases the
GIL; a hop into a thread and back costs about as much as 1 MiB of copying.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from snowskin.transport.errors import TransportClosed, TransportUnavailable
from snowskin.transport.memory import MemoryRegion
from snowskin.transport.ordered import AttachedRegion, Order, OrderedTransport
from snowskin.transport.pages import Population
from snowskin.transport.runs import joined, pieces

if TYPE_CHECKING:
    from snowskin.transport.descriptor import RegionDescriptor

INLINE_NBYTES = 256 * 1024
SILENT_PIECE_NBYTES = 16 << 20  # about 1 ms: how late a deadline or a cancellation may be seen

_SMALL_NBYTES = 16 * 1024

MovePiece = Callable[[MemoryRegion, int, MemoryRegion, int, int, float], None]
"""`(target, target_offset, source, source_offset, nbytes, deadline_s)`: lands one piece."""

TellOwner = Callable[[int, bool, bytes], None]
"""`(nbytes, is_push, note)`: tells the owner of a region that a transfer is complete."""


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
        if nbytes <= _SMALL_NBYTES:
            target.view[target_offset : target_offset + nbytes] = source.view[
                source_offset : source_offset + nbytes
            ]
        else:  # half the price of np.copyto
            target.buffer[target_offset : target_offset + nbytes] = source.buffer[
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
    """A peer's region in this process's address space."""

    __slots__ = ("_population", "tell_owner")

    memory: MemoryRegion

    def __init__(
        self,
        descriptor: RegionDescriptor,
        memory: MemoryRegion,
        *,
        peer: str,
        expires_at_s: float,
        forget: Callable[[AttachedRegion], None],
        tell_owner: TellOwner | None,
        population: Population | None = None,
    ) -> None:
        """`forget` is called once, when the region is closed."""
        super().__init__(
            descriptor,
            peer=peer,
            writable=memory.writable,
            expires_at_s=expires_at_s,
            forget=forget,
            memory=memory,
        )
        self._population = population
        self.tell_owner = tell_owner

    def populated(self, timeout_s: float) -> bool:
        """Whether the pages that `populate` asked for are in, after at most `timeout_s`."""
        return self._population is None or self._population.wait(timeout_s)

    def close(self) -> None:
        """Ends the attachment; the mapping goes with the last copy that uses it. Idempotent."""
        if self._population is not None:
            self._population.stop()
            self._population = None
        super().close()
        self.memory.close()


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
        tell_owner: TellOwner | None = None,
    ) -> AttachedMemory:
        """Keeps `memory` as the peer's region until it, or the transport, is closed."""
        asked_at_s = self.now_s() if asked_at_s is None else asked_at_s
        population = Population(memory.buffer, writable=memory.writable) if populate else None
        region = AttachedMemory(
            descriptor,
            memory,
            peer=peer,
            expires_at_s=asked_at_s + descriptor.expires_in_s,
            forget=self.forget,
            tell_owner=tell_owner,
            population=population,
        )
        self.keep(region)
        return region

    def carry_out(self, order: Order) -> None:
        """Copies piece by piece, on the calling thread."""
        remote, local, runs, is_pull, deadline_s, piece_nbytes, landed, _, note, control = order
        assert isinstance(remote, AttachedMemory), "what is attached here is memory"
        if note and remote.tell_owner is None:
            raise TransportUnavailable(
                f"{remote.peer} cannot be told that a transfer is complete",
                hint="give `describe` an on_done, and pass what it needs for notes",
            )
        memory = remote.memory
        if landed is None:
            # With a callback the caller's runs stay apart: a piece never crosses their boundaries.
            if piece_nbytes < self._silent_piece_nbytes:
                piece_nbytes = self._silent_piece_nbytes
            if len(runs) > 1:
                runs = joined(runs)
        now_s, move = self.now_s, self._move
        told = landed is not None or control is not None
        for remote_offset, local_offset, size in pieces(runs, piece_nbytes):
            if told or now_s() >= deadline_s:
                order.check(now_s())
            if is_pull:
                move(local, local_offset, memory, remote_offset, size, deadline_s)
            else:
                move(memory, remote_offset, local, local_offset, size, deadline_s)
            if told:
                order.moved(local_offset, size)

    def tell_owner(self, order: Order, nbytes: int) -> None:
        """Tells the owner at once."""
        assert isinstance(order.remote, AttachedMemory), "carry_out looked"
        assert order.remote.tell_owner is not None, "carry_out looked"
        order.remote.tell_owner(nbytes, not order.is_pull, order.note)
