"""The two ways to a node that hold the calling thread: through the local door, and by gRPC.

Rules kept here: as in `door_connection` and `rpc_connection`, without a loop. A lease is renewed from between two
pieces of a long copy. `interrupt` is the one call that may come from another thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc

from snowskin.kvstore.client.conversation import Conversation, is_plain_release
from snowskin.kvstore.client.door_connection import (
    MAX_DESCRIPTORS,
    RECV_NBYTES,
    connect_socket,
    map_granted,
)
from snowskin.kvstore.client.region_moves import RegionMoves
from snowskin.kvstore.client.rpc_connection import METHODS, Landing, check_local, chunks
from snowskin.kvstore.client.store import CALL_TIMEOUT_S
from snowskin.kvstore.client.transports import check_may_crawl
from snowskin.kvstore.errors import DeadlineExceeded, NodeUnavailable
from snowskin.kvstore.messages import Access, Lease, RenewRequest, ReplyMessage, Request
from snowskin.kvstore.rpc import call_metadata, channel_options, header_text, translating
from snowskin.kvstore.tracing import outgoing
from snowskin.kvstore.wire import reply_from, request_to, stat_from
from snowskin.transport.errors import SnowskinError, TransportClosed
from snowskin.v1 import store_pb2, store_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snowskin.kvstore.client.conversation import Answer
    from snowskin.kvstore.client.machine import Move
    from snowskin.kvstore.client.transports import ClientTransports


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

    def __init__(
        self,
        path: str,
        client_name: str,
        access: Access,
        transports: ClientTransports,
        *,
        timeout_s: float,
    ) -> None:
        """Connects, greets, maps the pools."""
        self._conversation = Conversation()
        self._transport = transports.new_map()
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
        call_id, data = self._conversation.call(request, request_id, outgoing())
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
            if (unwanted := self._conversation.forget(call_id)) and self.connected:
                with contextlib.suppress(NodeUnavailable):
                    self._send(unwanted, CALL_TIMEOUT_S)

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
        """Lets no further piece land, and wakes the thread that waits for an answer.

        In this order: when the node hears of the end, it gives our room to others.
        """
        self._transport.close()
        with contextlib.suppress(OSError):  # broken already
            self._door.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the session."""
        if self.connected:
            self.connected = False
            self._transport.close()
            self._door.close()
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

    def _receive(self, deadline_s: float, timeout_s: float) -> list[Answer]:
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

    def __init__(
        self, address: str, client_name: str, transports: ClientTransports, *, timeout_s: float
    ) -> None:
        """Connects and asks the node who it is; the node counts what `client_name` leases as one client's."""
        self.address = address
        self._transports = transports
        self._moves = RegionMoves(transports, node=f"node {address}")
        self._client = header_text(client_name)
        self._channel = grpc.insecure_channel(address, options=channel_options())
        self._stub: Any = store_pb2_grpc.StoreStub(self._channel)
        self.connected = True
        try:
            with translating(f"node {address}"):
                stat = stat_from(self._stub.Stat(store_pb2.StatRequest(), timeout=timeout_s))
            self._moves.meet(stat)
        except BaseException:
            self.close()
            raise
        self.node_id, self.node_epoch = stat.node_id, stat.node_epoch

    def call(
        self, request: Request, *, timeout_s: float, lease: Lease | None, request_id: str
    ) -> ReplyMessage:
        """One call and its answer."""
        request = self._moves.naming_schemes(request)
        name, message = request_to(request, lease.capability if lease else b"")
        with self._translating():
            metadata = call_metadata(request_id, client=self._client)
            method = getattr(self._stub, METHODS[name])
            response = method(message, timeout=timeout_s, metadata=metadata)
        return reply_from(name, response, self.node_id)

    def tell(self, request: Request, *, lease: Lease, request_id: str) -> None:
        """A call whose answer nobody needs; without it the lease would only run out."""
        with contextlib.suppress(SnowskinError):
            self.call(request, timeout_s=CALL_TIMEOUT_S, lease=lease, request_id=request_id)

    def move(self, step: Move, *, request_id: str) -> None:
        """Moves bytes by the data plane, or, where it opened nothing, streams them through the slow path."""
        if step.timeout_s > step.lease.ttl_s / 3:
            step = replace(step, landed=_Renewing(step, self._renew).landed)
        if step.lease.regions:
            self._moves.move_blocking(step)
            return
        check_may_crawl(self._transports, f"node {self.address}")
        check_local(step)
        metadata = call_metadata(request_id)
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
            self._moves.close()
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
