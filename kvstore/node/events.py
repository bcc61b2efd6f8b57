"""What became visible on a node and what went, in order, for those who watch it.

Rules kept here:
- Changes have consecutive numbers from 1. The newest are kept, up to a number of bytes and of records; whoever stands
  further behind begins anew with a snapshot.
- A record of a snapshot says what is true at its place in the stream: a page is read in the instant in which it is
  queued, behind all changes up to then. So what a subscriber has taken in is right for every key whose page it has, and
  in sync it has just the node's blocks. A message holds changes, or one page, never both.
- Tails and blocks for one reader are never told: nobody but their reader can match them.
- Nothing is sent from here, and nobody waits here: a subscription is asked for what its subscriber should hear next.

How it works: `note` appends a key to the open record, which is closed, numbered and counted into the digest when a
key comes that does not fit into it, or when somebody asks. A commit of many blocks is thus one record, and a node that
nobody watches pays for one append a block and one pass over each record (measured: 0.2 µs a block).
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from snowskin.kvstore.blocks import KeyColumn, digest_number, digest_part
from snowskin.kvstore.errors import WatcherTooSlow
from snowskin.kvstore.messages import BlockChange, Watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snowskin.kvstore.index.block_index import BlockIndex
    from snowskin.kvstore.messages import WatchRequest

PAGE_NBYTES = 64 << 10
"""Keys in one message, about: a page of 2,048 keys is read in half a millisecond."""
MAX_RECORD_KEYS = 1024
MAX_RECORDS = 65_536
# What a record costs beside its keys, and what a message's budget counts for it.
RECORD_NBYTES = 128
_WORD_NBYTES = 8
# From here on the digest of a record is computed by numpy.
_MANY_KEYS = 24


def digest_of(namespace: bytes, keys: KeyColumn) -> int:
    """What these blocks bring into the digest of a node when they come, and take out when they go."""
    number = digest_number(namespace)
    if len(keys) >= _MANY_KEYS and keys.width % _WORD_NBYTES == 0:
        words = np.frombuffer(keys.packed, "<u8")[:: keys.width // _WORD_NBYTES]
        return int(np.bitwise_xor.reduce(words + np.uint64(number)))
    digest = 0
    for key in keys:
        digest ^= digest_part(number, key)
    return digest


class BlockEvents:
    """The changes of one tenant's visible blocks on one node, the newest of them at hand.

    Attributes:
        last_number: of the newest change; 0 while there was none.
        num_blocks: visible now, as a subscriber in sync knows them.
        digest: of these blocks.
    """

    def __init__(self, *, max_nbytes: int, max_records: int = MAX_RECORDS) -> None:
        """Nothing happened yet.

        Args:
            max_nbytes: of the changes that are kept, keys and what a record costs.
            max_records: how many changes are kept.
        """
        self.last_number = 0
        self.num_blocks = 0
        self.digest = 0
        self._max_nbytes = max_nbytes
        self._max_records = max_records
        self._ring: deque[BlockChange] = deque()
        self._ring_nbytes = 0
        self._num_settled = 0
        self._keys: list[bytes] = []
        self._namespace = b""
        self._width = 0
        self._removed = False

    @property
    def num_noted(self) -> int:
        """Blocks that came and went since the start: another number whenever something happened."""
        return self._num_settled + len(self._keys)

    @property
    def first_number(self) -> int:
        """Of the oldest change at hand; one more than the last where none is."""
        return self.last_number - len(self._ring) + 1

    def note(self, namespace: bytes, key: bytes, removed: bool) -> None:
        """One block became visible, or went; once for each block that commits or leaves."""
        keys = self._keys
        if keys:
            if (
                namespace is not self._namespace
                or removed is not self._removed
                or len(key) != self._width
                or len(keys) >= MAX_RECORD_KEYS
            ):
                self.settle()
                self._open(namespace, key, removed)
        else:
            self._open(namespace, key, removed)
        self._keys.append(key)

    def _open(self, namespace: bytes, key: bytes, removed: bool) -> None:
        self._namespace, self._width, self._removed = namespace, len(key), removed

    def settle(self) -> None:
        """Numbers what was noted; `last_number`, `num_blocks` and `digest` are of this moment."""
        if not self._keys:
            return
        column = KeyColumn(packed=b"".join(self._keys), width=self._width)
        change = BlockChange(namespace=self._namespace, keys=column, removed=self._removed)
        self.digest ^= digest_of(change.namespace, column)
        self.num_blocks += -len(self._keys) if self._removed else len(self._keys)
        self.last_number += 1
        self._num_settled += len(self._keys)
        self._keys = []
        self._ring.append(change)
        self._ring_nbytes += _nbytes(change)
        while self._ring_nbytes > self._max_nbytes or len(self._ring) > self._max_records:
            self._ring_nbytes -= _nbytes(self._ring.popleft())

    def can_go_on_behind(self, number: int) -> bool:
        """Whether all changes behind this one are at hand."""
        return self.first_number - 1 <= number <= self.last_number

    def behind(self, number: int, budget_nbytes: int) -> tuple[BlockChange, ...]:
        """The changes behind this one, at least one where there are any, within the budget."""
        found: list[BlockChange] = []
        nbytes = 0
        for position in range(number + 1 - self.first_number, len(self._ring)):
            change = self._ring[position]
            nbytes += _nbytes(change)
            if found and nbytes > budget_nbytes:
                break
            found.append(change)
        return tuple(found)


class Subscription:
    """Where one subscriber stands."""

    def __init__(
        self,
        request: WatchRequest,
        *,
        events: BlockEvents,
        index: BlockIndex,
        tenant: str,
        epoch: int,
        budget_nbytes: int = PAGE_NBYTES,
    ) -> None:
        """Goes on behind what the subscriber has, or begins anew where that is too old or of another epoch.

        A subscriber whose stream broke before it was in sync has no place to go on from: it asks from nothing.

        Args:
            request: where the subscriber stands.
            events: the tenant's.
            index: where pages are read.
            tenant: whose blocks.
            epoch: the node's.
            budget_nbytes: of one message, about.
        """
        events.settle()
        self._events = events
        self._index = index
        self._tenant = tenant
        self._epoch = epoch
        self._budget_nbytes = budget_nbytes
        self._sequence = request.sequence
        self._pages: Iterator[tuple[BlockChange, ...]] | None = None
        self._must_begin = not (
            epoch == request.node_epoch and events.can_go_on_behind(request.sequence)
        )
        self._has_greeted = False

    @property
    def num_behind(self) -> int:
        """Changes that the subscriber has not been sent."""
        self._events.settle()
        return 0 if self._must_begin else self._events.last_number - self._sequence

    def next_messages(self) -> list[Watched]:
        """What the subscriber should hear now, in order; nothing where it knows all.

        At most two messages of about the budget: changes, and, where they are all, one page of the
        snapshot behind them, so that a snapshot comes to its end however often something changes.

        Raises:
            WatcherTooSlow: the changes that it lacks are forgotten.
        """
        self._events.settle()
        if self._must_begin:
            return [self._begin()]
        if not self._events.can_go_on_behind(self._sequence):
            raise WatcherTooSlow(
                f"the subscriber has change {self._sequence}, the node kept those from "
                f"{self._events.first_number} on",
                hint="watch again with what you have, and read faster, or raise watch_ring_nbytes",
            )
        messages = []
        if changes := self._events.behind(self._sequence, self._budget_nbytes):
            self._sequence += len(changes)
            messages.append(self._message(changes))
        if self._sequence == self._events.last_number and self._pages is not None:
            page = next(self._pages, None)
            if page is None:
                self._pages = None
            messages.append(self._message(page or ()))
        if not (messages or self._has_greeted):
            messages.append(self._message(()))
        self._has_greeted = True
        if messages:
            messages[-1] = self._completed(messages[-1])
        return messages

    def beat(self) -> Watched:
        """An empty message, so that silence means trouble."""
        self._events.settle()
        return self._completed(self._message(()))

    def _begin(self) -> Watched:
        self._must_begin = False
        self._has_greeted = True
        self._sequence = self._events.last_number
        self._pages = self._read_pages()
        begins = self._message((), snapshot_begins=True)
        if self._events.num_blocks:
            return begins
        self._pages = None
        return self._completed(begins)

    def _message(
        self, changes: tuple[BlockChange, ...], *, snapshot_begins: bool = False
    ) -> Watched:
        return Watched(
            node_epoch=self._epoch,
            sequence=self._sequence,
            changes=changes,
            snapshot_begins=snapshot_begins,
        )

    def _completed(self, message: Watched) -> Watched:
        """The last message of now: whoever has it knows all, if no page is to come."""
        if self._pages is not None or self._sequence != self._events.last_number:
            return message
        return replace(
            message,
            in_sync=True,
            num_blocks=self._events.num_blocks,
            digest=self._events.digest,
        )

    def _read_pages(self) -> Iterator[tuple[BlockChange, ...]]:
        """The snapshot, a page whenever it is asked for one; what comes meanwhile is told as changes.

        The keys of one namespace are listed at once (measured: 10 ms for a million), since a dict cannot be walked
        while it changes; whether each is here still is looked up with its page.
        """
        page: list[BlockChange] = []
        room_nbytes = self._budget_nbytes
        for namespace in self._index.namespaces(self._tenant):
            scope = self._index.scope(self._tenant, namespace)
            listed = list(scope.blocks) if scope else []
            start = 0
            while start < len(listed):
                # By what is looked at, not by what is found: also a page of keys that are gone takes its time.
                count = max(1, room_nbytes // len(listed[start]))
                page += self._visible(namespace, listed[start : start + count])
                room_nbytes -= RECORD_NBYTES + count * len(listed[start])
                start += count
                if room_nbytes <= 0:
                    yield tuple(page)
                    page, room_nbytes = [], self._budget_nbytes
        if page:
            yield tuple(page)

    def _visible(self, namespace: bytes, keys: list[bytes]) -> Iterator[BlockChange]:
        """Those of the keys that can be matched now; a record for each width of key."""
        scope = self._index.scope(self._tenant, namespace)
        if scope is None:
            return
        get = scope.blocks.get
        here = [key for key in keys if (entry := get(key)) is not None and not entry.one_reader]
        for width, alike in groupby(here, key=len):
            column = KeyColumn(packed=b"".join(alike), width=width)
            yield BlockChange(namespace=namespace, keys=column)


def _nbytes(change: BlockChange) -> int:
    return RECORD_NBYTES + len(change.keys.packed)
