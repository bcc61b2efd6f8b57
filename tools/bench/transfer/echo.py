"""A small control service in a process that also serves data: an asyncio loop that says back what it is told.

It stands for a node's control plane: what a call costs beside a data plane at full rate is what a match would cost.
"""

from __future__ import annotations

import asyncio
import socket
import threading

WORD_NBYTES = 64
START_TIMEOUT_S = 5.0


class EchoThread:
    """The service, on loopback, in a thread with an event loop of its own."""

    def __init__(self) -> None:
        """Serves when this returns."""
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="echo", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S):
            raise TimeoutError(f"the echo service did not start within {START_TIMEOUT_S:g} s")

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._closing = asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._closing.wait()
        server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(await reader.readexactly(WORD_NBYTES))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def close(self) -> None:
        """Ends the service and its thread."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(START_TIMEOUT_S)


class EchoCaller:
    """Calls it and waits for the answer, on a blocking socket."""

    def __init__(self, port: int) -> None:
        """Connects."""
        self._stream = socket.create_connection(("127.0.0.1", port), timeout=START_TIMEOUT_S)
        self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._word = bytes(WORD_NBYTES)

    def call(self) -> None:
        """One round trip."""
        self._stream.sendall(self._word)
        got = 0
        while got < WORD_NBYTES:
            received = len(self._stream.recv(WORD_NBYTES - got))
            if not received:
                raise ConnectionError("the echo service is gone")
            got += received

    def close(self) -> None:
        """Closes the connection."""
        self._stream.close()
