"""From two hosts' addresses to the paths between them, nearest to the memory first.

Rules kept here: what is bound and what is advertised are two things; a loopback address, and one
that this host has itself (each host's bridge of containers may have the same), is a path only within
one network namespace; IPv4 and IPv6 are alike. Pure.

Preferred are the first of these that there are: near NICs, each with one of the peer's near
addresses in its own network, no two with the same; near addresses of the peer behind a router, which the
kernel knows the way to; the same of all NICs; of all addresses. Everything else is the fall-back.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from snowskin.transport.addresses import Address
from snowskin.transport.advertisement import MAX_ADDRESSES, AdvertisedAddress
from snowskin.transport.paths import Path
from snowskin.transport.topology import Place, ranked_nics, shared_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.transport.topology import HostFacts, Nic, NicAddress

MAX_PATHS = 16


class _Pair(NamedTuple):
    """A NIC, one of its addresses, and a peer's address in the same network."""

    nic: Nic
    is_preferred: bool
    ours: NicAddress
    theirs: AdvertisedAddress


def advertised(
    bound: Sequence[Address],
    configured: Sequence[Address],
    facts: HostFacts,
    memory: Place | None = None,
) -> tuple[AdvertisedAddress, ...]:
    """What a node says of where it is reached.

    Args:
        bound: with the ports that the kernel gave; `0.0.0.0`, `::` and an empty host are every
            address that a NIC has.
        configured: by the operator; told as they are, in their order. Port 0 is the port bound in
            the same place of `bound`, or the last one.
        facts: of this host.
        memory: that is served; unknown if None.

    Returns:
        The preferred ones first; empty where nothing is bound.
    """
    ranked = ranked_nics(facts, memory or Place())
    by_host = {
        address.host: (int(row.nic.speed_bytes_per_s), row.is_preferred)
        for row in ranked
        for address in row.nic.addresses
    }
    told: dict[Address, AdvertisedAddress] = {}
    for address in _named(bound, configured) if configured else _expanded(bound, list(by_host)):
        speed, is_preferred = by_host.get(address.host, (0, True))
        told.setdefault(
            address,
            AdvertisedAddress(address=address, speed_bytes_per_s=speed, is_preferred=is_preferred),
        )
    rows = list(told.values())
    if not configured:
        rows.sort(key=lambda row: not row.is_preferred)
    return tuple(rows[:MAX_ADDRESSES])


def paths_between(
    facts: HostFacts, memory: Place, advertised: Sequence[AdvertisedAddress], *, same_network: bool
) -> tuple[Path, ...]:
    """Ways from this host to a peer, the preferred group first; empty where there is none.

    Args:
        facts: of this host.
        memory: of the near end, for the order of the NICs.
        advertised: by the peer.
        same_network: both ends have the same interfaces, so that loopback leads there.
    """
    own = {address.host for nic in facts.nics for address in nic.addresses}
    usable = [
        row
        for row in advertised
        if same_network or not (is_loopback(row.address.host) or row.address.host in own)
    ]
    if not usable:
        return ()
    if same_network:
        # Every address leads through this kernel's loopback: several would be one way.
        best = next((row for row in usable if is_loopback(row.address.host)), usable[0])
        return (replace(_routed(best), is_preferred=True),)
    pairs = [
        _Pair(row.nic, row.is_preferred, ours, theirs)
        for row in ranked_nics(facts, memory)
        for ours in row.nic.addresses
        for theirs in usable
        if shared_network(ours, [theirs.address.host])
    ]
    reached = {pair.theirs.address for pair in pairs}
    direct = {pair: _direct(pair, pairs) for pair in pairs}
    routed = {row: _routed(row) for row in usable if row.address not in reached}
    near = [pair for pair in pairs if pair.is_preferred and pair.theirs.is_preferred]
    groups = (
        [direct[pair] for pair in _one_each(near)],
        [path for row, path in routed.items() if row.is_preferred],
        [direct[pair] for pair in _one_each(pairs)],
        list(routed.values()),
    )
    preferred = next(group for group in groups if group)
    others = [*direct.values(), *groups[1], *groups[3]]
    fall_back = [path for path in dict.fromkeys(others) if path not in preferred]
    chosen = [replace(path, is_preferred=True) for path in preferred] + fall_back
    return tuple(chosen[:MAX_PATHS])


def is_loopback(host: str) -> bool:
    """Whether an address, not a name other than `localhost`, leads back to its own host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_everywhere(host: str) -> bool:
    """Whether a bound address stands for all of its host's addresses."""
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _named(bound: Sequence[Address], configured: Sequence[Address]) -> list[Address]:
    """The operator's addresses with their ports; without a bound one there is nothing to say."""
    return [
        Address(address.host, address.port or bound[min(index, len(bound) - 1)].port)
        for index, address in enumerate(configured)
        if bound
    ]


def _expanded(bound: Sequence[Address], hosts: Sequence[str]) -> list[Address]:
    """Bound addresses, with every NIC's in place of one that is everywhere."""
    found = []
    for address in bound:
        if not is_everywhere(address.host):
            found.append(address)
            continue
        # An IPv6 socket bound everywhere takes IPv4 too, unless told otherwise.
        only_v4 = address.host == "0.0.0.0"  # noqa: S104  compared, not bound
        found += [Address(host, address.port) for host in hosts if not (only_v4 and ":" in host)]
    return found


def _speed(*speeds: float) -> float:
    return min((speed for speed in speeds if speed > 0), default=0.0)


def _one_each(pairs: Sequence[_Pair]) -> list[_Pair]:
    """For each NIC one address that no other NIC has, the peer's preferred ones first."""
    chosen: dict[str, _Pair] = {}
    taken: set[Address] = set()
    for pair in sorted(pairs, key=lambda pair: not pair.theirs.is_preferred):
        if pair.nic.name not in chosen and pair.theirs.address not in taken:
            chosen[pair.nic.name] = pair
            taken.add(pair.theirs.address)
    return list(chosen.values())


def _direct(pair: _Pair, pairs: Sequence[_Pair]) -> Path:
    """From a NIC to an address in its own network."""
    is_ambiguous = any(
        other.nic.name != pair.nic.name and shared_network(pair.ours, [other.ours.host])
        for other in pairs
    )
    return Path(
        name=f"{pair.nic.name} {pair.ours.host} > {pair.theirs.address}",
        local_address=pair.ours.host,
        local_device=pair.nic.name if is_ambiguous else "",
        remote_address=str(pair.theirs.address),
        speed_bytes_per_s=_speed(pair.nic.speed_bytes_per_s, pair.theirs.speed_bytes_per_s),
        is_preferred=False,
    )


def _routed(theirs: AdvertisedAddress) -> Path:
    """To an address by whatever way the kernel knows; it may be a name."""
    return Path(
        name=f"> {theirs.address}",
        remote_address=str(theirs.address),
        speed_bytes_per_s=float(theirs.speed_bytes_per_s),
        is_preferred=False,
    )
