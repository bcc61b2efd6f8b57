"""One connection from a reader to an owner: how bytes and frames come and go on it.

Rules kept here: what the owner says is not trusted: a head is compared with what may come before a byte behind it is
taken; no call waits longer than `WAIT_S`, so that whoever waits can look at its deadline, and at whether its region was
closed; whatever the kernel says about a dead connection is PeerLost, and names the peer.

A connection is in one of two moods, which its user chooses before each transfer: *blocking* calls wait up to
`WAIT_S` in the kernel, *polling* ones not at all. In both, 0 bytes mean "nothing yet".
"""

from __future__ import annotations

import contextlib
import errno
import math
import select
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING

from snowskin.transport.errors import (
    BadFrame,
    GrantRefused,
    OutOfBounds,
    PeerBusy,
    PeerLost,
    RegionExpired,
    RegionReadOnly,
    TransferTimedOut,
    TransportError,
)
from snowskin.transport.frames import (
    HEAD_NBYTES,
    MAX_BODY_NBYTES,
    WIRE_VERSION,
    Fail,
    Hello,
    Kind,
    Welcome,
    decode_body,
    decode_head,
    encode,
)
from snowskin.transport.tcp.naps import nap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snowskin.transport.frames import Frame, Head
    from snowskin.transport.paths import Path
    from snowskin.transport.tcp.settings import TcpSettings

WAIT_S = 0.05
MIN_HEARTBEAT_S = 0.1  # an owner that is less patient than that may end what is idle
SCRATCH_NBYTES = 64 * 1024 + HEAD_NBYTES

_HEAD = struct.Struct(">BBHIQ")
_DATA, _DONE = int(Kind.DATA), int(Kind.DONE)
_NAP_FROM_NBYTES = 1 << 20  # so much must be on its way: for less, a nap could be the longest part
_TRICKLE_NBYTES = 32 << 10
_FULL_NBYTES = 512 << 10
_IN_VAIN = 2
_SLEEPS = 8
_MOST_SLEEPS = 1024
_SKIPS = 16  # so that an owner who talks on and on holds nobody
_TIMEVAL = struct.Struct("@ll")
_OPS = 1 << 32  # numbers of transfers, without 0
NOTHING_YET = (errno.EAGAIN, errno.EWOULDBLOCK, None)  # None: a timeout of Python's own
_REFUSALS: dict[str, type[TransportError]] = {
    error.reason: error
    for error in (
        BadFrame,
        GrantRefused,
        OutOfBounds,
        PeerBusy,
        RegionExpired,
        RegionReadOnly,
        TransferTimedOut,
    )
}
_LIVES_ON = frozenset(
    error.reason for error in (GrantRefused, OutOfBounds, RegionExpired, RegionReadOnly)
)


class Connection:
    """A socket on which HELLO and WELCOME were said.

    Attributes:
        fd: the socket's descriptor, for polling.
        peer: who is at the other end, for errors.
        path: by which it goes.
        welcome: what the owner said.
        heartbeat_s: how often it says PING while it is idle, so that the owner keeps it.
        is_reusable: between two transfers, in order: it may serve the next one.
        was_idle: it has waited in a pool since its last use, and may have died there.
        opened_at_s, idle_since_s, spoke_at_s: monotonic, for whoever keeps it while it is idle.
        done_from_nbytes: a pull of so much ends with DONE, note or not.
        has_asked: `swap` or `ask` sent its request.
        frame_left_nbytes: of a DATA that was begun, for who goes on with it.
        is_pushing: the owner may be landing what was sent on it.
        hung_up: the owner has ended it, or somebody interrupted it.
        wants_room: what it waits for is room to send, not something to receive.
    """

    __slots__ = (
        "_buffer",
        "_end",
        "_flags",
        "_num_in_vain",
        "_num_sleeps",
        "_op",
        "_polling",
        "_receive_into",
        "_scratch",
        "_send",
        "_socket",
        "_spin_s",
        "_start",
        "_wait_s",
        "done_from_nbytes",
        "fd",
        "frame_left_nbytes",
        "has_asked",
        "heartbeat_s",
        "hung_up",
        "idle_since_s",
        "is_pushing",
        "is_reusable",
        "is_tls",
        "opened_at_s",
        "path",
        "peer",
        "spoke_at_s",
        "wants_room",
        "was_idle",
        "welcome",
    )

    def __init__(
        self, connected: socket.socket, *, peer: str, path: Path, spin_s: float = 0.0
    ) -> None:
        """Takes the socket over; `tcp_dialing.dial` is the way in."""
        self._socket = connected
        self._send = connected.send
        self._receive_into = connected.recv_into
        self.fd = connected.fileno()
        self.is_tls = isinstance(connected, ssl.SSLSocket)
        self.peer = peer
        self.path = path
        self.welcome: Welcome
        self.heartbeat_s = 0.0
        self.is_reusable = False
        self.was_idle = self.hung_up = self.wants_room = self.is_pushing = self.has_asked = False
        self.idle_since_s = self.spoke_at_s = 0.0
        self.opened_at_s = time.monotonic()
        self._buffer = bytearray(SCRATCH_NBYTES)
        self._scratch = memoryview(self._buffer)
        self._start = self._end = 0  # of what lies in the scratch and was not taken
        self.frame_left_nbytes = 0
        self.done_from_nbytes = math.inf
        self._op = 0
        self._num_in_vain = self._num_sleeps = 0
        self._spin_s = spin_s
        self._polling = False
        self._wait_s = 0.0
        self._flags = 0
        self.set_mood(polling=False)

    def set_mood(self, *, polling: bool, wait_s: float = WAIT_S) -> None:
        """Whether calls wait, and how long at most; a system call only where that changes."""
        if self.is_tls:
            if polling != self._polling or wait_s != self._wait_s:
                self._socket.settimeout(0.0 if polling else wait_s)
        elif not polling and wait_s != self._wait_s:
            value = _TIMEVAL.pack(0, max(1, int(wait_s * 1e6)))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        self._polling = polling
        self._wait_s = self._wait_s if polling else wait_s
        self._flags = socket.MSG_DONTWAIT if polling and not self.is_tls else 0

    def wait_at_most(self, remaining_s: float) -> None:
        """From here on calls wait, until the time is over and `WAIT_S` at most."""
        self.set_mood(polling=False, wait_s=min(WAIT_S, max(remaining_s, 1e-4)))

    def next_op(self) -> int:
        """The number of the next transfer, above 0."""
        self._op = self._op % (_OPS - 1) + 1
        return self._op

    @property
    def last_op(self) -> int:
        """The number that `next_op` gave last."""
        return self._op

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._socket.fileno() < 0

    # Bytes.

    def receive(self, view: memoryview) -> int:
        """Takes bytes from the stream: as many as are there, at most all of `view`; 0 = nothing yet."""
        if self._start < self._end:
            return self._take_buffered(view)
        try:
            nbytes = self._socket.recv_into(view, 0, self._flags)
        except OSError as error:
            self.wants_room = isinstance(error, ssl.SSLWantWriteError)
            return self._nothing_yet(error)
        if not nbytes:
            raise PeerLost(f"{self.peer} ended the connection")
        return nbytes

    def receive_whole(self, view: memoryview, more_nbytes: int = 0) -> int:
        """As `receive`, but waits until all of `view` came, where it may wait; less where that took too long.

        `more_nbytes` come behind it. While much is on its way, it naps between two calls instead of waiting in them: an
        owner that wakes its reader for every 64 KiB is a sixth slower, and both need more CPU (bench `transfer`).
        What comes in a trickle is waited for.
        """
        if self._polling or self.is_tls or self._start < self._end:
            return self.receive(view)
        receive = self._receive_into
        wanted_nbytes, got_nbytes, until_s = len(view), 0, 0.0
        try:
            while True:
                nbytes = receive(view[got_nbytes:] if got_nbytes else view)
                if not nbytes:
                    raise PeerLost(f"{self.peer} ended the connection")
                got_nbytes += nbytes
                if got_nbytes == wanted_nbytes:
                    return got_nbytes
                now_s = time.perf_counter()
                until_s = until_s or now_s + WAIT_S
                if now_s >= until_s:
                    return got_nbytes  # it drips
                if (
                    _TRICKLE_NBYTES <= nbytes < _FULL_NBYTES
                    and wanted_nbytes - got_nbytes + more_nbytes > _NAP_FROM_NBYTES
                ):
                    nap()
        except OSError as error:
            if not got_nbytes:
                return self._nothing_yet(error)
        except PeerLost:
            if not got_nbytes:
                raise
        return got_nbytes

    def nap(self, asked_nbytes: int) -> None:
        """After a request: looks for the answer to a large one a little later, as `receive_whole` does."""
        if asked_nbytes >= _NAP_FROM_NBYTES and not self._polling:
            nap()

    def swap(self, request: bytes, answer_head: bytes, nbytes: int) -> memoryview | None:
        """Sends a short request, and takes its answer where that is one frame of `nbytes` behind `answer_head`.

        None where it is not, or not yet; `has_asked` says whether the request went out. What came lies ahead.
        """
        self.has_asked = False
        if self._start != self._end or self.is_tls:
            return None
        self._start = self._end = 0
        got_nbytes, whole_nbytes = 0, HEAD_NBYTES + nbytes
        try:
            if self._send(request, self._flags) != len(request):
                raise PeerLost(f"{self.peer} takes no more requests on this connection")
            self.has_asked = True
            if self._polling:
                return None
            got_nbytes = self._wait_for(self._scratch[:whole_nbytes])
        except OSError as error:
            self._nothing_yet(error)
            return None
        if not got_nbytes:
            raise PeerLost(f"{self.peer} ended the connection")
        is_answer = self._buffer.startswith(answer_head)
        if is_answer and got_nbytes < whole_nbytes:
            got_nbytes += self.receive_whole(self._scratch[got_nbytes:whole_nbytes])
        if is_answer and got_nbytes == whole_nbytes:
            return self._scratch[HEAD_NBYTES:whole_nbytes]
        self._end = got_nbytes
        return None

    def ask(self, request: bytes, op: int, most_nbytes: int) -> int:
        """Sends a request, and takes the head of the first DATA of its answer, where it may wait; as `next_frame`."""
        self.has_asked = False
        if self._start != self._end or self.is_tls:
            return 0
        try:
            if self._send(request, self._flags) != len(request):
                raise PeerLost(f"{self.peer} takes no more requests on this connection")
        except OSError as error:
            return self._nothing_yet(error)
        self.has_asked = True
        if self._polling:
            return 0
        self.nap(most_nbytes)
        return self.next_frame(op, most_nbytes)

    def acknowledge(self, op: int) -> bool:
        """Says DONE without a note, so that the owner knows its pages free; whether the connection is still good."""
        try:
            done = _HEAD.pack(_DONE, 0, 0, op, 0)
            return self._send(done, socket.MSG_DONTWAIT) == HEAD_NBYTES
        except OSError:
            return False

    def next_frame(self, op: int, most_nbytes: int) -> int:
        """Size of the next DATA of this transfer, blocking; 0 where that is not what came: `data_head` knows then."""
        self._start = self._end = 0
        try:
            self._end = self._receive_into(self._scratch[:HEAD_NBYTES], 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            try:
                self._end = self._wait_for(self._scratch[:HEAD_NBYTES])
            except OSError as error:
                return self._nothing_yet(error)
        except OSError as error:
            return self._nothing_yet(error)
        if not self._end:
            raise PeerLost(f"{self.peer} ended the connection")
        if self._end < HEAD_NBYTES:
            return 0
        kind, flags, zero, its_op, nbytes = _HEAD.unpack_from(self._buffer)
        if kind != _DATA or flags or zero or its_op != op:
            return 0
        if not 0 < nbytes <= most_nbytes or nbytes > self.welcome.max_data_nbytes:
            return 0
        self._start = HEAD_NBYTES
        return nbytes  # type: ignore[no-any-return]  # struct says Any

    def _wait_for(self, view: memoryview) -> int:
        """Receives once something is there: looks again for a moment before it sleeps, because waking costs more.

        Half the time at 4 KiB where the owner runs on another core, and no more CPU (bench `transfer`). Where looking
        was in vain, both sides share a core or the owner is slow: then the next waits sleep at once, more of them each
        time.
        """
        receive = self._receive_into
        if not self._num_sleeps:
            end_s = time.perf_counter() + self._spin_s
            while True:
                try:
                    nbytes = receive(view, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    if time.perf_counter() >= end_s:
                        break
                else:
                    self._num_in_vain = 0
                    return nbytes
            self._num_in_vain += 1
            if self._num_in_vain >= _IN_VAIN:
                self._num_sleeps = min(_SLEEPS << self._num_in_vain, _MOST_SLEEPS)
        else:
            self._num_sleeps -= 1
        return receive(view, 0, 0)

    def send(self, views: Sequence[bytes | memoryview]) -> int:
        """Gives bytes to the stream, in order; how many of them, 0 = no room yet."""
        try:
            if self.is_tls:
                return self._socket.send(views[0])
            if len(views) == 1:
                return self._socket.send(views[0], self._flags)
            return self._socket.sendmsg(views, (), self._flags)
        except OSError as error:
            self.wants_room = not isinstance(error, ssl.SSLWantReadError)
            return self._nothing_yet(error)

    def send_all(self, views: list[bytes | memoryview]) -> Iterator[None]:
        """Sends all of `views`; yields where it would have to wait."""
        while views:
            sent = self.send(views)
            if not sent:
                yield
                continue
            while views and sent >= len(views[0]):
                sent -= len(views[0])
                del views[0]
            if sent:
                views[0] = memoryview(views[0])[sent:]

    def _nothing_yet(self, error: OSError) -> int:
        """0, where the error only says that; raises PeerLost else."""
        if isinstance(error, (ssl.SSLWantReadError, ssl.SSLWantWriteError)):
            return 0
        if isinstance(error, ssl.SSLError) or error.errno not in NOTHING_YET:
            raise PeerLost(f"{self.peer}: {error.strerror or error}") from error
        return 0

    def _take_buffered(self, view: memoryview) -> int:
        nbytes = min(len(view), self._end - self._start)
        view[:nbytes] = self._scratch[self._start : self._start + nbytes]
        self._start += nbytes
        return nbytes

    # Frames.

    def fetch_ahead(self, nbytes: int) -> None:
        """Takes up to `nbytes` of what comes next into the scratch, where that is empty.

        One system call for a head and its few bytes behind it, or for many short ranges; they are copied once more.
        """
        if self._start == self._end:
            self._start = 0
            self._end = 0
            self._end = self.receive(self._scratch[: min(nbytes, SCRATCH_NBYTES)])

    @property
    def num_ahead(self) -> int:
        """Bytes in the scratch."""
        return self._end - self._start

    def _gather(self, nbytes: int, most_nbytes: int = 0) -> Iterator[None]:
        """Has at least `nbytes` in the scratch; takes no more than that, or `most_nbytes`, from the stream."""
        scratch = self._scratch
        if self._start:
            rest = bytes(scratch[self._start : self._end])
            scratch[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        most_nbytes = min(max(nbytes, most_nbytes), SCRATCH_NBYTES)
        while self._end < nbytes:
            try:
                got = self._socket.recv_into(scratch[self._end : most_nbytes], 0, self._flags)
            except OSError as error:
                self.wants_room = isinstance(error, ssl.SSLWantWriteError)
                self._nothing_yet(error)
                yield
                continue
            if not got:
                raise PeerLost(f"{self.peer} ended the connection")
            self._end += got
            if self._end < nbytes:
                yield  # it may drip for longer than anybody waits

    def data_head(self, op: int, most_nbytes: int, *, ahead_nbytes: int = 0) -> Iterator[None]:
        """Waits for the head of a DATA of this transfer; `data_nbytes` says its size.

        Up to `ahead_nbytes` of what follows it are taken into the scratch in the same call.

        Raises:
            BadFrame: anything else came, or more than `most_nbytes`. What a FAIL says.
        """
        if self._end - self._start < HEAD_NBYTES:
            yield from self._gather(HEAD_NBYTES, HEAD_NBYTES + ahead_nbytes)
        kind, flags, zero, its_op, nbytes = _HEAD.unpack_from(self._scratch, self._start)
        if (
            kind != _DATA
            or flags
            or zero
            or its_op != op
            or not 0 < nbytes <= most_nbytes
            or nbytes > self.welcome.max_data_nbytes
        ):
            yield from self._not_data(op, most_nbytes)
        self._start += HEAD_NBYTES

    @property
    def data_nbytes(self) -> int:
        """Size of the DATA whose head was taken last."""
        nbytes: int = _HEAD.unpack_from(self._scratch, self._start - HEAD_NBYTES)[4]
        return nbytes

    def _not_data(self, op: int, most_nbytes: int) -> Iterator[None]:
        """Raises what it means that something else came."""
        head = decode_head(self._scratch[self._start : self._start + HEAD_NBYTES])
        if head.kind is Kind.FAIL:
            yield from self._fail(head, op)
        raise BadFrame(
            f"{self.peer} sent {head.kind.name} of {head.nbytes} bytes for transfer {head.op}, where at most "
            f"{most_nbytes} bytes of DATA for {op} may come"
        )

    def expect(self, kind: Kind, op: int) -> Iterator[None]:
        """Waits for a frame without a body; raises BadFrame where another comes, or what a FAIL says."""
        yield from self._gather(HEAD_NBYTES)
        head = decode_head(self._scratch[self._start : self._start + HEAD_NBYTES])
        if head.kind is Kind.FAIL:
            yield from self._fail(head, op)
        if head.kind is not kind or head.op != op or head.nbytes:
            raise BadFrame(
                f"{self.peer} sent {head.kind.name} for transfer {head.op}, {kind.name} for {op} was due"
            )
        self._start += HEAD_NBYTES

    def _fail(self, head: Head, op: int) -> Iterator[None]:
        yield from self._gather(HEAD_NBYTES + head.nbytes)
        first = self._start + HEAD_NBYTES
        fail = decode_body(head, bytes(self._scratch[first : first + head.nbytes]))
        assert isinstance(fail, Fail)
        self._start += HEAD_NBYTES + head.nbytes
        if fail.op not in (0, op):
            if op and not self.is_pushing and 0 < (op - fail.op) % _OPS < _OPS // 2:
                # The owner gave it up while its DONE was on the way; this one goes over another connection.
                raise PeerLost(f"{self.peer} ended transfer {fail.op}, an earlier one than {op}")
            raise BadFrame(f"{self.peer} refused transfer {fail.op}, where {op} was asked for")
        self.is_reusable = fail.op == op and fail.reason in _LIVES_ON and not self.num_ahead
        raise error_of(fail, self.peer)

    def greet(self, settings: TcpSettings) -> Iterator[None]:
        """HELLO and WELCOME."""
        if not self.is_tls:  # which copies everything anyway
            self.done_from_nbytes = settings.done_from_nbytes
        hello = Hello(
            min_version=WIRE_VERSION,
            max_version=WIRE_VERSION,
            heartbeat_ms=max(1, round(1000 * settings.heartbeat_s)),
            name=settings.name,
        )
        yield from self.send_all([encode(hello)])
        yield from self._gather(HEAD_NBYTES)
        head = decode_head(self._scratch[:HEAD_NBYTES])
        if head.kind is Kind.FAIL:
            yield from self._fail(head, 0)
        if head.kind is not Kind.WELCOME:
            raise BadFrame(f"{self.peer} answered HELLO with {head.kind.name}")
        yield from self._gather(HEAD_NBYTES + MAX_BODY_NBYTES[Kind.WELCOME])
        welcome: Frame = decode_body(head, bytes(self._scratch[HEAD_NBYTES : self._end]))
        assert isinstance(welcome, Welcome)
        if welcome.version != WIRE_VERSION:
            raise BadFrame(
                f"{self.peer} speaks version {welcome.version} of the data plane, this side {WIRE_VERSION}",
                hint="run releases of Snowskin that share a version on both sides",
            )
        self._start = self._end
        self.welcome = welcome
        self.heartbeat_s = settings.heartbeat_s
        if welcome.idle_timeout_ms:
            half_s = welcome.idle_timeout_ms / 2000
            self.heartbeat_s = min(self.heartbeat_s, max(half_s, MIN_HEARTBEAT_S))
        self.is_reusable = True

    # The end.

    def is_dead(self) -> bool:
        """Whether the owner ended it, as far as this side's kernel knows."""
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    def interrupt(self) -> None:
        """Ends whatever waits on it, from any thread; the descriptor stays its user's.

        While it pushes only the sending, so that the owner's end can still be seen. It serves no other transfer, even
        if this one was through already.
        """
        self.hung_up = True
        with contextlib.suppress(OSError):
            # Not SSLSocket's own: that would let its user go on reading, in the clear.
            socket.socket.shutdown(
                self._socket, socket.SHUT_WR if self.is_pushing else socket.SHUT_RDWR
            )

    def end_sending(self) -> None:
        """Says that nothing more comes from this side."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_WR)

    def skip(self) -> bool:
        """Throws away what came; False once the owner has ended the connection."""
        self.set_mood(polling=True)
        self._start = self._end = 0
        try:
            for _ in range(_SKIPS):
                if not self.receive(self._scratch):
                    break
        except PeerLost:
            return False
        return True

    def close(self) -> None:
        """Nothing of it lands afterwards; only its user or, when idle, its pool calls this. Idempotent."""
        self.is_reusable = False
        self._socket.close()


def error_of(fail: Fail, peer: str) -> TransportError:
    """What a FAIL means here; words of the owner are shown as far as they can be printed."""
    said = "".join(sign if sign.isprintable() else "?" for sign in fail.message)
    retry_after_s = fail.retry_after_ms / 1000 if fail.retry_after_ms else None
    if fail.reason == "TRANSPORT_CLOSED":
        return PeerLost(f"{peer} is closing: {said}", retry_after_s=retry_after_s)
    kind = _REFUSALS.get(fail.reason)
    if kind is None:
        return TransportError(f"{peer} refused with {fail.reason}: {said}")
    return kind(f"{peer}: {said}", retry_after_s=retry_after_s)
