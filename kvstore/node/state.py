"""The node's decisions, without I/O, clock or randomness: requests and time in, answers out.

Rules kept here:
- A request is checked whole before anything is allocated for it; one that fails changes nothing.
- A block becomes visible by Commit alone, in the prefix order of its reservation. Of two writers of one block the
  first to commit wins, and the other is told.
- A session's end ends its leases, reservations, tails and waiting calls at once.
- A write lease that runs out is fenced: nothing is committed under it any more. If its session maps memory, its bytes
  are quarantined until the writer gives them back (Abort) or its session ends; otherwise they are free.
- Every answer is an effect of the event that made it possible; nobody polls.

The doors (service.py, door.py) turn messages into calls of `on_request`, the daemon brings the time, and both carry
the effects out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.kvstore.checksum import CHECKSUM_NBYTES
from snowskin.kvstore.errors import (
    BadRequest,
    CommitRefused,
    LeaseExpired,
    LeaseUnknown,
    LimitExceeded,
    NodeDraining,
    PoolExhausted,
    SessionEnded,
    TailUnknown,
)
from snowskin.kvstore.index.block_index import (
    BlockEntry,
    BlockId,
    PlacedSegment,
    Scope,
    longest_run,
    present_bitmap,
)
from snowskin.kvstore.lease import GrantedLease, LeaseTable
from snowskin.kvstore.messages import (
    Aborted,
    AbortRequest,
    CommitRequest,
    Committed,
    Effect,
    Fail,
    Lease,
    LeaseId,
    Matched,
    MatchRequest,
    NodeStat,
    PoolStat,
    Probed,
    ProbeRequest,
    Released,
    ReleaseRequest,
    Renewed,
    RenewRequest,
    Reply,
    ReplyMessage,
    Request,
    Reserved,
    ReserveRequest,
    Run,
    SessionId,
    StatRequest,
    WakeReason,
)
from snowskin.kvstore.node.limits import NodeLimits
from snowskin.kvstore.node.residence import TAIL_NAMESPACE, Residence
from snowskin.kvstore.node.validation import check_request
from snowskin.kvstore.node.waiting import WaitingCall, WaitingRoom, WaitKey
from snowskin.kvstore.pool.pool import Pool, Use
from snowskin.kvstore.segment import Extent
from snowskin.kvstore.session import DEFAULT_TENANT, Session, SessionTable
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.kvstore.eviction.api import EvictionPolicy


@dataclass(slots=True, eq=False)
class NewBlock:
    """One block of a reservation: which, and where its bytes go."""

    key_index: int
    key: bytes
    parent_key: bytes
    segment: PlacedSegment
    offset: int


@dataclass(slots=True, eq=False)
class WriteHold:
    """What a write lease protects: its new blocks from `num_committed` on, and the parents it named."""

    scope: Scope
    blocks: list[NewBlock]
    parents: list[PlacedSegment]
    one_reader: bool
    num_committed: int = 0
    use: Use = Use.RESERVED

    @property
    def num_left(self) -> int:
        """Blocks not committed yet."""
        return len(self.blocks) - self.num_committed


@dataclass(slots=True, eq=False)
class ReadHold:
    """What a read lease protects: a run of entries for each shard."""

    shards: list[list[BlockEntry]]
    segments: list[PlacedSegment]


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
        self.residence = Residence(pools, eviction, max_extent_nbytes=self.limits.max_extent_nbytes)
        self.sessions = SessionTable()
        self.draining = False
        grace_s, life_s = self.limits.grace_s, self.limits.lease_life_s
        self._reads: LeaseTable[ReadHold] = LeaseTable(
            max_ttl_s=self.limits.read_lease_s, grace_s=grace_s, max_life_s=life_s
        )
        self._writes: LeaseTable[WriteHold] = LeaseTable(
            max_ttl_s=self.limits.write_lease_s, grace_s=grace_s, max_life_s=life_s
        )
        # A block for one reader that nobody fetched goes when this lease of its own runs out.
        self._unread: LeaseTable[BlockEntry] = LeaseTable(
            max_ttl_s=self.limits.write_lease_s, grace_s=grace_s, max_life_s=life_s
        )
        self._matches = WaitingRoom()
        self._reserves = WaitingRoom()
        self._reserved: Counter[WaitKey] = Counter()
        self._last_lease_id = 0

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
        for room in (self._matches, self._reserves):
            for call in room.of_session(session_id):
                room.remove(call)
        effects: list[Effect] = []
        for read in self._reads.of_session(session_id):
            self._end_read(read)
        for write in self._writes.of_session(session_id):
            effects += self._end_write(write, now_s)
        for unread in self._unread.of_session(session_id):
            self._drop_unread(unread)
        return effects + self._serve_reserves(now_s)

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
            match request:
                case MatchRequest():
                    return self._on_match(session, call_id, request, now_s)
                case ReleaseRequest():
                    return self._on_release(session, call_id, request, now_s)
                case ReserveRequest():
                    return self._on_reserve(session, call_id, request, now_s)
                case CommitRequest():
                    return self._on_commit(session, call_id, request, now_s)
                case AbortRequest():
                    return self._on_abort(session, call_id, request, now_s)
            return [Reply(session_id, call_id, self._answer(session, request, now_s))]
        except SnowskinError as error:
            return [Fail(session_id, call_id, error)]

    def _answer(self, session: Session, request: Request, now_s: float) -> ReplyMessage:
        match request:
            case ProbeRequest():
                return self._on_probe(session, request)
            case RenewRequest():
                return self._on_renew(session, request, now_s)
            case StatRequest():
                return self.stat()
        raise BadRequest(f"a {type(request).__name__} is not a request to a node")

    def cancel(self, session_id: SessionId, call_id: int) -> None:
        """Nobody waits for this call's answer any more; without effect where it was answered."""
        for room in (self._matches, self._reserves):
            for call in room.of_session(session_id):
                if call.call_id == call_id:
                    room.remove(call)

    # --- reserve

    def _on_reserve(
        self, session: Session, call_id: int, request: ReserveRequest, now_s: float
    ) -> list[Effect]:
        if self.draining:
            raise NodeDraining(f"node {self.node_id} is draining", hint="use another node")
        self._check_fits(session, request)
        reserved = None
        if not len(self._reserves):  # nobody overtakes those who queue
            reserved = self._try_reserve(session, request, now_s)
        if reserved is not None:
            return [Reply(session.id, call_id, reserved)]
        if request.timeout_s <= 0:
            raise self._exhausted(session, request, now_s)
        if len(self._reserves) >= self.limits.max_waiting:
            raise LimitExceeded(
                f"{len(self._reserves)} reservations queue already", hint="retry later"
            )
        deadline_s = now_s + min(request.timeout_s, self.limits.max_timeout_s)
        self._reserves.add(WaitingCall(session.id, call_id, request, deadline_s))
        return []

    def _check_fits(self, session: Session, request: ReserveRequest) -> None:
        pool = self.residence.pool_of(session.tenant)
        need_nbytes = request.tail.nbytes if request.tail else request.block_nbytes
        if need_nbytes > min(self.limits.max_extent_nbytes, pool.capacity_nbytes):
            raise LimitExceeded(
                f"a block of {need_nbytes} bytes is longer than an extent may be "
                f"({min(self.limits.max_extent_nbytes, pool.capacity_nbytes)})",
                hint="use smaller blocks, or raise max_extent_nbytes and the pool",
            )
        if request.tail is None and request.block_nbytes * len(request.keys) > pool.capacity_nbytes:
            raise LimitExceeded(
                f"{len(request.keys)} blocks of {request.block_nbytes} bytes are more than the whole pool "
                f"({pool.capacity_nbytes})",
                hint="reserve chunk by chunk, or raise dram_nbytes",
            )
        if request.tail is None:
            scope = self.residence.index.scope(session.tenant, request.namespace)
            if scope is not None and scope.block_nbytes != request.block_nbytes:
                raise BadRequest(
                    f"blocks of this namespace have {scope.block_nbytes} bytes, not {request.block_nbytes}",
                    hint="two layouts must have two namespaces",
                )

    def _try_reserve(
        self, session: Session, request: ReserveRequest, now_s: float
    ) -> Reserved | None:
        """The reservation, or None while there is no room."""
        index = self.residence.index
        if request.tail is not None:
            scope = index.open_scope(session.tenant, TAIL_NAMESPACE, 0)
            missing = [(0, request.tail.request_id.encode(), b"")]
            block_nbytes = request.tail.nbytes
            if missing[0][1] in scope.blocks:
                raise BadRequest(
                    f"a tail of request {request.tail.request_id!r} is here already",
                    hint="one tail a request; use a new id for a retry",
                )
            near, known = None, []
        else:
            scope = index.open_scope(session.tenant, request.namespace, request.block_nbytes)
            block_nbytes = request.block_nbytes
            missing, known = _missing_and_known(scope, request)
            near = _parent_of_first(scope, missing)
        if not missing:
            return Reserved(lease=None, runs=())
        parents = _distinct_segments([*known, *([near] if near else [])])
        # Named parents must survive the eviction that makes room for their children.
        self.residence.lease(parents)
        segments = self.residence.reserve(session.tenant, len(missing), block_nbytes, near=near)
        if segments is None:
            self.residence.unlease(parents)
            return None
        blocks = _lay_out(missing, segments)
        hold = WriteHold(
            scope, blocks, parents, one_reader=request.one_reader or request.tail is not None
        )
        lease = self._writes.grant(
            self._next_lease_id(), session.id, hold, ttl_s=request.ttl_s, now_s=now_s
        )
        for block in blocks:
            self._reserved[scope.tenant, scope.namespace, block.key] += 1
        return Reserved(lease=_granted(lease, now_s), runs=self._writable_runs(blocks))

    def _writable_runs(self, blocks: list[NewBlock]) -> tuple[Run, ...]:
        runs: list[Run] = []
        start = 0
        for end in range(1, len(blocks) + 1):
            if end < len(blocks):
                here, before = blocks[end], blocks[end - 1]
                if here.segment is before.segment and here.key_index == before.key_index + 1:
                    continue
            first = blocks[start]
            runs.append(
                Run(
                    extent=self._extent(first.segment, first.offset, end - start),
                    first_block_index=first.key_index,
                    num_blocks=end - start,
                )
            )
            start = end
        return tuple(runs)

    def _extent(self, segment: PlacedSegment, offset: int, num_blocks: int) -> Extent:
        return Extent(
            node_id=self.node_id,
            tier=self.residence.pools[segment.pool_id].tier,
            pool_id=segment.pool_id,
            offset=offset,
            nbytes=num_blocks * segment.block_nbytes,
            generation=segment.generation,
        )

    def _serve_reserves(self, now_s: float) -> list[Effect]:
        """Room may have come free: whoever came first gets it first."""
        effects: list[Effect] = []
        while (call := self._reserves.first()) is not None:
            session = self.sessions.get(call.session_id)
            assert session is not None, "a waiting call outlived its session"
            assert isinstance(call.request, ReserveRequest)
            try:
                reserved = self._try_reserve(session, call.request, now_s)
            except SnowskinError as error:
                self._reserves.remove(call)
                effects.append(Fail(call.session_id, call.call_id, error))
                continue
            if reserved is None:
                break
            self._reserves.remove(call)
            effects.append(Reply(call.session_id, call.call_id, reserved))
        return effects

    def _exhausted(self, session: Session, request: ReserveRequest, now_s: float) -> PoolExhausted:
        pool = self.residence.pool_of(session.tenant)
        need_nbytes = (
            request.tail.nbytes if request.tail else request.block_nbytes * len(request.keys)
        )
        held: Counter[str] = Counter()
        soonest_s = self.limits.write_lease_s
        for write in self._writes:
            name = self._client_name(write.session_id)
            left = write.hold.blocks[write.hold.num_committed :]
            held[name] += sum(block.segment.block_nbytes for block in left)
            soonest_s = min(soonest_s, max(0.0, write.expires_at_s - now_s))
        for read in self._reads:
            name = self._client_name(read.session_id)
            held[name] += sum(s.num_committed * s.block_nbytes for s in read.hold.segments)
            soonest_s = min(soonest_s, max(0.0, read.expires_at_s - now_s))
        holders = ", ".join(f"{name} {nbytes} bytes" for name, nbytes in held.most_common(4))
        self.residence.counters["reserves_refused"] += 1
        return PoolExhausted(
            f"pool {pool.id} of node {self.node_id}: up to {need_nbytes} bytes wanted, {pool.free_nbytes} free, "
            f"largest hole {pool.largest_hole_nbytes}, under lease {pool.leased_nbytes}, "
            f"reserved {pool.used_nbytes(Use.RESERVED)}, quarantined {pool.used_nbytes(Use.QUARANTINED)} "
            f"of {pool.capacity_nbytes}; held by: {holders or 'nobody'}",
            hint="retry when leases have ended, or raise dram_nbytes",
            retry_after_s=max(0.05, soonest_s),
        )

    def _client_name(self, session_id: SessionId) -> str:
        session = self.sessions.get(session_id)
        return session.client_name if session else f"session {session_id}"

    # --- commit and abort

    def _own_write(self, session: Session, lease_id: LeaseId) -> GrantedLease[WriteHold]:
        lease = self._writes.get(lease_id)
        if lease is None or lease.session_id != session.id:
            raise LeaseUnknown(
                f"write lease {lease_id} is not known here",
                hint="it ended, or the node restarted: reserve again",
            )
        return lease

    def _on_commit(
        self, session: Session, call_id: int, request: CommitRequest, now_s: float
    ) -> list[Effect]:
        lease = self._own_write(session, request.lease_id)
        hold = lease.hold
        if not lease.is_live(now_s):
            raise LeaseExpired(
                f"write lease {lease.id} ran out {now_s - lease.expires_at_s:.3f} s ago; nothing was committed",
                hint="abort it and reserve again",
            )
        if request.num_blocks > hold.num_left:
            raise CommitRefused(
                f"{request.num_blocks} blocks committed, but only {hold.num_left} of this reservation are left",
                hint="commit each block once, in order",
            )
        existing: list[int] = []
        effects: list[Effect] = []
        committed = []
        for position in range(request.num_blocks):
            block = hold.blocks[hold.num_committed]
            hold.num_committed += 1
            at = (hold.scope.tenant, hold.scope.namespace, block.key)
            self._unreserve(at)
            start = position * CHECKSUM_NBYTES
            entry = self.residence.commit(
                hold.scope,
                block.key,
                block.segment,
                block.offset,
                request.checksums[start : start + CHECKSUM_NBYTES],
                parent_key=block.parent_key,
                one_reader_of=session.id if hold.one_reader else None,
            )
            if entry is None:
                existing.append(block.key_index)
                continue
            committed.append(at)
            if entry.one_reader:
                self._unread.grant(self._next_lease_id(), session.id, entry, ttl_s=0, now_s=now_s)
        num_left = hold.num_left
        if num_left == 0:
            effects += self._end_write(lease, now_s)
        reply = Committed(existing_block_indices=tuple(existing), num_blocks_left=num_left)
        effects.insert(0, Reply(session.id, call_id, reply))
        for at in committed:
            effects += self._wake_matches(at, now_s)
        if existing or num_left == 0 or len(self._reserves):
            effects += self._serve_reserves(now_s)
        return effects

    def _unreserve(self, at: WaitKey) -> None:
        self._reserved[at] -= 1
        if self._reserved[at] <= 0:
            del self._reserved[at]

    def _on_abort(
        self, session: Session, call_id: int, request: AbortRequest, now_s: float
    ) -> list[Effect]:
        lease = self._own_write(session, request.lease_id)
        freed_nbytes = sum(
            block.segment.block_nbytes for block in lease.hold.blocks[lease.hold.num_committed :]
        )
        effects = self._end_write(lease, now_s)
        effects.insert(0, Reply(session.id, call_id, Aborted(freed_nbytes=freed_nbytes)))
        return effects + self._serve_reserves(now_s)

    def _end_write(self, lease: GrantedLease[WriteHold], now_s: float) -> list[Effect]:
        """The writer writes no more: what it did not commit comes back, who waited for it is told."""
        self._writes.end(lease.id)
        hold = lease.hold
        left = hold.blocks[hold.num_committed :]
        for block in left:
            self.residence.give_back(block.segment, block.offset, hold.use)
        self.residence.unlease(hold.parents)
        return self._writer_gone(hold, now_s)

    def _writer_gone(self, hold: WriteHold, now_s: float) -> list[Effect]:
        if hold.use is Use.QUARANTINED:
            return []  # told when it was fenced
        effects: list[Effect] = []
        for block in hold.blocks[hold.num_committed :]:
            at = (hold.scope.tenant, hold.scope.namespace, block.key)
            self._unreserve(at)
            if at not in self._reserved:
                for call in self._matches.waiting_at(at):
                    effects += self._finish_match(call, WakeReason.WRITER_GONE, now_s)
        return effects

    def _fence(self, lease: GrantedLease[WriteHold], now_s: float) -> list[Effect]:
        """A write lease ran out and its grace too."""
        session = self.sessions.get(lease.session_id)
        self.residence.counters["write_leases_expired"] += 1
        if session is None or not session.maps_memory:
            return self._end_write(lease, now_s)
        hold = lease.hold
        effects = self._writer_gone(hold, now_s)
        for block in hold.blocks[hold.num_committed :]:
            self.residence.quarantine(block.segment, 1)
        hold.use = Use.QUARANTINED
        self.residence.unlease(hold.parents)
        hold.parents = []
        return effects

    # --- probe, match, renew, release

    def _on_probe(self, session: Session, request: ProbeRequest) -> Probed:
        index = self.residence.index
        scopes = [index.scope(session.tenant, namespace) for namespace in request.namespaces]
        bitmap = present_bitmap(scopes, request.keys)
        num_blocks = 0
        while num_blocks < len(request.keys) and bitmap[num_blocks >> 3] >> (num_blocks & 7) & 1:
            num_blocks += 1
        return Probed(num_blocks=num_blocks, present_bitmap=bitmap, node_epoch=self.epoch)

    def _on_match(
        self, session: Session, call_id: int, request: MatchRequest, now_s: float
    ) -> list[Effect]:
        if self.draining:
            raise NodeDraining(f"node {self.node_id} is draining", hint="use another node")
        shards, missing = self._find(session, request)
        num_blocks = len(shards[0])
        if num_blocks >= request.wait_blocks or missing is None or request.timeout_s <= 0:
            if request.tail_request_id and num_blocks == 0:
                raise self._no_tail(request)
            matched = self._grant_match(session, request, shards, WakeReason.SATISFIED, now_s)
            return [Reply(session.id, call_id, matched)]
        if len(self._matches) >= self.limits.max_waiting:
            raise LimitExceeded(f"{len(self._matches)} matches wait already", hint="retry later")
        deadline_s = now_s + min(request.timeout_s, self.limits.max_timeout_s)
        self._matches.add(WaitingCall(session.id, call_id, request, deadline_s, at=missing))
        return []

    def _find(
        self, session: Session, request: MatchRequest
    ) -> tuple[list[list[BlockEntry]], WaitKey | None]:
        """The common gapless run of each shard, and the block at which it ends for want of it."""
        index = self.residence.index
        if request.tail_request_id:
            key = request.tail_request_id.encode()
            scope = index.scope(session.tenant, TAIL_NAMESPACE)
            entry = scope.blocks.get(key) if scope else None
            if entry is None or entry.is_taken:
                return [[]], (session.tenant, TAIL_NAMESPACE, key)
            return [[entry]], None
        limit = len(request.keys)
        if request.max_blocks:
            limit = min(limit, request.max_blocks)
        shards: list[list[BlockEntry]] = []
        missing: WaitKey | None = None
        for namespace in request.namespaces:
            scope = index.scope(session.tenant, namespace)
            run = longest_run(scope.blocks, request.keys, limit) if scope else []
            if len(run) < limit:
                limit = len(run)
                missing = (session.tenant, namespace, request.keys[limit])
            shards.append(run)
        return [run[:limit] if len(run) > limit else run for run in shards], missing

    def _grant_match(
        self,
        session: Session,
        request: MatchRequest,
        shards: list[list[BlockEntry]],
        reason: WakeReason,
        now_s: float,
    ) -> Matched:
        counters = self.residence.counters
        counters["matches"] += 1
        num_blocks = len(shards[0])
        counters["blocks_matched"] += num_blocks * len(shards)
        if num_blocks == 0:
            return Matched(
                num_blocks=0,
                lease=None,
                runs=(),
                checksums=(),
                wake_reason=reason,
                node_epoch=self.epoch,
            )
        runs: list[Run] = []
        segments: list[PlacedSegment] = []
        for shard_index, entries in enumerate(shards):
            self._collect_runs(entries, shard_index, runs, segments)
            self.residence.touch(entries)
        self.residence.lease(segments)
        if request.tail_request_id:
            shards[0][0].is_taken = True
        lease = self._reads.grant(
            self._next_lease_id(),
            session.id,
            ReadHold(shards, segments),
            ttl_s=request.ttl_s,
            now_s=now_s,
        )
        return Matched(
            num_blocks=num_blocks,
            lease=_granted(lease, now_s),
            runs=tuple(runs),
            checksums=tuple(b"".join([e.checksum for e in entries]) for entries in shards),
            wake_reason=reason,
            node_epoch=self.epoch,
        )

    def _collect_runs(
        self,
        entries: list[BlockEntry],
        shard_index: int,
        runs: list[Run],
        segments: list[PlacedSegment],
    ) -> None:
        """Appends the runs of one shard, and each run's segment."""
        start, end, total = 0, 1, len(entries)
        while start < total:
            first = entries[start]
            segment, nbytes, offset = first.segment, first.segment.block_nbytes, first.offset
            while end < total:
                entry = entries[end]
                if entry.segment is not segment or entry.offset != offset + nbytes:
                    break
                offset += nbytes
                end += 1
            runs.append(
                Run(
                    extent=self._extent(segment, first.offset, end - start),
                    first_block_index=start,
                    num_blocks=end - start,
                    shard_index=shard_index,
                )
            )
            segments.append(segment)
            start, end = end, end + 1

    def _wake_matches(self, at: WaitKey, now_s: float) -> list[Effect]:
        """The block at `at` was committed: who waited for it has enough, or waits for a later one."""
        effects: list[Effect] = []
        for call in self._matches.waiting_at(at):
            session = self.sessions.get(call.session_id)
            assert session is not None, "a waiting call outlived its session"
            assert isinstance(call.request, MatchRequest)
            shards, missing = self._find(session, call.request)
            if missing is None or len(shards[0]) >= call.request.wait_blocks:
                effects += self._finish_match(call, WakeReason.SATISFIED, now_s)
            else:
                self._matches.move(call, missing)
        return effects

    def _finish_match(self, call: WaitingCall, reason: WakeReason, now_s: float) -> list[Effect]:
        """Answers a waiting match with what is there."""
        self._matches.remove(call)
        session = self.sessions.get(call.session_id)
        assert session is not None, "a waiting call outlived its session"
        assert isinstance(call.request, MatchRequest)
        shards, _ = self._find(session, call.request)
        if call.request.tail_request_id and not shards[0]:
            return [Fail(call.session_id, call.call_id, self._no_tail(call.request))]
        matched = self._grant_match(session, call.request, shards, reason, now_s)
        return [Reply(call.session_id, call.call_id, matched)]

    def _no_tail(self, request: MatchRequest) -> TailUnknown:
        return TailUnknown(
            f"no tail of request {request.tail_request_id!r} is here for a reader",
            hint="it was read, it went with its writer, or it was never written: compute it again",
        )

    def _on_renew(self, session: Session, request: RenewRequest, now_s: float) -> Renewed:
        lives = []
        for lease_id in request.lease_ids:
            table = self._reads if self._reads.get(lease_id) else self._writes
            lease = table.get(lease_id)
            own = lease is not None and lease.session_id == session.id
            lives.append(table.renew(lease_id, ttl_s=request.ttl_s, now_s=now_s) if own else 0.0)
        return Renewed(ttl_s=tuple(lives))

    def _on_release(
        self, session: Session, call_id: int, request: ReleaseRequest, now_s: float
    ) -> list[Effect]:
        num_unknown = 0
        for complaint in request.complaints:
            lease = self._reads.get(complaint.lease_id)
            if lease is not None and lease.session_id == session.id:
                self._believe(lease.hold, complaint.block_indices)
        for lease_id in request.lease_ids:
            lease = self._reads.get(lease_id)
            if lease is None or lease.session_id != session.id:
                num_unknown += 1
                continue
            num_unknown += not lease.is_live(now_s)
            self._end_read(lease)
        reply = Reply(session.id, call_id, Released(num_unknown=num_unknown))
        return [reply, *self._serve_reserves(now_s)] if len(self._reserves) else [reply]

    def _believe(self, hold: ReadHold, block_indices: Sequence[int]) -> None:
        """Blocks whose bytes are wrong leave the index; a reader can only harm what it may read."""
        for entries in hold.shards:
            for index in block_indices:
                if index < len(entries) and self._is_here(entries[index]):
                    self.residence.remove(entries[index])
                    self.residence.counters["blocks_corrupt"] += 1

    def _is_here(self, entry: BlockEntry) -> bool:
        return self.residence.index.entry(entry.id) is entry

    def _end_read(self, lease: GrantedLease[ReadHold]) -> None:
        """The reader reads no more; blocks that were for one reader go with it."""
        self._reads.end(lease.id)
        self.residence.unlease(lease.hold.segments)
        for entries in lease.hold.shards:
            for entry in entries:
                if entry.one_reader and self._is_here(entry):
                    self.residence.remove(entry)

    def _drop_unread(self, lease: GrantedLease[BlockEntry]) -> None:
        self._unread.end(lease.id)
        entry = lease.hold
        if self._is_here(entry):  # a reader's lease over it still keeps its bytes
            self.residence.remove(entry)

    # --- time

    def on_time(self, now_s: float) -> list[Effect]:
        """What ran out by `now_s` ends; the daemon calls it no later than `next_time_s`."""
        effects: list[Effect] = []
        for read in self._reads.expired(now_s):
            self.residence.counters["read_leases_expired"] += 1
            self._end_read(read)
        for write in self._writes.expired(now_s):
            effects += self._fence(write, now_s)
        for unread in self._unread.expired(now_s):
            self._drop_unread(unread)
        for call in self._matches.overdue(now_s):
            effects += self._finish_match(call, WakeReason.TIMEOUT, now_s)
        effects += self._serve_reserves(now_s)
        for call in self._reserves.overdue(now_s):
            self._reserves.remove(call)
            session = self.sessions.get(call.session_id)
            assert session is not None, "a waiting call outlived its session"
            assert isinstance(call.request, ReserveRequest)
            error = self._exhausted(session, call.request, now_s)
            effects.append(Fail(call.session_id, call.call_id, error))
        return effects

    def next_time_s(self) -> float | None:
        """When `on_time` is due; None while nothing can run out."""
        times = [
            self._reads.next_check_s(),
            self._writes.next_check_s(),
            self._unread.next_check_s(),
            self._matches.next_deadline_s(),
            self._reserves.next_deadline_s(),
        ]
        return min((time for time in times if time is not None), default=None)

    # --- for the gRPC door, which moves bytes itself

    def readable(self, lease_id: LeaseId, shard_index: int, now_s: float) -> list[BlockEntry]:
        """The blocks under a live read lease; asked again before every chunk."""
        lease = self._reads.get(lease_id)
        if lease is None:
            raise LeaseUnknown(f"read lease {lease_id} is not known here", hint="match again")
        if not lease.is_live(now_s):
            raise LeaseExpired(
                f"read lease {lease_id} ran out", hint="match again, or renew sooner"
            )
        if shard_index >= len(lease.hold.shards):
            raise BadRequest(f"shard {shard_index} of a match of {len(lease.hold.shards)} shards")
        return lease.hold.shards[shard_index]

    def writable(self, lease_id: LeaseId, now_s: float) -> list[NewBlock]:
        """The blocks under a live write lease; asked again before every chunk."""
        lease = self._writes.get(lease_id)
        if lease is None:
            raise LeaseUnknown(f"write lease {lease_id} is not known here", hint="reserve again")
        if not lease.is_live(now_s):
            raise LeaseExpired(f"write lease {lease_id} ran out", hint="reserve again")
        return lease.hold.blocks

    def num_committed(self, lease_id: LeaseId) -> int:
        """Blocks of a write lease that may not be written any more: they are visible."""
        lease = self._writes.get(lease_id)
        return lease.hold.num_committed if lease else 0

    # --- seen from outside

    def stat(self) -> NodeStat:
        """Counts and sizes."""
        pools = tuple(
            PoolStat(
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
            for pool in self.residence.pools.values()
        )
        return NodeStat(
            node_id=self.node_id,
            node_epoch=self.epoch,
            pools=pools,
            num_blocks=len(self.residence.index),
            num_read_leases=len(self._reads),
            num_write_leases=len(self._writes),
            num_sessions=len(self.sessions),
            num_waiting_matches=len(self._matches),
            num_waiting_reserves=len(self._reserves),
            counters=dict(self.residence.counters),
            draining=self.draining,
        )

    def is_idle(self) -> bool:
        """Whether no lease is out: a draining node may end."""
        return len(self._reads) == 0 and len(self._writes) == 0

    def check(self) -> None:
        """Asserts that the books agree; for tests."""
        self.residence.check()
        reserved = sum(
            write.hold.num_left * write.hold.blocks[0].segment.block_nbytes
            for write in self._writes
        )
        held = sum(
            pool.used_nbytes(Use.RESERVED) + pool.used_nbytes(Use.QUARANTINED)
            for pool in self.residence.pools.values()
        )
        assert reserved == held, f"{held} bytes reserved, but leases cover {reserved}"

    def _next_lease_id(self) -> LeaseId:
        self._last_lease_id += 1
        return LeaseId(self._last_lease_id)


def _granted(lease: GrantedLease[ReadHold] | GrantedLease[WriteHold], now_s: float) -> Lease:
    return Lease(id=lease.id, ttl_s=lease.expires_at_s - now_s)


def _missing_and_known(
    scope: Scope, request: ReserveRequest
) -> tuple[list[tuple[int, bytes, bytes]], list[BlockEntry]]:
    """(index, key, parent key) of the blocks to write, and the entries of those that are here."""
    missing, known = [], []
    parent_key = request.parent_key
    parent = scope.blocks.get(parent_key) if parent_key else None
    if parent is not None:
        known.append(parent)
    for index, key in enumerate(request.keys):
        entry = scope.blocks.get(key)
        if entry is None:
            missing.append((index, key, parent_key))
        else:
            known.append(entry)
        parent_key = key
    return missing, known


def _parent_of_first(scope: Scope, missing: list[tuple[int, bytes, bytes]]) -> BlockEntry | None:
    return scope.blocks.get(missing[0][2]) if missing and missing[0][2] else None


def _distinct_segments(entries: list[BlockEntry]) -> list[PlacedSegment]:
    return list({id(entry.segment): entry.segment for entry in entries}.values())


def _lay_out(
    missing: list[tuple[int, bytes, bytes]], segments: list[PlacedSegment]
) -> list[NewBlock]:
    """Puts the missing blocks into the placed segments, in order."""
    blocks = []
    numbered = iter(missing)
    for segment in segments:
        for position in range(segment.num_blocks):
            index, key, parent_key = next(numbered)
            offset = segment.offset + position * segment.block_nbytes
            blocks.append(NewBlock(index, key, parent_key, segment, offset))
    return blocks
