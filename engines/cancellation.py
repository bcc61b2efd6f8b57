"""Waiting for what must not be left half done.

Rules kept here: memory that a thread or a transfer still touches is not given back. Whoever is
cancelled while such work is under way waits for its end, and is cancelled then.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable

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
