"""The way to another host, on an asyncio loop: calls by RPC, bytes by the node's data plane.

Rules kept here: a lease is proved by its capability. Where node and client share no transport, and none was demanded,
bytes go by the Read and Write streams: in the order of the lease's blocks, landing piece by piece and checked as they
land, as on the fast path.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import grpc.aio

from snowskin.kvstore.client.region_moves import RegionMoves
from snowskin.kvstore.client.transports import check_may_crawl
from snowskin.kvstore.errors import NodeUnavailable, ProtocolViolation
from snowskin.kvstore.rpc import call_metadata, header_text, open_channel, translating
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.wire import reply_from, request_to, stat_from
from snowskin.transport.errors import (
    RegionReadOnly,
    SnowskinError,
    TransportClosed,
)
from snowskin.transport.runs import check_bounds
from snowskin.v1 import common_pb2, store_pb2, store_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from snowskin.kvstore.client.machine import Move
    from snowskin.kvstore.client.transports import ClientTransports
    from snowskin.kvstore.messages import Lease, ReplyMessage, Request
    from snowskin.transport.choice import Choice

CHUNK_NBYTES = 1 << 20
ANY_NBYTES = 1 << 64
TELL_TIMEOUT_S = 1.0

METHODS = {
    "reserve": "Reserve",
    "commit": "Commit",
    "abort": "Abort",
    "probe": "Probe",
    "match": "Match",
    "renew": "Renew",
    "release": "Release",
    "stat": "Stat",
}

log = get_logger(__name__)


def check_local(step: Move) -> None:
    """Refuses a move that local memory cannot take or give, before a byte is sent."""
    if step.local.closed:
        raise TransportClosed("the local region is closed")
    if not step.is_push and not step.local.writable:
        raise RegionReadOnly(
            f"the landing region of {step.local.nbytes} bytes is read-only",
            hint="register it with writable=True",
        )
    for _, runs in step.runs:
        # The node's side was checked by the node, which granted it.
        check_bounds(runs, remote_nbytes=ANY_NBYTES, local_nbytes=step.local.nbytes)


def chunks(step: Move) -> Iterator[store_pb2.WriteRequest]:
    """What a push sends: the bytes of its runs end to end, in chunks; each is checked as it leaves."""
    ref = common_pb2.LeaseRef(id=step.lease.id, capability=step.lease.capability)
    offset = 0
    for _, runs in step.runs:
        for _, start, nbytes in runs:
            for piece in range(start, start + nbytes, CHUNK_NBYTES):
                length = min(CHUNK_NBYTES, start + nbytes - piece)
                data = step.local.buffer[piece : piece + length].tobytes()
                if step.landed is not None:
                    step.landed(piece, length)
                yield store_pb2.WriteRequest(lease=ref, offset=offset, data=data)
                offset += length


class Landing:
    """Puts the chunks of a Read stream where a pull wants them."""

    def __init__(self, step: Move) -> None:
        """Nothing landed yet."""
        self._step = step
        self._places = [(start, nbytes) for _, runs in step.runs for _, start, nbytes in runs]
        self._place = 0
        self._inside = 0
        self._offset = 0

    @property
    def request(self) -> store_pb2.ReadRequest:
        """The call that brings all of it."""
        lease = self._step.lease
        return store_pb2.ReadRequest(
            lease=common_pb2.LeaseRef(id=lease.id, capability=lease.capability)
        )

    def land(self, chunk: store_pb2.ReadResponse) -> None:
        """One chunk came."""
        if chunk.offset != self._offset:
            raise ProtocolViolation(
                f"bytes from {chunk.offset} came, those from {self._offset} were due"
            )
        data = memoryview(chunk.data)
        self._offset += len(data)
        while data:
            if self._place == len(self._places):
                raise ProtocolViolation(f"{len(data)} bytes more came than the lease covers")
            start, nbytes = self._places[self._place]
            length = min(len(data), nbytes - self._inside)
            begin = start + self._inside
            self._step.local.view[begin : begin + length] = data[:length]
            if self._step.landed is not None:
                self._step.landed(begin, length)
            data = data[length:]
            self._inside += length
            if self._inside == nbytes:
                self._place, self._inside = self._place + 1, 0

    def finish(self) -> None:
        """The stream ended: all must be there."""
        if self._place != len(self._places):
            raise NodeUnavailable(
                f"the stream of lease {self._step.lease.id} ended after {self._offset} bytes",
                hint="pull again",
            )


class RpcConnection:
    """A node reached by gRPC."""

    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        client_name: str,
        transports: ClientTransports,
    ) -> None:
        """Use `open`."""
        self.address = address
        self._client = header_text(client_name)
        self.node_id = ""
        self.node_epoch = 0
        self._channel = channel
        self._stub: Any = store_pb2_grpc.StoreStub(channel)
        self._open = True
        self._telling: set[asyncio.Task[None]] = set()
        self._transports = transports
        self._moves = RegionMoves(transports, node=f"node {address}")

    @classmethod
    async def open(
        cls, address: str, client_name: str, transports: ClientTransports, *, timeout_s: float
    ) -> RpcConnection:
        """Connects and asks the node who it is; the node counts what `client_name` leases as one client's.

        Raises:
            NodeUnavailable: nobody answers. TransportUnavailable: the node does not serve what was demanded.
        """
        connection = cls(address, open_channel(address), client_name, transports)
        try:
            with translating(f"node {address}"):
                response = await connection._stub.Stat(store_pb2.StatRequest(), timeout=timeout_s)
            stat = stat_from(response)
            await asyncio.to_thread(connection._moves.meet, stat)
        except BaseException:
            await connection.close()
            raise
        connection.node_id, connection.node_epoch = stat.node_id, stat.node_epoch
        return connection

    @property
    def way(self) -> Choice:
        """How what lies in host memory travels, and why."""
        return self._moves.way

    @property
    def connected(self) -> bool:
        """False once closed; a gRPC channel mends itself."""
        return self._open

    async def call(
        self, request: Request, *, timeout_s: float, lease: Lease | None, request_id: str
    ) -> ReplyMessage:
        """One call and its answer."""
        request = self._moves.naming_schemes(request)
        name, message = request_to(request, lease.capability if lease else b"")
        method = getattr(self._stub, METHODS[name])
        metadata = call_metadata(request_id, client=self._client)
        # Cancelling cancels the call on the node too; a lease that it had just granted has then no holder and runs
        # out: gRPC cannot say which of the two happened.
        with self._translating():
            response = await method(message, timeout=timeout_s, metadata=metadata)
        return reply_from(name, response, self.node_id)

    def tell(self, request: Request, *, lease: Lease, request_id: str) -> None:
        """A call whose answer nobody needs; a failure is logged."""
        if not self._open:
            raise NodeUnavailable(f"the channel to {self.address} is closed")
        task = asyncio.get_running_loop().create_task(self._tell(request, lease, request_id))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def move(self, step: Move, *, request_id: str) -> None:
        """Moves bytes by the data plane, or, where it opened nothing, streams them through the slow path."""
        if step.lease.regions:
            await self._moves.move(step)
            return
        check_may_crawl(self._transports, f"node {self.address}")
        check_local(step)
        metadata = call_metadata(request_id)
        with self._translating():
            if step.is_push:
                await self._stub.Write(
                    _as_stream(chunks(step)), timeout=step.timeout_s, metadata=metadata
                )
                return
            landing = Landing(step)
            stream = self._stub.Read(landing.request, timeout=step.timeout_s, metadata=metadata)
            try:
                async for chunk in stream:
                    landing.land(chunk)
            except BaseException:
                stream.cancel()
                raise
            landing.finish()

    async def close(self) -> None:
        """Waits for what is being told, then closes the channel."""
        if not self._open:
            return
        self._open = False
        self._moves.close()
        try:
            if self._telling:
                await asyncio.wait(self._telling, timeout=TELL_TIMEOUT_S)
        finally:
            await self._channel.close(None)

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """A block that makes a call; one whose channel was closed before or under it has lost the node."""
        try:
            with translating(f"node {self.address}"):
                yield
        except (asyncio.CancelledError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            # A channel that closes cancels its calls, whose callers were not cancelled; a closed one takes none.
            task = asyncio.current_task()
            if self._open or (task is not None and task.cancelling()):
                raise
            raise NodeUnavailable(
                f"the channel to {self.address} was closed during the call", hint="connect again"
            ) from error

    async def _tell(self, request: Request, lease: Lease, request_id: str) -> None:
        try:
            await self.call(request, timeout_s=TELL_TIMEOUT_S, lease=lease, request_id=request_id)
        except SnowskinError as error:
            log.warning("lease not given back", lease=lease.id, error=str(error))


async def _as_stream(
    messages: Iterator[store_pb2.WriteRequest],
) -> AsyncIterator[store_pb2.WriteRequest]:
    for message in messages:
        yield message
