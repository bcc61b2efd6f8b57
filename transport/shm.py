"""`shm`: the owner's memfd, mapped once; every pull is one memory copy on this host, or none (`view`).

Rules kept here: the same memfd is mapped once, however often it is attached, and until nobody uses it;
a memfd that could shrink is refused (its owner could kill us); a reader maps read-only, whatever the
descriptor would allow; this transport never closes a descriptor that it was lent.

The capability says *which* memfd the owner meant; the descriptor itself is the right to it, and the
lease above says *when*. So one memfd belongs to one tenant, and the granted ranges, which travel in the
region descriptor, keep a peer from mistakes and not from malice.

`describe` with an `on_done` makes a link (`shm_link`): `link` gives the peer's end, to be passed beside
the memfd, and `attach(link_fd=...)` takes it. With it notes are heard, the death of either side is
seen by the other, and a peer sees after each piece whether the grant was taken back meanwhile
(`grant_board`). Without it, only the grant's life and closing end an attachment.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import time
from typing import TYPE_CHECKING

from snowskin.transport.copying import AttachedMemory, CopyingTransport
from snowskin.transport.errors import (
    BadDescriptor,
    GrantRefused,
    OutOfBounds,
    TransportUnavailable,
)
from snowskin.transport.fd_watcher import FdWatcher
from snowskin.transport.grants import GrantedRanges
from snowskin.transport.mapping import Mappings
from snowskin.transport.memory import MemoryRegion
from snowskin.transport.memory_kind import MemoryKind
from snowskin.transport.ordered import check_writable
from snowskin.transport.shm_link import OwnerLinks, PeerEnd
from snowskin.transport.words import Range

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snowskin.transport.api import TransportStatistics
    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.words import Completion

MAX_NUM_RANGES = 4000  # what a region descriptor has room for

_RANGE = struct.Struct(">QQ")


class ShmTransport(CopyingTransport):
    """Copies between local memory and mapped memfds of peers on this host."""

    scheme = "shm"
    is_one_sided = True
    memory_kinds = frozenset(
        MemoryKind
    )  # a GPU's lands from, and is copied into, the pool: `cuda_copy`

    def __init__(self, *, now_s: Callable[[], float] = time.monotonic) -> None:
        """Opens the transport; holds nothing until something is attached."""
        super().__init__(now_s=now_s)
        self._mappings = Mappings()
        self._watcher = FdWatcher("snowskin-shm-links")
        self._links = OwnerLinks(
            self._watcher, complete=self._on_complete, refuse=self.count_refused
        )
        self._num_owners_lost = 0

    def describe(
        self,
        region: MemoryRegion,
        *,
        ranges: Sequence[Range] | None = None,
        writable: bool = False,
        epoch: int = 0,
        generation: int = 0,
        expires_in_s: float = math.inf,
        on_done: Callable[[Completion], None] | None = None,
    ) -> RegionDescriptor:
        """Grants a memfd's region; the memfd itself travels beside it (SCM_RIGHTS), and so does `link`.

        Raises:
            TransportUnavailable: memory that a peer cannot map. OutOfBounds: a range that is not
                there, or more than 4,000 that do not touch.
        """
        if not (region.shared or region.closed):
            self.check_kind(region)
            raise TransportUnavailable(
                "this memory belongs to this process alone; a peer cannot map it",
                hint="register a Memfd to share it over shm",
            )
        granted = b"" if ranges is None else _packed(ranges, region.nbytes)
        descriptor = super().describe(
            region,
            ranges=ranges,
            writable=writable,
            epoch=epoch,
            generation=generation,
            expires_in_s=expires_in_s,
            on_done=on_done,
        )
        if on_done is not None:
            try:
                self._links.add(descriptor)
            except OSError as error:
                super().revoke(descriptor)
                raise TransportUnavailable(
                    f"this grant gets no link: {error}", hint="raise the limit of open files"
                ) from error
        return dataclasses.replace(descriptor, extra=granted)

    def link(self, descriptor: RegionDescriptor) -> int:
        """The peer's end of a grant's link, once; the caller passes it on and closes it.

        Raises:
            TransportUnavailable: the grant was made without `on_done`, or the end was taken before.
        """
        return self._links.take_peer_end(descriptor.capability)

    def is_attached(self, descriptor: RegionDescriptor) -> bool:
        """Whether the one who got this grant's link may still use it: says only what that peer says."""
        return self._links.is_open(descriptor.capability)

    def renew(self, descriptor: RegionDescriptor, *, expires_in_s: float) -> None:
        """Gives a grant a new life from now on; a linked peer hears of it."""
        super().renew(descriptor, expires_in_s=expires_in_s)
        self._links.renew(descriptor.capability, expires_in_s)

    def revoke(self, descriptor: RegionDescriptor) -> None:
        """Takes a grant back; a linked peer's transfers and views fail from now on. Idempotent."""
        self._links.take_back(descriptor.capability)
        super().revoke(descriptor)

    def attach(
        self,
        descriptor: RegionDescriptor,
        *,
        fd: int | None = None,
        link_fd: int | None = None,
        writable: bool = False,
        asked_at_s: float | None = None,
        populate: bool = False,
    ) -> AttachedMemory:
        """Maps the owner's memfd; `fd` is needed, is not kept, and stays the caller's, as `link_fd`."""
        self.check_scheme(descriptor)
        if fd is None:
            raise BadDescriptor(
                "shm attaches a memfd, and none came with the descriptor",
                hint="ask the owner over the local door, which passes descriptors",
            )
        check_writable(descriptor, writable)
        ranges = _unpacked(descriptor.extra, descriptor.nbytes)
        mapping = self._mappings.map(fd, descriptor.nbytes, writable=writable)
        end = None
        if link_fd is not None:
            end = PeerEnd(
                link_fd,
                descriptor,
                self._watcher,
                self._mappings,
                now_s=self.now_s,
                on_lost=self._on_owner_lost,
            )
        try:
            region = self.keep_attached(
                descriptor,
                MemoryRegion(mapping.array(), mapping, writable=writable, shared=True),
                peer="this host" if end is None else end.owner,
                asked_at_s=asked_at_s,
                populate=populate,
                link=end,
                ranges=ranges,
            )
            if end is not None:
                end.follow(region)
        except BaseException:
            if end is not None:
                end.close()
            raise
        return region

    def statistics(self) -> TransportStatistics:
        """The counters, as of now; connections are the links of this owner's grants."""
        return dataclasses.replace(
            super().statistics(),
            num_connections=len(self._links),
            num_peers_lost=self._links.num_peers_lost + self._num_owners_lost,
        )

    def close(self) -> None:
        """Takes all grants back, closes what is attached, and ends the thread of the links. Idempotent."""
        self.closed = True
        self._links.close()
        super().close()
        self._watcher.close()

    def _on_complete(self, completion: Completion) -> None:
        """A peer's note; called by the watcher's thread."""
        grant = self.grants.get(completion.capability)
        if grant is None:
            self.count_refused(GrantRefused.reason)
            return
        self.count_served(completion.nbytes)
        self.complete(grant, completion.nbytes, is_push=completion.is_push, note=completion.note)

    def _on_owner_lost(self) -> None:
        with self._lock:
            self._num_owners_lost += 1


def _packed(ranges: Sequence[Range], region_nbytes: int) -> bytes:
    """What a descriptor says of the granted ranges."""
    granted = list(GrantedRanges(ranges, region_nbytes))
    if len(granted) > MAX_NUM_RANGES:
        raise OutOfBounds(
            f"{len(granted)} ranges that do not touch; a descriptor of shm has room for {MAX_NUM_RANGES}",
            hint="grant the whole region, or in several grants",
        )
    return b"".join(_RANGE.pack(offset, nbytes) for offset, nbytes in granted)


def _unpacked(extra: bytes, region_nbytes: int) -> GrantedRanges | None:
    """The granted ranges that a descriptor speaks of; None where all is granted."""
    if not extra:
        return None
    if len(extra) % _RANGE.size or len(extra) > MAX_NUM_RANGES * _RANGE.size:
        raise BadDescriptor(f"a descriptor of shm with {len(extra)} bytes of ranges")
    try:
        return GrantedRanges([Range(*pair) for pair in _RANGE.iter_unpack(extra)], region_nbytes)
    except OutOfBounds as error:
        raise BadDescriptor(f"a descriptor of shm with wrong ranges: {error.message}") from error
