"""The blocking client of a node: `BlockingStoreClient`, on the caller's own thread.

Rules kept here: no event loop in a hidden thread, where each wake-up would wait for the GIL of a busy engine. One call
at a time; a second thread waits its turn. All else is as in `store`: the same flows, the same errors.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

from snowskin.kvstore import tracing
from snowskin.kvstore.call_spans import name_of_call
from snowskin.kvstore.client import machine, pieces
from snowskin.kvstore.client.blocking_connection import (
    BlockingDoorConnection,
    BlockingRpcConnection,
)
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
from snowskin.kvstore.client.step_spans import facts_of, is_told, name_of
from snowskin.kvstore.client.store import CALL_TIMEOUT_S, DOOR_PREFIX, MOVE_TIMEOUT_S
from snowskin.kvstore.client.transports import ClientTransports, check_may_map
from snowskin.kvstore.errors import (
    ClientClosed,
    ClientForked,
    NodeUnavailable,
)
from snowskin.kvstore.messages import (
    Access,
    Lease,
    NodeStat,
    Probed,
    ProbeRequest,
    ReplyMessage,
    Request,
    StatRequest,
)
from snowskin.transport.memory import MemoryRegion, region_of
from snowskin.transport.traffic import TrafficClass

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

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

    def __init__(
        self,
        connection: BlockingConnection,
        settings: FlowSettings,
        own_transports: ClientTransports | None = None,
    ) -> None:
        """Use `connect`."""
        self._connection = connection
        self._settings = settings
        self._own_transports = own_transports
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
        transports: ClientTransports | None = None,
    ) -> BlockingStoreClient:
        """Opens a session; arguments as `StoreClient.connect`."""
        own = ClientTransports() if transports is None else None
        transports = transports or own
        assert transports is not None, "one of the two"
        connection: BlockingConnection
        if address.startswith(DOOR_PREFIX):
            check_may_map(transports, address)
            connection = BlockingDoorConnection(
                address.removeprefix(DOOR_PREFIX),
                client_name,
                access,
                transports,
                timeout_s=timeout_s,
            )
        else:
            connection = BlockingRpcConnection(
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
        traffic: TrafficClass = TrafficClass.DECODE_CRITICAL,
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
            traffic=traffic,
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
        bounds: PullBounds = AS_THE_CLIENT,
        request_id: str = "",
    ) -> Pulled:
        """Pulls the longest committed run from the first key on; see `StoreClient.pull`."""
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
        bounds: PullBounds = AS_THE_CLIENT,
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
            bounds=bounds,
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
            if self._own_transports is not None:
                self._own_transports.close()

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
        with self._turn, tracing.span(name_of_call(request)):
            return self._connection.call(
                request, timeout_s=self._settings.call_timeout_s, lease=None, request_id=request_id
            )

    def _run(self, flow: Generator[Step, Done, ResultT], request_id: str) -> ResultT:
        self._check_usable()
        do = self._do if tracing.current() is None else self._do_traced
        with self._turn:
            try:
                step = next(flow)
                while True:
                    try:
                        done = do(step, request_id)
                    except BaseException as error:  # noqa: BLE001  the flow gives its lease back, and raises it again
                        step = flow.throw(error)
                    else:
                        step = flow.send(done)
            except StopIteration as end:
                result: ResultT = end.value
                return result

    def _do_traced(self, step: Step, request_id: str) -> Done:
        if not is_told(step):
            return self._do(step, request_id)
        with tracing.span(name_of(step)):
            done = self._do(step, request_id)
            tracing.annotate(**facts_of(step, done))
            return done

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
