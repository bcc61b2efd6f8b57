"""A relay between a reader and an owner: delays, limits, holds, cuts, resets and corrupts, on command.

Rules kept here: it knows no frames, only bytes by their position in a connection, so whoever knows the frames says
where; `UP` is from who connected to who listens behind it, `DOWN` the way back; while it is cut it passes nothing and
tells nobody, as a cable does; whatever it does is done for all connections alike.

`Relay` runs in a thread of the test. `RelayProcess` is the same in a process of its own, in a namespace where wanted:
`python -m tests.support.relay '{"target": ["10.77.0.1", 4711]}'`, commands by lines of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[2]
UP, DOWN = "up", "down"
READ_NBYTES = 256 * 1024
BUFFER_NBYTES = 256 * 1024  # of the kernel, for each of its sockets: what a hold lets come near
QUEUE_NBYTES = 2 << 20  # under way in one direction: what a delay may hold
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
PATIENCE_S = 5.0
END = b""


class RelayCore:
    """The relay itself, on one event loop; everything but `start` may be called from any thread."""

    def __init__(self, target: Sequence[Any], listen: Sequence[Any] = ("127.0.0.1", 0)) -> None:
        self.target = tuple(target)
        family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET
        self._listener = socket.create_server(tuple(listen), family=family, backlog=512)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_NBYTES)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.delay_s = 0.0
        self.bytes_per_s = 0.0
        self.is_cut = False
        self.hold_at: dict[str, int] = {}
        self.flip_at: dict[str, set[int]] = defaultdict(set)
        self.passed = {UP: 0, DOWN: 0}
        self.num_accepted = 0
        self.held = threading.Event()  # something waits at `hold_at`
        self._changed: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._links: dict[asyncio.Task[None], tuple[socket.socket, socket.socket]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Relays until `stop`."""
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        accepting = asyncio.create_task(self._accept())
        await stop.wait()
        self._listener.close()
        tasks = [accepting, *self._links]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def command(self, do: str, **values: Any) -> None:
        """One of `shape`, `cut`, `heal`, `hold`, `let_go`, `flip`, `reset`, `aim`."""
        getattr(self, do)(**values)
        self._loop.call_soon_threadsafe(self._wake)

    def shape(self, delay_s: float = 0.0, bytes_per_s: float = 0.0) -> None:
        """What passes from now on comes so much later, and at most so fast in each direction."""
        self.delay_s, self.bytes_per_s = delay_s, bytes_per_s

    def cut(self) -> None:
        """Nothing passes, nobody is told."""
        self.is_cut = True

    def heal(self) -> None:
        """What waited goes on."""
        self.is_cut = False

    def hold(self, direction: str, at: int) -> None:
        """Each connection stops before its byte number `at` of this direction; `held` tells of it."""
        self.held.clear()
        self.hold_at[direction] = at

    def let_go(self) -> None:
        """Ends every hold."""
        self.hold_at.clear()
        self.held.clear()

    def flip(self, direction: str, at: int) -> None:
        """The lowest bit of this byte of each connection arrives wrong."""
        self.flip_at[direction].add(at)

    def aim(self, target: Sequence[Any]) -> None:
        """New connections go there: an owner that came back has another port."""
        self.target = tuple(target)

    def reset(self) -> None:
        """All connections end with a reset on both sides."""

        def reset_all() -> None:
            for task, ends in self._links.items():
                _close_with_reset(*ends)
                task.cancel()

        self._loop.call_soon_threadsafe(reset_all)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _accept(self) -> None:
        while True:
            near, _ = await self._loop.sock_accept(self._listener)
            self.num_accepted += 1
            far = socket.socket(socket.AF_INET6 if ":" in self.target[0] else socket.AF_INET)
            task = asyncio.create_task(self._serve(near, far))
            self._links[task] = (near, far)
            task.add_done_callback(self._links.pop)

    async def _serve(self, near: socket.socket, far: socket.socket) -> None:
        try:
            for end in (near, far):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_NBYTES)
            while self.is_cut:
                await self._changed.wait()
            await self._loop.sock_connect(far, self.target)
            async with asyncio.TaskGroup() as ways:
                for direction, source, sink in ((UP, near, far), (DOWN, far, near)):
                    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(
                        QUEUE_NBYTES // READ_NBYTES
                    )
                    ways.create_task(self._take(source, queue))
                    ways.create_task(self._give(direction, queue, sink))
        except* OSError:  # a reset on one side is one on the other; also where nobody listens
            _close_with_reset(near, far)
        finally:
            near.close()
            far.close()

    async def _take(self, source: socket.socket, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        while data := await self._loop.sock_recv(source, READ_NBYTES):
            await queue.put((self._loop.time() + self.delay_s, data))
        await queue.put((self._loop.time() + self.delay_s, END))

    async def _give(
        self, direction: str, queue: asyncio.Queue[tuple[float, bytes]], sink: socket.socket
    ) -> None:
        position = 0
        while True:
            due_s, data = await queue.get()
            await asyncio.sleep(due_s - self._loop.time())
            if data is END:
                await self._may_pass(direction, position)
                with contextlib.suppress(OSError):
                    sink.shutdown(socket.SHUT_WR)
                return
            view = memoryview(self._flipped(direction, position, data))
            while view:
                nbytes = await self._may_pass(direction, position)
                part, view = view[:nbytes], view[nbytes:]
                began_s = self._loop.time()
                position += len(part)
                self.passed[direction] += len(part)  # before, or whoever gets it counts less
                await self._loop.sock_sendall(sink, part)
                if self.bytes_per_s:
                    await asyncio.sleep(began_s + len(part) / self.bytes_per_s - self._loop.time())

    async def _may_pass(self, direction: str, position: int) -> int:
        """Waits while nothing may; how many bytes then."""
        while True:
            room = self.hold_at.get(direction, 1 << 62) - position
            if not self.is_cut and room > 0:
                return min(room, 64 * 1024 if self.bytes_per_s else room)
            if not self.is_cut:
                self.held.set()
            await self._changed.wait()

    def _flipped(self, direction: str, position: int, data: bytes) -> bytes:
        places = [at - position for at in self.flip_at[direction] if 0 <= at - position < len(data)]
        if not places:
            return data
        changed = bytearray(data)
        for place in places:
            changed[place] ^= 1
        return bytes(changed)


def _close_with_reset(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


class Relay(RelayCore):
    """The relay in a thread; `with` ends it."""

    def __enter__(self) -> Relay:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(ready,), name="relay")
        self._thread.start()
        assert ready.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)

    def _main(self, ready: threading.Event) -> None:
        async def run() -> None:
            self._stop = asyncio.Event()
            asyncio.get_running_loop().call_soon(ready.set)
            await self.run(self._stop)

        asyncio.run(run())

    def wait_held(self, within_s: float = PATIENCE_S) -> None:
        assert self.held.wait(within_s), f"nothing came to {self.hold_at}; passed {self.passed}"


class RelayProcess:
    """The relay in a process, in `host` if one is named; `with` ends it."""

    def __init__(
        self,
        target: Sequence[Any],
        listen: Sequence[Any] = ("127.0.0.1", 0),
        command: Callable[..., list[str]] = lambda *arguments: list(arguments),
    ) -> None:
        arguments = json.dumps({"target": list(target), "listen": list(listen)})
        self.process = subprocess.Popen(
            command(sys.executable, "-m", "tests.support.relay", arguments),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()  # the test's own time-out bounds it
        assert line, "the relay did not start"
        self.address: tuple[str, int] = tuple(json.loads(line)["address"])

    def command(self, do: str, **values: Any) -> dict[str, Any]:
        """As `RelayCore.command`; what passed so far."""
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.process.stdin.close()
        self.process.stdout.close()


def main(arguments: dict[str, Any]) -> None:
    """Serves until its standard input ends, as it does when the test dies."""
    with Relay(arguments["target"], arguments["listen"]) as relay:
        print(json.dumps({"address": relay.address}), flush=True)
        for line in sys.stdin:
            relay.command(**json.loads(line))
            print(json.dumps({"passed": relay.passed, "at_s": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
