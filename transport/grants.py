"""Grants: what an owner lets peers read and write, until when, and the way to take it back.

Rules kept here: a capability names one grant; a request is checked whole (capability, epoch,
generation, life, every range) before a byte is touched, and the grant once more before each piece;
those whose life is long over are forgotten, whether their owner takes them back or not;
an unknown capability, a revoked one and one of another epoch or generation look alike from outside;
when `revoke` has returned, no piece is under way and none begins.

Time comes from the caller. Methods may be called from any thread.
"""

from __future__ import annotations

import bisect
import hmac
import math
import operator
import threading
from typing import TYPE_CHECKING

from snowskin.transport.errors import (
    GrantRefused,
    OutOfBounds,
    RegionExpired,
    RegionReadOnly,
    TransportClosed,
)
from snowskin.transport.memory import LandingGate
from snowskin.transport.words import Range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.memory import MemoryRegion
    from snowskin.transport.words import Completion

_NBYTES = operator.itemgetter(1)
REMEMBER_S = 60.0  # for so long who comes too late hears that it is too late
_SWEEP_FROM = 64


class GrantedRanges:
    """Ranges in order, those that touch or overlap joined; answers whether one contains another."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[Range], region_nbytes: int) -> None:
        """Raises OutOfBounds where a range is empty or leaves the region, or where there is none."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for offset, nbytes in sorted(ranges):
            if nbytes < 1 or offset < 0 or offset + nbytes > region_nbytes:
                raise OutOfBounds(
                    f"cannot grant {nbytes} bytes at {offset} of a region of {region_nbytes}",
                    hint="every range needs at least 1 byte, inside the region",
                )
            if self._ends and offset <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], offset + nbytes)
            else:
                self._starts.append(offset)
                self._ends.append(offset + nbytes)
        if not self._starts:
            raise OutOfBounds("a grant needs at least one range")

    def __iter__(self) -> Iterator[Range]:
        """The joined ranges, in order."""
        for start, end in zip(self._starts, self._ends, strict=True):
            yield Range(start, end - start)

    def contain(self, offset: int, nbytes: int) -> bool:
        """Whether all bytes of a range lie in one granted range."""
        index = bisect.bisect_right(self._starts, offset) - 1
        return nbytes >= 1 and index >= 0 and offset + nbytes <= self._ends[index]

    def first_outside(self, ranges: Iterable[tuple[int, int]]) -> int | None:
        """Index of the first of `(offset, nbytes)` that they do not `contain`; None where they contain all.

        Neighbours mostly lie in the same granted range, so that one is looked at first: 4,096 ranges hold the
        interpreter for 0.2 ms, and one by one for 0.5.
        """
        start = end = 0
        for index, (offset, nbytes) in enumerate(ranges):
            if not (start <= offset and 0 < nbytes <= end - offset):
                if not self.contain(offset, nbytes):
                    return index
                granted = bisect.bisect_right(self._starts, offset) - 1
                start, end = self._starts[granted], self._ends[granted]
        return None


class Grant:
    """One peer's right to some ranges of a region."""

    __slots__ = ("_gate", "descriptor", "expires_at_s", "on_done", "ranges", "region")

    def __init__(
        self,
        descriptor: RegionDescriptor,
        region: MemoryRegion,
        ranges: GrantedRanges,
        *,
        expires_at_s: float,
        on_done: Callable[[Completion], None] | None,
    ) -> None:
        """Use `GrantTable.add`."""
        self.descriptor = descriptor
        self.region = region
        self.ranges = ranges
        self.expires_at_s = expires_at_s
        self.on_done = on_done
        self._gate = LandingGate("this grant")

    @property
    def revoked(self) -> bool:
        """Whether it was taken back."""
        return self._gate.closed

    def check(self, ranges: Sequence[tuple[int, int]], *, is_push: bool, now_s: float) -> int:
        """Sum of the bytes of `(offset, nbytes)` ranges that a peer asks for.

        Raises:
            GrantRefused: revoked. RegionExpired: its life is over. RegionReadOnly: a push into what
            may only be read. OutOfBounds: a range that was not granted. Nothing was touched.
        """
        self._check_alive(now_s)
        if is_push and not self.descriptor.writable:
            raise RegionReadOnly("this grant is for reading only")
        index = self.ranges.first_outside(ranges)
        if index is not None:
            offset, nbytes = ranges[index]
            raise OutOfBounds(
                f"range {index} of {len(ranges)}: {nbytes} bytes at {offset} were not granted; "
                "nothing was moved",
                hint="ask for what the grant covers",
            )
        return sum(map(_NBYTES, ranges))

    def begin_piece(self, now_s: float) -> None:
        """Opens the bracket of one piece; until `end_piece` the memory stays and nobody revokes.

        Raises:
            GrantRefused, RegionExpired, TransportClosed: then there is no bracket to close.
        """
        self._check_alive(now_s)
        try:
            self._gate.begin()
        except TransportClosed:
            raise _refused() from None
        try:
            self.region.begin_landing()
        except BaseException:
            self._gate.end()
            raise

    def end_piece(self) -> None:
        """Closes the bracket of one piece."""
        self.region.end_landing()
        self._gate.end()

    def revoke(self) -> None:
        """Lets no further piece begin, and waits for the one under way. Idempotent."""
        self._gate.close()

    def _check_alive(self, now_s: float) -> None:
        if self._gate.closed:
            raise _refused()
        if now_s >= self.expires_at_s:
            raise RegionExpired(
                f"the grant ran out {now_s - self.expires_at_s:.3f} s ago",
                hint="match again and pull under the new lease",
            )


class GrantTable:
    """An owner's grants, by capability."""

    def __init__(self) -> None:
        """Empty."""
        self._grants: dict[bytes, Grant] = {}
        self._lock = threading.Lock()
        self._sweep_from = _SWEEP_FROM
        self._closed = False

    def __len__(self) -> int:
        """How many there are, those that expired a short while ago included."""
        return len(self._grants)

    def add(
        self,
        descriptor: RegionDescriptor,
        region: MemoryRegion,
        ranges: Iterable[Range] | None,
        *,
        now_s: float,
        on_done: Callable[[Completion], None] | None = None,
    ) -> Grant:
        """Grants `ranges`, all of the region where None.

        Raises:
            OutOfBounds: a range leaves the region. TransportClosed: the region or this table is closed.
        """
        if region.closed:
            raise TransportClosed("a closed region cannot be described")
        granted = GrantedRanges(
            [Range(0, region.nbytes)] if ranges is None else ranges, region.nbytes
        )
        grant = Grant(
            descriptor,
            region,
            granted,
            expires_at_s=now_s + descriptor.expires_in_s,
            on_done=on_done,
        )
        if len(self._grants) >= self._sweep_from:
            self.forget_expired(now_s - REMEMBER_S)
            self._sweep_from = max(_SWEEP_FROM, 2 * len(self._grants))
        with self._lock:
            if self._closed:
                raise TransportClosed("the owner is closed, and grants nothing any more")
            self._grants[descriptor.capability] = grant
        return grant

    def find(self, capability: bytes, *, epoch: int, generation: int) -> Grant:
        """The grant that a peer names; GrantRefused where there is none or it is another's.

        A grant whose region was closed is forgotten here.
        """
        grant = self._grants.get(capability)
        if grant is None or not hmac.compare_digest(grant.descriptor.capability, capability):
            raise _refused()
        if grant.descriptor.epoch != epoch or grant.descriptor.generation != generation:
            raise _refused()
        if grant.region.closed:
            self.revoke(capability)
            raise _refused()
        return grant

    def get(self, capability: bytes) -> Grant | None:
        """A living grant, for an owner who knows its peer otherwise."""
        return self._grants.get(capability)

    def renew(self, capability: bytes, *, expires_in_s: float, now_s: float) -> None:
        """Gives a grant a new life from now on; GrantRefused where it is gone or over."""
        grant = self._grants.get(capability)
        if grant is None or grant.revoked or now_s >= grant.expires_at_s:
            raise _refused()
        if math.isnan(expires_in_s):
            raise OutOfBounds("a grant cannot expire in NaN seconds")
        grant.expires_at_s = now_s + expires_in_s

    def revoke(self, capability: bytes) -> None:
        """Takes a grant back; when it returns, nothing of it moves any more. Idempotent."""
        with self._lock:
            grant = self._grants.pop(capability, None)
        if grant is not None:
            grant.revoke()

    def forget_expired(self, now_s: float) -> int:
        """Drops the grants whose life was over at `now_s`; how many those were."""
        with self._lock:
            over = [key for key, grant in self._grants.items() if now_s >= grant.expires_at_s]
        for capability in over:
            self.revoke(capability)
        return len(over)

    def close(self) -> None:
        """Revokes all, and takes no more. Idempotent."""
        with self._lock:
            self._closed = True
        for capability in list(self._grants):
            self.revoke(capability)


def _refused() -> GrantRefused:
    return GrantRefused(
        "no such grant: never given, taken back, or of another epoch or generation",
        hint="match again: the owner may have restarted",
    )
