"""Frames of the local door: a little-endian uint32 length, and that many bytes.

Rules kept here: no I/O; a frame's length is checked before anything is kept for it; bytes may come in any pieces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.kvstore.errors import ProtocolViolation

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER_NBYTES = 4
# 8,192 keys of 64 bytes and what stands around them, with room to spare.
MAX_FRAME_NBYTES = 4 << 20


def frame(payload: bytes) -> bytes:
    """One message, ready to send."""
    if len(payload) > MAX_FRAME_NBYTES:
        raise ProtocolViolation(
            f"a message of {len(payload)} bytes is longer than a frame may be ({MAX_FRAME_NBYTES})",
            hint="send fewer keys in one call",
        )
    return len(payload).to_bytes(HEADER_NBYTES, "little") + payload


class FrameReader:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        """Nothing read yet."""
        self._buffer = bytearray()

    @property
    def num_pending(self) -> int:
        """Bytes of a frame that is not complete."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that `data` completes, one by one: those before a violation still count.

        Raises:
            ProtocolViolation: a length is 0 or over the limit; the stream cannot be read on.
        """
        if not self._buffer and len(data) > HEADER_NBYTES:
            # The common case: one whole frame a read, no buffering.
            length = int.from_bytes(data[:HEADER_NBYTES], "little")
            if length == len(data) - HEADER_NBYTES and 0 < length <= MAX_FRAME_NBYTES:
                yield data[HEADER_NBYTES:]
                return
        self._buffer += data
        while len(self._buffer) >= HEADER_NBYTES:
            length = int.from_bytes(self._buffer[:HEADER_NBYTES], "little")
            if not 0 < length <= MAX_FRAME_NBYTES:
                raise ProtocolViolation(
                    f"a frame of {length} bytes was announced, the limit is {MAX_FRAME_NBYTES}",
                    hint="send a length of 1 or more, and no more keys than the greeting says",
                )
            end = HEADER_NBYTES + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEADER_NBYTES:end])
            del self._buffer[:end]  # a bytearray moves its start, not its bytes
            yield payload
