"""A pool's books, and where it places a run of blocks."""

from __future__ import annotations

import pytest

from snowskin.kvstore.pool.pool import Pool, Use

KIB = 1024
ALL = 1 << 30


@pytest.fixture
def pool() -> Pool:
    return Pool(0, 64 * KIB, tenant="t", alignment=4 * KIB)


def place(
    pool: Pool, num_blocks: int, block_nbytes: int, near: int | None = None, limit: int = ALL
):
    pieces = pool.place(num_blocks, block_nbytes, near=near, max_extent_nbytes=limit)
    pool.check()
    return pieces


def test_run_lies_in_one_piece_where_there_is_room(pool):
    assert place(pool, 4, 3 * KIB) == [(0, 4)]
    assert (pool.used_nbytes(Use.RESERVED), pool.free_nbytes) == (12 * KIB, 52 * KIB)


def test_run_continues_its_parent(pool):
    place(pool, 1, 3 * KIB)
    assert place(pool, 2, 3 * KIB, near=3 * KIB) == [(3 * KIB, 2)]


def test_run_that_only_begins_behind_its_parent_goes_on_elsewhere(pool):
    place(pool, 2, 4 * KIB)
    place(pool, 1, 4 * KIB)
    pool.free(4 * KIB, 4 * KIB, Use.RESERVED)
    assert place(pool, 3, 4 * KIB, near=4 * KIB) == [(4 * KIB, 1), (12 * KIB, 2)]


def test_no_piece_is_longer_than_an_extent_may_be(pool):
    pieces = place(pool, 5, 4 * KIB, limit=9 * KIB)
    assert [count for _, count in pieces] == [2, 2, 1]


def test_pieces_of_a_run_follow_one_another_without_a_gap(pool):
    assert place(pool, 5, 3 * KIB, limit=7 * KIB) == [(0, 2), (6 * KIB, 2), (12 * KIB, 1)]


def test_block_longer_than_an_extent_is_a_piece_of_its_own(pool):
    # The node refuses such blocks; the pool does not loop over them.
    assert place(pool, 2, 8 * KIB, limit=4 * KIB) == [(0, 1), (8 * KIB, 1)]


def test_run_is_cut_into_the_largest_holes_left(pool):
    place(pool, 16, 4 * KIB)
    pool.free(0, 8 * KIB, Use.RESERVED)
    pool.free(16 * KIB, 12 * KIB, Use.RESERVED)
    pool.free(40 * KIB, 4 * KIB, Use.RESERVED)
    assert place(pool, 6, 4 * KIB) == [(16 * KIB, 3), (0, 2), (40 * KIB, 1)]
    assert pool.free_nbytes == 0


def test_what_does_not_fit_changes_nothing(pool):
    place(pool, 16, 4 * KIB)
    pool.free(0, 4 * KIB, Use.RESERVED)
    pool.free(8 * KIB, 4 * KIB, Use.RESERVED)
    assert place(pool, 3, 4 * KIB) is None
    assert place(pool, 1, 8 * KIB) is None  # enough bytes, no hole
    assert (pool.free_nbytes, pool.largest_hole_nbytes) == (8 * KIB, 4 * KIB)
    assert pool.fragmentation_ratio == 0.5


def test_bytes_change_their_use_and_come_back(pool):
    place(pool, 4, 4 * KIB)
    pool.change(12 * KIB, Use.RESERVED, Use.COMMITTED)
    pool.change(4 * KIB, Use.RESERVED, Use.QUARANTINED)
    assert [pool.used_nbytes(use) for use in Use] == [0, 12 * KIB, 4 * KIB]
    pool.free(12 * KIB, 4 * KIB, Use.QUARANTINED)
    pool.free(0, 12 * KIB, Use.COMMITTED)
    pool.check()
    assert pool.free_nbytes == pool.capacity_nbytes


def test_bytes_do_not_leave_a_use_that_they_are_not_in(pool):
    place(pool, 1, 4 * KIB)
    with pytest.raises(AssertionError, match="never committed"):
        pool.free(0, 4 * KIB, Use.COMMITTED)
    with pytest.raises(AssertionError, match="never quarantined"):
        pool.change(4 * KIB, Use.QUARANTINED, Use.COMMITTED)


def test_check_finds_a_miscount(pool):
    place(pool, 1, 4 * KIB)
    pool.leased_nbytes = 1
    with pytest.raises(AssertionError):
        pool.check()
