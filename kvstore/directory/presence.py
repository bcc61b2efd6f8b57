"""What of one sequence is where: a bitmap for each node, and the pulls that bring the longest prefix.

Rules kept here: frozen arithmetic, in the order of the sequence; an instance's own node is asked first wherever it has
the next block; of the others the one whose run goes on longest, so that a prefix costs few pulls. What is said here is
a hint: only a Match knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

MAX_PULLS = 16  # of one sequence: what is scattered more than this is cheaper computed than fetched


def num_leading_ones(bitmap: int) -> int:
    """How many of its lowest bits are set without a gap."""
    return (~bitmap & (bitmap + 1)).bit_length() - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPull:
    """Blocks `first_block .. + num_blocks` of a sequence, from one node."""

    address: str
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """Which blocks of one sequence the nodes hold.

    Attributes:
        bitmaps: node address -> bit i is set where it holds block i; no entry where it holds none.
    """

    bitmaps: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_runs(cls, num_blocks: Mapping[str, int]) -> Presence:
        """Each node holds so many blocks from the first on, and nothing behind."""
        return cls(bitmaps={a: (1 << count) - 1 for a, count in num_blocks.items() if count > 0})

    def run(self, address: str) -> int:
        """Blocks from the first on that this node holds without a gap."""
        return num_leading_ones(self.bitmaps.get(address, 0))

    @property
    def num_blocks(self) -> int:
        """Blocks from the first on that are on some node without a gap."""
        union = 0
        for bitmap in self.bitmaps.values():
            union |= bitmap
        return num_leading_ones(union)

    def only(self, addresses: Collection[str]) -> Presence:
        """The same, of these nodes alone."""
        return Presence(bitmaps={a: b for a, b in self.bitmaps.items() if a in addresses})

    def joined(self, other: Presence) -> Presence:
        """What either says."""
        bitmaps = dict(self.bitmaps)
        for address, bitmap in other.bitmaps.items():
            bitmaps[address] = bitmaps.get(address, 0) | bitmap
        return Presence(bitmaps=bitmaps)

    def holders(self, num_blocks: int) -> list[str]:
        """Nodes that hold any of the first `num_blocks` blocks, who holds most of them first."""
        wanted = (1 << num_blocks) - 1
        held = {a: (bitmap & wanted).bit_count() for a, bitmap in self.bitmaps.items()}
        return sorted((a for a, count in held.items() if count), key=lambda a: (-held[a], a))

    def pulls(self, *, own: str, limit: int) -> list[PlannedPull]:
        """What to pull from whom, in order, for the longest prefix of at most `limit` blocks.

        Args:
            own: the node of the instance that pulls.
            limit: blocks that are wanted.
        """
        pulls: list[PlannedPull] = []
        first = 0
        while first < limit and len(pulls) < MAX_PULLS:
            address, count = own, num_leading_ones(self.bitmaps.get(own, 0) >> first)
            if not count:
                for other in sorted(self.bitmaps):
                    run = num_leading_ones(self.bitmaps[other] >> first)
                    if run > count:
                        address, count = other, run
            if not count:
                break
            count = min(count, limit - first)
            pulls.append(PlannedPull(address=address, first_block=first, num_blocks=count))
            first += count
        return pulls
