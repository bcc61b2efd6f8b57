"""The writers' side of a node: reservations, commits, and what becomes of a writer that is late or gone.

Rules kept here: room is given to clients in turn, to each in the order of asking. A write lease pins the parents that
it named. Of two writers of one block the first to commit wins. A write lease that runs out is fenced: if its session
maps memory its bytes are quarantined until the writer gives them back or its session ends, otherwise they are free.
So is at once whatever a writer holds that is cut off while it lives. What is given back where another host could write
one-sidedly is in quarantine until the lease's grace is over.
While too much of a pool is in quarantine, those whose writes are there get no more of it. A block for one reader whom
nobody saw for as long as a reader may hold it is given up before a reservation is refused. Whoever ends a reservation
is told which blocks became visible and which will not come (`Outcome`), for those who wait for them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.kvstore.checksum import CHECKSUM_NBYTES
from snowskin.kvstore.errors import (
    BadRequest,
    CommitRefused,
    LeaseExpired,
    LeaseUnknown,
    LimitExceeded,
    NamespaceMismatch,
    QuarantineShareExceeded,
)
from snowskin.kvstore.lease import GrantedLease, LeaseTable
from snowskin.kvstore.messages import (
    Aborted,
    Committed,
    Effect,
    Fail,
    Lease,
    Reply,
    Reserved,
    ReserveRequest,
    Run,
)
from snowskin.kvstore.node.limits import MIN_RETRY_S
from snowskin.kvstore.node.residence import TAIL_NAMESPACE, ByteRange
from snowskin.kvstore.node.unread import UnreadBlocks
from snowskin.kvstore.node.waiting import FairQueue, WaitingCall, WaitKey, check_may_wait
from snowskin.kvstore.pool.pool import Use
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from snowskin.kvstore.index.block_index import BlockEntry, PlacedSegment, Scope
    from snowskin.kvstore.messages import (
        AbortRequest,
        CommitRequest,
        LeaseId,
        SessionId,
    )
    from snowskin.kvstore.node.limits import NodeLimits
    from snowskin.kvstore.node.residence import Residence
    from snowskin.kvstore.session import Session, SessionTable

MissingBlock = tuple[int, bytes, bytes]
"""Key index, key, and key of its parent."""


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
    def left(self) -> list[NewBlock]:
        """Blocks not committed yet."""
        return self.blocks[self.num_committed :]

    def at(self, block: NewBlock) -> WaitKey:
        """Where a match that misses this block waits."""
        return self.scope.tenant, self.scope.namespace, block.key


@dataclass(slots=True)
class Outcome:
    """What a change on the writers' side means for others."""

    effects: list[Effect] = field(default_factory=list)
    visible: list[WaitKey] = field(default_factory=list)
    gone: list[WaitKey] = field(default_factory=list)
    may_have_freed: bool = False


WriteLease = GrantedLease[WriteHold]


class Writing:
    """Reservations of one node."""

    def __init__(
        self,
        residence: Residence,
        sessions: SessionTable,
        limits: NodeLimits,
        *,
        next_lease_id: Callable[[], LeaseId],
        exhausted: Callable[[Session, ReserveRequest, float], SnowskinError],
    ) -> None:
        """Nothing reserved.

        Args:
            residence: where blocks lie.
            sessions: who is connected.
            limits: what is granted.
            next_lease_id: ids, shared with the readers' side.
            exhausted: the error for a full pool; it names holders on both sides.
        """
        self._residence = residence
        self._sessions = sessions
        self._limits = limits
        self._next_lease_id = next_lease_id
        self._exhausted = exhausted
        self.leases: LeaseTable[WriteHold] = LeaseTable(
            max_ttl_s=limits.write_lease_s, grace_s=limits.grace_s, max_life_s=limits.lease_life_s
        )
        self.unread = UnreadBlocks(residence, limits, next_lease_id=next_lease_id)
        self.waiting = FairQueue()
        self._reserved: Counter[WaitKey] = Counter()

    # --- reserve

    def reserve(
        self, session: Session, call_id: int, request: ReserveRequest, now_s: float
    ) -> list[Effect]:
        """Answers now, or queues the call."""
        self._check_fits(session, request)
        # Nobody overtakes those who queue for the same pool.
        is_first = self._whose_turn(session.tenant) is None
        reserved = self._try_reserve(session, request, now_s, may_place=is_first)
        if reserved is not None:
            return [Reply(session.id, call_id, reserved)]
        if request.timeout_s <= 0:
            raise self._exhausted(session, request, now_s)
        check_may_wait(self.waiting, session, self._limits, "reservations")
        call = WaitingCall(
            session.id,
            call_id,
            request,
            now_s + min(request.timeout_s, self._limits.max_timeout_s),
            tenant=session.tenant,
        )
        if is_first:
            call.tried_at = self._residence.pool_of(session.tenant).num_chances
            self.unread.note_long(now_s)  # from now on each in its time, by `on_time`
        self.waiting.add(call)
        return []

    def serve_waiting(self, now_s: float) -> list[Effect]:
        """Room may have come free: whose turn it is gets it first. Costs nothing where none has."""
        effects: list[Effect] = []
        for tenant in self.waiting.tenants():
            pool = self._residence.pool_of(tenant)
            while (call := self._whose_turn(tenant)) and call.tried_at != pool.num_chances:
                session = self._session_of(call)
                assert isinstance(call.request, ReserveRequest)
                try:
                    reserved = self._try_reserve(session, call.request, now_s)
                except SnowskinError as error:
                    self.waiting.serve(call)
                    effects.append(Fail(call.session_id, call.call_id, error))
                    continue
                if reserved is None:
                    call.tried_at = pool.num_chances
                    break
                self.waiting.serve(call)
                effects.append(Reply(call.session_id, call.call_id, reserved))
        return effects

    def _whose_turn(self, tenant: str) -> WaitingCall | None:
        """Whom to serve next; who needs what is in quarantine waits for its end, and holds up nobody meanwhile."""
        pool = self._residence.pool_of(tenant)
        limit_nbytes = pool.capacity_nbytes - pool.used_nbytes(Use.QUARANTINED)
        for call in self.waiting.heads(tenant):
            assert isinstance(call.request, ReserveRequest)
            if _most_nbytes(call.request) <= limit_nbytes:
                return call
        return None

    def fail_overdue(self, now_s: float) -> list[Effect]:
        """Reservations whose deadline came before the room did; those behind them may fit."""
        effects: list[Effect] = []
        for call in self.waiting.overdue(now_s):
            self.waiting.remove(call)
            assert isinstance(call.request, ReserveRequest)
            error = self._exhausted(self._session_of(call), call.request, now_s)
            effects.append(Fail(call.session_id, call.call_id, error))
        return [*effects, *self.serve_waiting(now_s)] if effects else []

    def _session_of(self, call: WaitingCall) -> Session:
        session = self._sessions.get(call.session_id)
        assert session is not None, "a waiting call outlived its session"
        return session

    def _check_fits(self, session: Session, request: ReserveRequest) -> None:
        pool = self._residence.pool_of(session.tenant)
        block_nbytes = request.tail.nbytes if request.tail else request.block_nbytes
        limit_nbytes = min(self._limits.max_extent_nbytes, pool.capacity_nbytes)
        if block_nbytes > limit_nbytes:
            raise LimitExceeded(
                f"a block of {block_nbytes} bytes is longer than an extent may be ({limit_nbytes})",
                hint="use smaller blocks, or raise max_extent_nbytes and the pool",
            )
        if block_nbytes * len(request.keys) > pool.capacity_nbytes:
            raise LimitExceeded(
                f"{len(request.keys)} blocks of {block_nbytes} bytes are more than the whole pool "
                f"({pool.capacity_nbytes})",
                hint="reserve chunk by chunk, or raise dram_nbytes",
            )

    def _try_reserve(
        self, session: Session, request: ReserveRequest, now_s: float, *, may_place: bool = True
    ) -> Reserved | None:
        """The reservation, or None while there is no room (or, without `may_place`, where it needs some)."""
        tail = request.tail
        namespace = TAIL_NAMESPACE if tail else request.namespace
        block_nbytes = tail.nbytes if tail else request.block_nbytes
        scope = self._residence.index.scope(session.tenant, namespace)
        blocks = scope.blocks if scope else {}
        known: list[BlockEntry] = []
        if tail is not None:
            missing = _missing_tail(blocks, tail.request_id)
        else:
            # Not when it arrived: whoever was before it in the queue may have opened the namespace.
            _check_block_size(scope, block_nbytes)
            missing, known = _missing_and_known(blocks, request)
        if not missing:
            return Reserved(lease=None, runs=())
        self._check_quarantine(session)
        if not may_place:
            return None
        parents = list({id(entry.segment): entry.segment for entry in known}.values())
        near = blocks.get(missing[0][2])
        # Named parents must survive the eviction that makes room for their children.
        self._residence.lease(parents)
        segments = self._residence.reserve(
            session.tenant,
            len(missing),
            block_nbytes,
            near=near,
            unread=lambda: self.unread.for_long(now_s),
        )
        if segments is None:
            self._residence.unlease(parents)
            return None
        scope = self._residence.index.open_scope(
            session.tenant, namespace, 0 if tail else block_nbytes
        )
        one_reader = request.one_reader or tail is not None
        hold = WriteHold(scope, _lay_out(missing, segments), parents, one_reader)
        lease = self.leases.grant(
            self._next_lease_id(),
            session.id,
            hold,
            ttl_s=request.ttl_s,
            now_s=now_s,
            has_grace=session.maps_memory or self.leases.grants.needs_grace(request.schemes),
        )
        for block in hold.blocks:
            self._reserved[hold.at(block)] += 1
        return Reserved(
            lease=Lease(id=lease.id, ttl_s=lease.expires_at_s - now_s),
            runs=self._writable_runs(hold.blocks),
        )

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
                    extent=self._residence.extent(first.segment, first.offset, end - start),
                    first_block_index=first.key_index,
                    num_blocks=end - start,
                )
            )
            start = end
        return tuple(runs)

    # --- commit and abort

    def commit(
        self, session: Session, call_id: int, request: CommitRequest, now_s: float
    ) -> Outcome:
        """Makes the next blocks of a reservation visible."""
        lease = self._own(session, request.lease_id)
        hold = lease.hold
        if not lease.is_live(now_s):
            raise LeaseExpired(
                f"write lease {lease.id} ran out {now_s - lease.expires_at_s:.3f} s ago; nothing was committed",
                hint="abort it and reserve again",
            )
        if request.num_blocks > len(hold.left):
            raise CommitRefused(
                f"{request.num_blocks} blocks committed, but only {len(hold.left)} of this reservation are left",
                hint="commit each block once, in order",
            )
        outcome = Outcome()
        existing: list[int] = []
        self.leases.grants.take_back(lease.id)  # what is committed is not written any more
        for position, block in enumerate(hold.left[: request.num_blocks]):
            start = position * CHECKSUM_NBYTES
            checksum = request.checksums[start : start + CHECKSUM_NBYTES]
            if self._commit_block(lease, block, checksum, now_s):
                outcome.visible.append(hold.at(block))
            else:
                existing.append(block.key_index)
        num_left = len(hold.left)
        if num_left == 0:
            self._end(lease, outcome)
        outcome.may_have_freed = bool(existing) or num_left == 0 or len(self.waiting) > 0
        reply = Committed(existing_block_indices=tuple(existing), num_blocks_left=num_left)
        outcome.effects.insert(0, Reply(session.id, call_id, reply))
        return outcome

    def _commit_block(
        self, lease: WriteLease, block: NewBlock, checksum: bytes, now_s: float
    ) -> bool:
        """Whether the block is visible by this commit; False where another writer was first."""
        hold = lease.hold
        hold.num_committed += 1
        self._unreserve(hold.at(block))
        entry = self._residence.commit(
            hold.scope,
            block.key,
            block.segment,
            block.offset,
            checksum,
            parent_key=block.parent_key,
            one_reader=hold.one_reader,
        )
        if entry is None:
            return False
        entry.committed_at_s = now_s
        if entry.one_reader:
            self.unread.leave(lease.session_id, entry, now_s)
        return True

    def abort(self, session: Session, call_id: int, request: AbortRequest, now_s: float) -> Outcome:
        """The writer gives back what it did not commit; what it wrote one-sidedly may still come for a grace."""
        lease = self._own(session, request.lease_id)
        freed_nbytes = sum(block.segment.block_nbytes for block in lease.hold.left)
        outcome = Outcome([Reply(session.id, call_id, Aborted(freed_nbytes=freed_nbytes))])
        if session.maps_memory or not lease.grace_s:
            self._end(lease, outcome)
        elif lease.hold.use is Use.RESERVED:
            self.leases.run_out(lease.id, now_s)
            self._quarantine(lease.hold, outcome)
        return outcome

    def end_session(self, session_id: SessionId) -> Outcome:
        """A writer is gone: its reservations and its unread blocks are free at once."""
        outcome = Outcome(may_have_freed=True)
        self._forget_asking(session_id)
        for lease in self.leases.of_session(session_id):
            self._end(lease, outcome)
        return outcome

    def fence_session(self, session_id: SessionId, now_s: float) -> Outcome:
        """A writer is cut off: its unread blocks are free, its reservations only where no store of it can land."""
        outcome = Outcome(may_have_freed=True)
        self._forget_asking(session_id)
        for lease in self.leases.of_session(session_id):
            self.leases.run_out(lease.id, now_s)
            self._fence(lease, outcome)
        return outcome

    def _forget_asking(self, session_id: SessionId) -> None:
        """Neither what a session waits for nor what it has left unread concerns anybody any more."""
        for call in self.waiting.of_session(session_id):
            self.waiting.remove(call)
        self.unread.drop_of_session(session_id)

    def on_time(self, now_s: float) -> Outcome:
        """Leases that ran out, their grace too."""
        outcome = Outcome()
        for lease in self.leases.expired(now_s):
            self._fence(lease, outcome)
        outcome.may_have_freed |= self.unread.on_time(now_s)
        if len(self.waiting) and self.unread.note_long(now_s):
            for pool in self._residence.pools.values():
                pool.num_gains += 1
            outcome.may_have_freed = True
        return outcome

    def next_time_s(self) -> list[float | None]:
        """When something here can run out."""
        return [
            self.leases.next_check_s(),
            self.waiting.next_deadline_s(),
            *self.unread.next_time_s(is_room_wanted=len(self.waiting) > 0),
        ]

    def writable(self, lease_id: LeaseId, now_s: float) -> WriteHold:
        """What may be written under a live lease."""
        lease = self.leases.get(lease_id)
        if lease is None:
            raise LeaseUnknown(f"write lease {lease_id} is not known here", hint="reserve again")
        if not lease.is_live(now_s):
            raise LeaseExpired(f"write lease {lease_id} ran out", hint="reserve again")
        return lease.hold

    def check(self) -> None:
        """Asserts that the leases cover what is reserved or quarantined; for tests."""
        for use in (Use.RESERVED, Use.QUARANTINED):
            covered = sum(
                block.segment.block_nbytes
                for lease in self.leases
                for block in lease.hold.left
                if lease.hold.use is use
            )
            held = sum(pool.used_nbytes(use) for pool in self._residence.pools.values())
            assert covered == held, f"{held} bytes are {use.value}, but leases cover {covered}"
        reserved = Counter(
            lease.hold.at(block)
            for lease in self.leases
            for block in lease.hold.left
            if lease.hold.use is Use.RESERVED
        )
        assert reserved == self._reserved, "who reserves which block is miscounted"
        self._residence.index.check(Counter(lease.hold.scope.number for lease in self.leases))

    def reserved_ranges(self) -> Iterator[ByteRange]:
        """Bytes that are reserved or quarantined."""
        for lease in self.leases:
            for block in lease.hold.left:
                yield block.segment.pool_id, block.offset, block.segment.block_nbytes

    def _own(self, session: Session, lease_id: LeaseId) -> WriteLease:
        lease = self.leases.get(lease_id)
        if lease is None or lease.session_id != session.id:
            raise LeaseUnknown(
                f"write lease {lease_id} is not known here",
                hint="it ended, or the node restarted: reserve again",
            )
        return lease

    def _unreserve(self, at: WaitKey) -> None:
        self._reserved[at] -= 1
        if self._reserved[at] <= 0:
            del self._reserved[at]

    def _end(self, lease: WriteLease, outcome: Outcome) -> None:
        """The writer writes no more: what it did not commit comes back."""
        self.leases.end(lease.id)
        hold = lease.hold
        if hold.use is Use.RESERVED:  # of a fenced one this was told when it was fenced
            self._will_not_come(hold, outcome)
        for block in hold.left:
            self._residence.give_back(block.segment, block.offset, hold.use)
        self._residence.index.leave_scope(hold.scope)
        self._residence.unlease(hold.parents)
        outcome.may_have_freed = True

    def fence_if_mapped(self, lease: WriteLease) -> Outcome:
        """Fences a lease that is over, but for its grace, where its writer can reach memory by itself."""
        outcome = Outcome()
        session = self._sessions.get(lease.session_id)
        if session is not None and session.maps_memory:
            self._fence(lease, outcome)
        return outcome

    def _fence(self, lease: WriteLease, outcome: Outcome) -> None:
        session = self._sessions.get(lease.session_id)
        maps_memory = session is not None and session.maps_memory
        is_told = lease.hold.use is Use.QUARANTINED  # it was revoked, or given back
        self._residence.counters["write_leases_expired"] += not is_told
        if not maps_memory:
            self._end(lease, outcome)
        elif not is_told:
            self._quarantine(lease.hold, outcome)

    def _quarantine(self, hold: WriteHold, outcome: Outcome) -> None:
        """No block of it comes any more, but stores may still land where they were to be."""
        self._will_not_come(hold, outcome)
        for block in hold.left:
            self._residence.quarantine(block.segment, 1)
        hold.use = Use.QUARANTINED
        self._residence.unlease(hold.parents)
        hold.parents = []
        outcome.may_have_freed = True

    def _will_not_come(self, hold: WriteHold, outcome: Outcome) -> None:
        for block in hold.left:
            at = hold.at(block)
            self._unreserve(at)
            if at not in self._reserved:
                outcome.gone.append(at)

    def _check_quarantine(self, session: Session) -> None:
        """Refuses more room to who has left too much of it in quarantine; others are not to blame."""
        pool = self._residence.pool_of(session.tenant)
        quarantined_nbytes = pool.used_nbytes(Use.QUARANTINED)
        limit_nbytes = int(pool.capacity_nbytes * self._limits.max_quarantined_ratio)
        if quarantined_nbytes <= limit_nbytes:
            return
        own_nbytes = sum(
            block.segment.block_nbytes
            for lease in self.leases.of_session(session.id)
            if lease.hold.use is Use.QUARANTINED
            for block in lease.hold.left
        )
        if own_nbytes:
            raise QuarantineShareExceeded(
                f"{quarantined_nbytes} bytes of pool {pool.id} are in quarantine, {limit_nbytes} may be; "
                f"{own_nbytes} of them are of writes of {session.client_name!r} that came too late",
                hint="abort those reservations, or close the session and connect again",
                retry_after_s=max(MIN_RETRY_S, self._limits.grace_s),
            )


def _most_nbytes(request: ReserveRequest) -> int:
    """What a reservation needs if none of it is here."""
    return request.tail.nbytes if request.tail else request.block_nbytes * len(request.keys)


def _check_block_size(scope: Scope | None, block_nbytes: int) -> None:
    if scope is not None and scope.block_nbytes != block_nbytes:
        raise NamespaceMismatch(
            f"blocks of this namespace have {scope.block_nbytes} bytes, not {block_nbytes}",
            hint="two layouts must have two namespaces",
        )


def _missing_tail(blocks: dict[bytes, BlockEntry], request_id: str) -> list[MissingBlock]:
    key = request_id.encode()
    if key in blocks:
        raise BadRequest(
            f"a tail of request {request_id!r} is here already",
            hint="one tail a request; use a new id for a retry",
        )
    return [(0, key, b"")]


def _missing_and_known(
    blocks: dict[bytes, BlockEntry], request: ReserveRequest
) -> tuple[list[MissingBlock], list[BlockEntry]]:
    """The blocks to write, and the entries of those (and of the parent) that are here."""
    missing: list[MissingBlock] = []
    known = []
    parent_key = request.parent_key
    if (parent := blocks.get(parent_key)) is not None:
        known.append(parent)
    for index, key in enumerate(request.keys):
        if (entry := blocks.get(key)) is None:
            missing.append((index, key, parent_key))
        else:
            known.append(entry)
        parent_key = key
    return missing, known


def _lay_out(missing: list[MissingBlock], segments: list[PlacedSegment]) -> list[NewBlock]:
    """Puts the missing blocks into the placed segments, in order."""
    places = [
        (segment, segment.offset + position * segment.block_nbytes)
        for segment in segments
        for position in range(segment.num_blocks)
    ]
    return [
        NewBlock(index, key, parent_key, segment, offset)
        for (index, key, parent_key), (segment, offset) in zip(missing, places, strict=True)
    ]
