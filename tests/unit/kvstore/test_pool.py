"""A pool's books, and where it places a run of blocks."""

from __future__ import annotations

import pytest

from snowskin.kvstore.pool import pool as pool_module
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


class LentPages:
    """Pages of which some units cannot be had anew while others live in them."""

    def __init__(self, unit_nbytes: int, lent: set[int], stuck: bool = False) -> None:
        self.unit_nbytes = unit_nbytes
        self.lent = lent  # units
        self.stuck = stuck
        self.num_settled = 0
        self.asked: list[tuple[int, int]] = []

    def reclaim(self, offset, nbytes, is_free) -> bool:
        self.asked.append((offset, nbytes))
        units = range(offset // self.unit_nbytes, -(-(offset + nbytes) // self.unit_nbytes))
        for unit in self.lent.intersection(units):
            start, end = unit * self.unit_nbytes, (unit + 1) * self.unit_nbytes
            if self.stuck or (start < offset and not is_free(start, offset - start)):
                return False
            if end > offset + nbytes and not is_free(offset + nbytes, end - offset - nbytes):
                return False
        self.lent.difference_update(units)
        return True


def lent_pool(unit_nbytes: int, lent: set[int], **options):
    pages = LentPages(unit_nbytes, lent, **options)
    return Pool(0, 64 * KIB, tenant="t", alignment=4 * KIB, pages=pages), pages


def test_a_loan_that_was_settled_is_a_chance_for_who_found_no_room():
    pool, pages = lent_pool(16 * KIB, set())
    before = pool.num_chances
    assert pool.num_chances == before
    pages.num_settled += 1
    assert pool.num_chances > before
    before = pool.num_chances
    place(pool, 1, 4 * KIB)
    pool.free(0, 4 * KIB, Use.RESERVED)
    assert pool.num_chances > before


def test_pages_are_had_anew_before_a_run_lies_on_them():
    pool, pages = lent_pool(16 * KIB, {0, 1, 3})
    assert place(pool, 6, 4 * KIB) == [(0, 6)]
    assert pages.asked == [(0, 24 * KIB)]
    assert pages.lent == {3}


def test_room_whose_pages_a_living_block_shares_is_passed_over_and_stays_free():
    pool, pages = lent_pool(16 * KIB, set())
    place(pool, 1, 4 * KIB)
    pages.lent = {0}  # a reader left with the first block, and it still lives
    assert place(pool, 3, 4 * KIB) == [(16 * KIB, 3)]
    assert place(pool, 1, 4 * KIB, near=4 * KIB) == [(28 * KIB, 1)]
    assert pool.free_nbytes == 44 * KIB
    pages.lent.clear()
    assert place(pool, 3, 4 * KIB) == [(4 * KIB, 3)]  # the smallest hole that takes them


def test_only_the_unit_with_a_living_block_is_passed_over_at_either_end():
    pool, pages = lent_pool(16 * KIB, set())
    place(pool, 16, 4 * KIB)
    pool.free(4 * KIB, 56 * KIB, Use.RESERVED)  # the first and the last block live
    pages.lent = {0, 3}
    assert place(pool, 8, 4 * KIB) == [(16 * KIB, 8)]
    assert pages.lent == {0, 3}
    assert place(pool, 1, 4 * KIB) is None
    assert pool.free_nbytes == 24 * KIB


def test_room_before_a_unit_with_a_living_block_is_had():
    pool, pages = lent_pool(16 * KIB, set())
    place(pool, 16, 4 * KIB)
    pool.free(0, 28 * KIB, Use.RESERVED)
    pool.free(48 * KIB, 12 * KIB, Use.RESERVED)
    pages.lent, pages.asked = {1}, []
    assert place(pool, 7, 4 * KIB) == [(0, 4), (48 * KIB, 3)]
    assert pages.asked[0] == (0, 28 * KIB)
    assert pool.free_nbytes == 12 * KIB


def test_nothing_fits_where_no_page_can_be_had_anew():
    pool, pages = lent_pool(16 * KIB, {0, 1, 2, 3}, stuck=True)
    assert place(pool, 2, 4 * KIB) is None
    assert (pool.free_nbytes, pool.num_gains) == (64 * KIB, 0)
    pages.stuck = False
    assert place(pool, 16, 4 * KIB) == [(0, 16)]


def test_room_is_not_looked_for_without_end(monkeypatch):
    monkeypatch.setattr(pool_module, "_MAX_PASSED_OVER", 3)
    pool, pages = lent_pool(16 * KIB, {0, 1, 2, 3})
    pages.lent = set()
    place(pool, 16, 4 * KIB)
    for unit in range(4):
        pool.free(unit * 16 * KIB + 4 * KIB, 4 * KIB, Use.RESERVED)
    pages.lent, pages.asked = {0, 1, 2, 3}, []
    assert place(pool, 1, 4 * KIB) is None
    assert len(pages.asked) == 3
    assert pool.free_nbytes == 16 * KIB


def test_many_holes_that_cannot_be_had_do_not_hide_a_large_one_that_can(monkeypatch):
    monkeypatch.setattr(pool_module, "_MAX_PASSED_OVER", 3)
    pages = LentPages(16 * KIB, set())
    pool = Pool(0, 256 * KIB, tenant="t", alignment=4 * KIB, pages=pages)
    place(pool, 40, 4 * KIB)  # ten units; six are free behind them
    for unit in range(10):
        pool.free(unit * 16 * KIB + 4 * KIB, 4 * KIB, Use.RESERVED)
    pages.lent = set(range(11))
    assert place(pool, 1, 4 * KIB) == [(160 * KIB, 1)]
    assert pages.lent == set(range(10))
    assert place(pool, 15, 4 * KIB) == [(164 * KIB, 15)]
    assert pool.free_nbytes == 72 * KIB
    pool.check()


def test_room_passed_over_counts_as_free_for_its_neighbour():
    class StuckOnce(LentPages):
        def reclaim(self, offset, nbytes, is_free) -> bool:
            self.stuck = not self.asked
            return super().reclaim(offset, nbytes, is_free)

    pages = StuckOnce(16 * KIB, {0})
    pool = Pool(0, 64 * KIB, tenant="t", alignment=4 * KIB, pages=pages)
    assert place(pool, 1, 4 * KIB) == [(4 * KIB, 1)]
    assert pool.free_nbytes == 60 * KIB
    assert pages.asked == [(0, 4 * KIB), (4 * KIB, 4 * KIB)]
