"""A page that says which grants are good, read by peers on this host without asking.

Rules kept here: a slot holds the serial number of its grant, and 0 once that was taken back; no serial number is given
twice, so a slot used anew is not taken for the old grant; peers can only read. Who reads memory under a grant looks at
its slot afterwards: if the number still stands, the memory was not given to others before the reading ended.

The order matters: the owner changes the slot before it gives the memory away, the peer reads the slot after the
bytes. Both sides' processors keep it (x86 orders stores with stores and loads with loads; elsewhere the locks that the
interpreter takes in between do). It is a seqlock with one writer that never waits. It cannot end a write under way:
what a peer may write is free for others only when its link has ended.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
from typing import NamedTuple

from snowskin.transport.errors import BadDescriptor, GrantRefused
from snowskin.transport.mapping import Mapping, Mappings

BOARD_NBYTES = mmap.PAGESIZE
_NUM_SLOTS = BOARD_NBYTES // 8


class Place(NamedTuple):
    """Where a grant stands."""

    board: GrantBoard
    slot: int
    serial: int


class GrantBoard:
    """One page of the owner's."""

    def __init__(self) -> None:
        """All slots are free."""
        self._fd = os.memfd_create("snowskin-grants", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self._fd, 0, BOARD_NBYTES)
            fcntl.fcntl(
                self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )  # fmt: skip
            self._words = Mapping(self._fd, BOARD_NBYTES, writable=True).array().data.cast("Q")
        except BaseException:
            os.close(self._fd)
            raise
        self.free = list(range(_NUM_SLOTS))

    def set(self, slot: int, serial: int) -> None:
        """Says that a grant is good; 0 that none is."""
        self._words[slot] = serial

    def open_read_only(self) -> int:
        """A descriptor for a peer; the caller closes it."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Takes everything back. Idempotent."""
        if self._fd >= 0:
            for slot in range(_NUM_SLOTS):
                self._words[slot] = 0
            os.close(self._fd)
            self._fd = -1
            self._words = memoryview(b"")


class GrantBoards:
    """As many pages as the grants need. The caller lets one thread in at a time."""

    def __init__(self) -> None:
        """No page yet."""
        self._boards: list[GrantBoard] = []
        self._serials = itertools.count(1)

    def add(self) -> Place:
        """A place for one more grant, which is good."""
        board = next((board for board in self._boards if board.free), None)
        if board is None:
            board = GrantBoard()
            self._boards.append(board)
        slot, serial = board.free.pop(), next(self._serials)
        board.set(slot, serial)
        return Place(board, slot, serial)

    def take_back(self, place: Place) -> None:
        """Says that a grant is not good any more, and frees its place; once for each place."""
        place.board.set(place.slot, 0)
        place.board.free.append(place.slot)

    def close(self) -> None:
        """Takes everything back. Idempotent."""
        for board in self._boards:
            board.close()
        self._boards.clear()


class SeenGrant:
    """A peer's sight of one grant."""

    __slots__ = ("_serial", "_slot", "_words")

    def __init__(self, mappings: Mappings, fd: int, *, slot: int, serial: int) -> None:
        """Maps the owner's page; `fd` stays the caller's. Raises BadDescriptor where it is none."""
        if not 0 <= slot < _NUM_SLOTS or serial < 1:
            raise BadDescriptor(f"a grant board has no slot {slot}, and no serial number {serial}")
        board = mappings.map(fd, BOARD_NBYTES, writable=False)
        self._words = board.array().data.cast("Q")
        self._slot = slot
        self._serial = serial

    @property
    def is_good(self) -> bool:
        """Whether the owner has not taken it back."""
        return self._words[self._slot] == self._serial

    def check(self) -> None:
        """Raises GrantRefused where the owner took it back."""
        if self._words[self._slot] != self._serial:
            raise GrantRefused(
                "the owner took this grant back; what was read under it must not be used",
                hint="match again and pull under the new lease",
            )
