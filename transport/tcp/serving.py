"""What an owner says to one reader: the data plane's order, seen from the owner's side. No I/O.

Rules kept here: a request is checked whole before memory is touched, and its grant again around each piece; one
transfer at a time; whatever the order of `docs/wire.md` §3 does not allow ends the connection with BAD_FRAME; every
phase but an idle one without limit has a time when it is over; how each transfer ends is counted once.

    GREETING ── HELLO ──→ IDLE ── PULL ──→ SENDING ── last byte ──→ IDLE, or AWAITING_DONE ── DONE ──→ IDLE
                               └─ PUSH ──→ RECEIVING ── last byte ──→ IDLE
    any ── breach ──→ LEAVING (the last words are on their way) ──→ OVER

The driver brings bytes (`receive`), sends `out` before anything else, moves payload between stream and memory as
`transfer` says inside `begin_piece` and `end_piece` of its grant (`sent`, `landed`), and calls `on_due` when
`due_at_s` has come.
"""

from __future__ import annotations

import enum
import logging
import math
from typing import TYPE_CHECKING, Protocol

from snowskin.transport.errors import (
    BadFrame,
    TransferTimedOut,
    TransportClosed,
    TransportError,
)
from snowskin.transport.frames import (
    HEAD_NBYTES,
    WIRE_VERSION,
    Clear,
    Done,
    Fail,
    Frame,
    Head,
    Hello,
    Kind,
    Ping,
    Pong,
    Welcome,
    decode_ask,
    decode_body,
    decode_head,
    encode,
    fail_of,
    named_grant,
)
from snowskin.transport.tcp.served_transfer import ServedTransfer
from snowskin.transport.words import Completion

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.grants import Grant, GrantTable
    from snowskin.transport.lending import Lending
    from snowskin.transport.tcp.settings import TcpSettings

FAREWELL_S = 1.0  # how long a peer may take to hear why its connection ends
MAX_PINGS = 64  # that come in one go

_log = logging.getLogger("snowskin.transport.tcp")


class Phase(enum.Enum):
    """Where a connection stands.

    Attributes:
        allowed: the frames that may come now; the DATA of a push goes past this, to memory.
    """

    GREETING = "greeting", (Kind.HELLO,)
    IDLE = "idle", (Kind.PULL, Kind.PUSH, Kind.PING)
    SENDING = "sending", ()
    AWAITING_DONE = "awaiting done", (Kind.DONE,)
    RECEIVING = "receiving", ()
    LEAVING = "leaving", ()
    OVER = "over", ()

    def __init__(self, text: str, allowed: tuple[Kind, ...]) -> None:
        self.text = text
        self.allowed = allowed


# An enum's attribute takes 50 ns to look up, and a small transfer looks a dozen times.
_GREETING, _IDLE, _SENDING, _AWAITING_DONE, _RECEIVING, _LEAVING, _OVER = Phase


class Ledger(Protocol):
    """Who counts what peers asked of this owner; an `OrderedTransport` does."""

    def count_served(self, nbytes: int) -> None:
        """A peer completed a transfer."""

    def count_served_failed(self) -> None:
        """A peer's transfer ended on the way."""

    def count_refused(self, reason: str) -> None:
        """A peer was refused something."""


class ServedConnection:
    """One reader, as the protocol sees it.

    Attributes:
        peer: its address, for logs.
        phase: where it stands.
        out: bytes that go over the stream before anything else.
        transfer: the one under way.
        num_served: transfers completed.
        news: whom to tell of what was completed, before `out` is sent.
    """

    __slots__ = (
        "_grants",
        "_heard_at_s",
        "_ledger",
        "_lends",
        "_may_lend",
        "_name",
        "_partial",
        "_partial_since_s",
        "_settings",
        "_since_s",
        "_wanted",
        "news",
        "num_served",
        "out",
        "peer",
        "phase",
        "transfer",
    )

    def __init__(
        self,
        grants: GrantTable,
        settings: TcpSettings,
        ledger: Ledger,
        *,
        peer: str,
        now_s: float,
        may_lend: Callable[[], bool] = bool,
    ) -> None:
        """Just accepted; `may_lend` is asked once, before anything is sent by reference."""
        self.peer = peer
        self.phase = _GREETING
        self.out = bytearray()
        self.transfer: ServedTransfer | None = None
        self.num_served = 0
        self.news: list[tuple[Grant, Completion]] = []
        self._grants = grants
        self._settings = settings
        self._ledger = ledger
        self._may_lend = may_lend
        self._lends: bool | None = None
        self._name = ""
        self._since_s = now_s  # of this phase
        self._heard_at_s = now_s
        self._partial = bytearray()
        self._partial_since_s = now_s
        self._wanted = HEAD_NBYTES

    def due_at_s(self) -> float:
        """When `on_due` must be called, unless something happens before."""
        settings, transfer = self._settings, self.transfer
        match self.phase:
            case Phase.IDLE:
                if self._partial:
                    return self._partial_since_s + settings.frame_timeout_s
                idle_s = settings.idle_timeout_s or math.inf
                return self._heard_at_s + idle_s
            case Phase.AWAITING_DONE:
                # Whatever the deadline: a DONE that is on its way belongs to a pull that was in time.
                assert transfer is not None, "in this phase there is one"
                return transfer.moved_at_s + settings.frame_timeout_s
            case Phase.SENDING | Phase.RECEIVING:
                assert transfer is not None, "in these phases there is one"
                return min(transfer.deadline_s, transfer.moved_at_s + settings.frame_timeout_s)
            case Phase.GREETING:
                return self._since_s + settings.hello_timeout_s
            case Phase.LEAVING:
                return self._since_s + FAREWELL_S
        return math.inf

    def receive(self, data: memoryview, now_s: float) -> None:
        """Bytes came that are no payload."""
        self._heard_at_s = now_s
        if self.phase is _LEAVING or self.phase is _OVER:
            return
        try:
            self._parse(data, now_s)
        except BadFrame as error:
            self.leave(error, now_s)

    def sent(self, nbytes: int, now_s: float) -> None:
        """So many bytes of `transfer.outgoing` are with the kernel."""
        transfer = self.transfer
        assert transfer is not None, "sent for a transfer"
        transfer.moved_at_s = now_s
        if transfer.sent(nbytes):
            if transfer.ask.wants_done:
                self._enter(_AWAITING_DONE, now_s)
            else:
                self._complete(b"", now_s, tells=False)

    def landed(self, nbytes: int, now_s: float) -> None:
        """So many bytes came into `transfer.incoming`."""
        transfer = self.transfer
        assert transfer is not None, "landed for a transfer"
        transfer.moved_at_s = now_s
        try:
            is_last = transfer.landed(nbytes)
        except BadFrame as error:
            self.leave(error, now_s)
            return
        if is_last:
            ask = transfer.ask
            self._complete(ask.note, now_s, tells=bool(ask.note) or ask.wants_done)
            self.out += encode(Done(op=ask.op, note=b""))

    def stop(self, error: TransportError, now_s: float) -> None:
        """The transfer under way ends here: its grant does not carry it any further, or its time is over.

        Between two frames the peer is told; inside one nothing can be said, and the connection is cut.
        """
        transfer = self.transfer
        assert transfer is not None, "only a transfer is stopped"
        self._ledger.count_refused(error.reason)
        self._fail()
        told = fail_of(transfer.ask.op, error)
        ends = isinstance(error, TransferTimedOut | TransportClosed)
        if transfer.ask.is_push:
            self._leave_with(told, now_s)  # its DATA is on the way, and has nowhere to go
        elif not transfer.between_frames:
            self._enter(_OVER, now_s)
        elif ends:
            self._leave_with(told, now_s)
        else:
            self.out += encode(told)
            self._enter(_IDLE, now_s)

    def leave(self, error: TransportError, now_s: float) -> None:
        """The connection ends because of `error`; the peer is told where that is possible."""
        if self.phase is _LEAVING or self.phase is _OVER:
            return
        self._ledger.count_refused(error.reason)
        in_frame = self.phase is _SENDING and not self._between_frames()
        self._fail()
        if in_frame:
            self._enter(_OVER, now_s)
        else:
            self._leave_with(fail_of(0, error), now_s)

    def lose(self, now_s: float) -> None:
        """The peer is gone."""
        self._fail()
        self._enter(_OVER, now_s)

    def on_due(self, now_s: float) -> None:
        """Ends what has waited too long; nothing where it was early."""
        if now_s < self.due_at_s():
            return
        transfer = self.transfer
        match self.phase:
            case Phase.GREETING:
                waited_s = now_s - self._since_s
                self.leave(BadFrame(f"no whole HELLO within {waited_s:.1f} s"), now_s)
            case Phase.IDLE if self._partial:
                waited_s = now_s - self._partial_since_s
                self.leave(BadFrame(f"a frame did not end within {waited_s:.1f} s"), now_s)
            case Phase.SENDING | Phase.RECEIVING | Phase.AWAITING_DONE if transfer is not None:
                if now_s >= transfer.deadline_s and self.phase is not _AWAITING_DONE:
                    error = TransferTimedOut(
                        f"{transfer.left} of {transfer.nbytes} bytes had not moved after "
                        f"{transfer.ask.timeout_ms} ms"
                    )
                else:
                    error = TransferTimedOut(
                        f"no byte moved for {now_s - transfer.moved_at_s:.1f} s"
                    )
                self.stop(error, now_s)
            case _:  # silent for too long, or the last words were said
                self.lose(now_s)

    def _parse(self, data: memoryview, now_s: float) -> None:
        """Takes all whole frames; keeps the rest."""
        if self._partial:
            self._partial += data
            if len(self._partial) < self._wanted:
                return
            data = memoryview(bytes(self._partial))
            self._partial.clear()
        position = num_pings = 0
        while position < len(data):
            phase = self.phase
            if not phase.allowed:
                raise BadFrame(f"{len(data) - position} bytes while {phase.text}")
            self._wanted = HEAD_NBYTES
            if len(data) - position >= HEAD_NBYTES:
                head = decode_head(data[position : position + HEAD_NBYTES])
                if head.kind not in phase.allowed:
                    raise BadFrame(f"{head.kind.name} while {phase.text}")
                self._wanted += head.nbytes
                if len(data) - position >= self._wanted:
                    body = data[position + HEAD_NBYTES : position + self._wanted]
                    position += self._wanted
                    num_pings += head.kind is Kind.PING
                    if num_pings > MAX_PINGS:
                        raise BadFrame(f"more than {MAX_PINGS} PINGs in one go")
                    self._take(head, body, is_last=position == len(data), now_s=now_s)
                    continue
            self._partial += data[position:]
            self._partial_since_s = now_s
            return

    def _take(self, head: Head, body: memoryview, *, is_last: bool, now_s: float) -> None:
        if head.kind is Kind.PULL or head.kind is Kind.PUSH:
            if not is_last:
                raise BadFrame(f"bytes behind {head.kind.name}, before its answer")
            self._take_ask(head, body, now_s)
            return
        frame: Frame = decode_body(head, bytes(body))
        match frame:
            case Ping():
                self.out += encode(Pong(op=frame.op))
            case Done():
                transfer = self.transfer
                assert transfer is not None, "in this phase there is one"
                if frame.op != transfer.ask.op:
                    raise BadFrame(f"DONE of op {frame.op} after pull {transfer.ask.op}")
                self._complete(frame.note, now_s, tells=bool(frame.note))
            case Hello():
                self._greet(frame, now_s)
            case _:
                raise AssertionError(f"{frame} passed the table of what is allowed")

    def _greet(self, hello: Hello, now_s: float) -> None:
        if not hello.min_version <= WIRE_VERSION <= hello.max_version:
            raise BadFrame(
                f"versions {hello.min_version} to {hello.max_version} of the data plane were "
                f"offered, {WIRE_VERSION} is spoken here"
            )
        settings = self._settings
        self._name = hello.name
        self.out += encode(
            Welcome(
                version=WIRE_VERSION,
                epoch=settings.epoch,
                max_ranges=settings.max_ranges,
                max_data_nbytes=settings.chunk_nbytes,
                idle_timeout_ms=round(1000 * settings.idle_timeout_s),
                ack_timeout_ms=round(1000 * settings.frame_timeout_s),
            )
        )
        self._enter(_IDLE, now_s)

    def _take_ask(self, head: Head, body: memoryview, now_s: float) -> None:
        """Checks a request whole, before anything of the memory is touched; its grant before its ranges are read."""
        if not head.op:
            raise BadFrame(f"{head.kind.name} with op 0")
        try:
            capability, epoch, generation = named_grant(body)
            grant = self._grants.find(capability, epoch=epoch, generation=generation)
            ask = decode_ask(head, bytes(body))
            if len(ask.ranges) > self._settings.max_ranges:
                raise BadFrame(
                    f"{len(ask.ranges)} ranges, {self._settings.max_ranges} are the most"
                )
            nbytes = grant.check(ask.ranges, is_push=ask.is_push, now_s=now_s)
        except BadFrame:
            raise
        except TransportError as error:
            self._ledger.count_refused(error.reason)
            self.out += encode(fail_of(head.op, error))
            return
        self.transfer = ServedTransfer(
            ask, grant, nbytes, chunk_nbytes=self._settings.chunk_nbytes, now_s=now_s
        )
        if ask.is_push:
            self.out += encode(Clear(op=ask.op))
        elif ask.wants_done and grant.region.lending is not None:
            self._borrow(self.transfer, grant.region.lending)
        self._enter(_RECEIVING if ask.is_push else _SENDING, now_s)

    def _borrow(self, transfer: ServedTransfer, lending: Lending) -> None:
        """Has the transfer sent by reference, where it is large and this peer may have pages."""
        least_nbytes = self._settings.lend_from_nbytes
        if transfer.nbytes >= least_nbytes:
            if self._lends is None:
                self._lends = self._may_lend()
            if self._lends:
                transfer.borrow(lending, least_nbytes=least_nbytes)

    def _complete(self, note: bytes, now_s: float, *, tells: bool) -> None:
        """All bytes of the transfer have moved."""
        transfer, self.transfer = self.transfer, None
        assert transfer is not None, "only a transfer is completed"
        self._heard_at_s = now_s
        self._enter(_IDLE, now_s)
        self.num_served += 1
        self._ledger.count_served(transfer.nbytes)
        transfer.settle()
        grant = transfer.grant
        if not tells or grant.on_done is None:
            return
        completion = Completion(
            capability=grant.descriptor.capability,
            nbytes=transfer.nbytes,
            is_push=transfer.ask.is_push,
            note=note,
        )
        self.news.append((grant, completion))

    def _between_frames(self) -> bool:
        return self.transfer is None or self.transfer.between_frames

    def _fail(self) -> None:
        if self.transfer is not None:
            self.transfer.forsake()
            self.transfer = None
            self._ledger.count_served_failed()

    def _leave_with(self, fail: Fail, now_s: float) -> None:
        _log.debug(  # whoever connects can cause it, as often as it likes; it is counted
            "connection ends",
            extra={"peer": self.peer, "reader": self._name, "reason": fail.reason},
        )
        self.out += encode(fail)
        self._partial.clear()
        self._enter(_LEAVING, now_s)

    def _enter(self, phase: Phase, now_s: float) -> None:
        self.phase = phase
        self._since_s = now_s
