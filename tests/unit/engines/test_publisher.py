"""Blocks go out in order, in the background, and never beyond the first failure."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from snowskin.engines.cancellation import outlast
from snowskin.engines.publisher import BlockPublisher, PublishRules
from snowskin.engines.sequence import KeyChain
from snowskin.kvstore.client.breaker import LookupBudget
from snowskin.kvstore.errors import PoolExhausted
from tests.support.engine_bench import BLOCK_SIZE, make_prompt, prompt_tokens, until


class Link:
    """Notes what was published; waits at the gate; fails where told."""

    def __init__(self):
        self.published = []
        self.tails = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail_at = None

    async def publish(
        self, keys, block_ids, *, parent_key, one_reader, timeout_s, traffic, request_id
    ):
        await self.gate.wait()
        if self.fail_at == len(self.published):
            raise PoolExhausted("full")
        self.published.append((list(keys), list(block_ids), parent_key))
        return SimpleNamespace(num_blocks=len(keys), nbytes=100 * len(keys), seconds=0.5)

    async def while_answering(self, work, budget):
        return await work

    async def publish_tail(self, block_id, *, timeout_s, request_id):
        self.tails.append(block_id)
        return SimpleNamespace(num_blocks=1, nbytes=100, seconds=0.5)


BUDGET = LookupBudget(1.0)
KEYS = list(make_prompt(prompt_tokens(12 * BLOCK_SIZE)).block_keys)


def publisher(link, max_blocks=4):
    keys = KeyChain(make_prompt(prompt_tokens(12 * BLOCK_SIZE)), BLOCK_SIZE)
    rules = PublishRules(
        max_blocks=max_blocks, one_reader=False, timeout_s=1.0, gate=asyncio.Semaphore(2)
    )
    return BlockPublisher(link, keys, list(range(100, 112)), rules, request_id="r")


async def test_what_is_ready_goes_out_in_order_with_its_parent():
    link = Link()
    async with publisher(link) as publishing:
        publishing.skip(2)
        publishing.ready(5)
        await until(lambda: link.published)
        publishing.ready(7)
        await publishing.finish(BUDGET)
    assert link.published == [
        (KEYS[2:5], [102, 103, 104], KEYS[1]),
        (KEYS[5:7], [105, 106], KEYS[4]),
    ]
    assert (publishing.num_blocks, publishing.nbytes, publishing.seconds) == (5, 500, 1.0)


async def test_one_publish_is_at_most_a_chunk():
    link = Link()
    async with publisher(link) as publishing:
        publishing.ready(10)
        await publishing.finish(BUDGET)
    assert [len(keys) for keys, _, _ in link.published] == [4, 4, 2]
    assert link.published[0][2] == b""


async def test_the_first_failure_is_the_last_try():
    link = Link()
    link.fail_at = 1
    async with publisher(link) as publishing:
        publishing.ready(12)
        await publishing.finish(BUDGET)
        assert not await publishing.publish_tail(111, BUDGET)
    assert publishing.failed
    assert len(link.published) == 1
    assert publishing.num_blocks == 4
    assert not link.tails


async def test_a_publisher_that_is_left_waits_for_the_publish_under_way(monkeypatch):
    link = Link()
    link.gate.clear()
    order = []

    async def copy():
        await link.gate.wait()
        order.append("copied")

    async def publish(*arguments, **keywords):
        await outlast(copy())  # as `Connection.move` does
        return SimpleNamespace(num_blocks=1, nbytes=1, seconds=0.1)

    monkeypatch.setattr(link, "publish", publish)

    async def run():
        async with publisher(link) as publishing:
            publishing.ready(1)
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    link.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order == ["copied"]
