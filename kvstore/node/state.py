"""The node's decisions, without I/O, clock or randomness: requests and time in, answers out.

Rules kept here:
- A request is checked whole before anything is allocated for it; one that fails changes nothing.
- A session's end ends its leases, reservations, tails and waiting calls at once. Of one that is cut off while its
  client may live, the reservations stay until its end, in quarantine.
- Whatever frees room serves those who queue for it; whatever makes a block visible, or sure not to come, answers those
  who wait for it: every answer is an effect of the event that made it possible, and nobody polls.

`writing` and `reading` have the two sides' own rules, `residence` what lies where. The doors (service.py, door.py)
turn messages into calls of `on_request`; the shell brings the time, and carries the effects out.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from snowskin.kvstore.errors import (
    BadRequest,
    LimitExceeded,
    NodeDraining,
    PoolExhausted,
    SessionEnded,
)
from snowskin.kvstore.messages import (
    AbortRequest,
    CommitRequest,
    Effect,
    Fail,
    LeaseId,
    MatchRequest,
    NodeStat,
    PoolStat,
    ProbeRequest,
    ReleaseRequest,
    Renewed,
    RenewRequest,
    Reply,
    Request,
    ReserveRequest,
    SessionId,
    StatRequest,
)
from snowskin.kvstore.node.events import PAGE_NBYTES, Subscription
from snowskin.kvstore.node.inspection import Inspection
from snowskin.kvstore.node.limits import MIN_RETRY_S, NodeLimits
from snowskin.kvstore.node.reading import Reading
from snowskin.kvstore.node.residence import Residence
from snowskin.kvstore.node.validation import check_request
from snowskin.kvstore.node.writing import Outcome, WriteHold, Writing
from snowskin.kvstore.pool.pool import Pool, Use
from snowskin.kvstore.session import DEFAULT_TENANT, Session, SessionTable
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from snowskin.kvstore.admin_messages import Evicted, LeaseInfo
    from snowskin.kvstore.eviction.api import EvictionPolicy
    from snowskin.kvstore.index.block_index import BlockEntry, BlockId, PlacedSegment
    from snowskin.kvstore.lease import LeaseGrants
    from snowskin.kvstore.messages import WatchRequest


class NodeState:
    """One storage node."""

    def __init__(
        self,
        *,
        node_id: str,
        epoch: int,
        pools: Sequence[Pool],
        eviction: EvictionPolicy[BlockId],
        limits: NodeLimits | None = None,
    ) -> None:
        """Empty pools, no sessions.

        Args:
            node_id: name of the node, for extents and logs.
            epoch: new at each start.
            pools: one for each tenant.
            eviction: decides who goes first.
            limits: what is granted and accepted.
        """
        self.node_id = node_id
        self.epoch = epoch
        self.limits = limits or NodeLimits()
        self.draining = False
        self.door = ""  # where clients of this host come in; for Stat
        self.advertisement = b""  # how it is reached; for Stat
        self.transports: tuple[str, ...] = ()  # what the data plane serves; for Stat
        self.sessions = SessionTable()
        self.residence = Residence(
            pools,
            eviction,
            node_id=node_id,
            max_extent_nbytes=self.limits.max_extent_nbytes,
            watch_ring_nbytes=self.limits.watch_ring_nbytes,
        )
        self._last_lease_id = 0
        self._writing = Writing(
            self.residence,
            self.sessions,
            self.limits,
            next_lease_id=self._next_lease_id,
            exhausted=self._exhausted,
        )
        self._reading = Reading(
            self.residence,
            self.sessions,
            self.limits,
            node_epoch=epoch,
            next_lease_id=self._next_lease_id,
            writes=self._writing.leases,
        )
        self.inspection = Inspection(
            self.residence,
            self.sessions,
            reading=self._reading,
            writing=self._writing,
        )

    def settle_leases_by(self, settle: Callable[[float], None]) -> None:
        """Has `settle(now_s)` called before a cap on leases is applied: it may say what was released meanwhile."""
        self._reading.shares.settle = settle

    def keep_grants_by(self, grants: LeaseGrants) -> None:
        """Has `grants` renewed with the leases that they are under, and taken back before these are over for others."""
        self._reading.leases.grants = self._writing.leases.grants = grants

    # --- sessions

    def open_session(
        self,
        client_name: str,
        *,
        maps_memory: bool,
        may_write: bool = True,
        tenant: str = DEFAULT_TENANT,
    ) -> Session:
        """A client connected; the tenant comes from its credential."""
        return self.sessions.open(
            client_name, tenant=tenant, maps_memory=maps_memory, may_write=may_write
        )

    def end_session(self, session_id: SessionId, now_s: float) -> list[Effect]:
        """A client is gone: so is all that it held."""
        if self.sessions.end(session_id) is None:
            return []
        self._reading.end_session(session_id)
        return self._settle(self._writing.end_session(session_id), now_s)

    def fence_session(self, session_id: SessionId, now_s: float) -> list[Effect]:
        """A client is cut off that may live: as at its end, but that what it can still write into is quarantined.

        Nothing more may be asked in its name. `holds_nothing` says whether the end need not be waited for.
        """
        if self.sessions.get(session_id) is None:
            return []
        self._reading.end_session(session_id)
        return self._settle(self._writing.fence_session(session_id, now_s), now_s)

    def holder_of(self, lease_id: LeaseId) -> SessionId | None:
        """The session that holds a lease; None where the lease has ended."""
        for table in (self._reading.leases, self._writing.leases):
            if (lease := table.get(lease_id)) is not None:
                return lease.session_id
        return None

    def holds_nothing(self, session_id: SessionId) -> bool:
        """Whether nobody would miss anything if this session ended now."""
        tables = (self._reading.leases, self._writing.leases)
        rooms = (self._reading.waiting, self._writing.waiting)
        return not (
            any(table.num_of_session(session_id) for table in tables)
            or any(room.num_of_session(session_id) for room in rooms)
            or self._writing.unread.num_of_session(session_id)
        )

    # --- requests

    def on_request(
        self, session_id: SessionId, call_id: int, request: Request, now_s: float
    ) -> list[Effect]:
        """One call of one session; its answer is among the effects, now or of a later event."""
        session = self.sessions.get(session_id)
        if session is None:
            gone = SessionEnded(f"session {session_id} is not open", hint="connect again")
            return [Fail(session_id, call_id, gone)]
        try:
            check_request(request, session, self.limits)
            return self._dispatch(session, call_id, request, now_s)
        except SnowskinError as error:
            return [Fail(session_id, call_id, error)]

    def _dispatch(
        self, session: Session, call_id: int, request: Request, now_s: float
    ) -> list[Effect]:
        match request:
            case MatchRequest():
                self._check_may_lease(session)
                return self._reading.match(session, call_id, request, now_s)
            case ReleaseRequest():
                reply = Reply(session.id, call_id, self._reading.release(session, request, now_s))
                if not len(self._writing.waiting):
                    return [reply]
                return [reply, *self._writing.serve_waiting(now_s)]
            case ReserveRequest():
                self._check_may_lease(session)
                return self._writing.reserve(session, call_id, request, now_s)
            case CommitRequest():
                return self._settle(self._writing.commit(session, call_id, request, now_s), now_s)
            case AbortRequest():
                return self._settle(self._writing.abort(session, call_id, request, now_s), now_s)
            case ProbeRequest():
                return [Reply(session.id, call_id, self._reading.probe(session, request))]
            case RenewRequest():
                return [Reply(session.id, call_id, self._renew(session, request, now_s))]
            case StatRequest():
                return [Reply(session.id, call_id, self.stat())]
        raise BadRequest(f"a {type(request).__name__} is not a request to a node")

    def cancel(self, session_id: SessionId, call_id: int, now_s: float) -> list[Effect]:
        """Nobody waits for this call's answer any more; those who queued behind it may be served."""
        for room in (self._reading.waiting, self._writing.waiting):
            for call in room.of_session(session_id):
                if call.call_id == call_id:
                    room.remove(call)
        return self._writing.serve_waiting(now_s)

    def drain(self) -> list[Effect]:
        """Grants no new leases from now on; whoever waits for one is told."""
        self.draining = True
        effects: list[Effect] = []
        for room in (self._reading.waiting, self._writing.waiting):
            for call in room:
                room.remove(call)
                effects.append(Fail(call.session_id, call.call_id, self._is_draining()))
        return effects

    def _is_draining(self) -> NodeDraining:
        return NodeDraining(f"node {self.node_id} is draining", hint="use another node")

    def _check_may_lease(self, session: Session) -> None:
        if self.draining:
            raise self._is_draining()
        num_leases = sum(
            table.num_of_session(session.id)
            for table in (self._reading.leases, self._writing.leases)
        )
        if num_leases >= self.limits.max_leases_per_session:
            raise LimitExceeded(
                f"session of {session.client_name!r} holds {num_leases} leases",
                hint="release what was read, or raise the limit",
            )

    def _settle(self, outcome: Outcome, now_s: float) -> list[Effect]:
        """The writers' side changed: tell those whom it concerns."""
        effects = outcome.effects
        for at in outcome.visible:
            effects += self._reading.wake(at, now_s)
        for at in outcome.gone:
            effects += self._reading.give_up(at, now_s)
        if outcome.may_have_freed:
            effects += self._writing.serve_waiting(now_s)
        return effects

    def _renew(self, session: Session, request: RenewRequest, now_s: float) -> Renewed:
        lives = []
        for lease_id in request.lease_ids:
            life_s = 0.0
            for table in (self._reading.leases, self._writing.leases):
                lease = table.get(lease_id)
                if lease is not None and lease.session_id == session.id:
                    life_s = table.renew(lease_id, ttl_s=request.ttl_s, now_s=now_s)
            lives.append(life_s)
        return Renewed(ttl_s=tuple(lives))

    # --- time

    def on_time(self, now_s: float) -> list[Effect]:
        """What ran out by `now_s` ends; the shell calls it no later than `next_time_s`."""
        freed = self._reading.on_time(now_s)
        outcome = self._writing.on_time(now_s)
        outcome.may_have_freed |= freed
        effects = self._settle(outcome, now_s)
        effects += self._reading.answer_overdue(now_s)
        effects += self._writing.fail_overdue(now_s)
        return effects

    def next_time_s(self) -> float | None:
        """When `on_time` is due; None while nothing can run out."""
        times = [*self._reading.next_time_s(), *self._writing.next_time_s()]
        return min((time_s for time_s in times if time_s is not None), default=None)

    # --- for the gRPC door, which moves bytes itself

    def readable(self, lease_id: LeaseId, shard_index: int, now_s: float) -> list[BlockEntry]:
        """The blocks under a live read lease; asked again before every chunk."""
        return self._reading.readable(lease_id, shard_index, now_s)

    def writable(self, lease_id: LeaseId, now_s: float) -> WriteHold:
        """The blocks under a live write lease; asked again before every chunk."""
        return self._writing.writable(lease_id, now_s)

    def left_to_write(
        self, lease_id: LeaseId, now_s: float
    ) -> tuple[list[tuple[int, int, int]], float]:
        """Pool, offset and bytes of each block that a write lease has not committed, and the life it has left."""
        lease = self._writing.leases.get(lease_id)
        if lease is None or not lease.is_live(now_s):
            return [], 0.0
        left = [
            (block.segment.pool_id, block.offset, block.segment.block_nbytes)
            for block in lease.hold.left
        ]
        return left, lease.expires_at_s - now_s

    # --- for those who watch

    def watch(
        self,
        request: WatchRequest,
        *,
        tenant: str = DEFAULT_TENANT,
        budget_nbytes: int = PAGE_NBYTES,
    ) -> Subscription:
        """Where a new subscriber stands; NodeDraining where its blocks can be matched no more."""
        if self.draining:
            raise self._is_draining()
        return Subscription(
            request,
            events=self.residence.events[tenant],
            index=self.residence.index,
            tenant=tenant,
            epoch=self.epoch,
            budget_nbytes=budget_nbytes,
        )

    # --- for its operator

    def revoke_lease(self, lease_id: LeaseId, now_s: float) -> tuple[LeaseInfo, list[Effect]]:
        """A lease is over from now on; LeaseUnknown where there is none."""
        info, outcome = self.inspection.revoke(lease_id, now_s)
        # One without a grace is over for everybody.
        return info, self._settle(outcome, now_s) + self.on_time(now_s)

    def evict(
        self,
        namespaces: Sequence[bytes],
        keys: Sequence[bytes],
        now_s: float,
        *,
        dry_run: bool = False,
        tenant: str = DEFAULT_TENANT,
    ) -> tuple[Evicted, list[Effect]]:
        """Blocks that nobody holds go; each key counts once, whatever number of shards it is asked of."""
        evicted = self.inspection.evict(tenant, namespaces, keys, dry_run=dry_run)
        return evicted, self._writing.serve_waiting(now_s)

    # --- seen from outside

    def stat(self) -> NodeStat:
        """Counts and sizes."""
        return NodeStat(
            node_id=self.node_id,
            node_epoch=self.epoch,
            pools=tuple(_pool_stat(pool) for pool in self.residence.pools.values()),
            num_blocks=len(self.residence.index),
            num_read_leases=len(self._reading.leases),
            num_write_leases=len(self._writing.leases),
            num_sessions=len(self.sessions),
            num_waiting_matches=len(self._reading.waiting),
            num_waiting_reserves=len(self._writing.waiting),
            counters=dict(self.residence.counters),
            draining=self.draining,
            door=self.door,
            transports=self.transports,
            advertisement=self.advertisement,
        )

    @property
    def has_waiting_reserves(self) -> bool:
        """Whether somebody waits for room."""
        return len(self._writing.waiting) > 0

    def is_idle(self) -> bool:
        """Whether no lease is out: a draining node may end."""
        return len(self._reading.leases) == 0 and len(self._writing.leases) == 0

    def check(self) -> None:
        """Asserts that the books agree; for tests."""
        num_leases: Counter[PlacedSegment] = Counter()
        for read in self._reading.leases:
            num_leases.update(read.hold.segments)
        for write in self._writing.leases:
            num_leases.update(write.hold.parents)
        self.residence.check(num_leases, self._writing.reserved_ranges())
        self._writing.check()

    def _next_lease_id(self) -> LeaseId:
        self._last_lease_id += 1
        return LeaseId(self._last_lease_id)

    def _exhausted(self, session: Session, request: ReserveRequest, now_s: float) -> PoolExhausted:
        """Who holds the space of a full pool, and when to retry."""
        pool = self.residence.pool_of(session.tenant)
        held: Counter[SessionId] = Counter()
        soonest_s = self.limits.write_lease_s
        for session_id, nbytes, expires_at_s in self._holdings(pool):
            if nbytes:
                held[session_id] += nbytes
                if expires_at_s > now_s:  # one that is over holds on to a quarantine: no promise
                    soonest_s = min(soonest_s, expires_at_s - now_s)
        names = {s.id: s.client_name for s in self.sessions}
        holders = ", ".join(
            f"{names.get(session_id, session_id)} {nbytes} bytes"
            for session_id, nbytes in held.most_common(4)
        )
        block_nbytes = request.tail.nbytes if request.tail else request.block_nbytes
        self.residence.counters["reserves_refused"] += 1
        return PoolExhausted(
            f"pool {pool.id} of node {self.node_id}: up to {block_nbytes * max(1, len(request.keys))} bytes wanted, "
            f"{pool.free_nbytes} free, largest hole {pool.largest_hole_nbytes}, under lease {pool.leased_nbytes}, "
            f"reserved {pool.used_nbytes(Use.RESERVED)}, quarantined {pool.used_nbytes(Use.QUARANTINED)} "
            f"of {pool.capacity_nbytes}; held by: {holders or 'nobody'}",
            hint="retry when leases have ended, or raise dram_nbytes",
            retry_after_s=max(MIN_RETRY_S, soonest_s),
        )

    def _holdings(self, pool: Pool) -> Iterator[tuple[SessionId, int, float]]:
        """(holder, bytes, end of the lease) of what cannot be evicted from `pool`."""
        for write in self._writing.leases:
            segments = [block.segment for block in write.hold.left]
            nbytes = sum(s.block_nbytes for s in segments if s.pool_id == pool.id)
            yield write.session_id, nbytes, write.expires_at_s
        for read in self._reading.leases:
            nbytes = sum(
                s.num_committed * s.block_nbytes for s in read.hold.segments if s.pool_id == pool.id
            )
            yield read.session_id, nbytes, read.expires_at_s
        for unread in self._writing.unread:
            segment = unread.hold.segment
            if segment.pool_id == pool.id:
                yield unread.session_id, segment.block_nbytes, unread.expires_at_s


def _pool_stat(pool: Pool) -> PoolStat:
    return PoolStat(
        pool_id=pool.id,
        tier=pool.tier,
        tenant=pool.tenant,
        capacity_nbytes=pool.capacity_nbytes,
        free_nbytes=pool.free_nbytes,
        committed_nbytes=pool.used_nbytes(Use.COMMITTED),
        reserved_nbytes=pool.used_nbytes(Use.RESERVED),
        quarantined_nbytes=pool.used_nbytes(Use.QUARANTINED),
        largest_hole_nbytes=pool.largest_hole_nbytes,
        leased_nbytes=pool.leased_nbytes,
    )
