"""How much may be leased at once: of a pool, and by one client.

Rules kept here: what is leased cannot be evicted. So all readers together lease no more of a pool than
`max_leased_ratio`, and one client no more than `max_client_leased_ratio`. A segment counts whole, because a lease over
one of its blocks keeps all of them, and once, however many leases cover it: for the pool, and for each client. A run
that would pass a cap ends before it does. Small pools must be readable too: a client that reads nothing yet may begin
with one segment, whatever its size, and while nobody reads it may so whatever writers have pinned. What a leased
segment grows by later commits is not taken back, and tails do not ask: they are short, and leave with their reader.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from snowskin.kvstore.errors import LeaseShareExceeded
from snowskin.kvstore.node.limits import MIN_RETRY_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from snowskin.kvstore.index.block_index import PlacedSegment
    from snowskin.kvstore.lease import GrantedLease, LeaseTable
    from snowskin.kvstore.messages import SessionId
    from snowskin.kvstore.node.limits import NodeLimits
    from snowskin.kvstore.node.reading import ReadHold
    from snowskin.kvstore.node.residence import Residence
    from snowskin.kvstore.node.writing import WriteHold
    from snowskin.kvstore.pool.pool import Pool
    from snowskin.kvstore.session import Session, SessionTable

NUM_NAMED = 4


class LeaseShares:
    """What readers may still lease on one node."""

    def __init__(
        self,
        residence: Residence,
        sessions: SessionTable,
        limits: NodeLimits,
        *,
        reads: LeaseTable[ReadHold],
        writes: LeaseTable[WriteHold],
    ) -> None:
        """Counts what `reads` lease and `writes` pin."""
        self._sessions = sessions
        self._limits = limits
        self._reads = reads
        self._writes = writes
        ratio = min(limits.max_leased_ratio, limits.max_client_leased_ratio)
        self.bounds = {
            pool.tenant: (pool, int(pool.capacity_nbytes * ratio))
            for pool in residence.pools.values()
        }
        """By tenant: its pool, and how much of it may be leased before anybody need be counted, since no client leases
        more than all of them. Compared in every match, hence no method."""
        self.settle: Callable[[float], None] = lambda now_s: None
        """Called before anybody is counted: what readers have released, but nobody was told of yet, comes first."""

    def num_leasable(
        self, session: Session, starts: Iterable[tuple[int, PlacedSegment]], num_blocks: int
    ) -> int:
        """How many blocks of a run may be leased.

        Args:
            session: who asks.
            starts: for each piece of the run the index of its first block and its segment, in any order.
            num_blocks: of the whole run.
        """
        pool, _ = self.bounds[session.tenant]
        pool_cap = int(pool.capacity_nbytes * self._limits.max_leased_ratio)
        client_cap = int(pool.capacity_nbytes * self._limits.max_client_leased_ratio)
        own = self._held_by(session.id)
        own_nbytes = sum(map(_nbytes, own))
        pool_nbytes = pool.leased_nbytes
        is_first = self._reads.num_of_session(session.id) == 0
        is_alone = not any(self._reads_of(pool))
        for first_block_index, segment in sorted(starts, key=lambda start: start[0]):
            nbytes = _nbytes(segment)
            if segment not in own:
                own.add(segment)
                own_nbytes += nbytes
                if own_nbytes > client_cap and not (is_first and first_block_index == 0):
                    return first_block_index
                if segment.num_leases == 0:
                    pool_nbytes += nbytes
                    if pool_nbytes > pool_cap and not (is_alone and first_block_index == 0):
                        return first_block_index
        return num_blocks

    def exceeded(self, session: Session, now_s: float) -> LeaseShareExceeded:
        """Why not even the first block can be leased, who holds the leases, and when the next one ends by itself."""
        pool, _ = self.bounds[session.tenant]
        held: dict[SessionId, set[PlacedSegment]] = {}
        soonest_s = self._limits.read_lease_s
        for lease in self._reads_of(pool):
            held.setdefault(lease.session_id, set()).update(lease.hold.segments)
            if lease.is_live(now_s):
                soonest_s = min(soonest_s, lease.expires_at_s - now_s)
        for session_id in {lease.session_id for lease in self._writes}:
            held.setdefault(session_id, set()).update(self._pinned_by(session_id))
        nbytes_of = Counter({who: sum(map(_nbytes, segments)) for who, segments in held.items()})
        names = {s.id: s.client_name for s in self._sessions}
        holders = ", ".join(
            f"{names.get(who, who)} {nbytes} bytes"
            for who, nbytes in nbytes_of.most_common(NUM_NAMED)
            if nbytes
        )
        return LeaseShareExceeded(
            f"{session.client_name!r} leases {nbytes_of[session.id]} bytes of pool {pool.id} and may lease "
            f"{int(pool.capacity_nbytes * self._limits.max_client_leased_ratio)}; {pool.leased_nbytes} are leased in "
            f"all, {int(pool.capacity_nbytes * self._limits.max_leased_ratio)} of {pool.capacity_nbytes} may be; "
            f"held by: {holders or 'nobody'}",
            hint="release what was read and ask again, or raise max_leased_ratio and max_client_leased_ratio",
            retry_after_s=max(MIN_RETRY_S, soonest_s),
        )

    def _held_by(self, session_id: SessionId) -> set[PlacedSegment]:
        """Segments that a client reads, or has pinned as parents of what it writes."""
        own = self._pinned_by(session_id)
        for read in self._reads.of_session(session_id):
            own.update(read.hold.segments)
        return own

    def _pinned_by(self, session_id: SessionId) -> set[PlacedSegment]:
        return {s for write in self._writes.of_session(session_id) for s in write.hold.parents}

    def _reads_of(self, pool: Pool) -> Iterator[GrantedLease[ReadHold]]:
        """Read leases over segments of one pool."""
        return (lease for lease in self._reads if lease.hold.segments[0].pool_id == pool.id)


def _nbytes(segment: PlacedSegment) -> int:
    """What a lease over any of its blocks keeps."""
    return segment.num_committed * segment.block_nbytes
