"""`kvctl transports` against nodes that tell what a test gives them, over real gRPC."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from snowskin.kvstore.node.admin import NodeAdminService
from snowskin.kvstore.node.reach import NodeReach
from snowskin.kvstore.rpc import serving
from snowskin.tools.kvctl.main import cli
from snowskin.transport.addresses import Address
from snowskin.transport.advertisement import (
    AdvertisedAddress,
    Advertisement,
    HostIdentity,
    SchemeAdvertisement,
)
from snowskin.transport.api import TransportStatistics
from snowskin.transport.choice import TransportProbe
from snowskin.transport.host_probe import HostFiles, read_host
from snowskin.transport.probes import own_identity
from snowskin.v1 import admin_pb2_grpc
from tests.support.fake_sysfs import planted, two_sockets

MOVED = TransportStatistics(
    num_pulls=0, num_pushes=0, pulled_nbytes=0, pushed_nbytes=0, nbytes_by_traffic=(0, 0, 0),
    num_refused=0, num_timed_out=0, num_cancelled=0, num_lost=0, num_attached=0, attached_nbytes=0,
    served_nbytes=3 << 30, num_connections=7, refused_by_reason=(("GRANT_UNKNOWN", 5),),
)  # fmt: skip


def far_reach(root):
    """A server with four NICs and eight GPUs, on another host than this."""
    files, addresses = two_sockets()
    where = AdvertisedAddress(address=Address("10.0.2.7", 7200), speed_bytes_per_s=25 * 10**9)
    return NodeReach(
        probes={
            "shm": TransportProbe(scheme="shm", available=True, reason="a memfd was made"),
            "ucx": TransportProbe(
                scheme="ucx", available=False, reason="libucp is not here", remedy="install UCX"
            ),
            "tcp": TransportProbe(scheme="tcp", available=True, reason="a port was bound"),
            "grpc": TransportProbe(scheme="grpc", available=True, reason="always"),
        },
        facts=read_host(HostFiles(root=planted(root, files)), addresses=lambda: addresses),
        bound={"tcp": [Address("::", 7200)]},
        advertisement=Advertisement(
            identity=HostIdentity(host=b"f" * 16, process=b"f" * 16),
            schemes=(
                SchemeAdvertisement(scheme="shm"),
                SchemeAdvertisement(scheme="tcp", addresses=(where,)),
            ),
        ),
        statistics=lambda: {"tcp": MOVED},
    )


@pytest.fixture
async def node():
    """Serves a reach behind a door; gives its address."""
    async with AsyncExitStack() as stack:

        async def serve(reach, door=""):
            shell: Any = SimpleNamespace(state=SimpleNamespace(door=door))
            server = await stack.enter_async_context(
                serving(
                    [
                        (
                            admin_pb2_grpc.add_NodeAdminServicer_to_server,
                            NodeAdminService(shell, reach),
                        )
                    ],
                    host="127.0.0.1",
                    port=0,
                    service_names=[],
                    role="node",
                )
            )
            return server.address

        yield serve


async def run(*arguments):
    """Exit status, stdout and stderr; beside the servers, in a thread of its own."""
    words = ["--conductor", "127.0.0.1:1", "--timeout-s", "10", "transports", *arguments]
    result = await asyncio.to_thread(CliRunner().invoke, cli, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


async def document(*arguments):
    status, out, err = await run("--json", *arguments)
    assert (status, err) == (0, "")
    return json.loads(out)


async def test_far_node_is_shown_whole_and_reached_by_tcp(node, tmp_path):
    address = await node(far_reach(tmp_path))
    status, out, err = await run("--node", address)
    assert (status, err) == (0, "")
    for said in (
        "libucp is not here. install UCX", "[::]:7200", "10.0.2.7:7200", "3.0 GiB",
        "NIC ens3", "NUMA 1", "200 Gbit/s", "RDMA mlx5_3:1", "GPU 0000:1a:00.0", "ens1 switch",
        "65536 MiB reserved", "> 10.0.2.7:7200", "not shm", "another host",
    ):  # fmt: skip
        assert said in out, said

    (told,) = await document("--node", address)
    assert told["node"] == address
    assert [row["scheme"] for row in told["transports"]] == ["shm", "ucx", "tcp", "grpc"]
    tcp = told["transports"][2]
    assert tcp["open"]
    assert tcp["counters"]["num_connections"] == 7
    assert tcp["counters"]["refused GRANT_UNKNOWN"] == 5
    assert told["way"]["choice"]["scheme"] == "tcp"
    assert told["way"]["choice"]["paths"][0]["remote_address"] == "10.0.2.7:7200"
    assert {row["scheme"] for row in told["way"]["choice"]["not_taken"]} == {
        "loopback", "shm", "ucx", "grpc"
    }  # fmt: skip
    assert len(told["host"]["gpus"]) == 8


async def test_node_of_this_host_is_reached_by_its_door_only_while_that_can_be_opened(
    node, tmp_path
):
    reach = far_reach(tmp_path / "tree")
    mine = replace(own_identity(), process=b"n" * 16)
    reach = replace(reach, advertisement=replace(reach.advertisement, identity=mine))
    path = tmp_path / "door"
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        address = await node(reach, f"unix:{path}")
        (told,) = await document("--node", address)
        assert told["way"]["choice"]["scheme"] == "shm"
        assert told["door"] == f"unix:{path}"
    path.unlink()
    (told,) = await document("--node", address)
    assert told["way"]["choice"]["scheme"] == "tcp"
    reasons = {row["scheme"]: row["reason"] for row in told["way"]["choice"]["not_taken"]}
    assert "no local door" in reasons["shm"]


async def test_demanded_scheme_that_cannot_be_had_says_why(node, tmp_path):
    address = await node(far_reach(tmp_path))
    (told,) = await document("--node", address, "--scheme", "ucx")
    assert told["way"]["choice"] is None
    assert "ucx was asked for and cannot be had: it was not tried" in told["way"]["error"]
    _, out, _ = await run("--node", address, "--scheme", "shm")
    assert "shm was asked for and cannot be had: another host" in out


async def test_way_from_one_node_to_another_uses_what_that_one_has(node, tmp_path):
    start = await node(far_reach(tmp_path / "start"))
    other = far_reach(tmp_path / "end")
    where = AdvertisedAddress(address=Address("10.0.3.9", 7200), speed_bytes_per_s=25 * 10**9)
    elsewhere = Advertisement(
        identity=HostIdentity(host=b"g" * 16, process=b"g" * 16),
        schemes=(SchemeAdvertisement(scheme="tcp", addresses=(where,)),),
    )
    end = await node(replace(other, advertisement=elsewhere))
    told = await document("--node", start, "--node", end, "--from", start)
    assert told[0]["way"] is None
    (path,) = told[1]["way"]["choice"]["paths"]
    assert (path["local_address"], path["remote_address"]) == ("10.0.3.7", "10.0.3.9:7200")
    status, _, err = await run("--node", end, "--from", start)
    assert status == 2
    assert "not among" in err


async def test_node_that_tells_nothing_is_read_by_grpc(node):
    address = await node(None)
    (told,) = await document("--node", address)
    assert told["transports"] == []
    assert told["way"]["choice"]["scheme"] == "grpc"
    status, _, err = await run("--node", "127.0.0.1:1")
    assert status == 1
    assert "127.0.0.1:1" in err
