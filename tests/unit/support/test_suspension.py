"""The harness itself: it counts right, it hits both moments, and it sees what is left behind."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.suspension import Moment, at_each_suspension, cancelled_at


async def nothing():
    return None


async def test_each_point_is_hit_once_in_each_moment():
    seen = []

    async def work():
        for number in range(4):
            try:
                await asyncio.sleep(0 if number % 2 else 0.001)
            except asyncio.CancelledError:
                seen.append(number)
                raise

    assert await at_each_suspension(work, nothing) == 4
    assert sorted(seen) == [0, 0, 1, 1, 2, 2, 3, 3]


async def test_in_the_second_moment_the_answer_is_there_and_is_not_taken():
    answers = []

    async def work():
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, "answer")
        try:
            await future
        except asyncio.CancelledError:
            answers.append(future.result())
            raise

    task, was_reached = await cancelled_at(work(), 1, Moment.ANSWERED)
    assert (answers, was_reached, task.cancelled()) == (["answer"], True, True)


async def test_nested_and_caught_cancellations_are_the_works_own_affair():
    async def inner():
        try:
            await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            raise

    async def work():
        async with asyncio.timeout(5):
            await inner()
            await asyncio.gather(inner(), inner())

    assert await at_each_suspension(work, nothing) >= 2


async def test_what_is_left_behind_is_named_by_its_point():
    held = []

    async def work():
        await asyncio.sleep(0)
        held.append(1)
        await asyncio.sleep(0)
        held.pop()

    async def check():
        assert not held, "held"

    with pytest.raises(
        AssertionError, match="left behind by suspension 2, cancelled while it waits"
    ):
        await at_each_suspension(work, check)


async def test_an_error_that_is_no_cancellation_fails():
    async def work():
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            raise ValueError("wrong") from None

    with pytest.raises(AssertionError, match="suspension 1"):
        await at_each_suspension(work, nothing)
    assert await at_each_suspension(work, nothing, may_raise=(ValueError,)) == 1
