"""What every transport does alike: takes orders, checks them whole, counts how they end, runs them off the loop.

Rules kept here: everything is checked before `carry_out` moves the first byte; a grant that ran out meanwhile fails the
transfer after its last; what fails is counted by kind. A cancelled transfer's landing ranges are in quarantine until
its thread has ended.

A transport is a subclass that says how bytes move (`carry_out`), and how memory is granted and attached.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

from snowskin.transport.api import (
    MAX_NOTE_NBYTES,
    PIECE_NBYTES,
    Landed,
    RemoteRegion,
    TrafficClass,
    TransferControl,
    TransferReport,
    TransportStatistics,
)
from snowskin.transport.descriptor import RegionDescriptor, new_capability
from snowskin.transport.errors import (
    BadDescriptor,
    OutOfBounds,
    PeerLost,
    RegionExpired,
    RegionReadOnly,
    TransferCancelled,
    TransferTimedOut,
    TransportClosed,
    TransportError,
    TransportUnavailable,
)
from snowskin.transport.grants import GrantTable
from snowskin.transport.memory import MemoryRegion, Quarantine, region_of
from snowskin.transport.memory_kind import HOST_KINDS
from snowskin.transport.runs import Run, check_bounds, joined, num_joined
from snowskin.transport.workers import PriorityWorkers

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Sequence

    from snowskin.transport.words import Completion, Range

NUM_WORKERS = 4
_SETTLE_S = 0.05
_MAX_UNCOUNTED = 1024
# Makes a named tuple in half the time of its own constructor; every transfer makes two.
_new = tuple.__new__


class Order(NamedTuple):
    """One pull or push, on its way to whichever thread carries it out."""

    remote: AttachedRegion
    local: MemoryRegion
    runs: Sequence[Run]
    is_pull: bool
    deadline_s: float
    piece_nbytes: int
    landed: Landed | None
    traffic: TrafficClass
    note: bytes
    control: TransferControl | None

    def check(self, now_s: float) -> None:
        """Raises TransferCancelled, or TransferTimedOut: what a transfer looks at before each piece."""
        if self.control is not None:
            self.control.check()
        if now_s >= self.deadline_s:
            raise TransferTimedOut(
                f"deadline passed {now_s - self.deadline_s:.3f} s ago, at {self.remote.peer}"
            )

    def moved(self, local_offset: int, nbytes: int) -> None:
        """Tells who looks on that a piece is done; raises what `landed` raises."""
        if self.control is not None:
            self.control.moved_nbytes += nbytes
        if self.landed is not None:
            self.landed(local_offset, nbytes)

    def landing_ranges(self) -> list[tuple[int, int]]:
        """Where its bytes go: offset and size, joined where they touch."""
        return [
            (run.local_offset if self.is_pull else run.remote_offset, run.nbytes)
            for run in joined(self.runs)
        ]


class AttachedRegion:
    """A peer's region, of whatever transport; a `RemoteRegion`."""

    __slots__ = (
        "_forget",
        "closed",
        "descriptor",
        "expires_at_s",
        "lost",
        "memory",
        "peer",
        "quarantined",
        "scheme",
        "writable",
    )

    def __init__(
        self,
        descriptor: RegionDescriptor,
        *,
        peer: str,
        writable: bool,
        expires_at_s: float,
        forget: Callable[[AttachedRegion], None],
        memory: MemoryRegion | None = None,
    ) -> None:
        """`forget` is called once, when the region is closed; `memory` is the peer's, where it can be reached."""
        self.descriptor: RegionDescriptor = descriptor
        self.scheme = descriptor.scheme
        self.peer = peer
        self.memory = memory
        self.quarantined = Quarantine() if memory is None else memory.quarantined
        self.writable = writable
        self.expires_at_s = expires_at_s
        self.lost = False  # for good: the way to it does not come back
        self.closed = False
        self._forget = forget

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.descriptor.nbytes

    def close(self) -> None:
        """Ends the attachment. Idempotent."""
        if not self.closed:
            self.closed = True
            self._forget(self)


class OrderedTransport(ABC):
    """All of a transport but how bytes move and how a peer's memory is reached."""

    scheme: str
    is_one_sided = False
    memory_kinds = HOST_KINDS  # what can be registered, and moved

    def __init__(
        self,
        *,
        now_s: Callable[[], float] = time.monotonic,
        inline_nbytes: int,
        num_workers: int = NUM_WORKERS,
    ) -> None:
        """Starts no thread yet.

        Args:
            now_s: the clock of deadlines and lives.
            inline_nbytes: from how many bytes on the async forms use a thread.
            num_workers: how many such threads there may be.
        """
        self.closed = False
        self.now_s = now_s
        self.grants = GrantTable()
        self._inline_nbytes = inline_nbytes
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._workers: PriorityWorkers | None = None
        self._attached: set[AttachedRegion] = set()
        # By is_pull, then traffic class: how many transfers, how many bytes.
        self._done: deque[tuple[bool, TrafficClass, int]] = deque()  # not yet in `_moved`
        self._moved = [[[0, 0] for _ in TrafficClass] for _ in (False, True)]
        self._num_failed = {"refused": 0, "timed_out": 0, "cancelled": 0, "lost": 0}
        self._served: Counter[str] = Counter()
        self._refused_by_reason: Counter[str] = Counter()

    # What a transport says for itself.

    @abstractmethod
    def carry_out(self, order: Order) -> None:
        """Moves all bytes of a checked order on the calling thread, or raises.

        It calls `order.check` before and `order.moved` after each piece.
        """

    def tell_owner(self, order: Order, nbytes: int) -> None:
        """Sends an order's note once all its `nbytes` have moved and its grant was good to the end.

        Transports whose owner sees the last byte go carry the note in `carry_out` and leave this empty.
        """
        return

    def descriptor_extra(self, region: MemoryRegion) -> bytes:
        """What a descriptor of `region` carries for this transport alone."""
        return b""

    # What all do alike.

    def register(self, memory: object, *, writable: bool = True) -> MemoryRegion:
        """Registers memory without copying."""
        self.check_open()
        region = region_of(memory, writable=writable)
        self.check_kind(region)
        return region

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
        """Grants ranges of the region under a fresh capability."""
        self.check_open()
        if region.closed:
            raise TransportClosed("a closed region cannot be described")
        self.check_kind(region)
        if writable and not region.writable:
            raise RegionReadOnly(
                "memory registered for reading only cannot be granted for writing",
                hint="register it with writable=True",
            )
        descriptor = RegionDescriptor(
            scheme=self.scheme,
            capability=new_capability(),
            nbytes=region.nbytes,
            epoch=epoch,
            generation=generation,
            expires_in_s=expires_in_s,
            writable=writable,
            extra=self.descriptor_extra(region),
        )
        now_s = self.now_s()
        self.grants.add(descriptor, region, ranges, now_s=now_s, on_done=on_done)
        return descriptor

    def end_of_life_s(self, descriptor: RegionDescriptor, asked_at_s: float | None) -> float:
        """Until when a grant lives that was asked for then; now, if None."""
        asked_at_s = self.now_s() if asked_at_s is None else asked_at_s
        return asked_at_s + descriptor.expires_in_s

    def renew(self, descriptor: RegionDescriptor, *, expires_in_s: float) -> None:
        """Gives a grant a new life from now on."""
        self.grants.renew(descriptor.capability, expires_in_s=expires_in_s, now_s=self.now_s())

    def revoke(self, descriptor: RegionDescriptor) -> None:
        """Takes a grant back."""
        self.grants.revoke(descriptor.capability)

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
        """Reads all runs from the peer, on the calling thread."""
        order = remote, local, runs, True, deadline_s, piece_nbytes, landed, traffic, note, control
        return self._transfer(_new(Order, order))

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
        """Writes all runs to the peer, on the calling thread."""
        order = remote, local, runs, False, deadline_s, piece_nbytes, landed, traffic, note, control
        return self._transfer(_new(Order, order))

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
        """As `pull`; large ones in a worker thread."""
        control = control or TransferControl()
        order = remote, local, runs, True, deadline_s, piece_nbytes, landed, traffic, note, control
        return await self.transfer_async(_new(Order, order))

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
        """As `push`; large ones in a worker thread."""
        control = control or TransferControl()
        order = remote, local, runs, False, deadline_s, piece_nbytes, landed, traffic, note, control
        return await self.transfer_async(_new(Order, order))

    def statistics(self) -> TransportStatistics:
        """The counters, as of now."""
        self._count_done()
        with self._lock:
            attached = list(self._attached)
            pushed, pulled = self._moved
            return TransportStatistics(
                num_pulls=sum(num for num, _ in pulled),
                num_pushes=sum(num for num, _ in pushed),
                pulled_nbytes=sum(nbytes for _, nbytes in pulled),
                pushed_nbytes=sum(nbytes for _, nbytes in pushed),
                nbytes_by_traffic=tuple(
                    sum(way[traffic][1] for way in self._moved) for traffic in TrafficClass
                ),
                num_refused=self._num_failed["refused"],
                num_timed_out=self._num_failed["timed_out"],
                num_cancelled=self._num_failed["cancelled"],
                num_lost=self._num_failed["lost"],
                num_attached=len(attached),
                attached_nbytes=sum(region.nbytes for region in attached),
                num_grants=len(self.grants),
                num_served=self._served["transfers"],
                served_nbytes=self._served["nbytes"],
                num_served_failed=self._served["failed"],
                refused_by_reason=tuple(sorted(self._refused_by_reason.items())),
            )

    def close(self) -> None:
        """Revokes, closes what is attached, waits for the workers; idempotent."""
        with self._lock:
            self.closed = True
            attached = list(self._attached)
            workers, self._workers = self._workers, None
        self.grants.close()
        for region in attached:
            region.close()
        if workers is not None:
            workers.close()

    def check_open(self) -> None:
        """Raises TransportClosed after `close`."""
        if self.closed:
            raise TransportClosed(f"transport {self.scheme} is closed")

    def check_kind(self, region: MemoryRegion) -> None:
        """Raises TransportUnavailable for memory of a kind that this transport cannot reach."""
        if region.kind not in self.memory_kinds:
            known = ", ".join(sorted(kind.value for kind in self.memory_kinds))
            raise TransportUnavailable(
                f"transport {self.scheme} cannot reach {region.kind.value} memory; it moves {known}",
                hint="use a transport that reaches it, or stage it in host memory",
            )

    def check_scheme(self, descriptor: RegionDescriptor) -> None:
        """What `attach` begins with."""
        self.check_open()
        if descriptor.scheme != self.scheme:
            raise BadDescriptor(
                f"a descriptor of {descriptor.scheme!r} came to transport {self.scheme}"
            )

    def keep(self, region: AttachedRegion) -> None:
        """Counts an attached region as held until it is closed; the transport's close closes it."""
        with self._lock:
            if not self.closed:
                self._attached.add(region)
                return
        region.close()
        self.check_open()

    def forget(self, region: AttachedRegion) -> None:
        """What an attached region calls when it is closed."""
        with self._lock:
            self._attached.discard(region)

    def count_served(self, nbytes: int) -> None:
        """A peer completed a transfer with this side's memory."""
        with self._lock:
            self._served["transfers"] += 1
            self._served["nbytes"] += nbytes

    def count_served_failed(self) -> None:
        """A peer's transfer ended on the way."""
        with self._lock:
            self._served["failed"] += 1

    def count_refused(self, reason: str) -> None:
        """A peer was refused something."""
        with self._lock:
            self._refused_by_reason[reason] += 1

    async def transfer_async(self, order: Order) -> TransferReport:
        """Carries an order out, in a worker thread from `inline_nbytes` on.

        Cancelled, it waits 50 ms at most for the piece under way; if that is stuck, what it may still write stays in
        quarantine until the thread has ended.
        """
        if sum(run[2] for run in order.runs) < self._inline_nbytes:
            return self._transfer(order)
        assert order.control is not None, "async orders can be cancelled"
        running = self._submit(order)
        # What no worker has begun by then is given up without one; what has begun looks for itself.
        order.control.on_cancel(running.cancel)
        in_time = asyncio.get_running_loop().call_later(
            max(0.0, order.deadline_s - self.now_s()), running.cancel
        )
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            self._check_given_up(order, running)
            order.control.cancel()
            landing = order.local if order.is_pull else order.remote
            if not running.cancelled():  # a transfer that never began leaves nothing behind
                if not landing.closed:
                    landing.quarantined.add(running, order.landing_ranges())
                    running.add_done_callback(landing.quarantined.lift)
                await _settled(running)
            raise
        finally:
            in_time.cancel()

    def _check_given_up(
        self, order: Order, running: concurrent.futures.Future[TransferReport]
    ) -> None:
        """Raises why an order was given up that no worker had begun, where its caller's task was not cancelled."""
        task = asyncio.current_task()
        if not running.cancelled() or (task is not None and task.cancelling()):
            return
        assert order.control is not None, "async orders can be cancelled"
        error: TransportError = TransferTimedOut("deadline passed while all workers were busy")
        if order.control.cancelled:
            error = TransferCancelled("cancelled by the caller")
        self.count_failure(error)
        raise error from None

    def _transfer(self, order: Order) -> TransferReport:
        """Carries an order out on the calling thread; what fails is counted by kind."""
        try:
            started_s = self.now_s()
            nbytes = self.check_order(order, started_s)
            self.carry_out(order)
            return self.completed(order, nbytes, started_s)
        except TransportError as error:
            self.count_failure(error)
            raise

    def check_order(self, order: Order, now_s: float) -> int:
        """Sum of the bytes; raises what forbids the transfer. Nothing has moved."""
        remote, local, runs, is_pull, _, _, _, _, note, _ = order
        if getattr(remote, "scheme", None) != self.scheme:
            raise BadDescriptor(
                f"this region was not attached by transport {self.scheme}",
                hint=f"attach it: transport {self.scheme} cannot use another's regions",
            )
        if self.closed or remote.closed or local.gate.closed:
            what = f"transport {self.scheme}" if self.closed else "a region of this transfer"
            raise TransportClosed(f"{what} is closed")
        if remote.lost:
            raise PeerLost(f"the way to {remote.peer} was cut", hint="attach the region anew")
        if now_s >= remote.expires_at_s:
            raise RegionExpired(
                f"the grant ran out {now_s - remote.expires_at_s:.3f} s ago",
                hint="match again and pull under the new lease",
            )
        if local.device_index is not None:
            self.check_kind(local)  # it may have been registered with another transport
        target = local if is_pull else remote
        if not target.writable:
            raise RegionReadOnly(
                f"the landing region of {target.nbytes} bytes is read-only",
                hint="register or attach it with writable=True",
            )
        if len(note) > MAX_NOTE_NBYTES:
            raise OutOfBounds(f"a note of {len(note)} bytes; {MAX_NOTE_NBYTES} are the most")
        nbytes = check_bounds(
            runs, remote_nbytes=remote.descriptor.nbytes, local_nbytes=local.nbytes
        )
        quarantined = local.quarantined if is_pull else remote.quarantined
        if quarantined.held:
            quarantined.check(order.landing_ranges())
        return nbytes

    def completed(self, order: Order, nbytes: int, started_s: float) -> TransferReport:
        """Counts a transfer whose bytes have all moved; RegionExpired where its grant ran out meanwhile."""
        remote, _, runs, is_pull, _, _, _, traffic, note, _ = order
        ended_s = self.now_s()
        if ended_s > remote.expires_at_s:
            raise RegionExpired(
                f"the grant ran out {ended_s - remote.expires_at_s:.3f} s before the end",
                hint="match again and pull under the new lease",
            )
        if note:
            self.tell_owner(order, nbytes)
        num_runs = len(runs) if len(runs) < 2 else num_joined(runs)
        done = self._done
        done.append((is_pull, traffic, nbytes))  # as `count_moved`, without call and lock
        if len(done) > _MAX_UNCOUNTED:
            self._count_done()
        return _new(TransferReport, (nbytes, num_runs, ended_s - started_s))

    def count_moved(self, is_pull: bool, traffic: TrafficClass, nbytes: int) -> None:
        """Counts one pull or push that is complete."""
        self._done.append((is_pull, traffic, nbytes))
        if len(self._done) > _MAX_UNCOUNTED:
            self._count_done()

    def _count_done(self) -> None:
        with self._lock, contextlib.suppress(IndexError):
            while True:
                is_pull, traffic, nbytes = self._done.popleft()
                moved = self._moved[is_pull][traffic]
                moved[0] += 1
                moved[1] += nbytes

    def count_failure(self, error: TransportError) -> None:
        """Counts by kind."""
        with self._lock:
            self._num_failed[_failure_kind(error)] += 1

    def _submit(self, order: Order) -> concurrent.futures.Future[TransferReport]:
        with self._lock:
            self.check_open()
            if self._workers is None:
                self._workers = PriorityWorkers(self._num_workers, name=f"snowskin-{self.scheme}")
            workers = self._workers
        return workers.submit(functools.partial(self._transfer, order), urgency=order.traffic)


def check_writable(descriptor: RegionDescriptor, writable: bool) -> None:
    """Raises RegionReadOnly where a peer wants to write what was granted for reading; part of `attach`."""
    if writable and not descriptor.writable:
        raise RegionReadOnly("the owner granted this region for reading only")


def _failure_kind(error: TransportError) -> str:
    if isinstance(error, TransferTimedOut):
        return "timed_out"
    if isinstance(error, TransferCancelled):
        return "cancelled"
    return "lost" if isinstance(error, PeerLost) else "refused"


async def _settled(running: concurrent.futures.Future[TransferReport]) -> None:
    """Waits until `running` has ended in whatever way, or 50 ms."""
    ended = asyncio.wrap_future(running)
    # Nobody else asks how it ended; unasked, asyncio would log it as lost.
    ended.add_done_callback(lambda future: future.cancelled() or future.exception())
    await asyncio.wait([ended], timeout=_SETTLE_S)
