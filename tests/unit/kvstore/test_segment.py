"""Extents and segments: parts lie where blocks lie, and nothing lies outside."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snowskin.kvstore.errors import BadRequest
from snowskin.kvstore.segment import Extent, Segment

EXTENT = Extent(node_id="n", tier="dram", pool_id=0, offset=4096, nbytes=400, generation=7)
SEGMENT = Segment(extent=EXTENT, first_block_index=3, num_blocks=4, block_nbytes=100)


def test_run_of_a_segment_is_one_range() -> None:
    assert SEGMENT.run(4, 2) == replace(EXTENT, offset=4196, nbytes=200)
    assert SEGMENT.block_extent(6).end == EXTENT.end
    assert SEGMENT.end_block_index == 7


@pytest.mark.parametrize(("block_index", "num_blocks"), [(2, 1), (7, 1), (6, 2), (3, 0)])
def test_blocks_outside_the_segment_are_refused(block_index: int, num_blocks: int) -> None:
    with pytest.raises(BadRequest):
        SEGMENT.run(block_index, num_blocks)


def test_segment_fills_its_extent_exactly() -> None:
    with pytest.raises(BadRequest, match="do not fill"):
        replace(SEGMENT, num_blocks=3)
    with pytest.raises(BadRequest, match="segment of 0 blocks"):
        replace(SEGMENT, num_blocks=0)


def test_extent_that_cannot_be_is_refused() -> None:
    with pytest.raises(BadRequest, match="tier"):
        replace(EXTENT, tier="L1")
    with pytest.raises(BadRequest, match="-1"):
        replace(EXTENT, offset=-1)
