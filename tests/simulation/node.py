"""A node: the real `NodeState`, behind doors made of virtual streams and calls.

Rules kept here: what the shell and the doors do around the state (release boards, the one timer, call 0, taking back
what nobody waited for any more) is done here in the same order; the local door speaks the real wire. Each life of the
node has a state, a memory and a model of its own; every answer goes through the model before it leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from snowskin.kvstore.client.conversation import giving_back
from snowskin.kvstore.errors import LeaseUnknown, NodeUnavailable
from snowskin.kvstore.eviction.registry import make_eviction
from snowskin.kvstore.frames import FrameReader, frame
from snowskin.kvstore.messages import (
    WIRE_VERSION,
    Fail,
    Greeting,
    LeaseId,
    Matched,
    PoolGrant,
    ReleaseRequest,
    Reserved,
    ReserveRequest,
    SessionId,
    StatRequest,
)
from snowskin.kvstore.node.door import _REPLY_FIELDS
from snowskin.kvstore.node.limits import NodeLimits
from snowskin.kvstore.node.shell import BOARD_LOOK_S
from snowskin.kvstore.node.state import NodeState
from snowskin.kvstore.pool.pool import Pool, Use
from snowskin.kvstore.session import DEFAULT_TENANT
from snowskin.kvstore.wire import error_to_detail, greeting_to, parse, reply_to, request_from
from snowskin.transport.errors import SnowskinError
from snowskin.v1 import door_pb2
from tests.simulation.holds import SLACK_S, Holds
from tests.simulation.kernel import Cancelled, Future, Process, Timer, Violation
from tests.simulation.memory import BLOCK, Memory, Truth

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.kvstore.client.machine import Move
    from snowskin.kvstore.messages import Effect, Lease, ReplyMessage, Request
    from tests.simulation.network import End, Network

NUM_BOARD_SLOTS = 2  # few, so that boards are full now and then
CHUNK_NBYTES = 1536  # of Read and Write: blocks are cut


@dataclass(slots=True, kw_only=True)
class NodeSettings:
    """One node's size and times."""

    num_blocks: int = 16
    limits: NodeLimits = field(default_factory=NodeLimits)


@dataclass(slots=True)
class Board:
    """The release board of one session: what a reader leaves without a message."""

    left: list[int] = field(default_factory=list)

    def post(self, lease_id: int) -> bool:
        """False where it is full."""
        if len(self.left) >= NUM_BOARD_SLOTS:
            return False
        self.left.append(lease_id)
        return True


class SimNode:
    """A node over all its lives."""

    def __init__(
        self, network: Network, truth: Truth, node_id: str, settings: NodeSettings
    ) -> None:
        self.network = network
        self.kernel = network.kernel
        self.truth = truth
        self.node_id = node_id
        self.settings = settings
        self.epoch = 0
        self.checks_books = True
        self.is_spoilt = False
        # (epoch, sequence) -> what a subscriber was told to be in sync with.
        self.told: dict[tuple[int, int], set[tuple[bytes, bytes]]] = {}
        self.start()

    # --- lives

    def start(self) -> None:
        """A new process with empty pools."""
        self.epoch += 1
        self.process = Process(self.kernel, f"{self.node_id}.{self.epoch}")
        capacity = self.settings.num_blocks * BLOCK
        self.state = NodeState(
            node_id=self.node_id,
            epoch=self.epoch,
            pools=[Pool(0, capacity, tenant=DEFAULT_TENANT, alignment=64)],
            eviction=make_eviction("lru"),
            limits=self.settings.limits,
        )
        self.memory = Memory(capacity)
        self.holds = Holds(self.memory, self.truth, self.settings.limits, self.kernel.seen)
        self.boards: dict[SessionId, Board] = {}
        self.door_sessions: dict[_DoorSession, None] = {}
        self._answers: dict[SessionId, Any] = {}
        self._rpc_sessions: dict[str, SessionId] = {}
        self._rpc_waiting: dict[tuple[SessionId, int], Future] = {}
        self._timer: Timer | None = None
        self._timer_at_s = 0.0
        self.is_changed = True
        self._num_told = 0
        self.on_change: dict[Callable[[], None], None] = {}  # whom to tell that blocks came or went

    def kill(self) -> None:
        """The process dies, and its memory is nobody's business any more."""
        self.note_counters()
        self.memory.before_write = None
        self.process.kill()

    def note_counters(self) -> None:
        """Keeps what this life did for the summary."""
        for name, number in self.state.residence.counters.items():
            self.kernel.seen[f"node: {name}"] += number

    # --- sessions

    def accept(self, client: Process) -> End:
        """A client connects to the local door; the client's end of the stream."""
        if not self.process.is_alive:
            raise NodeUnavailable(f"no node {self.node_id} answers")
        near, far = self.network.connect(client, self.process)
        _DoorSession(self, far, client.name)
        return near

    def open_session(self, name: str, answer: Any, *, maps: bool) -> SessionId:
        session = self.state.open_session(name, maps_memory=maps)
        self._answers[session.id] = answer
        self.holds.on_session(session.id, maps=maps)
        self.say(f"session {session.id} of {name} opens")
        return session.id

    def end_session(self, session_id: SessionId) -> None:
        if self._answers.pop(session_id, None) is None:
            return
        self.boards.pop(session_id, None)
        self._look_at_time()
        self.holds.on_session_end(session_id)
        self.say(f"session {session_id} ends")
        self._carry_out(self.state.end_session(session_id, self.kernel.now_s))

    def fence_session(self, session_id: SessionId) -> bool:
        self.boards.pop(session_id, None)
        self._look_at_time()
        self.holds.on_session_fenced(session_id)
        self.say(f"session {session_id} is cut off")
        self._carry_out(self.state.fence_session(session_id, self.kernel.now_s))
        if self.state.holds_nothing(session_id):
            self.end_session(session_id)
            return False
        self.kernel.seen["clients cut off with room"] += 1
        return True

    def cut_off(self, client_name: str = "") -> None:
        """What the local door does to one who breaks the protocol, or does not read; to anybody without a name."""
        sessions = [each for each in self.door_sessions if client_name in ("", each.client_name)]
        if sessions:
            self.kernel.rng.choice(sessions).fence()

    # --- requests, as NodeShell has them

    def request(self, session_id: SessionId, call_id: int, request: Request) -> None:
        self._look_at_time()
        if isinstance(request, ReserveRequest | StatRequest) or (
            self.state.residence.num_for_one_reader
        ):
            self._read_boards()
        self._ask(session_id, call_id, request)
        self.state.residence.note_touches()
        self._read_board(session_id)

    def cancel(self, session_id: SessionId, call_id: int) -> None:
        self._look_at_time()
        self.holds.on_cancel(session_id, call_id)
        self._carry_out(self.state.cancel(session_id, call_id, self.kernel.now_s))

    def _ask(self, session_id: SessionId, call_id: int, request: Request) -> None:
        if session_id in self.holds.maps:
            self.holds.on_call(session_id, call_id, request)
        if self.kernel.is_traced:
            self.say(f"session {session_id} call {call_id}: {request}")
        self._carry_out(self.state.on_request(session_id, call_id, request, self.kernel.now_s))

    def _read_boards(self) -> None:
        for session_id in list(self.boards):
            self._read_board(session_id)

    def _read_board(self, session_id: SessionId) -> None:
        board = self.boards.get(session_id)
        if board is None or not board.left:
            return
        left, board.left = board.left, []
        self.kernel.seen["releases by board"] += len(left)
        request = ReleaseRequest(lease_ids=tuple(LeaseId(number) for number in left))
        self._ask(session_id, 0, request)

    def _carry_out(self, effects: list[Effect]) -> None:
        self.is_changed = True
        num_noted = sum(events.num_noted for events in self.state.residence.events.values())
        if num_noted != self._num_told:
            self._num_told = num_noted
            for news in list(self.on_change):
                news()
        for effect in effects:
            content = effect.error if isinstance(effect, Fail) else effect.message
            if self.kernel.is_traced:
                self.say(f"session {effect.session_id} call {effect.call_id} <- {content!r}")
            if effect.session_id in self.holds.maps:
                self.holds.on_answer(effect.session_id, effect.call_id, content)
            answer = self._answers.get(effect.session_id)
            if answer is not None:
                answer(effect.call_id, content)
        self._arm_timer()

    def _arm_timer(self) -> None:
        due_s = self.state.next_time_s()
        if due_s is None:
            return
        if self.boards and self.state.has_waiting_reserves:
            due_s = min(due_s, self.kernel.now_s + BOARD_LOOK_S)
        if self._timer is not None:
            if self._timer_at_s <= due_s:
                return
            self._timer.cancel()
        self._timer_at_s = due_s
        self._timer = self.process.at_moment(due_s, self._on_timer, is_io=False)

    def _on_timer(self) -> None:
        self._timer = None
        self.holds.now_s = self.kernel.now_s
        self._read_boards()  # what is released there must not be seen to run out
        self._carry_out(self.state.on_time(self.kernel.now_s))
        self.check_time()

    def _look_at_time(self) -> None:
        self.holds.now_s = self.kernel.now_s
        self.holds.forget_what_ran_out()

    # --- the gRPC door

    def serve_call(self, client: Process, request: Request, capability: bytes | None) -> Any:
        """One call, as the service answers it; `capability` where it is under a lease."""
        if capability is not None:
            self._check_capability(capability)
        session_id = self._rpc_session(client)
        answered, call_id = Future(), self.kernel.num_steps
        waiting = self._rpc_waiting
        while (session_id, call_id) in waiting:
            call_id += 1
        waiting[session_id, call_id] = answered
        try:
            self.request(session_id, call_id, request)
            yield answered
        except Cancelled:
            self.cancel(session_id, call_id)
            if answered.is_done and answered.error is None:
                self._take_back(session_id, answered.result)
            raise
        finally:
            waiting.pop((session_id, call_id), None)
        reply = answered.value()
        if isinstance(reply, Matched | Reserved) and reply.lease is not None:
            reply = replace(reply, lease=replace(reply.lease, capability=b"%d" % self.epoch))
        return reply

    def _check_capability(self, capability: bytes) -> None:
        if capability != b"%d" % self.epoch:
            self.kernel.seen["leases of an earlier epoch"] += 1
            raise LeaseUnknown("the capability is of another epoch")

    def serve_write(self, lease: Lease, session_of: str, data: bytes) -> Any:
        """The chunks of a Write: each asks whether the lease still lives."""
        self._check_capability(lease.capability)
        session_id = self._rpc_sessions.get(session_of, SessionId(-1))
        for start in range(0, len(data), CHUNK_NBYTES):
            yield self.process.sleep(self.kernel.rng.uniform(1e-5, 2e-4))
            self._look_at_time()
            hold = self.state.writable(lease.id, self.kernel.now_s)
            piece = data[start : start + CHUNK_NBYTES]
            places = [(block.offset, block.segment.block_nbytes) for block in hold.blocks]
            for offset, skip, nbytes in _pieces(places, start, len(piece)):
                self.memory.write(session_id, offset, piece[skip : skip + nbytes])

    def serve_read(self, lease: Lease) -> Any:
        """The chunks of a Read."""
        self._check_capability(lease.capability)
        chunks: list[bytes] = []
        offset = 0
        while True:
            entries = self.state.readable(lease.id, 0, self.kernel.now_s)
            places = [(entry.offset, entry.segment.block_nbytes) for entry in entries]
            total = sum(nbytes for _, nbytes in places)
            if offset >= total:
                return b"".join(chunks)
            count = min(CHUNK_NBYTES, total - offset)
            for start, _, nbytes in _pieces(places, offset, count):
                chunks.append(self.memory.read(start, nbytes))
            offset += count
            yield self.process.sleep(self.kernel.rng.uniform(1e-5, 2e-4))

    def end_idle_rpc_sessions(self) -> None:
        """Callers that hold nothing and wait for nothing are forgotten."""
        held = {read.session_id for read in self.holds.reads.values()}
        held |= {write.session_id for write in self.holds.writes.values()}
        asked = {session_id for session_id, _ in self.holds.waiting}
        for client, session_id in list(self._rpc_sessions.items()):
            if session_id not in held and session_id not in asked:
                del self._rpc_sessions[client]
                self.end_session(session_id)

    def _rpc_session(self, client: Process) -> SessionId:
        session_id = self._rpc_sessions.get(client.name)
        if session_id is None:

            def answer(call_id: int, reply: ReplyMessage | SnowskinError) -> None:
                assert session_id is not None, "answered before it was opened"
                future = self._rpc_waiting.pop((session_id, call_id), None)
                if future is None:
                    if call_id:
                        self._take_back(session_id, reply)
                elif isinstance(reply, SnowskinError):
                    future.set_error(reply)
                else:
                    future.set_result(reply)

            session_id = self.open_session(client.name, answer, maps=False)
            self._rpc_sessions[client.name] = session_id
        return session_id

    def _take_back(self, session_id: SessionId, reply: object) -> None:
        unwanted = giving_back(reply)
        if unwanted is not None:
            self.kernel.seen["leases nobody waited for"] += 1
            self.request(session_id, 0, unwanted)

    def visible_blocks(self) -> set[tuple[bytes, bytes]]:
        """(namespace, key) of all that anybody can match."""
        index = self.state.residence.index
        return {
            (namespace, entry.key)
            for namespace in index.namespaces(DEFAULT_TENANT)
            if namespace and (scope := index.scope(DEFAULT_TENANT, namespace)) is not None
            for entry in scope.blocks.values()
            if not entry.one_reader
        }

    def spoil(self) -> None:
        """A bit of one committed block that nobody has leased turns: what checksums are for."""
        entries = [each for each in self.state.residence.index if not each.segment.num_leases]
        if not entries or not self.process.is_alive:
            return
        entry = self.kernel.rng.choice(sorted(entries, key=lambda each: each.offset))
        self.is_spoilt = True
        self.kernel.seen["blocks spoilt"] += 1
        at = entry.offset + self.kernel.rng.randrange(entry.segment.block_nbytes)
        self.memory.buffer[at] ^= 1
        self.holds.on_spoilt((entry.offset, entry.segment.block_nbytes))

    # --- what must hold

    def check(self) -> None:
        """After each step that changed something here."""
        if not self.process.is_alive:
            return
        self.holds.now_s = self.kernel.now_s
        if self.is_changed:
            self.is_changed = False
            pool = self.state.residence.pools[0]
            used = [pool.used_nbytes(use) for use in Use]
            if pool.free_nbytes + sum(used) != pool.capacity_nbytes:
                raise Violation(f"{pool.free_nbytes} bytes free + {used} are not the capacity")
            if self.checks_books:
                self.state.check()
            self.holds.check_promises()

    def check_time(self) -> None:
        """Right after the node has looked at the time: whatever is over has ended."""
        self.holds.forget_what_ran_out()
        self.holds.check_deadlines()
        stat = self.state.stat()
        found = stat.num_read_leases, stat.num_write_leases
        if found != (len(self.holds.reads), len(self.holds.writes)):
            raise Violation(
                f"{found} read and write leases in the node, "
                f"{(len(self.holds.reads), len(self.holds.writes))} that anybody can hold"
            )
        due_s = self.state.next_time_s()
        if due_s is not None and due_s <= self.kernel.now_s:
            raise Violation("what was due is due again")

    def check_is_timely(self) -> None:
        """At each step, also those in which nothing happened here: time passed, and leases end."""
        if not self.process.is_alive or self.process.is_behind:
            return
        self.holds.now_s = self.kernel.now_s
        self.holds.check_deadlines()
        due_s = self.state.next_time_s()
        # What became due in the very event that made it so happens in this moment, by the timer.
        is_about_to = self._timer is not None and self._timer_at_s <= self.kernel.now_s
        if due_s is not None and due_s < self.kernel.now_s - SLACK_S and not is_about_to:
            raise Violation(f"what was due at {due_s} has not happened at {self.kernel.now_s}")

    def thaw(self) -> None:
        self.process.thaw()

    def check_baseline(self) -> None:
        """Everybody is gone: nothing may be left but free room and committed blocks."""
        stat = self.state.stat()
        pool = stat.pools[0]
        left = (
            stat.num_read_leases,
            stat.num_write_leases,
            stat.num_sessions,
            stat.num_waiting_matches,
            stat.num_waiting_reserves,
            pool.reserved_nbytes,
            pool.quarantined_nbytes,
            pool.leased_nbytes,
            self.state.residence.num_for_one_reader,
        )
        if any(left):
            raise Violation(
                "left behind: (read leases, write leases, sessions, waiting matches, waiting "
                f"reserves, reserved, quarantined, leased bytes, one-reader blocks) = {left}"
            )
        if self.state.next_time_s() is not None:
            raise Violation("something can still run out, though nothing is there")

    def say(self, what: str) -> None:
        self.kernel.say(self.process.name, what)


class _DoorSession:
    """The node's side of one connection to its local door."""

    def __init__(self, node: SimNode, end: End, client_name: str) -> None:
        self._node = node
        self._end = end
        self.client_name = client_name
        self._reader = FrameReader()
        self.session_id: SessionId | None = None
        end.on_data = self._on_data
        end.on_end = self._on_end

    def fence(self) -> None:
        """Says and hears no more, but that the client is gone."""
        self._node.kernel.seen["clients cut off"] += 1
        assert self.session_id is not None, "cut off before it greeted"
        del self._node.door_sessions[self]
        self._end.on_data = None
        if self._node.fence_session(self.session_id):
            self._end.say_no_more()
        else:
            self._end.close()

    def _on_data(self, data: bytes) -> None:
        for payload in self._reader.feed(data):
            self._on_message(payload)

    def _on_end(self) -> None:
        self._end.close()
        self._node.door_sessions.pop(self, None)
        if self.session_id is not None:
            self._node.end_session(self.session_id)

    def _on_message(self, payload: bytes) -> None:
        message = parse(door_pb2.DoorRequest, payload)
        name = message.WhichOneof("request")
        if name is None:
            raise Violation("a client said what no node understands")
        if name == "hello":
            self._on_hello(message.call_id)
            return
        assert self.session_id is not None, "a client spoke before it greeted"
        if name == "cancel":
            self._node.kernel.seen["waiting calls cancelled"] += 1
            self._node.cancel(self.session_id, message.cancel.call_id)
            return
        try:
            request = request_from(name, getattr(message, name))
        except SnowskinError as error:
            raise Violation(f"a client sent what its node refuses to read: {error}") from error
        self._node.request(self.session_id, message.call_id, request)

    def _on_hello(self, call_id: int) -> None:
        node = self._node
        self.session_id = node.open_session(self.client_name, self._answer, maps=True)
        node.door_sessions[self] = None
        node.boards[self.session_id] = Board()
        greeting = Greeting(
            node_id=node.node_id,
            node_epoch=node.epoch,
            session_id=self.session_id,
            max_keys=node.settings.limits.max_keys,
            max_extent_nbytes=node.settings.limits.max_extent_nbytes,
            pools=(PoolGrant(pool_id=0, tier="dram", nbytes=node.memory.buffer.size, region=b""),),
        )
        response = door_pb2.DoorResponse(call_id=call_id)
        greeting_to(greeting, response.hello, WIRE_VERSION)
        self._end.send(frame(response.SerializeToString()))

    def _answer(self, call_id: int, reply: ReplyMessage | SnowskinError) -> None:
        if call_id == 0:
            return
        response = door_pb2.DoorResponse(call_id=call_id)
        if isinstance(reply, SnowskinError):
            response.error.CopyFrom(error_to_detail(reply))
        else:
            reply_to(reply, getattr(response, _REPLY_FIELDS[type(reply).__name__]))
        self._end.send(frame(response.SerializeToString()))


def pushed(step: Move) -> bytes:
    """What a push by gRPC sends: the bytes of its runs end to end."""
    buffer = step.local.buffer
    return b"".join(
        buffer[start : start + nbytes].tobytes()
        for _, runs in step.runs
        for _, start, nbytes in runs
    )


def _pieces(places: list[tuple[int, int]], offset: int, nbytes: int) -> list[tuple[int, int, int]]:
    """(offset in the pool, offset in the range, bytes) of a range over blocks laid end to end."""
    pieces, done = [], 0
    while done < nbytes:
        index, inside = divmod(offset + done, places[0][1])
        start, block_nbytes = places[index]
        length = min(block_nbytes - inside, nbytes - done)
        pieces.append((start + inside, done, length))
        done += length
    return pieces
