"""What a failing store, a broken block, a full instance or a cancelled caller costs: never tokens."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from snowskin.engines.errors import (
    BadPrompt,
    HandoffMissing,
    InstanceDraining,
    InstanceOverloaded,
    KvMemoryExhausted,
    LogitsNotFinite,
    PromptTooLong,
)
from snowskin.engines.messages import CachePolicy, Handoff
from snowskin.engines.model.sampler import SamplingParams
from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.errors import (
    BadKeyColumn,
    BadRequest,
    DeadlineExceeded,
    NamespaceMismatch,
    NodeUnavailable,
    PoolExhausted,
)
from snowskin.transport.errors import SnowskinError
from tests.support.engine_bench import (
    BLOCK_SIZE,
    Answer,
    make_limits,
    make_prompt,
    open_bench,
    prompt_tokens,
    straight,
    until,
)
from tests.support.fake_store import FakeStore

GREEDY = SamplingParams(max_tokens=12)


def _future():
    return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("index", [0, 3, 8])
async def test_prefill_computes_again_from_a_corrupt_cached_block(index):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = prompt_tokens(38)
        await bench.run(prompt, GREEDY)
        store.corrupt.add(make_prompt(prompt).block_keys[index])
        tokens, response, answer = await bench.run(prompt, GREEDY, request_id="again")
        assert tokens == straight(prompt, GREEDY)
        assert response.stats.num_blocks_corrupt == 1
        assert response.stats.num_cached_tokens == index * BLOCK_SIZE
        assert response.stats.num_computed_tokens == 38 - index * BLOCK_SIZE
        assert response.stats.num_blocks_published == 1  # the broken one, anew
        assert answer.stats.num_recomputed_tokens == 0
        assert bench.all_free()


@pytest.mark.parametrize("index", [0, 4, 8])
async def test_decode_computes_from_a_block_that_arrives_corrupt(index):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(38)
        prompt = make_prompt(token_ids)
        response = await bench.run_prefill(prompt, GREEDY)
        store.corrupt.add(prompt.block_keys[index])
        answer = await bench.run_decode(prompt, GREEDY, response.handoff)
        assert answer.token_ids == straight(token_ids, GREEDY)[1:]
        assert answer.stats.num_blocks_corrupt == 1
        assert answer.stats.num_blocks_pulled == index
        assert answer.stats.num_recomputed_tokens == 38 - index * BLOCK_SIZE
        computed = bench.decode_runner.num_tokens_computed
        assert computed == answer.stats.num_recomputed_tokens + 11
        assert bench.all_free()


async def test_a_lost_tail_costs_only_its_own_tokens():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(39)
        prompt = make_prompt(token_ids)
        response = await bench.run_prefill(prompt, GREEDY)
        store.tails.clear()
        answer = await bench.run_decode(prompt, GREEDY, response.handoff)
        assert answer.token_ids == straight(token_ids, GREEDY)[1:]
        assert answer.stats.num_recomputed_tokens == 3
        assert answer.stats.num_blocks_pulled == 9


async def test_the_tail_carries_nobody_elses_bytes():
    store = FakeStore()
    async with open_bench(store.connect, num_blocks=16) as bench:
        memory = bench.prefill_runner.memory
        memory.kv_BLKHTD.fill_(7.0)  # what former owners left
        await bench.run_prefill(make_prompt(prompt_tokens(37)), GREEDY)
        tail = memory.kv_BLKHTD.new_tensor(0).new_empty(memory.kv_BLKHTD[0].shape)
        tail.view(-1).numpy().view("uint8")[:] = list(store.tails["r"])
        assert tail[:, :, :, 0].abs().min() > 0
        assert tail[:, :, :, 1:].abs().max() == 0


@pytest.mark.parametrize(
    "error", [PoolExhausted("full"), NodeUnavailable("gone"), DeadlineExceeded("slow")]
)
@pytest.mark.parametrize("num_chunks_out", [0, 1])
async def test_a_failed_publish_costs_decode_the_rest(error, num_chunks_out, monkeypatch):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = prompt_tokens(55)
        num_out = 0
        client = store.clients[0]
        real = client.publish

        async def failing(**arguments):
            nonlocal num_out
            if num_out == num_chunks_out:
                raise error
            num_out += 1
            return await real(**arguments)

        monkeypatch.setattr(client, "publish", failing)
        tokens, response, answer = await bench.run(prompt, GREEDY)
        assert tokens == straight(prompt, GREEDY)
        assert bench.prefill.num_publish_failures == 1
        assert response.handoff.tail_nbytes == 0
        assert response.stats.num_blocks_published == 4 * num_chunks_out
        assert answer.stats.num_recomputed_tokens == 55 - 16 * num_chunks_out
        assert bench.all_free()


async def test_a_prefill_whose_pull_fails_computes_everything():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = prompt_tokens(38)
        await bench.run(prompt, GREEDY)
        store.faults["pull"] = [DeadlineExceeded("slow node")]
        response = await bench.run_prefill(make_prompt(prompt), GREEDY, "again")
        assert response.stats.num_computed_tokens == 38
        assert bench.prefill.num_pull_failures == 1


async def test_a_node_that_dies_and_returns_costs_no_request():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = prompt_tokens(38)
        await store.crash()
        tokens, response, answer = await bench.run(prompt, GREEDY)
        assert tokens == straight(prompt, GREEDY)
        assert answer.stats.num_recomputed_tokens == 38
        assert not bench.prefill_link.connected
        store.alive = True
        async with asyncio.timeout(5):
            await bench.prefill_link.wait_connected()
            await bench.decode_link.wait_connected()
        tokens, response, answer = await bench.run(prompt, GREEDY, request_id="back")
        assert tokens == straight(prompt, GREEDY)
        assert answer.stats.num_recomputed_tokens == 0
        assert response.stats.num_blocks_published == 9


async def test_a_writer_that_dies_is_outwaited_until_another_one_publishes():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(38)
        prompt, handoff = make_prompt(token_ids), _future()
        decoding = asyncio.create_task(bench.run_decode(prompt, GREEDY, handoff))
        await until(lambda: store.calls["pull"] > 0)
        for _ in range(3):
            await store.writer_gone()
        response = await bench.run_prefill(prompt, GREEDY)
        handoff.set_result(response.handoff)
        answer = await decoding
        assert answer.token_ids == straight(token_ids, GREEDY)[1:]
        assert answer.stats.num_recomputed_tokens == 0


async def test_a_handoff_that_never_comes_ends_the_request_and_frees_its_room():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = make_prompt(prompt_tokens(9))
        with pytest.raises(HandoffMissing):
            await bench.run_decode(prompt, GREEDY, _future(), timeout_s=0.05)
        assert bench.all_free()


async def test_a_prefill_that_failed_fails_its_decode_with_the_same_error():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        handoff = _future()
        handoff.set_exception(BadRequest("the stream ended before the hand-off"))
        with pytest.raises(BadRequest, match="before the hand-off"):
            await bench.run_decode(make_prompt(prompt_tokens(9)), GREEDY, handoff)
        assert bench.all_free()


@pytest.mark.parametrize(
    ("handoff", "error"),
    [
        (Handoff(first_token_id=40, position=8), BadRequest),
        (Handoff(first_token_id=100_000, position=9), BadRequest),
    ],
)
async def test_a_handoff_of_another_prompt_is_refused(handoff, error):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        with pytest.raises(error):
            await bench.run_decode(make_prompt(prompt_tokens(9)), GREEDY, handoff)
        assert bench.all_free()


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (make_prompt(prompt_tokens(9), namespace=b"x" * 32), NamespaceMismatch),
        (make_prompt([]), BadPrompt),
        (make_prompt([40, 1_000_000]), BadPrompt),
        (make_prompt([40] * 512), PromptTooLong),
        (make_prompt(prompt_tokens(9), block_size=2), BadKeyColumn),
    ],
)
async def test_bad_prompts_are_refused_before_anything_is_held(prompt, error):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        with pytest.raises(error) as caught:
            await bench.run_prefill(prompt, GREEDY)
        assert caught.value.hint
        with pytest.raises(error):
            await bench.run_decode(prompt, GREEDY, Handoff(first_token_id=40, position=9))
        with pytest.raises(BadRequest):
            await bench.run_prefill(make_prompt([40]), GREEDY, request_id="")
        assert not store.calls
        assert bench.all_free()


async def test_a_prompt_that_can_never_fit_is_refused_at_once():
    store = FakeStore()
    async with open_bench(store.connect, num_blocks=4) as bench:
        prompt = make_prompt(prompt_tokens(17))
        with pytest.raises(PromptTooLong):
            await bench.run_prefill(prompt, GREEDY)
        with pytest.raises(PromptTooLong):
            await bench.run_decode(
                make_prompt(prompt_tokens(9)), GREEDY, Handoff(first_token_id=40, position=9)
            )


async def test_waiting_requests_are_bounded():
    store = FakeStore()
    limits = make_limits(max_waiting=2, max_running=1)
    async with open_bench(store.connect, limits=limits) as bench:
        store.gate.clear()  # the first one holds its turn in a pull
        prompt = make_prompt(prompt_tokens(9))
        running = [
            asyncio.create_task(bench.run_prefill(prompt, GREEDY, f"r{i}")) for i in range(3)
        ]
        await until(lambda: bench.prefill.load().num_waiting == 2)
        with pytest.raises(InstanceOverloaded) as caught:
            await bench.run_prefill(prompt, GREEDY, "one too many")
        assert caught.value.retry_after_s
        handoff = Handoff(first_token_id=40, position=9)
        decoding = [
            asyncio.create_task(bench.run_decode(prompt, GREEDY, handoff, f"r{i}"))
            for i in range(3)
        ]
        await until(lambda: bench.decode.load().num_waiting == 3)
        with pytest.raises(InstanceOverloaded):
            await bench.run_decode(prompt, GREEDY, handoff, "one too many")
        store.gate.set()
        await asyncio.gather(*running, *decoding)
        assert bench.all_free()


async def test_no_room_in_time_is_an_error_that_says_when_to_retry():
    store = FakeStore()
    async with open_bench(store.connect, num_blocks=6) as bench:
        prompt = make_prompt(prompt_tokens(9))
        holding = asyncio.create_task(bench.run_decode(prompt, GREEDY, _future()))
        await until(lambda: store.calls["pull"] > 0)
        with pytest.raises(KvMemoryExhausted) as caught:
            await bench.run_decode(prompt, GREEDY, _future(), "second", timeout_s=0.05)
        assert caught.value.retry_after_s
        holding.cancel()
        await asyncio.wait([holding])
        assert bench.all_free()


async def test_a_draining_instance_takes_nothing_new_and_finishes_what_runs():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(9)
        prompt = make_prompt(token_ids)
        running = asyncio.create_task(bench.run(token_ids, GREEDY))
        await until(lambda: bench.decode.num_requests > 0)
        bench.prefill.draining = bench.decode.draining = True
        with pytest.raises(InstanceDraining):
            await bench.run_prefill(prompt, GREEDY, "new")
        with pytest.raises(InstanceDraining):
            await bench.run_decode(prompt, GREEDY, _future(), "new")
        tokens, _, _ = await running
        assert tokens == straight(token_ids, GREEDY)


@pytest.mark.parametrize("num_steps", range(0, 60, 3))
@pytest.mark.parametrize("policy", [CachePolicy.READ_WRITE, CachePolicy.OFF])
async def test_a_request_cancelled_at_any_moment_frees_all_that_was_its_own(num_steps, policy):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(39)
        task = asyncio.create_task(bench.run(token_ids, GREEDY, policy=policy))
        before = [0]
        steps = _count_wakes(store, bench, before)
        for _ in range(num_steps):
            await steps()
            if task.done():
                break
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: bench.prefill.num_requests == bench.decode.num_requests == 0)
        assert bench.all_free()
        assert bench.decode.load().num_running == 0
        assert not store.one_reader.intersection(store.blocks), "nobody will come for them"
        assert not store.tails
        tokens, _, _ = await bench.run(token_ids, GREEDY, request_id="next")
        assert tokens == straight(token_ids, GREEDY)


async def test_a_prefill_cancelled_without_a_reader_takes_back_what_it_published():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = make_prompt(prompt_tokens(200), policy=CachePolicy.OFF, salt="s")
        task = asyncio.create_task(bench.run_prefill(prompt, GREEDY))
        await until(lambda: store.blocks)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert not store.blocks


@pytest.mark.parametrize("policy", [CachePolicy.READ_WRITE, CachePolicy.OFF])
async def test_a_decode_cancelled_while_it_waits_for_room_frees_what_was_left_for_it(policy):
    store = FakeStore()
    async with open_bench(store.connect, limits=make_limits(max_running=1)) as bench:
        first = asyncio.create_task(
            bench.run_decode(make_prompt(prompt_tokens(9)), GREEDY, _future())
        )
        await until(lambda: bench.decode.num_requests == 1)
        prompt = make_prompt(prompt_tokens(39), policy=policy, salt="s")
        response = await bench.run_prefill(prompt, GREEDY, "late")
        late = asyncio.create_task(bench.run_decode(prompt, GREEDY, response.handoff, "late"))
        await until(lambda: bench.decode.num_requests == 2)
        assert store.tails
        late.cancel()
        await asyncio.wait([late])
        assert not store.tails
        assert not store.one_reader.intersection(store.blocks)
        first.cancel()
        await asyncio.wait([first])


@pytest.mark.parametrize("num_tokens", [4, 39])
async def test_without_cache_one_token_leaves_nothing_at_the_node(num_tokens):
    store, sampling = FakeStore(), SamplingParams(max_tokens=1)
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(num_tokens)
        prompt = make_prompt(token_ids, policy=CachePolicy.OFF, salt="s")
        response = await bench.run_prefill(prompt, sampling)
        assert [response.handoff.first_token_id] == straight(token_ids, sampling)
        assert response.stats.num_blocks_published == 0
        assert not store.blocks
        assert not store.tails


def _count_wakes(store, bench, before):
    """Waits until something has happened: a store call, or a computed token."""

    def happened():
        computed = bench.prefill_runner.num_tokens_computed
        return store.calls.total() + computed + bench.decode_runner.num_tokens_computed

    async def step():
        for _ in range(2000):
            await asyncio.sleep(0)
            if happened() > before[0]:
                before[0] = happened()
                return

    return step


async def test_blocks_of_a_cancelled_pull_are_kept_until_it_has_ended():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = make_prompt(prompt_tokens(9))
        await bench.run_prefill(prompt, GREEDY)
        store.copying.clear()
        decoding = asyncio.create_task(bench.run_decode(prompt, GREEDY, _future()))
        await until(lambda: store.num_copying)
        decoding.cancel()
        for _ in range(50):
            await asyncio.sleep(0)
        assert not decoding.done()
        assert not bench.all_free()
        store.copying.set()
        with pytest.raises(asyncio.CancelledError):
            await decoding
        assert bench.all_free()


async def test_a_pull_that_waits_for_its_writer_ends_at_once_when_it_is_cancelled():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = make_prompt(prompt_tokens(9))
        decoding = asyncio.create_task(bench.run_decode(prompt, GREEDY, _future()))
        await until(lambda: store.calls["pull"])
        decoding.cancel()
        for _ in range(50):
            await asyncio.sleep(0)
        assert decoding.done()
        assert bench.all_free()


async def test_a_cancelled_answer_leaves_the_batch_at_once():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = make_prompt(prompt_tokens(9))
        first = await bench.run_prefill(prompt, SamplingParams(max_tokens=400))
        decoding = asyncio.create_task(
            bench.run_decode(prompt, SamplingParams(max_tokens=400), first.handoff)
        )
        await until(lambda: bench.decode_runner.num_tokens_computed > 3)
        decoding.cancel()
        await asyncio.wait([decoding])
        assert bench.decode.load().num_running == 0
        assert bench.all_free()
        computed = bench.decode_runner.num_tokens_computed
        await bench.run(prompt_tokens(5), SamplingParams(max_tokens=3), request_id="next")
        assert bench.decode_runner.num_tokens_computed == computed + 2


async def test_a_step_that_has_begun_is_outwaited_by_a_cancelled_caller(monkeypatch):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        entered, go = threading.Event(), threading.Event()
        model = bench.prefill_runner._model
        real = model.forward

        def slow(spans, memory):
            entered.set()
            assert go.wait(10)
            return real(spans, memory)

        monkeypatch.setattr(model, "forward", slow)
        prefilling = asyncio.create_task(bench.run_prefill(make_prompt(prompt_tokens(9)), GREEDY))
        await until(entered.is_set)
        prefilling.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not prefilling.done()
        assert not bench.all_free()
        go.set()
        await asyncio.wait([prefilling])
        assert bench.all_free()


async def test_broken_logits_end_their_own_sequence_only():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        good, bad = prompt_tokens(9, seed=1), prompt_tokens(16, seed=2)
        long = SamplingParams(max_tokens=40)
        first = await bench.run_prefill(make_prompt(bad), long, "bad")
        key = (make_prompt(bad).namespace, make_prompt(bad).block_keys[1])
        store.blocks[key] = b"\xff" * len(store.blocks[key])  # NaN
        good_task = asyncio.create_task(bench.run(good, long, request_id="good"))
        with pytest.raises(LogitsNotFinite):
            await bench.run_decode(make_prompt(bad), long, first.handoff, "bad")
        tokens, _, _ = await good_task
        assert tokens == straight(good, long)
        assert bench.all_free()


async def test_a_failing_step_ends_its_sequences_and_the_instance_goes_on(monkeypatch):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(9)

        def broken(spans, memory):
            raise RuntimeError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(bench.decode_runner._model, "forward", broken)
            with pytest.raises(SnowskinError, match="no memory"):
                await bench.run(token_ids, GREEDY)
        tokens, _, _ = await bench.run(token_ids, GREEDY, request_id="next")
        assert tokens == straight(token_ids, GREEDY)
        assert bench.all_free()


async def test_keys_of_another_engine_are_pulled_by_and_not_continued():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(18)
        ours = make_prompt(token_ids)
        narrow = KeyColumn.of([key[:8] for key in ours.block_keys], width=8)
        prompt = replace(ours, block_keys=narrow)
        response = await bench.run_prefill(prompt, GREEDY)
        answer = await bench.run_decode(prompt, GREEDY, response.handoff, answer=Answer())
        assert answer.token_ids == straight(token_ids, GREEDY)[1:]
        assert answer.stats.num_blocks_pulled == 4
        assert answer.stats.num_blocks_published == 0
