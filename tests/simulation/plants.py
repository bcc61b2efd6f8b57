"""Bugs planted on purpose, those of `tests/support/node_plants.py` and others: the simulation must find every one.

Rules kept here: nothing in the product knows of them. The books that the node checks by itself are not looked at
while a bug is planted: what clients see must be enough. The first five are the kinds that issue "The spine hardened"
names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.engines.conductor.state import ConductorState
from snowskin.kvstore.checksum import RunningChecksums
from snowskin.kvstore.node.events import BlockEvents
from tests.support.node_plants import (
    commit_after_expiry,
    double_free,
    eviction_under_a_lease,
    lost_release,
    no_deadline,
    no_fence,
    no_grace,
    no_quarantine,
    no_shares,
    quarantine_for_ever,
    stale_generation,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    Plant = Callable[[pytest.MonkeyPatch], None]


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
