"""Where committed blocks lie.

Rules kept here: a key means something only within its scope (tenant and namespace), and the scope is applied before
anything is looked up. A node may hold a block whose parent it does not hold: nothing here assumes that a prefix is
closed, so a longest run is found by walking it. A block's bytes belong to a segment, which is placed in one piece;
leases count on the segment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snowskin.kvstore.blocks import KeyColumn

BlockId = tuple[int, bytes]
"""Scope number and key: names a block within a node, for the eviction policy."""


@dataclass(slots=True, eq=False)
class PlacedSegment:
    """Consecutive blocks of one reservation in one contiguous range of one pool.

    `num_leases` counts the leases (read, or write naming it as a parent) over any of its blocks: while it is not 0,
    no byte of the segment is freed. `doomed` are ranges to free when it becomes 0.
    """

    pool_id: int
    offset: int
    block_nbytes: int
    num_blocks: int
    generation: int
    num_leases: int = 0
    num_committed: int = 0
    doomed: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class BlockEntry:
    """One committed block. `checksum` is the record that its writer made over scope, key and bytes."""

    id: BlockId
    key: bytes
    segment: PlacedSegment
    offset: int
    checksum: bytes
    parent_id: BlockId | None = None
    one_reader: bool = False
    is_taken: bool = False


@dataclass(slots=True, eq=False)
class Scope:
    """The blocks of one tenant in one namespace; all of one size."""

    number: int
    tenant: str
    namespace: bytes
    block_nbytes: int
    blocks: dict[bytes, BlockEntry] = field(default_factory=dict)


class BlockIndex:
    """Block key to extent, by scope."""

    def __init__(self) -> None:
        """Empty."""
        self._scopes: dict[tuple[str, bytes], Scope] = {}
        self._by_number: dict[int, Scope] = {}

    def __len__(self) -> int:
        """Committed blocks."""
        return sum(len(scope.blocks) for scope in self._scopes.values())

    def __iter__(self) -> Iterator[BlockEntry]:
        """All entries, in no order."""
        for scope in self._scopes.values():
            yield from scope.blocks.values()

    def scope(self, tenant: str, namespace: bytes) -> Scope | None:
        """The scope, where anything was ever reserved in it."""
        return self._scopes.get((tenant, namespace))

    def open_scope(self, tenant: str, namespace: bytes, block_nbytes: int) -> Scope:
        """The scope, made on first use."""
        scope = self._scopes.get((tenant, namespace))
        if scope is None:
            scope = Scope(len(self._scopes), tenant, namespace, block_nbytes)
            self._scopes[tenant, namespace] = scope
            self._by_number[scope.number] = scope
        return scope

    def entry(self, block_id: BlockId) -> BlockEntry | None:
        """The entry that the eviction policy speaks of."""
        return self._by_number[block_id[0]].blocks.get(block_id[1])

    def insert(self, scope: Scope, entry: BlockEntry) -> None:
        """Makes a block visible; its key must not be there."""
        assert entry.key not in scope.blocks, "a committed block was committed again"
        scope.blocks[entry.key] = entry

    def remove(self, entry: BlockEntry) -> None:
        """Makes a block invisible."""
        del self._by_number[entry.id[0]].blocks[entry.key]


def longest_run(blocks: dict[bytes, BlockEntry], keys: KeyColumn, limit: int) -> list[BlockEntry]:
    """Entries of the first keys up to the first that is missing, at most `limit`."""
    run = []
    get, packed, width = blocks.get, keys.packed, keys.width
    for start in range(0, limit * width, width):
        entry = get(packed[start : start + width])
        if entry is None:
            break
        run.append(entry)
    return run


def present_bitmap(scopes: list[Scope | None], keys: KeyColumn) -> bytes:
    """Bit i, least significant first, is set where block i is committed in every scope."""
    bitmap = bytearray((len(keys) + 7) // 8)
    if all(scope is not None for scope in scopes):
        tables = [scope.blocks for scope in scopes if scope is not None]
        for index, key in enumerate(keys):
            if all(key in blocks for blocks in tables):
                bitmap[index >> 3] |= 1 << (index & 7)
    return bytes(bitmap)
