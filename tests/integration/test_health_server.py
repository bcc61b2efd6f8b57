"""`/healthz` and served apps over real loopback sockets: what they answer, and how they end."""

from __future__ import annotations

import asyncio
import signal
import socket

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from snowskin.kvstore.errors import AddressInUse, BadSetting, InsecureAddress
from snowskin.kvstore.telemetry import HealthServer, serve_app

HERE = "127.0.0.1"


@pytest.fixture
async def client():
    async with httpx.AsyncClient(timeout=5) as client:
        yield client


def refuses_connections(port):
    with socket.socket() as probe:
        return probe.connect_ex((HERE, port)) != 0


async def test_healthz_answers_what_the_check_says(client):
    health: tuple[bool, dict[str, object]] = (True, {"free_nbytes": 7})
    async with HealthServer(HERE, 0, check=lambda: health) as server:
        url = f"http://{HERE}:{server.port}/healthz"
        answer = await client.get(url)
        assert (answer.status_code, answer.json()) == (200, {"ok": True, "free_nbytes": 7})
        health = (False, {"reason": "draining"})
        answer = await client.get(url)
        assert (answer.status_code, answer.json()) == (503, {"ok": False, "reason": "draining"})
    assert refuses_connections(server.port)


async def test_other_paths_and_methods_are_refused(client):
    async with HealthServer(HERE, 0, check=lambda: (True, {})) as server:
        root = f"http://{HERE}:{server.port}"
        assert (await client.get(root)).status_code == 404
        assert (await client.post(f"{root}/healthz")).status_code == 405


async def test_a_taken_port_is_said(client):
    async with HealthServer(HERE, 0, check=lambda: (True, {})) as first:
        with pytest.raises(AddressInUse, match=f"{HERE}:{first.port} is taken"):
            async with HealthServer(HERE, first.port, check=lambda: (True, {})):
                pass
        assert (await client.get(f"http://{HERE}:{first.port}/healthz")).status_code == 200


async def test_the_port_is_free_again_at_once(client):
    async with HealthServer(HERE, 0, check=lambda: (True, {})) as server:
        await client.get(f"http://{HERE}:{server.port}/healthz")
    async with HealthServer(HERE, server.port, check=lambda: (True, {})) as again:
        assert again.port == server.port


async def test_an_idle_server_stops_at_once(client):
    """Not at the next of several looks: a process that ends waits for this, and so does whoever stops it."""
    loop = asyncio.get_running_loop()
    took_s = []
    for _ in range(5):
        async with HealthServer(HERE, 0, check=lambda: (True, {})) as server:
            await client.get(f"http://{HERE}:{server.port}/healthz")
            ending_at_s = loop.time()
        took_s.append(loop.time() - ending_at_s)
    assert min(took_s) < 0.08, took_s


async def test_beyond_loopback_is_refused():
    with pytest.raises(InsecureAddress):
        async with HealthServer("0.0.0.0", 0, check=lambda: (True, {})):
            pass


@pytest.mark.parametrize("host", ["192.0.2.1", "a" * 300])
async def test_an_address_that_is_not_ours_is_refused(host):
    with pytest.raises(BadSetting):
        async with serve_app(Starlette(), host, 0, insecure=True):
            pass


async def test_signal_handlers_stay_as_they_were():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with HealthServer(HERE, 0, check=lambda: (True, {})):
        inside = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert inside == before


def slow_app(started, release, ended):
    async def answer(_request):
        started.set()
        try:
            await release.wait()
        finally:
            ended.set()
        return PlainTextResponse("done")

    return Starlette(routes=[Route("/", answer)])


async def test_a_request_under_way_is_finished_before_the_end(client):
    started, release, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
    async with serve_app(slow_app(started, release, ended), HERE, 0, grace_s=5) as port:
        request = asyncio.create_task(client.get(f"http://{HERE}:{port}/"))
        await started.wait()
        release.set()
    assert (await request).text == "done"


async def test_a_request_that_overruns_the_grace_is_cancelled(client):
    started, release, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
    async with serve_app(slow_app(started, release, ended), HERE, 0, grace_s=0) as port:
        request = asyncio.create_task(client.get(f"http://{HERE}:{port}/"))
        await started.wait()
    assert ended.is_set()
    with pytest.raises(httpx.HTTPError):
        (await request).raise_for_status()


async def test_a_cancelled_owner_stops_the_server():
    inside = asyncio.Event()
    ports = []

    async def own():
        async with serve_app(Starlette(), HERE, 0) as port:
            ports.append(port)
            inside.set()
            await asyncio.Event().wait()

    owner = asyncio.create_task(own())
    await inside.wait()
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner
    assert refuses_connections(ports[0])


async def test_the_owners_error_comes_through():
    with pytest.raises(ZeroDivisionError):
        async with serve_app(Starlette(), HERE, 0):
            _ = 1 / 0
