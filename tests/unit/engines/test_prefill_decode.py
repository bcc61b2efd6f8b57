"""Prefill and decode over a store in this process: exact tokens, exact counts, nothing kept."""

from __future__ import annotations

import asyncio

import pytest

from snowskin.engines.messages import CachePolicy
from snowskin.engines.model.sampler import SamplingParams
from tests.support.engine_bench import (
    BLOCK_SIZE,
    CHUNK_TOKENS,
    Answer,
    make_limits,
    make_prompt,
    open_bench,
    prompt_tokens,
    straight,
)
from tests.support.fake_store import FakeStore

GREEDY = SamplingParams(max_tokens=12)
LENGTHS = sorted(
    {edge + step for edge in (BLOCK_SIZE, 3 * BLOCK_SIZE) for step in (-1, 0, 1)}
    | {edge + step for edge in (CHUNK_TOKENS, 3 * CHUNK_TOKENS) for step in (-1, 0, 1)}
    | {1, 2}
)


@pytest.mark.parametrize("num_tokens", LENGTHS)
async def test_tokens_are_those_of_the_model_alone(num_tokens):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = prompt_tokens(num_tokens, seed=num_tokens)
        tokens, response, answer = await bench.run(prompt, GREEDY)
        assert tokens == straight(prompt, GREEDY)
        assert answer.finish_reason == "length"
        stats, block_nbytes = response.stats, bench.prefill_runner.memory.block_nbytes
        assert (stats.num_cached_tokens, stats.num_computed_tokens) == (0, num_tokens)
        assert bench.prefill_runner.num_tokens_computed == num_tokens
        assert stats.num_blocks_published == num_tokens // BLOCK_SIZE
        has_tail = num_tokens % BLOCK_SIZE > 0
        assert response.handoff.tail_nbytes == has_tail * block_nbytes
        assert stats.published_nbytes == (num_tokens // BLOCK_SIZE + has_tail) * block_nbytes
        assert answer.stats.num_blocks_pulled == num_tokens // BLOCK_SIZE
        assert answer.stats.pulled_nbytes == stats.published_nbytes
        assert answer.stats.num_recomputed_tokens == 0
        assert answer.stats.num_generated_tokens == 11
        # The prompt, the first token and all generated ones but the last.
        num_computed = num_tokens + 11
        assert bench.decode_runner.num_tokens_computed == 11
        new = num_computed // BLOCK_SIZE - num_tokens // BLOCK_SIZE
        assert answer.stats.num_blocks_published == new
        assert len(store.blocks) == num_computed // BLOCK_SIZE
        assert not store.tails
        assert bench.all_free()


async def test_sampling_with_a_seed_is_the_same_on_every_way():
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=20)
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = prompt_tokens(37)
        tokens, _, _ = await bench.run(prompt, sampling)
        again, _, _ = await bench.run(prompt, sampling, request_id="again")
        assert tokens == again == straight(prompt, sampling)


@pytest.mark.parametrize("num_tokens", [15, 16, 17, 48, 49, 51])
async def test_a_second_turn_computes_only_what_is_not_cached(num_tokens):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        first = prompt_tokens(num_tokens, seed=num_tokens)
        answer, _, _ = await bench.run(first, GREEDY)
        computed_before = bench.prefill_runner.num_tokens_computed
        second = [*first, *answer, *prompt_tokens(9, seed=1)]
        tokens, response, _ = await bench.run(second, GREEDY, request_id="second")
        assert tokens == straight(second, GREEDY)
        # All full blocks of prompt and answer are there, the answer's last token apart.
        num_cached = (num_tokens + len(answer) - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert response.stats.num_cached_tokens == num_cached
        assert response.stats.num_blocks_pulled == num_cached // BLOCK_SIZE
        # Nobody offers again what he knows to be there.
        assert store.num_offered == len(store.blocks)
        computed = bench.prefill_runner.num_tokens_computed - computed_before
        assert computed == response.stats.num_computed_tokens == len(second) - num_cached
        assert bench.all_free()


@pytest.mark.parametrize("num_tokens", [16, 17, 32])
async def test_a_whole_cached_prompt_still_computes_one_block(num_tokens):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = prompt_tokens(num_tokens)
        await bench.run(prompt, GREEDY)
        tokens, response, answer = await bench.run(prompt, GREEDY, request_id="again")
        assert tokens == straight(prompt, GREEDY)
        used = (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert response.stats.num_cached_tokens == used
        assert response.stats.num_blocks_published == 0
        assert answer.stats.num_blocks_pulled == num_tokens // BLOCK_SIZE


async def test_a_request_with_the_cache_off_leaves_no_trace_and_takes_nothing():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = prompt_tokens(38)
        await bench.run(prompt, GREEDY)
        before = set(store.blocks)
        tokens, response, answer = await bench.run(
            prompt, GREEDY, request_id="off", policy=CachePolicy.OFF
        )
        assert tokens == straight(prompt, GREEDY)
        assert response.stats.num_computed_tokens == 38
        assert response.stats.num_blocks_pulled == 0
        assert answer.stats.num_blocks_published == 0
        assert answer.stats.num_blocks_pulled == 9
        assert set(store.blocks) == before
        assert not store.tails


@pytest.mark.parametrize("max_tokens", [1, 2])
async def test_the_shortest_answers(max_tokens):
    sampling = SamplingParams(max_tokens=max_tokens)
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = prompt_tokens(21)
        tokens, response, answer = await bench.run(prompt, sampling)
        assert tokens == straight(prompt, sampling)
        assert response.handoff.finish_reason == ("length" if max_tokens == 1 else "")
        assert answer.finish_reason == "length"
        assert bench.all_free()


@pytest.mark.parametrize("position", [0, 1, 5])
async def test_a_stop_token_ends_the_answer_and_is_its_last_token(position):
    prompt = prompt_tokens(21)
    stop = straight(prompt, GREEDY)[position]
    sampling = SamplingParams(max_tokens=12, stop_token_ids=(stop,))
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        tokens, response, answer = await bench.run(prompt, sampling)
        assert tokens == straight(prompt, sampling)
        assert tokens[-1] == stop
        assert answer.finish_reason == "stop"
        assert response.handoff.finish_reason == ("stop" if len(tokens) == 1 else "")
        assert bench.all_free()


async def test_the_context_limit_ends_an_answer_with_length():
    store = FakeStore()
    async with open_bench(store.connect, limits=make_limits(max_context_tokens=30)) as bench:
        prompt = prompt_tokens(25)
        tokens, _, answer = await bench.run(prompt, SamplingParams(max_tokens=100))
        assert tokens == straight(prompt, GREEDY)[:5]
        assert answer.finish_reason == "length"


async def test_concurrent_requests_do_not_touch_each_other():
    store = FakeStore()
    async with open_bench(store.connect, num_blocks=80) as bench:
        shared = prompt_tokens(20, seed=99)
        prompts = [[*shared, *prompt_tokens(5 + 3 * i, seed=i)] for i in range(10)]
        samplings = [SamplingParams(max_tokens=4 + 5 * (i % 4)) for i in range(10)]
        results = await asyncio.gather(
            *(
                bench.run(prompt, sampling, request_id=f"r{i}")
                for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
            )
        )
        for prompt, sampling, (tokens, response, _) in zip(
            prompts, samplings, results, strict=True
        ):
            assert tokens == straight(prompt, sampling)
            stats = response.stats
            assert stats.num_cached_tokens + stats.num_computed_tokens == len(prompt)
        assert store.max_publishing <= 4  # two an instance
        assert bench.all_free()


async def test_decode_pulls_while_prefill_still_computes():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = make_prompt(prompt_tokens(200))
        handoff = asyncio.get_running_loop().create_future()
        decoding = asyncio.create_task(bench.run_decode(prompt, GREEDY, handoff))
        response = await bench.run_prefill(prompt, GREEDY)
        handoff.set_result(response.handoff)
        answer = await decoding
        assert 0 < answer.stats.first_byte_s < answer.stats.handoff_s
        assert store.calls["pull"] > 2


async def test_a_slow_reader_of_tokens_delays_nobody_else():
    store = FakeStore()
    read_on = asyncio.Event()

    class SlowAnswer(Answer):
        async def emit(self, output):
            await read_on.wait()
            await super().emit(output)

    async with open_bench(store.connect) as bench:
        prompt = make_prompt(prompt_tokens(10))
        first = await bench.run_prefill(prompt, GREEDY, "slow")
        slow = asyncio.create_task(
            bench.run_decode(prompt, GREEDY, first.handoff, "slow", SlowAnswer())
        )
        tokens, _, _ = await bench.run(prompt_tokens(11, seed=5), GREEDY, request_id="quick")
        assert tokens == straight(prompt_tokens(11, seed=5), GREEDY)
        assert not slow.done()
        read_on.set()
        assert (await slow).token_ids == straight(prompt_tokens(10), GREEDY)[1:]
