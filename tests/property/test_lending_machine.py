"""Lending against pipes that hold a pool's pages for as long as they like: what they were given never changes.

A pipe refers to pages as a socket's buffer does, and costs nothing to make. The pool's books are the real ones, so what
is passed over and given back is part of it; one byte of model per unit says what is marked.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from snowskin.kvstore.pool.pool import Pool, Use
from snowskin.transport.lending import Lending, Loan

PAGE = mmap.PAGESIZE
NUM_UNITS = 12
BLOCK = PAGE // 2  # several blocks share a page, and a unit


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """What a writer was given, and filled."""

    offset: int
    nbytes: int
    fill: int


@dataclass(slots=True, eq=False)
class Reader:
    """A pipe full of pages, and what must come out of it."""

    loan: Loan
    ends: tuple[int, int]
    expected: bytes
    units: set[int] = field(default_factory=set)  # still marked by this loan, as the model has it

    def read(self) -> bytes:
        got = b""
        while piece := os.read(self.ends[0], 1 << 20):
            got += piece
        return got


class LendingMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.sampled_from([1, 2, 4]), in_group=st.sampled_from([1, 3, 64]))
    def start(self, num_pages: int, in_group: int) -> None:
        self.unit = num_pages * PAGE
        self.nbytes = NUM_UNITS * self.unit
        self.fd = os.memfd_create("snowskin-machine", os.MFD_CLOEXEC)
        os.posix_fallocate(self.fd, 0, self.nbytes)
        self.lending = Lending(self.fd, self.nbytes, unit_nbytes=self.unit)
        self.lending._num_in_group = in_group
        self.pool = Pool(0, self.nbytes, tenant="t", alignment=BLOCK, pages=self.lending)
        self.extents: list[Extent] = []
        self.lent: list[Reader] = []
        self.forsaken: list[Reader] = []
        self.forsaken_units: set[int] = set()
        self.num_fills = 0

    @rule(num_blocks=st.integers(1, 24), limit=st.sampled_from([3 * BLOCK, 1 << 30]))
    def write(self, num_blocks: int, limit: int) -> None:
        near = self.extents[-1].offset + self.extents[-1].nbytes if self.extents else None
        free_nbytes = self.pool.free_nbytes
        pieces = self.pool.place(num_blocks, BLOCK, near=near, max_extent_nbytes=limit)
        if pieces is None:
            assert self.pool.free_nbytes == free_nbytes
            return
        for offset, count in pieces:
            self.num_fills += 1
            extent = Extent(offset, count * BLOCK, 1 + self.num_fills % 255)
            os.pwrite(self.fd, bytes([extent.fill]) * extent.nbytes, offset)
            self.extents.append(extent)
            touched = set(range(offset // self.unit, -(-(offset + extent.nbytes) // self.unit)))
            # Whoever was written over is not marked any more: the writer has other pages.
            self.forsaken_units -= touched
            for reader in self.lent:
                reader.units -= touched

    @precondition(lambda self: self.extents)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        extent = self.extents.pop(data.draw(st.integers(0, len(self.extents) - 1)))
        self.pool.free(extent.offset, extent.nbytes, Use.RESERVED)

    @precondition(lambda self: self.extents)
    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        extent = data.draw(st.sampled_from(self.extents))
        skip = data.draw(st.integers(0, extent.nbytes - 1))
        loan = self.lending.lend([(extent.offset + skip, extent.nbytes - skip)])
        ends = os.pipe2(os.O_CLOEXEC)
        taken = 0
        for offset, nbytes in loan.ranges:
            taken += os.splice(self.fd, ends[1], min(nbytes, 8 * PAGE), offset_src=offset)
        units = {unit for offset, n in loan.ranges for unit in self.units_of(offset, n)}
        os.set_blocking(ends[0], False)
        reader = Reader(loan, ends, bytes([extent.fill]) * taken, units)
        self.lent.append(reader)

    @precondition(lambda self: self.lent)
    @rule(data=st.data(), times=st.integers(1, 2))
    def settle(self, data: st.DataObject, times: int) -> None:
        reader = self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1)))
        self.read_all(reader)
        for _ in range(times):
            self.lending.settle(reader.loan)

    @precondition(lambda self: self.lent)
    @rule(data=st.data(), settles_too_late=st.booleans())
    def forsake(self, data: st.DataObject, settles_too_late: bool) -> None:
        reader = self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1)))
        self.lending.forsake(reader.loan)
        self.lending.forsake(reader.loan)
        if settles_too_late:
            self.lending.settle(reader.loan)
        self.forsaken_units |= reader.units
        self.forsaken.append(reader)

    @precondition(lambda self: self.forsaken)
    @rule(data=st.data())
    def read_late(self, data: st.DataObject) -> None:
        self.read_all(self.forsaken.pop(data.draw(st.integers(0, len(self.forsaken) - 1))))

    @invariant()
    def living_bytes_are_right(self) -> None:
        for extent in getattr(self, "extents", ()):
            got = os.pread(self.fd, extent.nbytes, extent.offset)
            assert got == bytes([extent.fill]) * extent.nbytes

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "lending"):
            return
        assert not self.lending.is_refused
        assert self.lending.lent_nbytes == sum(reader.loan.nbytes for reader in self.lent)
        assert self.lending.forsaken_nbytes == len(self.forsaken_units) * self.unit
        marked = self.forsaken_units.union(*(reader.units for reader in self.lent))
        for unit in range(NUM_UNITS):
            assert self.lending._is_marked(unit * self.unit, self.unit) == (unit in marked)
        self.pool.check()

    def units_of(self, offset: int, nbytes: int) -> range:
        return range(offset // self.unit, (offset + nbytes) // self.unit)

    def read_all(self, reader: Reader) -> None:
        os.close(reader.ends[1])
        got = reader.read()
        os.close(reader.ends[0])
        assert got == reader.expected, "somebody else's bytes"

    def teardown(self) -> None:
        if not hasattr(self, "lending"):
            return
        try:
            for reader in (*self.lent, *self.forsaken):
                self.read_all(reader)
        finally:
            self.lending.close()
            os.close(self.fd)


TestLendingMachine = LendingMachine.TestCase
TestLendingMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
