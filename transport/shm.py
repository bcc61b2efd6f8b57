"""`shm`: the owner's memfd, mapped once; every pull is one memory copy on this host.

Rules kept here: a mapping is made once per attachment and kept; a memfd that could shrink is
refused (its owner could kill us); a reader maps read-only, whatever the descriptor would allow;
this transport never closes a descriptor that it was lent.

The capability says *which* memfd the owner meant; the descriptor itself is the right to it, and the
lease above says *when*. So one memfd belongs to one tenant.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from snowskin.transport.copying import AttachedMemory, CopyingTransport
from snowskin.transport.errors import BadDescriptor, TransportUnavailable
from snowskin.transport.mapping import Mappings
from snowskin.transport.memory import MemoryRegion

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.grants import Completion, Range


class ShmTransport(CopyingTransport):
    """Copies between local memory and mapped memfds of peers on this host."""

    scheme = "shm"
    is_one_sided = True

    def __init__(self, *, now_s: Callable[[], float] = time.monotonic) -> None:
        """Opens the transport; holds nothing until something is attached."""
        super().__init__(now_s=now_s)
        self._mappings = Mappings()

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
        """Grants a memfd's region; the memfd itself travels beside it (SCM_RIGHTS)."""
        if not (region.shared or region.closed):
            self.check_kind(region)
            raise TransportUnavailable(
                "this memory belongs to this process alone; a peer cannot map it",
                hint="register a Memfd to share it over shm",
            )
        return super().describe(
            region,
            ranges=ranges,
            writable=writable,
            epoch=epoch,
            generation=generation,
            expires_in_s=expires_in_s,
            on_done=on_done,
        )

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
        """Maps the owner's memfd; `fd` is needed, is not kept, and stays the caller's."""
        self.check_scheme(descriptor)
        if fd is None:
            raise BadDescriptor(
                "shm attaches a memfd, and none came with the descriptor",
                hint="ask the owner over the local door, which passes descriptors",
            )
        mapping = self._mappings.map(fd, descriptor.nbytes, writable=writable)
        memory = MemoryRegion(mapping.array(), mapping, writable=writable, shared=True)
        return self.keep_attached(
            descriptor, memory, peer="this host", asked_at_s=asked_at_s, populate=populate
        )
