"""The limit between hosts: plain blocking sockets, the simplest program that moves the bytes.

Rules kept here: one request per pull, all its ranges in it; the owner answers with the bytes alone, range by range,
without checking who asks; nothing is made faster than its few lines are. That is what a transport has to reach with
all it promises.

Request: number of ranges (8 bytes), then offset and length of each (8 + 8).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

from snowskin.tools.bench.transfer.backends.api import ContestantMissing
from snowskin.transport.api import PIECE_NBYTES
from snowskin.transport.runs import Run, pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.tools.bench.transfer.backends.api import (
        Begin,
        Landed,
        Offer,
        Options,
        Pull,
        SharedMemory,
    )

CONNECT_TIMEOUT_S = 5.0
_COUNT = struct.Struct("<Q")
_RANGE = struct.Struct("<QQ")


def receive(stream: socket.socket, view: memoryview) -> None:
    """Fills the view, or raises ConnectionError."""
    got, size = 0, len(view)
    while got < size:
        received = stream.recv_into(view[got:])
        if not received:
            raise ConnectionError("the owner closed the connection")
        got += received


class SocketOwner:
    """Listens; a thread per connection."""

    def __init__(self, pool: SharedMemory, options: Options) -> None:
        """Options: `family` tcp or unix, `call` send or sendfile, `congestion` the sender's algorithm or empty."""
        self._pool = pool
        self._with_sendfile = options.get("call") == "sendfile"
        self._congestion = str(options.get("congestion", ""))
        self._streams: list[socket.socket] = []
        if options.get("family") == "unix":
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind("")  # a fresh abstract name: no file to leave behind
            self._listener.listen()
            self.offer: Offer = {"unix": self._listener.getsockname().hex()}
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.offer = {"port": self._listener.getsockname()[1]}
        threading.Thread(target=self._accept, name="sockets-accept", daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                stream, _ = self._listener.accept()
                if stream.family == socket.AF_INET:
                    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    if self._congestion:
                        stream.setsockopt(
                            socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._congestion.encode()
                        )
                self._streams.append(stream)
                threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        head = memoryview(bytearray(_COUNT.size))
        with contextlib.suppress(OSError), stream:
            while True:
                receive(stream, head)
                (num_ranges,) = _COUNT.unpack(head)
                request = memoryview(bytearray(num_ranges * _RANGE.size))
                receive(stream, request)
                for offset, nbytes in _RANGE.iter_unpack(request):
                    self._send(stream, offset, offset + nbytes)

    def _send(self, stream: socket.socket, offset: int, end: int) -> None:
        if not self._with_sendfile:
            stream.sendall(self._pool.bytes.data[offset:end])
            return
        while offset < end:
            offset += os.sendfile(stream.fileno(), self._pool.fd, offset, end - offset)

    def close(self) -> None:
        """Closes all connections; the threads end with them."""
        for closing in (self._listener, *self._streams):
            with contextlib.suppress(OSError):
                closing.shutdown(socket.SHUT_RDWR)
            closing.close()


class SocketReader:
    """Asks and receives, over one connection or several."""

    def __init__(
        self, offer: Offer, pool: SharedMemory, landing: SharedMemory, options: Options
    ) -> None:
        """Option `streams`: how many connections share a contiguous pull."""
        self._landing = landing.bytes.data
        self._streams = [_connect(offer) for _ in range(int(options.get("streams", 1)))]
        self._workers = concurrent.futures.ThreadPoolExecutor(max(1, len(self._streams) - 1))

    def prepare(self, runs: Sequence[Run], begin: Begin | None) -> Pull:
        """One request; several connections only share one contiguous run, unchecked."""
        if len(self._streams) > 1:
            if begin or len(runs) > 1 or runs[0].nbytes < PIECE_NBYTES:
                raise ContestantMissing("several streams are for one large run, unchecked")
            return self._prepare_shared(runs[0])
        stream, request = self._streams[0], _request(runs)
        parts = [
            (self._landing[local : local + size], local, size)
            for _, local, size in (pieces(runs, PIECE_NBYTES) if begin else runs)
        ]

        def pull() -> None:
            stream.sendall(request)
            for view, _, _ in parts:
                receive(stream, view)

        def pull_and_check() -> None:
            assert begin is not None
            landed: Landed = begin()
            stream.sendall(request)
            for view, local, size in parts:
                receive(stream, view)
                landed(local, size)

        return pull_and_check if begin else pull

    def _prepare_shared(self, run: Run) -> Pull:
        share = -(-run.nbytes // len(self._streams))
        parts = [
            (
                stream,
                _request([Run(run.remote_offset + start, 0, min(share, run.nbytes - start))]),
                self._landing[
                    run.local_offset + start : run.local_offset + min(start + share, run.nbytes)
                ],
            )
            for stream, start in zip(self._streams, range(0, run.nbytes, share), strict=False)
        ]

        def part(stream: socket.socket, request: bytes, view: memoryview) -> None:
            stream.sendall(request)
            receive(stream, view)

        def pull() -> None:
            others = [self._workers.submit(part, *arguments) for arguments in parts[1:]]
            part(*parts[0])
            for other in others:
                other.result()

        return pull

    def close(self) -> None:
        """Closes the connections."""
        self._workers.shutdown()
        for stream in self._streams:
            stream.close()


def _request(runs: Sequence[Run]) -> bytes:
    return _COUNT.pack(len(runs)) + b"".join(_RANGE.pack(run[0], run[2]) for run in runs)


def _connect(offer: Offer) -> socket.socket:
    if "unix" in offer:
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(CONNECT_TIMEOUT_S)
        stream.connect(bytes.fromhex(str(offer["unix"])))
    else:
        stream = socket.create_connection(
            ("127.0.0.1", int(offer["port"])), timeout=CONNECT_TIMEOUT_S
        )
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.settimeout(None)  # blocking, as the plainest program is; whoever measures has a limit
    return stream


open_owner = SocketOwner
open_reader = SocketReader
