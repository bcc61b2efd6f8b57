"""The conductor's upkeep lets go of what nobody names, and of nothing that was named while it worked."""

from __future__ import annotations

import asyncio

import pytest

from snowskin.engines.conductor import daemon
from snowskin.engines.conductor.daemon import Conductor, ConductorSettings
from snowskin.engines.conductor.directory import Directory
from tests.support.clusters import load, registration


@pytest.fixture
def conductor(monkeypatch):
    """Nothing is opened: nodes are watched by a stream that says nothing."""
    monkeypatch.setattr(daemon, "UPKEEP_INTERVAL_S", 0.0)
    made = Conductor(ConductorSettings(model="none"), model=None)  # type: ignore[arg-type]  # of no use here

    async def silence(_address, _request):
        await asyncio.Event().wait()
        yield

    made.directory = Directory(silence, made.clock)
    return made


def register(conductor, name, node):
    about = registration(name, address=f"{name}:1", node_address=node)
    conductor.state.on_registered(about, load(), conductor.clock.now_s())
    conductor.directory.want(node)


async def test_a_node_that_is_named_during_the_upkeep_is_watched_on(conductor):
    register(conductor, "prefill-0", "node-0:1")
    conductor.directory.want("node-of-nobody:1")
    done = asyncio.Event()

    async def slow(_known):
        register(conductor, "prefill-1", "node-1:1")

    async def let_go(addresses):
        await keep_only(addresses)
        done.set()

    conductor.engines.close_all_but = slow
    keep_only, conductor.directory.keep_only = conductor.directory.keep_only, let_go
    upkeep = asyncio.create_task(conductor.upkeep())
    async with asyncio.timeout(5):
        await done.wait()
    upkeep.cancel()
    await asyncio.wait([upkeep])
    assert sorted(conductor.directory._tasks) == ["node-0:1", "node-1:1"]
    await keep_only(())
