"""What of a prompt is cached where: lease-free questions to the nodes, within a small budget.

Rules kept here: a request's question takes no longer than the node usually does and a budget; a
node that does not answer in time is not there for this request, and soon nobody asks it until it
answers again (`NodeGuard`); connecting goes on in the background and outlives the question that
began it, and no request waits for it where it has failed before; a node that cannot be reached is
tried again with a growing pause, never in a loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from snowskin.engines.cancellation import ended, outlast
from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.client.breaker import LookupBudget
from snowskin.kvstore.client.guard import NodeGuard
from snowskin.kvstore.errors import DeadlineExceeded, NodeUnavailable
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.tracing import of_no_request
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from snowskin.kvstore.clock import Clock
    from snowskin.kvstore.messages import NodeStat, Probed

_AnswerT = TypeVar("_AnswerT")

MIN_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0
# With what an instance may lose at its own look-ups this stays within 20 ms.
PROBE_BUDGET_S = 0.005
# Of no block: a node is asked for it only to see whether it answers.
NO_NAMESPACE, NO_KEY = bytes(32), KeyColumn.of([bytes(32)])

log = get_logger(__name__)


class NodeClient(Protocol):
    """What of a `StoreClient` the conductor uses."""

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""
        ...

    async def probe(self, *, namespaces: Sequence[bytes], keys: KeyColumn) -> Probed:
        """What is committed, without a lease."""
        ...

    async def stat(self) -> NodeStat:
        """Counts and sizes."""
        ...

    async def discard(self, *, namespace: bytes, keys: KeyColumn, tail_id: str) -> int:
        """Frees what was left for a reader that will not come; how many blocks that were."""
        ...

    async def close(self) -> None:
        """Idempotent."""
        ...


Connect = Callable[[str], Awaitable[NodeClient]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeHit:
    """What a node holds of a prompt; `error` says why nothing is known of it.

    Attributes:
        num_blocks: gapless from the first on.
        bitmap: bit i is set where it holds block i.
    """

    address: str
    num_blocks: int = 0
    bitmap: int = 0
    error: str = ""

    @property
    def num_blocks_present(self) -> int:
        """Blocks that it holds at all."""
        return self.bitmap.bit_count()


@dataclass(slots=True)
class _Node:
    """One address: a client, or an attempt to connect, or the time before which none is made."""

    guard: NodeGuard
    client: NodeClient | None = None
    connecting: asyncio.Task[None] | None = None
    pause_s: float = MIN_PAUSE_S
    retry_at_s: float = 0.0
    error: SnowskinError | None = None


class Nodes:
    """Connections to the nodes that instances have named."""

    def __init__(self, connect: Connect, clock: Clock, *, budget_s: float = PROBE_BUDGET_S) -> None:
        """Connects by `connect(address)`, lazily; a request may lose `budget_s` seconds here."""
        self._connect = connect
        self._clock = clock
        self._budget_s = budget_s
        self._nodes: dict[str, _Node] = {}
        self._closed = False

    def want(self, address: str) -> None:
        """Begins to connect, so that the first question need not wait for it."""
        if address and not self._closed:
            self._begin(address, self._node(address))

    def guard(self, address: str) -> NodeGuard:
        """What keeps requests from this node while it does not answer."""
        return self._node(address).guard

    def is_usable(self, address: str) -> bool:
        """Whether a request would ask this node now."""
        node = self._node(address)
        is_connected = node.client is not None and node.client.connected
        return is_connected and node.guard.usable

    async def probe(
        self,
        addresses: Collection[str],
        *,
        namespaces: Sequence[bytes],
        keys: KeyColumn,
        timeout_s: float | None = None,
    ) -> list[NodeHit]:
        """What each node holds of `keys`, all asked at once.

        Within `timeout_s` seconds, or, where a request asks (None), within what it may lose.
        """
        if not len(keys):
            return [NodeHit(address=address) for address in addresses]
        asked = [self._probe_one(each, namespaces, keys, timeout_s) for each in addresses]
        return list(await asyncio.gather(*asked))

    async def stat(self, address: str, *, timeout_s: float) -> NodeStat:
        """Counts and sizes of one node.

        Raises:
            NodeUnavailable: it cannot be reached.
            DeadlineExceeded: it did not answer within `timeout_s` seconds.
        """
        return await self._within(address, timeout_s, lambda client: client.stat())

    async def discard(
        self, address: str, *, namespace: bytes, keys: KeyColumn, tail_id: str, timeout_s: float
    ) -> int:
        """Frees, unread, what a request left at one node for its reader; how many blocks that were.

        Raises:
            NodeUnavailable: it cannot be reached.
            DeadlineExceeded: it did not answer within `timeout_s` seconds.
        """
        return await self._within(
            address,
            timeout_s,
            lambda client: client.discard(namespace=namespace, keys=keys, tail_id=tail_id),
        )

    async def keep_only(self, addresses: Collection[str]) -> None:
        """Lets go of nodes that no instance names any more."""
        for address in [each for each in self._nodes if each not in addresses]:
            await outlast(self._drop(self._nodes.pop(address)))

    async def close(self) -> None:
        """Closes all connections, and ends attempts at them."""
        self._closed = True
        await self.keep_only(())

    async def _within(
        self,
        address: str,
        timeout_s: float,
        question: Callable[[NodeClient], Awaitable[_AnswerT]],
    ) -> _AnswerT:
        """Connects where it must, and asks; raises as `stat`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._asked(address, question(await self._client(address)))
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"node {address} did not answer within {timeout_s} s", hint="look at its log"
            ) from error

    async def _probe_one(
        self, address: str, namespaces: Sequence[bytes], keys: KeyColumn, timeout_s: float | None
    ) -> NodeHit:
        try:
            if timeout_s is None:
                found = await self._probe_for_request(address, namespaces, keys)
            else:
                async with asyncio.timeout(timeout_s):
                    client = await self._client(address)
                    found = await self._asked(
                        address, client.probe(namespaces=namespaces, keys=keys)
                    )
        except TimeoutError:
            log.debug("node not asked in time", node=address, timeout_s=timeout_s)
            return NodeHit(address=address, error=f"no answer within {timeout_s} s")
        except SnowskinError as error:
            log.debug("node not asked", node=address, error=str(error))
            return NodeHit(address=address, error=str(error))
        return NodeHit(
            address=address,
            num_blocks=found.num_blocks,
            bitmap=int.from_bytes(found.present_bitmap, "little"),
        )

    async def _probe_for_request(
        self, address: str, namespaces: Sequence[bytes], keys: KeyColumn
    ) -> Probed:
        budget = LookupBudget(self._budget_s)
        node = self._node(address)
        if node.client is None and node.error is not None:
            self._begin(address, node)
            raise node.error
        try:
            async with asyncio.timeout(budget.left_s):
                client = await self._client(address)
        except TimeoutError:
            # Known from now on as one that is not waited for.
            node.error = node.error or NodeUnavailable(f"node {address} is not connected yet")
            raise node.error from None
        with node.guard.asking(budget) as asking:
            try:
                async with asyncio.timeout(asking.timeout_s):
                    return await self._asked(
                        address, client.probe(namespaces=namespaces, keys=keys)
                    )
            except TimeoutError:
                raise DeadlineExceeded(
                    f"node {address} did not answer within {asking.timeout_s:.3f} s"
                ) from None

    def _node(self, address: str) -> _Node:
        node = self._nodes.get(address)
        if node is None:

            async def look() -> None:
                await self._look(address)

            guard = NodeGuard(f"node {address}", look, budget_s=self._budget_s)
            node = self._nodes[address] = _Node(guard)
        return node

    async def _look(self, address: str) -> None:
        """Asks a node something small, where it is connected; for its guard, which bounds it."""
        node = self._nodes.get(address)
        if node is None or node.client is None:
            raise NodeUnavailable(f"node {address} is not connected")
        await self._asked(address, node.client.probe(namespaces=(NO_NAMESPACE,), keys=NO_KEY))

    async def _asked(self, address: str, answer: Awaitable[_AnswerT]) -> _AnswerT:
        try:
            return await answer
        except SnowskinError as error:
            if error.status == "UNAVAILABLE":
                self._lost(address, error)
            raise

    async def _client(self, address: str) -> NodeClient:
        """The connected client; raises NodeUnavailable where there is none and none comes."""
        if self._closed:
            raise NodeUnavailable(f"node {address} is not asked: the conductor is stopping")
        node = self._node(address)
        self._begin(address, node)
        if node.connecting is not None:
            # Waited for, not awaited: the connection is for the next question too, and an attempt
            # that is given up because its node was let go must not cancel who asked.
            await asyncio.wait([node.connecting])
        if node.client is None:
            raise node.error or NodeUnavailable(f"node {address} is not connected")
        return node.client

    def _begin(self, address: str, node: _Node) -> None:
        if node.client is not None and not node.client.connected:
            self._lost(address, NodeUnavailable(f"the connection to node {address} broke"))
        idle = node.client is None and node.connecting is None
        if idle and self._clock.now_s() >= node.retry_at_s:
            node.connecting = asyncio.create_task(
                self._open(address, node), name=f"to:{address}", context=of_no_request()
            )

    async def _open(self, address: str, node: _Node) -> None:
        try:
            node.client = await self._connect(address)
            node.pause_s, node.error = MIN_PAUSE_S, None
            node.guard.forget()
        except SnowskinError as error:
            self._pause(node, error)
            log.debug("node not connected", node=address, error=str(error))
        except Exception as error:
            self._pause(node, NodeUnavailable(f"node {address}: {type(error).__name__}"))
            log.error("connecting broke", node=address, error=repr(error), exc_info=error)
        finally:
            node.connecting = None

    def _pause(self, node: _Node, error: SnowskinError) -> None:
        node.error = error
        node.retry_at_s = self._clock.now_s() + node.pause_s
        node.pause_s = min(2 * node.pause_s, MAX_PAUSE_S)

    def _lost(self, address: str, error: SnowskinError) -> None:
        node = self._nodes.get(address)
        if node is None or node.client is None:
            return
        client, node.client = node.client, None
        node.guard.forget()
        self._pause(node, error)
        log.warning("node lost", node=address, error=str(error))
        node.connecting = asyncio.create_task(
            self._close_lost(client, node), context=of_no_request()
        )

    async def _close_lost(self, client: NodeClient, node: _Node) -> None:
        try:
            await client.close()
        except SnowskinError as error:
            log.debug("lost node not closed", error=str(error))
        finally:
            node.connecting = None

    async def _drop(self, node: _Node) -> None:
        await node.guard.close()
        if node.connecting is not None:
            node.connecting.cancel()
            await ended(node.connecting)
        if node.client is not None:
            client, node.client = node.client, None
            await client.close()
