"""The asyncio client of a node: `StoreClient`.

Rules kept here: one event loop, no thread of its own (large copies run in the transport's worker). Every call has a
deadline. A broken connection fails what waits with NodeUnavailable and stays broken: connecting again is the caller's
decision. Closing is idempotent. A process that forked is refused.

How it works: a flow of `machine` is run step by step over a *connection*, of which there are two: to the local door
(control on a Unix socket, bytes by shared memory), and by gRPC (control by RPC, bytes by the node's data plane).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

from snowskin.kvstore import tracing
from snowskin.kvstore.call_spans import name_of_call
from snowskin.kvstore.client import machine, pieces
from snowskin.kvstore.client.door_connection import DoorConnection
from snowskin.kvstore.client.machine import (
    AS_THE_CLIENT,
    Call,
    Done,
    FlowSettings,
    Move,
    Published,
    PullBounds,
    Pulled,
    Step,
    Tell,
)
from snowskin.kvstore.client.rpc_connection import RpcConnection
from snowskin.kvstore.client.step_spans import facts_of, is_told, name_of
from snowskin.kvstore.client.transports import ClientTransports, check_may_map
from snowskin.kvstore.client.ways import log_way
from snowskin.kvstore.errors import ClientClosed, ClientForked, NodeUnavailable
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
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.wire import EMPTY_KEYS
from snowskin.transport.errors import SnowskinError
from snowskin.transport.memory import MemoryRegion, region_of
from snowskin.transport.traffic import TrafficClass

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    import numpy as np
    import numpy.typing as npt

    from snowskin.kvstore.blocks import KeyColumn
    from snowskin.transport.choice import Choice

DOOR_PREFIX = "unix:"
CALL_TIMEOUT_S = 1.0
MOVE_TIMEOUT_S = 10.0
# A lease is renewed when a third of its life is over (ARCHITECTURE §3).
RENEW_AFTER_RATIO = 1 / 3

log = get_logger(__name__)

ResultT = TypeVar("ResultT", Published, Pulled, int)


class Connection(Protocol):
    """A way to one node; both ways do the same steps."""

    node_id: str
    node_epoch: int

    @property
    def way(self) -> Choice:
        """How what lies in host memory travels, and why."""

    @property
    def connected(self) -> bool:
        """Whether a call may succeed."""

    async def call(
        self, request: Request, *, timeout_s: float, lease: Lease | None, request_id: str
    ) -> ReplyMessage:
        """One call and its answer; raises what the node raised, NodeUnavailable, or DeadlineExceeded."""

    def tell(self, request: Request, *, lease: Lease, request_id: str) -> None:
        """A call whose answer nobody needs."""

    async def move(self, step: Move, *, request_id: str) -> None:
        """Copies bytes under a lease; when it returns or raises, cancelled or not, nothing of it lands any more."""

    async def close(self) -> None:
        """Ends it; idempotent."""


class StoreClient:
    """A session with one node."""

    def __init__(
        self,
        connection: Connection,
        settings: FlowSettings,
        own_transports: ClientTransports | None = None,
    ) -> None:
        """Use `connect`."""
        self._connection = connection
        self._settings = settings
        self._own_transports = own_transports
        self._pid = os.getpid()
        self._closed = False

    @classmethod
    async def connect(
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
        transports: ClientTransports | None = None,
    ) -> StoreClient:
        """Opens a session.

        Args:
            address: `unix:/path` of a local door, or `host:port` of a gRPC port.
            client_name: for the node's logs, and for "who holds the space".
            access: READ maps pools read-only.
            verify: whether pulled blocks are checked; False only in tests that show what checking prevents.
            timeout_s: for the connection and the greeting.
            call_timeout_s: what a call may take beyond the time that it may wait inside the node.
            move_timeout_s: what a copy may take.
            read_ttl_s: wished life of read leases; 0 takes the node's.
            write_ttl_s: wished life of write leases; 0 takes the node's.
            transports: which bytes may move by, shared by all clients of a process; this client's own if None.

        Raises:
            NodeUnavailable: nobody answers there.
            TransportUnavailable: bytes cannot go there by the transport that `transports` demands.
        """
        own = ClientTransports() if transports is None else None
        transports = transports or own
        assert transports is not None, "one of the two"
        connection: Connection
        if address.startswith(DOOR_PREFIX):
            check_may_map(transports, address)
            connection = await DoorConnection.open(
                address.removeprefix(DOOR_PREFIX),
                client_name,
                access,
                transports,
                timeout_s=timeout_s,
            )
            log_way(connection.way, node=address)
        else:
            connection = await RpcConnection.open(
                address, client_name, transports, timeout_s=timeout_s
            )
        settings = FlowSettings(
            verify=verify,
            call_timeout_s=call_timeout_s,
            move_timeout_s=move_timeout_s,
            read_ttl_s=read_ttl_s,
            write_ttl_s=write_ttl_s,
        )
        return cls(connection, settings, own)

    @property
    def node_id(self) -> str:
        """Name of the node."""
        return self._connection.node_id

    @property
    def node_epoch(self) -> int:
        """New at each start of the node."""
        return self._connection.node_epoch

    @property
    def way(self) -> Choice:
        """By which transport the node's bytes travel to and from host memory, and why."""
        return self._connection.way

    @property
    def connected(self) -> bool:
        """False after a broken connection or `close`."""
        return not self._closed and self._connection.connected

    def register(self, buffer: npt.NDArray[np.uint8]) -> MemoryRegion:
        """`buffer` as memory that pulls land in and publishes read from; copies nothing."""
        return region_of(buffer)

    async def publish(
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
        traffic: TrafficClass = TrafficClass.DECODE_CRITICAL,
        request_id: str = "",
    ) -> Published:
        """Publishes consecutive blocks of one sequence.

        Args:
            namespace: digest of the layout, 32 bytes.
            keys: of the blocks.
            block_nbytes: bytes of each.
            local: registered memory that holds them.
            local_offsets: byte offset of each block in it; a `range` where they lie side by side is fastest.
            parent_key: key of the block before the first, or empty.
            one_reader: the blocks go with their first reader, or with this session.
            timeout_s: how long to queue for room.
            traffic: how urgent the copy is.
            request_id: for logs.

        Raises:
            PoolExhausted: no room came free in time.
            QuarantineShareExceeded: too much of the pool is in quarantine, writes of this client among it.
            NodeUnavailable: the connection broke; nothing became visible, or all of it did.
        """
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
            traffic=traffic,
        )
        return await self._run(flow, request_id)

    async def publish_tail(
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
        """Publishes the partial last block of one request, for the one reader that names `tail_id`."""
        flow = machine.publish_tail(
            self._settings,
            namespace=namespace,
            tail_id=tail_id,
            local=local,
            local_offset=local_offset,
            nbytes=nbytes,
            timeout_s=timeout_s,
        )
        return await self._run(flow, request_id)

    async def pull(
        self,
        *,
        namespace: bytes,
        keys: KeyColumn,
        block_nbytes: int,
        local: MemoryRegion,
        local_offsets: Sequence[int],
        wait_blocks: int = 0,
        timeout_s: float = 0.0,
        bounds: PullBounds = AS_THE_CLIENT,
        request_id: str = "",
    ) -> Pulled:
        """Pulls the longest committed run from the first key on; at most one block for each local offset.

        Waits up to `timeout_s` for at least `wait_blocks` blocks. A corrupt block is reported to the node and ends
        the run; it is not an error. A copy that breaks off brings what landed before (`Pulled.broken_by`).
        `bounds` says what look-up and copy may take where that is not the client's usual.

        What the node withholds, since no more may be leased at once, is pulled behind what it gave.

        Raises:
            LeaseShareExceeded: as much is leased as may be, and not even the first block could be.
            NodeUnavailable: the connection broke; no block landed.
            DeadlineExceeded: the node did not answer in time.
        """
        flow = pieces.pull(
            self._settings,
            namespace=namespace,
            keys=keys,
            block_nbytes=block_nbytes,
            local=local,
            local_offsets=local_offsets,
            wait_blocks=wait_blocks,
            timeout_s=timeout_s,
            bounds=bounds,
        )
        return await self._run(flow, request_id)

    async def pull_tail(
        self,
        *,
        namespace: bytes,
        tail_id: str,
        nbytes: int,
        local: MemoryRegion,
        local_offset: int,
        timeout_s: float = 0.0,
        bounds: PullBounds = AS_THE_CLIENT,
        request_id: str = "",
    ) -> Pulled:
        """Pulls a tail, which frees it.

        Raises:
            TailUnknown: it is not there (any more).
            ChecksumMismatch: it is not what was committed.
        """
        flow = machine.pull_tail(
            self._settings,
            namespace=namespace,
            tail_id=tail_id,
            nbytes=nbytes,
            local=local,
            local_offset=local_offset,
            timeout_s=timeout_s,
            bounds=bounds,
        )
        return await self._run(flow, request_id)

    async def discard(
        self,
        *,
        namespace: bytes,
        keys: KeyColumn = EMPTY_KEYS,
        tail_id: str = "",
        request_id: str = "",
    ) -> int:
        """Frees, unread, what was left for a reader that will not come; how many blocks that were."""
        flow = machine.discard(self._settings, namespace=namespace, keys=keys, tail_id=tail_id)
        return await self._run(flow, request_id)

    async def probe(
        self, *, namespaces: Sequence[bytes], keys: KeyColumn, request_id: str = ""
    ) -> Probed:
        """What of `keys` is committed in all `namespaces`; takes no lease."""
        reply = await self._call(
            ProbeRequest(namespaces=tuple(namespaces), keys=keys), request_id=request_id
        )
        assert isinstance(reply, Probed), "the reply to a Probe is Probed"
        return reply

    async def stat(self) -> NodeStat:
        """Counts and sizes of the node."""
        reply = await self._call(StatRequest(), request_id="")
        assert isinstance(reply, NodeStat), "the reply to a Stat is NodeStat"
        return reply

    async def close(self) -> None:
        """Ends the session, and with it all that it held."""
        if not self._closed:
            self._closed = True
            try:
                await self._connection.close()
            finally:
                if self._own_transports is not None:
                    self._own_transports.close()

    async def __aenter__(self) -> StoreClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise ClientForked(
                f"this client was connected in process {self._pid}",
                hint="connect in each process for itself; start workers by spawn",
            )
        if self._closed:
            raise ClientClosed("this client is closed", hint="connect a new one")

    async def _call(self, request: Request, *, request_id: str) -> ReplyMessage:
        self._check_usable()
        with tracing.span(name_of_call(request)):
            return await self._connection.call(
                request, timeout_s=self._settings.call_timeout_s, lease=None, request_id=request_id
            )

    async def _run(self, flow: Generator[Step, Done, ResultT], request_id: str) -> ResultT:
        self._check_usable()
        do = self._do if tracing.current() is None else self._do_traced
        try:
            step = next(flow)
            while True:
                try:
                    done = await do(step, request_id)
                except BaseException as error:  # noqa: BLE001  the flow gives its lease back, and raises it again
                    step = flow.throw(error)
                else:
                    step = flow.send(done)
        except StopIteration as end:
            result: ResultT = end.value
            return result

    async def _do_traced(self, step: Step, request_id: str) -> Done:
        if not is_told(step):
            return await self._do(step, request_id)
        with tracing.span(name_of(step)):
            done = await self._do(step, request_id)
            tracing.annotate(**facts_of(step, done))
            return done

    async def _do(self, step: Step, request_id: str) -> Done:
        began_at_s = time.monotonic()
        reply: ReplyMessage | None = None
        match step:
            case Call(request=request, timeout_s=timeout_s, lease=lease):
                reply = await self._connection.call(
                    request, timeout_s=timeout_s, lease=lease, request_id=request_id
                )
            case Move():
                await self._move(step, request_id)
            case Tell(request=request, lease=lease):
                with contextlib.suppress(
                    NodeUnavailable
                ):  # then the session is gone, and the lease with it
                    self._connection.tell(request, lease=lease, request_id=request_id)
        return Done(reply, began_at_s, time.monotonic())

    async def _move(self, step: Move, request_id: str) -> None:
        renewal_s = step.lease.ttl_s * RENEW_AFTER_RATIO
        if step.timeout_s <= renewal_s:
            await self._connection.move(step, request_id=request_id)
            return
        renewing = asyncio.get_running_loop().create_task(
            self._keep_alive(step.lease, renewal_s, request_id)
        )
        try:
            await self._connection.move(step, request_id=request_id)
        finally:
            renewing.cancel()
            await asyncio.wait([renewing])  # not `await renewing`: this one may be cancelled too

    async def _keep_alive(self, lease: Lease, every_s: float, request_id: str) -> None:
        """Renews the lease of a long copy; a renewal that fails is the copy's own failure soon enough."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self._connection.call(
                    RenewRequest(lease_ids=(lease.id,), ttl_s=lease.ttl_s),
                    timeout_s=self._settings.call_timeout_s,
                    lease=lease,
                    request_id=request_id,
                )
            except SnowskinError as error:
                log.warning("lease not renewed", lease=lease.id, error=str(error))
                return
