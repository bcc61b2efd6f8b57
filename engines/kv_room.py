"""Who gets KV blocks next: first come, first served.

Rules kept here: blocks are granted in the order of asking, so that a long sequence is never starved
by short ones behind it; at most `max_held` grants are out at a time; a waiter that is cancelled
leaves nothing behind, not even where its grant had just been made.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.engines.errors import InstanceOverloaded, PromptTooLong

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from snowskin.engines.model.kv_memory import KvMemory


@dataclass(slots=True, eq=False)
class _Waiter:
    """One who asked; `granted` resolves to block ids."""

    num_blocks: int
    granted: asyncio.Future[list[int]] = field(default_factory=asyncio.Future)


class KvRoom:
    """Grants of KV blocks over one memory.

    Attributes:
        num_held: grants that are out now.
    """

    def __init__(self, memory: KvMemory, *, max_held: int, max_waiting: int) -> None:
        """All blocks of `memory` are granted through this room, and only through it."""
        self.num_held = 0
        self._memory = memory
        self._max_held = max_held
        self._max_waiting = max_waiting
        self._waiters: deque[_Waiter] = deque()

    @property
    def num_waiting(self) -> int:
        """How many wait for a grant."""
        return len(self._waiters)

    @asynccontextmanager
    async def hold(self, num_blocks: int) -> AsyncIterator[list[int]]:
        """Grants `num_blocks` blocks until the block of code ends, after a wait for one's turn.

        The caller bounds the wait with a deadline of its own.

        Raises:
            PromptTooLong: the memory could never hold so many.
            InstanceOverloaded: too many wait already.
        """
        block_ids = await self._take(num_blocks)
        try:
            yield block_ids
        finally:
            self._give(block_ids)

    async def _take(self, num_blocks: int) -> list[int]:
        if num_blocks > self._memory.num_blocks:
            raise PromptTooLong(
                f"{num_blocks} KV blocks wanted, this instance has {self._memory.num_blocks}",
                hint="shorten the prompt, ask for fewer tokens, or raise kv_memory_nbytes",
            )
        if self.num_waiting >= self._max_waiting:
            raise InstanceOverloaded(
                f"{self.num_waiting} requests wait for KV memory, {self._max_waiting} may",
                hint="send the request to another instance, or later",
                retry_after_s=1.0,
            )
        waiter = _Waiter(num_blocks)
        self._waiters.append(waiter)
        self._grant()
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._grant()  # who stood behind may fit
            elif not waiter.granted.cancelled():
                self._give(waiter.granted.result())  # granted and cancelled in the same turn
            raise

    def _give(self, block_ids: list[int]) -> None:
        self._memory.free(block_ids)
        self.num_held -= 1
        self._grant()

    def _grant(self) -> None:
        while self._waiters and self.num_held < self._max_held:
            waiter = self._waiters[0]
            if waiter.num_blocks > self._memory.num_free:
                return
            self._waiters.popleft()
            if waiter.granted.cancelled():
                continue
            self.num_held += 1
            waiter.granted.set_result(self._memory.allocate(waiter.num_blocks))
