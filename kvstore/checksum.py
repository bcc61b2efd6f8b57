"""The checksum of a block: CRC-32C of its bytes, tied to its key.

Rules kept here: the record is CRC-32C(bytes) XOR fold(namespace) XOR fold(key), where fold is the XOR of a string's
little-endian 32-bit words, the last padded with zeros; so right bytes under a wrong key are refused too. A checksum is
taken of a piece right after it moved, while it is in the cache; pieces come in order, and a block may be cut into many,
or many blocks lie in one. This finds accidents, not forgers.

Folding in the key costs three numpy calls a column; running the key through the CRC costs 0.3 µs a block, a third of
what a 1 KiB block costs in all (`snowskin.tools.bench spine`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from fastcrc import crc32

if TYPE_CHECKING:
    from collections.abc import Callable

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]

CHECKSUM_NBYTES = 4
crc32c: Callable[..., int] = crc32.iscsi
"""`crc32c(data)`: Castagnoli's, of RFC 3720; `crc32c(data, crc)` goes on from what came before."""

_RECORD = np.dtype("<u4")


def fold(text: bytes) -> int:
    """XOR of the little-endian 32-bit words of `text`, zero-padded."""
    number = int.from_bytes(text, "little")
    folded = 0
    while number:
        folded ^= number & 0xFFFF_FFFF
        number >>= 32
    return folded


# Namespaces are few and come with each pull. Keys are many and come once: they must not push namespaces out.
_namespace_fold = lru_cache(maxsize=256)(fold)


def fold_column(packed: bytes, width: int) -> Words:
    """`fold` of each key of a packed column."""
    if len(packed) == width:  # one key: plain integers are faster than four numpy calls
        return np.array([fold(packed)], _RECORD)
    keys = np.frombuffer(packed, np.uint8).reshape(-1, width)
    if width % CHECKSUM_NBYTES:
        keys = np.pad(keys, ((0, 0), (0, -width % CHECKSUM_NBYTES)))
    words: Words = np.bitwise_xor.reduce(keys.view(_RECORD), axis=1)
    return words


def checksum(namespace: bytes, key: bytes, data: Bytes | bytes) -> bytes:
    """The record of one whole block."""
    return (crc32c(data) ^ fold(namespace) ^ fold(key)).to_bytes(CHECKSUM_NBYTES, "little")


class RunningChecksums:
    """Checksums of consecutive blocks whose bytes pass by in order, in pieces of any size.

    Give `landed` to a transport: it is called with (offset, nbytes) in `buffer`.
    """

    def __init__(self, buffer: Bytes, block_nbytes: int) -> None:
        """Nothing has passed yet.

        Args:
            buffer: the local memory that pieces are in.
            block_nbytes: bytes of each block.
        """
        self._buffer = buffer
        self._block_nbytes = block_nbytes
        self._passed_nbytes = 0  # of the block that has begun
        self._crc = 0
        self._crcs: list[int] = []

    @property
    def num_passed(self) -> int:
        """Blocks that have passed whole."""
        return len(self._crcs)

    def landed(self, offset: int, nbytes: int) -> None:
        """Bytes `offset .. + nbytes` of the buffer passed."""
        buffer, block_nbytes, end = self._buffer, self._block_nbytes, offset + nbytes
        if self._passed_nbytes:
            offset = self._extend(offset, min(end, offset + block_nbytes - self._passed_nbytes))
        if num_whole := (end - offset) // block_nbytes:
            whole_end = offset + num_whole * block_nbytes
            blocks = buffer[offset:whole_end].reshape(num_whole, block_nbytes)
            # A loop in C: half the time for small blocks.
            self._crcs.extend(map(crc32c, blocks))
            offset = whole_end
        if offset < end:
            self._extend(offset, end)

    def _extend(self, start: int, end: int) -> int:
        """A part of a block passed; returns `end`."""
        self._crc = crc32c(self._buffer[start:end], self._crc)
        self._passed_nbytes += end - start
        if self._passed_nbytes == self._block_nbytes:
            self._crcs.append(self._crc)
            self._crc = self._passed_nbytes = 0
        return end

    def records(self, namespace: bytes, packed: bytes, width: int) -> Words:
        """The records of all blocks that passed whole, under these keys."""
        crcs = np.array(self._crcs, _RECORD)
        words: Words = (
            crcs ^ fold_column(packed, width)[: len(crcs)] ^ np.uint32(_namespace_fold(namespace))
        )
        return words

    def mismatches(self, namespace: bytes, packed: bytes, width: int, expected: bytes) -> list[int]:
        """Indices of blocks whose record is not the expected one; a block that did not pass whole is one."""
        found = self.records(namespace, packed, width)
        if found.tobytes() == expected:
            return []
        wanted = np.frombuffer(expected, _RECORD)
        common = min(len(found), len(wanted))
        wrong = np.flatnonzero(found[:common] != wanted[:common]).tolist()
        return [*wrong, *range(common, max(len(found), len(wanted)))]
