"""Tasks: waiting for what must not be left half done, and ending what runs beside.

Rules kept here: memory that a thread or a transfer still touches is not given back. Whoever is
cancelled while such work is under way waits for its end, and is cancelled then. A task that runs
beside a process has an owner who ends it, and who ends with it if it fails.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine
    from types import TracebackType

T = TypeVar("T")


async def outlast(work: Awaitable[T]) -> T:
    """Awaits `work` to its end even when cancelled meanwhile; the cancellation comes after it.

    `work` must end by itself in bounded time. Its result or error is lost where the waiter was
    cancelled.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # looked at, or asyncio complains of an error that nobody saw
        raise cancelled
    return task.result()


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Waits until tasks that were cancelled are over, however often their owner is cancelled meanwhile.

    What became of them is nobody's business any more.
    """
    try:
        if not all(task.done() for task in tasks):
            await outlast(asyncio.wait(tasks))
    finally:
        for task in tasks:
            if not task.cancelled():
                task.exception()  # looked at, or asyncio complains of an error that nobody saw


class Background:
    """Tasks of a process that run until it ends; an async context manager that ends them.

    Not a TaskGroup: an error of the block must leave it as it is, not wrapped in a group.
    """

    def __init__(self) -> None:
        """No task yet."""
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, work: Coroutine[object, object, None], name: str) -> None:
        """Runs `work` beside the block."""
        self._tasks.append(asyncio.create_task(work, name=name))

    async def until(self, event: Awaitable[None]) -> None:
        """Waits for `event`; a task that ends before is a failure, raised here."""
        waiting = asyncio.ensure_future(event)
        try:
            await asyncio.wait([waiting, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return
            for task in self._tasks:
                if task.done():
                    task.result()
                    raise RuntimeError(f"task {task.get_name()!r} ended by itself")
        finally:
            waiting.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in reversed(self._tasks):
            task.cancel()
        if self._tasks:
            await outlast(asyncio.wait(self._tasks))
