"""Leases by themselves: their lives, their grace, whose they are."""

from __future__ import annotations

import pytest

from snowskin.kvstore.lease import LeaseTable
from snowskin.kvstore.messages import LeaseId, SessionId

ONE, TWO = LeaseId(1), LeaseId(2)
ANNA, BERT = SessionId(1), SessionId(2)


@pytest.fixture
def table() -> LeaseTable[str]:
    return LeaseTable(max_ttl_s=10.0, grace_s=5.0, max_life_s=25.0)


def test_lease_lives_as_long_as_wished_but_not_longer_than_the_limit(table):
    assert table.grant(ONE, ANNA, "x", ttl_s=3.0, now_s=100.0).expires_at_s == 103.0
    assert table.grant(TWO, ANNA, "x", ttl_s=99.0, now_s=100.0).expires_at_s == 110.0
    assert table.grant(LeaseId(3), ANNA, "x", ttl_s=0.0, now_s=100.0).expires_at_s == 110.0


def test_first_life_is_no_longer_than_all_lives():
    table: LeaseTable[str] = LeaseTable(max_ttl_s=30.0, grace_s=0.0, max_life_s=20.0)
    assert table.grant(ONE, ANNA, "x", ttl_s=0.0, now_s=0.0).expires_at_s == 20.0


def test_lease_is_over_at_its_end(table):
    lease = table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    assert lease.is_live(9.999)
    assert not lease.is_live(10.0)


def test_lease_is_told_as_expired_once_its_grace_is_over(table):
    lease = table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    assert table.expired(14.999) == []
    assert table.expired(15.0) == [lease]
    assert table.expired(99.0) == []
    assert table.get(ONE) is lease  # until the caller ends it


def test_renewal_counts_from_now(table):
    table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    assert table.renew(ONE, ttl_s=0.0, now_s=9.0) == 10.0
    assert table.expired(15.0) == []
    assert [lease.id for lease in table.expired(24.0)] == [ONE]


def test_grace_is_given_after_a_short_renewal_too(table):
    table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    table.renew(ONE, ttl_s=4.0, now_s=8.0)
    assert table.expired(15.0) == []
    assert [lease.id for lease in table.expired(17.0)] == [ONE]


def test_renewal_ends_with_the_longest_life(table):
    table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    table.renew(ONE, ttl_s=10.0, now_s=9.0)
    assert table.renew(ONE, ttl_s=10.0, now_s=18.0) == 7.0
    assert table.renew(ONE, ttl_s=10.0, now_s=24.0) == 1.0
    assert table.renew(ONE, ttl_s=10.0, now_s=25.0) == 0.0


def test_renewal_never_shortens(table):
    table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    assert table.renew(ONE, ttl_s=1.0, now_s=2.0) == 8.0


def test_what_is_over_or_unknown_is_not_renewed(table):
    table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    assert table.renew(ONE, ttl_s=10.0, now_s=10.0) == 0.0
    assert table.renew(TWO, ttl_s=10.0, now_s=0.0) == 0.0


def test_ended_lease_is_gone_for_all(table):
    lease = table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    assert table.end(ONE) is lease
    assert table.end(ONE) is None
    assert (len(table), table.get(ONE), table.of_session(ANNA)) == (0, None, [])
    assert (table.expired(99.0), table.next_check_s()) == ([], None)


def test_leases_are_found_by_their_session(table):
    one = table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    two = table.grant(TWO, BERT, "y", ttl_s=10.0, now_s=0.0)
    assert (table.of_session(ANNA), table.of_session(BERT)) == ([one], [two])
    assert (table.num_of_session(ANNA), table.num_of_session(SessionId(9))) == (1, 0)
    assert list(table) == [one, two]


def test_next_check_is_no_later_than_the_first_end_of_a_grace(table):
    table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    table.grant(TWO, ANNA, "x", ttl_s=2.0, now_s=0.0)
    assert table.next_check_s() == 7.0
    table.renew(TWO, ttl_s=10.0, now_s=1.0)
    assert table.next_check_s() == 7.0  # early: it is pushed back when it comes up
    assert table.expired(7.0) == []
    assert table.next_check_s() == 15.0
    table.end(ONE)
    assert table.next_check_s() == 16.0


def test_without_a_grace_it_is_told_as_expired_at_its_end(table):
    lease = table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0, has_grace=False)
    other = table.grant(TWO, ANNA, "x", ttl_s=10.0, now_s=0.0)
    assert table.next_check_s() == 10.0
    assert table.expired(9.999) == []
    assert table.expired(10.0) == [lease]
    assert table.expired(15.0) == [other]


class Noted:
    """What was granted elsewhere, and what became of it."""

    def __init__(self):
        self.told: list[tuple[str, LeaseId, float]] = []

    def renew(self, lease_id, life_s):
        self.told.append(("renewed", lease_id, life_s))

    def take_back(self, lease_id):
        self.told.append(("over", lease_id, 0.0))

    def needs_grace(self, schemes):
        return False


def test_what_was_granted_under_a_lease_is_renewed_and_ends_with_it(table):
    table.grants = noted = Noted()
    table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    table.renew(ONE, ttl_s=5.0, now_s=8.0)
    assert noted.told == [("renewed", ONE, 5.0)]
    table.end(ONE)
    table.end(ONE)
    table.renew(ONE, ttl_s=5.0, now_s=8.0)
    assert noted.told[1:] == [("over", ONE, 0.0)]


def test_what_was_granted_under_a_revoked_lease_is_over_before_its_grace(table):
    table.grants = noted = Noted()
    table.grant(ONE, ANNA, "x", ttl_s=10.0, now_s=0.0)
    table.run_out(ONE, 3.0)
    table.run_out(ONE, 4.0)
    table.renew(ONE, ttl_s=5.0, now_s=4.0)
    assert noted.told == [("over", ONE, 0.0)]
