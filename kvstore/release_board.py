"""Where a local reader leaves the leases that it is done with: a page of memory that it shares with the node.

Rules kept here: a slot is 0, or the id of one released lease. The reader fills the next slot if it is 0, the node takes
what is filled and sets it to 0; each looks at one slot at a time, and a slot is one aligned 8-byte store, so nothing
must be ordered between them. A full board is no error: then a message says it. What stands on the board is a claim like
any other, and the node checks it as it checks a message.

Why: a message wakes the node, and that costs the reader more than the rest of a small pull (30 of 130 µs, measured by
`snowskin.tools.bench spine`). The node looks at a board when the session speaks, before it reserves or counts, when a
timer fires, and every few milliseconds while somebody waits for room.
"""

from __future__ import annotations

import fcntl
import mmap
import os

NUM_SLOTS = 512
SLOT_NBYTES = 8
BOARD_NBYTES = NUM_SLOTS * SLOT_NBYTES


class ReleaseBoard:
    """One session's board, from either side."""

    def __init__(self, descriptor: int) -> None:
        """Maps the board behind `descriptor`, which stays the caller's."""
        self._memory = mmap.mmap(descriptor, BOARD_NBYTES)
        self._bytes = memoryview(self._memory)
        self._slots = self._bytes.cast("Q")
        self._next = 0

    def post(self, lease_id: int) -> bool:
        """Reader's side: leaves a lease there; False where the board is full."""
        if self._slots[self._next]:
            return False
        self._slots[self._next] = lease_id
        self._next = (self._next + 1) % NUM_SLOTS
        return True

    def take(self) -> list[int]:
        """Node's side: the leases left since the last call; at most one board full."""
        taken: list[int] = []
        while len(taken) < NUM_SLOTS and (lease_id := self._slots[self._next]):
            self._slots[self._next] = 0
            self._next = (self._next + 1) % NUM_SLOTS
            taken.append(lease_id)
        return taken

    def close(self) -> None:
        """Unmaps it; idempotent."""
        self._slots.release()
        self._bytes.release()
        self._memory.close()


def make_descriptor() -> int:
    """An empty board, of a size that nobody can change; the caller closes it."""
    descriptor = os.memfd_create("snowskin-releases", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, BOARD_NBYTES)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
