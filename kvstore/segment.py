"""Where bytes lie: extents, and the segments of consecutive blocks that they hold.

Rules kept here: a segment is contiguous and block-major, so a run of its blocks is again one range;
a place is told with its generation, so that who reads late can tell that the bytes were given anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from snowskin.kvstore.errors import BadRequest

TIERS = ("hbm", "dram", "nvme")  # fastest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """One contiguous byte range of one pool.

    Attributes:
        node_id: whose pool.
        tier: `hbm`, `dram` or `nvme`.
        pool_id: the pool on that node.
        offset: bytes from the pool's start.
        nbytes: its length, at least 1.
        generation: rises each time a range is handed to a new writer.
    """

    node_id: str
    tier: str
    pool_id: int
    offset: int
    nbytes: int
    generation: int

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise BadRequest(f"there is no tier {self.tier!r}", hint=f"tiers: {', '.join(TIERS)}")
        if self.offset < 0 or self.nbytes < 1 or self.pool_id < 0 or self.generation < 0:
            raise BadRequest(
                f"extent of {self.nbytes} bytes at {self.offset} of pool {self.pool_id}, "
                f"generation {self.generation}"
            )

    @property
    def end(self) -> int:
        """First offset behind it."""
        return self.offset + self.nbytes

    def part(self, start: int, nbytes: int) -> Extent:
        """The range of `nbytes` from `start` within this extent."""
        if start < 0 or nbytes < 1 or start + nbytes > self.nbytes:
            raise BadRequest(f"[{start}, {start + nbytes}) of an extent of {self.nbytes} bytes")
        return Extent(
            node_id=self.node_id,
            tier=self.tier,
            pool_id=self.pool_id,
            offset=self.offset + start,
            nbytes=nbytes,
            generation=self.generation,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive blocks of one sequence, lying side by side in one extent.

    Attributes:
        extent: where; exactly `num_blocks` blocks long.
        first_block_index: of its first block, in the sequence or key column spoken of.
        num_blocks: how many, at least 1.
        block_nbytes: bytes of each.
    """

    extent: Extent
    first_block_index: int
    num_blocks: int
    block_nbytes: int

    def __post_init__(self) -> None:
        if self.first_block_index < 0 or self.num_blocks < 1 or self.block_nbytes < 1:
            raise BadRequest(
                f"segment of {self.num_blocks} blocks of {self.block_nbytes} bytes "
                f"from block {self.first_block_index} on"
            )
        if self.num_blocks * self.block_nbytes != self.extent.nbytes:
            raise BadRequest(
                f"{self.num_blocks} blocks of {self.block_nbytes} bytes do not fill an extent of "
                f"{self.extent.nbytes} bytes"
            )

    @property
    def end_block_index(self) -> int:
        """Index behind its last block."""
        return self.first_block_index + self.num_blocks

    def block_extent(self, block_index: int) -> Extent:
        """Where the block of this index lies."""
        return self.run(block_index, 1)

    def run(self, block_index: int, num_blocks: int) -> Extent:
        """Where `num_blocks` blocks from `block_index` on lie."""
        start = (block_index - self.first_block_index) * self.block_nbytes
        return self.extent.part(start, num_blocks * self.block_nbytes)
