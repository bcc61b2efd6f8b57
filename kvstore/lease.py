"""Leases: who may touch which bytes, and until when.

Rules kept here: a lease is one object over any number of extents, never a count a block. Its holder counts its
life from when it sent the request, this table from when it answered, so the holder always stops first. At
`expires_at_s` a lease is over: it cannot be renewed, nothing is committed under it. What it protected may be
reused only a grace later, because a holder that checked its clock just before may still be reading; without one,
where the holder reaches nothing by itself, and who serves it looks at the lease before every piece. Renewing
never prolongs a lease beyond `max_life_s` from its grant. What was granted elsewhere under a lease (`LeaseGrants`)
lives with it, and is taken back here before anybody learns that the lease is over: before its room can be another's.
Time never runs by itself: the caller brings it.

Source: Gray & Cheriton 1989, "Leases: an efficient fault-tolerant mechanism for distributed file cache
consistency", for what may be promised when a holder is silent.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snowskin.kvstore.messages import LeaseId, SessionId

HoldT = TypeVar("HoldT")


@dataclass(slots=True, eq=False)
class GrantedLease(Generic[HoldT]):
    """One lease as the node sees it; `hold` is what it protects."""

    id: LeaseId
    session_id: SessionId
    hold: HoldT
    granted_at_s: float
    expires_at_s: float
    grace_s: float

    def is_live(self, now_s: float) -> bool:
        """Whether its holder may still act under it."""
        return now_s < self.expires_at_s


class LeaseGrants(Protocol):
    """What holders of leases were given beside them, and can use without asking the table: the data plane's grants."""

    def renew(self, lease_id: LeaseId, life_s: float) -> None:
        """The lease lives `life_s` seconds from now on; without grants under it nothing happens."""

    def take_back(self, lease_id: LeaseId) -> None:
        """When it returns, nothing can be begun under the lease any more. Idempotent.

        Nothing goes on either, but for what `needs_grace`.
        """

    def needs_grace(self, schemes: Sequence[str]) -> bool:
        """Whether who was given these may still move bytes, for a moment, after it was taken back."""


class NoGrants:
    """Nothing is granted beside leases."""

    def renew(self, lease_id: LeaseId, life_s: float) -> None:
        """Nothing to renew."""

    def take_back(self, lease_id: LeaseId) -> None:
        """Nothing to take back."""

    def needs_grace(self, schemes: Sequence[str]) -> bool:
        """Nobody was given anything."""
        return False


class LeaseTable(Generic[HoldT]):
    """The leases of one kind (read or write) on one node.

    Attributes:
        grants: what else was granted under these leases.
    """

    def __init__(self, *, max_ttl_s: float, grace_s: float, max_life_s: float) -> None:
        """Empty.

        Args:
            max_ttl_s: longest life given at once, and what a wish of 0 gets.
            grace_s: seconds between a lease's end and the reuse of what it protected.
            max_life_s: longest life with all renewals.
        """
        self._max_ttl_s = min(max_ttl_s, max_life_s)
        self._grace_s = grace_s
        self._max_life_s = max_life_s
        self.grants: LeaseGrants = NoGrants()
        self._leases: dict[LeaseId, GrantedLease[HoldT]] = {}
        self._by_session: dict[SessionId, dict[LeaseId, GrantedLease[HoldT]]] = {}
        # (when to look at it again, id); a renewed lease is found early and pushed back.
        self._checks: list[tuple[float, LeaseId]] = []

    def __len__(self) -> int:
        """Leases that have not ended, those in their grace included."""
        return len(self._leases)

    def __iter__(self) -> Iterator[GrantedLease[HoldT]]:
        """All of them."""
        return iter(self._leases.values())

    def grant(
        self,
        lease_id: LeaseId,
        session_id: SessionId,
        hold: HoldT,
        *,
        ttl_s: float,
        now_s: float,
        has_grace: bool = True,
    ) -> GrantedLease[HoldT]:
        """A new lease of `ttl_s` seconds, or less; `has_grace` where its holder reaches memory by itself."""
        ttl_s = min(ttl_s, self._max_ttl_s) if ttl_s > 0 else self._max_ttl_s
        grace_s = self._grace_s if has_grace else 0.0
        lease = GrantedLease(lease_id, session_id, hold, now_s, now_s + ttl_s, grace_s)
        self._leases[lease_id] = lease
        self._by_session.setdefault(session_id, {})[lease_id] = lease
        heapq.heappush(self._checks, (lease.expires_at_s + grace_s, lease_id))
        return lease

    def get(self, lease_id: LeaseId) -> GrantedLease[HoldT] | None:
        """The lease, live or in its grace."""
        return self._leases.get(lease_id)

    def of_session(self, session_id: SessionId) -> list[GrantedLease[HoldT]]:
        """The leases that one session holds."""
        return list(self._by_session.get(session_id, {}).values())

    def num_of_session(self, session_id: SessionId) -> int:
        """How many leases one session holds."""
        return len(self._by_session.get(session_id, ()))

    def renew(self, lease_id: LeaseId, *, ttl_s: float, now_s: float) -> float:
        """Seconds of life from now on; 0 where the lease is gone or over."""
        lease = self._leases.get(lease_id)
        if lease is None or not lease.is_live(now_s):
            return 0.0
        ttl_s = min(ttl_s, self._max_ttl_s) if ttl_s > 0 else self._max_ttl_s
        last_s = lease.granted_at_s + self._max_life_s
        lease.expires_at_s = max(lease.expires_at_s, min(now_s + ttl_s, last_s))
        life_s = lease.expires_at_s - now_s
        self.grants.renew(lease_id, life_s)
        return life_s

    def run_out(self, lease_id: LeaseId, now_s: float) -> GrantedLease[HoldT] | None:
        """The lease, whose life ends now if it had not before, so that its grace begins; None where it is gone."""
        lease = self._leases.get(lease_id)
        if lease is not None and lease.is_live(now_s):
            lease.expires_at_s = now_s
            heapq.heappush(self._checks, (now_s + lease.grace_s, lease_id))
            self.grants.take_back(lease_id)
        return lease

    def end(self, lease_id: LeaseId) -> GrantedLease[HoldT] | None:
        """Takes a lease out; None where it was not there."""
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            held = self._by_session[lease.session_id]
            del held[lease_id]
            if not held:
                del self._by_session[lease.session_id]
            self.grants.take_back(lease_id)
        return lease

    def expired(self, now_s: float) -> list[GrantedLease[HoldT]]:
        """Leases whose grace is over too; the caller ends each of them, or they stay and are not told again."""
        found = []
        while self._checks and self._checks[0][0] <= now_s:
            _, lease_id = heapq.heappop(self._checks)
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            due_s = lease.expires_at_s + lease.grace_s
            if due_s > now_s:
                heapq.heappush(self._checks, (due_s, lease_id))
            else:
                found.append(lease)
        return found

    def next_check_s(self) -> float | None:
        """When `expired` should be asked again; None while there is nothing to expire."""
        while self._checks and self._checks[0][1] not in self._leases:
            heapq.heappop(self._checks)
        return self._checks[0][0] if self._checks else None
