"""A TCP relay that lets bytes wait: a slow network, or a slow store, for those who connect through it.

Rules kept here: bytes keep their order, and leave `delay_s` after they came, in both directions; it runs on the loop of
whoever opened it, and closing it ends every connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHUNK_NBYTES = 64 << 10


class Relay:
    """One listening relay.

    Attributes:
        address: `host:port` to connect to.
        delay_s: of each direction; may be changed at any time.
    """

    def __init__(self, target: str) -> None:
        """Use `relaying`."""
        self.address = ""
        self.delay_s = 0.0
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        task = asyncio.current_task()
        assert task is not None, "asyncio serves each connection in a task"
        self._tasks.add(task)
        # Cancelled by `close` alone; asyncio, which owns the task, would log that as an error.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._carry_both(reader, writer)
        self._tasks.discard(task)
        writer.close()

    async def close(self) -> None:
        """Ends every connection."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_both(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        ways = [
            asyncio.create_task(self._carry(reader, back)),
            asyncio.create_task(self._carry(there, writer)),
        ]
        try:
            await asyncio.wait(ways)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            back.close()

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                came_at_s, data = await waiting.get()
                await asyncio.sleep(max(0.0, came_at_s + self.delay_s - loop.time()))
                target.write(data)
                await target.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while data := await source.read(CHUNK_NBYTES):
                waiting.put_nowait((loop.time(), data))
        finally:
            delivering.cancel()
            await asyncio.wait([delivering])
            target.close()


@contextlib.asynccontextmanager
async def relaying(target: str) -> AsyncIterator[Relay]:
    """A relay to `target` on a loopback port of its own."""
    relay = Relay(target)
    server = await asyncio.start_server(relay.serve_one, "127.0.0.1", 0)
    relay.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield relay
    finally:
        server.close()
        await relay.close()
