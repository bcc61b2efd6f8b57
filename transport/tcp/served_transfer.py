"""One PULL or PUSH that an owner serves: which frame, which range, which byte. No I/O.

Rules kept here: the bytes are those of the ranges, in their order; a frame is begun only where bytes are left; what is
lent goes over by reference, and all else of the same ranges is copied.

*By reference*: the kernel sends from the pages of the pool's memfd itself (sendfile(2)), without copying them into
buffers of its own. Then the pages are referred to until the reader has taken their bytes, wherever it runs; that is
what `Lending` keeps count of, and why only a PULL whose reader says DONE is served in this way.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from snowskin.transport.errors import BadFrame
from snowskin.transport.frames import HEAD_NBYTES, Ask, Kind, decode_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.transport.grants import Grant
    from snowskin.transport.lending import Lending, Loan

MAX_VIEWS = 1023  # of one piece; the kernel takes 1,024 with the head
COPIED_FRAME_NBYTES = 2 << 20  # between two frames a peer can be told why its transfer ends
# Sent at once; then it is looked again whose turn it is, and at the grant. The kernel copies to the end, and a control
# call on the same core waits for it; while it sends by reference, it lets others run.
COPIED_NBYTES = 512 << 10
# The same where a piece costs more than that is worth: what is 1 MiB in all, and what lies scattered.
WHOLE_NBYTES = 1 << 20
LENT_NBYTES = 2 << 20
LENT_ALONE_NBYTES = 8 << 20  # where nobody else has a turn: more than most send buffers take
LEAST_RANGE_RATIO = 1 / 32  # of the least loan: sendfile takes one range a call, sendmsg a thousand

_HEAD = struct.Struct(">BBHIQ")
_DATA = int(Kind.DATA)


class Cursor:
    """Walks the ranges of a transfer.

    Attributes:
        ranges: offset and size of each.
        left: bytes that have not moved yet.
    """

    __slots__ = ("_index", "_skip", "left", "ranges")

    def __init__(self, ranges: Sequence[tuple[int, int]], nbytes: int) -> None:
        """At the first byte; `nbytes` is the sum of the sizes."""
        self.ranges = ranges
        self._index = 0
        self._skip = 0
        self.left = nbytes

    def views(self, memory: memoryview, max_nbytes: int) -> list[memoryview]:
        """The next bytes, at most `max_nbytes` (at most `left`) in at most MAX_VIEWS parts."""
        index = self._index
        offset, nbytes = self.ranges[index]
        offset += self._skip
        nbytes -= self._skip
        views = []
        while nbytes < max_nbytes:
            views.append(memory[offset : offset + nbytes])
            if len(views) == MAX_VIEWS:
                return views
            max_nbytes -= nbytes
            index += 1
            offset, nbytes = self.ranges[index]
        views.append(memory[offset : offset + max_nbytes])
        return views

    @property
    def index(self) -> int:
        """Of the range with the next byte."""
        return self._index

    def rest(self) -> tuple[int, int]:
        """The rest of that range, as offset and size."""
        offset, nbytes = self.ranges[self._index]
        return offset + self._skip, nbytes - self._skip

    def advance(self, nbytes: int) -> None:
        """So many bytes have moved."""
        self.left -= nbytes
        if not self.left:
            return
        nbytes += self._skip
        while nbytes >= (range_nbytes := self.ranges[self._index][1]):
            nbytes -= range_nbytes
            self._index += 1
        self._skip = nbytes


class ServedTransfer:
    """One PULL or PUSH under way: which frame, which range, which byte.

    Attributes:
        ask: what was asked.
        grant: under which right.
        nbytes: of the whole.
        deadline_s: when the peer gives up.
        moved_at_s: when bytes moved last.
        frame_left: payload of the frame under way that has not moved.
        lending, loan: what of the memory goes by reference, and who keeps count of it; None where all is copied.
    """

    __slots__ = (
        "_chunk_nbytes",
        "_cursor",
        "_head",
        "_head_view",
        "_is_lent",
        "_most_copied",
        "_num_head",
        "ask",
        "deadline_s",
        "frame_left",
        "grant",
        "lending",
        "loan",
        "moved_at_s",
        "nbytes",
    )

    def __init__(
        self, ask: Ask, grant: Grant, nbytes: int, *, chunk_nbytes: int, now_s: float
    ) -> None:
        """At its first byte."""
        self.ask = ask
        self.grant = grant
        self.nbytes = nbytes
        self.deadline_s = now_s + ask.timeout_ms / 1000
        self.moved_at_s = now_s
        self.frame_left = 0
        self._cursor = Cursor(ask.ranges, nbytes)
        self._chunk_nbytes = chunk_nbytes
        is_long = nbytes > max(WHOLE_NBYTES, len(ask.ranges) * COPIED_NBYTES)
        self._most_copied = COPIED_NBYTES if is_long else WHOLE_NBYTES
        self._head = bytearray(HEAD_NBYTES)
        self._head_view = memoryview(self._head)
        self._num_head = HEAD_NBYTES if not ask.is_push else 0  # bytes of the head that moved
        self.lending: Lending | None = None
        self.loan: Loan | None = None
        self._is_lent: list[bool] = []

    @property
    def left(self) -> int:
        """Bytes that have not moved."""
        return self._cursor.left

    @property
    def between_frames(self) -> bool:
        """Whether the stream stands at the end of a frame."""
        return not self.frame_left

    def borrow(self, lending: Lending, *, least_nbytes: int) -> None:
        """Before the first byte: has what is worth it sent by reference, where that is `least_nbytes` in all."""
        least_range_nbytes = least_nbytes * LEAST_RANGE_RATIO
        parts: list[tuple[int, int]] = []
        is_lent: list[bool] = []
        for offset, nbytes in self.ask.ranges:
            start, lent_nbytes = lending.lendable(offset, nbytes)
            if lent_nbytes < least_range_nbytes:
                start, lent_nbytes = offset + nbytes, 0
            end = start + lent_nbytes
            for part, is_it in (
                ((offset, start - offset), False),
                ((start, lent_nbytes), True),
                ((end, offset + nbytes - end), False),
            ):
                if part[1]:
                    parts.append(part)
                    is_lent.append(is_it)
        wanted = [part for part, is_it in zip(parts, is_lent, strict=True) if is_it]
        if sum(nbytes for _, nbytes in wanted) < least_nbytes:
            return
        loan = lending.lend(wanted)
        if loan.ranges:
            self.lending, self.loan = lending, loan
            self._is_lent = is_lent
            self._cursor = Cursor(parts, self.nbytes)

    def outgoing(self, memory: memoryview) -> list[memoryview]:
        """What to send next, to be copied: at most the rest of one frame; empty where `lent` says what."""
        if not self.frame_left:
            most = self._chunk_nbytes if self.loan else min(self._chunk_nbytes, COPIED_FRAME_NBYTES)
            self.frame_left = min(most, self._cursor.left)
            _HEAD.pack_into(self._head, 0, _DATA, 0, 0, self.ask.op, self.frame_left)
            self._num_head = 0
        nbytes = min(self.frame_left, self._most_copied)
        if self.loan is not None:
            nbytes = min(nbytes, self._copied_nbytes(nbytes))
        views = self._cursor.views(memory, nbytes) if nbytes else []
        if self._num_head < HEAD_NBYTES:
            views.insert(0, self._head_view[self._num_head :])
        return views

    def _copied_nbytes(self, most: int) -> int:
        """Bytes up to the next part that is lent, at most about `most`."""
        index = self._cursor.index
        if self._is_lent[index]:
            return 0
        nbytes = self._cursor.rest()[1]
        while nbytes < most and index + 1 < len(self._is_lent) and not self._is_lent[index + 1]:
            index += 1
            nbytes += self._cursor.ranges[index][1]
        return nbytes

    def settle(self) -> None:
        """The reader has said that it has all bytes."""
        if self.lending is not None and self.loan is not None:
            self.lending.settle(self.loan)

    def forsake(self) -> None:
        """The reader will say nothing more."""
        if self.lending is not None and self.loan is not None:
            self.lending.forsake(self.loan)

    def lent(self, *, is_alone: bool) -> tuple[int, int]:
        """What to send next by reference, behind `outgoing`: offset and size; size 0 where there is nothing.

        Args:
            is_alone: nobody else has a turn.
        """
        if self.loan is None or not self._is_lent[self._cursor.index]:
            return 0, 0
        offset, nbytes = self._cursor.rest()
        return offset, min(nbytes, self.frame_left, LENT_ALONE_NBYTES if is_alone else LENT_NBYTES)

    def sent(self, nbytes: int) -> bool:
        """So many bytes of `outgoing` are with the kernel; whether that was the last one."""
        if self._num_head < HEAD_NBYTES:
            num_head = min(HEAD_NBYTES - self._num_head, nbytes)
            self._num_head += num_head
            nbytes -= num_head
        self._cursor.advance(nbytes)
        self.frame_left -= nbytes
        return not self._cursor.left

    def incoming(self, memory: memoryview) -> list[memoryview]:
        """Where to receive next: the rest of one frame's payload, and the head of the next one."""
        left = self.frame_left
        if not left:
            return [self._head_view[self._num_head :]]
        views = self._cursor.views(memory, left)
        if left < self._cursor.left and len(views) < MAX_VIEWS:
            views.append(self._head_view)
        return views

    def landed(self, nbytes: int) -> bool:
        """So many bytes came into `incoming`; whether that was the last one.

        Raises:
            BadFrame: what came is not the head of the next DATA.
        """
        payload_nbytes = min(nbytes, self.frame_left)
        self._cursor.advance(payload_nbytes)
        self.frame_left -= payload_nbytes
        self._num_head += nbytes - payload_nbytes
        if self._num_head == HEAD_NBYTES:
            kind, op, frame_nbytes = decode_head(self._head)
            most = min(self._chunk_nbytes, self._cursor.left)
            if kind is not Kind.DATA or op != self.ask.op or not 1 <= frame_nbytes <= most:
                raise BadFrame(
                    f"{kind.name} of op {op} with {frame_nbytes} bytes in push {self.ask.op}, "
                    f"where {most} are the most"
                )
            self._num_head = 0
            self.frame_left = frame_nbytes
        return not self._cursor.left
