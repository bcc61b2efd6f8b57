"""The extent allocator against a bytearray: one byte of model per byte of pool."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from snowskin.kvstore.pool.allocator import AllocatorCorrupted, ExtentAllocator

CAPACITY = 257  # not a multiple of any alignment: the last bytes of a pool need not be usable


class AllocatorMachine(RuleBasedStateMachine):
    @initialize(alignment=st.sampled_from([1, 4, 16]))
    def start(self, alignment: int) -> None:
        self.alignment = alignment
        self.allocator = ExtentAllocator(CAPACITY, alignment)
        self.taken = bytearray(CAPACITY)

    def rooms(self) -> list[tuple[int, int]]:
        """(room behind the first aligned byte, hole's offset) of every hole of the model."""
        holes, start = [], None
        for at, used in enumerate([*self.taken, 1]):
            if not used and start is None:
                start = at
            elif used and start is not None:
                holes.append((at - -(-start // self.alignment) * self.alignment, start))
                start = None
        return holes

    def take(self, offset: int, nbytes: int) -> None:
        assert not any(self.taken[offset : offset + nbytes]), "overlaps an extent"
        assert offset + nbytes <= CAPACITY
        self.taken[offset : offset + nbytes] = b"\1" * nbytes

    @rule(nbytes=st.integers(1, 80))
    def allocate(self, nbytes: int) -> None:
        offset = self.allocator.allocate(nbytes)
        fitting = [hole for hole in self.rooms() if hole[0] >= nbytes]
        if not fitting:
            assert offset is None
            return
        at = min(fitting)[1]
        assert offset == -(-at // self.alignment) * self.alignment, "not the best fit"
        self.take(offset, nbytes)

    @rule(nbytes=st.integers(1, 80), near=st.integers(0, CAPACITY + 5))
    def allocate_near(self, nbytes: int, near: int) -> None:
        begins_there = (
            near < CAPACITY and not self.taken[near] and (near == 0 or self.taken[near - 1])
        )
        fits = begins_there and not any(self.taken[near : near + nbytes])
        offset = self.allocator.allocate(nbytes, near=near)
        if fits and near + nbytes <= CAPACITY:
            assert offset == near, "did not continue at near"
        elif offset is None:
            assert all(room < nbytes for room, _ in self.rooms())
        else:
            assert offset % self.alignment == 0
        if offset is not None:
            self.take(offset, nbytes)

    @rule(offset=st.integers(0, CAPACITY), nbytes=st.integers(1, 60))
    def free_any_range(self, offset: int, nbytes: int) -> None:
        inside = offset + nbytes <= CAPACITY
        if inside and all(self.taken[offset : offset + nbytes]):
            self.allocator.free(offset, nbytes)
            self.taken[offset : offset + nbytes] = bytes(nbytes)
            return
        before = self.allocator.free_nbytes
        try:
            self.allocator.free(offset, nbytes)
        except AllocatorCorrupted:
            assert self.allocator.free_nbytes == before
        else:
            raise AssertionError("freed what was not allocated")

    @rule(offset=st.integers(0, CAPACITY))
    def ask_hole_at(self, offset: int) -> None:
        found = self.taken.find(1, offset)
        expected = (CAPACITY if found < 0 else found) - offset
        assert self.allocator.hole_at(offset) == expected

    @invariant()
    def numbers_agree(self) -> None:
        self.allocator.check()
        rooms = self.rooms()
        largest = max((room for room, _ in rooms), default=0)
        assert self.allocator.num_holes == len(rooms), "holes are not coalesced"
        assert self.allocator.free_nbytes == self.taken.count(0)
        assert self.allocator.largest_hole_nbytes == max(largest, 0)
        assert 0 <= self.allocator.fragmentation_ratio <= 1


AllocatorMachine.TestCase.settings = settings(stateful_step_count=60, deadline=None)
TestAllocatorMachine = AllocatorMachine.TestCase
