"""Calls that wait inside a node: matches for a commit, reservations for room.

Rules kept here: every waiting call has a deadline and a session, and goes with either. A match waits at one key, the
first that it misses in one scope, so a commit wakes only those who wait for that very block. Reservations wait in
the order in which they came, and nobody overtakes: a small one behind a large one waits too, or the large one would
starve. Of a call that is over nothing is kept for long: its key column may be half a megabyte.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snowskin.kvstore.messages import MatchRequest, ReserveRequest, SessionId

# So many calls that are over may stand in the heap of deadlines before it is built anew.
MAX_STALE = 64

WaitKey = tuple[str, bytes, bytes]
"""Tenant, namespace and key of a block that is not there yet."""


@dataclass(slots=True, eq=False)
class WaitingCall:
    """A call that is not answered yet; `at` is the block a match waits for, None for a reservation."""

    session_id: SessionId
    call_id: int
    request: MatchRequest | ReserveRequest
    deadline_s: float
    at: WaitKey | None = None
    is_done: bool = False


class WaitingRoom:
    """All waiting calls of one kind, found by deadline, by block and by session."""

    def __init__(self) -> None:
        """Empty."""
        self._calls: dict[WaitingCall, None] = {}  # in order of arrival
        self._at: dict[WaitKey, dict[WaitingCall, None]] = {}
        self._deadlines: list[tuple[float, int, WaitingCall]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        """Calls that wait."""
        return len(self._calls)

    def __iter__(self) -> Iterator[WaitingCall]:
        """In order of arrival."""
        return iter(list(self._calls))

    def add(self, call: WaitingCall) -> None:
        """One more."""
        self._calls[call] = None
        if call.at is not None:
            self._at.setdefault(call.at, {})[call] = None
        heapq.heappush(self._deadlines, (call.deadline_s, next(self._order), call))

    def move(self, call: WaitingCall, at: WaitKey) -> None:
        """The block that it waited for has come; now it waits for a later one."""
        self._leave(call)
        call.at = at
        self._at.setdefault(at, {})[call] = None

    def remove(self, call: WaitingCall) -> None:
        """It is answered, or nobody wants the answer any more."""
        call.is_done = True
        self._calls.pop(call, None)
        self._leave(call)
        # Their deadlines may be minutes away, behind that of one call which waits on.
        if len(self._deadlines) > 2 * len(self._calls) + MAX_STALE:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].is_done]
            heapq.heapify(self._deadlines)

    def _leave(self, call: WaitingCall) -> None:
        if call.at is None:
            return
        waiting = self._at.get(call.at)
        if waiting is not None:
            waiting.pop(call, None)
            if not waiting:
                del self._at[call.at]

    def first(self) -> WaitingCall | None:
        """Who came first."""
        return next(iter(self._calls), None)

    def waiting_at(self, at: WaitKey) -> list[WaitingCall]:
        """Who waits for this block."""
        return list(self._at.get(at, ()))

    def of_session(self, session_id: SessionId) -> list[WaitingCall]:
        """What one session waits for."""
        return [call for call in self._calls if call.session_id == session_id]

    def overdue(self, now_s: float) -> list[WaitingCall]:
        """Calls whose deadline has come, oldest deadline first."""
        found = []
        while self._deadlines and (self._deadlines[0][2].is_done or self._deadlines[0][0] <= now_s):
            _, _, call = heapq.heappop(self._deadlines)
            if not call.is_done:
                found.append(call)
        return found

    def next_deadline_s(self) -> float | None:
        """When somebody's deadline comes; None while nobody waits."""
        while self._deadlines and self._deadlines[0][2].is_done:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None
