"""Single rules of the extent allocator, readable one by one."""

from __future__ import annotations

import pytest

from snowskin.kvstore.pool.allocator import AllocatorCorrupted, ExtentAllocator

KIB = 1024


def test_extent_continues_exactly_at_its_parents_unaligned_end() -> None:
    allocator = ExtentAllocator(64 * KIB)
    assert allocator.allocate(5000) == 0
    assert allocator.allocate(100, near=5000) == 5000
    assert allocator.allocate(100) == 8192


def test_smallest_hole_that_fits_is_taken_first() -> None:
    allocator = ExtentAllocator(64 * KIB)
    assert allocator.allocate(64 * KIB) == 0
    allocator.free(0, 16 * KIB)
    allocator.free(32 * KIB, 8 * KIB)
    assert allocator.allocate(8 * KIB) == 32 * KIB
    assert allocator.allocate(8 * KIB) == 0


def test_full_pool_answers_none() -> None:
    allocator = ExtentAllocator(8 * KIB)
    assert allocator.allocate(8 * KIB) == 0
    assert allocator.allocate(1) is None
    assert allocator.allocate(1, near=0) is None
    assert allocator.fragmentation_ratio == 0


def test_blocks_of_a_segment_are_freed_one_by_one_and_merge() -> None:
    allocator = ExtentAllocator(64 * KIB)
    assert allocator.allocate(12 * KIB) == 0
    for block_index in (2, 0, 1):
        allocator.free(block_index * 4 * KIB, 4 * KIB)
    assert (allocator.num_holes, allocator.free_nbytes) == (1, 64 * KIB)


def test_near_inside_a_hole_gives_no_fragment() -> None:
    allocator = ExtentAllocator(64 * KIB)
    assert allocator.allocate(4 * KIB, near=20 * KIB) == 0


def test_fragmentation_is_the_share_that_one_extent_cannot_have() -> None:
    allocator = ExtentAllocator(64 * KIB)
    assert allocator.allocate(64 * KIB) == 0
    allocator.free(0, 12 * KIB)
    allocator.free(32 * KIB, 4 * KIB)
    assert allocator.fragmentation_ratio == pytest.approx(0.25)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 4096), (4096, 8192), (-1, 2), (60000, 9999)])
def test_freeing_what_is_not_allocated_is_refused(offset: int, nbytes: int) -> None:
    allocator = ExtentAllocator(64 * KIB)
    allocator.allocate(8 * KIB)
    allocator.free(0, 4 * KIB)
    with pytest.raises(AllocatorCorrupted):
        allocator.free(offset, nbytes)
    allocator.check()


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        ExtentAllocator(0)
    with pytest.raises(ValueError, match="cannot be allocated"):
        ExtentAllocator(10).allocate(0)
