"""Transfers by memory copy: what `shm` and `loopback` have in common.

Rules kept here: everything is checked before the first piece; before each piece the transfer looks
at its deadline and at whether it was cancelled; a region that was closed refuses the piece; a piece
lands inside the landing region's bracket and nothing else does; `landed` runs outside of it.

The callers' thread copies. From 256 KiB on, the `_async` forms copy in a worker thread, because the
copy releases the GIL; a hop into a thread and back costs about as much as 1 MiB of copying.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from snowskin.transport.api import (
    PIECE_NBYTES,
    Landed,
    RemoteRegion,
    TrafficClass,
    TransferReport,
    TransportStatistics,
)
from snowskin.transport.errors import (
    BadDescriptor,
    PeerLost,
    RegionExpired,
    RegionReadOnly,
    TransferCancelled,
    TransferTimedOut,
    TransportClosed,
    TransportError,
)
from snowskin.transport.memory import MemoryRegion, Population
from snowskin.transport.runs import Run, check_bounds, joined, pieces

if TYPE_CHECKING:
    from snowskin.transport.descriptor import RegionDescriptor

INLINE_NBYTES = 256 * 1024
SILENT_PIECE_NBYTES = 16 << 20  # about 1 ms: how late a deadline or a cancellation may be seen
NUM_WORKERS = 2

_SMALL_NBYTES = 16 * 1024
_SETTLE_S = 0.05

MovePiece = Callable[[MemoryRegion, int, MemoryRegion, int, int, float], None]
"""`(target, target_offset, source, source_offset, nbytes, deadline_s)`: lands one piece."""


def move_piece(
    target: MemoryRegion,
    target_offset: int,
    source: MemoryRegion,
    source_offset: int,
    nbytes: int,
    _deadline_s: float,
) -> None:
    """Copies one piece inside the target's bracket.

    A memoryview holds the GIL but costs 0.3 µs; numpy releases it. `bench spine` compares both.
    """
    target.begin_landing()
    try:
        target_end = target_offset + nbytes
        source_end = source_offset + nbytes
        if nbytes <= _SMALL_NBYTES:
            target.view[target_offset:target_end] = source.view[source_offset:source_end]
        else:
            np.copyto(
                target.buffer[target_offset:target_end], source.buffer[source_offset:source_end]
            )
    except ValueError:
        # A source that closed in between has no bytes left (the target's bracket looks for itself);
        # anything else is a bug. The transport's own close closes one of the two.
        if not source.closed:
            raise
        raise TransportClosed("the source region was closed during the transfer") from None
    finally:
        target.end_landing()


class _Order(NamedTuple):
    """The arguments of one pull or push, on their way to whichever thread copies."""

    remote: RemoteRegion
    local: MemoryRegion
    runs: Sequence[Run]
    is_pull: bool
    deadline_s: float
    piece_nbytes: int
    landed: Landed | None
    traffic: TrafficClass


class AttachedMemory:
    """A peer's region in this process's address space; a `RemoteRegion`."""

    __slots__ = ("_forget", "_population", "descriptor", "expires_at_s", "lost", "memory")

    def __init__(
        self,
        descriptor: RegionDescriptor,
        memory: MemoryRegion,
        *,
        expires_at_s: float,
        forget: Callable[[AttachedMemory], None],
        population: Population | None = None,
    ) -> None:
        """`forget` is called once, when the region is closed."""
        self.descriptor: RegionDescriptor = descriptor
        self.memory = memory
        self.expires_at_s = expires_at_s
        self.lost = False
        self._forget = forget
        self._population = population

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.memory.nbytes

    @property
    def writable(self) -> bool:
        """Whether `push` may write into it."""
        return self.memory.writable

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.memory.closed

    def populated(self, timeout_s: float) -> bool:
        """Whether the pages that `populate` asked for are in, after at most `timeout_s`."""
        return self._population is None or self._population.wait(timeout_s)

    def close(self) -> None:
        """Ends the attachment; the mapping goes with the last copy that uses it. Idempotent."""
        if self._population is not None:
            self._population.stop()
            self._population = None
        self.memory.close()
        self._forget(self)


class CopyingTransport:
    """All of a transport but how memory is described and attached: its subclasses say that."""

    def __init__(
        self,
        name: str,
        *,
        now_s: Callable[[], float] = time.monotonic,
        move: MovePiece = move_piece,
        inline_nbytes: int = INLINE_NBYTES,
        silent_piece_nbytes: int = SILENT_PIECE_NBYTES,
    ) -> None:
        """Starts no thread yet.

        Args:
            name: the scheme, for errors and thread names.
            now_s: the clock of deadlines.
            move: what lands a piece; `loopback` puts its faults here.
            inline_nbytes: from how many bytes on the async forms use a thread.
            silent_piece_nbytes: least piece where no `landed` wants to see it in the cache.
        """
        self.name = name
        self.closed = False
        self._now_s = now_s
        self._move = move
        self._inline_nbytes = inline_nbytes
        self._silent_piece_nbytes = silent_piece_nbytes
        self._lock = threading.Lock()
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None
        self._attached: set[AttachedMemory] = set()
        self._num_transfers = {True: 0, False: 0}  # by is_pull
        self._moved_nbytes = {True: 0, False: 0}
        self._nbytes_by_traffic = [0] * len(TrafficClass)
        self._num_failed = {"refused": 0, "timed_out": 0, "cancelled": 0, "lost": 0}

    def keep_attached(
        self,
        descriptor: RegionDescriptor,
        memory: MemoryRegion,
        *,
        asked_at_s: float | None,
        populate: bool,
    ) -> AttachedMemory:
        """Keeps `memory` as the peer's region until it, or the transport, is closed."""
        asked_at_s = self._now_s() if asked_at_s is None else asked_at_s
        population = Population(memory.buffer, writable=memory.writable) if populate else None
        region = AttachedMemory(
            descriptor,
            memory,
            expires_at_s=asked_at_s + descriptor.expires_in_s,
            forget=self._attached.discard,
            population=population,
        )
        with self._lock:
            if not self.closed:
                self._attached.add(region)
                return region
        region.close()
        raise TransportClosed(f"transport {self.name} is closed")

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
        """Copies from the peer's memory on the calling thread."""
        order = _Order(remote, local, runs, True, deadline_s, piece_nbytes, landed, traffic)
        return self._transfer(order)

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
        """Copies into the peer's memory on the calling thread."""
        order = _Order(remote, local, runs, False, deadline_s, piece_nbytes, landed, traffic)
        return self._transfer(order)

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
        """As `pull`; large ones in a worker thread."""
        order = _Order(remote, local, runs, True, deadline_s, piece_nbytes, landed, traffic)
        return await self._transfer_async(order)

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
        """As `push`; large ones in a worker thread."""
        order = _Order(remote, local, runs, False, deadline_s, piece_nbytes, landed, traffic)
        return await self._transfer_async(order)

    def statistics(self) -> TransportStatistics:
        """The counters, as of now."""
        with self._lock:
            attached = list(self._attached)
            return TransportStatistics(
                num_pulls=self._num_transfers[True],
                num_pushes=self._num_transfers[False],
                pulled_nbytes=self._moved_nbytes[True],
                pushed_nbytes=self._moved_nbytes[False],
                nbytes_by_traffic=tuple(self._nbytes_by_traffic),
                num_refused=self._num_failed["refused"],
                num_timed_out=self._num_failed["timed_out"],
                num_cancelled=self._num_failed["cancelled"],
                num_lost=self._num_failed["lost"],
                num_attached=len(attached),
                attached_nbytes=sum(region.nbytes for region in attached),
            )

    def close(self) -> None:
        """Closes what is attached and waits for the workers, at most one piece each; idempotent."""
        with self._lock:
            self.closed = True
            attached = list(self._attached)
            executor, self._executor = self._executor, None
        for region in attached:
            region.close()
        if executor is not None:
            executor.shutdown(wait=True)

    def _transfer(self, order: _Order, stop: threading.Event | None = None) -> TransferReport:
        """Moves all runs on the calling thread; what fails is counted by kind."""
        try:
            return self._checked_transfer(order, stop)
        except TransportError as error:
            if isinstance(error, PeerLost) and isinstance(order.remote, AttachedMemory):
                order.remote.lost = True
            with self._lock:
                self._num_failed[_failure_kind(error)] += 1
            raise

    def _checked_transfer(self, order: _Order, stop: threading.Event | None) -> TransferReport:
        started_s = self._now_s()
        remote, local, runs, is_pull, deadline_s, piece_nbytes, landed, traffic = order
        attached = self._own(remote)
        source, target = (attached.memory, local) if is_pull else (local, attached.memory)
        self._check_sides(attached, source, target, started_s)
        nbytes = check_bounds(runs, remote_nbytes=attached.nbytes, local_nbytes=local.nbytes)
        if target.has_quarantine:
            target.check_not_quarantined(_landing_ranges(runs, is_pull=is_pull))
        wanted = runs if len(runs) < 2 else joined(runs)
        # With a callback the caller's runs stay apart: a piece never crosses their boundaries.
        batch = wanted if landed is None else runs
        if landed is None:
            piece_nbytes = max(piece_nbytes, self._silent_piece_nbytes)
        for piece in batch if nbytes <= piece_nbytes else pieces(batch, piece_nbytes):
            if self._now_s() >= deadline_s:
                raise TransferTimedOut(
                    f"deadline passed {self._now_s() - deadline_s:.3f} s ago, within {nbytes} bytes"
                )
            if stop is not None and stop.is_set():
                raise TransferCancelled("cancelled by the caller")
            remote_offset, local_offset, size = piece
            if is_pull:
                self._move(target, local_offset, source, remote_offset, size, deadline_s)
            else:
                self._move(target, remote_offset, source, local_offset, size, deadline_s)
            if landed is not None:
                landed(local_offset, size)
        ended_s = self._now_s()
        if ended_s > attached.expires_at_s:
            raise RegionExpired(
                f"the grant ran out {ended_s - attached.expires_at_s:.3f} s before the end",
                hint="match again and pull under the new lease",
            )
        with self._lock:
            self._num_transfers[is_pull] += 1
            self._moved_nbytes[is_pull] += nbytes
            self._nbytes_by_traffic[traffic] += nbytes
        return TransferReport(nbytes, len(wanted), ended_s - started_s)

    async def _transfer_async(self, order: _Order) -> TransferReport:
        """Moves all runs, in a worker thread from `inline_nbytes` on.

        Cancelled, it waits 50 ms at most for the piece under way; if that is stuck, what it may
        still write stays in quarantine until the thread has ended.
        """
        if sum(run[2] for run in order.runs) < self._inline_nbytes:
            return self._transfer(order)
        stop = threading.Event()
        running = self._submit(functools.partial(self._transfer, order, stop))
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            stop.set()
            if not running.cancelled():  # a transfer that never began leaves nothing behind
                target = order.local if order.is_pull else self._own(order.remote).memory
                target.quarantine(running, _landing_ranges(order.runs, is_pull=order.is_pull))
                running.add_done_callback(target.lift_quarantine)
                await _settled(running)
            raise

    def check_open(self) -> None:
        """Raises TransportClosed after `close`."""
        if self.closed:
            raise TransportClosed(f"transport {self.name} is closed")

    def _own(self, remote: RemoteRegion) -> AttachedMemory:
        if not isinstance(remote, AttachedMemory) or remote.descriptor.scheme != self.name:
            raise BadDescriptor(
                f"this region was not attached by transport {self.name}",
                hint=f"attach it: transport {self.name} cannot use another's regions",
            )
        return remote

    def _check_sides(
        self, attached: AttachedMemory, source: MemoryRegion, target: MemoryRegion, now_s: float
    ) -> None:
        if self.closed or source.closed or target.closed:
            what = f"transport {self.name}" if self.closed else "a region of this transfer"
            raise TransportClosed(f"{what} is closed")
        if attached.lost:
            raise PeerLost("the way to this region was cut", hint="attach it anew")
        if now_s >= attached.expires_at_s:
            raise RegionExpired(
                f"the grant ran out {now_s - attached.expires_at_s:.3f} s ago",
                hint="match again and pull under the new lease",
            )
        if not target.writable:
            raise RegionReadOnly(
                f"the landing region of {target.nbytes} bytes is read-only",
                hint="register or attach it with writable=True",
            )

    def _submit(
        self, work: Callable[[], TransferReport]
    ) -> concurrent.futures.Future[TransferReport]:
        with self._lock:
            if self.closed:
                raise TransportClosed(f"transport {self.name} is closed")
            if self._executor is None:
                self._executor = concurrent.futures.ThreadPoolExecutor(
                    NUM_WORKERS, thread_name_prefix=f"snowskin-{self.name}"
                )
            return self._executor.submit(work)


def _failure_kind(error: TransportError) -> str:
    if isinstance(error, TransferTimedOut):
        return "timed_out"
    if isinstance(error, TransferCancelled):
        return "cancelled"
    return "lost" if isinstance(error, PeerLost) else "refused"


def _landing_ranges(runs: Sequence[Run], *, is_pull: bool) -> list[tuple[int, int]]:
    return [
        (run.local_offset if is_pull else run.remote_offset, run.nbytes) for run in joined(runs)
    ]


async def _settled(running: concurrent.futures.Future[TransferReport]) -> None:
    """Waits until `running` has ended in whatever way, or 50 ms."""
    ended = asyncio.wrap_future(running)
    # Nobody else asks how it ended; unasked, asyncio would log it as lost.
    ended.add_done_callback(lambda future: future.cancelled() or future.exception())
    await asyncio.wait([ended], timeout=_SETTLE_S)
