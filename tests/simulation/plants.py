"""Bugs planted on purpose, each by changing the real code in this process: the simulation must find every one.

Rules kept here: nothing in the product knows of them. The books that the node checks by itself are not looked at
while a bug is planted: what clients see must be enough. The first five are the kinds that issue "The spine hardened"
names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.engines.conductor.state import ConductorState
from snowskin.kvstore.checksum import RunningChecksums
from snowskin.kvstore.lease import GrantedLease, LeaseTable
from snowskin.kvstore.messages import Released
from snowskin.kvstore.node.events import BlockEvents
from snowskin.kvstore.node.reading import Reading
from snowskin.kvstore.node.residence import Residence
from snowskin.kvstore.node.shares import LeaseShares
from snowskin.kvstore.node.writing import Writing
from snowskin.kvstore.pool.pool import Use

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    Plant = Callable[[pytest.MonkeyPatch], None]


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


def no_verdict(patch: pytest.MonkeyPatch) -> None:
    """Checksums are taken and not looked at."""
    patch.setattr(RunningChecksums, "mismatches", lambda *_: [])


def untold_eviction(patch: pytest.MonkeyPatch) -> None:
    """Who watches is told of what comes, not of what goes."""
    note = BlockEvents.note

    def told(self, namespace, key, removed) -> None:
        if not removed:
            note(self, namespace, key, removed)

    patch.setattr(BlockEvents, "note", told)


def load_of_nobody(patch: pytest.MonkeyPatch) -> None:
    """A stage that ended counts on its instance until the next report."""
    patch.setattr(ConductorState, "on_stage_ended", lambda self, request_id, placement: None)


def work_for_the_dead(patch: pytest.MonkeyPatch) -> None:
    """An instance that is silent is taken for a ready one."""
    patch.setattr(ConductorState, "_is_silent", lambda self, instance, now_s: False)


# How many seeds, from 0 on, it may take to find each one; they were measured, and have room.
NAMED: dict[str, tuple[Plant, int]] = {
    "lost release": (lost_release, 20),
    "double free": (double_free, 60),
    "commit after expiry": (commit_after_expiry, 40),
    "eviction under a lease": (eviction_under_a_lease, 40),
    "stale generation": (stale_generation, 20),
}
OTHERS: dict[str, tuple[Plant, int]] = {
    "no grace": (no_grace, 60),
    "no quarantine": (no_quarantine, 40),
    "no fence": (no_fence, 150),
    "quarantine for ever": (quarantine_for_ever, 40),
    "no deadline": (no_deadline, 20),
    "no shares": (no_shares, 60),
    "no verdict": (no_verdict, 150),
    "untold eviction": (untold_eviction, 30),
    "load of nobody": (load_of_nobody, 40),
    "work for the dead": (work_for_the_dead, 200),
}
