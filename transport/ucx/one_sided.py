"""One-sided access of `ucx`: registered memory, and gets and puts that the owner's process has no part in.

Rules kept here: memory is registered in slices of at most 3.5 GiB, once, when the region is registered, and
deregistered soon after the region was closed; a run is cut where its slices end, and into accesses of at most
`get_nbytes`, a few in flight, so that a turn of UCX stays short; a landing range stays bracketed while UCX may write
there, and where a transfer ends early its endpoint is closed, and its landing ranges are in quarantine until UCX has
let go of them.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import logging
import threading
from typing import TYPE_CHECKING, NamedTuple

from snowskin.transport.errors import PeerLost, TransportClosed, TransportError
from snowskin.transport.memory_kind import MemoryKind
from snowskin.transport.runs import joined, pieces
from snowskin.transport.ucp.api import SLICE_NBYTES, Span, UcpFailure, UcpMemoryType
from snowskin.transport.ucx.wire import Slice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from snowskin.transport.memory import MemoryRegion
    from snowskin.transport.ordered import Order
    from snowskin.transport.runs import Run
    from snowskin.transport.ucp.api import UcpMemory, UcpRequest
    from snowskin.transport.ucx.progress import ProgressThread
    from snowskin.transport.ucx.reader import Link, Mailbox

SETTLE_S = 0.05

log = logging.getLogger("snowskin.transport.ucx")


def slices_of(address: int, nbytes: int, slice_nbytes: int = SLICE_NBYTES) -> list[Span]:
    """Consecutive parts of at most `slice_nbytes`."""
    return [
        Span(address + start, min(slice_nbytes, nbytes - start))
        for start in range(0, nbytes, slice_nbytes)
    ]


class Registrations:
    """What is registered with UCX, by region."""

    def __init__(self, thread: ProgressThread) -> None:
        """Nothing yet."""
        self._thread = thread
        self._memories: dict[MemoryRegion, list[UcpMemory]] = {}
        self._slices: dict[MemoryRegion, tuple[Slice, ...]] = {}

    def __len__(self) -> int:
        """How many regions."""
        return len(self._memories)

    def add(self, region: MemoryRegion) -> None:
        """Registers all of `region`, slice by slice, with turns of UCX between; TransportError where UCX refuses."""
        kind = UcpMemoryType.CUDA if region.kind is MemoryKind.CUDA else UcpMemoryType.HOST
        memories: list[UcpMemory] = []
        try:
            for span in slices_of(region.address, region.nbytes):
                register = functools.partial(self._thread.context.map, span, kind)
                memories.append(self._thread.run(register))
        except UcpFailure as error:
            self._thread.post(functools.partial(_unmap, memories))
            raise TransportError(
                f"UCX cannot register {region.nbytes} bytes of {region.kind.value} memory: {error}",
                hint="is the memory lock limit (ulimit -l) high enough, and for CUDA nvidia_peermem or dmabuf there?",
            ) from error
        self._slices[region] = self._thread.run(
            lambda: tuple(Slice(*memory.span, memory.pack()) for memory in memories)
        )
        self._memories[region] = memories

    def slices(self, region: MemoryRegion) -> tuple[Slice, ...]:
        """What peers need to reach `region`; TransportError where it was not registered here."""
        try:
            return self._slices[region]
        except KeyError:
            raise TransportError(
                "this region was not registered by this transport",
                hint="register the memory with the transport that describes it",
            ) from None

    def purge(self) -> None:
        """Deregisters what belongs to regions that were closed."""
        for region in [region for region in list(self._memories) if region.closed]:
            self._slices.pop(region, None)
            memories = self._memories.pop(region, [])
            self._thread.post(functools.partial(_unmap, memories))

    def close(self) -> None:
        """Deregisters everything, in the progress thread, from which it is called."""
        for memories in self._memories.values():
            _unmap(memories)
        self._memories.clear()
        self._slices.clear()


def _unmap(memories: Sequence[UcpMemory]) -> None:
    for memory in memories:
        try:
            memory.unmap()
        except UcpFailure as error:
            log.warning("ucx: deregistering failed: %s", error)


class Access(NamedTuple):
    """One get or put."""

    local_offset: int
    nbytes: int
    remote_address: int
    key: bytes
    ends_piece: (
        tuple[int, int] | None
    )  # offset and size of the caller's piece that is complete with it


def accesses(order: Order, remote_slices: Sequence[Slice], *, get_nbytes: int) -> Iterator[Access]:
    """An order as accesses: cut by piece, by slice and by `get_nbytes`, in order."""
    starts = [0, *itertools.accumulate(each.nbytes for each in remote_slices)]
    runs: Sequence[Run] = order.runs
    piece_nbytes = order.piece_nbytes
    if order.landed is None:
        runs, piece_nbytes = joined(runs), get_nbytes
    for piece in pieces(runs, piece_nbytes):
        done = 0
        while done < piece.nbytes:
            offset = piece.remote_offset + done
            index = bisect.bisect_right(starts, offset) - 1
            nbytes = min(piece.nbytes - done, starts[index + 1] - offset, get_nbytes)
            target = remote_slices[index]
            is_last = done + nbytes == piece.nbytes
            yield Access(
                piece.local_offset + done,
                nbytes,
                target.address + offset - starts[index],
                target.key,
                (piece.local_offset, piece.nbytes) if is_last else None,
            )
            done += nbytes


class OneSided:
    """One transfer's gets or puts; `run` in the thread that asked for it, the rest in the progress thread."""

    def __init__(
        self,
        thread: ProgressThread,
        mailbox: Mailbox,
        slices: Sequence[Slice],
        *,
        get_nbytes: int,
        max_in_flight: int,
    ) -> None:
        """After the owner has said CLEAR."""
        self._thread = thread
        self._mailbox = mailbox
        self._order = mailbox.order
        self._accesses = accesses(mailbox.order, slices, get_nbytes=get_nbytes)
        # Whoever looks on sees a piece before the next one lands: larger pieces then, not more of them.
        self._max_in_flight = 1 if mailbox.order.landed is not None else max_in_flight
        self._let_go = threading.Event()
        self._in_flight: dict[int, UcpRequest | None] = {}  # by number of the access
        self._given_up = False

    def run(self, look: Callable[[], float]) -> None:
        """Moves all bytes; tells the order of each piece, in order."""
        order = self._order
        waiting: dict[int, Access] = {}
        ended: set[int] = set()
        next_told = 0
        numbered = enumerate(self._accesses)
        exhausted = False
        try:
            while True:
                while next_told in ended:  # before the next one leaves: `landed` may end it all
                    ended.remove(next_told)
                    piece = waiting.pop(next_told).ends_piece
                    next_told += 1
                    if piece is not None:
                        order.moved(*piece)
                while not exhausted and len(waiting) < self._max_in_flight:
                    look()
                    number, access = next(numbered, (-1, None))
                    if access is None:
                        exhausted = True
                        break
                    waiting[number] = access
                    self._thread.post(functools.partial(self._post, number, access))
                if not waiting:
                    break
                item = self._mailbox.next(look)
                assert isinstance(item, int), "only ends of accesses are told now"
                ended.add(item)
            if not order.is_pull:
                self._thread.post(self._flush)
                self._mailbox.next(look)
        except BaseException:
            self._give_up(early=bool(waiting))
            raise

    def _link(self) -> Link:
        link = self._mailbox.link
        assert link is not None, "the owner said CLEAR over it"
        return link

    def _post(self, number: int, access: Access) -> None:
        if self._given_up:
            return
        link, local = self._link(), self._order.local
        if link.conversation.over:
            return  # it told the mailbox
        try:
            local.begin_landing()
        except TransportClosed as error:
            self._mailbox.fail(error)
            return
        self._in_flight[number] = None

        def done(failure: UcpFailure | None) -> None:
            self._in_flight.pop(number, None)
            local.end_landing()
            if failure is None:
                self._mailbox.put(number)
            elif not self._given_up:
                link.conversation.lose(f"broke off a one-sided access: {failure.status}")
            if self._given_up and not self._in_flight:
                self._leave()

        try:
            key = link.key(access.key)
        except UcpFailure as error:
            self._in_flight.pop(number, None)
            local.end_landing()
            self._mailbox.fail(PeerLost(f"{link.conversation.peer}: its key is refused: {error}"))
            return
        span = Span(local.address + access.local_offset, access.nbytes)
        move = key.get if self._order.is_pull else key.put
        request = move(span, access.remote_address, done)
        if number in self._in_flight:
            self._in_flight[number] = request

    def _flush(self) -> None:
        """Puts are at the peer only after a flush."""
        conversation = self._link().conversation
        if conversation.over:
            return

        def done(failure: UcpFailure | None) -> None:
            if failure is None:
                self._mailbox.put(None)
            else:
                conversation.lose(f"broke off a flush: {failure.status}")

        conversation.endpoint.flush(done)

    def _give_up(self, *, early: bool) -> None:
        """Ends what is in flight; what may still land is in quarantine until UCX has let go of it."""
        order = self._order
        if early and order.is_pull:
            order.local.quarantine(self, order.landing_ranges())
        if self._thread.post(self._end):
            self._let_go.wait(SETTLE_S)  # mostly nothing is left in quarantine

    def _end(self) -> None:
        self._given_up = True
        for request in list(self._in_flight.values()):
            if request is not None:
                request.cancel()
        if self._in_flight:
            self._link().abandon("a one-sided access to it was given up in the middle")
        if not self._in_flight:
            self._leave()

    def _leave(self) -> None:
        """UCX touches nothing of this transfer any more."""
        self._order.local.lift_quarantine(self)
        self._let_go.set()
