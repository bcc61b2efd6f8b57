"""One peer of `ucx`: the endpoint to it, what is said over it, and when it counts as lost.

Rules kept here: only the progress thread comes here; what UCX still reads is kept until UCX says so; a peer is lost
once, for one reason, and then its endpoint is closed, which ends everything posted on it; what is kept for a peer that
does not listen is bounded.

UCX keeps no order between messages: a small one may overtake a large one that waits for room. Whatever is said here is
understood in any order that can happen so.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import itertools
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from snowskin.transport.errors import BadFrame, PeerLost
from snowskin.transport.ucp.api import Span, UcpFailure
from snowskin.transport.ucx.wire import (
    LEAVING,
    MAX_DATA_NBYTES,
    WINDOW_NBYTES,
    MessageHead,
    MessageKind,
    encode_frame,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from snowskin.transport.frames import Frame
    from snowskin.transport.memory import Bytes
    from snowskin.transport.ucp.api import UcpWorker

MAX_UNTAKEN = 4096  # messages that UCX holds for one peer
MAX_EARLY = 64  # parts of a stream that came before what belongs in front of them


class Conversation:
    """What both sides have in common.

    Attributes:
        session: names it in every message; nobody can guess it.
        peer: who it is, for errors.
        heard_at_s: when the peer last said anything.
        said_at_s: when this side last did.
        over: whether it was lost, or closed.
    """

    def __init__(
        self,
        worker: UcpWorker,
        address: bytes,
        session: bytes,
        peer: str,
        *,
        is_owner: bool,
        on_lost: Callable[[PeerLost], object],
    ) -> None:
        """Connects; does not wait. `on_lost` is told once, unless `close` came first.

        Raises:
            UcpFailure: UCX cannot reach such an address from here.
        """
        self.session = session
        self.peer = peer
        self.over = False
        self.heard_at_s = self.said_at_s = time.monotonic()
        self._is_owner = is_owner
        self._on_lost = on_lost
        self._posted: dict[int, float] = {}  # sends that UCX has not finished, oldest first
        self._numbers = itertools.count()
        self.endpoint = worker.connect(address, self._failed)

    def say(self, frame: Frame, *, position: int = 0, op: int = 0) -> None:
        """Sends one frame; after the end nothing."""
        self._send_bytes(MessageKind.FRAME, op, position, encode_frame(frame))

    def tell(self, kind: MessageKind, op: int, position: int = 0, payload: bytes = b"") -> None:
        """Sends any other message."""
        self._send_bytes(kind, op, position, payload)

    def send_data(
        self, op: int, position: int, spans: Sequence[Span], done: Callable[[], object]
    ) -> None:
        """Sends DATA from memory that stays as it is until `done`, which always comes."""
        if self.over:
            done()
            return
        self._send(MessageKind.DATA, op, position, spans, done)

    def hear(self) -> None:
        """The peer lives."""
        self.heard_at_s = time.monotonic()

    def check(self, now_s: float, *, silence_s: float, stall_s: float) -> None:
        """Loses a peer that is silent, or that takes nothing, for too long."""
        oldest_s = next(iter(self._posted.values()), now_s)
        if now_s - self.heard_at_s >= silence_s:
            self.lose(f"said nothing for {now_s - self.heard_at_s:.1f} s")
        elif now_s - oldest_s >= stall_s:
            self.lose(f"took nothing for {now_s - oldest_s:.1f} s")

    def due_at_s(self, *, silence_s: float, stall_s: float) -> float:
        """When `check` would lose it, if nothing more is heard or taken."""
        silent_at_s = self.heard_at_s + silence_s
        if not self._posted:
            return silent_at_s
        return min(silent_at_s, next(iter(self._posted.values())) + stall_s)

    def lose(self, why: str) -> None:
        """Ends it and tells why."""
        if not self.over:
            self.close()
            self._on_lost(
                PeerLost(
                    f"{self.peer} {why}",
                    hint="ask another replica, or again: the way is made anew",
                    retry_after_s=0.1,
                )
            )

    def leave(self) -> None:
        """Says that this side ends it, and ends it. UCX's closing alone the peer may not notice."""
        self.tell(MessageKind.STOP, LEAVING)
        self.close()

    def close(self) -> None:
        """Ends it without a word. Idempotent."""
        if not self.over:
            self.over = True
            self.endpoint.close(lambda _failure: None)

    def _send_bytes(self, kind: MessageKind, op: int, position: int, payload: bytes) -> None:
        if self.over:
            return
        spans: tuple[Span, ...] = ()
        buffer = None
        if payload:
            buffer = ctypes.create_string_buffer(payload, len(payload))
            spans = (Span(ctypes.addressof(buffer), len(payload)),)
        # the buffer is an argument of what UCX calls at the end, and so lives until then
        done = functools.partial(_let_go, buffer)
        self._send(kind, op, position, spans, done)

    def _send(
        self,
        kind: MessageKind,
        op: int,
        position: int,
        spans: Sequence[Span],
        done: Callable[[], object],
    ) -> None:
        if len(self._posted) >= MAX_UNTAKEN:
            self.lose(f"takes none of {MAX_UNTAKEN} messages")
            done()
            return
        number = next(self._numbers)
        self._posted[number] = self.said_at_s = time.monotonic()

        def ended(failure: UcpFailure | None) -> None:
            self._posted.pop(number, None)
            done()
            if failure is not None:
                self._failed(failure)

        head = MessageHead(self.session, kind, op, position, self._is_owner)
        # HELLO may be refused by an owner who then needs no address of ours
        wants_reply = kind is MessageKind.HELLO
        self.endpoint.send(head.encode(), spans, ended, wants_reply=wants_reply)

    def _failed(self, failure: UcpFailure) -> None:
        self.lose(f"is gone: {failure.status}")


class Cursor:
    """Ranges of memory in order, as one stream of bytes.

    Attributes:
        position: how much of it was taken.
        nbytes: how much there is.
    """

    __slots__ = ("_ranges", "_starts", "nbytes", "position")

    def __init__(self, ranges: Sequence[tuple[int, int]], base: int = 0) -> None:
        """At the first byte of `(offset, nbytes)` ranges; `base` is the address of offset 0."""
        self._ranges = [(base + offset, nbytes) for offset, nbytes in ranges]
        self._starts = list(itertools.accumulate((n for _, n in ranges), initial=0))
        self.position = 0
        self.nbytes = self._starts[-1]

    def take(self, max_nbytes: int, max_spans: int = 1 << 30) -> list[Span]:
        """The next bytes, at most so many, in at most so many spans."""
        spans = self.at(self.position, max_nbytes, max_spans)
        self.position += sum(span.nbytes for span in spans)
        return spans

    def at(self, position: int, max_nbytes: int, max_spans: int = 1 << 30) -> list[Span]:
        """The bytes from `position` on, at most so many, in at most so many spans."""
        spans: list[Span] = []
        index = bisect.bisect_right(self._starts, position) - 1
        while max_nbytes and index < len(self._ranges) and len(spans) < max_spans:
            address, nbytes = self._ranges[index]
            skip = position - self._starts[index]
            taken = min(nbytes - skip, max_nbytes)
            spans.append(Span(address + skip, taken))
            position += taken
            max_nbytes -= taken
            index += 1
        return spans


class Buffers:
    """Chunks of memory for what is on its way to or from UCX, kept for the next transfer."""

    def __init__(self, max_kept: int) -> None:
        """None yet."""
        self._kept: deque[Bytes] = deque(maxlen=max_kept)

    def take(self) -> Bytes:
        """One of `MAX_DATA_NBYTES`."""
        try:
            return self._kept.pop()
        except IndexError:
            return np.empty(MAX_DATA_NBYTES, dtype=np.uint8)

    def give(self, buffer: Bytes) -> None:
        """Back."""
        self._kept.append(buffer)


class Arrivals:
    """Which parts of a stream came: UCX lets a message overtake another.

    Attributes:
        nbytes: how much there will be.
        arrived: how much came without a gap from the beginning.
        taken: how much the sender was told of, and so where it may send.
    """

    __slots__ = ("_early", "arrived", "nbytes", "taken")

    def __init__(self, nbytes: int) -> None:
        """Nothing came."""
        self.nbytes = nbytes
        self.arrived = 0
        self.taken = 0
        self._early: dict[int, int] = {}

    def add(self, position: int, nbytes: int) -> None:
        """A part came; BadFrame where it is empty, came before, or lies where nothing was to be sent."""
        if (
            not 0 < nbytes <= self.nbytes - position
            or not self.arrived <= position < self.taken + WINDOW_NBYTES
            or position in self._early
            or len(self._early) >= MAX_EARLY
        ):
            raise BadFrame(f"DATA of {nbytes} bytes at {position}, after {self.arrived}")
        self._early[position] = nbytes
        while self.arrived in self._early:
            self.arrived += self._early.pop(self.arrived)


class FairQueue:
    """Who may send next: the more urgent class first, within a class in turns."""

    def __init__(self, num_classes: int) -> None:
        """Empty."""
        self._queues: tuple[deque[object], ...] = tuple(deque() for _ in range(num_classes))

    def add(self, one: object, urgency: int) -> None:
        """Puts `one` behind those of its class; who puts it twice gets it twice."""
        self._queues[urgency].append(one)

    def __iter__(self) -> Iterator[object]:
        """Takes them out, the next one each time, until none is left."""
        while True:
            queue = next((queue for queue in self._queues if queue), None)
            if queue is None:
                return
            yield queue.popleft()


def _let_go(_buffer: object) -> None:
    """The end of a message's buffer."""
