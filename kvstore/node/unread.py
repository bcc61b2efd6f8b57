"""Blocks that wait for their one reader: how long, and for whom they make room.

Rules kept here: such a block goes with its reader, with its writer's session, or when a write lease's life and its
grace have passed since it was committed. Before that it may be given up for room that nothing else can give, once it
has waited for as long as a reader may hold a lease: who was to read it has lost its way, and if not, computes it again.
Sooner it is not, since a writer that streams through a small pool would push out what its reader is about to read.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from snowskin.kvstore.lease import LeaseTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from snowskin.kvstore.index.block_index import BlockEntry
    from snowskin.kvstore.lease import GrantedLease
    from snowskin.kvstore.messages import LeaseId, SessionId
    from snowskin.kvstore.node.limits import NodeLimits
    from snowskin.kvstore.node.residence import Residence


class UnreadBlocks:
    """The blocks for one reader of one node."""

    def __init__(
        self, residence: Residence, limits: NodeLimits, *, next_lease_id: Callable[[], LeaseId]
    ) -> None:
        """None yet; hears of those that leave the residence."""
        self._residence = residence
        self._patience_s = limits.unread_s
        self._next_lease_id = next_lease_id
        self._leases: LeaseTable[BlockEntry] = LeaseTable(
            max_ttl_s=limits.write_lease_s, grace_s=limits.grace_s, max_life_s=limits.lease_life_s
        )
        self._lease_ids: dict[BlockEntry, LeaseId] = {}
        # When each of them has waited for long, in order; those that are gone may still stand there.
        self._long_at: deque[tuple[float, BlockEntry]] = deque()
        self._long: dict[BlockEntry, None] = {}
        residence.on_unread_gone = self._forget

    def __len__(self) -> int:
        """How many there are."""
        return len(self._lease_ids)

    def __iter__(self) -> Iterator[GrantedLease[BlockEntry]]:
        """Each with its writer's session and its last moment."""
        return iter(self._leases)

    def num_of_session(self, session_id: SessionId) -> int:
        """How many one session has left."""
        return self._leases.num_of_session(session_id)

    def leave(self, session_id: SessionId, entry: BlockEntry, now_s: float) -> None:
        """A block for one reader was committed."""
        while self._long_at and self._long_at[0][1] not in self._lease_ids:
            self._long_at.popleft()
        lease = self._leases.grant(self._next_lease_id(), session_id, entry, ttl_s=0, now_s=now_s)
        self._lease_ids[entry] = lease.id
        self._long_at.append((now_s + self._patience_s, entry))

    def drop_of_session(self, session_id: SessionId) -> None:
        """Their writer is gone; a reader's lease over them still keeps their bytes."""
        for lease in self._leases.of_session(session_id):
            self._residence.remove(lease.hold)

    def on_time(self, now_s: float) -> bool:
        """Takes out those for whom nobody came; whether there were any."""
        expired = self._leases.expired(now_s)
        for lease in expired:
            self._residence.remove(lease.hold)
        return bool(expired)

    def next_time_s(self, *, is_room_wanted: bool) -> list[float | None]:
        """When the next one runs out, and where room is wanted when one more may be given up."""
        gives_up = is_room_wanted and self._long_at
        return [self._leases.next_check_s(), self._long_at[0][0] if gives_up else None]

    def note_long(self, now_s: float) -> bool:
        """Whether there are more now that may be given up."""
        num_before = len(self._long)
        while self._long_at and self._long_at[0][0] <= now_s:
            _, entry = self._long_at.popleft()
            if entry in self._lease_ids:
                self._long[entry] = None
        return len(self._long) > num_before

    def for_long(self, now_s: float) -> Iterator[BlockEntry]:
        """Those that may be given up, the longest unread first."""
        self.note_long(now_s)
        return iter(list(self._long))

    def _forget(self, entry: BlockEntry) -> None:
        self._leases.end(self._lease_ids.pop(entry))
        self._long.pop(entry, None)
