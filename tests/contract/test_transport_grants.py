"""The laws of `Transport` on grants (11, 12), on every backend; the number in a test's name is the law's."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from snowskin.transport.api import Range, Run
from snowskin.transport.errors import (
    BadDescriptor,
    GrantRefused,
    OutOfBounds,
    PeerLost,
    RegionExpired,
    RegionReadOnly,
    TransportError,
)
from tests.support.transport_rigs import FAR_S, NBYTES, Rig, wait_until

if TYPE_CHECKING:
    from snowskin.transport.descriptor import RegionDescriptor

GRANTED = [Range(1000, 500), Range(1500, 500), Range(9000, 100)]
OUTSIDE = [
    pytest.param(Run(999, 0, 10), id="begins before"),
    pytest.param(Run(1990, 0, 11), id="ends behind"),
    pytest.param(Run(1999, 0, 7002), id="over the gap"),
    pytest.param(Run(0, 0, NBYTES), id="everything"),
    pytest.param(Run(NBYTES - 1, 0, 1), id="the last byte"),
]


def pull(rig: Rig, descriptor: RegionDescriptor, run: Run, **attaching: object) -> None:
    """Attaches and pulls one run."""
    remote = rig.attach(descriptor, **attaching)  # type: ignore[arg-type]
    with contextlib.closing(remote):
        rig.reader.pull(remote, rig.local, [run], deadline_s=FAR_S)


@pytest.mark.parametrize("run", OUTSIDE)
def test_11_only_the_granted_ranges_can_be_reached(rig: Rig, run: Run) -> None:
    remote = rig.attach(rig.describe(ranges=GRANTED))
    before = rig.owned.buffer.copy()
    rig.target[:] = 3
    inside = Run(1000, 0, 1)
    with pytest.raises(OutOfBounds):
        rig.reader.pull(remote, rig.local, [inside, run], deadline_s=FAR_S)
    with pytest.raises(OutOfBounds):
        rig.reader.push(rig.local, remote, [inside, run], deadline_s=FAR_S)
    assert (rig.target == 3).all()
    assert np.array_equal(rig.owned.buffer, before)


def test_11_granted_ranges_that_touch_are_one(rig: Rig) -> None:
    remote = rig.attach(rig.describe(ranges=GRANTED[::-1]))
    runs = [Run(1000, 0, 1000), Run(9000, 2000, 100)]
    rig.reader.pull(remote, rig.local, runs, deadline_s=FAR_S)
    assert np.array_equal(rig.target[:1000], rig.owned.buffer[1000:2000])
    assert np.array_equal(rig.target[2000:2100], rig.owned.buffer[9000:9100])


@pytest.mark.parametrize(
    "ranges", [[], [Range(0, 0)], [Range(NBYTES, 1)], [Range(-1, 5)], [Range(0, NBYTES + 1)]]
)
def test_11_ranges_that_are_not_there_are_not_granted(rig: Rig, ranges: list[Range]) -> None:
    with pytest.raises(OutOfBounds):
        rig.describe(ranges=ranges)
    assert rig.owner.statistics().num_grants == 0


def test_11_grant_for_reading_lets_nobody_write(rig: Rig) -> None:
    descriptor = rig.describe(writable=False)
    before = rig.owned.buffer.copy()
    rig.target[:] = 3
    lied = replace(descriptor, writable=True)

    def push(claimed: RegionDescriptor) -> None:
        with contextlib.closing(rig.attach(claimed, writable=True)) as remote:
            rig.reader.push(rig.local, remote, [Run(0, 0, 100)], deadline_s=FAR_S)

    with pytest.raises(RegionReadOnly):
        push(descriptor)
    if not rig.backend.knows_memory:
        with pytest.raises((RegionReadOnly, BadDescriptor)):
            push(lied)
    assert np.array_equal(rig.owned.buffer, before)
    pull(rig, descriptor, Run(0, 0, 100), writable=False)


def test_11_memory_registered_for_reading_cannot_be_granted_for_writing(rig: Rig) -> None:
    fixed = rig.owner.register(bytes(10))
    with pytest.raises((RegionReadOnly, TransportError)):
        rig.owner.describe(fixed, writable=True)
    fixed.close()


@pytest.mark.parametrize(
    "wrong",
    [{"capability": bytes(16)}, {"epoch": 4}, {"epoch": 0}, {"generation": 10}, {"generation": 0}],
    ids=str,
)
def test_11_wrong_capability_epoch_or_generation_opens_nothing(
    rig: Rig, wrong: dict[str, object]
) -> None:
    descriptor = rig.describe(epoch=3, generation=9)
    with pytest.raises((GrantRefused, BadDescriptor)):
        pull(rig, replace(descriptor, **wrong), Run(0, 0, 100), link_of=descriptor)  # type: ignore[arg-type]
    assert not rig.target.any()


def test_11_refusals_are_counted_where_they_were_said(rig: Rig) -> None:
    descriptor = rig.describe(ranges=GRANTED)
    with pytest.raises(OutOfBounds):
        pull(rig, descriptor, Run(0, 0, 100))
    reader, owner = rig.reader.statistics(), rig.owner.statistics()
    assert reader.num_refused == 1
    if rig.backend.has_links:
        assert owner.refused_by_reason == (), "it has no part in a transfer"
    else:
        assert owner.refused_by_reason == (("OUT_OF_BOUNDS", 1),)


def test_12_nothing_moves_once_revoke_has_returned(rig: Rig) -> None:
    descriptor = rig.describe()
    remote = rig.attach(descriptor)
    rig.reader.pull(remote, rig.local, [Run(0, 0, 10)], deadline_s=FAR_S)
    rig.owner.revoke(descriptor)
    rig.owner.revoke(descriptor)
    assert rig.owner.statistics().num_grants == 0
    if not rig.owner.is_one_sided or rig.backend.has_links:
        rig.target[:] = 0
        with pytest.raises(GrantRefused):
            rig.reader.pull(remote, rig.local, [Run(0, 0, 10)], deadline_s=FAR_S)
        assert not rig.target.any()
    remote.close()
    if rig.backend.has_links:
        return  # its end of the link is used up: nothing is left to attach with
    # An owner need not answer those who name no living grant.
    with pytest.raises((GrantRefused, PeerLost)):
        pull(rig, descriptor, Run(0, 0, 10))


def test_12_revoked_before_it_was_attached_it_opens_nothing(rig: Rig) -> None:
    descriptor = rig.describe()
    rig.owner.revoke(descriptor)
    with pytest.raises((GrantRefused, PeerLost)):
        pull(rig, descriptor, Run(0, 0, 10))
    assert not rig.target.any()


def test_12_revoke_ends_the_transfer_under_way_at_its_next_piece(huge: Rig) -> None:
    if huge.owner.is_one_sided and not huge.backend.has_links:
        pytest.skip("its peer reaches the memory by itself, and is not told")
    descriptor = huge.describe()
    remote = huge.attach(descriptor)
    moved: list[int] = []

    def landed(offset: int, nbytes: int) -> None:
        moved.append(nbytes)
        if len(moved) == 2:
            huge.owner.revoke(descriptor)

    with pytest.raises(GrantRefused):
        huge.reader.pull(
            remote,
            huge.local,
            [Run(0, 0, huge.nbytes)],
            deadline_s=FAR_S,
            piece_nbytes=64 << 10,
            landed=landed,
        )
    assert sum(moved) < huge.nbytes


def test_12_revoking_one_grant_leaves_the_others(rig: Rig) -> None:
    first, second = rig.describe(), rig.describe()
    kept = rig.attach(second)
    rig.owner.revoke(first)
    rig.reader.pull(kept, rig.local, [Run(0, 0, NBYTES)], deadline_s=FAR_S)
    assert np.array_equal(rig.target, rig.owned.buffer)


async def test_12_renewed_grant_lives_longer_and_not_for_ever(rig: Rig) -> None:
    descriptor = rig.describe(expires_in_s=10)
    # A reader that is told of no renewals holds on for as long as the owner lets it.
    told = rig.backend.has_links
    remote = rig.attach(descriptor if told else replace(descriptor, expires_in_s=FAR_S))
    rig.advance(8)
    rig.owner.renew(descriptor, expires_in_s=20)
    if told:
        await wait_until(lambda: remote.expires_at_s > rig.now_s() + 10)  # type: ignore[attr-defined]
    rig.advance(15)
    rig.reader.pull(remote, rig.local, [Run(0, 0, 10)], deadline_s=FAR_S)
    rig.advance(10)
    with pytest.raises(GrantRefused):
        rig.owner.renew(descriptor, expires_in_s=20)
    if not rig.owner.is_one_sided or told:
        with pytest.raises(RegionExpired):
            rig.reader.pull(remote, rig.local, [Run(0, 0, 10)], deadline_s=FAR_S)


def test_12_what_was_taken_back_cannot_be_renewed(rig: Rig) -> None:
    descriptor = rig.describe()
    rig.owner.revoke(descriptor)
    with pytest.raises(GrantRefused):
        rig.owner.renew(descriptor, expires_in_s=20)


def test_12_closing_the_owners_region_ends_its_grants(rig: Rig) -> None:
    if rig.owner.is_one_sided:
        pytest.skip("its peer reaches the memory by itself")
    remote = rig.attach()
    rig.owned.close()
    with pytest.raises((GrantRefused, PeerLost)):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 10)], deadline_s=FAR_S)
    assert not rig.target.any()
