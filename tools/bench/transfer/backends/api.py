"""What a contestant of the transfer benchmark does, in two processes: one owns the bytes, the other pulls them.

Rules kept here: both processes see the same pool and the same landing memory, whose pages are in before anything is
measured; what can be made before a pull (requests, descriptors, lists) is made in `prepare`, for everybody alike; a
pull returns when all bytes lie where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from snowskin.transport.runs import Run

Bytes = npt.NDArray[np.uint8]
Option = str | int | bool
Options = dict[str, Option]
Offer = dict[str, str | int]
"""What the owner tells the reader; plain JSON."""
Pull = Callable[[], None]
Landed = Callable[[int, int], object]
Begin = Callable[[], Landed]
"""Called before a checked pull: what each of its pieces, of at most 1 MiB, is then told to."""


class ContestantMissing(Exception):
    """This contestant cannot run here; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """A memfd that both processes have mapped, with all its pages in."""

    fd: int
    bytes: Bytes

    @property
    def address(self) -> int:
        """Where it lies in this process."""
        return int(self.bytes.ctypes.data)


class OwnerEnd(Protocol):
    """The process that has the bytes; serves without being asked again."""

    @property
    def offer(self) -> Offer:
        """What the reader needs to know."""

    def close(self) -> None:
        """Ends serving."""


class ReaderEnd(Protocol):
    """The process that pulls."""

    def prepare(self, runs: Sequence[Run], begin: Begin | None) -> Pull:
        """One pull of these runs, ready to be made again and again.

        Args:
            runs: from the pool into the landing memory.
            begin: with it, every piece is told right after it landed.

        Raises:
            ContestantMissing: it cannot move such runs, or not with checks.
        """

    def close(self) -> None:
        """Lets go of the owner."""
