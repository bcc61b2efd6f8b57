"""How much may be asked of one owner at once: transfers and bytes, the most urgent first.

Rules kept here: nobody goes before one that waits, unless its class is lower; within a class the first to come is the
first to go; what is larger than the whole budget goes when it would be alone with it; who stops waiting leaves nothing
behind.

Methods may be called from any thread; none of them waits, except for the lock.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Ticket:
    """One transfer's place: waiting, inside, or gone."""

    __slots__ = ("is_inside", "nbytes", "on_enter")

    def __init__(self, nbytes: int, on_enter: Callable[[], object]) -> None:
        """Outside."""
        self.nbytes = nbytes
        self.on_enter = on_enter
        self.is_inside = False


class Gate:
    """Lets transfers through; see the rules above."""

    def __init__(
        self, *, max_transfers: int, max_nbytes: int, lock: threading.Lock | None = None
    ) -> None:
        """Open and empty; `lock` is shared with whoever does something else in the same step."""
        self._max_transfers = max_transfers
        self._max_nbytes = max_nbytes
        self._lock = lock or threading.Lock()
        self._waiting: list[tuple[int, int, Ticket]] = []
        self._numbers = itertools.count()
        self.num_inside = 0
        self.nbytes_inside = 0

    @property
    def num_waiting(self) -> int:
        """Transfers outside."""
        return len(self._waiting)

    def try_enter(self, nbytes: int) -> int:
        """The bytes that `leave` takes back, or 0: it would have to wait."""
        with self._lock:
            return self.try_enter_locked(nbytes)

    def try_enter_locked(self, nbytes: int) -> int:
        """As `try_enter`, for who holds the lock."""
        charge = nbytes if nbytes < self._max_nbytes else self._max_nbytes
        if self._waiting or not self._has_room(charge):
            return 0
        self.num_inside += 1
        self.nbytes_inside += charge
        return charge

    def wait(self, nbytes: int, urgency: int, on_enter: Callable[[], object]) -> Ticket:
        """Queues up; `on_enter` is called once it is inside, from any thread, perhaps at once."""
        ticket = Ticket(min(nbytes, self._max_nbytes), on_enter)
        with self._lock:
            heapq.heappush(self._waiting, (urgency, next(self._numbers), ticket))
        self.let_in()
        return ticket

    def leave(self, charge: int) -> None:
        """Its transfer has ended, in whatever way."""
        with self._lock:
            self.leave_locked(charge)
        if self._waiting:
            self.let_in()

    def leave_locked(self, charge: int) -> None:
        """As `leave`, for who holds the lock, and calls `let_in` afterwards where somebody waits."""
        self.num_inside -= 1
        self.nbytes_inside -= charge

    def give_up(self, ticket: Ticket) -> None:
        """It waits no more; if it came inside meanwhile, it leaves."""
        with self._lock:
            if not ticket.is_inside:
                self._waiting = [row for row in self._waiting if row[2] is not ticket]
                heapq.heapify(self._waiting)
        if ticket.is_inside:
            self.leave(ticket.nbytes)
        else:
            self.let_in()

    def _has_room(self, charge: int) -> bool:
        return not self.num_inside or (
            self.num_inside < self._max_transfers
            and self.nbytes_inside + charge <= self._max_nbytes
        )

    def let_in(self) -> None:
        """Lets those in for whom there is room now."""
        entered = []
        with self._lock:
            while self._waiting and self._has_room(self._waiting[0][2].nbytes):
                ticket = heapq.heappop(self._waiting)[2]
                ticket.is_inside = True
                self.num_inside += 1
                self.nbytes_inside += ticket.nbytes
                entered.append(ticket)
        for ticket in entered:
            ticket.on_enter()
