"""A store that is dead, stopped or slow costs a request a bounded moment, then nothing, and is used again by itself."""

from __future__ import annotations

import asyncio
import time

import pytest

from snowskin.engines.link import LOOKUP_BUDGET_S
from snowskin.engines.model.sampler import SamplingParams
from snowskin.kvstore.errors import NodeSilent
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
# Far below the seconds that a call to a silent node may take by itself, far above the budget: the host is busy.
PROMPTLY_S = 0.5


def _future():
    return asyncio.get_running_loop().create_future()


async def timed(work):
    began_s = time.perf_counter()
    result = await work
    return result, time.perf_counter() - began_s


async def left_alone(link):
    await until(lambda: not link.guard.usable)


@pytest.mark.parametrize("num_tokens", [38, 55])
async def test_a_prefill_at_a_silent_node_answers_without_its_publishes(num_tokens):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(num_tokens)
        _, usual_s = await timed(
            bench.run_prefill(make_prompt(prompt_tokens(num_tokens, 9)), GREEDY)
        )
        store.gate.clear()
        response, seconds = await timed(bench.run_prefill(make_prompt(token_ids), GREEDY))
        assert seconds < usual_s + PROMPTLY_S
        assert response.handoff.first_token_id == straight(token_ids, GREEDY)[0]
        assert response.handoff.tail_nbytes == 0
        assert bench.prefill.num_publish_failures == 1
        assert bench.all_free()
        store.gate.set()


async def test_all_that_a_request_asks_shares_one_budget(monkeypatch):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        link, budgets = bench.prefill_link, []

        def noting(name):
            real = getattr(link, name)

            async def noted(*arguments, **keywords):
                budgets.append((name, keywords.get("budget") or arguments[-1]))
                return await real(*arguments, **keywords)

            monkeypatch.setattr(link, name, noted)

        noting("pull")
        noting("while_answering")
        await bench.run_prefill(make_prompt(prompt_tokens(38)), GREEDY)
        assert [name for name, _ in budgets] == ["pull", "while_answering", "while_answering"]
        assert len({id(budget) for _, budget in budgets}) == 1


async def test_a_silent_node_is_left_alone_and_then_not_even_asked():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        await bench.run(prompt_tokens(38), GREEDY)
        store.gate.clear()
        await bench.run_prefill(make_prompt(prompt_tokens(38, 1)), GREEDY)
        await left_alone(bench.prefill_link)
        calls = {name: store.calls[name] for name in ("pull", "publish", "publish_tail")}
        token_ids = prompt_tokens(38)
        response = await bench.run_prefill(make_prompt(token_ids), GREEDY, "again")
        assert response.handoff.first_token_id == straight(token_ids, GREEDY)[0]
        assert response.stats.num_computed_tokens == 38
        assert calls == {name: store.calls[name] for name in calls}
        load = bench.prefill.load()
        assert (load.num_nodes_silent, load.num_silences) == (1, 1)
        assert load.num_calls_late >= 3
        store.gate.set()
        await until(lambda: bench.prefill_link.usable)
        assert bench.prefill.load().num_nodes_silent == 0
        response = await bench.run_prefill(make_prompt(token_ids), GREEDY, "third")
        assert response.stats.num_cached_tokens == 36


async def test_a_pull_that_waits_for_its_writer_is_never_late():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        prompt = make_prompt(prompt_tokens(38))
        handoff = _future()
        decoding = asyncio.create_task(bench.run_decode(prompt, GREEDY, handoff))
        await until(lambda: store.calls["pull"] >= 3)  # two waits to their end
        assert bench.decode_link.guard.num_late == 0
        response = await bench.run_prefill(prompt, GREEDY)
        handoff.set_result(response.handoff)
        answer = await decoding
        assert answer.stats.num_recomputed_tokens == 0


async def test_after_the_handoff_nobody_waits_for_blocks_that_were_never_published():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(38)
        prompt = make_prompt(token_ids)
        response = await bench.run_prefill(prompt, GREEDY)
        store.blocks.clear()
        handoff = _future()
        decoding = asyncio.create_task(bench.run_decode(prompt, GREEDY, handoff))
        await until(lambda: store.calls["pull"] >= 2)
        handoff.set_result(response.handoff)
        answer = await decoding
        assert answer.token_ids == straight(token_ids, GREEDY)[1:]
        assert answer.stats.num_recomputed_tokens == 38


@pytest.mark.parametrize("when", ["before", "while it waits", "after"])
async def test_a_decode_at_a_silent_node_computes_what_it_lacks(when):
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(38)
        prompt = make_prompt(token_ids)
        response = await bench.run_prefill(prompt, GREEDY)
        if when != "after":
            store.blocks.clear()
        handoff = _future()
        if when == "before":
            store.gate.clear()
        if when == "after":
            store.copying.clear()
        decoding = asyncio.create_task(bench.run_decode(prompt, GREEDY, handoff))
        await until(lambda: store.num_copying if when == "after" else store.calls["pull"])
        store.gate.clear()
        store.copying.set()
        handoff.set_result(response.handoff)
        answer, seconds = await timed(decoding)
        assert seconds < 3 * PROMPTLY_S
        assert answer.token_ids == straight(token_ids, GREEDY)[1:]
        assert answer.stats.num_recomputed_tokens == (2 if when == "after" else 38)
        assert bench.all_free()
        store.gate.set()


async def test_a_copy_under_way_at_the_handoff_is_brought_to_its_end():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        token_ids = prompt_tokens(38)
        prompt = make_prompt(token_ids)
        response = await bench.run_prefill(prompt, GREEDY)
        store.copying.clear()
        handoff = _future()
        decoding = asyncio.create_task(bench.run_decode(prompt, GREEDY, handoff))
        await until(lambda: store.num_copying)
        num_pulls = store.calls["pull"]
        handoff.set_result(response.handoff)
        # Longer than a look-up may take: a copy has a time of its own.
        await asyncio.wait([decoding], timeout=3 * LOOKUP_BUDGET_S)
        assert store.num_copying == 1
        store.copying.set()
        answer = await decoding
        assert answer.stats.num_recomputed_tokens == 0
        assert store.calls["pull"] == num_pulls


async def test_a_slow_machine_does_not_open_the_breaker():
    """The loop stands still for longer than any look-up may take, again and again, while the node answers."""
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        await bench.run(prompt_tokens(38), GREEDY)
        loop = asyncio.get_running_loop()

        def stand_still():
            time.sleep(0.05)
            if not done.is_set():
                loop.call_later(0.005, stand_still)

        done = asyncio.Event()
        loop.call_soon(stand_still)
        for number in range(3):
            response = await bench.run_prefill(make_prompt(prompt_tokens(38)), GREEDY, f"r{number}")
            assert response.stats.num_cached_tokens == 36
        done.set()
        assert bench.prefill.load().num_silences == 0


async def test_two_silent_nodes_cost_no_more_than_one():
    first, second = FakeStore(), FakeStore()
    async with open_bench(first.connect, connect_decode=second.connect) as bench:
        await bench.run(prompt_tokens(38), GREEDY, nodes=["node-0", "node-1"])
        await bench.run_prefill(make_prompt(prompt_tokens(38, 1), nodes=["node-1"]), GREEDY)
        (link,) = [each for each in bench.prefill._nodes.links if each is not bench.prefill_link]
        await until(lambda: link.usable)
        first.gate.clear()
        second.gate.clear()
        budget = bench.prefill_link.new_budget()
        spent = []
        for each in (bench.prefill_link, link):
            with pytest.raises(Exception, match="silent"):
                await each.pull(
                    make_prompt(prompt_tokens(8)).block_keys,
                    [],
                    budget=budget,
                    timeout_s=1.0,
                    request_id="r",
                )
            spent.append(LOOKUP_BUDGET_S - budget.left_s)
        assert spent == pytest.approx([LOOKUP_BUDGET_S] * 2)
        first.gate.set()
        second.gate.set()


async def test_work_at_a_node_goes_on_as_long_as_the_node_answers():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        link, room = bench.prefill_link, asyncio.Event()
        waiting = asyncio.create_task(link.while_answering(room.wait(), link.new_budget()))
        await until(lambda: store.calls["probe"] >= 3)
        assert not waiting.done()
        room.set()
        assert await waiting is True


async def test_work_at_a_node_that_falls_silent_is_cancelled_and_is_over_then():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        link, ends = bench.prefill_link, []

        async def work():
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ends.append("ended")

        waiting = asyncio.create_task(link.while_answering(work(), link.new_budget()))
        await until(lambda: store.calls["probe"])
        store.gate.clear()
        with pytest.raises(Exception, match="did not answer"):
            await waiting
        assert ends == ["ended"]
        await left_alone(link)
        with pytest.raises(NodeSilent):
            await link.publish_tail(0, timeout_s=1.0, request_id="r")
        store.gate.set()


# --- the rest from another node


def spread(first, second, prompt, *, at_first, at_second):
    """Puts blocks by index at one fake, at the other, or at both; all were published to `first`."""
    keys = [(prompt.namespace, key) for key in prompt.block_keys]
    data = dict(first.blocks)
    for index, key in enumerate(keys):
        first.blocks.pop(key, None)
        if index in at_first:
            first.blocks[key] = data[key]
        if index in at_second:
            second.blocks[key] = data[key]


@pytest.fixture
async def two():
    """Two nodes; the prefill instance, at the first, is connected to both and asked for a known prompt."""
    first, second = FakeStore(), FakeStore()
    async with open_bench(first.connect, connect_decode=second.connect) as bench:
        prompt = make_prompt(prompt_tokens(53), nodes=["node-0", "node-1"])
        await bench.run_prefill(prompt, GREEDY)
        await until(lambda: all(each.usable for each in bench.prefill._nodes.links))
        yield first, second, bench, prompt


async def test_a_node_that_dies_in_the_middle_of_a_copy_is_replaced_by_one_that_has_the_rest(two):
    first, second, bench, prompt = two
    spread(first, second, prompt, at_first=range(13), at_second=range(13))
    first.breaks_after = 5
    response = await bench.run_prefill(prompt, GREEDY, "again")
    assert response.stats.num_cached_tokens == 13 * BLOCK_SIZE
    assert response.stats.num_blocks_pulled == 13, "what had landed was not fetched again"
    assert response.handoff.first_token_id == straight(list(prompt.token_ids), GREEDY)[0]
    assert bench.prefill.num_pull_failures == 1


@pytest.mark.parametrize("index", [0, 5, 12])
async def test_a_broken_block_at_one_node_is_taken_from_the_other(two, index):
    first, second, bench, prompt = two
    spread(first, second, prompt, at_first=range(13), at_second=range(13))
    first.corrupt.add(prompt.block_keys[index])
    response = await bench.run_prefill(prompt, GREEDY, "again")
    assert response.stats.num_cached_tokens == 13 * BLOCK_SIZE
    assert response.stats.num_blocks_corrupt == 1
    assert response.handoff.first_token_id == straight(list(prompt.token_ids), GREEDY)[0]


async def test_a_silent_node_hides_nothing_that_another_has(two):
    first, second, bench, prompt = two
    spread(first, second, prompt, at_first=range(13), at_second=range(9))
    first.gate.clear()
    response = await bench.run_prefill(prompt, GREEDY, "again")
    assert response.stats.num_cached_tokens == 9 * BLOCK_SIZE
    assert response.handoff.first_token_id == straight(list(prompt.token_ids), GREEDY)[0]
    first.gate.set()


async def test_only_what_nobody_has_is_computed(two):
    first, second, bench, prompt = two
    spread(first, second, prompt, at_first={0, 1, 4, 5, 6}, at_second={2, 3, 4, 7, 9, 10})
    response = await bench.run_prefill(prompt, GREEDY, "again")
    assert response.stats.num_cached_tokens == 8 * BLOCK_SIZE
    assert response.stats.num_computed_tokens == 53 - 8 * BLOCK_SIZE
