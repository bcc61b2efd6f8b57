"""Which addresses of two hosts make paths, and which of these come first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snowskin.transport.addresses import Address
from snowskin.transport.advertisement import AdvertisedAddress
from snowskin.transport.host_probe import HostFiles, read_host
from snowskin.transport.routes import MAX_PATHS, advertised, paths_between
from snowskin.transport.topology import HostFacts, Nic, NicAddress, Place
from tests.support.fake_sysfs import planted, two_sockets

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def box(tmp_path: Path) -> HostFacts:
    files, addresses = two_sockets()
    planted(tmp_path, files)
    return read_host(HostFiles(root=tmp_path), addresses=lambda: addresses)


def told(*hosts: str, speed: int = 25 * 10**9, preferred: bool = True) -> list[AdvertisedAddress]:
    return [
        AdvertisedAddress(
            address=Address(host, 7200), speed_bytes_per_s=speed, is_preferred=preferred
        )
        for host in hosts
    ]


def test_each_near_nic_gets_the_address_in_its_own_network(box: HostFacts) -> None:
    theirs = told(*(f"10.0.{number}.9" for number in range(4)))
    paths = paths_between(box, Place(numa_node=1), theirs, same_network=False)
    assert [(path.local_address, path.remote_address, path.is_preferred) for path in paths] == [
        ("10.0.2.7", "10.0.2.9:7200", True),
        ("10.0.3.7", "10.0.3.9:7200", True),
        ("10.0.0.7", "10.0.0.9:7200", False),
        ("10.0.1.7", "10.0.1.9:7200", False),
    ]
    assert {path.local_device for path in paths} == {""}
    assert {path.speed_bytes_per_s for path in paths} == {25e9}


def test_ipv6_makes_paths_like_ipv4(box: HostFacts) -> None:
    paths = paths_between(
        box, Place(numa_node=0), told("fd00:0::9", "fd00:1::9"), same_network=False
    )
    assert [(path.local_address, path.remote_address) for path in paths] == [
        ("fd00:0::7", "[fd00:0::9]:7200"),
        ("fd00:1::7", "[fd00:1::9]:7200"),
    ]
    assert all(path.is_preferred for path in paths)


def test_second_family_of_the_same_nics_is_only_the_fall_back(box: HostFacts) -> None:
    theirs = told("10.0.0.9", "fd00:0::9")
    paths = paths_between(box, Place(numa_node=0), theirs, same_network=False)
    assert [(path.remote_address, path.is_preferred) for path in paths] == [
        ("10.0.0.9:7200", True),
        ("[fd00:0::9]:7200", False),
    ]


def test_nics_in_one_network_share_its_addresses_out_and_bind_to_the_device() -> None:
    nics = tuple(
        Nic(
            name=f"ens{number}",
            is_up=True,
            speed_bytes_per_s=12.5e9,
            addresses=(NicAddress(host=f"10.0.0.{number}", prefix=24),),
        )
        for number in (1, 2, 3)
    )
    paths = paths_between(
        HostFacts(nics=nics), Place(), told("10.0.0.11", "10.0.0.12"), same_network=False
    )
    preferred = [path for path in paths if path.is_preferred]
    assert [(path.local_device, path.remote_address) for path in preferred] == [
        ("ens1", "10.0.0.11:7200"),
        ("ens2", "10.0.0.12:7200"),
    ]
    assert len(paths) == 6
    assert len({path.name for path in paths}) == 6


def test_fast_way_behind_a_router_comes_before_the_management_port(box: HostFacts) -> None:
    theirs = [*told("10.77.0.9"), *told("192.168.4.9", speed=125_000_000, preferred=False)]
    paths = paths_between(box, Place(numa_node=0), theirs, same_network=False)
    assert [(path.local_address, path.remote_address, path.is_preferred) for path in paths] == [
        ("", "10.77.0.9:7200", True),
        ("192.168.4.7", "192.168.4.9:7200", False),
    ]


def test_only_the_management_port_is_better_than_nothing(box: HostFacts) -> None:
    theirs = told("192.168.4.9", speed=125_000_000, preferred=False)
    (path,) = paths_between(box, Place(), theirs, same_network=False)
    assert path.is_preferred
    assert path.speed_bytes_per_s == 125e6


def test_name_is_left_to_the_resolver_and_the_kernel(box: HostFacts) -> None:
    (path,) = paths_between(box, Place(), told("store-1.example"), same_network=False)
    assert (path.local_address, path.remote_address) == ("", "store-1.example:7200")


def test_loopback_is_a_path_only_within_one_network_namespace(box: HostFacts) -> None:
    theirs = told("127.0.0.1")
    assert paths_between(box, Place(), theirs, same_network=False) == ()
    (path,) = paths_between(box, Place(), theirs, same_network=True)
    assert (path.local_address, path.remote_address) == ("", "127.0.0.1:7200")


def test_within_one_network_namespace_all_addresses_are_one_path(box: HostFacts) -> None:
    theirs = told("10.0.0.7", "10.0.1.7", "127.0.0.1")
    (path,) = paths_between(box, Place(), theirs, same_network=True)
    assert path.remote_address == "127.0.0.1:7200"


def test_paths_are_bounded(box: HostFacts) -> None:
    theirs = told(*(f"10.0.0.{number}" for number in range(10, 60)))
    assert len(paths_between(box, Place(), theirs, same_network=False)) == MAX_PATHS


def test_bound_everywhere_is_advertised_as_every_nic_s_address_nearest_first(
    box: HostFacts,
) -> None:
    rows = advertised([Address("::", 7200)], [], box, Place(numa_node=1))
    hosts = [row.address.host for row in rows if row.is_preferred]
    assert hosts == ["10.0.2.7", "fd00:2::7", "10.0.3.7", "fd00:3::7"]
    assert not any(row.address.host in ("127.0.0.1", "::1") for row in rows)
    assert rows[-1].address == Address("192.168.4.7", 7200)
    assert rows[-1].speed_bytes_per_s == 125_000_000
    only_v4 = advertised([Address("0.0.0.0", 7200)], [], box)
    assert not any(":" in row.address.host for row in only_v4)


def test_what_the_operator_advertises_is_told_as_it_is(box: HostFacts) -> None:
    rows = advertised(
        [Address("0.0.0.0", 7200)],
        [Address("store-1.example", 0), Address("10.0.3.7", 9999)],
        box,
        Place(numa_node=0),
    )
    assert [(str(row.address), row.is_preferred) for row in rows] == [
        ("store-1.example:7200", True),
        ("10.0.3.7:9999", False),
    ]


def test_bound_address_is_advertised_as_bound(box: HostFacts) -> None:
    (row,) = advertised([Address("fd00:1::7", 7200)], [], box)
    assert str(row.address) == "[fd00:1::7]:7200"
    assert row.speed_bytes_per_s == 25 * 10**9
    assert advertised([], [Address("store-1.example", 0)], box) == ()
