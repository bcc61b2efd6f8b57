"""What lies where on one node: pools, index and eviction order, changed together.

Rules kept here: a block's bytes are freed only when no lease covers its segment, whatever took the block out of the
index. Room is made by evicting leaves of the prefix tree, least recently used first, then blocks for one reader whom
nobody saw for long; and only when that many bytes can be had: a call that cannot be served evicts nothing, and changes
nobody's standing. (Where leases and several block sizes leave holes that are all too small, enough bytes may not be
enough room; what was evicted then stays free.)
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from snowskin.kvstore.extent import Extent
from snowskin.kvstore.index.block_index import BlockEntry, BlockId, BlockIndex, PlacedSegment, Scope
from snowskin.kvstore.node.events import BlockEvents
from snowskin.kvstore.pool.pool import Pool, Use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from snowskin.kvstore.eviction.api import EvictionPolicy, Standing

TAIL_NAMESPACE = b""
"""Scope of the tails: no real namespace is empty. Its keys are request ids."""

# Where room is long in coming, it is looked for after each further sixteenth of what went.
_STEP_RATIO = 16

ByteRange = tuple[int, int, int]
"""Pool, offset, number of bytes."""


class Residence:
    """The blocks of one node and the bytes under them."""

    def __init__(
        self,
        pools: Sequence[Pool],
        eviction: EvictionPolicy[BlockId],
        *,
        node_id: str,
        max_extent_nbytes: int,
        watch_ring_nbytes: int = 1 << 20,
    ) -> None:
        """Empty pools, one a tenant."""
        self.pools = {pool.id: pool for pool in pools}
        self.events = {pool.tenant: BlockEvents(max_nbytes=watch_ring_nbytes) for pool in pools}
        self.index = BlockIndex(lambda tenant: self.events[tenant].note)
        self.counters: Counter[str] = Counter()
        self._by_tenant = {pool.tenant: pool for pool in pools}
        self._eviction = eviction
        self._node_id = node_id
        self._max_extent_nbytes = max_extent_nbytes
        self._generation = 0
        self.num_for_one_reader = 0
        self.on_unread_gone: Callable[[BlockEntry], None] = lambda entry: None
        """Called when a block for one reader has left the index, whatever took it out."""
        self._touched: list[Sequence[BlockEntry]] = []

    def pool_of(self, tenant: str) -> Pool:
        """The tenant's own pool: between tenants nothing is shared."""
        return self._by_tenant[tenant]

    def reserve(
        self,
        tenant: str,
        num_blocks: int,
        block_nbytes: int,
        *,
        near: BlockEntry | None,
        unread: Callable[[], Iterable[BlockEntry]] = list,
    ) -> list[PlacedSegment] | None:
        """Room for a run of blocks, evicting where that helps; None where there is none now.

        Args:
            tenant: whose pool.
            num_blocks: how many.
            block_nbytes: bytes of each.
            near: a block that the run should follow.
            unread: blocks for one reader that may go when all others have gone, the first to go first.
        """
        pool = self.pool_of(tenant)
        near_offset = None
        if near is not None and near.segment.pool_id == pool.id:
            near_offset = near.offset + block_nbytes
        pieces = pool.place(
            num_blocks, block_nbytes, near=near_offset, max_extent_nbytes=self._max_extent_nbytes
        )
        if pieces is None:
            pieces = self._evict_and_place(pool, num_blocks, block_nbytes, near_offset, unread)
        if pieces is None:
            return None
        segments = []
        for offset, count in pieces:
            self._generation += 1
            segments.append(PlacedSegment(pool.id, offset, block_nbytes, count, self._generation))
        return segments

    def _evict_and_place(
        self,
        pool: Pool,
        num_blocks: int,
        block_nbytes: int,
        near_offset: int | None,
        unread: Callable[[], Iterable[BlockEntry]],
    ) -> list[tuple[int, int]] | None:
        need_nbytes = num_blocks * block_nbytes
        # Too high a bound, but cheap: it counts blocks for one reader, and the prefixes of leased blocks.
        bound_nbytes = pool.used_nbytes(Use.COMMITTED) - pool.leased_nbytes
        if pool.free_nbytes + bound_nbytes < need_nbytes:
            return None
        self.note_touches()
        chosen: list[tuple[BlockEntry, Standing[BlockId] | None]] = []
        chosen_nbytes = evicted_nbytes = 0

        def evict_and_place() -> list[tuple[int, int]] | None:
            for victim, _ in chosen:
                self._evict(victim)
            chosen.clear()
            return pool.place(
                num_blocks,
                block_nbytes,
                near=near_offset,
                max_extent_nbytes=self._max_extent_nbytes,
            )

        for entry in self._victims(pool, unread):
            # Gone for the policy, so that it offers the prefix; the bytes go when there are enough.
            standing = None if entry.one_reader else self._eviction.on_remove(entry.id)
            chosen.append((entry, standing))
            chosen_nbytes += entry.segment.block_nbytes
            if pool.free_nbytes + chosen_nbytes < need_nbytes:
                continue
            if chosen_nbytes * _STEP_RATIO < evicted_nbytes:
                continue  # in vain so far: to look after each block would hold up everybody
            pieces = evict_and_place()
            if pieces is not None:
                return pieces
            evicted_nbytes += chosen_nbytes
            chosen_nbytes = 0
        if chosen and pool.free_nbytes + chosen_nbytes >= need_nbytes:
            return evict_and_place()
        for entry, standing in reversed(chosen):  # in vain: they stay, as old as they were
            if standing is not None:
                self._eviction.on_restore(entry.id, standing)
        return None

    def _victims(
        self, pool: Pool, unread: Callable[[], Iterable[BlockEntry]]
    ) -> Iterator[BlockEntry]:
        """What may go from `pool`, first to go first; the caller tells the policy of each before it asks on."""
        for block_id in self._eviction.victims():
            entry = self.index.entry(block_id)
            assert entry is not None, "the eviction policy named a block that is not in the index"
            if not entry.segment.num_leases and entry.segment.pool_id == pool.id:
                yield entry
        for entry in unread():
            if not entry.segment.num_leases and entry.segment.pool_id == pool.id:
                yield entry

    def _evict(self, entry: BlockEntry) -> None:
        """Takes out what the policy does not know any more, or never knew."""
        self.index.remove(entry)
        self._free_committed(entry.segment, entry.offset)
        self.counters["blocks_evicted"] += 1
        if entry.one_reader:
            self.num_for_one_reader -= 1
            self.counters["blocks_evicted_unread"] += 1
            self.on_unread_gone(entry)

    def commit(
        self,
        scope: Scope,
        key: bytes,
        segment: PlacedSegment,
        offset: int,
        checksum: bytes,
        *,
        parent_key: bytes,
        one_reader: bool,
    ) -> BlockEntry | None:
        """Makes a written block visible.

        Args:
            scope: of the key.
            key: which block.
            segment: where it was reserved.
            offset: its bytes.
            checksum: what the writer computed.
            parent_key: the block before it, or empty.
            one_reader: the block goes with its first reader.

        Returns:
            The entry, or None where another writer was first; then the bytes are free again.
        """
        pool = self.pools[segment.pool_id]
        if key in scope.blocks:
            pool.free(offset, segment.block_nbytes, Use.RESERVED)
            self.counters["blocks_duplicate"] += 1
            return None
        entry = BlockEntry(
            id=(scope.number, key),
            key=key,
            segment=segment,
            offset=offset,
            checksum=checksum,
            parent_id=(scope.number, parent_key) if parent_key else None,
            one_reader=one_reader,
        )
        self.index.insert(scope, entry)
        pool.change(segment.block_nbytes, Use.RESERVED, Use.COMMITTED)
        pool.num_gains += 1
        segment.num_committed += 1
        if segment.num_leases:
            pool.leased_nbytes += segment.block_nbytes
        self.num_for_one_reader += entry.one_reader
        if not entry.one_reader:
            # A block for one reader leaves with that reader; evicting it sooner would only cost a recomputation.
            self.note_touches()
            self._eviction.on_insert(entry.id, entry.parent_id)
        self.counters["blocks_committed"] += 1
        return entry

    def extent(self, segment: PlacedSegment, offset: int, num_blocks: int) -> Extent:
        """Where `num_blocks` of a segment lie, as clients are told."""
        return Extent(
            node_id=self._node_id,
            tier=self.pools[segment.pool_id].tier,
            pool_id=segment.pool_id,
            offset=offset,
            nbytes=num_blocks * segment.block_nbytes,
            generation=segment.generation,
        )

    def is_here(self, entry: BlockEntry) -> bool:
        """Whether this very entry is in the index still."""
        return self.index.entry(entry.id) is entry

    def num_children(self, entry: BlockEntry) -> int:
        """Blocks that name this one as their parent, save those for one reader."""
        return self._eviction.num_children(entry.id)

    def touch(self, run: Sequence[BlockEntry]) -> None:
        """A matched run was used; the eviction policy learns of it with `note_touches`."""
        self._touched.append(run)

    def note_touches(self) -> None:
        """Tells the policy of the runs used since; off the path of an answer, but before anything is decided by it."""
        for run in self._touched:
            ids = [entry.id for entry in run if not entry.one_reader]
            if ids:
                self._eviction.on_touch(ids)
        self._touched.clear()

    def remove(self, entry: BlockEntry) -> None:
        """Takes a block out of the index; its bytes come back at once, or with the last lease over its segment."""
        self.index.remove(entry)
        if entry.one_reader:
            self.num_for_one_reader -= 1
            self.on_unread_gone(entry)
        else:
            self._eviction.on_remove(entry.id)
        segment = entry.segment
        if segment.num_leases:
            segment.doomed.append((entry.offset, segment.block_nbytes))
        else:
            self._free_committed(segment, entry.offset)

    def _free_committed(self, segment: PlacedSegment, offset: int) -> None:
        segment.num_committed -= 1
        self.pools[segment.pool_id].free(offset, segment.block_nbytes, Use.COMMITTED)

    def lease(self, segments: Iterable[PlacedSegment]) -> None:
        """One more lease over each of these segments."""
        for segment in segments:
            if segment.num_leases == 0:
                pool = self.pools[segment.pool_id]
                pool.leased_nbytes += segment.num_committed * segment.block_nbytes
            segment.num_leases += 1

    def unlease(self, segments: Iterable[PlacedSegment]) -> None:
        """One lease less; what was doomed meanwhile is freed with the last."""
        for segment in segments:
            assert segment.num_leases > 0, "a segment was released more often than leased"
            segment.num_leases -= 1
            if segment.num_leases == 0:
                pool = self.pools[segment.pool_id]
                pool.leased_nbytes -= segment.num_committed * segment.block_nbytes
                pool.num_gains += 1
                for offset, _ in segment.doomed:
                    self._free_committed(segment, offset)
                segment.doomed.clear()

    def give_back(self, segment: PlacedSegment, offset: int, was: Use) -> None:
        """A reserved (or quarantined) block that will not be committed comes back."""
        self.pools[segment.pool_id].free(offset, segment.block_nbytes, was)

    def quarantine(self, segment: PlacedSegment, num_blocks: int) -> None:
        """Reserved blocks become neither visible nor free: their writer's stores may still land."""
        pool = self.pools[segment.pool_id]
        pool.change(num_blocks * segment.block_nbytes, Use.RESERVED, Use.QUARANTINED)
        pool.num_gains += 1  # who has too much of it there is refused now, and holds up nobody

    def check(self, num_leases: Counter[PlacedSegment], reserved: Iterable[ByteRange]) -> None:
        """Asserts that index, segments and books agree; for tests.

        Args:
            num_leases: over each segment, counted from the leases themselves.
            reserved: byte ranges that are reserved or quarantined.
        """
        taken: list[ByteRange] = list(reserved)
        committed: Counter[int] = Counter()
        leased: Counter[int] = Counter()
        num_evictable = 0
        for entry in self.index:
            segment = entry.segment
            taken.append((segment.pool_id, entry.offset, segment.block_nbytes))
            committed[segment.pool_id] += segment.block_nbytes
            num_evictable += not entry.one_reader
            assert segment.num_leases == num_leases[segment], "leases over a segment are miscounted"
            assert segment.num_leases or not segment.doomed, "doomed bytes outlived the last lease"
        for segment in num_leases:
            for offset, nbytes in segment.doomed:
                taken.append((segment.pool_id, offset, nbytes))
                committed[segment.pool_id] += nbytes
            leased[segment.pool_id] += segment.num_committed * segment.block_nbytes
        assert len(self._eviction) == num_evictable, "index and eviction policy disagree"
        assert len(self.index) == num_evictable + self.num_for_one_reader, "one-reader miscounted"
        taken.sort()
        for (pool_id, offset, nbytes), (next_pool_id, next_offset, _) in pairwise(taken):
            assert (pool_id, offset + nbytes) <= (next_pool_id, next_offset), "two blocks overlap"
        for pool in self.pools.values():
            pool.check()
            assert committed[pool.id] == pool.used_nbytes(Use.COMMITTED)
            assert leased[pool.id] == pool.leased_nbytes
            used_nbytes = sum(nbytes for pool_id, _, nbytes in taken if pool_id == pool.id)
            assert used_nbytes + pool.free_nbytes == pool.capacity_nbytes, "bytes belong to nobody"
