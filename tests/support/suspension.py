"""Every point at which a coroutine waits, hit by a cancellation once: exhaustive, not by chance.

A coroutine is driven by hand inside its task: each time that it suspends, the awaited future passes through `_driven`,
which counts, and at the wanted point cancels the task as its owner would. Two moments of each point differ: `WAITING`,
while the future is pending (a task hands its cancellation on to it), and `ANSWERED`, in the turn of the loop in which
it was done and before the task has woken up: the answer is there, and nobody will take it.
"""

from __future__ import annotations

import asyncio
import itertools
import types
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

MAX_POINTS = 2_000  # a coroutine that suspends so often is not one for this


class Moment(Enum):
    """When a suspended task is cancelled."""

    WAITING = "while it waits"
    ANSWERED = "when its answer has come"


@types.coroutine
def _driven(
    work: Coroutine[Any, Any, Any], at: int, moment: Moment, reached: list[int]
) -> Generator[Any, Any, Any]:
    """`work`, its task cancelled at its suspension number `at`, from 1; `reached` gets each number."""
    task = asyncio.current_task()
    assert task is not None
    send: Callable[[], Any] = lambda: work.send(None)  # noqa: E731
    while True:
        try:
            waited = send()
        except StopIteration as end:
            return end.value
        reached.append(len(reached) + 1)
        if len(reached) == at:
            if moment is Moment.WAITING or waited is None:  # None: sleep(0), which has no future
                task.cancel()
            else:
                # Before the task's own callback, which is added when it sees the future.
                waited.add_done_callback(lambda _: task.cancel())
        try:
            # A future says that it is awaited by a flag that the task looks at; it was passed on unchanged.
            yield waited
        except BaseException as error:  # noqa: BLE001  thrown in by the task: the work's to handle
            send = partial(work.throw, error)
        else:
            send = partial(work.send, None)


async def cancelled_at(
    work: Coroutine[Any, Any, Any], at: int, moment: Moment
) -> tuple[asyncio.Task[Any], bool]:
    """The ended task of `work`, and whether it reached the suspension at which it was cancelled."""
    reached: list[int] = []

    async def run() -> Any:
        return await _driven(work, at, moment, reached)

    task = asyncio.create_task(run(), name=f"cancelled at {at} {moment.value}")
    await asyncio.wait([task])
    return task, len(reached) >= at


async def at_each_suspension(
    make: Callable[[], Coroutine[Any, Any, Any]],
    after: Callable[[], Awaitable[None]],
    *,
    moments: tuple[Moment, ...] = tuple(Moment),
    may_raise: tuple[type[BaseException], ...] = (),
) -> int:
    """Runs `make()` once for each point and moment, and `after()` behind each; how many points there are.

    A run that outlives its cancellation may return; one that raises something else fails, but for `may_raise`.
    """
    num_points = 0
    for moment in moments:
        for at in itertools.count(1):
            assert at < MAX_POINTS, "this never ends by itself"
            task, was_reached = await cancelled_at(make(), at, moment)
            if not task.cancelled():
                error = task.exception()
                if error is not None and not isinstance(error, may_raise):
                    raise AssertionError(f"suspension {at}, cancelled {moment.value}") from error
            try:
                await after()
            except AssertionError as error:
                raise AssertionError(
                    f"left behind by suspension {at}, cancelled {moment.value}: {error}"
                ) from error
            if not was_reached:
                break
            num_points = max(num_points, at)
    return num_points
