"""Who may touch which bytes of a node, from the answers that the node gave: the model beside the product.

Rules kept here: nothing is taken from the node's own books. A reader's bytes must stay as they were committed until
its lease is over and, where it maps memory, the grace. Bytes of a writer that maps memory are nobody else's until it
commits them, gives them back or its session ends, cut off before or not; of one that does not, until its lease is over.
Each time that a range is given out it has a higher generation. A block or tail for one reader is given to one reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from snowskin.kvstore.errors import LeaseExpired
from snowskin.kvstore.messages import (
    AbortRequest,
    CommitRequest,
    Committed,
    Matched,
    MatchRequest,
    ReleaseRequest,
    Renewed,
    RenewRequest,
    Reserved,
    ReserveRequest,
    WakeReason,
)
from snowskin.transport.errors import SnowskinError
from tests.simulation.kernel import Violation
from tests.simulation.memory import BLOCK, plain

if TYPE_CHECKING:
    from collections import Counter

    from snowskin.kvstore.messages import ReplyMessage, Request
    from snowskin.kvstore.node.limits import NodeLimits
    from tests.simulation.memory import Memory, Name, Place, Truth

UNIT = 64  # generations are remembered for so many bytes together
SLACK_S = 1e-6  # sums of floats

Answer = "ReplyMessage | SnowskinError"


@dataclass(eq=False)
class Written:
    """A write lease, and what is left to commit under it."""

    id: int
    session_id: int
    maps: bool
    expires_at_s: float
    grace_s: float
    names: list[Name] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    key_indices: list[int] = field(default_factory=list)
    is_fenced: bool = False


@dataclass(eq=False)
class Read:
    """A read lease, and the bytes that were promised."""

    id: int
    session_id: int
    expires_at_s: float
    grace_s: float
    promised: list[tuple[Name, Place, bytes]] = field(default_factory=list)
    generations: set[int] = field(default_factory=set)  # of the segments


@dataclass(eq=False)
class Waiting:
    """A call that is not answered yet."""

    request: Request
    asked_at_s: float
    deadline_s: float


class Holds:
    """The model of one life of one node."""

    def __init__(
        self, memory: Memory, truth: Truth, limits: NodeLimits, seen: Counter[str]
    ) -> None:
        self.now_s = 0.0
        self.reads: dict[int, Read] = {}
        self.writes: dict[int, Written] = {}
        self.waiting: dict[tuple[int, int], Waiting] = {}
        self.maps: dict[int, bool] = {}  # open sessions
        self._memory = memory
        self._truth = truth
        self._limits = limits
        self._seen = seen
        self._committed: dict[Name, bytes] = {}
        self._names: dict[int, Name] = {}  # of the block that was last committed at an offset
        self._one_reader: set[Name] = set()
        self._generations = np.zeros(memory.buffer.size // UNIT, np.int64)
        memory.before_write = self.on_write

    # --- sessions and calls

    def on_session(self, session_id: int, *, maps: bool) -> None:
        """One began."""
        self.maps[session_id] = maps

    def on_session_end(self, session_id: int) -> None:
        """And with it ends all that it held."""
        self.on_session_fenced(session_id)
        del self.maps[session_id]
        self.writes = {i: hold for i, hold in self.writes.items() if hold.session_id != session_id}

    def on_session_fenced(self, session_id: int) -> None:
        """It is cut off: only its stores may still land, where it may write by itself."""
        self.reads = {i: read for i, read in self.reads.items() if read.session_id != session_id}
        for hold in self.writes.values():
            hold.is_fenced |= hold.session_id == session_id
        for call in [each for each in self.waiting if each[0] == session_id]:
            del self.waiting[call]

    def on_call(self, session_id: int, call_id: int, request: Request) -> None:
        """The node was asked."""
        wait_s = min(getattr(request, "timeout_s", 0.0), self._limits.max_timeout_s)
        self.waiting[session_id, call_id] = Waiting(request, self.now_s, self.now_s + wait_s)

    def on_cancel(self, session_id: int, call_id: int) -> None:
        """Nobody wants the answer."""
        self.waiting.pop((session_id, call_id), None)

    def on_answer(
        self, session_id: int, call_id: int, answer: ReplyMessage | SnowskinError
    ) -> None:
        """The node answered."""
        call = self.waiting.pop((session_id, call_id), None)
        if call is None:
            raise Violation(f"call {call_id} of session {session_id} was answered unasked or twice")
        waited_s = self.now_s - call.asked_at_s
        match call.request, answer:
            case ReserveRequest() as request, Reserved():
                self._seen["queue waits"] += waited_s > 0
                self._on_reserved(session_id, request, answer)
            case CommitRequest() as request, Committed():
                self._on_committed(request, answer)
            case AbortRequest() as request, _:
                hold = self.writes.get(request.lease_id)
                if hold is not None and hold.session_id == session_id:
                    del self.writes[hold.id]
            case MatchRequest() as request, Matched():
                self._seen["matches that waited"] += waited_s > 0
                self._on_matched(session_id, request, answer, call)
            case ReleaseRequest() as request, _:
                self._on_released(session_id, request)
            case RenewRequest() as request, Renewed():
                self._on_renewed(request, answer)
            case CommitRequest(), LeaseExpired():
                self._seen["commits refused as late"] += 1
        if isinstance(answer, SnowskinError):
            self._seen[f"refused: {answer.reason}"] += 1

    def _on_renewed(self, request: RenewRequest, answer: Renewed) -> None:
        for lease_id, life_s in zip(request.lease_ids, answer.ttl_s, strict=True):
            hold = self.reads.get(lease_id) or self.writes.get(lease_id)
            if hold is None or self.now_s >= hold.expires_at_s:
                if life_s > 0:
                    raise Violation(f"lease {lease_id} was renewed after its end")
                continue
            if life_s > 0:
                hold.expires_at_s = self.now_s + life_s
                self._seen["renewals"] += 1

    # --- writers

    def _on_reserved(self, session_id: int, request: ReserveRequest, answer: Reserved) -> None:
        if answer.lease is None:
            return
        nbytes = request.tail.nbytes if request.tail else BLOCK
        hold = Written(
            id=answer.lease.id,
            session_id=session_id,
            maps=self.maps[session_id],
            grace_s=self._grace_s(session_id),
            expires_at_s=self.now_s + answer.lease.ttl_s,
        )
        for run in answer.runs:
            if run.extent.nbytes != run.num_blocks * nbytes:
                raise Violation(f"an extent of {run.extent.nbytes} for {run.num_blocks} blocks")
            place = (run.extent.offset, run.extent.nbytes)
            if (other := self._protected(place)) is not None:
                raise Violation(f"bytes {place} were given to lease {hold.id}, but are of {other}")
            self._note_generation(place, run.extent.generation)
            for position in range(run.num_blocks):
                index = run.first_block_index + position
                name = (request.namespace, b"")
                if request.tail is not None:
                    name = (b"", request.tail.request_id.encode())
                else:
                    name = (request.namespace, request.keys[index])
                hold.names.append(name)
                hold.key_indices.append(index)
                hold.places.append((run.extent.offset + position * nbytes, nbytes))
        if request.one_reader or request.tail is not None:
            self._one_reader.update(hold.names)
        else:
            self._one_reader.difference_update(hold.names)
        self.writes[hold.id] = hold

    def _note_generation(self, place: Place, generation: int) -> None:
        units = slice(place[0] // UNIT, -(-(place[0] + place[1]) // UNIT))
        if int(self._generations[units].max()) >= generation:
            raise Violation(f"bytes {place} were given out again as generation {generation}")
        self._generations[units] = generation

    def _on_committed(self, request: CommitRequest, answer: Committed) -> None:
        hold = self.writes.get(request.lease_id)
        if hold is None:
            raise Violation(f"lease {request.lease_id} is over, but was committed under")
        if self.now_s >= hold.expires_at_s:
            raise Violation(f"lease {hold.id} was committed under after it had run out")
        for _ in range(request.num_blocks):
            name, index, place = hold.names.pop(0), hold.key_indices.pop(0), hold.places.pop(0)
            if index in answer.existing_block_indices:
                self._seen["lost races"] += 1
                continue
            content = self._memory.read(*place)
            if not self._truth.knows(name, content):
                raise Violation(f"what was committed under {plain(name[1])} is nobody's content")
            self._committed[name] = content
            self._names[place[0]] = name
        if not hold.places:
            del self.writes[hold.id]

    def on_write(self, session_id: int, place: Place) -> None:
        """A store is about to land."""
        other = self._protected(place, but_of=session_id)
        if other is not None:
            raise Violation(f"session {session_id} writes bytes {place}, which are of {other}")

    def on_spoilt(self, place: Place) -> None:
        """Bytes of a committed block were changed on purpose: now these are what readers will find."""
        self._committed[self._names[place[0]]] = self._memory.read(*place)

    # --- readers

    def _on_matched(
        self, session_id: int, request: MatchRequest, answer: Matched, call: Waiting
    ) -> None:
        if answer.wake_reason is WakeReason.TIMEOUT and self.now_s < call.deadline_s - SLACK_S:
            raise Violation("a match timed out before its time")
        if answer.lease is None:
            return
        read = Read(
            id=answer.lease.id,
            session_id=session_id,
            expires_at_s=self.now_s + answer.lease.ttl_s,
            grace_s=self._grace_s(session_id),
        )
        for run in answer.runs:
            read.generations.add(run.extent.generation)
            nbytes = run.extent.nbytes // run.num_blocks
            for position in range(run.num_blocks):
                name = (b"", request.tail_request_id.encode())
                if not request.tail_request_id:
                    index = run.first_block_index + position
                    name = (request.namespaces[run.shard_index], request.keys[index])
                place = (run.extent.offset + position * nbytes, nbytes)
                content = self._committed.get(name)
                if content is None:
                    raise Violation(f"{plain(name[1])} was matched, but never committed")
                self._check_unchanged(name, place, content, "matched")
                if name in self._one_reader and not name[0] and self._is_read(name):
                    raise Violation(f"tail {plain(name[1])} was given to two readers")
                read.promised.append((name, place, content))
        if len(read.promised) != answer.num_blocks * max(1, len(request.namespaces)):
            raise Violation(f"{answer.num_blocks} blocks matched, {len(read.promised)} in runs")
        if not request.tail_request_id:
            self._check_shares(read)
        self.reads[read.id] = read

    def _check_shares(self, read: Read) -> None:
        """Who reads nothing yet may begin with one segment; beyond that nobody leases more than the shares.

        Writers pin the parents of what they write, which this model does not know of: it looks only where none do.
        """
        others = list(self.reads.values())
        own = [other for other in others if other.session_id == read.session_id]
        writers = {hold.session_id for hold in self.writes.values()}
        for before, pins, ratio, who in (
            (others, bool(writers), self._limits.max_leased_ratio, "everybody"),
            (
                own,
                read.session_id in writers,
                self._limits.max_client_leased_ratio,
                f"session {read.session_id}",
            ),
        ):
            if pins:
                continue
            is_more = read.generations.difference(*(other.generations for other in before))
            if not is_more or (not before and len(read.generations) == 1):
                continue
            offsets = {offset for each in (*before, read) for _, (offset, _), _ in each.promised}
            if len(offsets) * BLOCK > self._memory.buffer.size * ratio:
                raise Violation(f"{len(offsets)} blocks are leased by {who}, beyond {ratio}")

    def _is_read(self, name: Name) -> bool:
        return any(name == other for read in self.reads.values() for other, _, _ in read.promised)

    def _on_released(self, session_id: int, request: ReleaseRequest) -> None:
        for lease_id in request.lease_ids:
            read = self.reads.get(lease_id)
            if read is not None and read.session_id == session_id:
                del self.reads[lease_id]

    def _check_unchanged(self, name: Name, place: Place, content: bytes, when: str) -> None:
        if self._memory.read(*place) != content:
            raise Violation(f"the bytes of {plain(name[1])} at {place} are wrong ({when})")

    # --- what must hold

    def _protected(self, place: Place, *, but_of: int | None = None) -> str | None:
        """Whose these bytes are: a lease that is not of the session `but_of`."""
        start, end = place[0], place[0] + place[1]
        for read in self.reads.values():
            if self.now_s >= read.expires_at_s + read.grace_s - SLACK_S:
                continue
            for name, (offset, nbytes), _ in read.promised:
                if offset < end and start < offset + nbytes:
                    return f"read lease {read.id} over {plain(name[1])}"
        for hold in self.writes.values():
            if hold.session_id == but_of or self._is_over(hold):
                continue
            for offset, nbytes in hold.places:
                if offset < end and start < offset + nbytes:
                    return f"write lease {hold.id}"
        return None

    def _is_over(self, hold: Written) -> bool:
        return not hold.maps and self.now_s >= hold.expires_at_s + hold.grace_s - SLACK_S

    def _grace_s(self, session_id: int) -> float:
        return self._limits.grace_s if self.maps[session_id] else 0.0

    def forget_what_ran_out(self) -> None:
        """Leases whose time and grace, if any, are over; those of writers that map memory stay, fenced."""
        for read in [r for r in self.reads.values() if self.now_s >= r.expires_at_s + r.grace_s]:
            self._seen["read leases expired"] += 1
            del self.reads[read.id]
        for hold in [w for w in self.writes.values() if self.now_s >= w.expires_at_s + w.grace_s]:
            if not hold.maps:
                self._seen["unmapped write leases expired"] += 1
                del self.writes[hold.id]
            elif not hold.is_fenced:
                self._seen["quarantines"] += 1
                hold.is_fenced = True

    def check_promises(self) -> None:
        """Reads every promised byte; `on_write` sees all that our own writers do, this sees the rest."""
        for read in self.reads.values():
            if self.now_s < read.expires_at_s + read.grace_s - SLACK_S:
                for name, place, content in read.promised:
                    self._check_unchanged(name, place, content, f"under lease {read.id}")

    def check_deadlines(self) -> None:
        """Nobody waits in the node beyond the deadline."""
        for (session_id, call_id), call in self.waiting.items():
            if self.now_s > call.deadline_s + SLACK_S:
                raise Violation(f"call {call_id} of session {session_id} waits beyond its deadline")
