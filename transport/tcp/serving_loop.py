"""One thread that serves many readers: non-blocking streams, epoll, and whose turn it is.

Rules kept here: nothing blocks but the wait for events, and that ends when the next time limit does, never before; the
memory of a grant is touched inside its bracket alone, and no view of it outlives the bracket; what goes wrong with one
connection ends that connection and nothing else; descriptors are closed by the thread that serves them.

A turn: wait for events; hear all who said something; then move pieces, of the lowest traffic class first and round
robin within a class, until a turn's worth of bytes has moved. A stream that takes no more waits until it is writable.
Between pieces there is no state but the connection's: a peer that does not read holds its connection, and no more.

Memory goes out by `sendmsg`, which has copied when it returns, or by `sendfile`, after which the kernel refers to pages
of ours until the reader says DONE: that is a loan (`served_transfer.py`), and there is none without a `Lending`.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import heapq
import itertools
import logging
import math
import os
import select
import socket
import sys
import termios
import threading
import time
from typing import TYPE_CHECKING

from snowskin.transport.api import TrafficClass
from snowskin.transport.errors import TransportClosed, TransportError
from snowskin.transport.tcp.serving import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.grants import Grant
    from snowskin.transport.tcp.admission import Admission
    from snowskin.transport.tcp.served_transfer import ServedTransfer
    from snowskin.transport.tcp.serving import ServedConnection
    from snowskin.transport.tcp.streams import Stream
    from snowskin.transport.words import Completion

HEARD_NBYTES = 128 << 10  # more than the longest frame that is no DATA
# What moves between two looks at who has something to say; what is lent to a reader that is alone may be more, up to
# what its stream takes at once.
TURN_NBYTES = 2 << 20
PIECE_COST_NBYTES = 16 << 10  # a small piece takes as long as so many bytes
SMALL_NBYTES = 64 << 10  # what such a transfer moves goes at once, whatever waits
MAX_EVENTS = 256
_SENDING, _RECEIVING = Phase.SENDING, Phase.RECEIVING  # as constants: see serving.py
_AWAITING_DONE, _LEAVING, _OVER = Phase.AWAITING_DONE, Phase.LEAVING, Phase.OVER
CLOSE_S = 10.0
# Readers that ask back to back ask within this time, being woken included; so long is looked for it before sleeping.
BACK_TO_BACK_S = 80e-6
PAUSE_S = 0.05  # after a failure of the loop itself
LONG_S = 1e-3  # a thread of ours that was let through needs less
FORBEARANCE = 32  # after it took so long, the next time is so many times as far away

_IN = select.EPOLLIN
_OUT = select.EPOLLOUT
_log = logging.getLogger("snowskin.transport.tcp")


# Not `os.sched_yield`: before Python 3.12 that keeps the GIL, which those who are let through wait for.
_let_others_run: Callable[[], object] = ctypes.CDLL(None).sched_yield


class Link:
    """One connection with its stream, and what the loop knows of it.

    Attributes:
        stream: non-blocking.
        served: what is said on it.
        loop: who serves it.
        holds_bytes: the stream may have taken more from the kernel than it has handed out (TLS).
        fd: of the stream.
        mask: events it is registered for.
        blocked: the stream took less than there was.
        queued: it is among those who have a turn.
        proven: it completed a transfer.
        shut: this side has said its last words.
        timer_at_s: the timer that is set for it.
        unsent_nbytes: what the kernel had not brought to the peer yet when that was last looked at.
    """

    __slots__ = (
        "blocked",
        "fd",
        "holds_bytes",
        "loop",
        "mask",
        "proven",
        "queued",
        "served",
        "shut",
        "stream",
        "timer_at_s",
        "unsent_nbytes",
    )

    def __init__(
        self, stream: Stream, served: ServedConnection, loop: ServingLoop, *, holds_bytes: bool
    ) -> None:
        """Not yet adopted."""
        self.stream = stream
        self.served = served
        self.loop = loop
        self.holds_bytes = holds_bytes
        self.fd = stream.fileno()
        self.mask = 0
        self.blocked = False
        self.queued = False
        self.proven = False
        self.shut = False
        self.timer_at_s = math.inf
        self.unsent_nbytes = 0

    def unsent(self) -> int:
        """Bytes that the kernel has not brought to the peer yet."""
        return int.from_bytes(fcntl.ioctl(self.fd, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def drains(self) -> bool:
        """Whether the kernel has brought more of what was sent to the peer since this was last asked."""
        before_nbytes, self.unsent_nbytes = self.unsent_nbytes, self.unsent()
        return self.unsent_nbytes < before_nbytes

    @property
    def is_busy(self) -> bool:
        """Whether a transfer is under way."""
        return self.served.transfer is not None


class Turns:
    """Who may move a piece next: the lowest traffic class, and within it who waits longest."""

    def __init__(self) -> None:
        """Nobody."""
        self._queues: tuple[collections.deque[Link], ...] = tuple(
            collections.deque() for _ in TrafficClass
        )
        self._num = 0

    def __len__(self) -> int:
        """How many wait."""
        return self._num

    def add(self, link: Link) -> None:
        """Behind the others of its class; nothing where it waits already or has nothing to move."""
        if not link.queued and link.served.transfer is not None:
            link.queued = True
            self._num += 1
            self._queues[link.served.transfer.ask.traffic].append(link)

    def next(self) -> Link:
        """The first; there must be one."""
        for queue in self._queues:
            if queue:
                self._num -= 1
                link = queue.popleft()
                link.queued = False
                return link
        raise AssertionError("nobody has a turn")


class ServingLoop:
    """Serves the connections that it is given, on a thread of its own."""

    def __init__(
        self, name: str, admission: Admission[Link], *, now_s: Callable[[], float]
    ) -> None:
        """Starts no thread yet."""
        self.num_errors = 0
        self._admission = admission
        self._now_s = now_s
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, _IN)
        self._lock = threading.Lock()  # guards the life of _wake_fd
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._links: dict[int, Link] = {}
        self._listeners: dict[int, tuple[socket.socket, Callable[[socket.socket], None]]] = {}
        self._turns = Turns()
        self._timers: list[tuple[float, int, Link | Callable[[], None]]] = []
        self._timer_number = itertools.count()
        self._heard_view = memoryview(bytearray(HEARD_NBYTES))
        self._is_eager = False
        self._gives_way_at_s = 0.0
        self._only_one = False  # one event came in this turn: nobody else can be more urgent
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def num_links(self) -> int:
        """Connections open now."""
        return len(self._links)

    def start(self) -> None:
        """Begins to serve."""
        self._thread.start()

    def call(self, work: Callable[[], None]) -> bool:
        """Lets the loop's thread do `work`; from any thread. False where it serves no more."""
        with self._lock:
            if self._wake_fd < 0:
                return False
            self._inbox.append(work)
            with contextlib.suppress(BlockingIOError):  # it has been woken often enough
                os.eventfd_write(self._wake_fd, 1)
            return True

    def close(self) -> None:
        """Ends all connections, closes what it was given and waits for the thread. Idempotent.

        On the loop's own thread it does not wait: the thread ends with the turn.
        """
        self._stopped.set()
        if self._thread.ident is None:
            self._finish()
            return
        self.call(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                _log.error("a serving thread does not end: an on_done holds it")

    # From here on: on the loop's thread only (or before it was started).

    def listen(self, listener: socket.socket, ready: Callable[[socket.socket], None]) -> None:
        """Calls `ready` whenever somebody waits at a non-blocking listener; it is closed with the loop."""
        self._listeners[listener.fileno()] = (listener, ready)
        self._epoll.register(listener.fileno(), _IN)

    def pause(self, listener: socket.socket, pause_s: float) -> None:
        """Lets those at a listener wait for a while."""
        self._epoll.modify(listener.fileno(), 0)
        heapq.heappush(
            self._timers,
            (
                self._now_s() + pause_s,
                next(self._timer_number),
                lambda: self._epoll.modify(listener.fileno(), _IN),
            ),
        )

    def adopt(self, link: Link) -> None:
        """Serves a connection from now on."""
        self._links[link.fd] = link
        self._guarded(self._begin, link)

    def drop(self, link: Link, error: TransportError) -> None:
        """Ends a connection at once, for its descriptor is wanted; tells why where the stream takes it."""
        if self._links.get(link.fd) is link:
            link.served.leave(error, self._now_s())
            with contextlib.suppress(OSError):
                self._say(link)
            self._close(link)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    self._turn()
                except Exception:  # noqa: BLE001  a bug must not end the service for all
                    self._count_error("serving failed")
                    self._stopped.wait(PAUSE_S)
        finally:
            self._finish()

    def _finish(self) -> None:
        """Ends what is under way with a word to the peer, and closes all descriptors."""
        self._do_inbox()
        now_s = self._now_s()
        for link in list(self._links.values()):
            if link.served.transfer is not None:
                error = TransportClosed("the owner is closing", hint="pull from another replica")
                link.served.stop(error, now_s)
                with contextlib.suppress(OSError):
                    link.stream.send(link.served.out)
            self._close(link)
        for listener, _ in self._listeners.values():
            _end(listener)
        self._epoll.close()
        with self._lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
            self._wake_fd = -1
        self._do_inbox()  # what came before the lock

    def _do_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _turn(self) -> None:
        happened = self._next_events()
        self._only_one = len(happened) == 1
        for fd, events in happened:
            link = self._links.get(fd)
            if link is not None:
                self._guarded(self._on_event, link, events)
            elif fd == self._wake_fd:
                os.eventfd_read(fd)
                self._do_inbox()
            elif fd in self._listeners:
                listener, ready = self._listeners[fd]
                ready(listener)
        budget_nbytes = TURN_NBYTES
        while self._turns and budget_nbytes > 0:
            budget_nbytes -= PIECE_COST_NBYTES + self._guarded(self._move, self._turns.next())
            self._give_way()
        if self._timers:
            self._ring(self._now_s())

    def _next_events(self) -> list[tuple[int, int]]:
        """What happened, waited for; where readers ask back to back, it looks for a moment before it sleeps.

        Being woken is a sixth of a pull of 1 MiB (bench `transfer`). Once it looked in vain, it sleeps at once until
        somebody asks that soon again: an idle owner, or one that is asked now and then, looks at nothing.
        """
        wait_s = self._wait_s()
        if not wait_s:
            return self._epoll.poll(0, MAX_EVENTS)
        began_s = time.perf_counter()
        if self._is_eager:
            until_s = began_s + BACK_TO_BACK_S
            while time.perf_counter() < until_s:
                if happened := self._epoll.poll(0, MAX_EVENTS):
                    return happened
        happened = self._epoll.poll(wait_s, MAX_EVENTS)
        self._is_eager = (
            any(events & _IN for _, events in happened)
            and time.perf_counter() - began_s < BACK_TO_BACK_S
        )
        return happened

    def _wait_s(self) -> float:
        if self._turns:
            return 0
        if not self._timers:
            return -1
        return max(0.0, self._timers[0][0] - self._now_s())  # epoll rounds up to milliseconds

    def _give_way(self) -> None:
        """Lets those who wait for this core run: nearly always the control calls of this process.

        A kernel may look only at its ticks, up to 4 ms apart, who else should run, and a call is handed on by several
        threads (bench `transfer`, a probe of a node beside its data plane). Where another program wants the core as
        well, giving way costs a slice of the scheduler's: then it is done rarely.
        """
        began_s = self._now_s()
        if began_s < self._gives_way_at_s:
            return
        _let_others_run()
        ended_s = self._now_s()
        if ended_s - began_s > LONG_S:
            self._gives_way_at_s = ended_s + FORBEARANCE * (ended_s - began_s)

    def _guarded(self, work: Callable[..., int], link: Link, *values: int) -> int:
        """Does something for one connection; what goes wrong ends that connection and nothing else."""
        try:
            return work(link, *values)
        except OSError:  # reset, timed out, unreachable, broken TLS: the peer is gone
            pass
        except Exception:  # noqa: BLE001  a bug met by one reader is not the end for all
            self._count_error("serving a connection failed", peer=link.served.peer)
        self._close(link)
        return 0

    def _on_event(self, link: Link, events: int) -> int:
        served = link.served
        if events & _OUT:
            link.blocked = False
            if (
                events == _OUT
                and served.phase is _SENDING
                and self._only_one
                and not (self._turns or served.out or served.news)
            ):
                return self._move(link)  # nobody else can be more urgent
        if served.phase is _RECEIVING and not served.out:
            self._turns.add(link)
            return 0
        if events & ~_OUT:
            self._hear(link)
            if served.phase is _SENDING and not (served.out or served.news):
                transfer = served.transfer
                assert transfer is not None, "in this phase there is one"
                if transfer.nbytes <= SMALL_NBYTES or (self._only_one and not self._turns):
                    return self._move(link)  # over sooner than it could be put in order
        return self._settle(link)

    def _begin(self, link: Link) -> int:
        link.mask = _IN
        self._epoll.register(
            link.fd, _IN
        )  # which may fail: the kernel bounds what one user watches
        self._set_timer(link)
        return 0

    def _hear(self, link: Link) -> None:
        """Takes what a peer said that is no payload."""
        served = link.served
        while True:
            try:
                nbytes = link.stream.recv_into(self._heard_view)
            except BlockingIOError:
                return
            now_s = self._now_s()
            if not nbytes:
                served.lose(now_s)
                return
            self._doubt(link)
            served.receive(self._heard_view[:nbytes], now_s)
            if not link.holds_bytes or served.transfer is not None:
                return

    def _doubt(self, link: Link) -> None:
        """Whoever says DONE before its host has acknowledged every byte does not get its loan settled for that."""
        transfer = link.served.transfer
        if (
            link.served.phase is _AWAITING_DONE
            and transfer is not None
            and transfer.loan is not None
            and link.unsent()
        ):
            transfer.forsake()

    def _move(self, link: Link) -> int:
        """Moves one piece of a transfer; its bytes."""
        served = link.served
        transfer = served.transfer
        is_sending = served.phase is _SENDING
        if transfer is None or link.blocked or not (is_sending or served.phase is _RECEIVING):
            return 0
        now_s = self._now_s()
        if now_s >= transfer.deadline_s:
            served.on_due(now_s)
            return self._settle(link)
        try:
            transfer.grant.begin_piece(now_s)
        except TransportError as error:
            served.stop(error, now_s)
            return self._settle(link)
        wanted_nbytes = nbytes = 0
        try:
            memory = transfer.grant.region.view
            if is_sending:
                parts = transfer.outgoing(memory)
                wanted_nbytes = sum(map(len, parts))
                if transfer.loan is None:
                    nbytes = link.stream.sendmsg(parts)
                else:
                    is_alone = not self._turns
                    wanted_nbytes, nbytes = _send_lent(
                        link, transfer, parts, wanted_nbytes, is_alone=is_alone
                    )
            else:
                parts = transfer.incoming(memory)
                wanted_nbytes = sum(map(len, parts))
                nbytes = link.stream.recvmsg_into(parts)[0]
                if not nbytes:
                    served.lose(now_s)
        except BlockingIOError:
            wanted_nbytes = 1
        finally:
            memory = parts = None  # type: ignore[assignment]  # no view outlives the bracket
            transfer.grant.end_piece()
        if nbytes:
            if is_sending:
                served.sent(nbytes, now_s)
                if served.phase is _AWAITING_DONE:
                    link.unsent_nbytes = link.unsent()
            else:
                served.landed(nbytes, now_s)
        if is_sending:
            link.blocked = nbytes < wanted_nbytes
            if link.blocked:
                self._is_eager = False  # what comes next is room, once the reader has made some
        elif nbytes == wanted_nbytes or (nbytes and link.holds_bytes):
            self._turns.add(link)
        self._settle(link)
        return nbytes

    def _settle(self, link: Link) -> int:
        """What has to follow after something happened to a connection."""
        served = link.served
        while served.news:
            self._tell(link, *served.news.pop(0))
        if served.out and not link.blocked:
            self._say(link)
        if served.phase is _OVER:
            self._close(link)
            return 0
        if served.phase is _LEAVING and not (served.out or link.shut):
            link.shut = True
            link.stream.shutdown(socket.SHUT_WR)
        if served.num_served and not link.proven:
            link.proven = True
            self._admission.prove(link)
        if served.phase is _SENDING and not link.blocked:
            self._turns.add(link)
        mask = _OUT if served.out else _IN | _OUT if link.blocked else _IN
        if mask != link.mask:
            link.mask = mask
            self._epoll.modify(link.fd, mask)
        self._set_timer(link)
        return 0

    def _say(self, link: Link) -> None:
        """Sends what goes before everything else, as far as the stream takes it."""
        out = link.served.out
        with contextlib.suppress(BlockingIOError):
            del out[: link.stream.send(out)]
        link.blocked = bool(out)

    def _tell(self, link: Link, grant: Grant, completion: Completion) -> None:
        try:
            if grant.on_done is not None:
                grant.on_done(completion)
        except Exception:  # noqa: BLE001  what the owner does with the news is not the reader's fault
            self._count_error("on_done failed", peer=link.served.peer)

    def _set_timer(self, link: Link) -> None:
        due_at_s = link.served.due_at_s()
        if due_at_s < link.timer_at_s:
            link.timer_at_s = due_at_s
            heapq.heappush(self._timers, (due_at_s, next(self._timer_number), link))

    def _ring(self, now_s: float) -> None:
        """Serves the timers that are due."""
        while self._timers and self._timers[0][0] <= now_s:
            at_s, _, who = heapq.heappop(self._timers)
            if not isinstance(who, Link):
                who()
            elif at_s == who.timer_at_s and self._links.get(who.fd) is who:
                who.timer_at_s = math.inf
                transfer = who.served.transfer
                if transfer is not None and (
                    who.queued  # it waits for its turn, and not for its peer
                    or (
                        who.served.phase is _AWAITING_DONE
                        and now_s < transfer.deadline_s
                        and who.drains()
                    )
                ):
                    transfer.moved_at_s = now_s
                who.served.on_due(now_s)
                self._guarded(self._settle, who)

    def _close(self, link: Link) -> None:
        if self._links.get(link.fd) is not link:
            return
        del self._links[link.fd]
        link.served.lose(self._now_s())
        with contextlib.suppress(OSError):
            self._epoll.unregister(link.fd)
        _end(link.stream)
        self._admission.leave(link)

    def _count_error(self, what: str, **fields: str) -> None:
        self.num_errors += 1
        _log.exception(what, extra=fields)


def _send_lent(
    link: Link,
    transfer: ServedTransfer,
    parts: list[memoryview],
    copied_nbytes: int,
    *,
    is_alone: bool,
) -> tuple[int, int]:
    """Sends `parts` by copy and what follows them by reference; bytes that were to go, and that went."""
    assert transfer.lending is not None, "it has a loan"
    offset, lent_nbytes = transfer.lent(is_alone=is_alone)
    wanted_nbytes, nbytes = copied_nbytes + lent_nbytes, 0
    if parts:
        # Not without MSG_MORE: the head of a frame would go, and wake its reader, alone.
        nbytes = link.stream.sendmsg(parts, (), socket.MSG_MORE if lent_nbytes else 0)
    if lent_nbytes and nbytes == copied_nbytes:
        with contextlib.suppress(BlockingIOError):
            nbytes += os.sendfile(link.fd, transfer.lending.fd, offset, lent_nbytes)
    return wanted_nbytes, nbytes


def _end(stream: Stream) -> None:
    """Closes a socket for the peer as well, even where a forked child still holds the descriptor."""
    with contextlib.suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)
    stream.close()
