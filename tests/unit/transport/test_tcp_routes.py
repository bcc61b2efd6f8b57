"""Which ways a `tcp` reader takes to an owner: by its own NICs, and what it was told of the owner's addresses."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.advertisement import AdvertisedAddress
from snowskin.transport.tcp import routes as tcp_routes
from snowskin.transport.tcp.routes import TcpRoutes
from snowskin.transport.topology import HostFacts, Nic, NicAddress

PORT = 7110
LO = Nic(
    name="lo", is_up=True, is_loopback=True, addresses=(NicAddress(host="127.0.0.1", prefix=8),)
)


def nic(name, host, speed=12.5e9):
    return Nic(
        name=name,
        is_up=True,
        speed_bytes_per_s=speed,
        addresses=(NicAddress(host=host, prefix=24),),
    )


ETH0, ETH1 = nic("eth0", "10.0.0.1"), nic("eth1", "10.0.1.1")
DOCKER = nic("docker0", "172.17.0.1", speed=0.0)
BOX = HostFacts(nics=(ETH0, ETH1, DOCKER, LO))


def to(*hosts):
    return Reachability(addresses=tuple(Address(host, PORT) for host in hosts))


def told(host, **changes):
    return AdvertisedAddress(address=Address(host, PORT), **changes)


def ends(paths):
    return [(path.local_address, path.remote_address) for path in paths]


@pytest.fixture
def routes():
    return TcpRoutes(facts=lambda: BOX)


def test_an_owner_with_several_nics_is_reached_from_the_nic_in_each_network(routes):
    paths = routes(to("10.0.0.2", "10.0.1.2"))
    assert ends(paths) == [("10.0.0.1", f"10.0.0.2:{PORT}"), ("10.0.1.1", f"10.0.1.2:{PORT}")]
    assert all(path.is_preferred and path.speed_bytes_per_s == 12.5e9 for path in paths)


def test_what_the_owner_tells_of_its_addresses_counts(routes):
    rows = [told("10.0.0.2"), told("10.0.1.2", is_preferred=False, speed_bytes_per_s=10)]
    routes.learn(rows, same_network=False)
    paths = routes(to("10.0.0.2", "10.0.1.2"))
    assert [(path.remote_address, path.is_preferred) for path in paths] == [
        (f"10.0.0.2:{PORT}", True),
        (f"10.0.1.2:{PORT}", False),
    ]
    assert paths[1].speed_bytes_per_s == 10


@pytest.mark.parametrize("host", ["10.0.0.2", "10.9.9.9", "node-7.example", "fd00::9"])
def test_the_only_way_is_bound_to_no_address_of_ours(routes, host):
    (path,) = routes(to(host))
    assert (path.local_address, path.local_device) == ("", "")
    assert path.remote_address == str(Address(host, PORT))


def test_an_address_that_this_host_has_too_leads_not_to_another_host(routes):
    (path,) = routes(to("10.0.0.2", "172.17.0.1"))
    assert path.remote_address == f"10.0.0.2:{PORT}"
    routes.learn([told("172.17.0.1")], same_network=False)
    assert routes(to("172.17.0.1")) == []


def test_an_owner_whose_addresses_are_all_of_this_host_is_here(routes):
    (path,) = routes(to("10.0.0.1", "10.0.1.1"))
    assert path.remote_address == f"10.0.0.1:{PORT}"


def test_loopback_is_a_way_where_nothing_else_was_told_or_the_owner_is_here(routes):
    assert ends(routes(to("127.0.0.1", "::1", "localhost"))) == [
        ("", f"127.0.0.1:{PORT}"),
        ("", f"[::1]:{PORT}"),
        ("", f"localhost:{PORT}"),
    ]
    assert ends(routes(to("127.0.0.1", "10.0.0.2"))) == [("", f"10.0.0.2:{PORT}")]
    routes.learn([told("127.0.0.1"), told("10.0.0.1")], same_network=True)
    assert ends(routes(to("10.0.0.1", "127.0.0.1"))) == [("", f"127.0.0.1:{PORT}")]
    routes.learn([told("127.0.0.1")], same_network=False)
    assert routes(to("127.0.0.1")) == []


def test_configured_addresses_are_taken_side_by_side_where_families_match():
    routes = TcpRoutes(("10.0.0.7", "fd00::7"), facts=HostFacts)
    assert ends(routes(to("10.0.0.2", "fd00::2"))) == [
        ("10.0.0.7", f"10.0.0.2:{PORT}"),
        ("fd00::7", f"[fd00::2]:{PORT}"),
    ]
    assert ends(TcpRoutes(("fd00::7",))(to("10.0.0.2"))) == [("", f"10.0.0.2:{PORT}")]


def test_the_host_is_looked_at_when_first_needed_and_again_after_a_minute(monkeypatch):
    looks = []
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def look():
        looks.append(1)
        return BOX

    routes = TcpRoutes(facts=look)
    routes(to("127.0.0.1"))
    assert looks == []
    for _ in range(2):
        routes(to("10.0.0.2"))
    assert looks == [1]
    now[0] += 61
    routes.learn([told("10.0.0.2")], same_network=False)
    assert looks == [1, 1]


def test_what_is_remembered_is_bounded(routes, monkeypatch):
    monkeypatch.setattr(tcp_routes, "MAX_TOLD", 2)
    for host in ("10.0.0.2", "10.0.0.3", "10.0.0.2", "10.0.0.4"):
        routes.learn([told(host)], same_network=False)
    assert [address.host for address in routes._told] == ["10.0.0.2", "10.0.0.4"]


def test_two_nics_in_one_network_are_told_apart_by_name():
    box = replace(BOX, nics=(ETH0, nic("eth2", "10.0.0.3"), LO))
    paths = TcpRoutes(facts=lambda: box)(to("10.0.0.2"))
    assert {(path.local_address, path.local_device) for path in paths} == {
        ("10.0.0.1", "eth0"),
        ("10.0.0.3", "eth2"),
    }
