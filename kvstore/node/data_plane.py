"""The node's data plane: what sessions that map no memory may pull and push, under their leases.

Rules kept here: a grant opens just the extents of one lease, for writing only where it is a reservation, of this epoch,
for as long as the lease lives; it is renewed with the lease, and taken back before the lease is over for anybody else
(`lease.LeaseGrants`). Where the node serves every piece itself nothing of an ended lease can land any more, and its
room is another's at once; what peers move one-sidedly, once they were let in, they may finish: those leases have a
grace.

The data plane's threads serve; this file's calls come from the node's loop.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from snowskin.kvstore.messages import GrantedRegion
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import GrantRefused, TransportError
from snowskin.transport.memory import Lendable
from snowskin.transport.words import Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from snowskin.kvstore.messages import LeaseId
    from snowskin.kvstore.pool.arena import Arena
    from snowskin.transport.api import Transport, TransportStatistics
    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.memory import MemoryRegion

LENT_BY = "tcp"  # the one that can hand pages to a socket

log = get_logger(__name__)


class DataPlane:
    """Grants of one node's pools, by lease.

    Attributes:
        transports: by scheme.
    """

    def __init__(
        self, transports: Sequence[Transport], arenas: Mapping[int, Arena], *, epoch: int
    ) -> None:
        """Owns `transports` and closes them."""
        self.transports = {transport.scheme: transport for transport in transports}
        self._epoch = epoch
        self._regions: dict[str, dict[int, MemoryRegion]] = {
            scheme: {
                pool_id: transport.register(_memory_for(scheme, arena))
                for pool_id, arena in arenas.items()
            }
            for scheme, transport in self.transports.items()
        }
        self._granted: dict[LeaseId, list[tuple[Transport, RegionDescriptor]]] = {}

    @property
    def schemes(self) -> tuple[str, ...]:
        """What is served."""
        return tuple(self.transports)

    def __len__(self) -> int:
        """Leases that something is granted under."""
        return len(self._granted)

    def grant(
        self,
        lease_id: LeaseId,
        extents: Iterable[tuple[int, int, int]],
        schemes: Iterable[str],
        *,
        writable: bool,
        life_s: float,
    ) -> tuple[GrantedRegion, ...]:
        """Opens the extents of a lease, by each transport that can: none where one pool cannot be opened by any.

        Args:
            lease_id: of a lease that lives.
            extents: pool, offset and bytes of each.
            schemes: what the holder knows, the preferred one first; others than are served are passed over.
            writable: whether it is a reservation.
            life_s: how long the lease lives from now on.
        """
        chosen = [
            self.transports[scheme]
            for scheme in dict.fromkeys(schemes)
            if scheme in self.transports
        ]
        if not chosen:
            return ()
        by_pool: dict[int, list[Range]] = {}
        for pool_id, offset, nbytes in extents:
            by_pool.setdefault(pool_id, []).append(Range(offset, nbytes))
        regions = []
        for pool_id, ranges in by_pool.items():
            descriptors = []
            for transport in chosen:
                try:
                    descriptor = transport.describe(
                        self._regions[transport.scheme][pool_id],
                        ranges=ranges,
                        writable=writable,
                        epoch=self._epoch,
                        generation=lease_id,
                        expires_in_s=life_s,
                    )
                except TransportError as error:
                    log.error(
                        "lease not opened",
                        scheme=transport.scheme,
                        lease=lease_id,
                        error=str(error),
                    )
                    continue
                self._granted.setdefault(lease_id, []).append((transport, descriptor))
                descriptors.append(descriptor.to_bytes())
            if not descriptors:
                return ()
            regions.append(GrantedRegion(pool_id=pool_id, descriptors=tuple(descriptors)))
        return tuple(regions)

    def renew(self, lease_id: LeaseId, life_s: float) -> None:
        """The lease lives `life_s` seconds from now on."""
        for transport, descriptor in self._granted.get(lease_id, ()):
            # Its clock may be past the old end already, by the microseconds since the lease was looked at.
            with contextlib.suppress(GrantRefused):
                transport.renew(descriptor, expires_in_s=life_s)

    def take_back(self, lease_id: LeaseId) -> None:
        """Serves nothing under this lease any more; waits for a piece under way."""
        for transport, descriptor in self._granted.pop(lease_id, ()):
            transport.revoke(descriptor)

    def needs_grace(self, schemes: Sequence[str]) -> bool:
        """Whether one of these moves bytes without the node's part."""
        return any(
            self.transports[scheme].is_one_sided for scheme in schemes if scheme in self.transports
        )

    def statistics(self) -> dict[str, TransportStatistics]:
        """The counters of each transport."""
        return {scheme: each.statistics() for scheme, each in self.transports.items()}

    def close(self) -> None:
        """Takes all back and ends the transports; idempotent."""
        for transport in self.transports.values():
            transport.close()
        for regions in self._regions.values():
            for region in regions.values():
                region.close()
        self._granted.clear()


def _memory_for(scheme: str, arena: Arena) -> object:
    """What a transport registers of an arena."""
    if scheme == LENT_BY and arena.lending is not None:
        return Lendable(memory=arena.buffer, lending=arena.lending)
    return arena.buffer
