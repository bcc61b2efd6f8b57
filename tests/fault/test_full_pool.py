"""A cluster whose pool holds less than it is asked to: it evicts, waits and computes again, and stays exact."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.engine_bench import prompt_tokens
from tests.support.up_process import UpProcess, assert_exact

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

BLOCK_SIZE = 16
# 28 blocks of 144 KiB: one prompt of 300 tokens and its answer, and a part of the next.
FLAGS = (
    *("--dram-nbytes", "4MiB", "--kv-memory-nbytes", "64MiB"),
    *("--block-size", str(BLOCK_SIZE), "--chunk-tokens", str(4 * BLOCK_SIZE), "--threads", "1"),
)
SETTINGS = """
[node]
read_lease_s = 1.0
write_lease_s = 1.0
grace_s = 0.5
[prefill]
publish_timeout_s = 0.5
[decode]
publish_timeout_s = 0.5
"""
SETTLE_S = 5.0
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    with UpProcess(model, tmp_path_factory.mktemp("small"), *FLAGS, settings=SETTINGS) as process:
        yield process


@pytest.fixture
async def empty(small):
    """What it holds when nobody asks it for anything; every connection that will be is made."""
    await small.settled()
    await small.ask(prompt_tokens(20, seed=999), 2)
    return await small.settled()


def num_events(up: UpProcess, name: str, event: str) -> int:
    return sum(line["event"] == event for line in up.events(name))


async def test_a_working_set_larger_than_the_pool_is_evicted_and_computed_again(
    small, empty, monolith
):
    prompts = [prompt_tokens(300, seed) for seed in range(4)]
    for prompt in [*prompts, *prompts]:
        assert_exact(monolith, prompt, await small.ask(prompt, NUM_TOKENS), NUM_TOKENS)
    async with small.observing() as node:
        counters = (await node.stat()).counters
    assert counters["blocks_evicted"] >= 4 * 300 // BLOCK_SIZE
    again = await small.ask(prompts[-1], NUM_TOKENS)
    assert_exact(monolith, prompts[-1], again, NUM_TOKENS)
    assert again.num_cached_tokens > 0
    await small.settles_at(empty, SETTLE_S)


async def test_requests_that_fight_for_the_pool_are_all_exact(small, empty, monolith):
    prompts = [prompt_tokens(250 + 17 * seed, 100 + seed) for seed in range(4)]
    answers = await asyncio.gather(*(small.ask(prompt, NUM_TOKENS) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_exact(monolith, prompt, answer, NUM_TOKENS)
    await small.settles_at(empty, SETTLE_S)


async def test_a_prompt_that_does_not_fit_is_computed_where_it_is_needed(small, empty, monolith):
    num_failures = num_events(small, "prefill-0", "publish failed")
    prompt = prompt_tokens(1_200, 200)
    answer = await small.ask(prompt, NUM_TOKENS)
    assert_exact(monolith, prompt, answer, NUM_TOKENS)
    prefill, decode = answer.stats["prefill"], answer.stats["decode"]
    assert prefill["num_blocks_published"] < 1_200 // BLOCK_SIZE
    assert decode["num_recomputed_tokens"] > 0
    assert num_events(small, "prefill-0", "publish failed") == num_failures + 1
    (lost,) = [line for line in small.events("decode-0") if line["event"].startswith("KV lost")][
        -1:
    ]
    assert lost["request_id"] == answer.stats["request_id"]
    assert lost["num_tokens"] == decode["num_recomputed_tokens"]
    await small.settles_at(empty, SETTLE_S)


async def test_a_prompt_that_does_not_fit_can_still_stream_through_with_the_cache_off(
    small, empty, monolith
):
    """Blocks for one reader leave with it: the pool need only hold what decode has not read yet."""
    prompt = prompt_tokens(1_200, 201)
    answer = await small.ask(prompt, NUM_TOKENS, use_cache=False)
    assert_exact(monolith, prompt, answer, NUM_TOKENS)
    assert answer.stats["decode"]["num_blocks_pulled"] > 28
    await small.settles_at(empty, SETTLE_S)
