"""Who gets KV blocks: in order, bounded, and nothing lost to a cancelled waiter."""

from __future__ import annotations

import asyncio

import pytest

from snowskin.engines.errors import InstanceOverloaded, PromptTooLong
from snowskin.engines.kv_room import KvRoom


class Blocks:
    """Counts blocks, as `KvMemory` does."""

    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.free_ids = list(range(num_blocks))

    @property
    def num_free(self):
        return len(self.free_ids)

    def allocate(self, num_blocks):
        taken, self.free_ids = self.free_ids[:num_blocks], self.free_ids[num_blocks:]
        return taken

    def free(self, block_ids):
        assert not set(block_ids) & set(self.free_ids)
        self.free_ids += block_ids


def new_room(memory, **bounds):
    return KvRoom(memory, **bounds)


class Holder:
    """A task that holds blocks until told to let go."""

    def __init__(self, room, num_blocks):
        self.let_go = asyncio.Event()
        self.holds = False
        self.task = asyncio.create_task(self._run(room, num_blocks))

    async def _run(self, room, num_blocks):
        async with room.hold(num_blocks):
            self.holds = True
            await self.let_go.wait()

    async def end(self):
        self.let_go.set()
        await self.task


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_grants_are_in_the_order_of_asking_even_where_a_later_one_would_fit():
    room = new_room(Blocks(10), max_held=9, max_waiting=9)
    first, big, small = Holder(room, 6), Holder(room, 8), Holder(room, 1)
    await settle()
    assert (first.holds, big.holds, small.holds) == (True, False, False)
    await first.end()
    await settle()
    assert (big.holds, small.holds) == (True, True)
    await big.end()
    await small.end()
    assert room.num_held == 0


async def test_at_most_max_held_hold_at_a_time():
    room = new_room(Blocks(10), max_held=2, max_waiting=9)
    holders = [Holder(room, 1) for _ in range(3)]
    await settle()
    assert [holder.holds for holder in holders] == [True, True, False]
    await holders[0].end()
    await settle()
    assert holders[2].holds
    await holders[1].end()
    await holders[2].end()


async def test_what_can_never_fit_and_who_is_one_too_many_are_refused():
    room = new_room(Blocks(4), max_held=9, max_waiting=1)
    with pytest.raises(PromptTooLong):
        await Holder(room, 5).task
    holder, waiter = Holder(room, 4), Holder(room, 4)
    await settle()
    with pytest.raises(InstanceOverloaded):
        await Holder(room, 1).task
    await holder.end()
    await waiter.end()


async def test_a_cancelled_waiter_makes_way_for_those_behind():
    memory = Blocks(10)
    room = new_room(memory, max_held=9, max_waiting=9)
    holder, big, small = Holder(room, 6), Holder(room, 8), Holder(room, 2)
    await settle()
    big.task.cancel()
    await settle()
    assert small.holds
    await holder.end()
    await small.end()
    assert (memory.num_free, room.num_held, room.num_waiting) == (10, 0, 0)


async def test_a_waiter_cancelled_in_the_moment_of_its_grant_gives_it_back():
    memory = Blocks(4)
    room = new_room(memory, max_held=9, max_waiting=9)
    holder, waiter = Holder(room, 4), Holder(room, 4)
    await settle()
    holder.let_go.set()
    for _ in range(10):  # until it is granted, and not yet awake
        if not room.num_waiting:
            break
        await asyncio.sleep(0)
    waiter.task.cancel()
    await asyncio.wait([holder.task, waiter.task])
    assert waiter.task.cancelled()
    assert not waiter.holds
    assert (memory.num_free, room.num_held) == (4, 0)
