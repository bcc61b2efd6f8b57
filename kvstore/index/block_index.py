"""Where committed blocks lie.

Rules kept here: a key means something only within its scope (tenant and namespace), and the scope is applied before
anything is looked up. A node may hold a block whose parent it does not hold: nothing here assumes that a prefix is
closed, so a longest run is found by walking it. A block's bytes belong to a segment, which is placed in one piece;
leases count on the segment. A scope goes with its last block and writer, and its block size with it: a namespace
that somebody once asked for wrongly neither stays wrong nor stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from snowskin.kvstore.blocks import KeyColumn

BlockId = tuple[int, bytes]
"""Scope number and key: names a block within a node, for the eviction policy."""


Note = Callable[[bytes, bytes, bool], None]
"""Hears of a block at once: namespace, key, and whether it went (or became visible)."""


def _tell_nobody(_namespace: bytes, _key: bytes, _removed: bool) -> None:
    """For an index that is not watched."""


@dataclass(slots=True, eq=False)
class PlacedSegment:
    """Consecutive blocks of one reservation in one contiguous range of one pool.

    `num_leases` counts the leases (read, or write naming it as a parent) over any of its blocks: while it is not 0,
    no byte of the segment is freed. `doomed` are ranges to free when it becomes 0.

    While the visible blocks are its first ones without a gap (they nearly always are: commits come in order, and
    eviction takes leaves first), `entries` has them in order and `packed_keys` their keys, so that a run is matched
    by one comparison. Once there is a gap, `is_whole` is false for good, and blocks are matched one by one.
    """

    pool_id: int
    offset: int
    block_nbytes: int
    num_blocks: int
    generation: int
    num_leases: int = 0
    num_committed: int = 0
    doomed: list[tuple[int, int]] = field(default_factory=list)
    is_whole: bool = True
    entries: list[BlockEntry] = field(default_factory=list)
    packed_keys: bytearray = field(default_factory=bytearray)
    matched_at_s: float = 0.0

    def position(self, entry: BlockEntry) -> int:
        """Index of one of its blocks."""
        return (entry.offset - self.offset) // self.block_nbytes

    def note_visible(self, entry: BlockEntry) -> None:
        """A block of it came into the index."""
        num_bytes = len(self.packed_keys)
        if not self.is_whole:
            return
        if self.position(entry) == len(self.entries) and num_bytes == len(entry.key) * len(
            self.entries
        ):
            self.entries.append(entry)
            self.packed_keys += entry.key
        else:
            self._break()

    def note_gone(self, entry: BlockEntry) -> None:
        """A block of it left the index."""
        if not self.is_whole:
            return
        if self.entries and self.entries[-1] is entry:
            self.entries.pop()
            del self.packed_keys[-len(entry.key) :]
        else:
            self._break()

    def _break(self) -> None:
        self.is_whole = False
        self.entries.clear()
        self.packed_keys.clear()


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
    committed_at_s: float = 0.0


@dataclass(slots=True, eq=False)
class Scope:
    """The blocks of one tenant in one namespace; all of one size.

    `num_writers` counts the reservations in it; `note` hears of its blocks, save those for one reader.
    """

    number: int
    tenant: str
    namespace: bytes
    block_nbytes: int
    note: Note = _tell_nobody
    num_writers: int = 0
    blocks: dict[bytes, BlockEntry] = field(default_factory=dict)


class BlockIndex:
    """Block key to extent, by scope."""

    def __init__(self, note_of: Callable[[str], Note] = lambda _tenant: _tell_nobody) -> None:
        """Empty; `note_of(tenant)` hears of the tenant's blocks."""
        self._note_of = note_of
        self._scopes: dict[tuple[str, bytes], Scope] = {}
        self._by_number: dict[int, Scope] = {}
        self._num_opened = 0

    def __len__(self) -> int:
        """Committed blocks."""
        return sum(len(scope.blocks) for scope in self._scopes.values())

    def __iter__(self) -> Iterator[BlockEntry]:
        """All entries, in no order."""
        for scope in self._scopes.values():
            yield from scope.blocks.values()

    def scope(self, tenant: str, namespace: bytes) -> Scope | None:
        """The scope, where anything is committed or reserved in it."""
        return self._scopes.get((tenant, namespace))

    def namespaces(self, tenant: str) -> list[bytes]:
        """Of the tenant's scopes, in order."""
        return sorted(namespace for of, namespace in self._scopes if of == tenant)

    def open_scope(self, tenant: str, namespace: bytes, block_nbytes: int) -> Scope:
        """The scope, made on first use, for one writer more; each `leave_scope` is for one less."""
        scope = self._scopes.get((tenant, namespace))
        if scope is None:
            note = self._note_of(tenant)
            scope = Scope(self._num_opened, tenant, namespace, block_nbytes, note)
            self._num_opened += 1
            self._scopes[tenant, namespace] = scope
            self._by_number[scope.number] = scope
        scope.num_writers += 1
        return scope

    def leave_scope(self, scope: Scope) -> None:
        """A writer has committed or given back all that it reserved."""
        assert scope.num_writers > 0, "a scope was left more often than opened"
        scope.num_writers -= 1
        self._drop_if_unused(scope)

    def entry(self, block_id: BlockId) -> BlockEntry | None:
        """The entry that the eviction policy speaks of."""
        scope = self._by_number.get(block_id[0])
        return scope.blocks.get(block_id[1]) if scope else None

    def insert(self, scope: Scope, entry: BlockEntry) -> None:
        """Makes a block visible; its key must not be there."""
        assert entry.key not in scope.blocks, "a committed block was committed again"
        scope.blocks[entry.key] = entry
        entry.segment.note_visible(entry)
        if not entry.one_reader:
            scope.note(scope.namespace, entry.key, False)

    def remove(self, entry: BlockEntry) -> None:
        """Makes a block invisible."""
        scope = self._by_number[entry.id[0]]
        del scope.blocks[entry.key]
        entry.segment.note_gone(entry)
        if not entry.one_reader:
            scope.note(scope.namespace, entry.key, True)
        self._drop_if_unused(scope)

    def check(self, num_writers: Counter[int]) -> None:
        """Asserts that scopes have just the writers given by number, and none is there for nothing; for tests."""
        for scope in self._scopes.values():
            assert scope.num_writers == num_writers[scope.number], "writers are miscounted"
            assert scope.blocks or scope.num_writers, "an empty scope stayed"

    def _drop_if_unused(self, scope: Scope) -> None:
        if not scope.blocks and not scope.num_writers:
            del self._scopes[scope.tenant, scope.namespace]
            del self._by_number[scope.number]


def longest_run(blocks: dict[bytes, BlockEntry], keys: KeyColumn, limit: int) -> list[BlockEntry]:
    """Entries of the first keys up to the first that is missing, at most `limit`."""
    run: list[BlockEntry] = []
    get, packed, width = blocks.get, keys.packed, keys.width
    start, end = 0, limit * width
    while start < end:
        entry = get(packed[start : start + width])
        if entry is None:
            break
        segment = entry.segment
        if segment.is_whole and len(segment.packed_keys) == width * len(segment.entries):
            position = segment.position(entry)
            count = min((end - start) // width, len(segment.entries) - position)
            first = position * width
            # Halving, where the sequences part within a segment, ends after a few comparisons.
            while count > 1 and (
                packed[start : start + count * width]
                != segment.packed_keys[first : first + count * width]
            ):
                count //= 2
            run += segment.entries[position : position + count]
            start += count * width
        else:
            run.append(entry)
            start += width
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
