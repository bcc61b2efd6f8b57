"""Which tokens a step computes, and that sequences join and leave between any two steps."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowskin.engines.batch import Batch, plan_step
from snowskin.engines.errors import InstanceDraining
from snowskin.engines.model.sampler import SampledToken, SamplingParams
from snowskin.engines.runner import Step
from snowskin.engines.sequence import Sequence
from tests.support.engine_bench import until


def sequence(*, num_tokens=5, num_computed=4, max_tokens=8, stop=()):
    made = Sequence(
        request_id="r",
        token_ids=list(range(num_tokens)),
        block_ids=[0, 1, 2],
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop),
        max_length=num_tokens + max_tokens,
    )
    made.num_computed = num_computed
    return made


class StubRunner:
    """Answers each step with token 7 wherever one is drawn, when told to."""

    def __init__(self):
        self.go = asyncio.Event()
        self.go.set()
        self.steps = []

    async def step(self, spans, draws):
        self.steps.append((spans, draws))
        await self.go.wait()
        await asyncio.sleep(0)
        tokens = tuple(
            SampledToken(token_id=7, top_two_margin=1.0, edge_distance=1.0) if draw else None
            for draw in draws
        )
        return Step(tokens, 0.001)


class Running:
    def __init__(self, batch):
        self.batch = batch

    async def __aenter__(self):
        self.task = asyncio.create_task(self.batch.run())
        return self.task

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.wait([self.task])


def new_batch(runner, budget=16):
    return Batch(runner, token_budget=budget, on_step=lambda plan, step: None)


async def drain(made):
    """All outputs until the last."""
    tokens = []
    while True:
        item = await made.outputs.get()
        if isinstance(item, Exception):
            raise item
        tokens.append(item.token_id)
        if item.finish_reason:
            return tokens, item.finish_reason


def pending(*counts):
    return [SimpleNamespace(num_pending=count) for count in counts]


def test_decodes_come_first_and_chunks_share_what_is_left():
    a, b, c, d = pending(1, 40, 1, 9)
    assert plan_step([a, b, c, d], token_budget=16) == [(a, 1), (c, 1), (b, 14)]
    assert plan_step([a, d, b], token_budget=16) == [(a, 1), (d, 9), (b, 6)]


def test_a_backlog_moves_even_where_decodes_fill_the_budget():
    *decodes, backlog = pending(1, 1, 1, 30)
    assert plan_step([*decodes, backlog], token_budget=2)[-1] == (backlog, 1)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 40))
def test_every_decode_is_in_every_step_and_the_budget_holds(counts, budget):
    sequences = pending(*counts)
    plan = plan_step(sequences, token_budget=budget)
    assert len({id(each) for each, _ in plan}) == len(plan)
    assert all(1 <= num_tokens <= each.num_pending for each, num_tokens in plan)
    num_decodes = counts.count(1)
    assert sum(each.num_pending == 1 for each, _ in plan) == num_decodes
    assert sum(num_tokens for _, num_tokens in plan) <= max(budget, num_decodes + 1)
    if num_decodes < len(counts):
        assert any(each.num_pending > 1 for each, _ in plan)


async def test_a_sequence_ends_with_its_last_token_and_leaves():
    batch = new_batch(StubRunner())
    async with Running(batch):
        made = sequence(max_tokens=3)
        batch.join(made)
        assert await drain(made) == ([7, 7, 7], "length")
        assert batch.num_running == 0
        # The last token was never computed.
        assert made.num_computed == len(made.token_ids) - 1


async def test_a_stop_token_ends_a_sequence():
    batch = new_batch(StubRunner())
    async with Running(batch):
        made = sequence(stop=(7,))
        batch.join(made)
        assert await drain(made) == ([7], "stop")


async def test_a_backlog_is_computed_in_steps_and_draws_only_at_its_end():
    runner = StubRunner()
    batch = new_batch(runner, budget=4)
    async with Running(batch):
        made = sequence(num_tokens=10, num_computed=0, max_tokens=1)
        batch.join(made)
        assert await drain(made) == ([7], "length")
    sizes = [len(spans[0].token_ids) for spans, _ in runner.steps]
    assert sizes == [4, 4, 2]
    assert [draws[0] is not None for _, draws in runner.steps] == [False, False, True]
    assert runner.steps[-1][1][0].position == 10


async def test_sequences_join_while_others_run():
    runner = StubRunner()
    batch = new_batch(runner)
    async with Running(batch):
        runner.go.clear()
        first, second = sequence(max_tokens=4), sequence(max_tokens=2)
        batch.join(first)
        await until(lambda: len(runner.steps) == 1)
        batch.join(second)
        runner.go.set()
        assert (await drain(second))[0] == [7, 7]
        assert (await drain(first))[0] == [7, 7, 7, 7]
    assert [len(spans) for spans, _ in runner.steps] == [1, 2, 2, 1]


async def test_leaving_waits_for_the_step_that_writes_the_blocks():
    runner = StubRunner()
    batch = new_batch(runner)
    async with Running(batch):
        runner.go.clear()
        made = sequence()
        batch.join(made)
        await until(lambda: runner.steps)
        leaving = asyncio.create_task(batch.leave(made))
        for _ in range(5):
            await asyncio.sleep(0)
        leaving.cancel()  # not even a cancelled caller may free the blocks now
        for _ in range(5):
            await asyncio.sleep(0)
        assert not leaving.done()
        runner.go.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert made.outputs.empty()
        assert batch.num_running == 0


async def test_leaving_between_steps_is_at_once():
    batch = new_batch(StubRunner())
    made = sequence()
    batch.join(made)
    await batch.leave(made)
    await batch.leave(made)
    assert batch.num_running == 0


async def test_the_end_of_the_loop_ends_its_sequences_and_takes_no_new_ones():
    runner = StubRunner()
    batch = new_batch(runner)
    runner.go.clear()
    made = sequence()
    async with Running(batch):
        batch.join(made)
        await until(lambda: runner.steps)
    with pytest.raises(InstanceDraining):
        await drain(made)
    with pytest.raises(InstanceDraining):
        batch.join(sequence())
