"""The blocking client of a node: `BlockingStoreClient`, on the caller's own thread.

Rules kept here: no event loop in a hidden thread, where each wake-up would wait for the GIL of a busy engine. One call
at a time; a second thread waits its turn. All else is as in `store`: the same flows, the same errors.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc

from snowskin.kvstore.client import machine
from snowskin.kvstore.client.door_connection import (
    MAX_DESCRIPTORS,
    RECV_NBYTES,
    connect_socket,
    map_granted,
)
from snowskin.kvstore.client.machine import (
    Call,
    Conversation,
    Done,
    FlowSettings,
    Move,
    Published,
    Pulled,
    Step,
    Tell,
    is_plain_release,
)
from snowskin.kvstore.client.rpc_connection import METHODS, Landing, check_local, chunks
from snowskin.kvstore.client.store import CALL_TIMEOUT_S, DOOR_PREFIX, MOVE_TIMEOUT_S
from snowskin.kvstore.errors import (
    ClientClosed,
    ClientForked,
    DeadlineExceeded,
    NodeUnavailable,
)
from snowskin.kvstore.messages import (
    Access,
    Lease,
    NodeStat,
    Probed,
    ProbeRequest,
    RenewRequest,
    ReplyMessage,
    Request,
    StatRequest,
)
from snowskin.kvstore.rpc import call_metadata, channel_options, translating
from snowskin.kvstore.wire import reply_from, request_to
from snowskin.transport.errors import SnowskinError, TransportClosed
from snowskin.transport.memory import MemoryRegion, region_of
from snowskin.transport.shm import ShmTransport
from snowskin.v1 import store_pb2, store_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from snowskin.kvstore.blocks import KeyColumn

ResultT = TypeVar("ResultT", Published, Pulled)


class BlockingConnection(Protocol):
    """A way to one node that holds the calling thread; see `store.Connection`."""

    node_id: str
    node_epoch: int
    connected: bool

    def call(
        self, request: Request, *, timeout_s: float, lease: Lease | None, request_id: str
    ) -> ReplyMessage:
        """One call and its answer."""

    def tell(self, request: Request, *, lease: Lease, request_id: str) -> None:
        """A call whose answer nobody needs."""

    def move(self, step: Move, *, request_id: str) -> None:
        """Copies bytes under a lease."""

    def interrupt(self) -> None:
        """Makes the call under way, on another thread, fail now; no other may follow."""

    def close(self) -> None:
        """Ends it; idempotent."""


class BlockingStoreClient:
    """A session with one node."""

    def __init__(self, connection: BlockingConnection, settings: FlowSettings) -> None:
        """Use `connect`."""
        self._connection = connection
        self._settings = settings
        self._pid = os.getpid()
        self._closed = False
        self._turn = threading.Lock()

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        client_name: str,
        access: Access = Access.WRITE,
        verify: bool = True,
        timeout_s: float = 2.0,
        call_timeout_s: float = CALL_TIMEOUT_S,
        move_timeout_s: float = MOVE_TIMEOUT_S,
        read_ttl_s: float = 0.0,
        write_ttl_s: float = 0.0,
    ) -> BlockingStoreClient:
        """Opens a session; arguments as `StoreClient.connect`."""
        connection: BlockingConnection
        if address.startswith(DOOR_PREFIX):
            connection = BlockingDoorConnection(
                address.removeprefix(DOOR_PREFIX), client_name, access, timeout_s=timeout_s
            )
        else:
            connection = BlockingRpcConnection(address, timeout_s=timeout_s)
        settings = FlowSettings(
            verify=verify,
            call_timeout_s=call_timeout_s,
            move_timeout_s=move_timeout_s,
            read_ttl_s=read_ttl_s,
            write_ttl_s=write_ttl_s,
        )
        return cls(connection, settings)

    @property
    def node_id(self) -> str:
        """Name of the node."""
        return self._connection.node_id

    @property
    def node_epoch(self) -> int:
        """New at each start of the node."""
        return self._connection.node_epoch

    @property
    def connected(self) -> bool:
        """False after a broken connection or `close`."""
        return not self._closed and self._connection.connected

    def register(self, buffer: npt.NDArray[np.uint8]) -> MemoryRegion:
        """`buffer` as memory that pulls land in and publishes read from; copies nothing."""
        return region_of(buffer)

    def publish(
        self,
        *,
        namespace: bytes,
        keys: KeyColumn,
        block_nbytes: int,
        local: MemoryRegion,
        local_offsets: Sequence[int],
        parent_key: bytes = b"",
        one_reader: bool = False,
        timeout_s: float = 0.0,
        request_id: str = "",
    ) -> Published:
        """Publishes consecutive blocks of one sequence; see `StoreClient.publish`."""
        flow = machine.publish(
            self._settings,
            namespace=namespace,
            keys=keys,
            parent_key=parent_key,
            block_nbytes=block_nbytes,
            local=local,
            local_offsets=local_offsets,
            one_reader=one_reader,
            timeout_s=timeout_s,
        )
        return self._run(flow, request_id)

    def publish_tail(
        self,
        *,
        namespace: bytes,
        tail_id: str,
        local: MemoryRegion,
        local_offset: int,
        nbytes: int,
        timeout_s: float = 0.0,
        request_id: str = "",
    ) -> Published:
        """Publishes the partial last block of one request; see `StoreClient.publish_tail`."""
        flow = machine.publish_tail(
            self._settings,
            namespace=namespace,
            tail_id=tail_id,
            local=local,
            local_offset=local_offset,
            nbytes=nbytes,
            timeout_s=timeout_s,
        )
        return self._run(flow, request_id)

    def pull(
        self,
        *,
        namespace: bytes,
        keys: KeyColumn,
        block_nbytes: int,
        local: MemoryRegion,
        local_offsets: Sequence[int],
        wait_blocks: int = 0,
        timeout_s: float = 0.0,
        request_id: str = "",
    ) -> Pulled:
        """Pulls the longest committed run from the first key on; see `StoreClient.pull`."""
        flow = machine.pull(
            self._settings,
            namespace=namespace,
            keys=keys,
            block_nbytes=block_nbytes,
            local=local,
            local_offsets=local_offsets,
            wait_blocks=wait_blocks,
            timeout_s=timeout_s,
        )
        return self._run(flow, request_id)

    def pull_tail(
        self,
        *,
        namespace: bytes,
        tail_id: str,
        nbytes: int,
        local: MemoryRegion,
        local_offset: int,
        timeout_s: float = 0.0,
        request_id: str = "",
    ) -> Pulled:
        """Pulls a tail, which frees it; see `StoreClient.pull_tail`."""
        flow = machine.pull_tail(
            self._settings,
            namespace=namespace,
            tail_id=tail_id,
            nbytes=nbytes,
            local=local,
            local_offset=local_offset,
            timeout_s=timeout_s,
        )
        return self._run(flow, request_id)

    def probe(
        self, *, namespaces: Sequence[bytes], keys: KeyColumn, request_id: str = ""
    ) -> Probed:
        """What of `keys` is committed in all `namespaces`; takes no lease."""
        reply = self._call(
            ProbeRequest(namespaces=tuple(namespaces), keys=keys), request_id=request_id
        )
        assert isinstance(reply, Probed), "the reply to a Probe is Probed"
        return reply

    def stat(self) -> NodeStat:
        """Counts and sizes of the node."""
        reply = self._call(StatRequest(), request_id="")
        assert isinstance(reply, NodeStat), "the reply to a Stat is NodeStat"
        return reply

    def close(self) -> None:
        """Ends the session, and with it all that it held; a call on another thread fails with NodeUnavailable."""
        if not self._closed:
            self._closed = True
            self._connection.interrupt()
            with self._turn:
                self._connection.close()

    def __enter__(self) -> BlockingStoreClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise ClientForked(
                f"this client was connected in process {self._pid}",
                hint="connect in each process for itself; start workers by spawn",
            )
        if self._closed:
            raise ClientClosed("this client is closed", hint="connect a new one")

    def _call(self, request: Request, *, request_id: str) -> ReplyMessage:
        self._check_usable()
        with self._turn:
            return self._connection.call(
                request, timeout_s=self._settings.call_timeout_s, lease=None, request_id=request_id
            )

    def _run(self, flow: Generator[Step, Done, ResultT], request_id: str) -> ResultT:
        self._check_usable()
        with self._turn:
            try:
                step = next(flow)
                while True:
                    try:
                        done = self._do(step, request_id)
                    except BaseException as error:  # noqa: BLE001  the flow gives its lease back, and raises it again
                        step = flow.throw(error)
                    else:
                        step = flow.send(done)
            except StopIteration as end:
                result: ResultT = end.value
                return result

    def _do(self, step: Step, request_id: str) -> Done:
        began_at_s = time.monotonic()
        reply: ReplyMessage | None = None
        match step:
            case Call(request=request, timeout_s=timeout_s, lease=lease):
                reply = self._connection.call(
                    request, timeout_s=timeout_s, lease=lease, request_id=request_id
                )
            case Move():
                self._connection.move(step, request_id=request_id)
            case Tell(request=request, lease=lease):
                with contextlib.suppress(NodeUnavailable):
                    self._connection.tell(request, lease=lease, request_id=request_id)
        return Done(reply, began_at_s, time.monotonic())


class _Renewing:
    """Calls `renew` from between two pieces of a long copy, each time a third of the lease's life is over."""

    def __init__(self, step: Move, renew: Any) -> None:
        self._step = step
        self._renew = renew
        self._every_s = step.lease.ttl_s / 3
        self._due_s = time.monotonic() + self._every_s

    def landed(self, offset: int, nbytes: int) -> None:
        if self._step.landed is not None:
            self._step.landed(offset, nbytes)
        now_s = time.monotonic()
        if now_s >= self._due_s:
            self._due_s = now_s + self._every_s
            self._renew(self._step.lease)


class BlockingDoorConnection:
    """A session on a local door."""

    def __init__(self, path: str, client_name: str, access: Access, *, timeout_s: float) -> None:
        """Connects, greets, maps the pools."""
        self._conversation = Conversation()
        self._transport = ShmTransport()
        self._door = connect_socket(path, timeout_s)
        descriptors: list[int] = []
        try:
            self._door.sendall(self._conversation.hello(client_name, access))
            greeting = None
            while greeting is None:
                data, received, _, _ = socket.recv_fds(
                    self._door, RECV_NBYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
                descriptors += received
                if not data:
                    raise NodeUnavailable(
                        f"the node on {path} closed the connection", hint="see the node's log"
                    )
                greeting = self._conversation.greeted(data)
            taken, descriptors = descriptors, []
            self._pools, self._board = map_granted(self._transport, greeting, taken, access)
        except BaseException as error:
            self._door.close()
            self._transport.close()
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(error, OSError):
                raise NodeUnavailable(
                    f"the node on {path} did not greet: {error}", hint="see the node's log"
                ) from error
            raise
        self.node_id, self.node_epoch = greeting.node_id, greeting.node_epoch
        self.connected = True
        self._timeout_s: float | None = timeout_s

    def call(
        self, request: Request, *, timeout_s: float, lease: Lease | None, request_id: str
    ) -> ReplyMessage:
        """One call and its answer."""
        call_id, data = self._conversation.call(request, request_id)
        deadline_s = time.monotonic() + timeout_s
        try:
            self._send(data, timeout_s)
            while True:
                answers = self._receive(deadline_s, timeout_s)
                for answered, answer in answers:
                    if answered != call_id:
                        continue
                    if isinstance(answer, SnowskinError):
                        raise answer
                    return answer
        finally:
            self._conversation.forget(call_id)

    def tell(self, request: Request, *, lease: Lease, request_id: str) -> None:
        """A call that wants no answer."""
        if self.connected and is_plain_release(request) and self._board.post(lease.id):
            return
        self._send(self._conversation.tell(request, request_id), CALL_TIMEOUT_S)

    def move(self, step: Move, *, request_id: str) -> None:
        """Copies between local memory and the mapped pools, on this thread."""
        deadline_s = time.monotonic() + step.timeout_s
        landed = step.landed
        if step.timeout_s > step.lease.ttl_s / 3:
            landed = _Renewing(step, self._renew).landed
        for pool_id, runs in step.runs:
            pool = self._pools.get(pool_id)
            if pool is None:
                raise NodeUnavailable(
                    f"the node speaks of pool {pool_id}, which it did not pass",
                    hint="connect again",
                )
            try:
                if step.is_push:
                    self._transport.push(
                        step.local, pool, runs, deadline_s=deadline_s, landed=landed
                    )
                else:
                    self._transport.pull(
                        pool, step.local, runs, deadline_s=deadline_s, landed=landed
                    )
            except TransportClosed as error:
                if not self._transport.closed:  # then it is the caller's own region that was closed
                    raise
                raise NodeUnavailable(
                    f"the client of node {self.node_id} was closed during a copy"
                ) from error

    def interrupt(self) -> None:
        """Wakes the thread that waits for an answer, and lets no further piece land."""
        with contextlib.suppress(OSError):  # broken already
            self._door.shutdown(socket.SHUT_RDWR)
        self._transport.close()

    def close(self) -> None:
        """Ends the session."""
        if self.connected:
            self.connected = False
            self._door.close()
            self._transport.close()
            self._board.close()

    def _renew(self, lease: Lease) -> None:
        self.tell(
            RenewRequest(lease_ids=(lease.id,), ttl_s=lease.ttl_s), lease=lease, request_id=""
        )

    def _set_timeout(self, timeout_s: float) -> None:
        if timeout_s != self._timeout_s:  # a system call saved
            self._door.settimeout(timeout_s)
            self._timeout_s = timeout_s

    def _send(self, data: bytes, timeout_s: float) -> None:
        if not self.connected:
            raise NodeUnavailable(
                f"the connection to node {self.node_id} is broken", hint="connect again"
            )
        self._set_timeout(timeout_s)
        try:
            self._door.sendall(data)
        except OSError as error:
            # A part may be out: the stream cannot be used any more.
            self.close()
            raise NodeUnavailable(
                f"the connection to node {self.node_id} broke: {error}", hint="connect again"
            ) from error

    def _receive(self, deadline_s: float, timeout_s: float) -> list[machine.Answer]:
        left_s = deadline_s - time.monotonic()
        try:
            if left_s <= 0:
                raise TimeoutError
            # The first wait of a call may use the timeout that is set already.
            self._set_timeout(timeout_s if left_s > 0.99 * timeout_s else left_s)
            data = self._door.recv(RECV_NBYTES)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"node {self.node_id} did not answer within {timeout_s:.3f} s",
                hint="it is stopped or overloaded",
            ) from error
        except OSError as error:
            self.close()
            raise NodeUnavailable(
                f"the connection to node {self.node_id} broke: {error}", hint="connect again"
            ) from error
        if not data:
            self.close()
            raise NodeUnavailable(
                f"node {self.node_id} closed the connection", hint="connect again"
            )
        try:
            answers, replies = self._conversation.receive(data)
        except SnowskinError:
            self.close()
            raise
        for reply in replies:
            self._send(reply, CALL_TIMEOUT_S)
        return answers


class BlockingRpcConnection:
    """A node reached by gRPC."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        """Connects and asks the node who it is."""
        self.address = address
        self._channel = grpc.insecure_channel(address, options=channel_options())
        self._stub: Any = store_pb2_grpc.StoreStub(self._channel)
        self.connected = True
        try:
            with translating(f"node {address}"):
                stat = self._stub.Stat(store_pb2.StatRequest(), timeout=timeout_s)
        except BaseException:
            self.close()
            raise
        self.node_id, self.node_epoch = stat.node_id, stat.node_epoch

    def call(
        self, request: Request, *, timeout_s: float, lease: Lease | None, request_id: str
    ) -> ReplyMessage:
        """One call and its answer."""
        name, message = request_to(request, lease.capability if lease else b"")
        with self._translating():
            response = getattr(self._stub, METHODS[name])(
                message, timeout=timeout_s, metadata=call_metadata(request_id)
            )
        return reply_from(name, response, self.node_id)

    def tell(self, request: Request, *, lease: Lease, request_id: str) -> None:
        """A call whose answer nobody needs; without it the lease would only run out."""
        with contextlib.suppress(SnowskinError):
            self.call(request, timeout_s=CALL_TIMEOUT_S, lease=lease, request_id=request_id)

    def move(self, step: Move, *, request_id: str) -> None:
        """Streams bytes through the slow path."""
        check_local(step)
        metadata = call_metadata(request_id)
        if step.timeout_s > step.lease.ttl_s / 3:
            step = replace(step, landed=_Renewing(step, self._renew).landed)
        with self._translating():
            if step.is_push:
                self._stub.Write(chunks(step), timeout=step.timeout_s, metadata=metadata)
                return
            landing = Landing(step)
            stream = self._stub.Read(landing.request, timeout=step.timeout_s, metadata=metadata)
            try:
                for chunk in stream:
                    landing.land(chunk)
            except BaseException:
                stream.cancel()
                raise
            landing.finish()

    def interrupt(self) -> None:
        """Cancels the call under way."""
        self.close()

    def close(self) -> None:
        """Closes the channel."""
        if self.connected:
            self.connected = False
            self._channel.close()

    def _renew(self, lease: Lease) -> None:
        # Its answer is not waited for: this thread has bytes to move, and a copy whose lease ran out fails.
        _, message = request_to(
            RenewRequest(lease_ids=(lease.id,), ttl_s=lease.ttl_s), lease.capability
        )
        self._stub.Renew.future(message, timeout=CALL_TIMEOUT_S)

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            with translating(f"node {self.address}"):
                yield
        except (SnowskinError, ValueError) as error:
            if self.connected:
                raise
            # A closed channel says CANCELLED, or ValueError.
            raise NodeUnavailable(
                f"the channel to {self.address} was closed during the call"
            ) from error
