"""Publishing a sequence's blocks in the background while the next ones are computed.

Rules kept here: blocks go out in prefix order, one publish of a sequence at a time, so that what
is reserved and not committed stays within one chunk of it; publishing only ever costs time: its
first failure is counted and logged, and the rest of the sequence is not offered any more (its
readers compute what they miss). A publish that has begun ends before the publisher does: the bytes
under a key are read from blocks that nobody else may write meanwhile.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from snowskin.engines.cancellation import ended
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.tracing import traced
from snowskin.transport.errors import SnowskinError
from snowskin.transport.traffic import TrafficClass

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from snowskin.engines.link import StoreLink
    from snowskin.engines.sequence import KeyChain
    from snowskin.kvstore.client.breaker import LookupBudget
    from snowskin.kvstore.client.machine import Published

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishRules:
    """How a sequence's blocks are published.

    Attributes:
        max_blocks: blocks of one publish.
        one_reader: the blocks go with their first reader.
        timeout_s: of one publish.
        gate: taken for each publish; bounds those under way in the whole instance.
        traffic: how urgent the blocks are.
    """

    max_blocks: int
    one_reader: bool
    timeout_s: float
    gate: asyncio.Semaphore
    traffic: TrafficClass = TrafficClass.DECODE_CRITICAL


class BlockPublisher:
    """Publishes one sequence; an async context manager around its computation.

    Attributes:
        num_blocks: blocks that are new at the node.
        nbytes: their bytes.
        seconds: spent publishing.
        failed: whether a publish failed, so that the node lacks blocks.
    """

    def __init__(
        self,
        link: StoreLink,
        keys: KeyChain,
        block_ids: Sequence[int],
        rules: PublishRules,
        *,
        request_id: str,
    ) -> None:
        """Nothing is published before `ready`."""
        self.num_blocks = 0
        self.nbytes = 0
        self.seconds = 0.0
        self.failed = False
        self._link = link
        self._keys = keys
        self._block_ids = block_ids
        self._rules = rules
        self._request_id = request_id
        self._first = self._next = self._num_ready = 0
        self._stopped = False
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def skip(self, num_blocks: int) -> None:
        """Says, before anything is ready, that the node has the first `num_blocks` already."""
        assert self._num_ready == self._first, "skip comes before ready"
        self._first = self._next = self._num_ready = num_blocks

    def ready(self, num_blocks: int) -> None:
        """Says that KV of the sequence's first `num_blocks` blocks is computed."""
        if num_blocks > self._num_ready:
            self._num_ready = num_blocks
            self._changed.set()

    async def finish(self, budget: LookupBudget) -> None:
        """Returns when all that is ready is published, or publishing has failed.

        A node that does not answer any more costs what is left of `budget`, and then the rest is
        not published.
        """
        self._stopped = True
        self._changed.set()
        assert self._task is not None, "publishers are used as context managers"
        try:
            await self._link.while_answering(asyncio.wait([self._task]), budget)
        except SnowskinError as error:
            self._fail(error)

    @traced("publish tail")
    async def publish_tail(self, block_id: int, budget: LookupBudget) -> bool:
        """Publishes a whole block as the request's tail, behind all blocks; whether it went out.

        `budget` as for `finish`.
        """
        assert self._stopped, "the tail comes last"
        if self.failed:
            return False
        try:
            published = await self._link.while_answering(self._publish_tail(block_id), budget)
        except SnowskinError as error:
            self._fail(error)
            return False
        self.nbytes += published.nbytes
        self.seconds += published.seconds
        return True

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=f"publish {self._request_id}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await ended(self._task)
        if not self._task.cancelled():
            self._task.result()

    async def _run(self) -> None:
        while not self.failed:
            if self._next == self._num_ready:
                if self._stopped:
                    return
                self._changed.clear()
                await self._changed.wait()
                continue
            async with self._rules.gate:
                await self._publish_next()

    async def _publish_tail(self, block_id: int) -> Published:
        async with self._rules.gate:
            return await self._link.publish_tail(
                block_id, timeout_s=self._rules.timeout_s, request_id=self._request_id
            )

    @traced("publish")
    async def _publish_next(self) -> None:
        first = self._next
        last = min(self._num_ready, first + self._rules.max_blocks)
        try:
            published = await self._link.publish(
                self._keys.column(first, last),
                self._block_ids[first:last],
                parent_key=self._keys.parent_of(first),
                one_reader=self._rules.one_reader,
                timeout_s=self._rules.timeout_s,
                traffic=self._rules.traffic,
                request_id=self._request_id,
            )
        except SnowskinError as error:
            self._fail(error)
            return
        self._next = last
        self.num_blocks += published.num_blocks
        self.nbytes += published.nbytes
        self.seconds += published.seconds

    def _fail(self, error: SnowskinError) -> None:
        self.failed = True
        log.warning(
            "publish failed",
            published_blocks=self._next - self._first,
            lost_blocks=self._num_ready - self._next,
            reason=error.reason,
            error=str(error),
        )
