"""`tcp`: between hosts; the owner checks and sends, the reader lets land.

Rules kept here: attaching waits for nobody, the first transfer connects; a caller's thread moves its own bytes, and an
event loop its own small ones; what broke before the owner had said anything is tried once more on a new connection, and
what broke half-way goes on once, on a new one.

`docs/wire.md` is what both sides say. The owner's side is `tcp/owner.py`, and is there where settings say where to
listen; the reader's is `tcp/reader.py` over `tcp/connections.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import threading
import time
from typing import TYPE_CHECKING

from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.errors import (
    BadFrame,
    PeerLost,
    TransferCancelled,
    TransportError,
    TransportUnavailable,
)
from snowskin.transport.ordered import AttachedRegion, Order, OrderedTransport, check_writable
from snowskin.transport.paths import MANY_STREAMS_FROM_NBYTES
from snowskin.transport.runs import Run, joined
from snowskin.transport.stripes import STALL_S, STRIPED_FROM_NBYTES
from snowskin.transport.tcp.connection import WAIT_S
from snowskin.transport.tcp.connections import Connections, Link
from snowskin.transport.tcp.lanes import StripedPull
from snowskin.transport.tcp.owner import TcpOwner
from snowskin.transport.tcp.reader import Job, check_note, is_plain, pull, pull_run, push
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.workers import PriorityWorkers

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Iterator, Sequence

    from snowskin.transport.api import TransferReport, TransportStatistics
    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.memory import MemoryRegion
    from snowskin.transport.tcp.connection import Connection
    from snowskin.transport.tcp.connections import PathsTo

INLINE_NBYTES = 1 << 20
NUM_LANES = 16
NUM_DIALING = 64  # more than transfers to one owner: one that is gone holds up nobody else's
LOOP_WAIT_S = 1.0


class AttachedTcpRegion(AttachedRegion):
    """An owner's region, and the way to it."""

    __slots__ = ("_leave", "link")

    def __init__(
        self,
        descriptor: RegionDescriptor,
        link: Link,
        *,
        writable: bool,
        expires_at_s: float,
        forget: Callable[[AttachedRegion], None],
        leave: Callable[[AttachedTcpRegion], None],
    ) -> None:
        """`leave` ends the transfers that use it."""
        super().__init__(
            descriptor,
            peer=link.peer,
            writable=writable,
            expires_at_s=expires_at_s,
            forget=forget,
        )
        self.link = link
        self.quarantined = link.quarantine_of(descriptor.capability)
        self._leave = leave

    def close(self) -> None:
        """Ends the attachment, and transfers under way. Idempotent."""
        if not self.closed:
            super().close()
            self._leave(self)


class TcpTransport(OrderedTransport):
    """Reads from owners over TCP and, where it listens, is one."""

    scheme = "tcp"

    def __init__(
        self,
        settings: TcpSettings | None = None,
        *,
        now_s: Callable[[], float] = time.monotonic,
        inline_nbytes: int = INLINE_NBYTES,
        paths_to: PathsTo | None = None,
    ) -> None:
        """Listens where `settings` say so; connects to nobody yet.

        Args:
            settings: `TcpSettings()` where None: a reader alone.
            now_s: the clock of deadlines and lives.
            inline_nbytes: up to how many bytes `pull_async` stays on the event loop.
            paths_to: which ways there are to an owner; by this host's NICs if None.

        Raises:
            TransportUnavailable: an address cannot be bound, or TLS's files do not fit.
        """
        super().__init__(now_s=now_s, inline_nbytes=0)
        self._settings = settings or TcpSettings()
        self._loop_nbytes = inline_nbytes
        self._connections = Connections(self._settings, paths_to)
        self._dialing = PriorityWorkers(NUM_DIALING, name="snowskin-tcp-dial")
        self._lanes = PriorityWorkers(NUM_LANES, name="snowskin-tcp-lane")
        self._owner: TcpOwner | None = None
        if self._settings.listen:
            self._owner = TcpOwner(self.grants, self._settings, self, now_s=now_s)

    @property
    def reachability(self) -> Reachability | None:
        """Where this owner is found; None where it only reads."""
        return None if self._owner is None else self._owner.reachability

    def descriptor_extra(self, region: MemoryRegion) -> bytes:
        """Where this owner is reached."""
        if self._owner is None:
            raise TransportUnavailable(
                "this tcp transport only reads: it listens nowhere, so no peer can reach it",
                hint="say in its settings where to `listen`",
            )
        return self._owner.reachability.to_bytes()

    def attach(
        self,
        descriptor: RegionDescriptor,
        *,
        fd: int | None = None,
        link_fd: int | None = None,
        writable: bool = False,
        asked_at_s: float | None = None,
        populate: bool = False,
    ) -> AttachedTcpRegion:
        """Keeps the way to the owner; descriptors (`fd`, `link_fd`) and `populate` mean nothing here."""
        self.check_scheme(descriptor)
        reachability = Reachability.from_bytes(descriptor.extra)
        if reachability.tls != (self._settings.tls is not None):
            raise TransportUnavailable(
                f"the owner at {reachability.addresses[0]} speaks "
                f"{'TLS alone' if reachability.tls else 'no TLS, and this side nothing else'}",
                hint="give `tls` to both sides, or to none",
            )
        check_writable(descriptor, writable)
        expires_at_s = self.end_of_life_s(descriptor, asked_at_s)
        region = AttachedTcpRegion(
            descriptor,
            self._connections.link(reachability),
            writable=writable,
            expires_at_s=expires_at_s,
            forget=self.forget,
            leave=self._leave,
        )
        self.keep(region)
        return region

    def carry_out(self, order: Order) -> None:
        """Moves all bytes of an order on the calling thread."""
        job = self._job(order)
        runs = job.runs
        if not runs:
            return
        link = _link(order)
        nbytes = runs[0][2] if len(runs) == 1 else sum(run[2] for run in runs)
        num_streams = self._num_streams(link, job, nbytes) if order.is_pull else 1
        is_striped = num_streams != 1
        if not is_striped and is_plain(job):
            entered = link.enter(job, nbytes)
            if entered is not None:
                self._carry_at_once(link, job, nbytes, *entered)
                return
        charge = link.gate.try_enter(nbytes) or self._wait_at_gate(link, job, nbytes)
        try:
            if is_striped:
                self._carry_in_stripes(link, job, num_streams)
            else:
                started_s = time.monotonic()
                self._carry_over(link, job, nbytes)
                if order.is_pull and nbytes >= MANY_STREAMS_FROM_NBYTES:
                    link.measured_one_stream(nbytes, time.monotonic() - started_s)
        finally:
            link.gate.leave(charge)

    async def transfer_async(self, order: Order) -> TransferReport:
        """Carries an order out: small pulls on this event loop, all else in a worker thread."""
        if not order.is_pull or sum(run[2] for run in order.runs) >= self._loop_nbytes:
            return await super().transfer_async(order)
        try:
            started_s = self.now_s()
            nbytes = self.check_order(order, started_s)
            await self._carry_out_async(order)
            return self.completed(order, nbytes, started_s)
        except TransportError as error:
            self.count_failure(error)
            raise
        except asyncio.CancelledError:
            self.count_failure(TransferCancelled("cancelled by the caller"))
            raise

    def statistics(self) -> TransportStatistics:
        """The counters, as of now."""
        num_served = 0 if self._owner is None else self._owner.num_connections
        return dataclasses.replace(
            super().statistics(),
            num_connections=self._connections.num_open + num_served,
            num_connected=self._connections.keeper.num_connected,
            num_peers_lost=self._connections.keeper.num_peers_lost,
        )

    def close(self) -> None:
        """Ends the owner's side, all connections and all threads. Idempotent."""
        self.closed = True
        if self._owner is not None:
            self._owner.close()
        self._connections.close()
        self._dialing.close()
        self._lanes.close()
        super().close()

    # One transfer.

    def _job(self, order: Order) -> Job:
        check_note(order)
        runs = order.runs if order.landed is not None or len(order.runs) < 2 else joined(order.runs)
        return Job(order, runs, now_s=self.now_s, is_closed=lambda: self.closed)

    def _wait_at_gate(self, link: Link, job: Job, nbytes: int) -> int:
        entered = threading.Event()
        ticket = link.gate.wait(nbytes, job.order.traffic, entered.set)
        try:
            while not entered.wait(min(WAIT_S, max(0.001, job.check()))):
                pass
        except BaseException:
            link.gate.give_up(ticket)
            raise
        return ticket.nbytes

    def _num_streams(self, link: Link, job: Job, nbytes: int) -> int:
        """How many connections a pull uses; 0 = as many as its paths are worth."""
        if link.has_many_paths:
            return 0 if nbytes >= STRIPED_FROM_NBYTES else 1
        if job.note or nbytes < MANY_STREAMS_FROM_NBYTES:
            return 1  # with a note, in one request the owner sees all of it
        return link.num_streams(nbytes)

    def _carry_in_stripes(self, link: Link, job: Job, num_streams: int) -> None:
        """Over several connections; what a note goes with is the last piece, once all else has landed."""
        runs, last = job.runs, None
        if job.note:
            runs, last = _split_off_last(runs, job.order.piece_nbytes)
        _interrupt_on_cancel(link, job)
        striped = StripedPull(
            link,
            job,
            runs,
            num_streams=num_streams,
            begin=functools.partial(self._lanes.submit, urgency=job.order.traffic),
        )
        striped.run()
        if last is not None:
            job.runs = (last,)
            job.landed_nbytes = 0
            self._carry_over(link, job, last.nbytes)

    def _carry_at_once(
        self, link: Link, job: Job, nbytes: int, connection: Connection, charge: int
    ) -> None:
        """The usual pull: a connection is there, one run comes whole; whatever is unusual goes the general way."""
        failure: BaseException | None = None
        try:
            _interrupt_on_cancel(link, job)
            remaining_s = job.check()
            connection.wait_at_most(remaining_s)
            started_s = time.monotonic() if nbytes >= MANY_STREAMS_FROM_NBYTES else 0.0
            if pull_run(connection, job, remaining_s):
                link.leave(connection, charge)
                if started_s:
                    link.measured_one_stream(nbytes, time.monotonic() - started_s)
                return
        except BaseException as error:  # noqa: BLE001 - raised again below
            failure = error
        try:
            self._carry_over(link, job, nbytes, connection, failure)
        finally:
            link.gate.leave(charge)

    def _carry_over(
        self,
        link: Link,
        job: Job,
        nbytes: int,
        connection: Connection | None = None,
        failure: BaseException | None = None,
    ) -> None:
        """Over one connection, and in its place another where that broke.

        `connection` is one on which the transfer has begun, and `failure` how that went wrong.
        """
        tries = _Tries(link, job, nbytes)
        if connection is None:
            connection = link.take_any(job) or link.connect_any(job)
            _interrupt_on_cancel(link, job)
        while True:
            tries.begin(connection)
            try:
                if failure is not None:
                    raise failure
                _drive(connection, job, tries)
                break
            except PeerLost as error:
                _let_go(link, connection, job, error)
                link.look_whether_lost(broke=not job.was_given_up())
                tries.check(error, connection)
            except BaseException as error:
                _let_go(link, connection, job, error)
                _name_peer(error, link)
                raise
            finally:
                tries.end()
            failure = None
            connection = link.connect_any(job)
            tries.go_on()
        link.give_back(connection)

    async def _carry_out_async(self, order: Order) -> None:
        """As `carry_out`, without waiting in the kernel; only connecting needs a thread."""
        job = self._job(order)
        if not job.runs:
            return
        link = _link(order)
        nbytes = sum(run[2] for run in job.runs)
        charge = link.gate.try_enter(nbytes) or await self._wait_at_gate_async(link, job, nbytes)
        try:
            tries = _Tries(link, job, nbytes)
            connection = link.take_any(job) or await self._connect_async(link, job)
            _interrupt_on_cancel(link, job)
            while True:
                tries.begin(connection)
                try:
                    await _drive_async(connection, job, tries)
                    break
                except PeerLost as error:
                    link.discard(connection)
                    link.look_whether_lost(broke=not job.was_given_up())
                    tries.check(error, connection)
                except BaseException as error:
                    link.give_back(connection)
                    _name_peer(error, link)
                    raise
                finally:
                    tries.end()
                connection = await self._connect_async(link, job)
                tries.go_on()
            link.give_back(connection)
        finally:
            link.gate.leave(charge)

    async def _wait_at_gate_async(self, link: Link, job: Job, nbytes: int) -> int:
        loop = asyncio.get_running_loop()
        entered = loop.create_future()

        def enter() -> None:
            if not entered.done():
                entered.set_result(None)

        def enter_from_any_thread() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it its transfers
                loop.call_soon_threadsafe(enter)

        ticket = link.gate.wait(nbytes, job.order.traffic, enter_from_any_thread)
        try:
            while not entered.done():
                await asyncio.wait([entered], timeout=min(WAIT_S, max(0.001, job.check())))
        except BaseException:
            link.gate.give_up(ticket)
            raise
        return ticket.nbytes

    async def _connect_async(self, link: Link, job: Job) -> Connection:
        """A new connection, made in a thread; one that is not wanted any more goes to the pool."""
        dialing = self._dialing.submit(
            functools.partial(link.connect_any, job), urgency=job.order.traffic
        )
        connecting = asyncio.wrap_future(dialing)
        try:
            while not connecting.done():  # it may wait for a thread, which nobody interrupts
                await asyncio.wait([connecting], timeout=min(job.check(), LOOP_WAIT_S))
        except BaseException:
            job.abandoned = True
            connecting.cancel()
            if not dialing.cancelled():
                dialing.add_done_callback(functools.partial(_keep_unwanted, link))
            raise
        return connecting.result()

    def _leave(self, region: AttachedTcpRegion) -> None:
        """Ends what uses a region that was closed."""
        region.link.interrupt(lambda user: isinstance(user, Job) and user.order.remote is region)
        self._connections.release(region.link)


class _Tries:
    """What of a transfer over one connection is tried again where that breaks; see the rules at the top."""

    __slots__ = (
        "_job",
        "_landed_nbytes",
        "_link",
        "_looked_at_s",
        "_nbytes",
        "_num_left",
        "_path",
        "_seen_nbytes",
    )

    def __init__(self, link: Link, job: Job, nbytes: int) -> None:
        """`nbytes` in all."""
        self._link = link
        self._job = job
        self._nbytes = nbytes
        self._landed_nbytes = self._seen_nbytes = 0
        self._num_left = len(link.path_names) if job.order.is_pull else 0
        self._path = ""
        self._looked_at_s = 0.0

    def begin(self, connection: Connection) -> None:
        """Goes over this connection now."""
        if self._link.has_many_paths:
            self._path = connection.path.name
            self._looked_at_s = time.monotonic()
            with self._link.lock:
                self._link.paths.in_flight(self._path, self._nbytes - self._landed_nbytes)

    def go_on(self) -> None:
        """With the rest, on a new connection."""
        self._job.is_asked = False
        self._landed_nbytes = self._job.landed_nbytes

    def end(self) -> None:
        """Goes over it no more."""
        if self._path:
            with self._link.lock:
                landed_nbytes = self._job.landed_nbytes - self._landed_nbytes
                left_nbytes = self._nbytes - self._job.landed_nbytes
                if landed_nbytes:
                    self._link.paths.landed(self._path, landed_nbytes)
                self._link.paths.in_flight(self._path, -left_nbytes)
            self._path = ""

    def wait(self) -> None:
        """Nothing came for a moment: raises PeerLost where it stood still for long and there is another way."""
        if not self._path:
            return
        now_s = time.monotonic()
        if self._job.landed_nbytes > self._seen_nbytes:
            self._seen_nbytes = self._job.landed_nbytes
            self._looked_at_s = now_s
        elif now_s - self._looked_at_s >= STALL_S and self._link.has_other_way(self._path):
            raise PeerLost(f"{self._link.peer} stands still on path {self._path}")

    def check(self, error: PeerLost, connection: Connection) -> None:
        """Raises `error`, or what made the connection break on this side; else it is worth another one."""
        job, link = self._job, self._link
        self.end()  # what landed speaks for the path, and only then its break against it
        job.check()
        if connection.was_idle and not job.heard:
            return
        if link.has_many_paths:
            link.failed(connection.path.name)
        has_way = job.landed_nbytes > self._landed_nbytes or link.has_many_paths
        # Where only the note is missing, there is nothing left that could be asked for to bring it.
        if not has_way or not self._num_left or job.landed_nbytes == self._nbytes:
            raise error
        self._num_left -= 1


def _drive(connection: Connection, job: Job, tries: _Tries) -> None:
    remaining_s = job.check()
    connection.wait_at_most(remaining_s)
    if is_plain(job) and pull_run(connection, job, remaining_s):
        return
    for _ in _steps(connection, job):
        connection.wait_at_most(job.check())
        tries.wait()


async def _drive_async(connection: Connection, job: Job, tries: _Tries) -> None:
    loop = asyncio.get_running_loop()
    connection.set_mood(polling=True)
    if is_plain(job) and pull_run(connection, job, job.check()):
        return
    for _ in _steps(connection, job):
        wait_s = min(max(job.check(), 0.0), LOOP_WAIT_S)
        tries.wait()
        await _ready(loop, connection.fd, wants_room=connection.wants_room, wait_s=wait_s)


def _split_off_last(runs: Sequence[Run], piece_nbytes: int) -> tuple[list[Run], Run]:
    """The last piece, of the grid on which all are cut, and all before it."""
    *before, (remote_offset, local_offset, nbytes) = runs
    first_nbytes = (nbytes - 1) // piece_nbytes * piece_nbytes
    if first_nbytes:
        before.append(Run(remote_offset, local_offset, first_nbytes))
    return before, Run(
        remote_offset + first_nbytes, local_offset + first_nbytes, nbytes - first_nbytes
    )


def _steps(connection: Connection, job: Job) -> Iterator[None]:
    job.heard = job.heard and job.is_asked
    move = pull if job.order.is_pull else push
    return move(connection, job, job.rest() if job.landed_nbytes else job.runs)


async def _ready(
    loop: asyncio.AbstractEventLoop, fd: int, *, wants_room: bool, wait_s: float
) -> None:
    """Returns when the descriptor can go on, or the time is over."""
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    timer = loop.call_later(wait_s, wake)
    (loop.add_writer if wants_room else loop.add_reader)(fd, wake)
    try:
        await ready
    finally:
        (loop.remove_writer if wants_room else loop.remove_reader)(fd)
        timer.cancel()


def _let_go(link: Link, connection: Connection, job: Job, error: BaseException) -> None:
    """After a failure.

    What a push that was given up on this side had sent may land for a moment longer: it stays in quarantine until the
    owner has ended the connection as well.
    """
    order = job.order
    has_ended = isinstance(error, PeerLost) and not job.was_given_up()
    if order.is_pull or has_ended or not job.heard or connection.is_reusable:
        link.give_back(connection)
        return
    quarantined = order.remote.quarantined
    quarantined.add(connection, order.landing_ranges())
    link.abandon(connection, functools.partial(quarantined.lift, connection))


def _interrupt_on_cancel(link: Link, job: Job) -> None:
    if job.order.control is not None:
        job.order.control.on_cancel(
            functools.partial(
                link.interrupt, lambda user: isinstance(user, Job) and user.root is job
            )
        )


def _keep_unwanted(link: Link, connecting: concurrent.futures.Future[Connection]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        link.give_back(connecting.result())


def _link(order: Order) -> Link:
    assert isinstance(order.remote, AttachedTcpRegion), "what is attached here is an owner's"
    return order.remote.link


def _name_peer(error: BaseException, link: Link) -> None:
    if isinstance(error, BadFrame) and link.peer not in error.message:
        error.message = f"{link.peer}: {error.message}"


def open_tcp(
    *, listen: Sequence[str] = ("127.0.0.1:0",), advertise: Sequence[str] = (), **settings: object
) -> TcpTransport:
    """By settings with addresses as text; without any an owner for this host alone, on a free port."""
    return TcpTransport(
        TcpSettings(
            listen=tuple(map(Address.parse, listen)),
            advertise=tuple(map(Address.parse, advertise)),
            **settings,  # type: ignore[arg-type]  # checked there
        )
    )
