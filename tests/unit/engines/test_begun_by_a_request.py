"""What one request begins and all that follow use, bears no request's id: connections, watches, looks at a node.

Each of these is begun here as if by a traced request; what its task would log and send is looked at from inside.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager

import pytest
from structlog.contextvars import get_contextvars

from snowskin.engines.conductor.directory import Directory
from snowskin.engines.conductor.nodes import Nodes
from snowskin.engines.nodes import NodeLinks
from snowskin.kvstore import tracing
from snowskin.kvstore.client.guard import NodeGuard
from snowskin.kvstore.clock import ManualClock
from snowskin.kvstore.span_export import open_tracer
from snowskin.kvstore.telemetry import bind_request

CALLER = "00-" + "5e" * 16 + "-" + "7a" * 8 + "-01"
ADDRESS = "127.0.0.1:1"
SOON_S = 5.0


class Inside:
    """Notes what a task would put on its lines and send with its calls."""

    def __init__(self):
        self.fields: dict | None = None
        self.sent = None
        self.looked = asyncio.Event()

    def look(self):
        if self.fields is None:
            self.fields, self.sent = dict(get_contextvars()), tracing.outgoing()
            self.looked.set()

    async def check(self):
        async with asyncio.timeout(SOON_S):
            await self.looked.wait()
        assert self.fields == {}
        assert self.sent == ()


@pytest.fixture
def inside():
    return Inside()


@pytest.fixture
def request_under_way(tmp_path):
    """A block that is part of a traced request."""

    @contextmanager
    def under_way():
        with (
            open_tracer(role="conductor", instance_id="c", file=str(tmp_path / "s")) as tracer,
            bind_request("r"),
            tracer.continuing("request", CALLER, ""),
        ):
            assert tracing.outgoing()
            assert get_contextvars()["request_id"] == "r"
            yield

    return under_way


async def test_a_connection_of_the_conductors(inside, request_under_way):
    async def connect(address):
        inside.look()
        await asyncio.Event().wait()

    nodes = Nodes(connect, ManualClock())
    try:
        with request_under_way():
            nodes.want(ADDRESS)
        await inside.check()
    finally:
        await nodes.close()


async def test_a_watch_of_the_conductors(inside, request_under_way):
    async def watch(address, request):
        inside.look()
        await asyncio.Event().wait()
        yield

    directory = Directory(watch, ManualClock())
    try:
        with request_under_way():
            directory.want(ADDRESS)
        await inside.check()
    finally:
        await directory.close()


async def test_an_instances_link_to_another_node(inside, request_under_way):
    class Link:
        connected = False

        def __init__(self):
            self.guard = NodeGuard("other", self.run, budget_s=0.02)

        async def run(self):
            inside.look()
            await asyncio.Event().wait()

    links = NodeLinks(Link(), link_to=lambda address: Link())  # type: ignore[arg-type,return-value]
    try:
        with request_under_way():
            links._other(ADDRESS)
        await inside.check()
    finally:
        await links.close()


async def test_a_look_at_a_node_that_was_silent(inside, request_under_way):
    async def probe():
        inside.look()
        await asyncio.Event().wait()

    guard = NodeGuard("node", probe, budget_s=0.02)
    try:
        with request_under_way():
            guard.on_late(time.monotonic())
        await inside.check()
    finally:
        await guard.close()
