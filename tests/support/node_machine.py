"""A machine of sessions around a node's state, and a memory: what a match promises is what was committed.

Rules of the model: every commit writes a token of its own into its block's bytes. A writer that maps memory may write
into what it has not committed until it gives it back or its session ends, expired or not. While a read lease or its
grace lasts, its bytes must hold the tokens that were committed under its keys. Nobody is promised more at once than
the caps on leases allow, and who is refused for them has a reader to wait for.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, ClassVar

import hypothesis.strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from snowskin.kvstore.errors import (
    BadRequest,
    CommitRefused,
    LeaseExpired,
    LeaseShareExceeded,
    LeaseUnknown,
    PoolExhausted,
    QuarantineShareExceeded,
    TailUnknown,
)
from snowskin.kvstore.messages import (
    AbortRequest,
    CommitRequest,
    Committed,
    Complaint,
    Matched,
    MatchRequest,
    Released,
    ReleaseRequest,
    Reserved,
    ReserveRequest,
    WakeReason,
)
from tests.support.node_driver import (
    BLOCK,
    NAMESPACE,
    OTHER_NAMESPACE,
    Answer,
    NodeDriver,
    column,
    matching,
    matching_tail,
    reserving,
    reserving_tail,
)
from tests.support.node_holds import Name, Place, Read, Waiting, Written

if TYPE_CHECKING:
    from snowskin.kvstore.messages import Request, SessionId
    from snowskin.kvstore.session import Session

NUM_BLOCKS = 8
UNIT = 512  # the model's memory has one token for each 512 bytes
TAIL_NBYTES = 3 * UNIT
CAP, CLIENT_CAP, QUARANTINE_CAP = 6, 4, 3  # of these blocks
CHAINS = ("a", "b")
CHAIN_BLOCKS = 5
NAMESPACES = (NAMESPACE, OTHER_NAMESPACE)
GARBAGE = -1


class NodeMachine(RuleBasedStateMachine):
    checks_books: ClassVar[bool] = True

    @initialize()
    def start(self) -> None:
        self.node = NodeDriver(
            blocks=NUM_BLOCKS,
            read_lease_s=4.0,
            write_lease_s=6.0,
            grace_s=2.0,
            lease_life_s=15.0,
            max_extent_nbytes=2 * BLOCK,
            max_leased_ratio=CAP / NUM_BLOCKS,
            max_client_leased_ratio=CLIENT_CAP / NUM_BLOCKS,
            max_quarantined_ratio=QUARANTINE_CAP / NUM_BLOCKS,
        )
        self.node.checks_books = self.checks_books
        self.node.on_call = self.on_call
        self.node.on_answer = self.on_answer
        self.grace_s = 2.0
        self.memory = [0] * (NUM_BLOCKS * BLOCK // UNIT)
        self.generations = [0] * len(self.memory)
        self.tokens = itertools.count(1)
        self.sessions: list[Session] = [self.node.session()]
        self.writes: list[Written] = []
        self.reads: list[Read] = []
        self.waiting: dict[tuple[SessionId, int], Waiting] = {}
        self.committed: dict[Name, int] = {}
        self.segments: dict[Place, frozenset[Place]] = {}  # what was reserved in one piece
        self.place_of: dict[Name, Place] = {}

    # --- memory

    def units(self, place: Place) -> range:
        return range(place[0] // UNIT, (place[0] + place[1]) // UNIT)

    def write(self, place: Place, token: int) -> None:
        for unit in self.units(place):
            self.memory[unit] = token

    def protected(self) -> list[tuple[Written | Read, Place]]:
        now_s, grace_s = self.node.now_s, self.grace_s
        found: list[tuple[Written | Read, Place]] = []
        for hold in self.writes:
            if hold.is_protected(now_s, grace_s):
                found += [(hold, place) for place in hold.places]
        for read in self.reads:
            if read.is_protected(now_s, grace_s):
                found += [(read, place) for place, _ in read.promised]
        return found

    # --- what is said and answered

    def on_call(self, session: Session, call_id: int, request: Request) -> None:
        self.waiting[session.id, call_id] = Waiting(session, call_id, request, self.node.now_s)

    def on_answer(self, session_id: SessionId, call_id: int, answer: Answer) -> None:
        call = self.waiting.pop((session_id, call_id))
        match call.request, answer:
            case ReserveRequest() as request, Reserved():
                self.on_reserved(call.session, request, answer)
            case ReserveRequest() as request, error:
                # A tail may be here already, which may turn out while the call waits.
                is_tail = request.tail is not None
                assert isinstance(error, PoolExhausted | QuarantineShareExceeded) or (
                    is_tail and isinstance(error, BadRequest)
                )
                if isinstance(error, QuarantineShareExceeded):
                    self.has_late_writes(call.session)
            case MatchRequest() as request, Matched():
                self.on_matched(call, request, answer)
            case MatchRequest() as request, LeaseShareExceeded():
                assert not request.tail_request_id, "tails do not ask for a share"
                assert self.open_reads(), "refused, and there is no reader to wait for"
            case MatchRequest() as request, error:
                assert request.tail_request_id
                assert isinstance(error, TailUnknown)
            case CommitRequest() as request, Committed():
                self.on_committed(request, answer)

    def has_late_writes(self, session: Session) -> None:
        late = [hold for hold in self.writes if hold.session is session and not hold.is_over]
        assert any(self.node.now_s >= hold.expires_at_s for hold in late), "it has no late writes"

    def on_reserved(self, session: Session, request: ReserveRequest, reserved: Reserved) -> None:
        if reserved.lease is None:
            return
        hold = Written(
            id=reserved.lease.id,
            session=session,
            names=[],
            key_indices=[],
            places=[],
            granted_at_s=self.node.now_s,
            expires_at_s=self.node.now_s + reserved.lease.ttl_s,
        )
        nbytes = request.tail.nbytes if request.tail else BLOCK
        taken = {unit for _, place in self.protected() for unit in self.units(place)}
        for run in reserved.runs:
            assert run.extent.nbytes == run.num_blocks * nbytes <= 2 * BLOCK
            places = [(run.extent.offset + at * nbytes, nbytes) for at in range(run.num_blocks)]
            self.segments |= dict.fromkeys(places, frozenset(places))
            for position, place in enumerate(places):
                index = run.first_block_index + position
                name = (request.namespace, b"") if request.tail else None
                if request.tail is not None:
                    name = (b"", request.tail.request_id.encode())
                else:
                    name = (request.namespace, request.keys[index])
                for unit in self.units(place):
                    assert unit not in taken, "bytes that somebody holds were given to another"
                    assert run.extent.generation > self.generations[unit], "a generation came twice"
                    self.generations[unit] = run.extent.generation
                    taken.add(unit)
                hold.names.append(name)
                hold.key_indices.append(index)
                hold.places.append(place)
        if request.tail is None:
            keys = [request.keys[index] for index in range(len(request.keys))]
            hold.pins = [(request.namespace, key) for key in (request.parent_key, *keys)]
        self.writes.append(hold)

    def on_committed(self, request: CommitRequest, answer: Committed) -> None:
        hold = next(hold for hold in self.writes if hold.id == request.lease_id)
        for position in range(request.num_blocks):
            name, index = hold.names.pop(0), hold.key_indices.pop(0)
            place = hold.places.pop(0)
            if index not in answer.existing_block_indices:
                self.place_of[name] = place
                start = 4 * position
                self.committed[name] = int.from_bytes(request.checksums[start : start + 4], "big")
        assert answer.num_blocks_left == len(hold.places)
        hold.is_over = not hold.places

    def on_matched(self, call: Waiting, request: MatchRequest, matched: Matched) -> None:
        now_s = self.node.now_s
        limit = min(request.max_blocks or len(request.keys), len(request.keys))
        enough = min(request.wait_blocks, limit)
        if request.tail_request_id:
            assert matched.num_blocks == 1
        elif matched.wake_reason is WakeReason.SATISFIED:
            assert matched.num_blocks + matched.num_blocks_withheld >= enough
        else:
            num_here = matched.num_blocks + matched.num_blocks_withheld
            assert num_here < enough, "nobody had to wait for this"
        if matched.wake_reason is WakeReason.TIMEOUT:
            assert now_s >= call.asked_at_s + request.timeout_s, "too early"
        if matched.lease is None:
            assert matched.num_blocks == 0
            return
        read = Read(
            id=matched.lease.id,
            session=call.session,
            names=[],
            promised=[],
            granted_at_s=now_s,
            expires_at_s=now_s + matched.lease.ttl_s,
        )
        covered = []
        for run in matched.runs:
            assert run.extent.nbytes <= 2 * BLOCK
            nbytes = run.extent.nbytes // run.num_blocks
            for position in range(run.num_blocks):
                index = run.first_block_index + position
                covered.append((run.shard_index, index))
                name = (b"", request.tail_request_id.encode())
                if not request.tail_request_id:
                    name = (request.namespaces[run.shard_index], request.keys[index])
                checksum = matched.checksums[run.shard_index][4 * index : 4 * index + 4]
                token = self.committed[name]
                assert int.from_bytes(checksum, "big") == token, "another block's checksum"
                read.names.append(name)
                read.promised.append(((run.extent.offset + position * nbytes, nbytes), token))
        num_shards = max(1, len(request.namespaces))
        assert covered == [(s, i) for s in range(num_shards) for i in range(matched.num_blocks)]
        if not request.tail_request_id:
            places = {place for place, _ in read.promised}
            read.new_to_client = places - self.kept(call.session)
            read.new_to_all = places - self.kept()
        self.reads.append(read)

    def kept(self, session: Session | None = None) -> set[Place]:
        """All of the segments that a client keeps, or anybody: as readers, and as parents of what they write."""
        now_s = self.node.now_s
        places = set()
        for read in self.open_reads():
            if session in (None, read.session):
                places |= {place for place, _ in read.promised}
        for hold in self.writes:
            if session in (None, hold.session) and hold.is_protected(now_s, self.grace_s):
                places |= {self.place_of[name] for name in hold.pins if name in self.place_of}
        return set().union(*(self.segments[place] for place in places))

    # --- rules: sessions and time

    @precondition(lambda self: len(self.sessions) < 4)
    @rule(maps=st.booleans())
    def open_session(self, maps: bool) -> None:
        self.sessions.append(self.node.session(f"s{len(self.sessions)}", maps=maps))

    @precondition(lambda self: len(self.sessions) > 1)
    @rule(which=st.integers(0, 3))
    def end_session(self, which: int) -> None:
        session = self.sessions.pop(which % len(self.sessions))
        self.end(session)

    def end(self, session: Session) -> None:
        holds: list[Written | Read] = [*self.writes, *self.reads]
        for hold in holds:
            hold.is_over |= hold.session is session
        for asked in [asked for asked in self.waiting if asked[0] == session.id]:
            del self.waiting[asked]
        self.node.end(session)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 3.5, 8.0]))
    def wait(self, seconds: float) -> None:
        self.node.wait(seconds)

    # --- rules: writers

    @rule(
        which=st.integers(0, 3),
        namespace=st.sampled_from(NAMESPACES),
        chain=st.sampled_from(CHAINS),
        start=st.integers(0, CHAIN_BLOCKS - 1),
        num=st.integers(1, CHAIN_BLOCKS),
        one_reader=st.sampled_from([False, False, False, True]),
        ttl_s=st.sampled_from([0.0, 2.0]),
        timeout_s=st.sampled_from([0.0, 3.0, 9.0]),
    )
    def reserve(self, which, namespace, chain, start, num, one_reader, ttl_s, timeout_s) -> None:
        request = reserving(
            names_of(chain, start, num),
            parent=f"{chain}{start - 1}" if start else "",
            namespace=namespace,
            one_reader=one_reader,
            ttl_s=ttl_s,
            timeout_s=timeout_s,
        )
        self.node.call(self.sessions[which % len(self.sessions)], request)

    @rule(
        which=st.integers(0, 3),
        request_id=st.sampled_from(["r", "q"]),
        timeout_s=st.sampled_from([0.0, 5.0]),
    )
    def reserve_tail(self, which: int, request_id: str, timeout_s: float) -> None:
        request = reserving_tail(request_id, nbytes=TAIL_NBYTES, timeout_s=timeout_s)
        self.node.call(self.sessions[which % len(self.sessions)], request)

    @precondition(lambda self: self.open_writes())
    @rule(which=st.integers(0, 9), num=st.integers(1, CHAIN_BLOCKS))
    def commit(self, which: int, num: int) -> None:
        hold = self.open_writes()[which % len(self.open_writes())]
        # Now and then more than there are.
        self.write_and_commit(hold, num if num == CHAIN_BLOCKS else min(num, len(hold.places)))

    def write_and_commit(self, hold: Written, num: int) -> None:
        is_live = self.node.now_s < hold.expires_at_s
        tokens = [next(self.tokens) for _ in range(num)]
        if is_live or hold.session.maps_memory:
            for place, token in zip(hold.places, tokens, strict=False):
                self.write(place, token)
        request = CommitRequest(
            lease_id=hold.id,
            num_blocks=num,
            checksums=b"".join(token.to_bytes(4, "big") for token in tokens),
        )
        is_known = hold.is_protected(self.node.now_s, self.grace_s)
        num_left = len(hold.places)
        answer = self.node.answer(hold.session, self.node.call(hold.session, request))
        if not is_known:
            assert isinstance(answer, LeaseUnknown)
        elif not is_live:
            assert isinstance(answer, LeaseExpired)
        elif num > num_left:
            assert isinstance(answer, CommitRefused)
        else:
            assert isinstance(answer, Committed)

    @rule(
        which=st.integers(0, 3),
        namespace=st.sampled_from(NAMESPACES),
        chain=st.sampled_from(CHAINS),
        num=st.integers(1, CHAIN_BLOCKS),
        one_reader=st.sampled_from([False, False, True]),
    )
    def publish(self, which, namespace, chain, num, one_reader) -> None:
        session = self.sessions[which % len(self.sessions)]
        names = names_of(chain, 0, num)
        self.finish(session, reserving(names, namespace=namespace, one_reader=one_reader))

    @rule(which=st.integers(0, 3), request_id=st.sampled_from(["r", "q"]))
    def publish_tail(self, which: int, request_id: str) -> None:
        session = self.sessions[which % len(self.sessions)]
        self.finish(session, reserving_tail(request_id, nbytes=TAIL_NBYTES))

    @rule(which=st.integers(0, 3), num=st.integers(1, NUM_BLOCKS))
    def crowd(self, which: int, num: int) -> None:
        """Blocks that nobody will ask for again."""
        names = " ".join(f"c{next(self.tokens)}" for _ in range(num))
        self.finish(self.sessions[which % len(self.sessions)], reserving(names))

    def finish(self, session: Session, request: ReserveRequest) -> None:
        """Reserves, writes and commits."""
        num_before = len(self.writes)
        self.node.call(session, request)
        if len(self.writes) > num_before:
            assert self.writes[-1].session is session
            self.write_and_commit(self.writes[-1], len(self.writes[-1].places))

    @precondition(lambda self: self.open_writes())
    @rule(which=st.integers(0, 9))
    def abort(self, which: int) -> None:
        hold = self.open_writes()[which % len(self.open_writes())]
        is_known = hold.is_protected(self.node.now_s, self.grace_s)
        hold.is_over = True
        call_id = self.node.call(hold.session, AbortRequest(lease_id=hold.id))
        answer = self.node.answer(hold.session, call_id)
        assert isinstance(answer, LeaseUnknown) is not is_known

    @precondition(lambda self: self.open_writes())
    @rule(which=st.integers(0, 9))
    def scribble(self, which: int) -> None:
        """A writer that maps memory can write as long as its session lasts."""
        hold = self.open_writes()[which % len(self.open_writes())]
        if hold.session.maps_memory:
            for place in hold.places:
                self.write(place, GARBAGE)

    # --- rules: readers

    @rule(
        which=st.integers(0, 3),
        namespaces=st.sampled_from([(NAMESPACE,), (OTHER_NAMESPACE,), NAMESPACES]),
        chain=st.sampled_from(CHAINS),
        start=st.sampled_from([0, 0, 0, 1, 2]),
        num=st.integers(1, CHAIN_BLOCKS),
        max_blocks=st.sampled_from([0, 0, 1, 2]),
        wait_blocks=st.integers(0, 3),
        ttl_s=st.sampled_from([0.0, 1.0]),
        timeout_s=st.sampled_from([0.0, 2.0, 6.0]),
    )
    def match(
        self, which, namespaces, chain, start, num, max_blocks, wait_blocks, ttl_s, timeout_s
    ) -> None:
        names = names_of(chain, start, num)
        request = matching(
            names,
            namespaces=namespaces,
            max_blocks=max_blocks,
            wait_blocks=min(wait_blocks, len(column(names))),
            ttl_s=ttl_s,
            timeout_s=timeout_s,
        )
        self.node.call(self.sessions[which % len(self.sessions)], request)

    @rule(which=st.integers(0, 3), at=st.integers(0, 9), num=st.integers(1, 3))
    def read(self, which: int, at: int, num: int) -> None:
        """Asks for what may well be here, and asks before what the node would say."""
        known = [name for name in self.committed if name[0]]
        if not known:
            return
        namespace, first = known[at % len(known)]
        text = first.decode().rstrip(".")
        names = text if text[0] == "c" else names_of(text[0], int(text[1:]), num)
        session = self.sessions[which % len(self.sessions)]
        before = self.node.state.stat()
        probed = self.node.probe(session, names, namespace=namespace)
        assert self.node.state.stat() == before, "a probe changed something"
        request = matching(names, namespaces=(namespace,))
        answer = self.node.answer(session, self.node.call(session, request))
        num_here = len(probed.partition(".")[0])
        if isinstance(answer, LeaseShareExceeded):
            assert num_here
        else:
            assert isinstance(answer, Matched)
            assert answer.num_blocks + answer.num_blocks_withheld == num_here

    @rule(
        which=st.integers(0, 3),
        request_id=st.sampled_from(["r", "q"]),
        timeout_s=st.sampled_from([0.0, 4.0]),
    )
    def match_tail(self, which: int, request_id: str, timeout_s: float) -> None:
        request = matching_tail(request_id, timeout_s=timeout_s)
        self.node.call(self.sessions[which % len(self.sessions)], request)

    @precondition(lambda self: self.open_reads())
    @rule(which=st.integers(0, 9), wrong=st.sampled_from([(), (), (0,), (1, 0, 7)]))
    def release(self, which: int, wrong: tuple[int, ...]) -> None:
        read = self.open_reads()[which % len(self.open_reads())]
        is_live = self.node.now_s < read.expires_at_s
        read.is_over = True
        complaints = (Complaint(lease_id=read.id, block_indices=wrong),) if wrong else ()
        request = ReleaseRequest(lease_ids=(read.id,), complaints=complaints)
        call_id = self.node.call(read.session, request)
        assert self.node.answer(read.session, call_id) == Released(num_unknown=int(not is_live))

    @precondition(lambda self: self.open_reads() or self.open_writes())
    @rule(which=st.integers(0, 9), ttl_s=st.sampled_from([0.0, 1.0]))
    def renew(self, which: int, ttl_s: float) -> None:
        holds: list[Written | Read] = [*self.open_reads(), *self.open_writes()]
        hold = holds[which % len(holds)]
        now_s = self.node.now_s
        (life_s,) = self.node.renew(hold.session, hold.id, ttl_s=ttl_s)
        assert (life_s > 0) is (now_s < hold.expires_at_s)
        if life_s:
            assert hold.expires_at_s <= now_s + life_s <= hold.granted_at_s + 15.0
            hold.expires_at_s = now_s + life_s

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 9))
    def cancel(self, which: int) -> None:
        call = list(self.waiting.values())[which % len(self.waiting)]
        del self.waiting[call.session.id, call.call_id]
        self.node.cancel(call.session, call.call_id)

    def open_writes(self) -> list[Written]:
        return [hold for hold in self.writes if not hold.is_over]

    def open_reads(self) -> list[Read]:
        return [read for read in self.reads if read.is_protected(self.node.now_s, self.grace_s)]

    # --- what must hold

    @invariant()
    def promised_bytes_are_there(self) -> None:
        for read in self.reads:
            if read.is_protected(self.node.now_s, self.grace_s):
                for place, token in read.promised:
                    found = {self.memory[unit] for unit in self.units(place)}
                    assert found == {token}, "bytes under a read lease changed"

    @invariant()
    def nobody_is_promised_more_than_the_caps_allow(self) -> None:
        """As segments are no longer than half a client's cap, the first one is no exception here.

        What a lease adds to what is kept anyway is counted: it keeps whole segments, which may grow meanwhile, and
        to refuse their other blocks would free nothing.
        """
        new: dict[SessionId, set[Place]] = {}
        for read in self.open_reads():
            new.setdefault(read.session.id, set()).update(read.new_to_client)
        for places in new.values():
            assert len(places) <= CLIENT_CAP, "a client leases more than its share"
        everywhere = set().union(*(read.new_to_all for read in self.open_reads()))
        assert len(everywhere) <= CAP, "too much of the pool is leased"

    @invariant()
    def nobody_waits_beyond_the_deadline(self) -> None:
        for call in self.waiting.values():
            assert isinstance(call.request, MatchRequest | ReserveRequest), "not answered at once"
            assert self.node.now_s < call.asked_at_s + call.request.timeout_s

    @invariant()
    def leases_are_those_that_clients_hold(self) -> None:
        stat = self.node.state.stat()
        num_writes = sum(w.is_protected(self.node.now_s, self.grace_s) for w in self.writes)
        assert stat.num_read_leases == len(self.open_reads())
        assert stat.num_write_leases == num_writes
        pool = stat.pools[0]
        used = pool.committed_nbytes + pool.reserved_nbytes + pool.quarantined_nbytes
        assert pool.free_nbytes + used == pool.capacity_nbytes

    def teardown(self) -> None:
        if not hasattr(self, "node"):
            return
        while self.sessions:
            self.end(self.sessions.pop())
        books = self.node.books()
        assert set(books) <= {"free", "committed"}, f"left behind: {books}"
        self.node.wait(100.0)
        assert self.node.state.next_time_s() is None
        assert (
            self.node.state.stat().num_blocks * BLOCK
            == self.node.state.stat().pools[0].committed_nbytes
        )
        self.node.reserve(self.node.session(), " ".join(f"z{i}" for i in range(NUM_BLOCKS)))
        assert self.node.books() == {"reserved": NUM_BLOCKS}


def names_of(chain: str, start: int, num: int) -> str:
    """Blocks of one chain, as many as it has."""
    return " ".join(f"{chain}{i}" for i in range(start, min(start + num, CHAIN_BLOCKS)))
