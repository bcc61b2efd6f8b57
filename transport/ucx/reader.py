"""The reader's side of `ucx`: links to owners, and the transfers under way over them.

Rules kept here: a link is made when the first transfer needs it, is kept while a region of its owner is attached and
`linger_s` longer (each lease attaches its own), and is made anew after it was lost, with a growing pause; everything a
lost link had under way fails with the same PeerLost.
The progress thread (`Reader`, `Link`) never touches a landing region: what arrives is put into a transfer's `Mailbox`,
and the thread that asked for it lands it (`ucx.py`). So a transfer that has ended lands nothing, without quarantine.
"""

from __future__ import annotations

import collections
import ctypes
import logging
import secrets
import threading
import time
from typing import TYPE_CHECKING

from snowskin.transport.errors import BadFrame, PeerLost, TransportError
from snowskin.transport.frames import (
    Clear,
    Done,
    Fail,
    Frame,
    Ping,
    Pong,
    Welcome,
)
from snowskin.transport.ucp.api import UcpFailure
from snowskin.transport.ucx.conversation import Arrivals, Buffers, Conversation
from snowskin.transport.ucx.wire import (
    LEAVING,
    ONE_SIDED,
    SESSION_NBYTES,
    Hello,
    MessageHead,
    MessageKind,
    decode_frame,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.frames import Ask
    from snowskin.transport.memory import Bytes
    from snowskin.transport.ordered import Order
    from snowskin.transport.ucp.api import Span, UcpKey
    from snowskin.transport.ucx.progress import ProgressThread, Timer
    from snowskin.transport.ucx.settings import UcxSettings
    from snowskin.transport.ucx.wire import Reach

MAX_RECONNECT_S = 2.0
NUM_KEPT = 8  # chunks of memory, 1 MiB each
SOON_S = 0.01
GLANCE_S = 0.2  # how late a waiting transfer may see that a region was closed

log = logging.getLogger("snowskin.transport.ucx")

_ERRORS = {error.reason: error for error in TransportError.__subclasses__()}


def error_of(fail: Fail, peer: str) -> TransportError:
    """What an owner refused, as an error of this side."""
    error = _ERRORS.get(fail.reason, TransportError)
    return error(
        f"{peer} refused it: {fail.message}"
        if error is not TransportError
        else f"{peer} refused it ({fail.reason}): {fail.message}",
        retry_after_s=fail.retry_after_ms / 1000 if fail.retry_after_ms else None,
    )


class Mailbox:
    """What the progress thread tells a transfer, in order; its own thread waits for it.

    Attributes:
        link: where it is under way, None before.
        total_nbytes: of its stream.
        arrivals: of a pull, what came; the rest waits in `early`.
        taken: of a push, how much the owner has.
        sent: of a push, how much was sent.
        is_cleared: whether the owner said CLEAR.
    """

    def __init__(self, order: Order, reach: Reach, ask: Ask, position: int) -> None:
        """`position` is that of the ask's message."""
        self.order = order
        self.reach = reach
        self.ask = ask
        self.position = position
        self.total_nbytes = sum(nbytes for _, nbytes in ask.ranges)
        self.link: Link | None = None
        self.arrivals = Arrivals(self.total_nbytes)
        self.early: dict[int, tuple[Bytes, int]] = {}
        self.taken = 0
        self.sent = 0
        self.is_cleared = False
        self._items: collections.deque[object] = collections.deque()
        self._error: TransportError | None = None
        self._changed = threading.Condition()

    @property
    def is_one_sided(self) -> bool:
        """Whether this side moves the bytes by itself."""
        return bool(self.position & ONE_SIDED)

    @property
    def is_brought(self) -> bool:
        """Whether it is a push whose bytes go in messages."""
        return self.ask.is_push and not self.is_one_sided and self.is_cleared

    def put(self, item: object) -> None:
        """Tells something."""
        with self._changed:
            self._items.append(item)
            self._changed.notify()

    def fail(self, error: TransportError) -> None:
        """Tells that nothing more will come."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify()

    def wake(self) -> None:
        """Lets who waits look around."""
        with self._changed:
            self._changed.notify()

    def complete(self, note: bytes | None) -> None:
        """In the progress thread: tells the owner that all is where it belongs."""
        if self.link is not None:
            self.link.complete(self, note)

    def tell_taken(self, position: int) -> None:
        """In the progress thread: tells the owner how much is where it belongs."""
        if self.link is not None:
            self.arrivals.taken = position
            self.link.conversation.tell(MessageKind.TAKEN, self.ask.op, position)

    def stop(self) -> None:
        """In the progress thread: gives the transfer up."""
        if self.link is not None:
            self.link.stop(self)

    def next(self, look: Callable[[], float]) -> object:
        """The next thing told; `look` raises what ends the transfer from this side, else says how long to wait."""
        while True:
            wait_s = look()
            with self._changed:
                if self._items:
                    return self._items.popleft()
                if self._error is not None:
                    raise self._error
                self._changed.wait(min(wait_s, GLANCE_S))


class Link:
    """The way to one owner."""

    def __init__(self, reader: Reader, reach: Reach, descriptor: RegionDescriptor) -> None:
        """Connects; raises UcpFailure. It is for the right of `descriptor` until its owner has answered."""
        self.open = False
        self.capability = descriptor.capability
        self.under_way: dict[int, Mailbox] = {}
        self.keys: dict[bytes, UcpKey] = {}
        self.began_at_s = time.monotonic()
        self.unused_since_s = self.began_at_s  # once no region of its owner is attached
        self._reader = reader
        self._waiting: list[Mailbox] = []
        self.conversation = Conversation(
            reader.thread().worker,
            reach.address,
            secrets.token_bytes(SESSION_NBYTES),
            reach.name,
            is_owner=False,
            on_lost=lambda error: reader.lost(self, error),
        )

    def greet(self, descriptor: RegionDescriptor) -> None:
        """Says HELLO; the reader knows this link already, for it may be lost at once."""
        settings = self._reader.settings
        hello = Hello(
            capability=descriptor.capability,
            epoch=descriptor.epoch,
            generation=descriptor.generation,
            heartbeat_ms=int(settings.heartbeat_s * 1000),
            name=settings.name,
            address=self._reader.thread().worker.address,
        )
        self.conversation.tell(MessageKind.HELLO, 0, payload=hello.encode())

    def begin(self, mailbox: Mailbox) -> None:
        """Asks for a transfer, once the owner has answered HELLO."""
        if not self.open:
            self._waiting.append(mailbox)
            return
        self.under_way[mailbox.ask.op] = mailbox
        self.conversation.say(mailbox.ask, position=mailbox.position)

    def complete(self, mailbox: Mailbox, note: bytes | None) -> None:
        """Says that all of a pull is where it belongs, and DONE where a note is given."""
        op = mailbox.ask.op
        if self.under_way.pop(op, None) is not None:
            if note is not None:
                self.conversation.say(Done(op=op, note=note))
            else:
                self.conversation.tell(MessageKind.TAKEN, op, mailbox.total_nbytes)

    def stop(self, mailbox: Mailbox) -> None:
        """Gives a transfer up; what still comes for it is dropped."""
        if mailbox in self._waiting:
            self._waiting.remove(mailbox)
        if self.under_way.pop(mailbox.ask.op, None) is not None:
            self.conversation.tell(MessageKind.STOP, mailbox.ask.op)

    def key(self, packed: bytes) -> UcpKey:
        """The owner's key, unpacked here once; it came under the digest of its descriptor."""
        key = self.keys.get(packed)
        if key is None:
            key = self.keys[packed] = self.conversation.endpoint.unpack(packed)
        return key

    def abandon(self, why: str) -> None:
        """Ends a link whose owner did nothing wrong; the next transfer makes another at once."""
        if not self.conversation.over:
            self._reader.forget(self)
            self.end(
                PeerLost(f"{self.conversation.peer}: {why}", hint="begin again", retry_after_s=0.0)
            )

    def take_others(self) -> list[Mailbox]:
        """What waits for the owner's answer under other rights than the one that this link began with."""
        others = [each for each in self._waiting if each.ask.capability != self.capability]
        self._waiting = [each for each in self._waiting if each.ask.capability == self.capability]
        return others

    def end(self, error: TransportError) -> None:
        """Fails what is under way and leaves."""
        self.keys.clear()
        self.conversation.leave()
        for mailbox in [*self._waiting, *self.under_way.values()]:
            mailbox.fail(error)
        self._waiting.clear()
        self.under_way.clear()

    def arrive(self, head: MessageHead, payload: Span) -> None:
        """A message of the owner."""
        self.conversation.hear()
        match head.kind:
            case MessageKind.FRAME:
                self._take_frame(decode_frame(ctypes.string_at(payload.address, payload.nbytes)))
            case MessageKind.DATA:
                self._take_data(head, payload)
            case MessageKind.TAKEN:
                self._take_taken(head)
            case MessageKind.STOP if head.op == LEAVING:
                self.conversation.lose("has closed")
            case _:
                raise BadFrame(f"an owner says {head.kind.name}")

    def _take_frame(self, frame: Frame) -> None:
        match frame:
            case Welcome():
                self.open = True
                waiting, self._waiting = self._waiting, []
                self._reader.reached(self)
                for mailbox in waiting:
                    self.begin(mailbox)
            case Ping():
                self.conversation.say(Pong(op=frame.op))
            case Pong():
                pass
            case Clear():
                cleared = self.under_way.get(frame.op)
                if cleared is not None:
                    if cleared.is_cleared or not (cleared.ask.is_push or cleared.is_one_sided):
                        raise BadFrame("CLEAR of what waits for none")
                    cleared.is_cleared = True
                    cleared.put(frame)
            case Done():
                done = self.under_way.get(frame.op)
                if done is not None:
                    if not done.is_brought or done.sent < done.total_nbytes:
                        raise BadFrame("DONE before the last byte")
                    del self.under_way[frame.op]
                    if done.taken < done.total_nbytes:  # it overtook the last TAKEN
                        done.put(done.total_nbytes)
                    done.put(frame)
            case Fail() if frame.op:
                refused = self.under_way.pop(frame.op, None)
                if refused is not None:
                    refused.fail(error_of(frame, self.conversation.peer))
            case Fail() if not self.open:
                self._reader.refused(self, error_of(frame, self.conversation.peer))
            case Fail():
                self.conversation.lose(f"ended the conversation: {frame.reason} {frame.message}")
            case _:
                raise BadFrame(f"an owner says {type(frame).__name__.upper()}")

    def _take_taken(self, head: MessageHead) -> None:
        mailbox = self.under_way.get(head.op)
        if mailbox is not None:
            if not mailbox.is_brought or not 0 < head.position <= mailbox.sent:
                raise BadFrame(f"TAKEN {head.position} of {mailbox.sent}")
            if head.position > mailbox.taken:  # else a later one overtook it
                mailbox.taken = head.position
                mailbox.put(head.position)

    def _take_data(self, head: MessageHead, payload: Span) -> None:
        mailbox = self.under_way.get(head.op)
        if mailbox is None:
            return  # given up meanwhile
        if mailbox.ask.is_push or mailbox.is_one_sided:
            raise BadFrame("DATA of a transfer that takes none")
        arrivals = mailbox.arrivals
        position = arrivals.arrived
        arrivals.add(head.position, payload.nbytes)
        buffer = self._reader.buffers.take()
        ctypes.memmove(buffer.ctypes.data, payload.address, payload.nbytes)
        mailbox.early[head.position] = (buffer, payload.nbytes)
        while position < arrivals.arrived:
            item = mailbox.early.pop(position)
            position += item[1]
            mailbox.put(item)


class Reader:
    """All links of a reader; every method but `num_links` only in the progress thread."""

    def __init__(self, thread: Callable[[], ProgressThread], settings: UcxSettings) -> None:
        """No link yet."""
        self.thread = thread
        self.settings = settings
        self.buffers = Buffers(NUM_KEPT)
        self._links: dict[bytes, Link] = {}  # by the owner's address
        self._by_session: dict[bytes, Link] = {}
        self._pauses: dict[bytes, tuple[float, float]] = {}  # not before, and how long next
        self._num_attached: collections.Counter[bytes] = collections.Counter()
        self._tick_timer: Timer | None = None
        self.num_connected = 0
        self.num_lost = 0

    @property
    def num_links(self) -> int:
        """Owners that are talked to now."""
        return len(self._links)

    def transports(self) -> dict[str, tuple[str, ...]]:
        """What UCX uses, by owner."""
        return {
            link.conversation.peer: link.conversation.endpoint.transports()
            for link in self._links.values()
            if link.open
        }

    def attach(self, address: bytes) -> None:
        """A region of this owner is attached."""
        self._num_attached[address] += 1

    def detach(self, address: bytes) -> None:
        """One is not any more."""
        self._num_attached[address] -= 1
        if self._num_attached[address] < 1:
            del self._num_attached[address]
            link = self._links.get(address)
            if link is not None:
                link.unused_since_s = time.monotonic()

    def begin(self, mailbox: Mailbox) -> None:
        """Asks for a transfer; it fails by its mailbox."""
        link = self._links.get(mailbox.reach.address)
        if link is None:
            try:
                link = self._connect(mailbox.reach, mailbox.order.remote.descriptor)
            except PeerLost as error:
                mailbox.fail(error)
                return
        mailbox.link = link
        link.begin(mailbox)

    def arrive(self, head: MessageHead, payload: Span) -> None:
        """A message of an owner; those of nobody known here are dropped."""
        link = self._by_session.get(head.session)
        if link is not None:
            try:
                link.arrive(head, payload)
            except BadFrame as error:
                link.conversation.lose(f"breaks the protocol: {error}")

    def reached(self, link: Link) -> None:
        """The owner answered: the pauses begin anew."""
        for address, known in self._links.items():
            if known is link:
                self._pauses.pop(address, None)

    def refused(self, link: Link, error: TransportError) -> None:
        """The owner does not talk to us under the right that we named; under another one it may."""
        self.forget(link)
        others = link.take_others()
        link.end(error)
        for mailbox in others:
            self.begin(mailbox)

    def lost(self, link: Link, error: PeerLost) -> None:
        """The way to an owner is gone, and all that was under way over it."""
        self.num_lost += 1
        log.info("ucx: %s", error)
        address = self.forget(link)
        if address in self._num_attached:
            _, pause_s = self._pauses.get(address, (0.0, self.settings.reconnect_s))
            self._pauses[address] = (
                time.monotonic() + pause_s,
                min(2 * pause_s, MAX_RECONNECT_S),
            )
        link.end(error)

    def close(self, error: TransportError) -> None:
        """Ends all links."""
        for link in list(self._links.values()):
            self.forget(link)
            link.end(error)

    def _connect(self, reach: Reach, descriptor: RegionDescriptor) -> Link:
        now_s = time.monotonic()
        self._pauses = {
            address: pause
            for address, pause in self._pauses.items()
            if now_s < pause[0] + MAX_RECONNECT_S
        }
        not_before_s, _ = self._pauses.get(reach.address, (0.0, 0.0))
        if now_s < not_before_s:
            raise PeerLost(
                f"{reach.name} was lost a moment ago",
                hint="ask another replica meanwhile",
                retry_after_s=not_before_s - now_s,
            )
        try:
            link = Link(self, reach, descriptor)
        except (UcpFailure, ValueError) as error:
            raise PeerLost(
                f"{reach.name} cannot be reached: {error}", hint="do both sides share a network?"
            ) from error
        self._links[reach.address] = link
        self._by_session[link.conversation.session] = link
        link.greet(descriptor)
        if link.conversation.over:
            raise PeerLost(
                f"{reach.name} was lost with the first word",
                hint="ask another replica, or again: the way is made anew",
                retry_after_s=self.settings.reconnect_s,
            )
        self.num_connected += 1
        if self._tick_timer is None:
            self._tick_timer = self.thread().later(self._tick_in_s(), self._tick)
        return link

    def forget(self, link: Link) -> bytes:
        """No message goes to this link any more; the address that it was for."""
        self._by_session.pop(link.conversation.session, None)
        for address, known in list(self._links.items()):
            if known is link:
                del self._links[address]
                return address
        return b""

    def _tick_in_s(self) -> float:
        """Seconds until somebody is due; nobody who comes meanwhile is due before that."""
        settings, now_s = self.settings, time.monotonic()
        due_in_s = min(
            settings.heartbeat_s, settings.connect_timeout_s, settings.silence_s, settings.stall_s
        )
        for address, link in self._links.items():
            conversation = link.conversation
            dues_s = [
                conversation.due_at_s(silence_s=settings.silence_s, stall_s=settings.stall_s),
                conversation.said_at_s + settings.heartbeat_s
                if link.open
                else link.began_at_s + settings.connect_timeout_s,
            ]
            if address not in self._num_attached:
                dues_s.append(link.unused_since_s + settings.linger_s)
            due_in_s = min(due_in_s, min(dues_s) - now_s)
        return max(SOON_S, due_in_s)

    def _tick(self) -> None:
        """Says PING to those who heard nothing for a while, loses those who say nothing, leaves who is not needed."""
        self._tick_timer = None
        now_s = time.monotonic()
        settings = self.settings
        for address, link in list(self._links.items()):
            conversation = link.conversation
            if (
                address not in self._num_attached
                and now_s - link.unused_since_s >= settings.linger_s
            ):
                self.forget(link)
                link.end(PeerLost(f"all regions of {conversation.peer} were closed"))
                continue
            if not link.open and now_s - link.began_at_s >= settings.connect_timeout_s:
                conversation.lose(f"did not answer within {settings.connect_timeout_s} s")
                continue
            if link.open and now_s - conversation.said_at_s >= settings.heartbeat_s:
                conversation.say(Ping(op=1))
            conversation.check(now_s, silence_s=settings.silence_s, stall_s=settings.stall_s)
        if self._links:
            self._tick_timer = self.thread().later(self._tick_in_s(), self._tick)
