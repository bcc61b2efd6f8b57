"""Grants: what they open, for how long, and how they are taken back."""

from __future__ import annotations

import math
import threading

import pytest

from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import (
    GrantRefused,
    OutOfBounds,
    RegionExpired,
    RegionReadOnly,
    TransportClosed,
)
from snowskin.transport.grants import GrantTable
from snowskin.transport.memory import region_of
from snowskin.transport.words import Range

CAPABILITY = b"c" * 16
PATIENCE_S = 5.0


@pytest.fixture
def region():
    with region_of(bytearray(1000)) as made:
        yield made


@pytest.fixture
def table():
    return GrantTable()


def add(table, region, ranges=None, *, at_s=0.0, **fields):
    descriptor = RegionDescriptor(
        **{
            "scheme": "tcp",
            "capability": CAPABILITY,
            "nbytes": region.nbytes,
            "epoch": 5,
            "generation": 2,
            **fields,
        }
    )
    return table.add(descriptor, region, ranges, now_s=at_s)


def test_a_grant_is_found_by_capability_epoch_and_generation_together(table, region):
    grant = add(table, region)
    assert table.find(CAPABILITY, epoch=5, generation=2) is grant


def test_all_that_does_not_fit_is_refused_in_the_same_words(table, region):
    add(table, region)
    words = set()
    for capability, epoch, generation in (
        (b"x" * 16, 5, 2),
        (CAPABILITY[:8], 5, 2),
        (CAPABILITY, 4, 2),
        (CAPABILITY, 5, 3),
    ):
        with pytest.raises(GrantRefused) as refusal:
            table.find(capability, epoch=epoch, generation=generation)
        words.add(str(refusal.value))
    table.revoke(CAPABILITY)
    with pytest.raises(GrantRefused) as refusal:
        table.find(CAPABILITY, epoch=5, generation=2)
    assert words == {str(refusal.value)}


def test_a_request_is_measured_whole(table, region):
    grant = add(table, region, [Range(0, 100), Range(200, 100)])
    assert grant.check([(0, 100), (299, 1), (0, 1)], is_push=False, now_s=0.0) == 102
    for bad in ((99, 2), (100, 1), (199, 1), (250, 51), (0, 0), (1 << 64, 1), (0, 1 << 64)):
        with pytest.raises(OutOfBounds, match="range 1 of 2"):
            grant.check([(0, 1), bad], is_push=False, now_s=0.0)


def test_ranges_that_touch_or_overlap_are_one(table, region):
    grant = add(table, region, [Range(50, 100), Range(0, 50), Range(120, 40)])
    assert list(grant.ranges) == [Range(0, 160)]
    assert grant.check([(0, 160)], is_push=False, now_s=0.0) == 160


@pytest.mark.parametrize("ranges", [[], [(0, 0)], [(-1, 5)], [(999, 2)], [(0, 1), (1000, 1)]])
def test_what_the_region_does_not_have_cannot_be_granted(table, region, ranges):
    with pytest.raises(OutOfBounds):
        add(table, region, [Range(*each) for each in ranges])
    assert len(table) == 0


def test_a_grant_for_reading_takes_no_push(table, region):
    grant = add(table, region)
    with pytest.raises(RegionReadOnly):
        grant.check([(0, 1)], is_push=True, now_s=0.0)
    assert add(table, region, writable=True).check([(0, 1)], is_push=True, now_s=0.0) == 1


def test_a_life_is_over_at_its_end_and_can_be_renewed_before(table, region):
    grant = add(table, region, expires_in_s=10.0)
    grant.begin_piece(9.9)
    grant.end_piece()
    table.renew(CAPABILITY, expires_in_s=10.0, now_s=9.9)
    assert grant.check([(0, 1)], is_push=False, now_s=19.8) == 1
    for late in (
        lambda: grant.check([(0, 1)], is_push=False, now_s=19.9),
        lambda: grant.begin_piece(19.9),
    ):
        with pytest.raises(RegionExpired):
            late()
    with pytest.raises(GrantRefused):
        table.renew(CAPABILITY, expires_in_s=10.0, now_s=19.9)


def test_a_life_of_no_number_is_refused(table, region):
    add(table, region)
    with pytest.raises(OutOfBounds):
        table.renew(CAPABILITY, expires_in_s=math.nan, now_s=0.0)


def test_revoking_waits_for_the_piece_under_way_and_lets_none_begin(table, region):
    grant = add(table, region)
    grant.begin_piece(0.0)
    revoked = threading.Event()

    def revoke():
        table.revoke(CAPABILITY)
        revoked.set()

    thread = threading.Thread(target=revoke)
    thread.start()
    try:
        while not grant.revoked:
            assert thread.is_alive()
        assert not revoked.is_set()
        with pytest.raises(GrantRefused):
            grant.begin_piece(0.0)
    finally:
        grant.end_piece()
        thread.join(PATIENCE_S)
    assert revoked.is_set()
    assert len(table) == 0


def test_a_closed_region_takes_its_grants_along(table, region):
    grant = add(table, region)
    region.close()
    with pytest.raises(TransportClosed):
        grant.begin_piece(0.0)
    with pytest.raises(GrantRefused):
        table.find(CAPABILITY, epoch=5, generation=2)
    assert len(table) == 0
    with pytest.raises(TransportClosed):
        add(table, region)


def test_a_piece_that_could_not_begin_holds_nobody_up(table, region):
    grant = add(table, region)
    region.close()
    with pytest.raises(TransportClosed):
        grant.begin_piece(0.0)
    grant.revoke()  # would wait for ever if the bracket were still open


def test_the_expired_are_forgotten_and_the_living_kept(table, region):
    add(table, region, expires_in_s=1.0)
    add(table, region, expires_in_s=3.0, capability=b"d" * 16)
    assert table.forget_expired(2.0) == 1
    assert len(table) == 1
    table.close()
    assert len(table) == 0


def test_what_nobody_takes_back_is_forgotten_a_while_after_its_life(table, region):
    for number in range(1000):
        capability = number.to_bytes(16)
        add(table, region, expires_in_s=1.0, capability=capability, at_s=float(number))
        assert table.get(capability) is not None
    assert len(table) < 200
    with pytest.raises(RegionExpired):
        table.find((990).to_bytes(16), epoch=5, generation=2).check(
            [(0, 1)], is_push=False, now_s=999.0
        )


def test_a_closed_table_takes_nothing_in(table, region):
    table.close()
    with pytest.raises(TransportClosed):
        add(table, region)
    assert len(table) == 0
