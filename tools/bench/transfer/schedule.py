"""Who holds decode memory while nothing is in it: requests through prefill and a small decode pool, pull or push.

KVDirect [2501.14743]: a decode worker that is pushed to must reserve before prefill begins, and what it reserved lies
idle for the whole prefill; one that pulls reserves when the KV is there. Runs in the reader's process, with real
transfers; only the computing is waited for instead of done. *Idle* is a reserved range until its bytes have landed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Move = Callable[[int, int], Awaitable[object]]
"""`move(source_slot, target_slot)`: one request's bytes to a slot of the decode pool, by pull or by push."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests that come faster than the decode pool would like.

    Attributes:
        num_slots: of the decode pool, one request each.
        arrival_s: from one request to the next.
        prefill_s: mean; a request takes between half and one and a half times that, so that they complete staggered.
        num_prefills: at once.
        decode_s: how long a request keeps its slot after its bytes have landed.
    """

    num_requests: int = 32
    request_nbytes: int = 2 << 20
    num_slots: int = 4
    arrival_s: float = 0.005
    prefill_s: float = 0.04
    num_prefills: int = 4
    decode_s: float = 0.02

    def prefill_of(self, index: int) -> float:
        """Seconds of prefill of one request; a fixed sequence without a pattern."""
        return self.prefill_s * (0.5 + (index * 0.618_033_988_75) % 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One request: when it came, when memory was reserved for it, when its bytes had landed."""

    arrived_at_s: float
    reserved_at_s: float
    landed_at_s: float


async def run(load: Load, move: Move, *, is_pull: bool) -> list[Held]:
    """All requests; pull reserves after prefill, push before it."""
    free: asyncio.Queue[int] = asyncio.Queue()
    for slot in range(load.num_slots):
        free.put_nowait(slot)
    prefills = asyncio.Semaphore(load.num_prefills)

    async def serve(index: int) -> Held:
        arrived_at_s = time.monotonic()
        async with prefills:
            if is_pull:
                await asyncio.sleep(load.prefill_of(index))
            slot = await free.get()
            reserved_at_s = time.monotonic()
            if not is_pull:
                await asyncio.sleep(load.prefill_of(index))
            await move(index % load.num_slots, slot)
            landed_at_s = time.monotonic()
        await asyncio.sleep(load.decode_s)
        free.put_nowait(slot)
        return Held(arrived_at_s=arrived_at_s, reserved_at_s=reserved_at_s, landed_at_s=landed_at_s)

    async with asyncio.TaskGroup() as group:
        tasks = []
        for index in range(load.num_requests):
            tasks.append(group.create_task(serve(index)))
            await asyncio.sleep(load.arrival_s)
    return [task.result() for task in tasks]
