"""Bugs planted in a node's state on purpose, each by changing the real code in this process.

Rules kept here: nothing in the product knows of them. The property machine and the simulation each find them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.kvstore.lease import GrantedLease, LeaseTable
from snowskin.kvstore.messages import Released
from snowskin.kvstore.node.reading import Reading
from snowskin.kvstore.node.residence import Residence
from snowskin.kvstore.node.shares import LeaseShares
from snowskin.kvstore.node.writing import Writing
from snowskin.kvstore.pool.pool import Use

if TYPE_CHECKING:
    import pytest


def lost_release(patch: pytest.MonkeyPatch) -> None:
    """A reader says that it is done, and the node does not hear it."""
    patch.setattr(Reading, "release", lambda self, session, request, now_s: Released(num_unknown=0))


def double_free(patch: pytest.MonkeyPatch) -> None:
    """What leaves the index under a lease is freed at once, and again with the lease."""
    remove = Residence.remove

    def eager(self, entry) -> None:
        remove(self, entry)
        if entry.segment.num_leases:
            self._free_committed(entry.segment, entry.offset)

    patch.setattr(Residence, "remove", eager)


def commit_after_expiry(patch: pytest.MonkeyPatch) -> None:
    """A lease that ran out is taken for a live one."""
    patch.setattr(GrantedLease, "is_live", lambda self, now_s: True)


def eviction_under_a_lease(patch: pytest.MonkeyPatch) -> None:
    """Leases are granted, but do not pin."""
    patch.setattr(Residence, "lease", lambda self, segments: None)
    patch.setattr(Residence, "unlease", lambda self, segments: None)


def stale_generation(patch: pytest.MonkeyPatch) -> None:
    """Room is given out again under the number that it had."""
    reserve = Residence.reserve

    def forgetful(self, *args, **kwargs):
        self._generation = 0
        return reserve(self, *args, **kwargs)

    patch.setattr(Residence, "reserve", forgetful)


def no_grace(patch: pytest.MonkeyPatch) -> None:
    """What a lease protected is reused the moment it ends."""
    grant = LeaseTable.grant

    def graceless(self, *args, **kwargs):
        self._grace_s = 0.0
        return grant(self, *args, **kwargs)

    patch.setattr(LeaseTable, "grant", graceless)


def no_quarantine(patch: pytest.MonkeyPatch) -> None:
    """What a late writer can still reach is given to the next."""
    patch.setattr(Writing, "_fence", lambda self, lease, outcome: self._end(lease, outcome))


def no_fence(patch: pytest.MonkeyPatch) -> None:
    """What a client that was cut off can still reach is given to the next."""
    patch.setattr(
        Writing, "fence_session", lambda self, session_id, _: self.end_session(session_id)
    )


def quarantine_for_ever(patch: pytest.MonkeyPatch) -> None:
    """What was in quarantine is never free again."""
    give_back = Residence.give_back

    def leaking(self, segment, offset, was) -> None:
        if was is not Use.QUARANTINED:
            give_back(self, segment, offset, was)

    patch.setattr(Residence, "give_back", leaking)


def no_deadline(patch: pytest.MonkeyPatch) -> None:
    """Who waits for blocks is not answered when the time is over."""
    patch.setattr(Reading, "answer_overdue", lambda self, now_s: [])


def no_shares(patch: pytest.MonkeyPatch) -> None:
    """Nobody counts how much of a pool is leased."""
    patch.setattr(LeaseShares, "num_leasable", lambda self, session, starts, num_blocks: num_blocks)


def no_share_for_anybody(patch: pytest.MonkeyPatch) -> None:
    """As if those who are gone held all of a pool."""
    patch.setattr(LeaseShares, "num_leasable", lambda self, session, starts, num_blocks: 0)
