"""Pages of a pool that sockets refer to: who was lent them, and new ones where nobody will say any more.

Rules kept here: what was lent keeps its bytes for whoever still refers to it; nothing waits for a reader. A loan is
settled (its reader has all of it) or forsaken (nobody will say). Before a range is written anew, what is lent or
forsaken of it gets other pages: the old ones leave the file and stay with the sockets. Only whole units are lent and
replaced, and a unit only where all of it is the writer's or nobody's. That a page is gone is looked at, not believed;
where it is not, nothing is lent any more.

A unit is as large as the largest folio that may lie in the file, because the kernel cannot split one that is referred
to: a hole in the middle of it would only clear its bytes, and leave the page where it is.

How it works: units are counted in groups, and a mask per group (a whole number, one bit per unit) says which of them
are marked, by loan and in all. So the books are bounded by the pool, whatever readers do, and who looks for marks takes
no lock.

Sources: fallocate(2) of FALLOC_FL_PUNCH_HOLE, mincore(2), sendfile(2); the kernel's mm/shmem.c and mm/truncate.c.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from snowskin.transport.mapping import Mapping
from snowskin.transport.pages import collapse, wish_huge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    IsFree = Callable[[int, int], bool]

Range = tuple[int, int]  # offset, nbytes

_Key = TypeVar("_Key")

log = logging.getLogger(__name__)

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_GROUP_NBYTES = 8 << 20
_NUM_PUNCHES = 3  # somebody else who maps the file may touch a page between the hole and the look

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Loan:
    """What was lent at once; `Lending.settle` or `Lending.forsake` ends it.

    Attributes:
        ranges: (offset, nbytes) of whole units, merged, in order of offset; empty where nothing was lent.
    """

    __slots__ = ("ranges",)

    def __init__(self, ranges: tuple[Range, ...]) -> None:
        """Made by `Lending.lend`."""
        self.ranges = ranges

    @property
    def nbytes(self) -> int:
        """Bytes of all ranges."""
        return sum(nbytes for _, nbytes in self.ranges)


class Lending:
    """What of one memfd is lent; any thread may call.

    Attributes:
        nbytes: of the file.
        unit_nbytes: what is lent and replaced as a whole.
        fd: a descriptor of the file, for sendfile; -1 after `close`.
    """

    def __init__(self, fd: int, nbytes: int, *, unit_nbytes: int) -> None:
        """Keeps a descriptor of its own.

        Args:
            fd: a memfd with all rights, not of hugetlb; stays the caller's.
            nbytes: its size.
            unit_nbytes: whole pages; at least the largest folio that may lie in it.

        Raises:
            ValueError: the unit is not whole pages. TransportError: the file cannot be mapped.
        """
        if unit_nbytes < 1 or unit_nbytes % mmap.PAGESIZE:
            raise ValueError(f"a unit of {unit_nbytes} bytes is not whole pages")
        self.nbytes = nbytes
        self.unit_nbytes = unit_nbytes
        self._num_in_group = max(1, _GROUP_NBYTES // unit_nbytes)
        self._lock = threading.Lock()  # of the books; never held over a call of the kernel
        self._replacing = threading.Lock()  # held by who replaces pages, and by `close`
        # Of each group of units: what is marked at all, what is forsaken, and what each loan still has.
        self._marked: dict[int, int] = {}
        self._forsaken: dict[int, int] = {}
        self._lent: dict[int, dict[Loan, int]] = {}
        self._loans: dict[Loan, tuple[int, ...]] = {}
        self._lent_nbytes = 0
        self._num_forsaken = 0
        self._num_reclaimed = self._num_settled = 0
        self._is_refused = False
        self._mapping: Mapping | None = Mapping(fd, nbytes, writable=False)  # never touched
        if unit_nbytes > mmap.PAGESIZE:
            wish_huge(self._mapping.address, nbytes)
        self.fd = os.dup(fd)

    @property
    def lent_nbytes(self) -> int:
        """Bytes of all loans that are neither settled nor forsaken; each loan's count."""
        return self._lent_nbytes

    @property
    def forsaken_nbytes(self) -> int:
        """Bytes whose pages must be replaced before they are written."""
        return self._num_forsaken * self.unit_nbytes

    @property
    def num_reclaimed(self) -> int:
        """Units whose pages were replaced, since the beginning."""
        return self._num_reclaimed

    @property
    def num_settled(self) -> int:
        """Loans that were settled, since the beginning: what was in the way of a reservation may be no more."""
        return self._num_settled

    @property
    def is_refused(self) -> bool:
        """Whether nothing is lent any more, because the kernel kept a page that it was told to drop."""
        return self._is_refused

    def lendable(self, offset: int, nbytes: int) -> Range:
        """The whole units inside [offset, offset + nbytes); of 0 bytes where there are none."""
        unit_nbytes = self.unit_nbytes
        start = -(-offset // unit_nbytes) * unit_nbytes
        end = (offset + nbytes) // unit_nbytes * unit_nbytes
        return start, max(0, end - start)

    def lend(self, ranges: Iterable[Range]) -> Loan:
        """Marks the whole units of each range, until the loan is settled or replaced.

        To be called before the first page is handed to the kernel, and while nobody can take the bytes away.
        """
        loan = Loan(self._whole(ranges))
        if not loan.ranges:
            return loan
        masks: dict[int, int] = {}
        for offset, nbytes in loan.ranges:
            for group, mask in self._masks(offset, nbytes):
                masks[group] = masks.get(group, 0) | mask
        with self._lock:
            if self._is_refused or self.fd < 0:
                return Loan(())
            for group, mask in masks.items():
                self._lent.setdefault(group, {})[loan] = mask
                self._marked[group] = self._marked.get(group, 0) | mask
            self._loans[loan] = tuple(masks)
            self._lent_nbytes += loan.nbytes
        return loan

    def settle(self, loan: Loan) -> None:
        """Its reader has copied all of it: nothing refers to its pages. Idempotent."""
        with self._lock:
            self._num_settled += loan in self._loans
            self._end(loan)

    def forsake(self, loan: Loan) -> None:
        """Nobody will say when its pages are let go: they are replaced before they are written. Idempotent."""
        with self._lock:
            for group in self._loans.get(loan, ()):
                mask = self._lent.get(group, {}).get(loan, 0)
                before = self._forsaken.get(group, 0)
                _put(self._forsaken, group, before | mask)
                self._num_forsaken += (mask & ~before).bit_count()
            # Only now: who looks without the lock must find the marks at any moment.
            self._end(loan)

    def reclaim(self, offset: int, nbytes: int, is_free: IsFree) -> bool:
        """Makes [offset, offset + nbytes) safe to write: to be called by who was just given it, and before.

        What is lent in it counts as forsaken: whoever gave the bytes away first ended every lease of them.

        Args:
            offset: of the extent.
            nbytes: of the extent.
            is_free: whether nobody lives in (offset, nbytes), outside the extent.

        Returns:
            False where it must not be written: a unit has living neighbours, or a page would not go. Nothing changed.
        """
        if not self._marked or not self._is_marked(offset, nbytes):
            return True
        with self._replacing:
            runs = self._marked_runs(offset, nbytes)
            if not all(self._is_whole(run, offset, nbytes, is_free) for run in runs):
                return False
            return all(self._replace(start, run_nbytes) for start, run_nbytes in runs)

    def close(self) -> None:
        """Lends nothing any more and closes the descriptor; idempotent."""
        with self._replacing, self._lock:
            fd, self.fd = self.fd, -1
            self._mapping = None
        if fd >= 0:
            os.close(fd)

    def _whole(self, ranges: Iterable[Range]) -> tuple[Range, ...]:
        merged: list[list[int]] = []
        for start, nbytes in sorted(self.lendable(*each) for each in ranges):
            if not nbytes:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + nbytes)
            else:
                merged.append([start, start + nbytes])
        return tuple((start, end - start) for start, end in merged)

    def _masks(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Each group with the bits of the units that [offset, offset + nbytes) touches."""
        num_in_group = self._num_in_group
        first, end = offset // self.unit_nbytes, -(-(offset + nbytes) // self.unit_nbytes)
        for group in range(first // num_in_group, -(-end // num_in_group)):
            begin = group * num_in_group
            low, high = max(first - begin, 0), min(end - begin, num_in_group)
            yield group, (1 << high) - (1 << low)

    def _is_marked(self, offset: int, nbytes: int) -> bool:
        """Without the lock: nobody marks what nobody may read, and dictionaries are read whole."""
        marked = self._marked
        num_in_group = self._num_in_group
        first = offset // self.unit_nbytes // num_in_group
        last = (offset + nbytes - 1) // self.unit_nbytes // num_in_group
        if marked.keys().isdisjoint(range(first, last + 1)):
            return False
        return any(marked.get(group, 0) & mask for group, mask in self._masks(offset, nbytes))

    def _marked_runs(self, offset: int, nbytes: int) -> list[Range]:
        """The marked units that the range touches, neighbours together."""
        runs: list[Range] = []
        with self._lock:
            found = [
                (group * self._num_in_group, self._marked.get(group, 0) & mask)
                for group, mask in self._masks(offset, nbytes)
            ]
        for begin, bits in found:
            while bits:
                low = (bits & -bits).bit_length() - 1
                length = (~(bits >> low) & ((bits >> low) + 1)).bit_length() - 1
                start, run_nbytes = (begin + low) * self.unit_nbytes, length * self.unit_nbytes
                if runs and sum(runs[-1]) == start:
                    start, run_nbytes = runs[-1][0], runs[-1][1] + run_nbytes
                    runs.pop()
                runs.append((start, run_nbytes))
                bits &= -1 << (low + length)
        return runs

    @staticmethod
    def _is_whole(run: Range, offset: int, nbytes: int, is_free: IsFree) -> bool:
        """Whether nobody lives in what of `run` is outside the extent."""
        start, end = run[0], sum(run)
        before, behind = offset - start, end - (offset + nbytes)
        return (before <= 0 or is_free(start, before)) and (
            behind <= 0 or is_free(offset + nbytes, behind)
        )

    def _replace(self, start: int, nbytes: int) -> bool:
        """Other pages for a run of units; False where the old ones stay."""
        mapping = self._mapping
        if mapping is None:  # closed: nobody looks after these pages any more
            return False
        reason = self._drop(mapping, start, nbytes)
        if reason:
            if not self._is_refused:
                log.error(
                    "nothing is lent any more: pages at %d of %d bytes stay: %s",
                    start,
                    nbytes,
                    reason,
                )
            self._is_refused = True
            return False
        with self._lock:
            for group, mask in self._masks(start, nbytes):
                self._unmark(group, mask)
            self._num_reclaimed += nbytes // self.unit_nbytes
        try:
            self._refill(mapping, start, nbytes)
        except OSError as error:
            log.warning(
                "%d bytes at %d get their pages when touched: %s", nbytes, start, error.strerror
            )
        return True

    def _refill(self, mapping: Mapping, start: int, nbytes: int) -> None:
        """Makes pages again, as large as they were; raises OSError where there is no memory."""
        if self.unit_nbytes > mmap.PAGESIZE:
            # The kernel makes a huge page of one small page and a hole, for an eighth of what all small ones cost.
            for unit in range(start, start + nbytes, self.unit_nbytes):
                os.posix_fallocate(self.fd, unit, mmap.PAGESIZE)
            if not collapse(mapping.address + start, nbytes):
                return
        os.posix_fallocate(self.fd, start, nbytes)

    def _drop(self, mapping: Mapping, start: int, nbytes: int) -> str:
        """Takes the pages out of the file; "" where they are, else what the kernel does."""
        for _ in range(_NUM_PUNCHES):
            if _libc.fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, start, nbytes):
                return os.strerror(ctypes.get_errno())
            if not is_resident(mapping.address + start, nbytes):
                return ""
        return "the file still has them"

    def _unmark(self, group: int, mask: int) -> None:
        """Forgets these units of a group, whoever has them; under the lock."""
        before = self._forsaken.get(group, 0)
        self._num_forsaken -= (before & mask).bit_count()
        _put(self._forsaken, group, before & ~mask)
        loans = self._lent.get(group, {})
        for loan in list(loans):
            _put(loans, loan, loans[loan] & ~mask)
        if not loans:
            self._lent.pop(group, None)
        _put(self._marked, group, self._marked.get(group, 0) & ~mask)

    def _end(self, loan: Loan) -> None:
        """Takes a loan out of the books; under the lock."""
        groups = self._loans.pop(loan, None)
        if groups is None:
            return
        self._lent_nbytes -= loan.nbytes
        for group in groups:
            loans = self._lent.get(group, {})
            if not loans.pop(loan, 0):
                continue
            if not loans:
                self._lent.pop(group, None)
            left = self._forsaken.get(group, 0)
            for other in loans.values():
                left |= other
            _put(self._marked, group, left)


def is_resident(address: int, nbytes: int) -> bool:
    """Whether the file under a mapping has any page there; whole pages."""
    seen = np.zeros(nbytes // mmap.PAGESIZE, dtype=np.uint8)
    if _libc.mincore(address, nbytes, seen.ctypes.data):
        return True  # not to be learnt
    return bool((seen & 1).any())


def _put(masks: dict[_Key, int], key: _Key, mask: int) -> None:
    """No entry for an empty mask."""
    if mask:
        masks[key] = mask
    else:
        masks.pop(key, None)
