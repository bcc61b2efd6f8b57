"""Which transports a client may use: what is demanded, what is shared, and what all of them counted."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from snowskin.kvstore.client.transports import ClientTransports
from snowskin.kvstore.pool.arena import Arena
from snowskin.transport.errors import TransportClosed, TransportUnavailable
from snowskin.transport.loopback import LoopbackNetwork, LoopbackTransport
from snowskin.transport.memory import Memfd, region_of
from snowskin.transport.runs import Run


@pytest.mark.parametrize(
    ("choice", "served", "schemes"),
    [
        ("auto", ("tcp", "ucx"), ("tcp",)),
        ("auto", (), ()),
        ("ucx", ("tcp", "ucx"), ("ucx",)),
        ("tcp", ("tcp",), ("tcp",)),
        ("grpc", ("tcp", "ucx"), ()),
        ("shm", ("tcp",), ()),
    ],
)
def test_what_is_taken_of_what_a_node_serves(choice, served, schemes):
    assert ClientTransports(choice).chosen(served, node="n") == schemes


def test_what_is_demanded_and_not_served_is_refused_with_what_to_do():
    with pytest.raises(TransportUnavailable, match="node n serves tcp") as caught:
        ClientTransports("ucx").chosen(("tcp",), node="node n")
    assert "--transports ucx" in caught.value.hint


def test_a_demand_for_what_does_not_exist_ends_the_start():
    with pytest.raises(TransportUnavailable, match="known are"):
        ClientTransports("pigeon").open_demanded()


def test_one_transport_is_opened_for_all_and_closed_by_its_owner():
    opened = []
    network = LoopbackNetwork()

    def factory():
        opened.append(LoopbackTransport(network))
        return opened[-1]

    transports = ClientTransports("loopback", factories={"loopback": factory})
    assert opened == []
    transports.open_demanded()
    assert transports.get("loopback") is transports.get("loopback") is opened[0]
    transports.close()
    transports.close()
    assert opened[0].closed
    with pytest.raises(TransportClosed):
        transports.get("loopback")


def test_what_connections_of_the_past_moved_is_counted_still():
    transports = ClientTransports()
    landing = region_of(np.zeros(100, np.uint8))
    assert transports.statistics() == {}
    with Arena(4096, name="a", tenant="t") as arena:
        fd = arena.open_read_write()
        memfd = Memfd(fd=fd)
        for nbytes in (10, 20, 30):
            mapped = transports.new_map()
            region = mapped.register(memfd)
            remote = mapped.attach(mapped.describe(region), fd=fd)
            mapped.pull(remote, landing, [Run(0, 0, nbytes)], deadline_s=time.monotonic() + 5)
            if nbytes < 30:
                mapped.close()
        counted = transports.statistics()["shm"]
        assert (counted.num_pulls, counted.pulled_nbytes) == (3, 60)
        assert counted.nbytes_by_traffic == (60, 0, 0)
        assert counted.num_attached == 1
        mapped.close()
        assert transports.statistics()["shm"].pulled_nbytes == 60
        os.close(fd)
