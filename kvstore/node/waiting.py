"""Calls that wait inside a node: matches for a commit, reservations for room.

Rules kept here: every waiting call has a deadline and a session, and goes with either. A match waits at one key, the
first that it misses in one scope, so a commit wakes only those who wait for that very block. Reservations for one pool
are served client by client, in turn, and those of one client in the order in which they came: who has a hundred in the
queue has one served for each one of the others. Whose turn it is nobody overtakes: a small one behind a large one
waits too, or the large one would starve. Of a call that is over nothing is kept for long: its key column may be half a
megabyte.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.kvstore.errors import LimitExceeded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snowskin.kvstore.messages import MatchRequest, ReserveRequest, SessionId
    from snowskin.kvstore.node.limits import NodeLimits
    from snowskin.kvstore.session import Session

# So many calls that are over may stand in the heap of deadlines before it is built anew.
MAX_STALE = 64

WaitKey = tuple[str, bytes, bytes]
"""Tenant, namespace and key of a block that is not there yet."""


@dataclass(slots=True, eq=False)
class WaitingCall:
    """A call that is not answered yet.

    Attributes:
        at: the block that a match waits for; None for a reservation.
        tenant: whose pool a reservation queues for.
        tried_at: the pool's count of gains when there was no room for it last.
    """

    session_id: SessionId
    call_id: int
    request: MatchRequest | ReserveRequest
    deadline_s: float
    at: WaitKey | None = None
    tenant: str = ""
    tried_at: int = -1
    is_done: bool = False


class WaitingRoom:
    """All waiting calls of one kind, found by deadline, by block and by session."""

    def __init__(self) -> None:
        """Empty."""
        self._calls: dict[WaitingCall, None] = {}  # in order of arrival
        self._at: dict[WaitKey, dict[WaitingCall, None]] = {}
        self._deadlines: list[tuple[float, int, WaitingCall]] = []
        self._order = itertools.count()
        self._num_of_session: Counter[SessionId] = Counter()

    def __len__(self) -> int:
        """Calls that wait."""
        return len(self._calls)

    def __iter__(self) -> Iterator[WaitingCall]:
        """In order of arrival."""
        return iter(list(self._calls))

    def add(self, call: WaitingCall) -> None:
        """One more."""
        self._calls[call] = None
        self._num_of_session[call.session_id] += 1
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
        if call.is_done:
            return
        call.is_done = True
        del self._calls[call]
        self._num_of_session[call.session_id] -= 1
        if not self._num_of_session[call.session_id]:
            del self._num_of_session[call.session_id]
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

    def waiting_at(self, at: WaitKey) -> list[WaitingCall]:
        """Who waits for this block."""
        return list(self._at.get(at, ()))

    def of_session(self, session_id: SessionId) -> list[WaitingCall]:
        """What one session waits for."""
        return [call for call in self._calls if call.session_id == session_id]

    def num_of_session(self, session_id: SessionId) -> int:
        """How many calls of one session wait."""
        return self._num_of_session[session_id]

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


class FairQueue(WaitingRoom):
    """Reservations that wait for room in full pools."""

    def __init__(self) -> None:
        """Empty."""
        super().__init__()
        # By tenant: its sessions, whose turn it is first, and the calls of each in order of arrival.
        self._turns: dict[str, dict[SessionId, dict[WaitingCall, None]]] = {}

    def tenants(self) -> list[str]:
        """Whose pools somebody waits for."""
        return list(self._turns)

    def heads(self, tenant: str) -> Iterator[WaitingCall]:
        """The first call of each session, in the order of their turns."""
        return (next(iter(calls)) for calls in self._turns.get(tenant, {}).values())

    def add(self, call: WaitingCall) -> None:
        """One more; a session that had none waits for one call of each of the others at most."""
        super().add(call)
        self._turns.setdefault(call.tenant, {}).setdefault(call.session_id, {})[call] = None

    def remove(self, call: WaitingCall) -> None:
        """It is answered without having had its turn, or nobody wants the answer any more."""
        if call.is_done:
            return
        super().remove(call)
        sessions = self._turns[call.tenant]
        calls = sessions[call.session_id]
        del calls[call]
        if not calls:
            del sessions[call.session_id]
        if not sessions:
            del self._turns[call.tenant]

    def serve(self, call: WaitingCall) -> None:
        """It had its turn: the next one is another session's."""
        self.remove(call)
        sessions = self._turns.get(call.tenant, {})
        if (calls := sessions.pop(call.session_id, None)) is not None:
            sessions[call.session_id] = calls


def check_may_wait(room: WaitingRoom, session: Session, limits: NodeLimits, what: str) -> None:
    """Refuses one waiting call more than there may be in all, or of one client."""
    num_own = room.num_of_session(session.id)
    if len(room) >= limits.max_waiting or num_own >= limits.max_waiting_per_session:
        raise LimitExceeded(
            f"{len(room)} {what} wait already, {num_own} of them of {session.client_name!r}",
            hint="wait for the answer of another call, or retry later",
        )
