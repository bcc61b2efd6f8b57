"""Where a node's data plane listens and is found: settings, TLS, and what is refused before anything is served."""

from __future__ import annotations

import asyncio
import functools
import socket
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from snowskin.engines.daemon import EngineSettings
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.client.transports import ClientTransports
from snowskin.kvstore.errors import AddressInUse, BadSetting, InsecureAddress, NodeUnavailable
from snowskin.kvstore.messages import AbortRequest, ReserveRequest
from snowskin.kvstore.node.daemon import NodeSettings, serve_node
from snowskin.kvstore.node.data_ports import open_transports
from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import TransportError, TransportUnavailable
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.transport import TcpTransport
from snowskin.transport.topology import HostFacts, Nic, NicAddress
from snowskin.transport.ucx.settings import UcxSettings
from tests.support.roles import running
from tests.support.store_drivers import keys_of, namespace_of, noise
from tests.support.tls_files import Authority

BLOCK = 4096


def node(**settings):
    return running(serve_node, NodeSettings, dram_nbytes=1 << 20, log_level="error", **settings)


async def connected(role, transports):
    return await StoreClient.connect(
        role.facts["address"], client_name="one", transports=transports
    )


async def there_and_back(client):
    """Publishes a block and pulls it."""
    data = noise(1, BLOCK)
    there = {"namespace": namespace_of(1), "keys": keys_of(1, 1), "block_nbytes": BLOCK}
    await client.publish(**there, local=client.register(data), local_offsets=[0])
    landing = np.zeros_like(data)
    pulled = await client.pull(**there, local=client.register(landing), local_offsets=[0])
    assert pulled.num_blocks == 1
    assert (landing == data).all()


async def told_addresses(client):
    """Under which addresses a lease says that the data plane is found."""
    call = functools.partial(client._connection.call, timeout_s=2, request_id="")
    request = ReserveRequest(namespace=namespace_of(2), keys=keys_of(2, 1), block_nbytes=BLOCK)
    reserved = await call(request, lease=None)
    await call(AbortRequest(lease_id=reserved.lease.id), lease=reserved.lease)
    ((region,),) = [region.descriptors for region in reserved.lease.regions]
    return Reachability.from_bytes(RegionDescriptor.from_bytes(region).extra).addresses


async def test_a_lease_tells_the_bound_address_or_the_advertised_ones():
    transports = ClientTransports("tcp")
    async with node() as role, await connected(role, transports) as client:
        bound = Address.parse(role.facts["data_address"])
        assert bound.host == "127.0.0.1"
        assert await told_addresses(client) == (bound,)
        await there_and_back(client)
    async with (
        node(data_advertise=("localhost", f"127.0.0.1:{bound.port}"), data_port=bound.port) as role,
        await connected(role, transports) as client,
    ):
        assert await told_addresses(client) == (Address("localhost", bound.port), bound)
        await there_and_back(client)
    transports.close()


async def test_an_advertised_address_that_leads_nowhere_is_an_error_of_the_pull_alone():
    transports = ClientTransports("tcp")
    async with (
        node(data_advertise=("127.0.0.1:1",)) as role,
        await connected(role, transports) as client,
    ):
        with pytest.raises(NodeUnavailable, match=r"127\.0\.0\.1:1"):
            await there_and_back(client)
        async with asyncio.timeout(5):
            while (await client.stat()).num_write_leases:  # noqa: ASYNC110  its room is given back
                await asyncio.sleep(0.001)
    transports.close()


async def test_mutual_tls_lets_in_whom_the_authority_signed_and_nobody_else(tmp_path):
    ours = Authority(tmp_path)
    own, reader = ours.sign("node"), ours.sign("reader")
    other = Authority(tmp_path, "stranger").sign("other")
    files = {
        "data_tls_certificate": own.certificate,
        "data_tls_key": own.key,
        "data_tls_authority": own.authority,
    }
    async with node(**files) as role:
        for tls, refused in [
            (reader, None),
            (None, TransportUnavailable),
            (replace(other, authority=ours.certificate), (NodeUnavailable, TransportError)),
            (other, (NodeUnavailable, TransportError)),
        ]:
            transports = ClientTransports("tcp", tls=tls)
            async with await connected(role, transports) as client:
                if refused is None:
                    await there_and_back(client)
                else:
                    with pytest.raises(refused):
                        await there_and_back(client)
            transports.close()


async def test_a_node_without_a_data_plane_serves_the_slow_path_and_one_without_a_door_only_it():
    async with (
        node(transports=("shm",)) as role,
        await connected(role, ClientTransports()) as client,
    ):
        assert role.facts["data_address"] == ""
        assert (await client.stat()).transports == ()
        await there_and_back(client)
    transports = ClientTransports()
    async with node(transports=("tcp",)) as role, await connected(role, transports) as client:
        assert role.facts["door"] == (await client.stat()).door == ""
        await there_and_back(client)
    transports.close()


@pytest.mark.parametrize(("trusted", "via"), [(False, "messages"), (True, "emulated")])
async def test_ucx_is_taken_where_it_is_demanded_and_by_nobody_else(trusted, via):
    ucx = UcxSettings(net_devices="lo", trusted_network=trusted)
    transports = ClientTransports("ucx", ucx=ucx)
    try:
        transports.open_demanded()
    except TransportUnavailable as error:
        pytest.skip(f"NOT TESTED: UCX IS NOT HERE: {error}")
    both = ("shm", "tcp", "ucx")
    async with (
        node(transports=both, trusted_network=trusted) as role,
        await connected(role, transports) as client,
    ):
        assert (await client.stat()).transports == ("tcp", "ucx")
        assert (client.way.scheme, client.way.via) == ("ucx", via)
        await there_and_back(client)
        moved = transports.statistics()["ucx"]
        assert (moved.pushed_nbytes, moved.pulled_nbytes) == (BLOCK, BLOCK)
    transports.close()


@pytest.mark.parametrize(
    ("settings", "refused", "said"),
    [
        ({"transports": ("shm", "tpc")}, BadSetting, "tpc"),
        ({"data_port": 70_000}, BadSetting, "data_port is 70000"),
        ({"data_host": "192.0.2.1"}, InsecureAddress, "192.0.2.1"),
        ({"data_advertise": ("a:b:c",)}, BadSetting, "data_advertise"),
        ({"transports": ("ucx",), "ucx_net_devices": "lo,eth0"}, InsecureAddress, "lo,eth0"),
        ({"data_tls_key": "/k.pem"}, BadSetting, "1 of 3"),
    ],
    ids=lambda each: str(each) if isinstance(each, dict) else "",
)
def test_what_cannot_work_is_refused_before_anything_is_opened(settings, refused, said):
    with pytest.raises(refused, match=said):
        NodeSettings(**settings)


ETH0 = Nic(
    name="eth0",
    is_up=True,
    addresses=(NicAddress(host="192.0.2.7", prefix=24), NicAddress(host="fd00::7", prefix=64)),
)


def test_who_listens_everywhere_says_its_nics_addresses_or_its_name():
    settings = NodeSettings(host="0.0.0.0", insecure=True, data_port=7110)
    assert settings.data_address == "0.0.0.0"
    box = HostFacts(nics=(ETH0,))
    assert settings.advertised(box) == (Address("192.0.2.7", 7110),)
    assert settings.advertised(HostFacts()) == (Address(socket.gethostname(), 7110),)
    both = NodeSettings(host="::", insecure=True)
    assert both.advertised(box) == (Address("192.0.2.7", 0), Address("fd00::7", 0))
    told = NodeSettings(host="::", insecure=True, data_advertise=("[fd00::1]",), data_port=1)
    assert told.advertised(box) == (Address("fd00::1", 1),)
    assert NodeSettings().advertised(box) == ()


def test_all_addresses_that_are_told_have_the_port_that_was_bound():
    with closing(
        TcpTransport(
            TcpSettings(
                listen=(Address("0.0.0.0", 0),),
                advertise=(Address("192.0.2.7", 0), Address("fd00::7", 0), Address("far", 9)),
            )
        )
    ) as owner:
        first, second, told = owner.reachability.addresses
        assert first.port == second.port > 0
        assert told == Address("far", 9)


@pytest.mark.parametrize(
    ("settings", "environment", "devices"),
    [
        ({}, "", "lo"),
        ({"host": "0.0.0.0", "insecure": True}, "", ""),
        ({"host": "0.0.0.0", "insecure": True, "data_host": "::1"}, "", "lo"),
        ({"ucx_net_devices": "mlx5_0:1", "insecure": True}, "", "mlx5_0:1"),
        ({"ucx_net_devices": "mlx5_0:1"}, "lo", "lo"),
        ({"insecure": True}, "eth0", "eth0"),
    ],
)
def test_ucx_listens_where_its_node_does(settings, environment, devices, monkeypatch):
    monkeypatch.setenv("UCX_NET_DEVICES", environment)
    made = NodeSettings(transports=("ucx",), trusted_network=True, ucx_tls="tcp", **settings)
    ucx = made.ucx_settings(made.data_address)
    assert (ucx.net_devices, ucx.tls, ucx.trusted_network) == (devices, "tcp", True)


def test_ucx_beyond_loopback_is_refused_to_whoever_uses_it_without_insecure(monkeypatch):
    monkeypatch.setenv("UCX_NET_DEVICES", "eth0")
    NodeSettings()
    with pytest.raises(InsecureAddress, match="eth0"):
        NodeSettings(transports=("tcp", "ucx"))
    engine = EngineSettings(model="/m", node="unix:/d")
    replace(engine, transport="ucx", insecure=True)
    with pytest.raises(InsecureAddress, match="eth0"):
        replace(engine, transport="ucx")


def test_a_taken_port_and_missing_files_end_the_start():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match="--data-port"):
            open_transports(NodeSettings(data_port=port), epoch=1)
    missing: dict[str, Any] = {
        f"data_tls_{what}": f"/nowhere/{what}" for what in ("certificate", "key", "authority")
    }
    with pytest.raises(TransportUnavailable, match="/nowhere"):
        open_transports(NodeSettings(**missing), epoch=1)
