"""`ucx`: bytes over whatever UCX reaches a peer by: RDMA (rc, dc), CUDA IPC, tcp.

Rules kept here: the owner checks every request and sends the bytes itself, unless hardware checks keys on every way in
use (or both sides were told that the network is trusted): then the peer fetches them, after the same check. An owner
that offers no one-sided access opens UCX without that feature, so that its software serves none either. All settings
go to UCX by its own means; this process's environment stays as it is. What moved how is decided per transfer and never
falls back silently: device memory that cannot be reached is an error.

Three parts: the thread that asks (here) waits for its `Mailbox` and lands what came; the progress thread speaks to UCX
(`ucx/progress.py`); `ucx/owner.py` and `ucx/reader.py` are what it says. `ucx/wire.py` is the wire.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import logging
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from snowskin.transport.errors import (
    BadFrame,
    TransportClosed,
    TransportUnavailable,
)
from snowskin.transport.frames import MAX_RANGES, MAX_TIMEOUT_MS, Ask
from snowskin.transport.memory_kind import HOST_KINDS, MemoryKind
from snowskin.transport.ordered import AttachedRegion, Order, OrderedTransport, check_writable
from snowskin.transport.runs import joined, pieces
from snowskin.transport.ucp.api import Span, UcpFailure, UcpFeature
from snowskin.transport.ucp.binding import open_context
from snowskin.transport.ucx.conversation import Cursor
from snowskin.transport.ucx.one_sided import OneSided, Registrations
from snowskin.transport.ucx.owner import MAX_SPANS, Owner
from snowskin.transport.ucx.progress import ProgressThread
from snowskin.transport.ucx.reader import Mailbox, Reader
from snowskin.transport.ucx.settings import (
    CHUNK_NBYTES,
    UcxSettings,
    is_auxiliary,
    is_hardware,
)
from snowskin.transport.ucx.wire import ONE_SIDED, WINDOW_NBYTES, MessageHead, Reach
from snowskin.transport.words import Range

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snowskin.transport.api import TransportStatistics
    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.memory import Bytes, MemoryRegion
    from snowskin.transport.runs import Run
    from snowskin.transport.ucp.api import Reply
    from snowskin.transport.words import Completion

NUM_WORKERS = 16  # threads that wait for peers
_SMALL_NBYTES = 16 * 1024  # up to here a memoryview is faster than numpy, which releases the GIL

log = logging.getLogger("snowskin.transport.ucx")


class UcxRegion(AttachedRegion):
    """A peer's region, and how its owner is reached."""

    __slots__ = ("reach",)

    def __init__(
        self,
        descriptor: RegionDescriptor,
        reach: Reach,
        *,
        writable: bool,
        expires_at_s: float,
        forget: Callable[[AttachedRegion], None],
    ) -> None:
        """`forget` is called once, when the region is closed."""
        super().__init__(
            descriptor,
            peer=reach.name,
            writable=writable,
            expires_at_s=expires_at_s,
            forget=forget,
        )
        self.reach = reach


class UcxTransport(OrderedTransport):
    """Owner and reader in one; both sides of a transfer have one each."""

    scheme = "ucx"

    def __init__(
        self,
        settings: UcxSettings | None = None,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens UCX and starts the progress thread.

        Raises:
            TransportUnavailable: UCX is not here, or refuses to open with these settings.
        """
        super().__init__(now_s=now_s, inline_nbytes=0, num_workers=NUM_WORKERS)
        self.settings = settings = settings or UcxSettings()
        self.is_one_sided = settings.offers_one_sided
        self.memory_kinds = frozenset(MemoryKind) if self.is_one_sided else HOST_KINDS
        features = UcpFeature.WAKEUP | UcpFeature.MESSAGES
        if self.is_one_sided:
            features |= UcpFeature.REMOTE_MEMORY
        try:
            context = open_context(settings.config(), features, binding=settings.binding)
            try:
                worker = context.open_worker(self._arrive)
            except BaseException:
                context.close()
                raise
        except UcpFailure as error:
            raise TransportUnavailable(
                f"UCX does not open: {error}", hint="look at net_devices, tls and UCX_*"
            ) from error
        self.address = worker.address
        self._ops = itertools.count()
        self._lock_of_listeners = threading.Lock()
        self._listeners: concurrent.futures.ThreadPoolExecutor | None = None
        self._under_way: set[Mailbox] = set()
        self._owner = Owner(self._progress_thread, settings, self.grants, self, now_s, self._notify)
        self._reader = Reader(self._progress_thread, settings)
        self._thread = ProgressThread(context, worker, last=self._end)
        self._registrations = Registrations(self._thread)
        log.info(
            "ucx: UCX %s by %s, one-sided %s", context.version, context.binding, self.is_one_sided
        )
        if settings.trusted_network:
            log.warning(
                "ucx: trusted_network: whoever reaches this process over UCX can read and write all of its memory"
            )

    def register(self, memory: object, *, writable: bool = True) -> MemoryRegion:
        """Registers memory without copying; with UCX too, where it may be reached one-sidedly."""
        region = super().register(memory, writable=writable)
        if self.is_one_sided:
            self._registrations.purge()
            try:
                self._registrations.add(region)
            except BaseException:
                region.close()
                raise
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
        """Grants ranges of the region; the descriptor says how this side is reached, under a digest."""
        descriptor = super().describe(
            region,
            ranges=ranges,
            writable=writable,
            epoch=epoch,
            generation=generation,
            expires_in_s=expires_in_s,
            on_done=on_done,
        )
        reach = Reach(
            name=self.settings.name,
            address=self.address,
            over_anything=self.settings.trusted_network,
            slices=self._registrations.slices(region) if self.is_one_sided else (),
        )
        return replace(descriptor, extra=reach.seal(descriptor))

    def attach(
        self,
        descriptor: RegionDescriptor,
        *,
        fd: int | None = None,
        link_fd: int | None = None,
        writable: bool = False,
        asked_at_s: float | None = None,
        populate: bool = False,
    ) -> UcxRegion:
        """Checks the descriptor; the first transfer connects. Descriptors and `populate` mean nothing here."""
        self.check_scheme(descriptor)
        reach = Reach.open(descriptor)
        check_writable(descriptor, writable)
        region = UcxRegion(
            descriptor,
            reach,
            writable=writable,
            expires_at_s=self.end_of_life_s(descriptor, asked_at_s),
            forget=self._detached,
        )
        self._thread.post(functools.partial(self._reader.attach, reach.address))
        self.keep(region)
        return region

    def carry_out(self, order: Order) -> None:
        """Moves all bytes of a checked order: asks the owner, then takes or brings them."""
        region = order.remote
        assert isinstance(region, UcxRegion), "what is attached here is of this transport"
        if not order.runs:
            return
        before_nbytes = 0
        batches = list(_batches(order.runs))
        for index, runs in enumerate(batches):
            is_last = index == len(batches) - 1
            part = order._replace(runs=runs, note=order.note if is_last else b"")
            self._carry_out_batch(part, region, before_nbytes)
            before_nbytes += sum(run[2] for run in runs)

    def check_open(self) -> None:
        """Raises TransportClosed after `close`, and where UCX failed: then the log says why."""
        super().check_open()
        if self._thread.ended:
            raise TransportClosed("UCX failed under transport ucx, which moves nothing any more")

    def statistics(self) -> TransportStatistics:
        """The counters, as of now."""
        return replace(
            super().statistics(),
            num_connections=self._reader.num_links + self._owner.num_sessions,
            num_connected=self._reader.num_connected,
            num_peers_lost=self._reader.num_lost + self._owner.num_lost,
        )

    def transports_in_use(self) -> dict[str, tuple[str, ...]]:
        """What UCX moves bytes by, for each owner that is talked to now, e.g. `("rc_mlx5/mlx5_0:1",)`."""
        if self.closed:
            return {}
        return self._thread.run(self._reader.transports)

    def close(self) -> None:
        """Revokes, ends what is under way and all links, closes UCX; idempotent."""
        self.closed = True
        for mailbox in list(self._under_way):
            mailbox.wake()
        super().close()
        self._thread.stop()
        with self._lock_of_listeners:
            listeners, self._listeners = self._listeners, None
        if listeners is not None:
            listeners.shutdown(wait=True)

    # In the thread that asked.

    def _carry_out_batch(self, order: Order, region: UcxRegion, before_nbytes: int) -> None:
        one_sided = self._may_go_one_sided(region, order.local)
        ask = self._ask(order, region, wants_done=one_sided or bool(order.note and order.is_pull))
        mailbox = Mailbox(order, region.reach, ask, before_nbytes | (ONE_SIDED if one_sided else 0))
        look = functools.partial(self._look, order)
        if order.control is not None:
            order.control.on_cancel(mailbox.wake)
        self._under_way.add(mailbox)
        ended = False
        try:
            if not self._thread.post(functools.partial(self._reader.begin, mailbox)):
                raise TransportClosed("transport ucx is closed, or UCX failed under it")
            if one_sided:
                self._move_one_sided(mailbox, region, look)
            elif order.is_pull:
                self._take(mailbox, look)
            else:
                self._bring(mailbox, look)
            ended = True
        finally:
            self._under_way.discard(mailbox)
            if not ended:
                self._thread.post(mailbox.stop)

    def _ask(self, order: Order, region: UcxRegion, *, wants_done: bool) -> Ask:
        descriptor = region.descriptor
        left_s = order.deadline_s - self.now_s()
        return Ask(
            is_push=not order.is_pull,
            op=next(self._ops) % ((1 << 32) - 1) + 1,
            capability=descriptor.capability,
            epoch=descriptor.epoch,
            generation=descriptor.generation,
            timeout_ms=max(1, min(MAX_TIMEOUT_MS, int(min(left_s, 1e6) * 1000))),
            traffic=int(order.traffic),
            wants_done=wants_done,
            note=b"" if order.is_pull else order.note,
            ranges=tuple(_remote_ranges(order.runs)),
        )

    def _look(self, order: Order) -> float:
        """Raises what ends a transfer from this side; else how long it may wait."""
        now_s = self.now_s()
        order.check(now_s)
        if self.closed or order.remote.closed or order.local.closed:
            raise TransportClosed("a region of this transfer, or its transport, was closed")
        return order.deadline_s - now_s

    def _take(self, mailbox: Mailbox, look: Callable[[], float]) -> None:
        """A pull: lands the stream piece by piece, as it comes."""
        order, reader = mailbox.order, self._reader
        local = order.local
        told = position = 0
        chunk, chunk_nbytes, used = None, 0, 0
        for _, local_offset, nbytes in _pieces(order):
            look()
            filled = 0
            while filled < nbytes:
                if chunk is None:
                    item = mailbox.next(look)
                    assert isinstance(item, tuple), "of a pull only chunks are told"
                    chunk, chunk_nbytes = item
                    used = 0
                size = min(nbytes - filled, chunk_nbytes - used)
                _land(local, local_offset + filled, chunk[used : used + size])
                filled += size
                used += size
                position += size
                if used == chunk_nbytes:
                    reader.buffers.give(chunk)
                    chunk = None
                    if position - told > WINDOW_NBYTES // 2 and position < mailbox.total_nbytes:
                        told = position
                        self._thread.post(functools.partial(mailbox.tell_taken, position))
            order.moved(local_offset, nbytes)
        self._thread.post(functools.partial(mailbox.complete, order.note or None))

    def _bring(self, mailbox: Mailbox, look: Callable[[], float]) -> None:
        """A push: sends the stream, and tells each piece once the owner has it."""
        order = mailbox.order
        mailbox.next(look)  # CLEAR
        runs = order.runs if order.landed is not None else joined(order.runs)
        cursor = Cursor([(run.local_offset, run.nbytes) for run in runs], order.local.address)
        piece_end = taken = 0
        for _, local_offset, nbytes in _pieces(order):
            look()
            piece_end += nbytes
            # whoever looks on is told of a piece before the next one leaves
            most = piece_end if order.landed is not None else cursor.nbytes
            while taken < piece_end:
                while cursor.position < most and cursor.position - taken < WINDOW_NBYTES:
                    position = cursor.position
                    spans = cursor.take(min(CHUNK_NBYTES, most - position), MAX_SPANS)
                    self._thread.post(functools.partial(self._send, mailbox, position, spans))
                item = mailbox.next(look)
                assert isinstance(item, int), "DONE comes after the last TAKEN"
                taken = item
            order.moved(local_offset, nbytes)
        mailbox.next(look)  # DONE

    def _move_one_sided(
        self, mailbox: Mailbox, region: UcxRegion, look: Callable[[], float]
    ) -> None:
        mailbox.next(look)  # CLEAR
        self._thread.run(functools.partial(self._check_ways, mailbox, region))
        settings = self.settings
        moves = OneSided(
            self._thread,
            mailbox,
            region.reach.slices,
            get_nbytes=settings.get_nbytes,
            max_in_flight=settings.max_gets_in_flight,
        )
        moves.run(look)
        self._thread.post(functools.partial(mailbox.complete, mailbox.order.note))

    def _may_go_one_sided(self, region: UcxRegion, local: MemoryRegion) -> bool:
        """Whether both sides were set up for it; TransportUnavailable where the memory leaves no other way."""
        if self.is_one_sided and region.reach.slices:
            return True
        if local.kind not in HOST_KINDS:
            raise TransportUnavailable(
                f"{region.peer} offers no one-sided access, and device memory moves in no other way",
                hint="set tls to rc,dc,cuda_copy,cuda_ipc on both sides",
            )
        return False

    # In the progress thread.

    def _check_ways(self, mailbox: Mailbox, region: UcxRegion) -> None:
        """TransportUnavailable where a way in use leaves keys unchecked, and nobody said that this is wanted."""
        link = mailbox.link
        if link is None or (self.settings.trusted_network and region.reach.over_anything):
            return
        ways = link.conversation.endpoint.transports()
        software = [way for way in ways if not (is_hardware(way) or is_auxiliary(way))]
        if software or not ways:
            raise TransportUnavailable(
                f"UCX reaches {region.peer} by {', '.join(ways) or 'unknown ways'}: nothing would check keys",
                hint="leave only rc, dc and cuda_ipc in tls on both sides, or none of them",
            )

    def _send(self, mailbox: Mailbox, position: int, spans: Sequence[Span]) -> None:
        """One chunk of a push; the source stays the caller's as long as UCX reads it."""
        link, local = mailbox.link, mailbox.order.local
        if link is None or mailbox.ask.op not in link.under_way:
            return
        try:
            local.begin_landing()
        except TransportClosed as error:
            mailbox.fail(error)
            return
        mailbox.sent = position + sum(span.nbytes for span in spans)
        link.conversation.send_data(mailbox.ask.op, position, spans, local.end_landing)

    def _arrive(self, header: bytes, payload: Span, reply: Reply | None) -> None:
        try:
            head = MessageHead.decode(header, payload.nbytes)
        except BadFrame as error:
            self.count_refused(error.reason)
            return
        if head.by_owner:
            self._reader.arrive(head, payload)
        else:
            self._owner.arrive(head, payload, reply)

    def _detached(self, region: AttachedRegion) -> None:
        assert isinstance(region, UcxRegion), "what is attached here is of this transport"
        self.forget(region)
        for mailbox in list(self._under_way):
            mailbox.wake()
        self._thread.post(functools.partial(self._reader.detach, region.reach.address))

    def _end(self) -> None:
        self._reader.close(TransportClosed("transport ucx is closed"))
        self._owner.close()
        self._registrations.close()

    def _notify(self, call: Callable[[], object]) -> None:
        """Calls who listens for completions, in a thread of its own: it may revoke, which waits for this one."""

        def logged() -> None:
            try:
                call()
            except Exception:  # the bytes moved; whoever listens made a mistake of its own
                log.exception("ucx: on_done failed")

        with self._lock_of_listeners, contextlib.suppress(RuntimeError):
            if not self.closed:
                if self._listeners is None:
                    self._listeners = concurrent.futures.ThreadPoolExecutor(
                        1, thread_name_prefix="snowskin-ucx-done"
                    )
                self._listeners.submit(logged)

    def _progress_thread(self) -> ProgressThread:
        return self._thread


def open_ucx(**settings: object) -> UcxTransport:
    """By the fields of `UcxSettings`."""
    return UcxTransport(UcxSettings(**settings))  # type: ignore[arg-type]  # checked there


def _land(local: MemoryRegion, offset: int, chunk: Bytes) -> None:
    """Puts bytes where they belong, in the region's bracket."""
    nbytes = chunk.nbytes
    local.begin_landing()
    try:
        if nbytes <= _SMALL_NBYTES:
            local.view[offset : offset + nbytes] = chunk.data
        else:
            np.copyto(local.buffer[offset : offset + nbytes], chunk)
    finally:
        local.end_landing()


def _remote_ranges(runs: Sequence[Run]) -> list[Range]:
    """What to ask for: the runs' remote sides in order, joined where they continue each other."""
    ranges: list[Range] = []
    for offset, _, nbytes in runs:
        if ranges and ranges[-1].offset + ranges[-1].nbytes == offset:
            ranges[-1] = Range(ranges[-1].offset, ranges[-1].nbytes + nbytes)
        else:
            ranges.append(Range(offset, nbytes))
    return ranges


def _batches(runs: Sequence[Run]) -> list[Sequence[Run]]:
    """The runs in as many parts as asks are needed."""
    if len(runs) <= MAX_RANGES:
        return [runs]
    return [runs[start : start + MAX_RANGES] for start in range(0, len(runs), MAX_RANGES)]


def _pieces(order: Order) -> list[Run]:
    """What is told of one after the other; nobody looking on, as large as the caller's pieces allow."""
    if order.landed is None:
        return list(pieces(joined(order.runs), max(order.piece_nbytes, CHUNK_NBYTES)))
    return list(pieces(order.runs, order.piece_nbytes))
