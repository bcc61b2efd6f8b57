"""The readers' side of a node: probes, matches, and the leases under which bytes are pulled.

Rules kept here: a probe pins nothing and touches nothing. A match leases the longest run that is committed in every
shard asked for, from the first key on, as far as the caps on leases allow (`shares`). A match that waits is looked at
again only when the block that it misses is committed, or will not come. A block for one reader goes with the lease of
that reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.kvstore.errors import (
    BadRequest,
    LeaseExpired,
    LeaseShareExceeded,
    LeaseUnknown,
    TailUnknown,
)
from snowskin.kvstore.index.block_index import (
    BlockEntry,
    PlacedSegment,
    longest_run,
    present_bitmap,
)
from snowskin.kvstore.lease import GrantedLease, LeaseTable
from snowskin.kvstore.messages import (
    Fail,
    Lease,
    Matched,
    MatchRequest,
    Probed,
    Released,
    Reply,
    Run,
    WakeReason,
)
from snowskin.kvstore.node.residence import TAIL_NAMESPACE
from snowskin.kvstore.node.shares import LeaseShares
from snowskin.kvstore.node.waiting import WaitingCall, WaitingRoom, WaitKey, check_may_wait

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snowskin.kvstore.messages import (
        Effect,
        LeaseId,
        ProbeRequest,
        ReleaseRequest,
        SessionId,
    )
    from snowskin.kvstore.node.limits import NodeLimits
    from snowskin.kvstore.node.residence import Residence
    from snowskin.kvstore.node.writing import WriteHold
    from snowskin.kvstore.session import Session, SessionTable


@dataclass(slots=True, eq=False)
class ReadHold:
    """What a read lease protects: a run of entries for each shard, and the segments under them."""

    shards: list[list[BlockEntry]]
    segments: list[PlacedSegment]


class Reading:
    """Probes, matches and read leases of one node."""

    def __init__(
        self,
        residence: Residence,
        sessions: SessionTable,
        limits: NodeLimits,
        *,
        node_epoch: int,
        next_lease_id: Callable[[], LeaseId],
        writes: LeaseTable[WriteHold],
    ) -> None:
        """Nothing leased.

        Args:
            residence: where blocks lie.
            sessions: who is connected.
            limits: what is granted.
            node_epoch: goes with each answer.
            next_lease_id: ids, shared with the writers' side.
            writes: the writers' leases, which pin segments too.
        """
        self._residence = residence
        self._sessions = sessions
        self._limits = limits
        self._node_epoch = node_epoch
        self._next_lease_id = next_lease_id
        self.leases: LeaseTable[ReadHold] = LeaseTable(
            max_ttl_s=limits.read_lease_s, grace_s=limits.grace_s, max_life_s=limits.lease_life_s
        )
        self.shares = LeaseShares(residence, sessions, limits, reads=self.leases, writes=writes)
        self.waiting = WaitingRoom()

    def probe(self, session: Session, request: ProbeRequest) -> Probed:
        """What is here."""
        index = self._residence.index
        scopes = [index.scope(session.tenant, namespace) for namespace in request.namespaces]
        bitmap = present_bitmap(scopes, request.keys)
        num_blocks = 0
        while num_blocks < len(request.keys) and bitmap[num_blocks >> 3] >> (num_blocks & 7) & 1:
            num_blocks += 1
        return Probed(num_blocks=num_blocks, present_bitmap=bitmap, node_epoch=self._node_epoch)

    # --- match

    def match(
        self, session: Session, call_id: int, request: MatchRequest, now_s: float
    ) -> list[Effect]:
        """Answers now, or lets the call wait for more blocks."""
        shards, missing = self._find(session, request)
        num_blocks = len(shards[0])
        if num_blocks >= request.wait_blocks or missing is None:
            return [self._answer(session, call_id, request, shards, WakeReason.SATISFIED, now_s)]
        if request.timeout_s <= 0:
            return [self._answer(session, call_id, request, shards, WakeReason.TIMEOUT, now_s)]
        check_may_wait(self.waiting, session, self._limits, "matches")
        deadline_s = now_s + min(request.timeout_s, self._limits.max_timeout_s)
        self.waiting.add(WaitingCall(session.id, call_id, request, deadline_s, at=missing))
        return []

    def wake(self, at: WaitKey, now_s: float) -> list[Effect]:
        """A block became visible: who waited for it has enough, or waits for a later one."""
        effects: list[Effect] = []
        for call in self.waiting.waiting_at(at):
            session, request = self._of(call)
            shards, missing = self._find(session, request)
            if missing is None or len(shards[0]) >= request.wait_blocks:
                effects.append(self._finish(call, WakeReason.SATISFIED, now_s))
            else:
                self.waiting.move(call, missing)
        return effects

    def give_up(self, at: WaitKey, now_s: float) -> list[Effect]:
        """A block will not come: who waited for it gets what is there."""
        return [
            self._finish(call, WakeReason.WRITER_GONE, now_s)
            for call in self.waiting.waiting_at(at)
        ]

    def answer_overdue(self, now_s: float) -> list[Effect]:
        """Matches whose deadline came first get what is there."""
        return [
            self._finish(call, WakeReason.TIMEOUT, now_s) for call in self.waiting.overdue(now_s)
        ]

    def _of(self, call: WaitingCall) -> tuple[Session, MatchRequest]:
        session = self._sessions.get(call.session_id)
        assert session is not None, "a waiting call outlived its session"
        assert isinstance(call.request, MatchRequest)
        return session, call.request

    def _finish(self, call: WaitingCall, reason: WakeReason, now_s: float) -> Effect:
        self.waiting.remove(call)
        session, request = self._of(call)
        shards, _ = self._find(session, request)
        return self._answer(session, call.call_id, request, shards, reason, now_s)

    def _find(
        self, session: Session, request: MatchRequest
    ) -> tuple[list[list[BlockEntry]], WaitKey | None]:
        """The common gapless run of each shard, and the block at which it ends for want of it."""
        index = self._residence.index
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

    def _answer(
        self,
        session: Session,
        call_id: int,
        request: MatchRequest,
        shards: list[list[BlockEntry]],
        reason: WakeReason,
        now_s: float,
    ) -> Effect:
        counters = self._residence.counters
        counters["matches"] += 1
        runs, segments = self._runs_of(shards)
        self._residence.lease(segments)
        num_withheld = 0
        pool, bound_nbytes = self.shares.bounds[session.tenant]
        if pool.leased_nbytes > bound_nbytes and segments and not request.tail_request_id:
            self._residence.unlease(segments)
            try:
                shards, num_withheld = self._cut(session, request, now_s)
            except LeaseShareExceeded as refusal:
                counters["matches_refused"] += 1
                return Fail(session.id, call_id, refusal)
            runs, segments = self._runs_of(shards)
            self._residence.lease(segments)
        num_blocks = len(shards[0])
        counters["blocks_matched"] += num_blocks * len(shards)
        if num_blocks == 0 and request.tail_request_id:
            error = TailUnknown(
                f"no tail of request {request.tail_request_id!r} is here for a reader",
                hint="it was read, it went with its writer, or it was never written: compute it again",
            )
            return Fail(session.id, call_id, error)
        lease = self._grant(session, request, shards, segments, now_s) if num_blocks else None
        matched = Matched(
            num_blocks=num_blocks,
            lease=lease,
            runs=tuple(runs),
            checksums=tuple(b"".join([e.checksum for e in run]) for run in shards) if lease else (),
            wake_reason=reason,
            node_epoch=self._node_epoch,
            num_blocks_withheld=num_withheld,
        )
        return Reply(session.id, call_id, matched)

    def _cut(
        self, session: Session, request: MatchRequest, now_s: float
    ) -> tuple[list[list[BlockEntry]], int]:
        """What of a match the caps allow, and how many blocks they withhold."""
        self.shares.settle(now_s)  # which may take blocks for one reader along
        shards, _ = self._find(session, request)
        num_found = len(shards[0])
        runs, segments = self._runs_of(shards)
        starts = [
            (run.first_block_index, segment) for run, segment in zip(runs, segments, strict=True)
        ]
        num_blocks = self.shares.num_leasable(session, starts, num_found)
        if num_blocks == num_found:
            return shards, 0
        if num_blocks == 0:
            raise self.shares.exceeded(session, now_s)
        self._residence.counters["matches_cut"] += 1
        return [run[:num_blocks] for run in shards], num_found - num_blocks

    def _grant(
        self,
        session: Session,
        request: MatchRequest,
        shards: list[list[BlockEntry]],
        segments: list[PlacedSegment],
        now_s: float,
    ) -> Lease:
        for entries in shards:
            self._residence.touch(entries)
        for segment in segments:
            segment.matched_at_s = now_s
        if request.tail_request_id:
            shards[0][0].is_taken = True
        lease = self.leases.grant(
            self._next_lease_id(),
            session.id,
            ReadHold(shards, segments),
            ttl_s=request.ttl_s,
            now_s=now_s,
            has_grace=session.maps_memory or self.leases.grants.needs_grace(request.schemes),
        )
        return Lease(id=lease.id, ttl_s=lease.expires_at_s - now_s)

    def _runs_of(self, shards: list[list[BlockEntry]]) -> tuple[list[Run], list[PlacedSegment]]:
        """The runs of all shards, and each run's segment."""
        runs: list[Run] = []
        segments: list[PlacedSegment] = []
        for shard_index, entries in enumerate(shards):
            start, total = 0, len(entries)
            while start < total:
                first = entries[start]
                segment = first.segment
                end = _end_of_run(entries, start)
                runs.append(
                    Run(
                        extent=self._residence.extent(segment, first.offset, end - start),
                        first_block_index=start,
                        num_blocks=end - start,
                        shard_index=shard_index,
                    )
                )
                segments.append(segment)
                start = end
        return runs, segments

    # --- the end of read leases

    def release(self, session: Session, request: ReleaseRequest, now_s: float) -> Released:
        """Believes the complaints, then ends the leases."""
        for complaint in request.complaints:
            lease = self.leases.get(complaint.lease_id)
            if lease is not None and lease.session_id == session.id:
                self._believe(lease.hold, complaint.block_indices)
        num_unknown = 0
        for lease_id in request.lease_ids:
            lease = self.leases.get(lease_id)
            if lease is None or lease.session_id != session.id:
                num_unknown += 1
                continue
            num_unknown += not lease.is_live(now_s)
            self._end(lease)
        return Released(num_unknown=num_unknown)

    def end_session(self, session_id: SessionId) -> None:
        """A reader is gone."""
        for call in self.waiting.of_session(session_id):
            self.waiting.remove(call)
        for lease in self.leases.of_session(session_id):
            self._end(lease)

    def on_time(self, now_s: float) -> bool:
        """Ends leases that ran out, their grace too; whether there were any."""
        expired = self.leases.expired(now_s)
        for lease in expired:
            self._residence.counters["read_leases_expired"] += 1
            self._end(lease)
        return bool(expired)

    def next_time_s(self) -> list[float | None]:
        """When something here can run out."""
        return [self.leases.next_check_s(), self.waiting.next_deadline_s()]

    def readable(self, lease_id: LeaseId, shard_index: int, now_s: float) -> list[BlockEntry]:
        """The blocks under a live lease."""
        lease = self.leases.get(lease_id)
        if lease is None:
            raise LeaseUnknown(f"read lease {lease_id} is not known here", hint="match again")
        if not lease.is_live(now_s):
            raise LeaseExpired(
                f"read lease {lease_id} ran out", hint="match again, or renew sooner"
            )
        if shard_index >= len(lease.hold.shards):
            raise BadRequest(
                f"shard {shard_index} of a match of {len(lease.hold.shards)} shards",
                hint="count from 0, in the order of the match's namespaces",
            )
        return lease.hold.shards[shard_index]

    def _believe(self, hold: ReadHold, block_indices: Sequence[int]) -> None:
        """Blocks whose bytes are wrong leave the index; a reader can only harm what it may read."""
        for entries in hold.shards:
            for index in block_indices:
                if index < len(entries) and self._residence.is_here(entries[index]):
                    self._residence.remove(entries[index])
                    self._residence.counters["blocks_corrupt"] += 1

    def _end(self, lease: GrantedLease[ReadHold]) -> None:
        """The reader reads no more; blocks that were for one reader go with it."""
        self.leases.end(lease.id)
        self._residence.unlease(lease.hold.segments)
        for entries in lease.hold.shards:
            for entry in entries:
                if entry.one_reader and self._residence.is_here(entry):
                    self._residence.remove(entry)


def _end_of_run(entries: list[BlockEntry], start: int) -> int:
    """Behind the last of the entries that lie side by side with the one at `start`."""
    first = entries[start]
    segment, offset, total = first.segment, first.offset, len(entries)
    if segment.is_whole:
        position = segment.position(first)
        count = min(total - start, len(segment.entries) - position)
        if entries[start : start + count] == segment.entries[position : position + count]:
            return start + count
    end = start + 1
    while end < total:
        entry = entries[end]
        offset += segment.block_nbytes
        if entry.segment is not segment or entry.offset != offset:
            break
        end += 1
    return end
