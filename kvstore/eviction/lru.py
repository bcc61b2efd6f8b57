"""LRU over the prefix tree.

The whole rule: every use gives each block of the run a stamp, higher than all before, the later block
of a run a lower one than the earlier. A block without resident children is a leaf. The leaf with the
lowest stamp leaves first; when it is gone, its parent may be a leaf. A parent that would make a block
its own ancestor is no parent: otherwise none of that circle would ever be a leaf.

How it works: a touch writes stamps and nothing else (8,192 blocks: about 1 ms). `_heap` has at least
one entry for every leaf, under a stamp that is the leaf's own or an older one of it: since stamps only
rise, an entry that comes up is either right, or goes back under the stamp of today. Entries of blocks
that left or that have children now are dropped as they come up, or all at once when they outnumber
the residents.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from snowskin.kvstore.eviction.api import Standing

Key = TypeVar("Key", bound=Hashable)

_COMPACTION_MINIMUM = 1024


class LruEviction(Generic[Key]):
    """Least recently used leaf first; the laws are `EvictionPolicy`'s."""

    __slots__ = ("_clock", "_heap", "_num_children", "_parents", "_queued", "_stamps")

    def __init__(self) -> None:
        """Nothing is resident."""
        self._clock = 0
        self._stamps: dict[Key, int] = {}
        self._parents: dict[Key, Key | None] = {}
        self._num_children: dict[Key, int] = {}  # resident children, of absent parents too
        self._heap: list[tuple[int, Key]] = []
        self._queued: set[Key] = set()  # keys with an entry in the heap, or offered and skipped

    def __len__(self) -> int:
        return len(self._stamps)

    def on_insert(self, key: Key, parent: Key | None) -> None:
        """A block became resident, and was thereby used."""
        if key in self._stamps or key == parent:
            raise ValueError(f"block {key!r} is resident already, or its own parent")
        if key in self._num_children and self._is_above(key, parent):
            parent = None
        self._clock += 1
        self._add(key, parent, self._clock)

    def on_touch(self, keys: Sequence[Key]) -> None:
        """Stamps a used run; one pass in C, since it stands in every match."""
        stamps = self._stamps
        num_resident = len(stamps)
        self._clock += len(keys)
        stamps.update(zip(keys, range(self._clock, self._clock - len(keys), -1), strict=True))
        if len(stamps) != num_resident:  # rare: some were not resident, and must not become so
            for key in keys:
                if key not in self._parents:
                    stamps.pop(key, None)

    def on_remove(self, key: Key) -> Standing[Key]:
        """A block left; its parent may have become a leaf."""
        stamp = self._stamps.pop(key)
        parent = self._parents.pop(key)
        if parent is not None:
            self._num_children[parent] -= 1
            if not self._num_children[parent]:
                del self._num_children[parent]
                if parent in self._stamps:
                    self._queue(parent)
        return stamp, parent

    def on_restore(self, key: Key, standing: Standing[Key]) -> None:
        """It stays, under the stamp that it had."""
        stamp, parent = standing
        self._add(key, parent, stamp)

    def num_children(self, key: Key) -> int:
        """How many resident blocks have this one, resident or not, as their parent."""
        return self._num_children.get(key, 0)

    def victims(self) -> Iterator[Key]:
        """Leaves, lowest stamp first; see the Protocol for what may be done meanwhile."""
        skipped: list[tuple[int, Key]] = []
        try:
            while self._heap:
                stamp, key = heapq.heappop(self._heap)
                current = self._stamps.get(key)
                if current is None or key in self._num_children:
                    self._queued.discard(key)
                elif current != stamp:
                    heapq.heappush(self._heap, (current, key))
                else:
                    # Noted before the caller sees it: an abandoned iteration must not lose it.
                    skipped.append((stamp, key))
                    yield key
                    if key not in self._stamps:
                        skipped.pop()
                        self._queued.discard(key)
        finally:
            for entry in skipped:
                heapq.heappush(self._heap, entry)

    def _add(self, key: Key, parent: Key | None, stamp: int) -> None:
        self._stamps[key] = stamp
        self._parents[key] = parent
        if parent is not None:
            self._num_children[parent] = self._num_children.get(parent, 0) + 1
        if key not in self._num_children:
            self._queue(key)

    def _is_above(self, key: Key, below: Key | None) -> bool:
        """Whether `key` is `below` or one of its ancestors. Asked only of a key that has children before it came."""
        while below is not None and below != key:
            below = self._parents.get(below)
        return below is not None

    def _queue(self, key: Key) -> None:
        if key in self._queued:
            return
        if len(self._heap) > 2 * len(self._stamps) + _COMPACTION_MINIMUM:
            self._compact()
        self._queued.add(key)
        heapq.heappush(self._heap, (self._stamps[key], key))

    def _compact(self) -> None:
        """Drops the entries of blocks that left or have children."""
        kept, dropped = [], []
        for stamp, key in self._heap:
            if key in self._stamps and key not in self._num_children:
                kept.append((stamp, key))
            else:
                dropped.append(key)
        heapq.heapify(kept)
        self._heap = kept
        # Not rebuilt from `kept`: what a running iteration holds is queued too.
        self._queued.difference_update(dropped)
