"""How a node can be reached: what its transports could do when it started, where they listen, what they did since.

Rules kept here: everything but the statistics is as it was at the start; addresses told and bound are apart; what does
not work is shown with the reason, and is not advertised.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from snowskin.kvstore.admin_messages import ListedTransport, TransportsReport
from snowskin.transport.addresses import Address
from snowskin.transport.advertisement import Advertisement
from snowskin.transport.choice import GRPC, RDMA_KIND, SHM, TCP, UCX
from snowskin.transport.host_probe import read_host
from snowskin.transport.probes import advertise, probe_transports
from snowskin.transport.routes import advertised
from snowskin.transport.tcp.transport import TcpTransport
from snowskin.transport.topology import HostFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from snowskin.kvstore.node.data_ports import DataPlaneSettings
    from snowskin.transport.api import Transport, TransportStatistics
    from snowskin.transport.choice import TransportProbe


def _nothing_open() -> Mapping[str, TransportStatistics]:
    return {}


def _no_pools() -> tuple[tuple[str, str], ...]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReach:
    """What a node knows of its own transports.

    Attributes:
        probes: by scheme, in the order of preference.
        facts: of its host.
        bound: addresses by scheme.
        advertisement: what its peers are told.
        statistics: of the transports that are open, by scheme, as of now.
        pages: on what pages the pools lie, as of now.
    """

    probes: Mapping[str, TransportProbe] = field(default_factory=dict)
    facts: HostFacts = field(default_factory=HostFacts)
    bound: Mapping[str, Sequence[Address]] = field(default_factory=dict)
    advertisement: Advertisement = field(default_factory=Advertisement)
    statistics: Callable[[], Mapping[str, TransportStatistics]] = _nothing_open
    pages: Callable[[], tuple[tuple[str, str], ...]] = _no_pools

    @classmethod
    def tried(
        cls,
        schemes: Collection[str],
        *,
        bound: Sequence[Address] = (),
        told: Sequence[Address] = (),
        extras: Mapping[str, bytes] | None = None,
        ucx_stays_here: bool = False,
        statistics: Callable[[], Mapping[str, TransportStatistics]] = _nothing_open,
        pages: Callable[[], tuple[tuple[str, str], ...]] = _no_pools,
    ) -> NodeReach:
        """Tries these schemes here; some milliseconds, with `ucx` up to a second.

        Args:
            schemes: that the operator allows; the slow path by gRPC is there always.
            bound: where tcp listens.
            told: where the operator says that tcp is reached; empty: as bound.
            extras: by scheme, what the transport itself tells its peers.
            ucx_stays_here: UCX listens on loopback alone, whatever hardware it could use.
            statistics: of the transports that are open.
            pages: on what pages the pools lie.
        """
        facts = read_host()
        probes = probe_transports({*schemes, GRPC}, facts, bound=bound)
        if ucx_stays_here and UCX in probes:
            kinds = tuple(kind for kind in probes[UCX].kinds if not kind.startswith(RDMA_KIND))
            probes[UCX] = dataclasses.replace(probes[UCX], kinds=kinds)
        addresses = {TCP: advertised(bound, told, facts)} if TCP in schemes and bound else {}
        reached = {scheme: probe for scheme, probe in probes.items() if scheme != TCP or addresses}
        return cls(
            probes=probes,
            facts=facts,
            bound={TCP: tuple(bound)} if TCP in schemes else {},
            advertisement=advertise(reached, addresses=addresses, extras=extras),
            statistics=statistics,
            pages=pages,
        )

    @classmethod
    def of_node(
        cls,
        settings: DataPlaneSettings,
        opened: Sequence[Transport],
        statistics: Callable[[], Mapping[str, TransportStatistics]],
        pages: Callable[[], tuple[tuple[str, str], ...]] = _no_pools,
    ) -> NodeReach:
        """As `tried`, of a node whose data plane listens already."""
        found = [
            transport.reachability.addresses
            for transport in opened
            if isinstance(transport, TcpTransport) and transport.reachability is not None
        ]
        told = found[0] if found else ()
        bound = [Address(settings.data_address, settings.data_port or told[0].port)] if told else []
        return cls.tried(
            settings.transports,
            bound=bound,
            told=told,
            ucx_stays_here=settings.ucx_stays_here(settings.data_address),
            statistics=statistics,
            pages=pages,
        )

    def report(self, *, door: str) -> TransportsReport:
        """For an operator; `door` is the local door's address, or empty."""
        counted = self.statistics()
        return TransportsReport(
            transports=tuple(
                ListedTransport(
                    probe=self._with_pages(probe) if scheme == SHM else probe,
                    bound=self._bound(scheme, door),
                    advertised=self._advertised(scheme),
                    is_open=scheme in counted or (scheme == SHM and bool(door)),
                    counters=counters_of(counted[scheme]) if scheme in counted else (),
                )
                for scheme, probe in self.probes.items()
            ),
            advertisement=self.advertisement.to_bytes(),
            host=self.facts,
            door=door,
        )

    def _with_pages(self, probe: TransportProbe) -> TransportProbe:
        return replace(probe, facts=(*probe.facts, *self.pages()))

    def _bound(self, scheme: str, door: str) -> tuple[str, ...]:
        if scheme == SHM and door:
            return (door,)
        return tuple(str(address) for address in self.bound.get(scheme, ()))

    def _advertised(self, scheme: str) -> tuple[str, ...]:
        told = self.advertisement.scheme(scheme)
        return tuple(str(row.address) for row in told.addresses) if told is not None else ()


def counters_of(statistics: TransportStatistics) -> tuple[tuple[str, int], ...]:
    """By name: each number of a transport's statistics, and what it refused, by reason."""
    found = [
        (name.name, value)
        for name in dataclasses.fields(statistics)
        if isinstance(value := getattr(statistics, name.name), int)
    ]
    found += [(f"refused {reason}", number) for reason, number in statistics.refused_by_reason]
    return tuple(sorted(found))
