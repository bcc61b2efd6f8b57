"""What has begun is waited for, and what runs beside a process ends with it."""

from __future__ import annotations

import asyncio

import pytest

from snowskin.engines.cancellation import Background, outlast


async def test_a_cancelled_waiter_is_cancelled_only_when_the_work_is_done():
    go, done = asyncio.Event(), []

    async def work():
        await go.wait()
        done.append(True)

    waiting = asyncio.create_task(outlast(work()))
    for _ in range(2):  # cancelled again and again, still patient
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
    assert not waiting.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert done


async def test_results_and_errors_pass_through():
    async def answer():
        return 7

    async def broken():
        raise ValueError("no")

    assert await outlast(answer()) == 7
    with pytest.raises(ValueError, match="no"):
        await outlast(broken())


async def test_an_error_of_the_block_comes_out_as_it_is_and_ends_the_tasks():
    ended = asyncio.Event()

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def run():
        async with Background() as background:
            background.start(forever(), "forever")
            await asyncio.sleep(0)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await run()
    assert ended.is_set()


async def test_a_task_that_fails_ends_the_wait_with_its_error():
    async def broken():
        raise ValueError("no")

    async def short():
        return

    never = asyncio.Event()
    async with Background() as background:
        background.start(broken(), "broken")
        with pytest.raises(ValueError, match="no"):
            await background.until(_wait(never))
    async with Background() as background:
        background.start(short(), "short")
        with pytest.raises(RuntimeError, match="'short' ended by itself"):
            await background.until(_wait(never))


async def test_the_event_ends_the_wait():
    event = asyncio.Event()
    event.set()
    async with Background() as background:
        background.start(_wait(asyncio.Event()), "forever")
        await background.until(_wait(event))


async def _wait(event):
    await event.wait()
