"""Each public await of the engines, cancelled at each point where it waits: nothing is held, nothing runs on."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager

import pytest

from snowskin.engines.link import Waiting
from snowskin.engines.messages import CachePolicy
from snowskin.engines.model.sampler import SamplingParams
from snowskin.engines.prefill import MAX_PUBLISHES
from snowskin.engines.publisher import BlockPublisher, PublishRules
from snowskin.engines.sequence import KeyChain
from snowskin.kvstore.errors import NodeSilent, NodeUnavailable, TailUnknown
from tests.support.engine_bench import (
    BLOCK_SIZE,
    make_prompt,
    open_bench,
    prompt_tokens,
    straight,
    until,
)
from tests.support.fake_store import FakeStore
from tests.support.suspension import at_each_suspension

GREEDY = SamplingParams(max_tokens=4)
NUM_BLOCKS = 6
NUM_TOKENS = NUM_BLOCKS * BLOCK_SIZE + 1  # two chunks, and a tail


class Held:
    """What one bench holds, compared with what it held when it was new."""

    def __init__(self, bench, store) -> None:
        self.bench = bench
        self.store = store
        self.tasks = asyncio.all_tasks()

    def left(self) -> str:
        """What is held beyond that, in words."""
        prefill, decode = self.bench.prefill, self.bench.decode
        tasks = [
            task.get_name()
            for task in asyncio.all_tasks() - self.tasks
            # The guard's own look at its node, and who asks here, end by themselves.
            if task is not asyncio.current_task() and not task.get_name().startswith("check ")
        ]
        found = {
            "KV blocks": not self.bench.all_free(),
            "requests": prefill.num_requests + decode.num_requests,
            "grants": prefill._room.num_held + decode._room.num_held,
            "waiters": prefill._room.num_waiting + decode._room.num_waiting,
            "running": decode.load().num_running,
            "turn": prefill._turn.locked(),
            "gates": 2 * MAX_PUBLISHES - prefill._publish_gate._value - decode._publish_gate._value,
            "publishes": self.store.num_publishing,
            "copies": self.store.num_copying,
            "tails": len(self.store.tails),
            "one-reader blocks": len(self.store.one_reader.intersection(self.store.blocks)),
            "tasks": tasks,
        }
        return ", ".join(f"{name}: {value}" for name, value in found.items() if value)

    async def nothing(self) -> None:
        """Fails unless all is as it was, at once or after the turns that ending takes."""
        for _ in range(20):
            if not self.left():
                return
            await asyncio.sleep(0)
        assert not self.left(), self.left()


@asynccontextmanager
async def a_bench(**options):
    store = FakeStore()
    async with open_bench(store.connect, **options) as bench:
        await bench.run(prompt_tokens(NUM_TOKENS), GREEDY, request_id="first")
        held = Held(bench, store)
        await held.nothing()
        yield bench, store, held


def fresh():
    """Request ids and prompts, none twice."""
    numbers = itertools.count(1)
    return lambda: (number := next(numbers), f"r{number}", prompt_tokens(NUM_TOKENS, number))


@pytest.mark.parametrize("policy", CachePolicy)
@pytest.mark.parametrize("is_cached", [False, True])
async def test_prefill(policy, is_cached):
    async with a_bench() as (bench, _, held):
        new = fresh()
        known = prompt_tokens(NUM_TOKENS)

        async def prefill():
            _, request_id, token_ids = new()
            prompt = make_prompt(known if is_cached else token_ids, policy=policy, salt=request_id)
            await bench.run_prefill(prompt, GREEDY, request_id)
            # It was not cancelled: its reader takes what it left.
            await bench.prefill_link.discard(
                prompt.block_keys, tail_id=request_id, request_id=request_id
            )

        num_points = await at_each_suspension(prefill, held.nothing)
        assert num_points >= 5
        tokens, _, _ = await bench.run(known, GREEDY, request_id="last")
        assert tokens == straight(known, GREEDY)


@pytest.mark.parametrize("policy", CachePolicy)
async def test_decode(policy):
    async with a_bench() as (bench, _, held):
        new = fresh()

        async def decode():
            _, request_id, token_ids = new()
            prompt = make_prompt(token_ids, policy=policy, salt=request_id)
            response = await bench.run_prefill(prompt, GREEDY, request_id)
            await started.put((prompt, response.handoff, request_id))

        started = asyncio.Queue()

        async def decode_one():
            prompt, handoff, request_id = started.get_nowait()
            await bench.run_decode(prompt, GREEDY, handoff, request_id)

        async def after():
            await held.nothing()
            await decode()  # what the next one will read

        await decode()
        num_points = await at_each_suspension(decode_one, after)
        assert num_points >= 5
        await decode_one()
        await held.nothing()


async def test_a_decode_that_waits_for_its_handoff():
    async with a_bench() as (bench, store, held):
        new = fresh()

        async def decode():
            _, request_id, token_ids = new()
            handoff = asyncio.get_running_loop().create_future()
            prompt = make_prompt(token_ids)

            async def prefilled():
                response = await bench.run_prefill(prompt, GREEDY, request_id)
                if not handoff.done():
                    handoff.set_result(response.handoff)

            prefilling = asyncio.create_task(prefilled())
            try:
                await bench.run_decode(prompt, GREEDY, handoff, request_id)
            finally:
                prefilling.cancel()
                await asyncio.wait([prefilling])

        # The tail that a prefill published at the very end is its decode's to free: an attempt has both.
        async def after():
            store.tails.clear()
            await held.nothing()

        assert await at_each_suspension(decode, after) >= 5


class Calls:
    """Each call of a link, with blocks of its own."""

    def __init__(self, bench, store) -> None:
        self.bench = bench
        self.link = bench.prefill_link
        self.store = store
        self.new = fresh()
        self.known = make_prompt(prompt_tokens(NUM_TOKENS)).block_keys
        self.block_ids = range(NUM_BLOCKS)  # of nobody while nothing runs

    async def publish(self):
        _, request_id, token_ids = self.new()
        await self.link.publish(
            make_prompt(token_ids).block_keys,
            self.block_ids,
            parent_key=b"",
            one_reader=False,
            timeout_s=1.0,
            request_id=request_id,
        )

    async def publish_tail(self):
        _, request_id, _ = self.new()
        await self.link.publish_tail(0, timeout_s=1.0, request_id=request_id)
        self.store.tails.pop(request_id)

    async def pull(self):
        pulled = await self.link.pull(self.known, self.block_ids, timeout_s=1.0, request_id="r")
        assert pulled.num_blocks == NUM_BLOCKS

    async def pull_and_wait(self):
        _, request_id, token_ids = self.new()
        over = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.002, over.set_result, None)
        keys = make_prompt(token_ids).block_keys
        waiting = Waiting(1.0, over, self.link.new_budget())
        found = await self.link.pull(
            keys, self.block_ids, waiting=waiting, timeout_s=1.0, request_id=request_id
        )
        assert found is None

    async def pull_tail(self):
        self.store.tails["t"] = bytes(self.link.block_nbytes)
        try:
            await self.link.pull_tail(0, timeout_s=1.0, request_id="t")
        finally:
            self.store.tails.pop("t", None)

    async def discard(self):
        await self.link.discard(self.known, tail_id="t", request_id="t")

    async def while_answering(self):
        await self.link.while_answering(asyncio.sleep(0.03), self.link.new_budget())

    async def wait_connected(self):
        await self.link.wait_connected()

    async def open(self):
        """Another link of the same memory, opened and closed."""
        link = self.bench.prefill._nodes._link_to("node-0")
        try:
            await link.open()
        finally:
            await link.close()
        assert self.store.clients[-1].closed

    async def among(self):
        await self.bench.prefill._nodes.among(["node-0", "nowhere"])

    async def publisher(self):
        _, request_id, token_ids = self.new()
        rules = PublishRules(
            max_blocks=1, one_reader=False, timeout_s=1.0, gate=asyncio.Semaphore(MAX_PUBLISHES)
        )
        keys = KeyChain(make_prompt(token_ids), BLOCK_SIZE)
        budget = self.link.new_budget()
        async with BlockPublisher(self.link, keys, range(8), rules, request_id=request_id) as each:
            each.ready(2)
            await each.finish(budget)
            await each.publish_tail(2, budget)
            self.store.tails.pop(request_id, None)
        assert rules.gate._value == MAX_PUBLISHES


CALLS = [name for name in vars(Calls) if not name.startswith("_")]


@pytest.mark.parametrize("name", CALLS)
async def test_each_call_of_a_link(name):
    async with a_bench() as (bench, store, held):
        calls = Calls(bench, store)
        await bench.prefill._nodes.among(["nowhere"])  # its link is kept from now on
        held.tasks = asyncio.all_tasks()

        async def after():
            for tail in [each for each in store.tails if each.startswith("r")]:
                # Written before the cancellation was heard: freed by who prefills, see `test_prefill`.
                store.tails.pop(tail)
            await held.nothing()
            assert bench.prefill_link.usable

        await getattr(calls, name)()
        await after()
        await at_each_suspension(
            getattr(calls, name), after, may_raise=(NodeUnavailable, NodeSilent, TailUnknown)
        )
        await getattr(calls, name)()


async def test_the_runner_and_the_room():
    async with a_bench(num_blocks=16) as (bench, _, held):
        runner, room = bench.prefill_runner, bench.prefill._room
        loop = asyncio.get_running_loop()

        async def hold_after_another():
            async with room.hold(1):  # as many as are granted at once, and no wait
                pass
            block_ids = await room._take(10)
            loop.call_soon(room._give, block_ids)
            async with room.hold(10):
                pass

        async def after():
            await asyncio.sleep(0)  # the other one gives back
            await held.nothing()

        assert await at_each_suspension(hold_after_another, after) == 1
        assert await at_each_suspension(lambda: runner.warm_up(4), held.nothing) == 2


async def test_a_link_that_is_closed_again_and_again():
    store = FakeStore()
    async with open_bench(store.connect) as bench:
        link = bench.decode_link
        for make in (link.close, link.guard.close, bench.decode._nodes.close):

            async def after():
                await until(lambda: link.usable)

            await at_each_suspension(make, after)
