"""Ctrl-C, SIGTERM and a closed terminal, for commands that own child processes.

Rules kept here: the first signal cancels the command's work, whose `async with` blocks clean up; each further one
cancels it once more, which a `LocalCluster` takes as "stop now". The process never ends before its cleaning is done.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

Result = TypeVar("Result")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal ended the work; `number` is the first one's."""

    def __init__(self, number: signal.Signals) -> None:
        """Keeps the number: a shell wants 128 + number as the exit status."""
        super().__init__(number.name)
        self.number = number


async def _interruptible(work: Coroutine[Any, Any, Result]) -> Result:
    loop = asyncio.get_running_loop()
    received: list[signal.Signals] = []
    task = asyncio.ensure_future(work)

    def on_signal(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    await asyncio.wait((task,))
    # The handlers stay: a late signal must not end the process by its default action.
    if task.cancelled() and received:
        raise Interrupted(received[0])
    return task.result()


def run_interruptible(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs `work` in an event loop of its own; call it from the main thread.

    Raises:
        Interrupted: a signal ended the work; it has cleaned up.
    """
    return asyncio.run(_interruptible(work))
