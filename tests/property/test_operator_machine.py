"""The machine of tests/support/node_machine.py with an operator, who revokes leases and evicts blocks at any time.

What was promised holds for as long as the revoked lease's grace, and what somebody holds is never evicted.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from snowskin.kvstore.admin_messages import LeaseState
from snowskin.kvstore.lease import LeaseTable
from snowskin.kvstore.node.inspection import Inspection
from tests.support.node_machine import NAMESPACES, NodeMachine


class OperatedMachine(NodeMachine):
    def protected_holds(self):
        return [*self.open_reads(), *(w for w in self.open_writes() if self.is_known(w))]

    def is_known(self, hold):
        return hold.is_protected(self.node.now_s, self.grace_s)

    @precondition(lambda self: self.protected_holds())
    @rule(which=st.integers(0, 9))
    def revoke(self, which: int) -> None:
        hold = self.protected_holds()[which % len(self.protected_holds())]
        now_s = self.node.now_s
        info, effects = self.node.state.revoke_lease(hold.id, now_s)
        hold.expires_at_s = min(hold.expires_at_s, now_s)
        self.node.take(effects)
        assert info.state is not LeaseState.ACTIVE
        assert info.seconds_left <= self.grace_s

    @rule(
        namespaces=st.sampled_from([NAMESPACES, NAMESPACES[:1]]),
        at=st.integers(0, 9),
        num=st.integers(1, 9),
        dry_run=st.booleans(),
    )
    def evict(self, namespaces, at: int, num: int, dry_run: bool) -> None:
        keys = [key for namespace, key in self.committed if namespace][at : at + num]
        state = self.node.state
        before = state.stat()
        evicted, effects = state.evict(namespaces, keys, self.node.now_s, dry_run=dry_run)
        self.node.take(effects)
        if dry_run:
            assert state.stat() == before
        assert evicted.num_unknown <= len(keys)

    @rule()
    def look(self) -> None:
        state = self.node.state
        before = state.stat()
        listing = state.inspection.list_blocks(
            "default", namespace=b"", key_prefix=b"", leased_only=False, behind=None, limit=5
        )
        while listing.step():
            pass
        assert len(state.inspection.describe("default", listing.found, self.node.now_s)) == len(
            listing.found
        )
        told = state.inspection.list_leases(
            kind=None, client="", behind=0, limit=1000, now_s=self.node.now_s
        )
        assert len(told) == before.num_read_leases + before.num_write_leases
        assert sum(lease.nbytes for lease in told if lease.state is LeaseState.QUARANTINED) == (
            before.pools[0].quarantined_nbytes
        )
        assert state.stat() == before


OperatedMachine.TestCase.settings = settings(stateful_step_count=50, max_examples=60, deadline=None)
TestOperatedMachine = OperatedMachine.TestCase


class ModelOnly(OperatedMachine):
    """Does not look into the node's books."""

    checks_books = False


def revoke_without_grace(patch: pytest.MonkeyPatch) -> None:
    def at_once(self, lease_id, now_s):
        lease = self.get(lease_id)
        if lease is not None:
            lease.expires_at_s = now_s - self._grace_s
            self._checks.insert(0, (now_s - self._grace_s, lease_id))
        return lease

    patch.setattr(LeaseTable, "run_out", at_once)


def evict_what_is_held(patch: pytest.MonkeyPatch) -> None:
    def careless(self, tenant, namespaces, keys, *, dry_run):
        found = [(name, key) for key in keys for name in namespaces]
        for entry in (self._entry(tenant, name) for name in found):
            if entry is not None and not dry_run:
                segment, entry.segment.num_leases = entry.segment, 0
                self._residence.remove(entry)
                segment.num_leases = 1
        return evict(self, tenant, namespaces, keys, dry_run=True)

    evict = Inspection.evict
    patch.setattr(Inspection, "evict", careless)


@pytest.mark.parametrize("plant", [revoke_without_grace, evict_what_is_held])
def test_the_machine_finds_a_planted_bug(plant, monkeypatch):
    plant(monkeypatch)
    quick = settings(
        stateful_step_count=50, max_examples=500, deadline=None, phases=[Phase.generate],
        derandomize=True, database=None,
    )  # fmt: skip
    with pytest.raises(Exception):  # noqa: B017, PT011  whichever it trips over first
        run_state_machine_as_test(ModelOnly, settings=quick)
