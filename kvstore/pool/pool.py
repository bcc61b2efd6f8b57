"""One pool's books: every byte is free, reserved, committed or quarantined, and counted as just one of them.

Rules kept here: free + reserved + committed + quarantined = capacity, always. A reservation gets few large pieces:
first the room right behind its parent, then the smallest hole that takes all the rest, then the largest holes.
"""

from __future__ import annotations

from enum import Enum

from snowskin.kvstore.pool.allocator import ExtentAllocator


class Use(Enum):
    """What a byte that is not free is used for."""

    RESERVED = "reserved"
    COMMITTED = "committed"
    QUARANTINED = "quarantined"


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
    ) -> None:
        """All of it free."""
        self.id = pool_id
        self.tenant = tenant
        self.tier = tier
        self.capacity_nbytes = capacity_nbytes
        # Bytes of segments under a lease; kept by the node, which counts leases.
        self.leased_nbytes = 0
        # How often anything happened by which a reservation that did not fit may be answered now: bytes came free,
        # became evictable, were committed, or went into quarantine. While it stands still, trying again is in vain.
        self.num_gains = 0
        self._allocator = ExtentAllocator(capacity_nbytes, alignment)
        self._used = dict.fromkeys(Use, 0)

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
        self._used[Use.RESERVED] += num_blocks * block_nbytes
        return pieces

    def _place_piece(
        self, num_blocks: int, block_nbytes: int, near: int | None
    ) -> tuple[int, int] | None:
        if near is not None:
            behind = min(num_blocks, self._allocator.hole_at(near) // block_nbytes)
            if behind:
                offset = self._allocator.allocate(behind * block_nbytes, near=near)
                if offset is not None:
                    return offset, behind
        while num_blocks:
            offset = self._allocator.allocate(num_blocks * block_nbytes)
            if offset is not None:
                return offset, num_blocks
            # Alignment may cost the largest hole a little; then the next smaller count is tried.
            num_blocks = min(num_blocks - 1, self.largest_hole_nbytes // block_nbytes)
        return None

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
