"""One pool's books: every byte is free, reserved, committed or quarantined, and counted as just one of them.

Rules kept here: free + reserved + committed + quarantined = capacity, always. A reservation gets few large pieces:
first the room right behind its parent, then the smallest hole that takes all the rest, then the largest holes. Room
whose pages cannot be had anew, because somebody else's bytes share them, is passed over and stays free.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

from snowskin.kvstore.pool.allocator import ExtentAllocator

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_PASSED_OVER = 32  # of one reservation, before it goes where nobody can stand in the way; each costs microseconds


class Use(Enum):
    """What a byte that is not free is used for."""

    RESERVED = "reserved"
    COMMITTED = "committed"
    QUARANTINED = "quarantined"


class Pages(Protocol):
    """What lies under the pool; see `transport.lending.Lending`."""

    @property
    def unit_nbytes(self) -> int:
        """What is had anew as a whole; offsets of units are its multiples."""
        ...

    @property
    def num_settled(self) -> int:
        """Moves on when pages came free that stood in the way of extents."""
        ...

    def reclaim(self, offset: int, nbytes: int, is_free: Callable[[int, int], bool]) -> bool:
        """Makes an extent safe to write; False, and nothing changed, where it cannot be."""
        ...


class Pool:
    """The books of one arena; knows no memory."""

    def __init__(
        self,
        pool_id: int,
        capacity_nbytes: int,
        *,
        tenant: str,
        tier: str = "dram",
        alignment: int = 4096,
        pages: Pages | None = None,
    ) -> None:
        """All of it free; `pages` where somebody may still refer to what was freed."""
        self.id = pool_id
        self.tenant = tenant
        self.tier = tier
        self.capacity_nbytes = capacity_nbytes
        # Bytes of segments under a lease; kept by the node, which counts leases.
        self.leased_nbytes = 0
        # How often anything happened by which a reservation that did not fit may be answered now: bytes came free,
        # became evictable, were committed, or went into quarantine; see `num_chances`.
        self.num_gains = 0
        self._allocator = ExtentAllocator(capacity_nbytes, alignment)
        self._used = dict.fromkeys(Use, 0)
        self._pages = pages
        self._passed_over: list[tuple[int, int]] = []  # of the reservation under way

    @property
    def free_nbytes(self) -> int:
        """Bytes in holes."""
        return self._allocator.free_nbytes

    @property
    def largest_hole_nbytes(self) -> int:
        """The longest contiguous free range."""
        return self._allocator.largest_hole_nbytes

    @property
    def fragmentation_ratio(self) -> float:
        """1 - largest hole / free bytes."""
        return self._allocator.fragmentation_ratio

    def used_nbytes(self, use: Use) -> int:
        """Bytes in one use."""
        return self._used[use]

    def place(
        self, num_blocks: int, block_nbytes: int, *, near: int | None, max_extent_nbytes: int
    ) -> list[tuple[int, int]] | None:
        """Reserves room for a run of blocks.

        Args:
            num_blocks: how many.
            block_nbytes: bytes of each.
            near: end of the parent block, where the run would continue it.
            max_extent_nbytes: longest piece.

        Returns:
            (offset, number of blocks) of each piece in order, or None where there is no room; then nothing changed.
        """
        if num_blocks * block_nbytes > self.free_nbytes:
            return None
        try:
            pieces = self._place_pieces(num_blocks, block_nbytes, near, max_extent_nbytes)
        finally:
            for extent in self._passed_over:
                self._allocator.free(*extent)
            self._passed_over.clear()
        if pieces is not None:
            self._used[Use.RESERVED] += num_blocks * block_nbytes
        return pieces

    def _place_pieces(
        self, num_blocks: int, block_nbytes: int, near: int | None, max_extent_nbytes: int
    ) -> list[tuple[int, int]] | None:
        per_extent = max(1, max_extent_nbytes // block_nbytes)
        pieces: list[tuple[int, int]] = []
        left = num_blocks
        while left:
            piece = self._place_piece(min(left, per_extent), block_nbytes, near)
            if piece is None:
                for offset, count in pieces:
                    self._allocator.free(offset, count * block_nbytes)
                return None
            pieces.append(piece)
            left -= piece[1]
            near = piece[0] + piece[1] * block_nbytes
        return pieces

    def _place_piece(
        self, num_blocks: int, block_nbytes: int, near: int | None
    ) -> tuple[int, int] | None:
        if near is not None:
            behind = min(num_blocks, self._allocator.hole_at(near) // block_nbytes)
            if behind:
                offset = self._allocator.allocate(behind * block_nbytes, near=near)
                if offset is not None and self._may_write(offset, behind * block_nbytes):
                    return offset, behind
        while num_blocks:
            offset = self._allocate(num_blocks * block_nbytes)
            if offset is not None:
                return offset, num_blocks
            # Alignment may cost the largest hole a little; then the next smaller count is tried.
            num_blocks = min(num_blocks - 1, self.largest_hole_nbytes // block_nbytes)
        return None

    def _allocate(self, nbytes: int) -> int | None:
        """The best fit among what may be written; where that is long in coming, whole units of a larger hole."""
        while len(self._passed_over) < _MAX_PASSED_OVER:
            offset = self._allocator.allocate(nbytes)
            if offset is None or self._may_write(offset, nbytes):
                return offset
        # One more, unless that was in vain already: then the kernel keeps pages, and each look at them costs.
        return self._allocate_units(nbytes) if len(self._passed_over) == _MAX_PASSED_OVER else None

    def _allocate_units(self, nbytes: int) -> int | None:
        """Room from the beginning of a unit on, in a hole so large that nobody lives in the units of it."""
        assert self._pages is not None, "who passes over asks them"
        unit_nbytes = self._pages.unit_nbytes
        room_nbytes = nbytes + 2 * unit_nbytes
        offset = self._allocator.allocate(room_nbytes)
        if offset is None:
            return None
        start, end = -(-offset // unit_nbytes) * unit_nbytes, offset + room_nbytes
        if offset < start:
            self._allocator.free(offset, start - offset)
        self._allocator.free(start + nbytes, end - start - nbytes)
        return start if self._may_write(start, nbytes) else None

    def _may_write(self, offset: int, nbytes: int) -> bool:
        """Whether an extent that was just allocated may be; else what stands in the way of it is passed over."""
        if self._pages is None:
            return True
        shared: list[int] = []  # where somebody else's bytes are

        def is_free(other_offset: int, other_nbytes: int) -> bool:
            if self._is_free(other_offset, other_nbytes):
                return True
            shared.append(other_offset)
            return False

        if self._pages.reclaim(offset, nbytes, is_free):
            return True
        # Of one unit of pages at an end of the extent: the rest of it may be had.
        start, end = offset, offset + nbytes
        unit_nbytes = self._pages.unit_nbytes
        if shared and shared[0] < offset:
            end = min(end, (offset // unit_nbytes + 1) * unit_nbytes)
        elif shared:
            start = max(start, end // unit_nbytes * unit_nbytes)
        self._passed_over.append((start, end - start))
        if offset < start:
            self._allocator.free(offset, start - offset)
        if end < offset + nbytes:
            self._allocator.free(end, offset + nbytes - end)
        return False

    def _is_free(self, offset: int, nbytes: int) -> bool:
        """Whether all of it is in holes, or passed over for now."""
        end = offset + nbytes
        while offset < end:
            free_nbytes = self._allocator.hole_at(offset)
            for start, passed_nbytes in self._passed_over:
                if start <= offset < start + passed_nbytes:
                    free_nbytes = start + passed_nbytes - offset
            if not free_nbytes:
                return False
            offset += free_nbytes
        return True

    @property
    def num_chances(self) -> int:
        """While it stands still, what could not be placed still cannot be."""
        return self.num_gains + (0 if self._pages is None else self._pages.num_settled)

    def change(self, nbytes: int, was: Use, becomes: Use) -> None:
        """Bytes change their use."""
        assert self._used[was] >= nbytes, f"{nbytes} bytes were never {was.value}"
        self._used[was] -= nbytes
        self._used[becomes] += nbytes

    def free(self, offset: int, nbytes: int, was: Use) -> None:
        """Bytes come back."""
        assert self._used[was] >= nbytes, f"{nbytes} bytes were never {was.value}"
        self._used[was] -= nbytes
        self._allocator.free(offset, nbytes)
        self.num_gains += 1

    def check(self) -> None:
        """Asserts the sum; for tests."""
        self._allocator.check()
        assert self.free_nbytes + sum(self._used.values()) == self.capacity_nbytes
        assert 0 <= self.leased_nbytes <= self._used[Use.COMMITTED]
