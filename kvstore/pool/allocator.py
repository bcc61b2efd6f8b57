"""Extents: which bytes of a pool are taken, and where the next ones go.

Rules kept here: extents never overlap; what is not in a hole is allocated, so there is no second
table to disagree with; neighbouring holes are always merged; a full pool is an answer (None), not
an error; freeing what is free is a bug of the caller and is refused before anything changes.

How it works: the holes are the whole state, kept twice. `_hole_ends` (offset -> end) finds
neighbours for merging; `_rooms` holds (room, offset), where room is what fits behind the hole's
first aligned byte, so that one bisection finds the best fit even among holes that begin between two
aligned offsets. Such holes exist because a segment continues exactly at its parent's end, wherever
that lies. Every operation is O(log num_holes). Best fit and not first fit: segments of one model
have few sizes, and best fit keeps the large holes for the long prompts.
"""

from __future__ import annotations

from sortedcontainers import SortedDict, SortedList


class AllocatorCorrupted(AssertionError):
    """A range was freed that is not allocated: a bug, never a condition of the pool."""


class ExtentAllocator:
    """Contiguous extents over one range of bytes.

    Offsets are multiples of `alignment`, except where an extent continues exactly at `near`. Any
    unit works: a caller that counts blocks passes `alignment=1`.
    """

    __slots__ = ("_alignment", "_capacity_nbytes", "_free_nbytes", "_hole_ends", "_rooms")

    def __init__(self, capacity_nbytes: int, alignment: int = 4096) -> None:
        """Begins with one hole; both numbers must be at least 1 (ValueError)."""
        if capacity_nbytes < 1 or alignment < 1:
            raise ValueError(f"capacity {capacity_nbytes} and alignment {alignment} must be ≥ 1")
        self._capacity_nbytes = capacity_nbytes
        self._alignment = alignment
        self._free_nbytes = 0
        self._hole_ends: SortedDict[int, int] = SortedDict()
        self._rooms: SortedList[tuple[int, int]] = SortedList()
        self._add_hole(0, capacity_nbytes)

    @property
    def capacity_nbytes(self) -> int:
        """Bytes of the whole range."""
        return self._capacity_nbytes

    @property
    def free_nbytes(self) -> int:
        """Bytes in all holes together."""
        return self._free_nbytes

    @property
    def num_holes(self) -> int:
        """How many separate holes there are."""
        return len(self._hole_ends)

    @property
    def largest_hole_nbytes(self) -> int:
        """The largest extent that `allocate` can give now, without `near`."""
        return self._rooms[-1][0] if self._rooms else 0

    @property
    def fragmentation_ratio(self) -> float:
        """Share of the free bytes that one single extent cannot have: 0 is one hole, or none."""
        return 1 - self.largest_hole_nbytes / self._free_nbytes if self._free_nbytes else 0.0

    def allocate(self, nbytes: int, *, near: int | None = None) -> int | None:
        """Takes `nbytes` and returns their offset; None where no hole is large enough.

        Args:
            nbytes: at least 1 (ValueError).
            near: where the caller would like to continue, usually its parent segment's end. Taken
                exactly there if a hole with enough room begins there (or has its first aligned byte
                there); else the best fit anywhere.
        """
        if nbytes < 1:
            raise ValueError(f"an extent of {nbytes} bytes cannot be allocated")
        offset = None if near is None else self._fit_at(near, nbytes)
        if offset is None:
            offset = self._best_fit(nbytes)
        if offset is None:
            return None
        self._take(offset, nbytes)
        return offset

    def free(self, offset: int, nbytes: int) -> None:
        """Gives back any allocated range, a part of an extent or several adjoining ones.

        Raises:
            AllocatorCorrupted: some byte of it is free already or out of the range; nothing is
                changed.
        """
        end = offset + nbytes
        if nbytes < 1 or offset < 0 or end > self._capacity_nbytes:
            raise AllocatorCorrupted(f"[{offset}, {end}) is not in [0, {self._capacity_nbytes})")
        before, after = self._neighbours(offset)
        if before is not None and self._hole_ends[before] > offset:
            raise AllocatorCorrupted(f"[{offset}, {end}) is free from {before} on")
        if after is not None and after < end:
            raise AllocatorCorrupted(f"[{offset}, {end}) is free from {after} on")
        if before is not None and self._hole_ends[before] == offset:
            self._remove_hole(before)
            offset = before
        if after == end:
            end = self._hole_ends[after]
            self._remove_hole(after)
        self._add_hole(offset, end)

    def hole_at(self, offset: int) -> int:
        """Free bytes from exactly `offset` on; 0 where `offset` is allocated."""
        at = self._hole_containing(offset)
        return 0 if at is None else self._hole_ends[at] - offset

    def check(self) -> None:
        """Raises AllocatorCorrupted where an invariant does not hold; O(num_holes)."""
        previous_end = -1
        free_nbytes = 0
        rooms = []
        for offset, end in self._hole_ends.items():
            # > and not >=: adjoining holes must have been merged.
            if not previous_end < offset < end <= self._capacity_nbytes:
                raise AllocatorCorrupted(
                    f"hole [{offset}, {end}) after one ending at {previous_end}"
                )
            previous_end = end
            free_nbytes += end - offset
            if (room := end - self._aligned(offset)) > 0:
                rooms.append((room, offset))
        if free_nbytes != self._free_nbytes:
            raise AllocatorCorrupted(f"{free_nbytes} bytes in holes, {self._free_nbytes} counted")
        if sorted(rooms) != list(self._rooms):
            raise AllocatorCorrupted("the two indexes of holes disagree")

    def _aligned(self, offset: int) -> int:
        return -(-offset // self._alignment) * self._alignment

    def _fit_at(self, near: int, nbytes: int) -> int | None:
        """`near`, if it is the first or the first aligned byte of a hole with room for `nbytes`."""
        at = self._hole_containing(near)
        if at is None or near not in (at, self._aligned(at)):
            return None
        return near if self._hole_ends[at] - near >= nbytes else None

    def _best_fit(self, nbytes: int) -> int | None:
        """First aligned byte of the smallest hole that fits; on ties the lowest offset."""
        index = self._rooms.bisect_left((nbytes, 0))
        return self._aligned(self._rooms[index][1]) if index < len(self._rooms) else None

    def _take(self, offset: int, nbytes: int) -> None:
        at = self._hole_containing(offset)
        assert at is not None, "only ranges inside a hole are taken"
        hole_end = self._hole_ends[at]
        self._remove_hole(at)
        if at < offset:
            self._add_hole(at, offset)
        if offset + nbytes < hole_end:
            self._add_hole(offset + nbytes, hole_end)

    def _hole_containing(self, offset: int) -> int | None:
        index = self._hole_ends.bisect_right(offset) - 1
        if index < 0:
            return None
        at, end = self._hole_ends.peekitem(index)
        return at if offset < end else None

    def _neighbours(self, offset: int) -> tuple[int | None, int | None]:
        """The holes that begin at or before, and after, `offset`."""
        keys = self._hole_ends.keys()
        index = self._hole_ends.bisect_right(offset)
        return keys[index - 1] if index else None, keys[index] if index < len(keys) else None

    def _add_hole(self, offset: int, end: int) -> None:
        self._hole_ends[offset] = end
        if (room := end - self._aligned(offset)) > 0:
            self._rooms.add((room, offset))
        self._free_nbytes += end - offset

    def _remove_hole(self, offset: int) -> None:
        end = self._hole_ends.pop(offset)
        if (room := end - self._aligned(offset)) > 0:
            self._rooms.remove((room, offset))
        self._free_nbytes -= end - offset
