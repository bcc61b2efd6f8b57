"""The way through the local door, on an asyncio loop: calls on a Unix socket, bytes by shared memory.

Rules kept here: pools are mapped once, when the session opens, and unmapped when it ends. An answer that comes too late
is given back. When `move` returns or raises, nothing of it can land in a pool any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

from snowskin.kvstore.client.conversation import Conversation, giving_back, is_plain_release
from snowskin.kvstore.client.region_moves import until_settled
from snowskin.kvstore.client.ways import BY_THE_DOOR
from snowskin.kvstore.errors import BadSetting, DeadlineExceeded, NodeUnavailable
from snowskin.kvstore.frames import MAX_FRAME_NBYTES
from snowskin.kvstore.messages import Access, Greeting, Lease, ReplyMessage, Request
from snowskin.kvstore.release_board import ReleaseBoard
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.tracing import outgoing
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import SnowskinError, TransportClosed

if TYPE_CHECKING:
    from snowskin.kvstore.client.machine import Move
    from snowskin.kvstore.client.transports import ClientTransports
    from snowskin.transport.copying import AttachedMemory
    from snowskin.transport.shm import ShmTransport

# Not more: the C library takes fresh pages for larger buffers, on each call.
RECV_NBYTES = 64 << 10
MAX_DESCRIPTORS = 64
MAX_UNSENT_NBYTES = 4 * MAX_FRAME_NBYTES
CONNECT_LOOK_S = 0.01

log = get_logger(__name__)


def connect_socket(path: str, timeout_s: float) -> socket.socket:
    """A connected socket to a door, made on the calling thread; raises NodeUnavailable or BadSetting."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    door.settimeout(timeout_s)
    try:
        door.connect(path)
    except OSError as error:
        door.close()
        raise _not_connected(path, error) from error
    return door


async def _connect_socket(path: str, deadline_s: float) -> socket.socket:
    """The same without holding the loop: a stopped node's queue of connections may be full."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                door.connect(path)
            except BlockingIOError:  # a Unix socket does not tell when there is room again
                if time.monotonic() >= deadline_s:
                    raise
                await asyncio.sleep(CONNECT_LOOK_S)
            else:
                return door
    except BaseException as error:
        door.close()
        if isinstance(error, OSError):
            raise _not_connected(path, error) from error
        raise


def _not_connected(path: str, error: OSError) -> SnowskinError:
    if "too long" in str(error):
        return BadSetting(f"door path {path}: {error}", hint="use a shorter path")
    return NodeUnavailable(
        f"no node answers on {path}: {error.strerror or error}",
        hint="start one with `snowskin node --door PATH`, or check the path",
    )


def map_granted(
    transport: ShmTransport, greeting: Greeting, descriptors: list[int], access: Access
) -> tuple[dict[int, AttachedMemory], ReleaseBoard]:
    """Maps the pools that a greeting grants, and the release board; takes over and closes the descriptors."""
    try:
        if len(descriptors) != len(greeting.pools) + 1:
            raise NodeUnavailable(
                f"{len(descriptors)} descriptors came for {len(greeting.pools)} pools and a board",
                hint="raise the limit of open files (ulimit -n)",
            )
        pools = {
            pool.pool_id: transport.attach(
                RegionDescriptor.from_bytes(pool.region),
                fd=descriptor,
                writable=access is Access.WRITE,
            )
            for pool, descriptor in zip(greeting.pools, descriptors, strict=False)
        }
        return pools, ReleaseBoard(descriptors[-1])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


class DoorConnection:
    """A session on a local door."""

    way = BY_THE_DOOR

    def __init__(
        self,
        door: socket.socket,
        conversation: Conversation,
        transport: ShmTransport,
        pools: dict[int, AttachedMemory],
        board: ReleaseBoard,
    ) -> None:
        """Use `open`."""
        assert conversation.greeting is not None, "a connection begins after the greeting"
        self.node_id = conversation.greeting.node_id
        self.node_epoch = conversation.greeting.node_epoch
        self._door = door
        self._conversation = conversation
        self._transport = transport
        self._pools = pools
        self._board = board
        self._waiting: dict[int, asyncio.Future[ReplyMessage]] = {}
        self._unsent = bytearray()
        self._open = True
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(door.fileno(), self._on_readable)

    @classmethod
    async def open(
        cls,
        path: str,
        client_name: str,
        access: Access,
        transports: ClientTransports,
        *,
        timeout_s: float,
    ) -> DoorConnection:
        """Connects, greets, maps the pools."""
        conversation = Conversation()
        transport = transports.new_map()
        loop = asyncio.get_running_loop()
        door = await _connect_socket(path, time.monotonic() + timeout_s)
        descriptors: list[int] = []
        try:
            async with asyncio.timeout(timeout_s):
                await loop.sock_sendall(door, conversation.hello(client_name, access))
                greeting = None
                while greeting is None:
                    data, received = await _receive_with_descriptors(door)
                    descriptors += received
                    if not data:
                        raise NodeUnavailable(
                            f"the node on {path} closed the connection", hint="see the node's log"
                        )
                    greeting = conversation.greeted(data)
            taken, descriptors = descriptors, []
            pools, board = map_granted(transport, greeting, taken, access)
            return cls(door, conversation, transport, pools, board)
        except BaseException as error:
            door.close()
            transport.close()
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(error, TimeoutError):
                raise NodeUnavailable(
                    f"the node on {path} did not greet within {timeout_s} s",
                    hint="it is stopped or overloaded",
                ) from error
            if isinstance(error, OSError):
                raise NodeUnavailable(
                    f"the node on {path} did not greet: {error}", hint="see the node's log"
                ) from error
            raise

    @property
    def connected(self) -> bool:
        """False once the connection broke or was closed."""
        return self._open

    async def call(
        self, request: Request, *, timeout_s: float, lease: Lease | None, request_id: str
    ) -> ReplyMessage:
        """One call and its answer."""
        call_id, data = self._conversation.call(request, request_id, outgoing())
        future: asyncio.Future[ReplyMessage] = self._loop.create_future()
        self._waiting[call_id] = future
        timer = self._loop.call_later(timeout_s, self._on_late, call_id, timeout_s)
        try:
            self._send(data)
            return await future
        except BaseException:
            self._drop(future)
            raise
        finally:
            timer.cancel()
            self._waiting.pop(call_id, None)
            if (unwanted := self._conversation.forget(call_id)) and self._open:
                with contextlib.suppress(NodeUnavailable):
                    self._send(unwanted)

    def tell(self, request: Request, *, lease: Lease, request_id: str) -> None:
        """A call that wants no answer."""
        if self._open and is_plain_release(request) and self._board.post(lease.id):
            return
        self._send(self._conversation.tell(request, request_id))

    async def move(self, step: Move, *, request_id: str) -> None:
        """Copies between local memory and the mapped pools."""
        deadline_s = time.monotonic() + step.timeout_s
        for pool_id, runs in step.runs:
            pool = self._pools.get(pool_id)
            if pool is None:
                raise NodeUnavailable(
                    f"the node speaks of pool {pool_id}, which it did not pass",
                    hint="connect again",
                )
            try:
                if step.is_push:
                    copying = self._transport.push_async(
                        step.local, pool, runs, deadline_s=deadline_s, landed=step.landed,
                        traffic=step.traffic,
                    )  # fmt: skip
                else:
                    copying = self._transport.pull_async(
                        pool, step.local, runs, deadline_s=deadline_s, landed=step.landed,
                        traffic=step.traffic,
                    )  # fmt: skip
                await until_settled(copying, pool.memory if step.is_push else step.local)
            except TransportClosed as error:
                if self._open:  # then it is the caller's own region that was closed
                    raise
                raise NodeUnavailable(
                    f"the connection to node {self.node_id} ended during a copy",
                    hint="connect again",
                ) from error

    def _drop(self, future: asyncio.Future[ReplyMessage]) -> None:
        """Its caller was cancelled in the same turn of the loop, after the answer had come."""
        if future.done() and not future.cancelled() and future.exception() is None:
            self._give_back(future.result())

    def _give_back(self, answer: ReplyMessage | SnowskinError) -> None:
        """Nobody takes this answer: the lease that came with it ends."""
        unwanted = giving_back(answer)
        if unwanted is not None and self._open:
            with contextlib.suppress(NodeUnavailable):
                self._send(self._conversation.tell(unwanted))

    async def close(self) -> None:
        """Ends the session; what waits fails with NodeUnavailable."""
        self._break("closed by this side")

    def _send(self, data: bytes) -> None:
        if not self._open:
            raise NodeUnavailable(
                f"the connection to node {self.node_id} is broken", hint="connect again"
            )
        if not self._unsent:
            try:
                sent = self._door.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._break(str(error))
                raise NodeUnavailable(
                    f"the connection to node {self.node_id} broke: {error}", hint="connect again"
                ) from error
            if sent == len(data):
                return
            data = data[sent:]
        self._unsent += data
        if len(self._unsent) > MAX_UNSENT_NBYTES:
            self._break("the node does not read")
            raise NodeUnavailable(f"node {self.node_id} does not read its calls")
        self._loop.add_writer(self._door.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        try:
            sent = self._door.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(str(error))
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._door.fileno())

    def _on_readable(self) -> None:
        try:
            data = self._door.recv(RECV_NBYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(str(error))
            return
        if not data:
            self._break("the node closed the connection")
            return
        try:
            answers, replies = self._conversation.receive(data)
            for reply in replies:
                self._send(reply)
        except SnowskinError as error:
            self._break(str(error))
            return
        for call_id, answer in answers:
            self._resolve(call_id, answer)

    def _resolve(self, call_id: int, answer: ReplyMessage | SnowskinError) -> None:
        future = self._waiting.pop(call_id, None)
        if future is None or future.done():
            # Its caller was cancelled in the same turn of the loop, before the answer came.
            self._give_back(answer)
            return
        if isinstance(answer, SnowskinError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _on_late(self, call_id: int, timeout_s: float) -> None:
        late = DeadlineExceeded(
            f"node {self.node_id} did not answer within {timeout_s:.3f} s",
            hint="it is stopped or overloaded",
        )
        self._resolve(call_id, late)

    def _let_pools_go(self) -> None:
        """Closes what is mapped; the kernel's part off the loop.

        Behind a node that died we are the last who map its pools, and pay for giving back their pages: 0.5 s a GiB.
        """
        mappings: list[object] = [pool.memory.owner for pool in self._pools.values()]
        self._transport.close()
        threading.Thread(target=unmap, args=(mappings,), name="snowskin-unmap", daemon=True).start()

    def _break(self, reason: str) -> None:
        if not self._open:
            return
        self._open = False
        log.debug("connection ended", node=self.node_id, reason=reason)
        self._loop.remove_reader(self._door.fileno())
        self._loop.remove_writer(self._door.fileno())
        # First the pools, which waits for a piece that is landing: when the node hears of the end, it gives our room
        # to others.
        self._let_pools_go()
        self._door.close()
        self._board.close()
        for call_id in list(self._waiting):
            lost = NodeUnavailable(
                f"the connection to node {self.node_id} ended: {reason}", hint="connect again"
            )
            self._resolve(call_id, lost)


def unmap(mappings: list[object]) -> None:
    """Lets go of what nobody uses any more, which unmaps it; on a thread that may be held up."""
    mappings.clear()


async def _receive_with_descriptors(door: socket.socket) -> tuple[bytes, list[int]]:
    """The next bytes of a non-blocking socket, and what descriptors came with them."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(
                door, RECV_NBYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            readable: asyncio.Future[None] = loop.create_future()
            loop.add_reader(door.fileno(), _set_once, readable)
            try:
                await readable
            finally:
                loop.remove_reader(door.fileno())
        else:
            return data, descriptors


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
