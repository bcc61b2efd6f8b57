"""What an eviction policy promises: in which order blocks leave a node that is full.

A policy knows opaque keys and the prefix tree over them; it knows no bytes, leases or time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)

Standing = tuple[int, Key | None]
"""How a block stood when it was removed: what only its policy reads, to put it back there."""


class EvictionPolicy(Protocol[Key]):
    """Keeps every resident block in some order of leaving.

    Laws, each a test in `tests/contract/test_eviction.py`:

    1. Exactly the keys inserted and not removed are resident.
    2. `victims` offers leaves only: a block with a resident child is never offered.
    3. It is lazy: the caller may call `on_remove` for the victim just offered before asking for the
       next; a parent that thereby became a leaf is offered in its turn within the same iteration.
       What the caller did not remove was skipped (it is under a lease) and is not offered again in
       this iteration, nor are its ancestors.
    4. Iterated to the end with each victim removed, it offers every resident block once.
    5. Nothing is assumed of prefixes: a parent may be absent, may come after its child, may be
       removed before it. A parent that arrives later is found by its children. Parents that go round
       in a circle keep nobody: a block whose insertion would close one is taken as a start.
    6. Iterating changes nothing by itself; inserts and touches end the iteration's use.
    7. Blocks that are removed and restored, the last removed first, leave in the order in which they
       would have left without it.
    """

    def on_insert(self, key: Key, parent: Key | None) -> None:
        """A block became resident; `parent` is its prefix, resident or not, or None at a start.

        An insert counts as a use. Inserting a resident key is an error of the caller (ValueError).
        """

    def on_touch(self, keys: Sequence[Key]) -> None:
        """A matched run was used, first block first. Keys that are not resident are ignored."""

    def on_remove(self, key: Key) -> Standing[Key]:
        """A block left, evicted or not; KeyError where it is not resident."""

    def on_restore(self, key: Key, standing: Standing[Key]) -> None:
        """A block that `on_remove` was told of did not leave: it stands where it stood."""

    def victims(self) -> Iterator[Key]:
        """The blocks to evict, first to leave first."""

    def num_children(self, key: Key) -> int:
        """How many resident blocks have this one, resident or not, as their parent."""

    def __len__(self) -> int:
        """How many blocks are resident."""
