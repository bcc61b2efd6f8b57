"""Directories on real nodes: what they know is what is there, through evictions, restarts and stale hints."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random

import pytest

from snowskin.engines.conductor.directory import Directory
from snowskin.kvstore.blocks import KeyColumn, block_hashes
from snowskin.kvstore.client.watch import watch
from snowskin.kvstore.clock import SystemClock
from snowskin.kvstore.directory.view import Sync
from tests.support.clusters import SHAPE
from tests.support.conductors import conducting, make_tiny_model
from tests.support.fake_engines import FakeEngine
from tests.support.served_node import served_node

SEED = 41
BLOCK_NBYTES = 8 << 10  # 128 of them fill the pool
NAMESPACES = (b"a" * 32, b"b" * 32)
KEYS = [hashlib.sha256(b"%d" % at).digest() for at in range(300)]


@contextlib.asynccontextmanager
async def directory():
    made = Directory(watch, SystemClock(), silence_s=10.0)
    try:
        yield made
    finally:
        await made.close()


async def until(is_so):
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110  a view has no event for each change
            await asyncio.sleep(0.001)


async def agrees(directory, node):
    """Returns when the directory knows just what is there."""
    async with asyncio.timeout(10):
        await directory.wait_in_sync(node.address)
    await until(lambda: directory.view.blocks(node.address) == node.blocks())
    assert directory.is_in_sync(node.address)
    directory.view.check()


async def test_several_directories_of_one_node_agree_while_it_evicts():
    """A pool for 128 blocks of 600: much of what was told is taken back."""
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    async with contextlib.AsyncExitStack() as stack:
        node = await stack.enter_async_context(served_node())
        early, late = [await stack.enter_async_context(directory()) for _ in range(2)]
        early.want(node.address)
        await agrees(early, node)
        for at in range(60):
            node.publish_keys(chance.choice(NAMESPACES), chance.sample(KEYS, 10), BLOCK_NBYTES)
            if at == 30:
                late.want(node.address)
            await asyncio.sleep(0)
        assert node.shell.state.stat().counters["blocks_evicted"] > 100
        for each in (early, late):
            await agrees(each, node)
        one, other = (each.knowledge(node.address) for each in (early, late))
        assert (one.digest, one.num_blocks) == (other.digest, other.num_blocks)
        assert (one.sequence, one.num_astray) == (other.sequence, 0)
        keys = KeyColumn.of(KEYS)
        for namespace in NAMESPACES:
            held = {key for of, key in node.blocks() if of == namespace}
            bitmap = early.locate([namespace], keys).bitmaps.get(node.address, 0)
            assert {key for at, key in enumerate(KEYS) if bitmap >> at & 1} == held


async def test_a_node_that_starts_anew_is_known_anew():
    async with directory() as known:
        async with served_node() as first:
            first.publish_keys(NAMESPACES[0], KEYS[:20], BLOCK_NBYTES)
            known.want(first.address)
            await agrees(known, first)
            epoch = known.knowledge(first.address).node_epoch
        port = int(first.address.rpartition(":")[2])
        await until(lambda: known.knowledge(first.address).sync is Sync.SUSPECT)
        assert known.locate(NAMESPACES[:1], KeyColumn.of(KEYS)).bitmaps == {}
        async with served_node(port=port) as second:
            second.publish_keys(NAMESPACES[0], KEYS[10:15], BLOCK_NBYTES)
            await agrees(known, second)
            assert known.knowledge(first.address).node_epoch != epoch
            presence = known.locate(NAMESPACES[:1], KeyColumn.of(KEYS[:20]))
            assert presence.bitmaps == {second.address: 0b11111 << 10}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-model")


PROMPT = "The quick brown fox jumps over the lazy dog, twice. " * 3  # a byte a token
HASHES = block_hashes(list(PROMPT.encode()), SHAPE.block_size)


@contextlib.asynccontextmanager
async def two_nodes_and_a_conductor(model):
    """The engines say that they are on the first node; a fake prefill names what it found."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(served_node()) for _ in range(2)]
        engines = [FakeEngine("prefill-0"), FakeEngine("prefill-1"), FakeEngine("decode-0")]
        # However long an answer takes here: what it may take is another test's.
        cluster = await stack.enter_async_context(conducting(model, engines, probe_budget_s=5.0))
        for engine, node in zip(engines, (nodes[0], nodes[1], nodes[0]), strict=True):
            await cluster.registrar.register(engine, node_address=node.address)
        conductor = cluster.served.conductor
        async with asyncio.timeout(5):
            for node in nodes:
                await conductor.directory.wait_in_sync(node.address)
        yield nodes, cluster, conductor.directory


async def test_a_prefix_on_two_nodes_is_planned_from_both_own_node_first(model):
    async with two_nodes_and_a_conductor(model) as (nodes, cluster, known):
        nodes[0].publish_keys(SHAPE.namespaces[0], HASHES[:4], BLOCK_NBYTES)
        nodes[1].publish_keys(SHAPE.namespaces[0], HASHES[4:], BLOCK_NBYTES)
        for node in nodes:
            await agrees(known, node)
        cluster["prefill-0"].num_cached_tokens = 16 * ((len(PROMPT) - 1) // 16)
        response = await cluster.complete(PROMPT, max_tokens=4)
        assert response.status_code == 200
        (asked,) = cluster["prefill-0"].prefills
        assert list(asked.prompt.node_addresses) == [node.address for node in nodes]
        (start,) = cluster["decode-0"].starts
        assert list(start.prompt.node_addresses) == [node.address for node in nodes]


async def test_a_stale_hint_costs_one_plan_and_is_taken_back(model):
    """The node is said to hold what its reader does not find: the next plan does not count on it."""
    async with two_nodes_and_a_conductor(model) as (nodes, cluster, known):
        nodes[1].publish_keys(SHAPE.namespaces[0], HASHES, BLOCK_NBYTES)
        await agrees(known, nodes[1])
        for number, engine in enumerate(("prefill-1", "prefill-0")):
            cluster[engine].num_cached_tokens = 0
            response = await cluster.complete(PROMPT, max_tokens=4)
            assert response.status_code == 200
            # The first goes where the blocks are said to be; the second knows better.
            (asked,) = cluster[engine].prefills
            named = list(asked.prompt.node_addresses)
            assert named == ([nodes[1].address] if number == 0 else [])
        assert known.is_in_sync(nodes[1].address), "its books stand"
        assert known.locate(SHAPE.namespaces, KeyColumn.of(HASHES)).bitmaps == {}


async def test_a_node_that_is_not_in_sync_is_asked_instead(model):
    async with two_nodes_and_a_conductor(model) as (nodes, cluster, known):
        nodes[1].publish_keys(SHAPE.namespaces[0], HASHES, BLOCK_NBYTES)
        await agrees(known, nodes[1])
        await cluster.served.conductor.nodes.stat(nodes[1].address, timeout_s=5)  # connected
        known.view.suspect(nodes[1].address)
        response = await cluster.complete(PROMPT, max_tokens=4)
        assert response.status_code == 200
        (asked,) = cluster["prefill-1"].prefills
        assert list(asked.prompt.node_addresses) == [nodes[1].address]
