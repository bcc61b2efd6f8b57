"""What a node knows of its transports, and what of it arrives at an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snowskin.kvstore import admin_wire
from snowskin.kvstore.node import reach as reach_module
from snowskin.kvstore.node.reach import NodeReach, counters_of
from snowskin.transport.addresses import Address
from snowskin.transport.advertisement import Advertisement, SchemeAdvertisement
from snowskin.transport.api import TransportStatistics
from snowskin.transport.choice import TransportProbe
from snowskin.transport.host_probe import HostFiles, read_host
from snowskin.v1 import admin_pb2
from tests.support.fake_sysfs import laptop, planted, two_sockets

if TYPE_CHECKING:
    from pathlib import Path

    from snowskin.kvstore.admin_messages import TransportsReport

MOVED = TransportStatistics(
    num_pulls=3,
    num_pushes=0,
    pulled_nbytes=4096,
    pushed_nbytes=0,
    nbytes_by_traffic=(4096, 0, 0),
    num_refused=0,
    num_timed_out=0,
    num_cancelled=0,
    num_lost=0,
    num_attached=1,
    attached_nbytes=8192,
    num_connections=2,
    refused_by_reason=(("BAD_CAPABILITY", 5),),
)


def through_the_wire(report: TransportsReport) -> TransportsReport:
    data = admin_wire.transports_to(report).SerializeToString()
    return admin_wire.transports_from(admin_pb2.ListTransportsResponse.FromString(data))


def test_report_arrives_as_it_was_sent(tmp_path: Path) -> None:
    files, addresses = two_sockets()
    planted(tmp_path, files)
    reach = NodeReach(
        probes={
            "shm": TransportProbe(
                scheme="shm", available=True, reason="works", facts=(("a", "b"),)
            ),
            "ucx": TransportProbe(
                scheme="ucx",
                available=False,
                reason="libucp is not here",
                remedy="install it",
                kinds=("rdma:Ethernet",),
            ),
            "tcp": TransportProbe(scheme="tcp", available=True, reason="bound"),
        },
        facts=read_host(HostFiles(root=tmp_path), addresses=lambda: addresses),
        bound={"tcp": [Address("::", 7200)]},
        advertisement=Advertisement(schemes=(SchemeAdvertisement(scheme="shm"),)),
        statistics=lambda: {"tcp": MOVED},
    )
    report = reach.report(door="unix:/run/door")
    assert through_the_wire(report) == report
    shm, ucx, tcp = report.transports
    assert shm.bound == ("unix:/run/door",)
    assert shm.is_open
    assert shm.counters == ()
    assert ucx.advertised == ()
    assert tcp.bound == ("[::]:7200",)
    assert dict(tcp.counters)["num_connections"] == 2
    assert Advertisement.from_bytes(report.advertisement) == reach.advertisement


def test_empty_host_and_no_transports_arrive_empty() -> None:
    report = NodeReach().report(door="")
    assert through_the_wire(report) == report
    assert report.transports == ()
    assert Advertisement.from_bytes(report.advertisement).schemes == ()


def test_host_without_numa_nodes_arrives_without_them(tmp_path: Path) -> None:
    files, addresses = laptop()
    facts = read_host(HostFiles(root=planted(tmp_path, files)), addresses=lambda: addresses)
    assert facts.gpus[0].place.numa_node is None
    report = NodeReach(facts=facts).report(door="")
    assert through_the_wire(report) == report


def test_address_that_is_none_is_left_out() -> None:
    message = admin_pb2.ListTransportsResponse()
    message.host.nics.add(
        name="e", addresses=["10.0.0.1", "10.0.0.2/x", "/", "fd00::1/64", "/9999"]
    )
    (nic,) = admin_wire.transports_from(message).host.nics
    assert [(address.host, address.prefix) for address in nic.addresses] == [("fd00::1", 64)]


def test_counters_hold_every_number_and_each_refusal_by_reason() -> None:
    counters = dict(counters_of(MOVED))
    assert counters["pulled_nbytes"] == 4096
    assert counters["refused BAD_CAPABILITY"] == 5
    assert "nbytes_by_traffic" not in counters


def test_what_works_here_is_tried_and_told() -> None:
    reach = NodeReach.tried(["shm", "tcp"], bound=[Address("127.0.0.1", 7200)])
    assert list(reach.probes) == ["shm", "tcp", "grpc"]
    assert [scheme.scheme for scheme in reach.advertisement.schemes] == ["shm", "tcp"]
    (told,) = reach.advertisement.schemes[1].addresses
    assert str(told.address) == "127.0.0.1:7200"


@pytest.mark.parametrize(
    ("bound", "told", "advertised"),
    [
        ([], [], None),
        ([Address("192.0.2.77", 7200)], [], None),  # no address of this host
        ([Address("127.0.0.1", 7200)], [Address("store-1.example", 0)], "store-1.example:7200"),
    ],
)
def test_tcp_is_told_only_where_it_listens(
    bound: list[Address], told: list[Address], advertised: str | None
) -> None:
    reach = NodeReach.tried(["tcp"], bound=bound, told=told)
    tcp = reach.advertisement.scheme("tcp")
    assert (str(tcp.addresses[0].address) if tcp is not None else None) == advertised


def test_hardware_that_ucx_may_not_listen_on_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("rdma:InfiniBand", "cuda_ipc")
    probes = {"ucx": TransportProbe(scheme="ucx", available=True, reason="", kinds=kinds)}
    monkeypatch.setattr(reach_module, "probe_transports", lambda *_, **__: dict(probes))
    for stays_here, told_kinds in ((False, kinds), (True, ("cuda_ipc",))):
        told = NodeReach.tried(("ucx",), ucx_stays_here=stays_here).advertisement.scheme("ucx")
        assert told is not None
        assert told.kinds == told_kinds
