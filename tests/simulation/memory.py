"""Bytes, and what they ought to be: a pool's memory, and every content that was ever written under a name.

Rules kept here: each publish of a block writes bytes of its own, so that bytes of another block, of another time, or
half of each are seen for what they are. Every write says whose session it is of, and the model of who may write where
looks at it before it lands.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

Name = tuple[bytes, bytes]
"""Namespace (empty for a tail) and key of a block."""
Place = tuple[int, int]
"""First byte and number of bytes."""

BLOCK = 1024
TAIL_NBYTES = 640
NAMESPACES = (b"N" * 32, b"M" * 32)


def key(name: str) -> bytes:
    """A block's key, readable in a trace."""
    return name.encode().ljust(32, b".")


def plain(name: bytes) -> str:
    """A key as it was called."""
    return name.decode(errors="replace").rstrip(".")


class Truth:
    """What was ever written under each name, by anybody."""

    def __init__(self) -> None:
        self._contents: dict[Name, set[bytes]] = {}
        self._num_made = 0

    def make(self, name: Name, nbytes: int) -> bytes:
        """Bytes that nobody wrote before, to be published under this name."""
        self._num_made += 1
        digest = hashlib.blake2b(b"%s %s %d" % (*name, self._num_made), digest_size=64).digest()
        content = (digest * (nbytes // len(digest) + 1))[:nbytes]
        self._contents.setdefault(name, set()).add(content)
        return content

    def knows(self, name: Name, data: bytes) -> bool:
        """Whether somebody wrote these bytes under this name."""
        return data in self._contents.get(name, ())


class Memory:
    """One pool's bytes, of one life of its node."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = np.zeros(nbytes, np.uint8)
        self.before_write: Callable[[int, Place], None] | None = None

    def write(self, session_id: int, offset: int, data: bytes) -> None:
        """A store of one session lands."""
        if self.before_write is not None:
            self.before_write(session_id, (offset, len(data)))
        self.buffer[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def read(self, offset: int, nbytes: int) -> bytes:
        """What is there now."""
        return self.buffer[offset : offset + nbytes].tobytes()
