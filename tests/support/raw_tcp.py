"""Both ends of the data plane without our transport behind them: they say anything, and tell what came back.

Rules kept here: frames are spelled as docs/wire.md says, and bytes that are no frames can be said as well; every wait
has a deadline; what the other side does to the connection (end, reset) is an answer and no error.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.api import Range, RegionDescriptor
from snowskin.transport.frames import (
    WIRE_VERSION,
    Ask,
    Data,
    Fail,
    Frame,
    Hello,
    Kind,
    Parser,
    Welcome,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PATIENCE_S = 5.0
RESET = struct.pack("ii", 1, 0)
HELLO = Hello(min_version=WIRE_VERSION, max_version=WIRE_VERSION, heartbeat_ms=1000, name="raw")
HELLO_NBYTES = len(encode(HELLO))
WELCOME = Welcome(
    version=WIRE_VERSION,
    epoch=0,
    max_ranges=4096,
    max_data_nbytes=1 << 20,
    idle_timeout_ms=0,
    ack_timeout_ms=2000,
)


def reachable(descriptor: RegionDescriptor) -> Address:
    """The first address under which its owner serves."""
    return Reachability.from_bytes(descriptor.extra).addresses[0]


def at(descriptor: RegionDescriptor, *addresses: tuple[str, int]) -> RegionDescriptor:
    """The same grant, reached elsewhere: through a relay."""
    extra = Reachability(addresses=tuple(Address(*each) for each in addresses)).to_bytes()
    return changed(descriptor, extra=extra)


def changed(descriptor: RegionDescriptor, **fields: object) -> RegionDescriptor:
    """The descriptor with some fields forged."""
    names = [name for name in RegionDescriptor.__slots__ if name not in fields]
    return RegionDescriptor(**{name: getattr(descriptor, name) for name in names}, **fields)  # type: ignore[arg-type]


def ask_of(
    descriptor: RegionDescriptor,
    ranges: Sequence[tuple[int, int]],
    *,
    is_push: bool = False,
    op: int = 1,
    wants_done: bool = False,
    note: bytes = b"",
    timeout_ms: int = 5000,
    traffic: int = 0,
) -> Ask:
    """The PULL or PUSH that a reader would send."""
    return Ask(
        is_push=is_push,
        op=op,
        capability=descriptor.capability,
        epoch=descriptor.epoch,
        generation=descriptor.generation,
        timeout_ms=timeout_ms,
        traffic=traffic,
        wants_done=wants_done,
        note=note,
        ranges=tuple(Range(*each) for each in ranges),
    )


def head(kind: int, *, op: int = 0, nbytes: int = 0, flags: int = 0, zero: int = 0) -> bytes:
    """Sixteen bytes that `encode` would not say."""
    return struct.pack(">BBHIQ", kind, flags, zero, op, nbytes)


class RawStream:
    """One connection; `with` closes it."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(PATIENCE_S)
        self._parser = Parser()
        self.ended = ""  # or `end`, `reset`

    def send(self, data: bytes) -> None:
        """Bytes as they are; a peer that has cut us off already is no error here."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def say(self, *frames: Frame) -> None:
        """Frames; the payload of a Data is the caller's to send."""
        self.send(b"".join(map(encode, frames)))

    def send_slowly(self, data: bytes, *, each_s: float, until_s: float) -> float:
        """A byte each `each_s` until the peer ends the connection; after how long it did."""
        began_s = time.monotonic()
        for value in data:
            self.send(bytes([value]))
            if self.is_over(each_s):
                break
            assert time.monotonic() < began_s + until_s, "the peer waits on and on"
        else:
            assert self.is_over(until_s), "the peer waits on and on"
        return time.monotonic() - began_s

    def is_over(self, within_s: float) -> bool:
        """Whether the peer ends the connection within a time; what it says meanwhile is kept."""
        deadline_s = time.monotonic() + within_s
        while not self.ended:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0 or not self._receive(remaining_s):
                break
        return bool(self.ended)

    def hear(self, within_s: float = PATIENCE_S) -> Frame | None:
        """The next frame; None where the connection has ended; TimeoutError where nothing comes."""
        deadline_s = time.monotonic() + within_s
        while (frame := self._parser.next_frame()) is None:
            if self.ended:
                return None
            if not self._receive(max(deadline_s - time.monotonic(), 0.001)):
                raise TimeoutError(f"nothing within {within_s} s")
        return frame

    def payload(self, nbytes: int, within_s: float = PATIENCE_S) -> bytes:
        """What follows a Data; shorter where the connection has ended."""
        deadline_s = time.monotonic() + within_s
        data = self._parser.take_payload(nbytes)
        while len(data) < nbytes and not self.ended:
            if not self._receive(max(deadline_s - time.monotonic(), 0.001)):
                raise TimeoutError(f"{len(data)} of {nbytes} bytes within {within_s} s")
            data += self._parser.take_payload(nbytes - len(data))
        return data

    def transfer(self, nbytes: int) -> tuple[bytes, Fail | None]:
        """The payload of all Data until `nbytes` came, and the Fail that came instead of the rest."""
        data = b""
        while len(data) < nbytes:
            frame = self.hear()
            if isinstance(frame, Data):
                data += self.payload(frame.nbytes)
            elif frame is None or isinstance(frame, Fail):
                return data, frame
            else:
                raise AssertionError(f"{frame} in the middle of a transfer")
        return data, None

    def rest(self, within_s: float = PATIENCE_S) -> bytes:
        """Everything that came and comes until the connection ends, frames or not."""
        assert self.is_over(within_s), "the connection lives"
        return self._parser.take_payload(1 << 62)

    def read_nothing(self) -> None:
        """The smallest buffer, so that a peer which sends to us soon stands still."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.socket.close()

    def _receive(self, within_s: float) -> bool:
        self.socket.settimeout(within_s)
        try:
            data = self.socket.recv(1 << 20)
        except TimeoutError:
            return False
        except ConnectionResetError:
            self.ended = "reset"
            return True
        finally:
            self.socket.settimeout(PATIENCE_S)
        if not data:
            self.ended = "end"
        self._parser.feed(data)
        return True

    def __enter__(self) -> RawStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class RawReader(RawStream):
    """Connects to an owner."""

    def __init__(self, address: Address | tuple[str, int], *, hello: bool = True) -> None:
        super().__init__(socket.create_connection((address[0], address[1]), PATIENCE_S))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.welcome: Welcome | None = None
        if hello:
            self.say(HELLO)
            frame = self.hear()
            assert isinstance(frame, Welcome), frame
            self.welcome = frame

    def __enter__(self) -> RawReader:
        return self

    def pull(
        self, descriptor: RegionDescriptor, ranges: Sequence[tuple[int, int]], **values: object
    ) -> tuple[bytes, Fail | None]:
        """One whole pull: what came, and the refusal if there was one."""
        self.say(ask_of(descriptor, ranges, **values))  # type: ignore[arg-type]
        return self.transfer(sum(nbytes for _, nbytes in ranges))


@dataclass
class RawOwner:
    """Listens, and lets `serve` do what it likes to each connection, in a thread for each; `with` ends it.

    `serve` is given the stream; what it raises is kept in `error` and raised at the end.
    """

    serve: Callable[[RawStream], object]
    port: int = 0
    error: BaseException | None = None
    num_connections: int = 0

    def __enter__(self) -> RawOwner:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._streams: list[RawStream] = []
        self._threads = [threading.Thread(target=self._accept, name="raw-owner")]
        self._threads[0].start()
        return self

    def stop_listening(self) -> None:
        """Whoever connects from now on is refused."""
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop_listening()
        self._threads[0].join(PATIENCE_S)
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        if self.error is not None and kind is None:
            raise self.error

    def descriptor(self, nbytes: int, **fields: object) -> RegionDescriptor:
        """A grant of a region that is nowhere."""
        made = RegionDescriptor(
            scheme="tcp",
            capability=b"c" * 16,
            nbytes=nbytes,
            extra=Reachability(addresses=(Address(*self.address),)).to_bytes(),
        )
        return changed(made, **fields)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            self._streams.append(RawStream(connection))
            self._threads.append(
                threading.Thread(target=self._serve, args=[self._streams[-1]], name="raw-owner")
            )
            self._threads[-1].start()

    def _serve(self, stream: RawStream) -> None:
        with stream:
            try:
                self.serve(stream)
            except BaseException as error:  # noqa: BLE001  raised at the end
                self.error = self.error or error


def greeted(stream: RawStream, welcome: Welcome = WELCOME) -> Ask | None:
    """An owner's part up to the first PULL or PUSH, PINGs answered; None where the reader went."""
    assert isinstance(stream.hear(), Hello)
    stream.say(welcome)
    return next_ask(stream)


def next_ask(stream: RawStream) -> Ask | None:
    """The next PULL or PUSH; PINGs are answered."""
    while (frame := stream.hear()) is not None:
        if isinstance(frame, Ask):
            return frame
        stream.send(head(Kind.PONG, op=frame.op))
    return None


def frames_in(data: bytes) -> list[Frame]:
    """What the bytes say, the payload of Data left out; whatever follows the last whole frame is dropped."""
    found, parser = [], Parser()
    parser.feed(data)
    while (frame := parser.next_frame()) is not None:
        found.append(frame)
        if isinstance(frame, Data):
            parser.take_payload(frame.nbytes)
    return found
