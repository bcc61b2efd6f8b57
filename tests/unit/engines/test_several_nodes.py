"""Instances on different nodes: blocks are fetched from where they are, and nobody waits in vain."""

from __future__ import annotations

import asyncio
import time

import pytest

from snowskin.engines import nodes as nodes_module
from snowskin.engines.model.sampler import SamplingParams
from snowskin.engines.nodes import FIRST_CONNECT_S
from tests.support.engine_bench import (
    BLOCK_SIZE,
    make_prompt,
    open_bench,
    prompt_tokens,
    straight,
    until,
)
from tests.support.fake_store import FakeStore

GREEDY = SamplingParams(max_tokens=12)


@pytest.mark.parametrize("num_tokens", [3, 16, 17, 38, 49])
async def test_decode_pulls_from_the_node_that_prefill_publishes_to(num_tokens):
    first, second = FakeStore(), FakeStore()
    async with open_bench(first.connect, connect_decode=second.connect) as bench:
        token_ids = prompt_tokens(num_tokens)
        tokens, _, answer = await bench.run(token_ids, GREEDY, nodes=["node-0"])
        assert tokens == straight(token_ids, GREEDY)
        assert answer.stats.num_recomputed_tokens == 0
        assert answer.stats.num_blocks_pulled == num_tokens // BLOCK_SIZE
        assert bench.all_free()


async def test_decode_finds_the_node_by_the_handoff_alone():
    first, second = FakeStore(), FakeStore()
    async with open_bench(first.connect, connect_decode=second.connect) as bench:
        token_ids = prompt_tokens(38)
        tokens, _, answer = await bench.run(token_ids, GREEDY)
        assert tokens == straight(token_ids, GREEDY)
        assert answer.stats.num_recomputed_tokens == 0


async def test_prefill_takes_cached_blocks_from_another_node_and_leaves_them_at_its_own():
    first, second = FakeStore(), FakeStore()
    async with open_bench(first.connect, connect_decode=second.connect) as bench:
        token_ids = prompt_tokens(53)
        prompt = make_prompt(token_ids)
        await bench.run_prefill(prompt, GREEDY)
        # Blocks 0-3 only at the second node, 4-7 at the first, 8 and 9 at the second again.
        keys = [(prompt.namespace, key) for key in prompt.block_keys]
        for index, key in enumerate(keys):
            if not 4 <= index < 8:
                data = first.blocks.pop(key)
                if index < 10:
                    second.blocks[key] = data
        tokens, response, answer = await bench.run(
            token_ids, GREEDY, request_id="again", nodes=["node-0", "node-1"]
        )
        assert tokens == straight(token_ids, GREEDY)
        assert response.stats.num_cached_tokens == 40
        assert response.stats.num_computed_tokens == 13
        assert set(keys) <= set(first.blocks)
        assert answer.stats.num_recomputed_tokens == 0
        assert bench.all_free()


async def test_an_address_where_nobody_answers_costs_nothing_but_itself():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(38)
        nodes = ["nowhere", "node-0", "nowhere-else"]
        tokens, _, answer = await bench.run(token_ids, GREEDY, nodes=nodes)
        assert tokens == straight(token_ids, GREEDY)
        assert answer.stats.num_recomputed_tokens == 0


async def test_the_own_node_under_another_name_is_asked_once():
    store = FakeStore()
    async with open_bench(store.connect, connect_decode=store.connect) as bench:
        token_ids = prompt_tokens(38)
        tokens, _, _ = await bench.run(token_ids, GREEDY, nodes=["node-0", "node-1"])
        assert tokens == straight(token_ids, GREEDY)
        links = await bench.decode._nodes.among(["node-0", "node-1"])
        assert links == [bench.decode_link]


async def test_another_node_that_restarts_is_connected_anew():
    first, second = FakeStore(), FakeStore()
    async with open_bench(first.connect, connect_decode=second.connect) as bench:
        for life in range(3):
            token_ids = prompt_tokens(38, seed=life)
            await until(lambda: bench.prefill_link.connected)
            await until(lambda: all(link.connected for link in bench.decode._nodes.links))
            tokens, _, answer = await bench.run(
                token_ids, GREEDY, nodes=["node-0"], request_id=f"r{life}"
            )
            assert tokens == straight(token_ids, GREEDY)
            assert answer.stats.num_recomputed_tokens == 0
            await first.crash()
            first.alive = True


async def test_nodes_that_are_named_first_are_waited_for_once_and_together():
    async def never():
        await asyncio.Event().wait()

    store = FakeStore()
    async with open_bench(store.connect, connect_decode=never, wait=False) as bench:
        await until(lambda: bench.prefill_link.connected)
        nodes = bench.prefill._nodes
        began_s = time.perf_counter()
        assert await nodes.among(["node-1", "nowhere"]) == [bench.prefill_link]
        assert time.perf_counter() - began_s < FIRST_CONNECT_S + 1.0
        again = asyncio.create_task(nodes.among(["node-1", "nowhere"]))
        for _ in range(3):  # turns of the loop: no timer has a part in it
            await asyncio.sleep(0)
        assert again.done()


async def test_a_node_that_nobody_names_any_more_is_let_go(monkeypatch):
    monkeypatch.setattr(nodes_module, "IDLE_S", 0.2)
    first, second = FakeStore(), FakeStore()
    async with open_bench(first.connect, connect_decode=second.connect) as bench:
        assert len(await bench.prefill._nodes.among(["node-1"])) == 2
        await until(lambda: bench.prefill._nodes.links == [bench.prefill_link])
        await until(lambda: any(client.closed for client in second.clients))


async def test_a_prefill_whose_own_node_is_back_in_the_middle_leaves_all_blocks_there():
    first, second = FakeStore(), FakeStore()
    async with open_bench(first.connect, connect_decode=second.connect) as bench:
        token_ids = prompt_tokens(38)
        prompt = make_prompt(token_ids)
        await bench.run_prefill(prompt, GREEDY)
        second.blocks, first.blocks = first.blocks, {}
        links = bench.prefill._nodes
        other = await links.at("node-1")

        async def among(_addresses):
            return [other, links.own]  # its own node was not usable when it began to look

        links.among = among
        response = await bench.run_prefill(prompt, GREEDY, request_id="again")
        assert response.stats.num_cached_tokens == 36
        assert {(prompt.namespace, key) for key in prompt.block_keys} <= set(first.blocks)
