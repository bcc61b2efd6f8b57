"""Which transports a client may use: what is demanded, what is shared, and what all of them counted."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from structlog.testing import capture_logs

from snowskin.kvstore.client import transports as transports_module
from snowskin.kvstore.client.transports import ClientTransports
from snowskin.kvstore.pool.arena import Arena
from snowskin.transport import probes
from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.advertisement import (
    AdvertisedAddress,
    Advertisement,
    HostIdentity,
    SchemeAdvertisement,
)
from snowskin.transport.choice import TransportProbe
from snowskin.transport.errors import TransportClosed, TransportUnavailable
from snowskin.transport.host_probe import read_host
from snowskin.transport.loopback import LoopbackNetwork, LoopbackTransport
from snowskin.transport.memory import Memfd, region_of
from snowskin.transport.runs import Run
from snowskin.transport.tcp.transport import TcpTransport
from tests.support.served_node import stat_of

FAR = HostIdentity(host=b"f" * 16, process=b"f" * 16, pid_namespace=1, net_namespace=1)
HERE = probes.own_identity()
RDMA = ("rdma:InfiniBand",)


def told(*schemes, identity=FAR, kinds=(), host="192.0.2.77"):
    """What a node says of itself."""
    address = AdvertisedAddress(address=Address(host, 7110))
    return stat_of(
        schemes,
        Advertisement(
            identity=identity,
            schemes=tuple(
                SchemeAdvertisement(
                    scheme=scheme,
                    kinds=kinds if scheme == "ucx" else (),
                    addresses=(address,) if scheme == "tcp" else (),
                )
                for scheme in schemes
            ),
        ),
    )


@pytest.fixture
def ucx_here(monkeypatch):
    """UCX with InfiniBand on this host, as far as probes know; how often it was tried."""
    tried = []

    def probe(schemes, facts):
        found = probes.probe_transports(set(schemes) - {"ucx"}, facts)
        if "ucx" in schemes:
            tried.append("ucx")
            found["ucx"] = TransportProbe(scheme="ucx", available=True, reason="tried", kinds=RDMA)
        return found

    monkeypatch.setattr(transports_module, "probe_transports", probe)
    return tried


def opened(choice="auto", **factories):
    """Transports of a process, whose schemes open in memory unless `factories` says otherwise."""
    kinds = dict.fromkeys(("tcp", "ucx"), LoopbackTransport) | factories
    return ClientTransports(choice, auto=("ucx", "tcp"), factories=kinds)


@pytest.mark.parametrize(
    ("choice", "stat", "schemes"),
    [
        ("auto", told("tcp", "ucx"), ("tcp",)),
        ("auto", told("tcp", "ucx", kinds=RDMA), ("ucx",)),
        ("auto", told("ucx"), ()),
        ("auto", told("tcp", host="127.0.0.1"), ()),
        ("auto", told("tcp", host="127.0.0.1", identity=HERE), ("tcp",)),
        ("auto", told(), ()),
        ("auto", stat_of(["tcp"]), ()),
        ("auto", replace(told("tcp"), advertisement=b"of a later release"), ()),
        ("ucx", told("tcp", "ucx"), ("ucx",)),
        ("tcp", told("tcp", "ucx", kinds=RDMA), ("tcp",)),
    ],
)
def test_leases_are_asked_for_what_topology_chooses(ucx_here, choice, stat, schemes):
    transports = opened(choice)
    assert transports.ways_to(stat, node="n").schemes == schemes
    transports.close()


@pytest.mark.parametrize("choice", ["grpc", "shm"])
def test_who_moves_no_bytes_by_the_data_plane_looks_at_nothing(choice, monkeypatch):
    monkeypatch.setattr(transports_module, "read_host", None)
    assert ClientTransports(choice).ways_to(told("tcp"), node="n") is None


@pytest.mark.parametrize(
    ("choice", "stat", "why"),
    [
        ("ucx", told("tcp"), "node n serves tcp"),
        ("tcp", told("tcp", host="127.0.0.1"), "does not lead there"),
        ("tcp", stat_of(["tcp"]), "says nothing of its transports"),
    ],
)
def test_what_is_demanded_and_cannot_be_had_is_refused_with_what_to_do(ucx_here, choice, stat, why):
    with pytest.raises(TransportUnavailable, match=why) as caught:
        opened(choice).ways_to(stat, node="node n")
    assert caught.value.hint


def test_this_host_is_looked_at_once_and_ucx_tried_only_for_nodes_with_hardware(
    ucx_here, monkeypatch
):
    looks = []

    def look():
        looks.append(1)
        return read_host()

    monkeypatch.setattr(transports_module, "read_host", look)
    transports = opened()
    transports.ways_to(told("tcp", "ucx"), node="n")
    assert ucx_here == []
    for _ in range(2):
        transports.ways_to(told("tcp", "ucx", kinds=RDMA), node="n")
    assert (looks, ucx_here) == ([1], ["ucx"])
    transports.close()


def test_what_does_not_open_counts_as_absent_unless_it_was_demanded(ucx_here):
    def refuses():
        raise TransportUnavailable("no device", hint="give it one")

    stat = told("tcp", "ucx", kinds=RDMA)
    transports = opened(ucx=refuses)
    ways = transports.ways_to(stat, node="n")
    assert ways.choice.scheme == "tcp"
    assert [one.reason for one in ways.choice.not_taken if one.scheme == "ucx"] == ["no device"]
    transports.close()
    with pytest.raises(TransportUnavailable, match="no device"):
        opened("ucx", ucx=refuses).ways_to(stat, node="n")


def test_each_extent_travels_by_what_was_opened_for_it(ucx_here):
    transports = opened()
    ways = transports.ways_to(told("tcp", "ucx", kinds=RDMA), node="n")
    with region_of(np.zeros(8, np.uint8)) as landing:
        assert ways.of_extent({"tcp", "ucx"}, landing).scheme == "ucx"
        assert ways.of_extent({"tcp"}, landing).scheme == "tcp"
        with pytest.raises(TransportUnavailable, match="not tried"):
            ways.of_extent((), landing)
    on_gpu = SimpleNamespace(device_index=0)
    with pytest.raises(TransportUnavailable, match="of GPU"):
        ways.of_extent({"tcp"}, on_gpu)
    transports.close()


def test_ways_lead_over_what_the_node_said_of_its_addresses(ucx_here):
    stat = told("tcp", identity=HERE, host="127.0.0.1")
    transports = ClientTransports("tcp")
    ways = transports.ways_to(stat, node="n")
    reader = transports.get("tcp")
    assert isinstance(reader, TcpTransport)
    link = reader._connections.link(
        Reachability(addresses=(Address("192.0.2.9", 7110), Address("127.0.0.1", 7110)))
    )
    assert link.path_names == tuple(path.name for path in ways.choice.paths)
    transports.close()


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
        mapped = transports.new_map()
        for nbytes in (10, 20, 30):
            region = mapped.register(memfd)
            remote = mapped.attach(mapped.describe(region), fd=fd)
            mapped.pull(remote, landing, [Run(0, 0, nbytes)], deadline_s=time.monotonic() + 5)
            if nbytes < 30:
                mapped.close()
                mapped = transports.new_map()
        counted = transports.statistics()["shm"]
        assert (counted.num_pulls, counted.pulled_nbytes) == (3, 60)
        assert counted.nbytes_by_traffic == (60, 0, 0)
        assert counted.num_attached == 1
        mapped.close()
        assert transports.statistics()["shm"].pulled_nbytes == 60
        os.close(fd)


def test_one_line_says_which_way_and_why_and_why_not_the_others(ucx_here):
    transports = opened()
    with capture_logs() as lines:
        transports.ways_to(told("tcp", "ucx"), node="node n")
    (line,) = [line for line in lines if line["event"] == "way to node"]
    assert (line["node"], line["scheme"], line["log_level"]) == ("node n", "tcp", "info")
    assert "1 preferred" in line["reason"]
    assert line["not_taken"].startswith("shm: another host; ")
    assert "ucx: it was not tried" in line["not_taken"]
    transports.close()
