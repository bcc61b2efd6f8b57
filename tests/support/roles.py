"""Roles inside the test's own event loop: started as in a process, stopped at the end."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass

from snowskin.kvstore.role import Stop


@dataclass
class RunningRole:
    """A role that serves: what it announced, and how to end it."""

    facts: dict
    stop: Stop
    task: asyncio.Task

    async def end(self) -> None:
        """Drains and returns when the role has ended; raises what it failed with."""
        self.stop.set("test")
        await self.task


async def _announced(fd: int, task: asyncio.Task) -> dict:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def on_readable() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(fd, on_readable)
    try:
        async with asyncio.timeout(20):
            await asyncio.wait([readable, task], return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(fd)
    if task.done():
        task.result()
    facts: dict = json.loads(os.read(fd, 65536))
    return facts


@asynccontextmanager
async def running(serve, settings_class, **settings):
    """A role that is ready; on leaving it is stopped and awaited."""
    reader, writer = os.pipe()
    stop = Stop()
    task = asyncio.create_task(serve(settings_class(ready_fd=writer, **settings), stop))
    try:
        try:
            facts = await _announced(reader, task)
        except BaseException:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        yield RunningRole(facts, stop, task)
    finally:
        stop.set("test")
        await asyncio.wait([task])
    task.result()
