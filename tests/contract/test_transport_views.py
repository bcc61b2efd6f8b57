"""Views: what is read in place counts once it was confirmed, and nobody who reads it crashes."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from snowskin.transport.api import Range
from snowskin.transport.copying import AttachedMemory
from snowskin.transport.errors import (
    GrantRefused,
    OutOfBounds,
    PeerLost,
    RegionExpired,
    TransportClosed,
)
from tests.support.transport_rigs import NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snowskin.transport.api import RemoteRegion
    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.views import RegionView
    from tests.support.transport_rigs import Rig


def with_views(remote: RemoteRegion) -> AttachedMemory:
    """Not every backend's regions have views."""
    assert isinstance(remote, AttachedMemory)
    return remote


class Viewed:
    """A rig with a view of 4,096 bytes at 1,000 out."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.descriptor: RegionDescriptor = rig.describe(expires_in_s=10)
        self.remote = with_views(rig.attach(self.descriptor))
        self.view: RegionView = self.remote.view(1000, 4096)
        self.array = self.view.array
        self.expected = rig.owned.buffer[1000:5096].copy()


@pytest.fixture
def viewed(viewing: Rig) -> Iterator[Viewed]:
    made = Viewed(viewing)
    yield made
    vars(made).clear()  # an array keeps the mapping


def test_view_shows_the_owners_own_bytes(viewed: Viewed) -> None:
    with viewed.view as view:
        assert np.array_equal(view.array, viewed.expected)
        assert (view.nbytes, bytes(view.memory)) == (4096, viewed.expected.tobytes())
        viewed.rig.owned.buffer[1000] ^= 255
        assert view.array[0] == viewed.expected[0] ^ 255, "nothing was copied"
        view.confirm()
        view.confirm()
    statistics = viewed.rig.reader.statistics()
    assert (statistics.num_pulls, statistics.pulled_nbytes) == (2, 8192)


def test_nobody_writes_through_a_view(viewed: Viewed) -> None:
    assert viewed.remote.writable
    with pytest.raises(ValueError, match="read-only"):
        viewed.array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        viewed.array.flags.writeable = True
    with pytest.raises(TypeError, match="read-only"):
        viewed.view.memory[0] = 1


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 5), (0, 0), (NBYTES - 4, 5), (NBYTES, 1)])
def test_view_outside_the_region_is_refused(viewed: Viewed, offset: int, nbytes: int) -> None:
    with pytest.raises(OutOfBounds):
        viewed.remote.view(offset, nbytes)


def test_view_outside_the_granted_ranges_is_refused(viewing: Rig) -> None:
    remote = with_views(viewing.attach(viewing.describe(ranges=[Range(100, 50)])))
    remote.view(100, 50).confirm()
    with pytest.raises(OutOfBounds, match="not granted"):
        remote.view(100, 51)


def expire(viewed: Viewed) -> None:
    viewed.rig.advance(11)


def take_back(viewed: Viewed) -> None:
    viewed.rig.owner.revoke(viewed.descriptor)


def close_region(viewed: Viewed) -> None:
    viewed.remote.close()


def close_reader(viewed: Viewed) -> None:
    viewed.rig.reader.close()


def close_view(viewed: Viewed) -> None:
    viewed.view.close()


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (expire, RegionExpired),
        (take_back, GrantRefused),
        (close_region, TransportClosed),
        (close_reader, TransportClosed),
        (close_view, TransportClosed),
    ],
)
def test_view_is_not_confirmed_once_its_grant_is_over(
    viewed: Viewed, end: Any, error: type[Exception]
) -> None:
    viewed.view.confirm()
    end(viewed)
    with pytest.raises(error):
        viewed.view.confirm()
    assert np.array_equal(viewed.array, viewed.expected), "and still it can be looked at"
    if end is not close_view:
        assert viewed.rig.reader.statistics().num_refused == 1
        with pytest.raises(error):
            viewed.remote.view(0, 1)


def test_view_of_a_peer_that_is_gone_is_not_confirmed(viewed: Viewed) -> None:
    viewed.remote.lost = True  # as whatever watches the peer says
    with pytest.raises(PeerLost):
        viewed.view.confirm()
    assert viewed.rig.reader.statistics().num_lost == 1


def mappings() -> str:
    gc.collect()
    with open("/proc/self/maps", encoding="ascii") as maps:
        return maps.read()


def test_memory_stays_mapped_until_the_last_view_is_dropped(viewing: Rig) -> None:
    viewed = Viewed(viewing)
    array, expected = viewed.array, viewed.expected
    viewing.close()
    del viewed
    assert "snowskin-rig" in mappings()
    assert np.array_equal(array, expected)
    del array
    assert "snowskin-rig" not in mappings()
