"""An instance's link to one node: KV blocks of its memory in, KV blocks out.

Rules kept here: a lost node is an error of the call at hand and never of the process; the link
comes back by itself, in the background, with the node's next epoch; while it is down, or the node
is left alone because it does not answer, every call fails at once. A look-up that has not found
anything yet may be cancelled at once; when a call that is copying is cancelled, it returns after
the piece under way and nothing of it touches the caller's blocks any more (`Connection.move`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from snowskin.engines.cancellation import ended, outlast
from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.client.breaker import LookupBudget
from snowskin.kvstore.client.guard import NodeGuard
from snowskin.kvstore.client.machine import PullBounds
from snowskin.kvstore.errors import DeadlineExceeded, NodeUnavailable
from snowskin.kvstore.telemetry import bound_request, get_logger
from snowskin.transport.errors import SnowskinError
from snowskin.transport.traffic import TrafficClass

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from snowskin.kvstore.client.guard import Asking
    from snowskin.kvstore.client.machine import Published, Pulled
    from snowskin.kvstore.client.store import StoreClient
    from snowskin.transport.memory import MemoryRegion

BACKOFF_S = (0.05, 0.1, 0.2, 0.5)
LOOK_S = 0.25  # how soon a node that died between two calls is noticed
# What a request may lose to nodes that do not answer; with the conductor's own budget for its
# questions it stays within 20 ms.
LOOKUP_BUDGET_S = 0.01
# How long work at the node may take before the node is asked whether it still answers, and how
# often it is asked then.
PATIENCE_S = 0.005
ASK_AGAIN_S = 0.01
# Of no block: the index is asked for it only to see whether it answers.
NO_KEY = KeyColumn.of([bytes(32)])

T = TypeVar("T")
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Connection:
    """A connected client, and the instance's KV memory registered with it."""

    client: StoreClient
    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class Waiting:
    """How long a pull may wait inside the node for blocks that are not committed yet.

    Attributes:
        timeout_s: at most so long.
        until: done when nobody will commit any more: what the node has not found soon after is not
            waited for.
        budget: what may be lost after that.
    """

    timeout_s: float
    until: asyncio.Future[Any]
    budget: LookupBudget


class StoreLink:
    """Publishes and pulls blocks of one KV memory; `run` keeps it connected.

    Attributes:
        guard: keeps calls from a node that does not answer.
        tried: whether it was connected, or failed to be: who waits for its first connection need
            wait no longer.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[StoreClient]],
        memory: npt.NDArray[np.uint8],
        *,
        namespace: bytes,
        block_nbytes: int,
        name: str = "node",
        lookup_budget_s: float = LOOKUP_BUDGET_S,
    ) -> None:
        """`memory` holds block b at `b * block_nbytes`; `connect` makes a new client."""
        self.namespace = namespace
        self.block_nbytes = block_nbytes
        self.guard = NodeGuard(name, self._probe, budget_s=lookup_budget_s)
        self.tried = asyncio.Event()
        self._name = name
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
    def usable(self) -> bool:
        """Whether a call may succeed: the node is connected, and answers."""
        return self.connected and self.guard.usable

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
                        log.warning("node unreachable", node=self._name, error=str(error))
                    self.tried.set()
                    backoff_s = BACKOFF_S[min(num_failures, len(BACKOFF_S) - 1)]
                    num_failures += 1
                    await asyncio.sleep(backoff_s)
                    continue
                num_failures = 0
                await self._until_lost()
                await self.close()
                log.warning("node lost", node=self._name)
        finally:
            await outlast(self.close())
            await outlast(self.guard.close())

    async def publish(
        self,
        keys: KeyColumn,
        block_ids: Sequence[int],
        *,
        parent_key: bytes,
        one_reader: bool,
        timeout_s: float,
        traffic: TrafficClass = TrafficClass.DECODE_CRITICAL,
        request_id: str,
    ) -> Published:
        """Makes blocks readable for others, as `StoreClient.publish`."""
        connection = self._get()
        with self._watched(connection, waits_s=math.inf):
            return await connection.client.publish(
                namespace=self.namespace,
                keys=keys,
                parent_key=parent_key,
                block_nbytes=self.block_nbytes,
                local=connection.region,
                local_offsets=self._offsets(block_ids),
                one_reader=one_reader,
                timeout_s=timeout_s,
                traffic=traffic,
                request_id=bound_request() or request_id,
            )

    async def publish_tail(self, block_id: int, *, timeout_s: float, request_id: str) -> Published:
        """Leaves one whole block for the request's one reader, as `StoreClient.publish_tail`."""
        connection = self._get()
        with self._watched(connection, waits_s=math.inf):
            return await connection.client.publish_tail(
                namespace=self.namespace,
                tail_id=request_id,
                local=connection.region,
                local_offset=block_id * self.block_nbytes,
                nbytes=self.block_nbytes,
                timeout_s=timeout_s,
                request_id=bound_request() or request_id,
            )

    async def pull(
        self,
        keys: KeyColumn,
        block_ids: Sequence[int],
        *,
        budget: LookupBudget | None = None,
        waiting: Waiting | None = None,
        timeout_s: float,
        request_id: str,
    ) -> Pulled | None:
        """Fetches the longest run that the node has, as `StoreClient.pull`.

        Args:
            keys: of the blocks.
            block_ids: where they go.
            budget: of the request, for the look-up; None: as much as one request may lose.
            waiting: waits for the first block; without it the answer is what is committed now.
            timeout_s: for the copy.
            request_id: for logs, where their context has bound none.

        Returns:
            What came, or None where `waiting.until` was done before the node found anything.
        """
        connection = self._get()
        budget = budget or self.new_budget()
        waits_s = waiting.timeout_s if waiting is not None else 0.0
        with self._watched(connection, budget, waits_s=waits_s) as asking:
            found: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def on_found() -> None:
                asking.answered()
                found.set_result(None)

            call = connection.client.pull(
                namespace=self.namespace,
                keys=keys,
                block_nbytes=self.block_nbytes,
                local=connection.region,
                local_offsets=self._offsets(block_ids),
                wait_blocks=1 if waiting is not None else 0,
                timeout_s=waits_s,
                bounds=PullBounds(
                    lookup_timeout_s=asking.timeout_s - waits_s,
                    move_timeout_s=timeout_s,
                    on_found=on_found,
                ),
                request_id=bound_request() or request_id,
            )
            if waiting is None:
                pulled = await call
            else:
                answer = await _unless_over(call, found, waiting, self.guard.lookups.expected_s)
                if answer is None:
                    asking.abandon()
                    return None
                pulled = answer
        if pulled.broken_by is not None:
            self._note_lost(connection, pulled.broken_by)
            if isinstance(pulled.broken_by, DeadlineExceeded):  # by gRPC the node moves the bytes
                self.guard.on_late(asking.began_at_s)
        return pulled

    async def pull_tail(
        self,
        block_id: int,
        *,
        budget: LookupBudget | None = None,
        timeout_s: float,
        request_id: str,
    ) -> Pulled:
        """Fetches the request's tail into one block, as `StoreClient.pull_tail`; does not wait."""
        connection = self._get()
        with self._watched(connection, budget) as asking:
            return await connection.client.pull_tail(
                namespace=self.namespace,
                tail_id=request_id,
                nbytes=self.block_nbytes,
                local=connection.region,
                local_offset=block_id * self.block_nbytes,
                bounds=PullBounds(
                    lookup_timeout_s=asking.timeout_s,
                    move_timeout_s=timeout_s,
                    on_found=asking.answered,
                ),
                request_id=bound_request() or request_id,
            )

    async def discard(
        self,
        keys: KeyColumn,
        *,
        tail_id: str,
        budget: LookupBudget | None = None,
        request_id: str,
    ) -> None:
        """Frees, unread, what was left for a reader that will not come, as `StoreClient.discard`.

        Goes on where the caller is cancelled; a node that does not answer costs what is left of
        `budget` and frees them by itself.
        """
        connection = self._get()

        async def discarded() -> None:
            with self._watched(connection, waits_s=math.inf):
                await connection.client.discard(
                    namespace=self.namespace,
                    keys=keys,
                    tail_id=tail_id,
                    request_id=bound_request() or request_id,
                )

        await outlast(self.while_answering(discarded(), budget or self.new_budget()))

    def new_budget(self) -> LookupBudget:
        """What one request may lose to nodes, its own and others."""
        return LookupBudget(self.guard.budget_s)

    async def while_answering(self, work: Awaitable[T], budget: LookupBudget) -> T:
        """Awaits work at this node for as long as the node answers questions in time; else cancels it.

        For work of which nobody can say how long it takes: a copy, a wait for room. A node that
        does not answer costs what is left of `budget`.

        Raises:
            NodeSilent: the node is left alone.
            NodeUnavailable: it is lost.
            DeadlineExceeded: it stopped answering.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait([task], timeout=min(PATIENCE_S, budget.left_s))
            while not task.done():
                self._get()
                if self.guard.breaker.is_suspect and not budget.left_s:
                    raise DeadlineExceeded(f"{self._name} has not answered since it was late")
                await self.guard.ask(budget)
                await asyncio.wait([task], timeout=ASK_AGAIN_S)
            return task.result()
        finally:
            task.cancel()
            await ended(task)

    def _offsets(self, block_ids: Sequence[int]) -> Sequence[int]:
        """Byte offsets; a `range` where the blocks lie side by side, which the client copies as one."""
        if block_ids and block_ids[-1] - block_ids[0] == len(block_ids) - 1:
            steps = zip(block_ids, range(block_ids[0], block_ids[0] + len(block_ids)), strict=True)
            if all(block_id == in_order for block_id, in_order in steps):
                begin = block_ids[0] * self.block_nbytes
                return range(begin, begin + len(block_ids) * self.block_nbytes, self.block_nbytes)
        return [block_id * self.block_nbytes for block_id in block_ids]

    def _get(self) -> _Connection:
        connection = self._connection
        if connection is None or not connection.client.connected:
            self._lost.set()  # `run` need not look for itself
            raise NodeUnavailable(
                f"{self._name} is not connected",
                hint="check that it runs; the link comes back by itself",
                retry_after_s=BACKOFF_S[-1],
            )
        return connection

    @contextlib.contextmanager
    def _watched(
        self, connection: _Connection, budget: LookupBudget | None = None, *, waits_s: float = 0.0
    ) -> Iterator[Asking]:
        """A block that makes one call on `connection`: judged by the guard, and a loss noted."""
        with self.guard.asking(budget, waits_s=waits_s) as asking:
            try:
                yield asking
            except SnowskinError as error:
                self._note_lost(connection, error)
                raise

    def _note_lost(self, connection: _Connection, error: SnowskinError) -> None:
        if isinstance(error, NodeUnavailable) and connection is self._connection:
            self._lost.set()

    async def _probe(self) -> None:
        connection = self._get()
        try:
            await connection.client.probe(namespaces=(self.namespace,), keys=NO_KEY)
        except SnowskinError as error:
            self._note_lost(connection, error)
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
        self.guard.forget()
        self._found.set()
        self.tried.set()
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
        self.guard.forget()
        if connection is not None:
            await connection.client.close()
            connection.region.close()


async def _unless_over(
    call: Awaitable[Pulled], found: asyncio.Future[None], waiting: Waiting, expected_s: float
) -> Pulled | None:
    """The pull's result; None, the pull cancelled, where it found nothing soon after `waiting.until`."""
    task = asyncio.ensure_future(call)
    try:
        ends: list[asyncio.Future[Any]] = [task, waiting.until]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not found.done():
            # All was committed before this: the answer is on its way, or there will be none.
            began_at_s, left_s = time.monotonic(), expected_s + waiting.budget.left_s
            ends = [task, found]
            await asyncio.wait(ends, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            waiting.budget.spend(time.monotonic() - began_at_s, expected_s=expected_s)
        if found.done() and not task.done():
            await asyncio.wait([task])
        return task.result() if task.done() else None
    finally:
        task.cancel()
        await ended(task)
