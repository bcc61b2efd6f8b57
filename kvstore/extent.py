"""Where bytes lie: extents.

Rules kept here: an extent is one contiguous range, and blocks in it lie block-major, so a run of them is again one
range; a place is told with its generation, so that who reads late can tell that the bytes were given anew.
"""

from __future__ import annotations

from snowskin.kvstore.value import value

TIERS = ("hbm", "dram", "nvme")  # fastest first


@value()
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
