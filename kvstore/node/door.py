"""The local door: a Unix stream socket with memfds, for clients on the node's own host.

Rules kept here: who connects must be of the node's own user, or root. The first message is Hello, within
`HELLO_TIMEOUT_S`. The client's end of the connection is the end of the session. A client that breaks the protocol is
told how and cut off, one that does not read its answers is cut off; the others do not notice. Who is cut off has the
pools mapped still: the room that it may write into is nobody's until it has closed, by itself or by its death. A call
without an id can only give something back: what it were granted, nobody would know of.

Raw sockets on the loop's readiness, not asyncio streams: a call is one recv and one send here, and the greeting
must carry descriptors. Measured in `snowskin.tools.bench spine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

from snowskin.kvstore.call_spans import facts_of_reply
from snowskin.kvstore.errors import (
    AddressInUse,
    BadSetting,
    ProtocolViolation,
    WireVersionMismatch,
)
from snowskin.kvstore.frames import MAX_FRAME_NBYTES, FrameReader, frame
from snowskin.kvstore.messages import WIRE_VERSION, Access, ReplyMessage
from snowskin.kvstore.metrics import SHORT_S, Histogram
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.wire import (
    access_from,
    error_to_detail,
    greeting_to,
    parse,
    reply_to,
    request_from,
)
from snowskin.transport.errors import SnowskinError
from snowskin.v1 import door_pb2

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from snowskin.kvstore.node.shell import NodeShell
    from snowskin.kvstore.session import Session
    from snowskin.kvstore.tracing import Span, Tracer

HELLO_TIMEOUT_S = 2.0
ACCEPT_PAUSE_S = 1.0
# Not more: the C library takes fresh pages for larger buffers, on each call.
RECV_NBYTES = 64 << 10
# Waking a sleeping node costs a client some 40 µs, half of a small pull. So a client whose last call came within
# BRISK_S is looked for during POLL_S more before the loop sleeps, yielding the core to whoever wants it; and for no
# longer than TURN_S in one go, so that others have their turn. A node that is not asked back to back never polls.
BRISK_S = 300e-6
POLL_S = 100e-6
TURN_S = 1e-3
MAX_UNSENT_NBYTES = 4 * MAX_FRAME_NBYTES
MAX_CONNECTIONS = 1024
MAX_REQUEST_ID = 128
# Of so many calls one is measured: clock and histogram cost 0.3 µs, a fortieth of a call. An odd number, because
# calls come in pairs: every other one is a Commit.
MEASURE_ONE_IN = 17
MAX_PATH_NBYTES = 107  # sun_path, less its terminating zero
_PEERCRED = struct.Struct("3i")

log = get_logger(__name__)

# A blocking client renews between two pieces of a copy, and does not wait for the answer.
_ONE_WAY = ("release", "abort", "cancel", "renew")
_REPLY_FIELDS = {
    "Matched": "match",
    "Released": "release",
    "Reserved": "reserve",
    "Committed": "commit",
    "Aborted": "abort",
    "Probed": "probe",
    "Renewed": "renew",
    "NodeStat": "stat",
}


class CallMeter:
    """Counts the calls of a door, and measures some of them."""

    __slots__ = ("num_calls", "seconds")

    def __init__(self) -> None:
        self.num_calls = 0
        self.seconds = Histogram(
            "snowskin_node_door_seconds",
            "Seconds in which the node served a call on the local door, or let it wait.",
            ("method",),
            bounds=SHORT_S,
        )


class LocalDoor:
    """Listens on a socket path and turns connections into sessions.

    Attributes:
        meter: counts and measures the calls.
    """

    def __init__(
        self,
        shell: NodeShell,
        path: Path,
        *,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
        tracer: Tracer | None = None,
        meter: CallMeter | None = None,
    ) -> None:
        """Not listening yet; `tracer` continues the traces of calls that are part of one, `meter` counts all."""
        self.path = path
        self.meter = meter or CallMeter()
        self._tracer = tracer
        self._shell = shell
        self._hello_timeout_s = hello_timeout_s
        self._connections: set[_Connection] = set()
        self._socket: socket.socket | None = None

    def open(self) -> None:
        """Listens.

        Raises:
            AddressInUse: a node listens there already.
            BadSetting: the path is too long, or its folder cannot be used.
        """
        path = os.fspath(self.path)
        if len(path.encode()) > MAX_PATH_NBYTES:
            raise BadSetting(
                f"door path of {len(path.encode())} bytes: {path}",
                hint=f"a Unix socket path has at most {MAX_PATH_NBYTES}; choose a shorter --door",
            )
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_stale(self.path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                listener.bind(path)
                self.path.chmod(0o600)
                listener.listen(128)
            except OSError:
                listener.close()
                raise
        except OSError as error:
            raise BadSetting(
                f"door {path} cannot be opened: {error.strerror}",
                hint="choose a path in a folder of yours with --door",
            ) from error
        self._socket = listener
        self._listen()

    def close(self) -> None:
        """Cuts everybody off and removes the socket; idempotent."""
        if self._socket is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None
        for connection in list(self._connections):
            connection.close("the node stops")
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _listen(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().add_reader(self._socket.fileno(), self._on_connect)

    def _on_connect(self) -> None:
        assert self._socket is not None, "a connection came to a closed door"
        try:
            peer, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: those who are in must not suffer
            log.error("connection not accepted", error=str(error))
            # The listener stays readable: looking again at once would be all that this loop does.
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket.fileno())
            loop.call_later(ACCEPT_PAUSE_S, self._listen)
            return
        peer.setblocking(False)
        pid, uid = _who_is(peer)
        if uid not in (os.geteuid(), 0) or len(self._connections) >= MAX_CONNECTIONS:
            log.warning("connection refused", pid=pid, uid=uid, connections=len(self._connections))
            peer.close()
            return
        connection = _Connection(
            self._shell,
            peer,
            pid,
            self._connections.discard,
            meter=self.meter,
            tracer=self._tracer,
            hello_timeout_s=self._hello_timeout_s,
        )
        self._connections.add(connection)


def _who_is(peer: socket.socket) -> tuple[int, int]:
    """Process and user of who connected, as the kernel says."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _ = _PEERCRED.unpack(credentials)
    return pid, uid


def _remove_stale(path: Path) -> None:
    """Takes away the socket of a node that was killed; refuses where one answers."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except (TimeoutError, BlockingIOError):
            pass  # somebody listens, and is too busy to answer
    raise AddressInUse(
        f"a node listens on {path} already", hint="stop it, or choose another path with --door"
    )


class _Connection:
    """One client of the door."""

    def __init__(
        self,
        shell: NodeShell,
        peer: socket.socket,
        pid: int,
        on_close: Callable[[_Connection], None],
        *,
        meter: CallMeter,
        tracer: Tracer | None,
        hello_timeout_s: float,
    ) -> None:
        self._meter = meter
        self._tracer = tracer
        self._spans: dict[int, Span] = {}  # of calls that are traced and not answered yet
        self._shell = shell
        self._socket = peer
        self._pid = pid
        self._on_close = on_close
        self._reader = FrameReader()
        self._unsent = bytearray()
        self._session: Session | None = None
        self._request_ids: dict[int, str] = {}  # of calls that are not answered yet
        self._closed = False  # no message goes either way any more
        self._ended = False
        self._served_at_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(peer.fileno(), self._on_readable)
        self._hello_timer = self._loop.call_later(hello_timeout_s, self.fence, "no Hello came")

    def fence(self, reason: str) -> None:
        """Says and hears no more; ends all, or only what this side holds while the client may write; idempotent."""
        if self._closed:
            return
        self._fall_silent()
        if self._session is None or not self._shell.fence_session(self._session):
            self.close(reason)
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        # Nobody hears what it still says, so that a client that waits to say it gets to its end.
        self._loop.add_reader(self._socket.fileno(), self._receive)

    def close(self, reason: str) -> None:
        """Ends connection and session, because the client has ended it or the node stops; idempotent."""
        if self._ended:
            return
        self._ended = True
        self._fall_silent()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._on_close(self)
        if self._session is not None:
            log.debug("connection closed", session=self._session.id, reason=reason)
            self._shell.end_session(self._session)

    def _fall_silent(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._hello_timer.cancel()
        self._loop.remove_writer(self._socket.fileno())
        self._unsent.clear()
        self._reader = FrameReader()  # without the half of a message
        for span in self._spans.values():
            span.end(asyncio.CancelledError())

    def _on_readable(self) -> None:
        """Serves what came; of a client that asks back to back, looks for the next call before it sleeps."""
        now_s = time.perf_counter()
        is_brisk = now_s - self._served_at_s < BRISK_S
        turn_ends_s = poll_ends_s = now_s + TURN_S
        while not self._closed and now_s < poll_ends_s:
            data = self._receive()
            if data:
                self._serve(data)
                self._served_at_s = time.perf_counter()
                if not is_brisk:
                    return
                poll_ends_s = min(self._served_at_s + POLL_S, turn_ends_s)
            elif not is_brisk:
                return
            else:
                os.sched_yield()
            now_s = time.perf_counter()

    def _receive(self) -> bytes:
        """The next bytes; nothing where none are there, or the connection was closed."""
        try:
            data = self._socket.recv(RECV_NBYTES)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError as error:  # ECONNRESET: it closed, and had not read all
            self.close(str(error))
            return b""
        if not data:
            self.close("the client closed")
        return data

    def _serve(self, data: bytes) -> None:
        try:
            for payload in self._reader.feed(data):
                self._on_message(payload)
                if self._closed:
                    return
        except ProtocolViolation as error:
            self._cut_off(error)

    def _cut_off(self, error: ProtocolViolation) -> None:
        log.warning("client cut off", pid=self._pid, error=str(error))
        last_words = door_pb2.DoorResponse(error=error_to_detail(error)).SerializeToString()
        if not self._unsent:  # behind half an answer nobody would understand them
            with contextlib.suppress(OSError):
                self._socket.send(frame(last_words))
        self.fence(str(error))

    def _on_message(self, payload: bytes) -> None:
        meter = self._meter
        meter.num_calls += 1
        began_s = 0.0 if meter.num_calls % MEASURE_ONE_IN else time.perf_counter()
        message = parse(door_pb2.DoorRequest, payload)
        name = message.WhichOneof("request")
        if name is None:
            raise ProtocolViolation(
                "a request of a kind that this node does not know", hint="check the wire version"
            )
        if message.call_id == 0 and name not in _ONE_WAY:
            raise ProtocolViolation(
                f"a {name} without a call id, so that nobody could be answered",
                hint="number the calls from 1",
            )
        if self._session is None:
            if name != "hello":
                raise ProtocolViolation(
                    f"the first request must be hello, not {name}", hint="greet before you call"
                )
            self._on_hello(message.call_id, message.hello)
            return
        if name == "hello":
            raise ProtocolViolation("hello came twice", hint="connect anew for a new session")
        if name == "cancel":
            self._request_ids.pop(message.cancel.call_id, None)
            if (span := self._spans.pop(message.cancel.call_id, None)) is not None:
                span.end(asyncio.CancelledError())
            self._shell.cancel(self._session.id, message.cancel.call_id)
            return
        if message.request_id and message.call_id:
            self._request_ids[message.call_id] = message.request_id[:MAX_REQUEST_ID]
        if self._tracer is not None and message.traceparent and message.call_id:
            self._begin_span(self._tracer, name, message)
        try:
            request = request_from(name, getattr(message, name))
        except SnowskinError as error:
            self._answer(message.call_id, error)
            return
        self._shell.request(self._session.id, message.call_id, request)
        if began_s:
            meter.seconds.observe(time.perf_counter() - began_s, name)

    def _begin_span(self, tracer: Tracer, name: str, message: door_pb2.DoorRequest) -> None:
        request_id = message.request_id[:MAX_REQUEST_ID]
        span = tracer.continued(
            f"node {name}", message.traceparent, message.tracestate, request_id=request_id
        )
        if span is not None:
            self._spans[message.call_id] = span

    def _end_span(
        self, span: Span, request_id: str, reply: ReplyMessage | SnowskinError, ended_ns: int
    ) -> None:
        if isinstance(reply, SnowskinError):
            span.end(reply, ended_ns=ended_ns)
            return
        facts = facts_of_reply(reply)
        span.annotate(**facts)
        span.end(ended_ns=ended_ns)
        # A line for each call would cost more than the call; who traces wants to know.
        log.info(
            "call answered",
            request_id=request_id,
            trace_id=span.trace_id,
            answer=type(reply).__name__.lower(),
            **facts,
        )

    def _on_hello(self, call_id: int, hello: door_pb2.Hello) -> None:
        if hello.wire_version != WIRE_VERSION:
            error = WireVersionMismatch(
                f"client speaks wire version {hello.wire_version}, this node {WIRE_VERSION}",
                hint="upgrade the older of the two",
            )
            self._answer(call_id, error)
            self.fence(str(error))
            return
        self._hello_timer.cancel()
        access = access_from(hello.access)
        name = hello.client_name[:64] or f"pid-{self._pid}"
        self._session = self._shell.open_session(
            name, self._answer, maps_memory=True, may_write=access is Access.WRITE
        )
        response = door_pb2.DoorResponse(call_id=call_id)
        greeting = self._shell.greeting(self._session)
        greeting_to(greeting, response.hello, WIRE_VERSION)
        descriptors: list[int] = []
        try:
            for pool in greeting.pools:
                arena = self._shell.arenas[pool.pool_id]
                is_writer = access is Access.WRITE
                descriptors.append(arena.open_read_write() if is_writer else arena.open_read_only())
            descriptors.append(self._shell.open_board(self._session))
            data = frame(response.SerializeToString())
            # A fresh socket's buffer takes a greeting whole; the descriptors go with its first byte.
            sent = socket.send_fds(self._socket, [data], descriptors)
            self._unsent += data[sent:]
            self._flush()
        except OSError as error:
            log.warning("session not greeted", pid=self._pid, error=str(error))
            self.fence(str(error))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _answer(self, call_id: int, reply: ReplyMessage | SnowskinError) -> None:
        if self._closed:
            return
        if call_id == 0:
            if isinstance(reply, SnowskinError):
                log.warning("one-way call failed", pid=self._pid, error=str(reply))
            return
        response = door_pb2.DoorResponse(call_id=call_id)
        request_id = self._request_ids.pop(call_id, "")
        if self._spans and (span := self._spans.pop(call_id, None)) is not None:
            # Behind the answer: exporting and logging take longer than the call did.
            self._loop.call_soon(self._end_span, span, request_id, reply, time.time_ns())
        if isinstance(reply, SnowskinError):
            log.info(
                "call refused",
                request_id=request_id,
                pid=self._pid,
                reason=reply.reason,
                error=str(reply),
            )
            response.error.CopyFrom(error_to_detail(reply))
        else:
            reply_to(reply, getattr(response, _REPLY_FIELDS[type(reply).__name__]))
        try:
            data = frame(response.SerializeToString())
        except ProtocolViolation as error:  # ours, not the client's: many shards of many keys
            log.warning("answer too long", pid=self._pid, error=str(error))
            self._fence_soon(str(error))
            return
        if not self._unsent:
            try:
                sent = self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._fence_soon(str(error))
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._unsent += data
        self._flush()

    def _flush(self) -> None:
        if len(self._unsent) > MAX_UNSENT_NBYTES:
            log.warning("client does not read its answers", pid=self._pid)
            self._fence_soon("answers not read")
        elif self._unsent:
            self._loop.add_writer(self._socket.fileno(), self._on_writable)

    def _fence_soon(self, reason: str) -> None:
        # Not now: the state machine may be in the middle of handing out effects.
        self._loop.call_soon(self.fence, reason)

    def _on_writable(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.fence(str(error))
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._socket.fileno())
