"""The node's state against a memory (tests/support/node_machine.py), and the machine against planted bugs.

With the node's own books unchecked, the memory alone must find each bug of `PLANTED`.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from snowskin.kvstore.lease import GrantedLease, LeaseTable
from snowskin.kvstore.messages import Released
from snowskin.kvstore.node.reading import Reading
from snowskin.kvstore.node.residence import Residence
from snowskin.kvstore.node.shares import LeaseShares
from snowskin.kvstore.node.writing import Writing
from snowskin.kvstore.pool.pool import Use
from tests.support.node_machine import NodeMachine

NodeMachine.TestCase.settings = settings(stateful_step_count=60, deadline=None)
TestNodeMachine = NodeMachine.TestCase


# --- the machine finds what it is for


class ModelOnly(NodeMachine):
    """Does not look into the node's books."""

    checks_books = False


def lose_releases(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reading, "release", lambda self, session, request, now_s: Released(num_unknown=0))


def free_twice(patch: pytest.MonkeyPatch) -> None:
    remove = Residence.remove

    def eager(self, entry) -> None:
        remove(self, entry)
        if entry.segment.num_leases:
            self._free_committed(entry.segment, entry.offset)

    patch.setattr(Residence, "remove", eager)


def commit_after_expiry(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GrantedLease, "is_live", lambda self, now_s: True)


def evict_under_leases(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residence, "lease", lambda self, segments: None)
    patch.setattr(Residence, "unlease", lambda self, segments: None)


def reuse_during_grace(patch: pytest.MonkeyPatch) -> None:
    grant = LeaseTable.grant

    def graceless(self, *args, **kwargs):
        self._grace_s = 0.0
        return grant(self, *args, **kwargs)

    patch.setattr(LeaseTable, "grant", graceless)


def repeat_generations(patch: pytest.MonkeyPatch) -> None:
    reserve = Residence.reserve

    def forgetful(self, *args, **kwargs):
        self._generation = 0
        return reserve(self, *args, **kwargs)

    patch.setattr(Residence, "reserve", forgetful)


def free_what_late_writers_reach(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writing, "_fence", lambda self, lease, outcome: self._end(lease, outcome))


def forget_quarantine(patch: pytest.MonkeyPatch) -> None:
    give_back = Residence.give_back

    def leaking(self, segment, offset, was) -> None:
        if was is not Use.QUARANTINED:
            give_back(self, segment, offset, was)

    patch.setattr(Residence, "give_back", leaking)


def leave_waiters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reading, "answer_overdue", lambda self, now_s: [])


def lease_more_than_the_share(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeaseShares, "num_leasable", lambda self, session, starts, num_blocks: num_blocks)


def count_leases_of_the_dead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeaseShares, "num_leasable", lambda self, session, starts, num_blocks: 0)


PLANTED = [
    lose_releases,
    free_twice,
    commit_after_expiry,
    evict_under_leases,
    reuse_during_grace,
    repeat_generations,
    free_what_late_writers_reach,
    forget_quarantine,
    leave_waiters,
    lease_more_than_the_share,
    count_leases_of_the_dead,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_machine_finds_planted_bug(plant, monkeypatch, capsys):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            ModelOnly,
            settings=settings(
                max_examples=300,
                stateful_step_count=60,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                print_blob=False,
            ),
        )
    capsys.readouterr()
