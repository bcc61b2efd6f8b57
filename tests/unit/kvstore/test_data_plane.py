"""What a node opens under a lease where one of its transports is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from snowskin.kvstore.messages import LeaseId
from snowskin.kvstore.node.data_plane import DataPlane
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.loopback import LoopbackNetwork, LoopbackTransport

if TYPE_CHECKING:
    from snowskin.transport.lending import Lending


class Arena:
    """Memory alone."""

    buffer = np.zeros(4096, dtype=np.uint8)
    lending: Lending | None = None


class Tcp(LoopbackTransport):
    """Called as the one that lends."""

    scheme = "tcp"


class Other(LoopbackTransport):
    """A second transport."""

    scheme = "other"


def test_transport_that_is_gone_takes_no_other_with_it(caplog):
    network = LoopbackNetwork()
    gone, living = Other(network), LoopbackTransport(network)
    plane = DataPlane([gone, living], {0: Arena()}, epoch=1)  # type: ignore[dict-item]  # as much of one as is asked for
    gone.close()
    (region,) = plane.grant(
        LeaseId(1), [(0, 0, 4096)], ["other", "loopback"], writable=False, life_s=9.0
    )
    (descriptor,) = region.descriptors
    assert RegionDescriptor.from_bytes(descriptor).scheme == "loopback"
    assert "other" in caplog.text
    plane.take_back(LeaseId(1))
    assert len(living.grants) == len(plane) == 0
    assert plane.grant(LeaseId(2), [(0, 0, 9)], ["other"], writable=False, life_s=9.0) == ()
    plane.close()


def test_only_tcp_is_told_that_pages_are_lent():
    network = LoopbackNetwork()
    arena = Arena()
    arena.lending = object()  # type: ignore[assignment]  # nobody looks into it
    plane = DataPlane([Tcp(network), Other(network)], {0: arena}, epoch=1)  # type: ignore[dict-item]
    lent = {scheme: regions[0].lending for scheme, regions in plane._regions.items()}
    assert lent == {"tcp": arena.lending, "other": None}
    plane.close()
