"""Words that those who decide and those who move bytes share: ranges, and what is said of a transfer that is complete.

Rules kept here: pure, and nothing of this package is imported: whoever parses or decides needs no memory for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

MAX_NOTE_NBYTES = 256


class Range(NamedTuple):
    """One contiguous part of a region."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a peer says when a transfer of its own is complete.

    Attributes:
        capability: of the grant that was used.
        nbytes: how much it moved.
        is_push: whether the peer wrote.
        note: what the peer wanted to add, at most 256 bytes.
    """

    capability: bytes
    nbytes: int
    is_push: bool
    note: bytes
