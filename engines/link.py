"""An instance's link to its own node: KV blocks of its memory in, KV blocks out.

Rules kept here: a lost node is an error of the call at hand and never of the process; the link
comes back by itself, in the background, with the node's next epoch; while it is down every call
fails at once. A transfer that has begun ends before its caller goes on, cancelled or not, because
it touches the caller's blocks; that is why each one has a short deadline.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from snowskin.engines.cancellation import outlast
from snowskin.kvstore.errors import NodeUnavailable
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from snowskin.kvstore.blocks import KeyColumn
    from snowskin.kvstore.client.machine import Published, Pulled
    from snowskin.kvstore.client.store import StoreClient
    from snowskin.transport.memory import MemoryRegion

BACKOFF_S = (0.05, 0.1, 0.2, 0.5)
LOOK_S = 0.25  # how soon a node that died between two calls is noticed

T = TypeVar("T")
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Connection:
    """A connected client, and the instance's KV memory registered with it."""

    client: StoreClient
    region: MemoryRegion


class StoreLink:
    """Publishes and pulls blocks of one KV memory; `run` keeps it connected."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[StoreClient]],
        memory: npt.NDArray[np.uint8],
        *,
        namespace: bytes,
        block_nbytes: int,
    ) -> None:
        """`memory` holds block b at `b * block_nbytes`; `connect` makes a new client."""
        self.namespace = namespace
        self.block_nbytes = block_nbytes
        self._connect = connect
        self._memory = memory
        self._connection: _Connection | None = None
        self._lost = asyncio.Event()
        self._found = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether the node answered last."""
        return self._connection is not None and self._connection.client.connected

    @property
    def node_epoch(self) -> int:
        """Of the node that is connected, new at each of its starts; 0 while none is."""
        return self._connection.client.node_epoch if self._connection is not None else 0

    async def wait_connected(self) -> None:
        """Returns once the link is up; the caller bounds the wait."""
        await self._found.wait()

    async def run(self) -> None:
        """Connects, and connects again whenever the node was lost, until cancelled."""
        num_failures = 0
        try:
            while True:
                try:
                    await self.open()
                except SnowskinError as error:
                    if num_failures == 0:
                        log.warning("node unreachable", error=str(error))
                    backoff_s = BACKOFF_S[min(num_failures, len(BACKOFF_S) - 1)]
                    num_failures += 1
                    await asyncio.sleep(backoff_s)
                    continue
                num_failures = 0
                await self._until_lost()
                await self.close()
                log.warning("node lost")
        finally:
            await outlast(self.close())

    async def publish(
        self,
        keys: KeyColumn,
        block_ids: Sequence[int],
        *,
        parent_key: bytes,
        one_reader: bool,
        timeout_s: float,
        request_id: str,
    ) -> Published:
        """Makes blocks readable for others, as `StoreClient.publish`."""
        connection = self._get()
        return await self._guard(
            connection,
            connection.client.publish(
                namespace=self.namespace,
                keys=keys,
                parent_key=parent_key,
                block_nbytes=self.block_nbytes,
                local=connection.region,
                local_offsets=self._offsets(block_ids),
                one_reader=one_reader,
                timeout_s=timeout_s,
                request_id=request_id,
            ),
        )

    async def publish_tail(self, block_id: int, *, timeout_s: float, request_id: str) -> Published:
        """Leaves one whole block for the request's one reader, as `StoreClient.publish_tail`."""
        connection = self._get()
        return await self._guard(
            connection,
            connection.client.publish_tail(
                namespace=self.namespace,
                tail_id=request_id,
                local=connection.region,
                local_offset=block_id * self.block_nbytes,
                nbytes=self.block_nbytes,
                timeout_s=timeout_s,
                request_id=request_id,
            ),
        )

    async def pull(
        self,
        keys: KeyColumn,
        block_ids: Sequence[int],
        *,
        wait_blocks: int = 0,
        timeout_s: float,
        request_id: str,
    ) -> Pulled:
        """Fetches the longest run that the node has, as `StoreClient.pull`."""
        connection = self._get()
        return await self._guard(
            connection,
            connection.client.pull(
                namespace=self.namespace,
                keys=keys,
                block_nbytes=self.block_nbytes,
                local=connection.region,
                local_offsets=self._offsets(block_ids),
                wait_blocks=wait_blocks,
                timeout_s=timeout_s,
                request_id=request_id,
            ),
        )

    async def pull_tail(self, block_id: int, *, request_id: str) -> Pulled:
        """Fetches the request's tail into one block, as `StoreClient.pull_tail`; does not wait."""
        connection = self._get()
        return await self._guard(
            connection,
            connection.client.pull_tail(
                namespace=self.namespace,
                tail_id=request_id,
                nbytes=self.block_nbytes,
                local=connection.region,
                local_offset=block_id * self.block_nbytes,
                request_id=request_id,
            ),
        )

    async def discard(self, keys: KeyColumn, *, tail_id: str, request_id: str) -> None:
        """Frees, unread, what was left for a reader that will not come, as `StoreClient.discard`."""
        connection = self._get()
        await self._guard(
            connection,
            connection.client.discard(
                namespace=self.namespace, keys=keys, tail_id=tail_id, request_id=request_id
            ),
        )

    def _offsets(self, block_ids: Sequence[int]) -> Sequence[int]:
        """Byte offsets; a `range` where the blocks lie side by side, which the client copies as one."""
        if block_ids and block_ids[-1] - block_ids[0] == len(block_ids) - 1:
            steps = zip(block_ids, range(block_ids[0], block_ids[0] + len(block_ids)), strict=True)
            if all(block_id == in_order for block_id, in_order in steps):
                begin = block_ids[0] * self.block_nbytes
                return range(begin, begin + len(block_ids) * self.block_nbytes, self.block_nbytes)
        return [block_id * self.block_nbytes for block_id in block_ids]

    def _get(self) -> _Connection:
        if self._connection is None:
            raise NodeUnavailable(
                "this instance's node is not connected",
                hint="check that the node runs; the link comes back by itself",
                retry_after_s=BACKOFF_S[-1],
            )
        return self._connection

    async def _guard(self, connection: _Connection, call: Awaitable[T]) -> T:
        try:
            return await outlast(call)
        except NodeUnavailable:
            if connection is self._connection:
                self._lost.set()
            raise

    async def open(self) -> None:
        """Connects once; raises NodeUnavailable. `run` does it again and again."""
        client = await self._connect()
        try:
            region = client.register(self._memory)
        except BaseException:
            await outlast(client.close())
            raise
        self._lost.clear()
        self._connection = _Connection(client, region)
        self._found.set()
        log.info("node connected", node=client.node_id, epoch=client.node_epoch)

    async def _until_lost(self) -> None:
        while self.connected and not self._lost.is_set():
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._lost.wait()
            except TimeoutError:
                continue  # look again

    async def close(self) -> None:
        """Ends the connection, if there is one."""
        connection, self._connection = self._connection, None
        self._found.clear()
        if connection is not None:
            await connection.client.close()
            connection.region.close()
