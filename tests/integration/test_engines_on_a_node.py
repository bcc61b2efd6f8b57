"""Prefill and decode over a real node: real doors, real shared memory, exact tokens, nothing left."""

from __future__ import annotations

import asyncio

import pytest

from snowskin.engines.messages import CachePolicy
from snowskin.engines.model.sampler import SamplingParams
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.node.daemon import NodeSettings, serve_node
from tests.support.engine_bench import (
    BLOCK_SIZE,
    make_limits,
    open_bench,
    prompt_tokens,
    straight,
    until,
)
from tests.support.roles import running

GREEDY = SamplingParams(max_tokens=12)


def node(**settings):
    return running(serve_node, NodeSettings, dram_nbytes=32 << 20, grace_s=0.0, **settings)


def connecting(address):
    async def connect():
        return await StoreClient.connect(address, client_name="engine")

    return connect


async def stat_of(address):
    async with await StoreClient.connect(address, client_name="test") as client:
        return await client.stat()


@pytest.mark.parametrize("way", ["door", "address"])
async def test_tokens_and_counts_are_exact_over_either_door_of_a_node(way):
    async with node() as role, open_bench(connecting(role.facts[way])) as bench:
        for num_tokens in (3, 4, 5, 15, 16, 17, 47, 48, 49, 130):
            prompt = prompt_tokens(num_tokens, seed=num_tokens)
            tokens, response, answer = await bench.run(prompt, GREEDY, request_id=f"r{num_tokens}")
            assert tokens == straight(prompt, GREEDY)
            stats = response.stats
            assert stats.num_computed_tokens == num_tokens
            assert stats.num_blocks_published == num_tokens // BLOCK_SIZE
            assert answer.stats.num_blocks_pulled == num_tokens // BLOCK_SIZE
            assert answer.stats.pulled_nbytes == stats.published_nbytes
            assert answer.stats.num_recomputed_tokens == 0
            second = [*prompt, *tokens, 65, 66, 67, 68, 69]
            again, response, _ = await bench.run(second, GREEDY, request_id=f"s{num_tokens}")
            assert again == straight(second, GREEDY)
            num_cached = (num_tokens + len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE
            assert response.stats.num_cached_tokens == num_cached
        stat = await stat_of(role.facts[way])
        assert (stat.num_read_leases, stat.num_write_leases) == (0, 0)
        assert bench.all_free()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("way", ["door", "address"])
async def test_kv_of_qwen_models_goes_through_a_node_token_for_token(architecture, way):
    """Their KV carries biases and normalised heads, and its heads are no share of the hidden size."""
    async with (
        node() as role,
        open_bench(connecting(role.facts[way]), architecture=architecture) as bench,
    ):
        for num_tokens in (3, 16, 17, 130):
            prompt = prompt_tokens(num_tokens, seed=num_tokens)
            for sampling in (GREEDY, SamplingParams(temperature=0.8, seed=7, max_tokens=12)):
                tokens, response, answer = await bench.run(
                    prompt, sampling, request_id=f"{num_tokens}-{sampling.seed}"
                )
                assert tokens == straight(prompt, sampling, architecture=architecture)
                assert answer.stats.num_recomputed_tokens == 0
                assert answer.stats.num_blocks_pulled == num_tokens // BLOCK_SIZE
                if sampling is not GREEDY:  # it found what the first one left, and pulled it
                    num_cached = (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
                    assert response.stats.num_cached_tokens == num_cached
        assert bench.all_free()


async def test_requests_with_the_cache_off_leave_the_node_as_it_was():
    async with node() as role, open_bench(connecting(role.facts["door"])) as bench:
        before = await stat_of(role.facts["door"])
        for num_tokens in (5, 16, 61):
            prompt = prompt_tokens(num_tokens)
            tokens, _, answer = await bench.run(
                prompt, GREEDY, request_id=f"r{num_tokens}", policy=CachePolicy.OFF
            )
            assert tokens == straight(prompt, GREEDY)
            assert answer.stats.num_blocks_pulled == num_tokens // BLOCK_SIZE
        after = await stat_of(role.facts["door"])
        assert after.num_blocks == before.num_blocks == 0
        assert after.pools[0].free_nbytes == before.pools[0].free_nbytes


async def test_concurrent_requests_over_a_node_that_must_evict():
    limits = make_limits(chunk_tokens=64)
    async with (
        running(serve_node, NodeSettings, dram_nbytes=1 << 20, grace_s=0.0) as role,
        open_bench(connecting(role.facts["door"]), limits=limits, num_blocks=300) as bench,
    ):
        prompts = [prompt_tokens(150 + 11 * i, seed=i) for i in range(12)]
        for _ in range(2):
            results = await asyncio.gather(
                *(bench.run(prompt, GREEDY, request_id=f"r{i}") for i, prompt in enumerate(prompts))
            )
            for prompt, (tokens, response, _) in zip(prompts, results, strict=True):
                assert tokens == straight(prompt, GREEDY)
                stats = response.stats
                assert stats.num_cached_tokens + stats.num_computed_tokens == len(prompt)
        assert bench.all_free()
        stat = await stat_of(role.facts["door"])
        assert (stat.num_read_leases, stat.num_write_leases) == (0, 0)
        pool = stat.pools[0]
        assert (pool.reserved_nbytes, pool.quarantined_nbytes, pool.leased_nbytes) == (0, 0, 0)


@pytest.mark.parametrize("num_calls", range(0, 30, 4))
@pytest.mark.parametrize("policy", [CachePolicy.READ_WRITE, CachePolicy.OFF])
async def test_a_cancelled_request_leaves_nothing_of_its_own(num_calls, policy):
    async with node() as role, open_bench(connecting(role.facts["door"])) as bench:
        prompt = prompt_tokens(100)
        task = asyncio.create_task(bench.run(prompt, GREEDY, policy=policy))
        await until(
            lambda: (
                task.done()
                or bench.prefill_runner.num_tokens_computed
                + bench.decode_runner.num_tokens_computed
                >= 4 * num_calls
            )
        )
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: bench.prefill.num_requests == bench.decode.num_requests == 0)
        assert bench.all_free()
        stat = await stat_of(role.facts["door"])
        assert (stat.num_read_leases, stat.num_write_leases) == (0, 0)
        assert stat.pools[0].reserved_nbytes == 0
        if policy is CachePolicy.OFF:
            assert stat.num_blocks == 0
        else:
            assert stat.num_blocks <= len(prompt) // BLOCK_SIZE + GREEDY.max_tokens // BLOCK_SIZE
        tokens, _, _ = await bench.run(prompt, GREEDY, request_id="next")
        assert tokens == straight(prompt, GREEDY)


async def test_a_node_that_restarts_is_found_again_and_costs_no_request(tmp_path):
    door = f"{tmp_path}/door"
    async with open_bench_without_node(f"unix:{door}") as bench:
        prompt = prompt_tokens(50)
        tokens, _, answer = await bench.run(prompt, GREEDY)
        assert tokens == straight(prompt, GREEDY)
        assert answer.stats.num_recomputed_tokens == 50
        for life in range(2):
            async with node(door=door, drain_s=0.0):
                await until(lambda: bench.prefill_link.connected and bench.decode_link.connected)
                tokens, response, answer = await bench.run(prompt, GREEDY, request_id=f"n{life}")
                assert tokens == straight(prompt, GREEDY)
                assert response.stats.num_blocks_published == 12
                assert answer.stats.num_recomputed_tokens == 0
            await until(lambda: not bench.prefill_link.connected)


def open_bench_without_node(address):
    return open_bench(connecting(address), wait=False)
