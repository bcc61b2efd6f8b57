"""The checksum of a block: CRC-32C over namespace, key and bytes, so that it belongs to its key.

Rules kept here: a checksum is taken of a piece right after it moved, while it is in the cache; pieces come in
order, and a block may be cut into many or many blocks lie in one. CRC-32C finds accidents, not forgers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Bytes = npt.NDArray[np.uint8]

CHECKSUM_NBYTES = 4


def seed(namespace: bytes, key: bytes) -> int:
    """The checksum's state before the first byte of the block."""
    return google_crc32c.value(namespace + key)


def checksum(namespace: bytes, key: bytes, data: Bytes | bytes) -> bytes:
    """The record of one whole block."""
    return google_crc32c.extend(seed(namespace, key), data).to_bytes(CHECKSUM_NBYTES, "little")


class RunningChecksums:
    """Checksums of consecutive blocks whose bytes pass by in order, in pieces of any size.

    Give `landed` to a transport: it is called with (offset, nbytes) in `buffer`.
    """

    def __init__(
        self, buffer: Bytes, namespace: bytes, keys: Sequence[bytes], block_nbytes: int
    ) -> None:
        """Nothing has passed yet.

        Args:
            buffer: the local memory that pieces are in.
            namespace: of all keys.
            keys: of the blocks, in the order in which their bytes pass.
            block_nbytes: bytes of each.
        """
        self._buffer = buffer
        self._namespace = namespace
        self._keys = keys
        self._block_nbytes = block_nbytes
        self._current = 0
        self._left = 0
        self._crc = 0
        self._records: list[int] = []

    def landed(self, offset: int, nbytes: int) -> None:
        """Bytes `offset .. + nbytes` of the buffer passed."""
        end = offset + nbytes
        while offset < end:
            if self._left == 0:
                self._crc = google_crc32c.value(self._namespace + self._keys[self._current])
                self._left = self._block_nbytes
                self._current += 1
            length = min(self._left, end - offset)
            self._crc = google_crc32c.extend(self._crc, self._buffer[offset : offset + length])
            offset += length
            self._left -= length
            if self._left == 0:
                self._records.append(self._crc)

    def packed(self) -> bytes:
        """The records of all blocks that passed whole, little-endian."""
        return np.array(self._records, dtype="<u4").tobytes()

    def mismatches(self, expected: bytes) -> list[int]:
        """Indices of blocks whose record is not the expected one; a block that did not pass whole is one."""
        packed = self.packed()
        if packed == expected:
            return []
        found = np.frombuffer(packed, dtype="<u4")
        wanted = np.frombuffer(expected, dtype="<u4")
        wrong = np.flatnonzero(found != wanted[: len(found)]).tolist()
        return [*wrong, *range(len(found), len(wanted))]
