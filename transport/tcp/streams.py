"""A non-blocking stream to a peer, plain or with TLS, with the four calls that an owner uses.

Rules kept here: what would block is BlockingIOError, and what the peer broke is an OSError, with TLS as without.

A plain socket already is such a stream. TLS cannot gather or scatter: it takes the parts one by one, small ones joined
first (one copy; the cipher reads them all anyway).
"""

from __future__ import annotations

import contextlib
import ssl
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

SMALL_NBYTES = 16 << 10  # a TLS record holds so much
JOINED_NBYTES = 64 << 10


class Stream(Protocol):
    """What is used of a connection; a plain `socket.socket` does it all."""

    def fileno(self) -> int:
        """The descriptor, to wait on."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Bytes received; 0 at the stream's end."""

    def recvmsg_into(self, buffers: Sequence[memoryview], /) -> tuple[int, object, int, object]:
        """Bytes received, first of all, into one part after the other."""

    def send(self, data: bytes | bytearray, /) -> int:
        """Bytes that were taken."""

    def sendmsg(
        self, buffers: Sequence[memoryview], ancillary: tuple[()] = (), flags: int = 0, /
    ) -> int:
        """Bytes that were taken, of one part after the other."""

    def shutdown(self, how: int, /) -> None:
        """Ends one direction, or both."""

    def close(self) -> None:
        """Gives the descriptor back."""


class TlsStream:
    """TLS over a non-blocking socket; shakes hands when first used."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext) -> None:
        """Takes `plain` over."""
        self._tls = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        self._has_greeted = False

    def fileno(self) -> int:
        """The descriptor, to wait on."""
        return self._tls.fileno()

    def recv_into(self, buffer: memoryview, /) -> int:
        """Bytes received; 0 at the stream's end."""
        with _translated():
            self._shake_hands()
            return self._tls.recv_into(buffer)

    def recvmsg_into(self, buffers: Sequence[memoryview], /) -> tuple[int, object, int, object]:
        """Bytes received, first of all, into one part after the other."""
        total = 0
        for buffer in buffers:
            position = 0
            while position < len(buffer):
                try:
                    nbytes = self.recv_into(buffer[position:])
                except BlockingIOError:
                    if total:
                        return total, [], 0, None
                    raise
                if not nbytes:  # what came before is told first; the end is there to be found again
                    return total, [], 0, None
                position += nbytes
                total += nbytes
        return total, [], 0, None

    def send(self, data: bytes | bytearray | memoryview, /) -> int:
        """Bytes that were taken."""
        with _translated():
            self._shake_hands()
            return self._tls.send(data)

    def sendmsg(
        self, buffers: Sequence[memoryview], ancillary: tuple[()] = (), flags: int = 0, /
    ) -> int:
        """Bytes that were taken, of one part after the other; there is nothing that flags could change."""
        total = 0
        for part in _joined(buffers):
            position = 0
            while position < len(part):  # TLS takes one record at a time
                try:
                    nbytes = self.send(part[position:])
                except BlockingIOError:
                    if total:
                        return total
                    raise
                position += nbytes
                total += nbytes
        return total

    def shutdown(self, how: int, /) -> None:
        """Ends one direction, or both, without TLS's own farewell, which could block."""
        self._tls.shutdown(how)

    def close(self) -> None:
        """Gives the descriptor back."""
        self._tls.close()

    def _shake_hands(self) -> None:
        if not self._has_greeted:
            self._tls.do_handshake()
            self._has_greeted = True


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        raise BlockingIOError from None
    except ssl.SSLError as error:
        raise ConnectionResetError(f"TLS: {error}") from error


def _joined(buffers: Sequence[memoryview]) -> Iterator[memoryview]:
    """The same bytes in fewer parts: neighbours that are small become one.

    A part that was refused is offered again with the same beginning, as TLS demands: where a group begins follows from
    what was taken before it alone.
    """
    small: list[memoryview] = []
    small_nbytes = 0
    for buffer in buffers:
        if len(buffer) <= SMALL_NBYTES and small_nbytes + len(buffer) <= JOINED_NBYTES:
            small.append(buffer)
            small_nbytes += len(buffer)
            continue
        if small:
            yield memoryview(b"".join(small))
            small, small_nbytes = [], 0
        if len(buffer) <= SMALL_NBYTES:
            small, small_nbytes = [buffer], len(buffer)
        else:
            yield buffer
    if small:
        yield memoryview(b"".join(small))
