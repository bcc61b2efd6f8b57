"""The index: keys mean something only within their scope, and no prefix is assumed to be whole."""

from __future__ import annotations

import pytest

from snowskin.kvstore.index.block_index import (
    BlockEntry,
    BlockIndex,
    PlacedSegment,
    Scope,
    longest_run,
    present_bitmap,
)
from tests.support.node_driver import BLOCK, NAMESPACE, OTHER_NAMESPACE, column, key

SEGMENT = PlacedSegment(0, 0, BLOCK, 8, 1)


def insert(index: BlockIndex, scope: Scope, name: str) -> BlockEntry:
    entry = BlockEntry((scope.number, key(name)), key(name), SEGMENT, 0, b"sum-")
    index.insert(scope, entry)
    return entry


def test_scope_is_tenant_and_namespace():
    index = BlockIndex()
    ours = index.open_scope("us", NAMESPACE, BLOCK)
    insert(index, ours, "a")
    for tenant, namespace in (("them", NAMESPACE), ("us", OTHER_NAMESPACE)):
        assert index.scope(tenant, namespace) is None
        assert key("a") not in index.open_scope(tenant, namespace, BLOCK).blocks
    assert index.open_scope("us", NAMESPACE, BLOCK) is ours
    assert len(index) == 1


def test_entry_is_found_by_its_id_until_it_is_removed():
    index = BlockIndex()
    entry = insert(index, index.open_scope("us", NAMESPACE, BLOCK), "a")
    assert index.entry(entry.id) is entry
    assert list(index) == [entry]
    index.remove(entry)
    assert (index.entry(entry.id), len(index)) == (None, 0)


def test_scope_goes_with_its_last_block_and_writer():
    index = BlockIndex()
    scope = index.open_scope("us", NAMESPACE, BLOCK)
    entry = insert(index, scope, "a")
    index.leave_scope(scope)
    assert index.scope("us", NAMESPACE) is scope
    index.remove(entry)
    assert (index.scope("us", NAMESPACE), index.entry(entry.id)) == (None, None)
    again = index.open_scope("us", NAMESPACE, 2 * BLOCK)
    assert (again.block_nbytes, again.number == scope.number) == (2 * BLOCK, False)


def test_block_is_not_inserted_twice():
    index = BlockIndex()
    scope = index.open_scope("us", NAMESPACE, BLOCK)
    insert(index, scope, "a")
    with pytest.raises(AssertionError):
        insert(index, scope, "a")


@pytest.mark.parametrize(
    ("names", "limit", "num_found"),
    [("a b c d", 4, 2), ("a b c d", 1, 1), ("b", 1, 1), ("d e", 2, 2), ("c d", 2, 0), ("", 0, 0)],
)
def test_run_ends_at_the_first_block_that_is_missing(names, limit, num_found):
    index = BlockIndex()
    scope = index.open_scope("us", NAMESPACE, BLOCK)
    entries = {name: insert(index, scope, name) for name in "abde"}
    run = longest_run(scope.blocks, column(names), limit)
    assert run == [entries[name] for name in names.split()[:num_found]]


def test_bitmap_has_a_bit_where_every_scope_has_the_block():
    index = BlockIndex()
    one = index.open_scope("us", NAMESPACE, BLOCK)
    two = index.open_scope("us", OTHER_NAMESPACE, BLOCK)
    names = "a b c d e f g h i"
    for name in "abi":
        insert(index, one, name)
    for name in "bci":
        insert(index, two, name)
    assert present_bitmap([one], column(names)) == bytes([0b00000011, 1])
    assert present_bitmap([one, two], column(names)) == bytes([0b00000010, 1])
    assert present_bitmap([one, None], column(names)) == bytes(2)
    assert present_bitmap([one], column("")) == b""


def test_keys_of_another_width_are_other_keys():
    index = BlockIndex()
    scope = index.open_scope("us", NAMESPACE, BLOCK)
    insert(index, scope, "a")
    narrow = type(column("a"))(packed=key("a"), width=16)
    assert longest_run(scope.blocks, narrow, 2) == []
