"""Which ways a `tcp` reader has to an owner: from its own NICs to the addresses that it was told.

Rules kept here: addresses to connect from that were configured are taken as they are; else each way is one of
`routes.paths_between`, the nearest to the memory first; loopback leads to an owner only where nothing else was told, or
where both are known to share a network.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from snowskin.transport.advertisement import AdvertisedAddress
from snowskin.transport.host_probe import read_host
from snowskin.transport.paths import Path
from snowskin.transport.routes import is_loopback, paths_between
from snowskin.transport.topology import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snowskin.transport.addresses import Address, Reachability
    from snowskin.transport.topology import HostFacts

MAX_TOLD = 4096
MAX_AGE_S = 60.0


class TcpRoutes:
    """What is known of owners' addresses, and the ways to them; from any thread."""

    def __init__(
        self,
        local_addresses: Sequence[str] = (),
        *,
        memory: Place | None = None,
        facts: Callable[[], HostFacts] = read_host,
    ) -> None:
        """Nothing was told yet, and nothing is read.

        Args:
            local_addresses: to connect from, a path each; empty: those of the NICs, by distance.
            memory: of this end; unknown if None.
            facts: reads those of this host; some milliseconds, and again after a minute: addresses come and go.
        """
        self._local_addresses = tuple(local_addresses)
        self._memory = memory or Place()
        self._read = facts
        self._facts: HostFacts | None = None
        self._read_at_s = 0.0
        self._told: dict[Address, tuple[AdvertisedAddress, bool]] = {}
        self._lock = threading.Lock()

    def learn(self, told: Sequence[AdvertisedAddress], *, same_network: bool) -> None:
        """An owner tells these addresses; `same_network`: it has the same interfaces as this process.

        May read this host's facts.
        """
        self._current_facts()
        with self._lock:
            for row in told:
                self._told.pop(row.address, None)
                self._told[row.address] = (row, same_network)
            while len(self._told) > MAX_TOLD:
                del self._told[next(iter(self._told))]

    def __call__(self, reachability: Reachability) -> list[Path]:
        """The ways to an owner, the preferred ones first; empty where there is none."""
        addresses = tuple(dict.fromkeys(reachability.addresses))
        if self._local_addresses:
            return _side_by_side(self._local_addresses, addresses)
        with self._lock:
            known = [self._told.get(address) for address in addresses]
        if not any(known) and all(is_loopback(address.host) for address in addresses):
            return [_as_told(address) for address in addresses]
        rows = [
            AdvertisedAddress(address=address) if told is None else told[0]
            for address, told in zip(addresses, known, strict=True)
        ]
        facts = self._current_facts()
        same_network = any(told[1] for told in known if told is not None) or (
            not any(known) and _all_own(facts, addresses)
        )
        paths = paths_between(facts, self._memory, rows, same_network=same_network)
        if len(paths) == 1:
            # The kernel's own choice outlives a change of this host's address.
            return [replace(paths[0], local_address="", local_device="")]
        return list(paths)

    def _current_facts(self) -> HostFacts:
        now_s = time.monotonic()
        facts = self._facts
        if facts is None or now_s - self._read_at_s > MAX_AGE_S:
            self._facts = facts = self._read()
            self._read_at_s = now_s
        return facts


def _all_own(facts: HostFacts, addresses: Sequence[Address]) -> bool:
    """Whether all but loopback are addresses of this host: then its owner is here."""
    own = {address.host for nic in facts.nics for address in nic.addresses}
    return all(address.host in own for address in addresses if not is_loopback(address.host))


def _as_told(address: Address) -> Path:
    return Path(name=str(address), remote_address=str(address))


def _side_by_side(ours: Sequence[str], theirs: Sequence[Address]) -> list[Path]:
    """A path for each of the owner's addresses and each of ours, families matching."""
    pairs = [
        (ours[index % len(ours)], theirs[index % len(theirs)])
        for index in range(max(len(ours), len(theirs)))
    ]
    matching = [
        Path(name=f"{local} to {remote}", local_address=local, remote_address=str(remote))
        for local, remote in dict.fromkeys(pairs)
        if (":" in local) == (":" in remote.host)
    ]
    return matching or [_as_told(theirs[0])]
