"""The owner's side of `ucx`: what peers ask is checked, then sent from, or put into, granted memory.

Rules kept here: whoever cannot name a living grant is refused before anything that it sent is used or kept; a request
is checked whole before memory is touched, and its grant again around each chunk; a chunk is copied out between
`begin_piece` and `end_piece` and given to UCX after, so whoever revokes waits for no peer (UCX keeps for seconds what a
stopped one does not take); such a peer holds up nobody else, and loses its session after `stall_s`; what a peer makes
this side hold is bounded; what does not keep to `ucx/wire.py` ends its session.

All of it runs in the progress thread.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from snowskin.transport.api import TrafficClass
from snowskin.transport.errors import (
    BadFrame,
    PeerBusy,
    RegionExpired,
    TransferTimedOut,
    TransportError,
    TransportUnavailable,
)
from snowskin.transport.frames import (
    Ask,
    Clear,
    Done,
    Frame,
    Ping,
    Pong,
    Welcome,
    fail_of,
)
from snowskin.transport.memory_kind import HOST_KINDS
from snowskin.transport.ucp.api import Span, UcpFailure
from snowskin.transport.ucx.conversation import (
    Arrivals,
    Buffers,
    Conversation,
    Cursor,
    FairQueue,
)
from snowskin.transport.ucx.settings import CHUNK_NBYTES, MAX_HEARTBEAT_S
from snowskin.transport.ucx.wire import (
    LEAVING,
    MAX_DATA_NBYTES,
    ONE_SIDED,
    VERSION,
    WINDOW_NBYTES,
    Hello,
    MessageHead,
    MessageKind,
    decode_frame,
    encode_frame,
)
from snowskin.transport.words import Completion

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.errors import PeerLost
    from snowskin.transport.grants import Grant, GrantTable
    from snowskin.transport.ucp.api import Reply
    from snowskin.transport.ucx.progress import ProgressThread, Timer
    from snowskin.transport.ucx.settings import UcxSettings

MAX_SPANS = 256  # of one chunk
MAX_STOPPED = 64  # ops remembered that were given up before they were asked for
TICK_S = 0.25  # how late a deadline may be seen while something is served

log = logging.getLogger("snowskin.transport.ucx")


class Ledger(Protocol):
    """Who counts what peers asked of this owner; an `OrderedTransport` does."""

    def count_served(self, nbytes: int) -> None:
        """A peer completed a transfer."""

    def count_served_failed(self) -> None:
        """A peer's transfer ended on the way."""

    def count_refused(self, reason: str) -> None:
        """A peer was refused something."""


class Served:
    """One PULL or PUSH of a peer.

    Attributes:
        cursor: through the granted ranges.
        taken: how much of a pull the peer has where it belongs.
        arrivals: of a push, what came.
        one_sided: the peer moves the bytes by itself.
        before_nbytes: of the same transfer, under asks before this one.
    """

    __slots__ = (
        "arrivals",
        "ask",
        "before_nbytes",
        "cursor",
        "due_at_s",
        "grant",
        "one_sided",
        "queued",
        "session",
        "taken",
    )

    def __init__(self, session: Session, ask: Ask, grant: Grant, position: int) -> None:
        """After all of it was checked."""
        self.session = session
        self.ask = ask
        self.grant = grant
        self.cursor = Cursor(ask.ranges, grant.region.address)
        self.taken = 0
        self.arrivals = Arrivals(self.cursor.nbytes)
        self.one_sided = bool(position & ONE_SIDED)
        self.before_nbytes = position & ~ONE_SIDED
        self.due_at_s = time.monotonic() + ask.timeout_ms / 1000
        self.queued = False

    @property
    def is_over(self) -> bool:
        """Whether it ended, in whatever way."""
        return self.session.served.get(self.ask.op) is not self


@dataclass(slots=True, kw_only=True, eq=False)
class Session:
    """A reader that this side talks to.

    Attributes:
        num_posted: chunks to it that are in UCX's hands.
        held: pulls whose turn came while these were as many as may be.
        stopped: ops that were given up before they were asked for: STOP overtook them.
    """

    conversation: Conversation
    silence_s: float
    num_posted: int = 0
    held: deque[Served] = field(default_factory=deque)
    stopped: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_STOPPED))
    served: dict[int, Served] = field(default_factory=dict)


class Owner:
    """All sessions of an owner."""

    def __init__(
        self,
        thread: Callable[[], ProgressThread],
        settings: UcxSettings,
        grants: GrantTable,
        ledger: Ledger,
        now_s: Callable[[], float],
        notify: Callable[[Callable[[], object]], object],
    ) -> None:
        """`now_s` is the clock of grants; `notify` calls who listens for completions, where he may wait."""
        self._thread = thread
        self._settings = settings
        self._grants = grants
        self._ledger = ledger
        self._now_s = now_s
        self._notify = notify
        self._sessions: dict[bytes, Session] = {}
        self._waiting = FairQueue(len(TrafficClass))
        self._buffers = Buffers(settings.max_chunks_posted)
        self._num_posted = 0
        self._pumping = False
        self._tick_timer: Timer | None = None
        self._ticks_fast = False
        self.num_lost = 0

    @property
    def num_sessions(self) -> int:
        """Readers that are talked to now."""
        return len(self._sessions)

    def arrive(self, head: MessageHead, payload: Span, reply: Reply | None = None) -> None:
        """A message of a reader; of one who is unknown only HELLO is read, and answered where that is possible."""
        session = self._sessions.get(head.session)
        if session is None:
            if head.kind is MessageKind.HELLO:
                greeting = ctypes.string_at(payload.address, payload.nbytes)
                try:
                    self._greet(head.session, greeting)
                except TransportError as error:
                    self._ledger.count_refused(error.reason)
                    if reply is not None:
                        refusal = head._replace(kind=MessageKind.FRAME, by_owner=True)
                        reply(refusal.encode(), encode_frame(fail_of(0, error)))
            return
        session.conversation.hear()
        try:
            self._take(session, head, payload)
        except BadFrame as error:
            self._ledger.count_refused(error.reason)
            session.conversation.say(fail_of(0, error))
            log.warning("ucx: %s breaks the protocol: %s", session.conversation.peer, error)
            self._end(session)

    def close(self) -> None:
        """Ends all sessions."""
        for session in list(self._sessions.values()):
            session.conversation.leave()
            self._end(session)

    def _greet(self, name: bytes, payload: bytes) -> None:
        """Answers a reader who can name a living grant; else raises, and nothing of his address was used."""
        hello = Hello.decode(payload)
        grant = self._grants.find(hello.capability, epoch=hello.epoch, generation=hello.generation)
        if self._now_s() >= grant.expires_at_s:
            raise RegionExpired("this grant is over", hint="match again")
        if len(self._sessions) >= self._settings.max_sessions:
            raise PeerBusy(f"{len(self._sessions)} peers are served", retry_after_s=1.0)
        settings = self._settings
        session: Session | None = None

        def lost(error: PeerLost) -> None:
            self.num_lost += 1
            log.info("ucx: reader lost: %s", error)
            if session is not None:
                self._end(session)

        try:
            conversation = Conversation(
                self._thread().worker,
                hello.address,
                name,
                hello.name or "a reader",
                is_owner=True,
                on_lost=lost,
            )
        except (UcpFailure, ValueError) as error:
            log.warning("ucx: %s cannot be answered: %s", hello.name, error)
            return
        heartbeat_s = min(hello.heartbeat_ms / 1000, MAX_HEARTBEAT_S)
        silence_s = max(settings.silence_s, 3 * heartbeat_s)
        session = Session(conversation=conversation, silence_s=silence_s)
        self._sessions[name] = session
        conversation.say(
            Welcome(
                version=VERSION,
                epoch=hello.epoch,
                max_ranges=4096,
                max_data_nbytes=MAX_DATA_NBYTES,
                idle_timeout_ms=int(silence_s * 1000),
                ack_timeout_ms=int(settings.stall_s * 1000),
            )
        )
        self._keep_ticking()

    def _take(self, session: Session, head: MessageHead, payload: Span) -> None:
        match head.kind:
            case MessageKind.FRAME:
                frame = decode_frame(ctypes.string_at(payload.address, payload.nbytes))
                self._take_frame(session, frame, head.position)
            case MessageKind.DATA:
                self._take_data(session, head, payload)
            case MessageKind.TAKEN:
                self._take_taken(session, head)
            case MessageKind.STOP if head.op == LEAVING:
                self._end(session)
            case MessageKind.STOP:
                served = session.served.pop(head.op, None)
                if served is not None:
                    self._ledger.count_served_failed()
                else:
                    session.stopped.append(head.op)
            case MessageKind.HELLO:
                raise BadFrame("a second HELLO")

    def _take_frame(self, session: Session, frame: Frame, position: int) -> None:
        match frame:
            case Ping():
                session.conversation.say(Pong(op=frame.op))
            case Ask():
                self._take_ask(session, frame, position)
            case Done():
                served = session.served.get(frame.op)
                if served is None:
                    return  # it timed out here meanwhile
                all_sent = served.cursor.position == served.cursor.nbytes
                if not served.one_sided and (served.ask.is_push or not all_sent):
                    raise BadFrame("DONE before the last byte")
                self._complete(served, frame.note)
            case _:
                raise BadFrame(f"a reader says {type(frame).__name__.upper()}")

    def _take_ask(self, session: Session, ask: Ask, position: int) -> None:
        if ask.op in session.served:
            raise BadFrame(f"op {ask.op} is under way")
        if ask.op in session.stopped:
            return
        try:
            if len(session.served) >= self._settings.max_transfers:
                raise PeerBusy(f"{len(session.served)} transfers of one peer are under way")
            grant = self._grants.find(ask.capability, epoch=ask.epoch, generation=ask.generation)
            grant.check(ask.ranges, is_push=ask.is_push, now_s=self._now_s())
            served = Served(session, ask, grant, position)
            if served.one_sided and not self._settings.offers_one_sided:
                raise TransportUnavailable(
                    "this owner does not let its memory be reached one-sidedly"
                )
            if not served.one_sided and grant.region.kind not in HOST_KINDS:
                raise TransportUnavailable(
                    "device memory moves one-sidedly only", hint="over rc, dc or cuda_ipc"
                )
        except TransportError as error:
            self._ledger.count_refused(error.reason)
            session.conversation.say(fail_of(ask.op, error))
            return
        session.served[ask.op] = served
        self._keep_ticking()
        if ask.is_push or served.one_sided:
            session.conversation.say(Clear(op=ask.op))
        else:
            self._queue(served)
            self._pump()

    def _take_taken(self, session: Session, head: MessageHead) -> None:
        served = session.served.get(head.op)
        if served is None:
            return
        if served.ask.is_push or not 0 < head.position <= served.cursor.position:
            raise BadFrame(f"TAKEN {head.position} of {served.cursor.position}")
        if head.position <= served.taken:
            return  # overtaken by a later one
        served.taken = head.position
        if served.taken == served.cursor.nbytes:
            if not served.ask.wants_done:
                self._complete(served, b"")
        else:
            self._queue(served)
            self._pump()

    def _take_data(self, session: Session, head: MessageHead, payload: Span) -> None:
        served = session.served.get(head.op)
        if served is None:
            return  # refused or over meanwhile: its bytes were on their way
        if not served.ask.is_push or served.one_sided:
            raise BadFrame("DATA of a transfer that takes none")
        arrivals = served.arrivals
        arrivals.add(head.position, payload.nbytes)
        try:
            served.grant.begin_piece(self._now_s())
        except TransportError as error:
            self._fail(served, error)
            return
        try:
            source = payload.address
            for address, nbytes in served.cursor.at(head.position, payload.nbytes):
                ctypes.memmove(address, source, nbytes)
                source += nbytes
        finally:
            served.grant.end_piece()
        if arrivals.arrived > arrivals.taken:
            arrivals.taken = arrivals.arrived
            session.conversation.tell(MessageKind.TAKEN, head.op, arrivals.taken)
        if arrivals.arrived == arrivals.nbytes:
            self._complete(served, served.ask.note)
            session.conversation.say(Done(op=head.op, note=b""))

    def _queue(self, served: Served) -> None:
        """Lets a pull wait for its turn, where the peer has taken enough of it."""
        cursor = served.cursor
        if (
            not served.queued
            and cursor.position < cursor.nbytes
            and cursor.position - served.taken < WINDOW_NBYTES
        ):
            served.queued = True
            self._waiting.add(served, served.ask.traffic)

    def _pump(self) -> None:
        """Posts chunks while UCX has room; a chunk that is done at once does not come in here twice."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._num_posted < self._settings.max_chunks_posted:
                served = next(iter(self._waiting), None)
                if served is None:
                    return
                assert isinstance(served, Served), "nothing else is queued"
                if served.session.num_posted >= self._settings.max_chunks_a_peer:
                    served.session.held.append(served)
                    continue
                served.queued = False
                if not served.is_over:
                    self._send_chunk(served)
        finally:
            self._pumping = False

    def _send_chunk(self, served: Served) -> None:
        session, cursor, buffer = served.session, served.cursor, self._buffers.take()
        try:
            served.grant.begin_piece(self._now_s())
        except TransportError as error:
            self._buffers.give(buffer)
            self._fail(served, error)
            return
        position, begin = cursor.position, int(buffer.ctypes.data)
        end = begin
        try:
            for address, nbytes in cursor.take(CHUNK_NBYTES, MAX_SPANS):
                ctypes.memmove(end, address, nbytes)
                end += nbytes
        finally:
            served.grant.end_piece()
        self._num_posted += 1
        session.num_posted += 1

        def done() -> None:
            self._buffers.give(buffer)
            self._num_posted -= 1
            session.num_posted -= 1
            while session.held:
                held = session.held.popleft()
                self._waiting.add(held, held.ask.traffic)
            self._pump()

        self._queue(served)
        chunk = Span(begin, end - begin)
        session.conversation.send_data(served.ask.op, position, (chunk,), done)

    def _fail(self, served: Served, error: TransportError) -> None:
        served.session.served.pop(served.ask.op, None)
        self._ledger.count_served_failed()
        served.session.conversation.say(fail_of(served.ask.op, error))

    def _complete(self, served: Served, note: bytes) -> None:
        served.session.served.pop(served.ask.op, None)
        self._ledger.count_served(served.cursor.nbytes)
        on_done = served.grant.on_done
        if note and on_done is not None:
            completion = Completion(
                capability=served.ask.capability,
                nbytes=served.before_nbytes + served.cursor.nbytes,
                is_push=served.ask.is_push,
                note=note,
            )
            self._notify(functools.partial(on_done, completion))

    def _end(self, session: Session) -> None:
        """Forgets a session and closes its endpoint; what it had under way has failed."""
        if self._sessions.pop(session.conversation.session, None) is None:
            return
        for _ in session.served:
            self._ledger.count_served_failed()
        session.served.clear()
        session.conversation.close()

    def _keep_ticking(self) -> None:
        """Has `_tick` called soon while anything is under way, else when a reader would be silent for too long."""
        busy = bool(self._num_posted or any(each.served for each in self._sessions.values()))
        if self._tick_timer is not None and (self._ticks_fast or not busy):
            return
        if self._tick_timer is not None:
            self._tick_timer.cancel()
            self._tick_timer = None
        if self._sessions:
            self._ticks_fast = busy
            self._tick_timer = self._thread().later(self._tick_in_s(), self._tick)

    def _tick_in_s(self) -> float:
        """Seconds until somebody may have to be lost; nobody who comes meanwhile has to be before that."""
        if self._ticks_fast:
            return TICK_S
        now_s, stall_s = time.monotonic(), self._settings.stall_s
        dues_s = (
            session.conversation.due_at_s(silence_s=session.silence_s, stall_s=stall_s) - now_s
            for session in self._sessions.values()
        )
        return max(TICK_S, min(stall_s, self._settings.silence_s, *dues_s))

    def _tick(self) -> None:
        """Looks at who is silent and what took too long."""
        self._tick_timer = None
        now_s = time.monotonic()
        for session in list(self._sessions.values()):
            session.conversation.check(
                now_s, silence_s=session.silence_s, stall_s=self._settings.stall_s
            )
            for served in list(session.served.values()):
                if now_s >= served.due_at_s:
                    what = f"{served.ask.timeout_ms} ms were over at the owner"
                    self._fail(served, TransferTimedOut(what))
        self._keep_ticking()
