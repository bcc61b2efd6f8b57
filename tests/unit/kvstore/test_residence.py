"""Residence: bytes are freed only when no lease covers their segment."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from snowskin.kvstore.eviction.lru import LruEviction
from snowskin.kvstore.node.residence import Residence
from snowskin.kvstore.pool.pool import Pool, Use
from tests.support.node_driver import BLOCK, NAMESPACE, key

if TYPE_CHECKING:
    from snowskin.kvstore.index.block_index import BlockEntry, PlacedSegment

NUM_BLOCKS = 6


@pytest.fixture
def residence() -> Residence:
    pool = Pool(0, NUM_BLOCKS * BLOCK, tenant="t")
    return Residence([pool], LruEviction(), node_id="n", max_extent_nbytes=1 << 20)


def commit(residence: Residence, names: str, *, one_reader: bool = False) -> list[BlockEntry]:
    """Commits a chain of new blocks in one segment."""
    scope = residence.index.open_scope("t", NAMESPACE, BLOCK)
    segments = residence.reserve("t", len(names), BLOCK, near=None)
    assert segments is not None
    (segment,) = segments
    entries = []
    for position, name in enumerate(names):
        entry = residence.commit(
            scope,
            key(name),
            segment,
            segment.offset + position * BLOCK,
            b"sum-",
            parent_key=key(names[position - 1]) if position else b"",
            one_reader=one_reader,
        )
        assert entry is not None
        entries.append(entry)
    return entries


def check(residence: Residence, *leased: PlacedSegment) -> None:
    residence.check(Counter(leased), [])


def free_blocks(residence: Residence) -> float:
    return residence.pool_of("t").free_nbytes / BLOCK


def test_removed_block_is_free_at_once_without_a_lease(residence):
    first, second = commit(residence, "ab")
    residence.remove(first)
    assert (free_blocks(residence), residence.is_here(first)) == (5, False)
    assert residence.is_here(second)
    check(residence)


def test_removed_block_is_free_with_the_last_lease_over_its_segment(residence):
    first, second = commit(residence, "ab")
    segment = first.segment
    residence.lease([segment])
    residence.lease([segment])
    residence.remove(first)
    check(residence, segment, segment)
    residence.unlease([segment])
    assert free_blocks(residence) == 4
    check(residence, segment)
    residence.unlease([segment])
    assert free_blocks(residence) == 5
    assert residence.is_here(second)
    check(residence)


def test_block_committed_into_a_leased_segment_counts_as_leased(residence):
    scope = residence.index.open_scope("t", NAMESPACE, BLOCK)
    (segment,) = residence.reserve("t", 1, BLOCK, near=None)
    residence.lease([segment])
    residence.commit(
        scope, key("a"), segment, segment.offset, b"sum-", parent_key=b"", one_reader=False
    )
    assert residence.pool_of("t").leased_nbytes == BLOCK
    check(residence, segment)
    residence.unlease([segment])
    assert residence.pool_of("t").leased_nbytes == 0


def test_second_block_of_a_key_is_free_at_once(residence):
    scope = residence.index.open_scope("t", NAMESPACE, BLOCK)
    (entry,) = commit(residence, "a")
    (segment,) = residence.reserve("t", 1, BLOCK, near=entry)
    second = residence.commit(
        scope, key("a"), segment, segment.offset, b"sum-", parent_key=b"", one_reader=False
    )
    assert second is None
    assert residence.index.entry(entry.id) is entry
    assert free_blocks(residence) == 5
    check(residence)


def test_room_is_made_leaf_first_and_only_as_much_as_is_wanted(residence):
    entries = commit(residence, "abcdef")
    assert residence.reserve("t", 2, BLOCK, near=None) is not None
    assert [residence.is_here(entry) for entry in entries] == [True] * 4 + [False] * 2


def test_room_that_cannot_be_made_costs_nothing(residence):
    prefix = commit(residence, "ab")
    (leased,) = commit(residence, "c")
    others = commit(residence, "xyz")
    residence.lease([leased.segment])
    assert residence.reserve("t", 6, BLOCK, near=None) is None
    assert all(residence.is_here(entry) for entry in [*prefix, leased, *others])
    check(residence, leased.segment)


def test_where_evicting_makes_no_room_it_is_not_looked_for_after_every_block():
    class AllOrNothing:
        """Pages that are had anew only where nobody lives at all; all of them once they were asked for."""

        unit_nbytes = 900 * BLOCK
        num_refused = num_settled = 0
        is_lent = False

        def reclaim(self, offset, nbytes, is_free) -> bool:
            behind = offset + nbytes
            others = [(0, offset), (behind, self.unit_nbytes - behind)]
            if self.is_lent and not all(is_free(*other) for other in others if other[1]):
                self.num_refused += 1
                return False
            self.is_lent = False
            return True

    pages = AllOrNothing()
    pool = Pool(0, 900 * BLOCK, tenant="t", pages=pages)
    residence = Residence([pool], LruEviction(), node_id="n", max_extent_nbytes=BLOCK)
    scope = residence.index.open_scope("t", NAMESPACE, BLOCK)
    for number in range(900):
        reserved = residence.reserve("t", 1, BLOCK, near=None)
        assert reserved is not None
        (segment,) = reserved
        name = number.to_bytes(16, "big")
        residence.commit(
            scope, name, segment, segment.offset, b"", parent_key=b"", one_reader=False
        )
    pages.is_lent = True
    assert residence.reserve("t", 1, BLOCK, near=None) is not None
    assert pages.num_refused < 4000  # some thirty each time; after every block it would be 28,000
    assert free_blocks(residence) == 899
    assert residence.counters["blocks_evicted"] == 900


def test_touched_run_leaves_last(residence):
    first = commit(residence, "abc")
    second = commit(residence, "xyz")
    residence.touch(first)
    residence.reserve("t", 3, BLOCK, near=None)
    assert [residence.is_here(entry) for entry in (first[0], second[0])] == [True, False]


def test_blocks_for_one_reader_are_never_evicted(residence):
    private = commit(residence, "abc", one_reader=True)
    residence.touch(private)
    shared = commit(residence, "xyz")
    assert residence.reserve("t", 4, BLOCK, near=None) is None
    assert residence.reserve("t", 3, BLOCK, near=None) is not None
    assert all(residence.is_here(entry) for entry in private)
    assert not any(residence.is_here(entry) for entry in shared)


def test_quarantined_bytes_are_neither_reserved_nor_free(residence):
    (segment,) = residence.reserve("t", 2, BLOCK, near=None)
    residence.quarantine(segment, 2)
    pool = residence.pool_of("t")
    assert [pool.used_nbytes(use) // BLOCK for use in Use] == [0, 0, 2]
    for position in range(2):
        residence.give_back(segment, segment.offset + position * BLOCK, Use.QUARANTINED)
    assert free_blocks(residence) == NUM_BLOCKS


def test_extent_tells_where_and_of_which_generation(residence):
    commit(residence, "a")
    (segment,) = residence.reserve("t", 3, BLOCK, near=None)
    extent = residence.extent(segment, segment.offset + BLOCK, 2)
    assert (extent.node_id, extent.tier, extent.pool_id) == ("n", "dram", 0)
    assert (extent.offset, extent.nbytes, extent.generation) == (2 * BLOCK, 2 * BLOCK, 2)


def test_releasing_more_often_than_leasing_is_a_bug(residence):
    (entry,) = commit(residence, "a")
    with pytest.raises(AssertionError, match="more often"):
        residence.unlease([entry.segment])


@pytest.mark.parametrize("spoil", ["leases", "bytes", "eviction"])
def test_check_finds_books_that_disagree(residence, spoil):
    first, _ = commit(residence, "ab")
    check(residence)
    if spoil == "leases":
        first.segment.num_leases += 1
    elif spoil == "bytes":
        residence.index.remove(first)
    else:
        first.one_reader = True
    with pytest.raises(AssertionError):
        check(residence)
