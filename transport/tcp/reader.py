"""How a reader's transfers go over one connection: what is asked, what comes, where it lands.

Rules kept here: bytes are received straight into registered memory, inside the bracket of their piece, and never more
than was asked for; with a `landed`, one piece at a time; before each piece it is looked at whether the transfer may go
on. After a failure in the middle the connection is closed first, and only then is the landing range free.

`pull` and `push` are generators: they yield where they would have to wait longer, so that the same code is driven by
a thread that waits in the kernel, and by an event loop that does not wait at all. Short ranges are taken together into
the connection's scratch and copied from there, because a system call costs more than copying 4 KiB.
"""

from __future__ import annotations

import struct
import threading
import time
from typing import TYPE_CHECKING

from snowskin.transport.errors import (
    OutOfBounds,
    PeerLost,
    RegionExpired,
    TransportClosed,
    TransportError,
)
from snowskin.transport.frames import HEAD_NBYTES, MAX_TIMEOUT_MS, Done, Kind, encode
from snowskin.transport.runs import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from snowskin.transport.ordered import Order
    from snowskin.transport.tcp.connection import Connection

SHORT_NBYTES = 64 * 1024  # answers up to this size are received in one call with their head
COPIED_NBYTES = 4 * 1024  # ranges up to this size are taken together
MAX_TIMEOUT_S = MAX_TIMEOUT_MS / 1000
CHUNK_NBYTES = 1 << 20  # at most received in one call, and sent as one DATA
# One run is received in calls as large as it is, up to this; a longer one in smaller calls. The kernel acknowledges at
# the end of a call, and an owner's sends at most 4 MiB ahead of it (tcp_wmem): then each waits for the other in turn.
# Measured by `bench transfer`: 8 % at 256 MiB; at 16 MiB more calls cost more than that.
LONG_NBYTES = 32 << 20
LONG_CHUNK_NBYTES = 3 << 20

_ASK = struct.Struct(">BBHIQ16sQQIBBHI")
_ASK_ONE = struct.Struct(_ASK.format + "QQ")
_ASK_ONE_BODY_NBYTES = _ASK_ONE.size - HEAD_NBYTES
_ASK_BODY_NBYTES = _ASK.size - HEAD_NBYTES
_DATA_HEAD = struct.Struct(">BBHIQ")
_PULL, _PUSH, _DATA = int(Kind.PULL), int(Kind.PUSH), int(Kind.DATA)


class Job:
    """An order on its way over connections: whether it may go on, and how far it is.

    Attributes:
        runs: of the order, joined where nobody looks at single ones.
        note: what the owner is told at the end.
        root: of the whole order, where this is the part of one lane; else itself.
        is_asked: `pull_run` has asked, and `pull` goes on.
        part_nbytes: then, of the piece that has begun.
        heard: the owner answered to what was asked last.
        landed_nbytes: moved so far, from the first run on.
        thread_ident: the thread that drives it, an event loop's included.
    """

    __slots__ = (
        "_is_closed",
        "abandoned",
        "heard",
        "is_asked",
        "landed_nbytes",
        "note",
        "now_s",
        "order",
        "part_nbytes",
        "root",
        "runs",
        "thread_ident",
    )

    def __init__(
        self,
        order: Order,
        runs: Sequence[Run],
        *,
        root: Job | None = None,
        now_s: Callable[[], float] = time.monotonic,
        is_closed: Callable[[], bool] = bool,
    ) -> None:
        """Nothing moved."""
        self.order = order
        self.runs = runs
        self.note = order.note
        self.root: Job = self if root is None else root
        self.heard = self.is_asked = False
        self.landed_nbytes = self.part_nbytes = 0
        self.abandoned = False
        self.thread_ident = threading.get_ident()
        self.now_s = now_s
        self._is_closed = is_closed

    def check(self) -> float:
        """Seconds to its deadline; raises what ends it."""
        order = self.order
        if self.abandoned or order.remote.closed or order.local.closed or self._is_closed():
            raise TransportClosed("the transport, or a region of this transfer, was closed")
        now_s = self.now_s()
        order.check(now_s)
        return order.deadline_s - now_s

    def was_given_up(self) -> bool:
        """Whether something on this side has ended it."""
        try:
            self.check()
        except TransportError:
            return True
        return False

    def moved(self, local_offset: int, nbytes: int) -> None:
        """The next bytes are in their place; with a `landed`, a whole piece of them."""
        self.landed_nbytes += nbytes
        self.order.moved(local_offset, nbytes)

    def check_grant(self) -> None:
        """Raises RegionExpired where the grant's life is over."""
        now_s = self.now_s()
        if now_s > self.order.remote.expires_at_s:
            raise RegionExpired(
                f"the grant ran out {now_s - self.order.remote.expires_at_s:.3f} s before the end",
                hint="match again and pull under the new lease",
            )

    def rest(self) -> list[Run]:
        """The runs that have not moved yet."""
        skip = self.landed_nbytes
        left = []
        for run in self.runs:
            if skip >= run[2]:
                skip -= run[2]
                continue
            left.append(Run(run[0] + skip, run[1] + skip, run[2] - skip))
            skip = 0
        return left


def ask_bytes(
    connection: Connection,
    job: Job,
    runs: Sequence[Run],
    *,
    is_last: bool,
    wants_done: bool = False,
) -> bytes:
    """PULL or PUSH for `runs`, under the connection's next number; with `wants_done` it says that DONE will follow."""
    order = job.order
    is_pull, note, descriptor = order.is_pull, job.note, order.remote.descriptor
    inline_note = b"" if is_pull else note
    num_runs = len(runs)
    head = _ASK.pack(
        _PULL if is_pull else _PUSH,
        0,
        0,
        connection.next_op(),
        _ASK_BODY_NBYTES + len(inline_note) + 16 * num_runs,
        descriptor.capability,
        descriptor.epoch,
        descriptor.generation,
        max(1, int(min(MAX_TIMEOUT_MS, job.check() * 1000))),
        order.traffic,
        1 if wants_done or (note and is_last) else 0,
        len(inline_note),
        num_runs,
    )
    if num_runs == 1:
        return head + inline_note + runs[0][0].to_bytes(8) + runs[0][2].to_bytes(8)
    numbers = [number for run in runs for number in (run[0], run[2])]
    return head + inline_note + struct.pack(f">{2 * num_runs}Q", *numbers)


def is_acknowledged(connection: Connection, runs: Sequence[Run]) -> bool:
    """Whether a pull of these runs ends with DONE, note or not."""
    return sum(run[2] for run in runs) >= connection.done_from_nbytes


def is_plain(job: Job) -> bool:
    """Whether `pull_run` can do it: one run, from its first byte on, and no note."""
    order = job.order
    if len(job.runs) != 1 or not order.is_pull or job.note or job.landed_nbytes or job.is_asked:
        return False
    nbytes = job.runs[0][2]  # short ones come as a whole, whatever the pieces
    return order.landed is None or nbytes <= order.piece_nbytes or nbytes > SHORT_NBYTES


def pull_run(connection: Connection, job: Job, remaining_s: float) -> bool:
    """Asks for the only run; whether all of it came without waiting too long, as it nearly always does.

    Else `pull` goes on where this stopped. The same as `pull`, without generators and without any question that has the
    same answer each time: a third of a short pull's time, a tenth of 1 MiB's.
    """
    remote_offset, local_offset, nbytes = job.runs[0]
    order = job.order
    descriptor = order.remote.descriptor
    op = connection.next_op()
    acknowledges = nbytes >= connection.done_from_nbytes
    request = _ASK_ONE.pack(
        _PULL,
        0,
        0,
        op,
        _ASK_ONE_BODY_NBYTES,
        descriptor.capability,
        descriptor.epoch,
        descriptor.generation,
        MAX_TIMEOUT_MS if remaining_s >= MAX_TIMEOUT_S else max(1, int(remaining_s * 1000)),
        order.traffic,
        1 if acknowledges else 0,
        0,
        1,
        remote_offset,
        nbytes,
    )
    connection.is_reusable = False
    if nbytes > SHORT_NBYTES:
        frame_nbytes = connection.ask(request, op, nbytes)
        job.is_asked = connection.has_asked
        if not frame_nbytes or not _land_run(connection, job, frame_nbytes):
            return False
        connection.is_reusable = not acknowledges or connection.acknowledge(op)
        return True
    payload = connection.swap(request, _DATA_HEAD.pack(_DATA, 0, 0, op, nbytes), nbytes)
    if payload is None:
        job.is_asked = connection.has_asked
        return False
    region = order.local
    region.begin_landing()
    try:
        region.view[local_offset : local_offset + nbytes] = payload
    finally:
        region.end_landing()
    job.heard = True
    connection.is_reusable = not acknowledges or connection.acknowledge(op)
    job.moved(local_offset, nbytes)
    return True


def _land_run(connection: Connection, job: Job, frame_nbytes: int) -> bool:
    """Receives the DATA of the only run, whose first head was taken; False where it has to wait for long."""
    order = job.order
    region, landed = order.local, order.landed
    op = connection.last_op
    _, at, run_nbytes = job.runs[0]
    end = at + run_nbytes
    frame_end = at + frame_nbytes
    most_nbytes = LONG_CHUNK_NBYTES if run_nbytes > LONG_NBYTES else run_nbytes
    if landed is not None:
        most_nbytes = order.piece_nbytes
    naps_until = end if landed is None else 0  # who looks at each piece is late already
    begin_landing, end_landing = region.gate.begin, region.gate.end
    receive, next_frame = connection.receive_whole, connection.next_frame
    view = region.view  # it stays, though the region may be closed meanwhile
    job.heard = True
    now_s, deadline_s, control = job.now_s, order.deadline_s, order.control
    while at < end:
        piece, piece_end = at, min(end, at + most_nbytes)
        while at < piece_end:
            if at == frame_end:
                frame_end += next_frame(op, end - at)  # by 0 where something else came, or nothing
            until = piece_end if piece_end < frame_end else frame_end
            got = 0
            if at < until:
                begin_landing()
                try:
                    got = receive(view[at:until], naps_until - until)
                finally:
                    end_landing()
            at += got
            if landed is None:
                job.landed_nbytes += got
                if control is not None:
                    control.moved_nbytes += got
            if not got:
                connection.frame_left_nbytes = frame_end - at
                job.part_nbytes = at - piece if landed is not None else 0
                return False
            if at < end and (connection.hung_up or now_s() >= deadline_s):
                job.check()
        if landed is not None:
            job.moved(piece, piece_end - piece)
            if at < end:
                job.check()  # whoever looked may have ended it, or taken long
    job.is_asked = False
    return True


def pull(connection: Connection, job: Job, runs: Sequence[Run]) -> Iterator[None]:
    """Asks for `runs` and lands them, in as many requests as the owner wants; says DONE where it announced that."""
    most = connection.welcome.max_ranges
    note = job.note
    for first in range(0, len(runs), most):
        part = runs[first : first + most]
        is_last = first + most >= len(runs)
        connection.is_reusable = False
        if job.is_asked:
            job.is_asked = False
            acknowledges = is_acknowledged(connection, job.runs)  # as a whole it was asked for
        else:
            acknowledges = is_acknowledged(connection, part)
            ask = ask_bytes(connection, job, part, is_last=is_last, wants_done=acknowledges)
            yield from connection.send_all([ask])
            connection.nap(sum(run[2] for run in part))
        yield from _land(connection, job, part)
        if note and is_last:
            job.check_grant()
            if connection.is_dead():  # it would go nowhere, and nothing would say so
                raise PeerLost(f"{connection.peer} has ended the connection before the note")
            yield from connection.send_all([encode(Done(op=connection.last_op, note=note))])
        elif acknowledges and not connection.acknowledge(connection.last_op):
            if is_last:
                return  # all bytes are here; only the connection is no good any more
            raise PeerLost(f"{connection.peer} has ended the connection between two requests")
        connection.is_reusable = not connection.num_ahead


def _land(connection: Connection, job: Job, runs: Sequence[Run]) -> Iterator[None]:
    """Receives the DATA of one request into the runs, piece by piece."""
    order = job.order
    region, landed = order.local, order.landed
    op = connection.last_op
    part_nbytes, job.part_nbytes = job.part_nbytes, 0
    left_nbytes = sum(run[2] for run in runs) - part_nbytes
    frame_nbytes, connection.frame_left_nbytes = connection.frame_left_nbytes, 0
    ahead_nbytes = left_nbytes if left_nbytes <= SHORT_NBYTES else 0
    naps = landed is None  # who looks at each piece is late already
    begin_landing, end_landing = region.gate.begin, region.gate.end
    receive, view = (
        connection.receive_whole,
        region.view,
    )  # it stays, though the region may be closed meanwhile
    untold_nbytes = 0
    for _, offset, run_nbytes in runs:
        end = offset + run_nbytes
        while offset < end:
            piece_end = end
            if landed is not None:
                job.check()
                piece_end = min(end, offset + order.piece_nbytes)
            at = offset + part_nbytes
            part_nbytes = 0
            while at < piece_end:
                if not frame_nbytes:
                    if untold_nbytes:
                        job.moved(at, untold_nbytes)
                        untold_nbytes = 0
                    job.check()
                    yield from connection.data_head(op, left_nbytes, ahead_nbytes=ahead_nbytes)
                    job.heard = True
                    frame_nbytes = connection.data_nbytes
                nbytes = piece_end - at
                if nbytes > frame_nbytes:
                    nbytes = frame_nbytes
                if nbytes > CHUNK_NBYTES:
                    nbytes = CHUNK_NBYTES
                elif nbytes <= COPIED_NBYTES and not connection.num_ahead:
                    connection.fetch_ahead(frame_nbytes)
                begin_landing()
                try:
                    got = receive(view[at : at + nbytes], left_nbytes - nbytes if naps else 0)
                except PeerLost:
                    if untold_nbytes:
                        job.moved(at, untold_nbytes)
                    raise
                finally:
                    end_landing()
                at += got
                frame_nbytes -= got
                left_nbytes -= got
                if landed is None:
                    untold_nbytes += got
                if got < nbytes:
                    if untold_nbytes:
                        job.moved(at, untold_nbytes)
                        untold_nbytes = 0
                    if not got:
                        yield
                    else:
                        job.check()
            if landed is not None:
                job.moved(offset, piece_end - offset)
            offset = piece_end
    if untold_nbytes:
        job.moved(0, untold_nbytes)


def push(connection: Connection, job: Job, runs: Sequence[Run]) -> Iterator[None]:
    """Asks to write `runs`, sends them once the owner allows it, and waits until it says that all is there."""
    most = connection.welcome.max_ranges
    for first in range(0, len(runs), most):
        part = runs[first : first + most]
        connection.is_reusable = False
        ask = ask_bytes(connection, job, part, is_last=first + most >= len(runs))
        yield from connection.send_all([ask])
        yield from connection.expect(Kind.CLEAR, connection.last_op)
        job.heard = connection.is_pushing = True
        yield from _send_data(connection, job, part)
        yield from connection.expect(Kind.DONE, connection.last_op)
        connection.is_pushing = False
        connection.is_reusable = not connection.num_ahead


def _send_data(connection: Connection, job: Job, runs: Sequence[Run]) -> Iterator[None]:
    """DATA frames of pieces; a piece is one `sendmsg` of its head and a view of the source."""
    order = job.order
    region = order.local
    piece_nbytes = CHUNK_NBYTES if order.landed is None else order.piece_nbytes
    most_nbytes = min(connection.welcome.max_data_nbytes, CHUNK_NBYTES)
    op = connection.last_op
    for _, offset, run_nbytes in runs:
        end = offset + run_nbytes
        while offset < end:
            job.check()
            piece_end = min(end, offset + piece_nbytes)
            at = offset
            while at < piece_end:
                nbytes = min(piece_end - at, most_nbytes)
                head = _DATA_HEAD.pack(_DATA, 0, 0, op, nbytes)
                views: list[bytes | memoryview] = [head, region.view[at : at + nbytes]]
                if len(views[1]) != nbytes:
                    raise TransportClosed("the source region was closed during the transfer")
                yield from connection.send_all(views)
                at += nbytes
            job.moved(offset, piece_end - offset)
            offset = piece_end


def check_note(order: Order) -> None:
    """A note goes with bytes."""
    if order.note and not order.runs:
        raise OutOfBounds("a note needs a transfer of at least one byte")
