"""The transports by which one process moves bytes to and from nodes: which may be used, opened when first wanted.

Rules kept here: a transport demanded by name is used or the demand fails (TransportUnavailable), never another in its
place; `auto` is what `transport.choice` takes, for each node and each extent; what cannot be opened here, though trying
it went well, counts as absent from then on. This host is looked at once, when the first node that serves more than gRPC
is met; UCX is loaded where it is demanded, or allowed and offered with hardware behind it. All connections of a process
share one of each, and whoever made this closes them.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from snowskin.kvstore.client.ways import Ways, log_way, told_by
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.api import TransportStatistics
from snowskin.transport.choice import AUTO, GRPC, SHM, TCP, UCX, Encounter, OwnSide, TransportProbe
from snowskin.transport.errors import TransportClosed, TransportUnavailable
from snowskin.transport.host_probe import read_host
from snowskin.transport.probes import own_identity, probe_transports
from snowskin.transport.registry import open_transport
from snowskin.transport.shm import ShmTransport
from snowskin.transport.tcp.routes import TcpRoutes
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.transport import TcpTransport
from snowskin.transport.ucx.settings import UcxSettings
from snowskin.transport.ucx.transport import UcxTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from snowskin.kvstore.messages import NodeStat
    from snowskin.transport.advertisement import Advertisement
    from snowskin.transport.api import Transport
    from snowskin.transport.tcp.settings import TlsFiles

MAX_CLIENT_NAME = 32  # in UTF-8 at most what the data plane takes
ON_THIS_HOST = SHM
SLOW_PATH = GRPC

log = get_logger(__name__)


class ClientTransports:
    """What one process may move bytes by.

    Attributes:
        choice: what was asked for.
        schemes: of the data plane, that may be used; empty where bytes never go by it.
    """

    def __init__(
        self,
        choice: str = AUTO,
        *,
        name: str = "",
        tls: TlsFiles | None = None,
        ucx: UcxSettings | None = None,
        factories: Mapping[str, Callable[[], Transport]] | None = None,
        auto: Sequence[str] = (TCP,),
    ) -> None:
        """Opens nothing yet.

        Args:
            choice: `auto`, or the one that is demanded: a scheme, or `grpc`, which is the slow path.
            name: what this process calls itself, for the logs of nodes.
            tls: to prove who this process is, where nodes want that.
            ucx: how UCX is opened; its own choice if None.
            factories: what opens a transport, by scheme, in place of the usual.
            auto: the schemes that `auto` allows beside shared memory and gRPC.
        """
        self.choice = choice
        self.schemes: tuple[str, ...] = ()
        if choice == AUTO:
            self.schemes = tuple(auto)
        elif choice not in (ON_THIS_HOST, SLOW_PATH):
            self.schemes = (choice,)
        settings = TcpSettings(name=name[:MAX_CLIENT_NAME], tls=tls)
        self._routes = TcpRoutes(settings.local_addresses)
        self._ucx = ucx or UcxSettings()
        self._factories: dict[str, Callable[[], Transport]] = {
            TCP: functools.partial(TcpTransport, settings, paths_to=self._routes),
            UCX: functools.partial(UcxTransport, self._ucx),
            **(factories or {}),
        }
        self._open: dict[str, Transport] = {}
        self._maps: list[ShmTransport] = []
        self._past: TransportStatistics | None = None  # of the maps that were closed
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._own: OwnSide | None = None
        self._closed = False

    @property
    def is_demanded(self) -> bool:
        """Whether bytes may go by nothing else than `choice`."""
        return self.choice != AUTO

    @property
    def may_map(self) -> bool:
        """Whether a node's local door may be used."""
        return self.choice in (AUTO, ON_THIS_HOST)

    @property
    def may_crawl(self) -> bool:
        """Whether bytes may go by the slow path."""
        return self.choice in (AUTO, SLOW_PATH)

    def open_demanded(self) -> None:
        """Opens what was demanded by name, so that a process without it ends at its start and not at its first pull.

        Raises:
            TransportUnavailable: it cannot be had here.
        """
        if self.is_demanded:
            for scheme in self.schemes:
                self.get(scheme)

    def get(self, scheme: str) -> Transport:
        """The transport of one of `schemes`.

        Raises:
            TransportUnavailable: it cannot be had here. TransportClosed: after `close`.
        """
        with self._lock:
            if self._closed:
                raise TransportClosed("the transports of this process are closed")
            transport = self._open.get(scheme)
            if transport is None:
                factory = self._factories.get(scheme)
                transport = factory() if factory is not None else open_transport(scheme)
                self._open[scheme] = transport
            return transport

    def ways_to(self, stat: NodeStat, *, node: str) -> Ways | None:
        """How the bytes of a node's extents travel, what that needs opened; None: by gRPC, nothing else may be used.

        Looks at this host the first time, and loads UCX where it comes into question: some milliseconds, up to a
        second with UCX. For a thread.

        Args:
            stat: what the node says of itself.
            node: for errors and the log.

        Raises:
            TransportUnavailable: the transport that was demanded cannot be had.
        """
        if not self.schemes:
            return None
        if self.is_demanded and self.choice not in stat.transports:
            raise TransportUnavailable(
                f"transport {self.choice} was demanded, and {node} serves "
                f"{', '.join(stat.transports) or 'none'}",
                hint=f"start the node with --transports {self.choice}, or use --transport auto",
            )
        peer = told_by(stat, node=node)
        while True:
            own = self._own_side(peer)
            ways = Ways(Encounter(own=own, peer=peer), self.choice, served=stat.transports)
            if all(self._opens(scheme) for scheme in ways.schemes):
                self._learn(own, peer)
                log_way(ways.choice, node=node)
                return ways

    def _own_side(self, peer: Advertisement | None) -> OwnSide:
        """What this host has, by what trying it showed."""
        with self._looking:
            own = self._own
            if own is None:
                wanted = {*self.schemes, SHM, GRPC} - {UCX}
                facts = read_host()
                own = OwnSide(
                    identity=own_identity(),
                    facts=facts,
                    probes=probe_transports(wanted, facts),
                    trusted_network=self._ucx.trusted_network,
                )
            if UCX in self.schemes and UCX not in own.probes and self._may_be_ucx(peer):
                found = probe_transports({UCX}, own.facts)
                own = replace(own, probes={**own.probes, **found})
            self._own = own
            return own

    def _may_be_ucx(self, peer: Advertisement | None) -> bool:
        told = None if peer is None else peer.scheme(UCX)
        return self.is_demanded or (told is not None and bool(told.kinds))

    def _opens(self, scheme: str) -> bool:
        """Opens what was chosen; what cannot be, and was not demanded, counts as absent from now on."""
        try:
            self.get(scheme)
        except TransportUnavailable as error:
            if self.is_demanded:
                raise
            log.warning("transport cannot be opened", scheme=scheme, error=str(error))
            absent = TransportProbe(
                scheme=scheme, available=False, reason=error.message, remedy=error.hint
            )
            with self._looking:
                assert self._own is not None, "it was chosen by what was found here"
                self._own = replace(self._own, probes={**self._own.probes, scheme: absent})
            return False
        return True

    def _learn(self, own: OwnSide, peer: Advertisement | None) -> None:
        told = None if peer is None else peer.scheme(TCP)
        if peer is not None and told is not None:
            same_network = own.identity.same_network(peer.identity)
            self._routes.learn(told.addresses, same_network=same_network)

    def new_map(self) -> ShmTransport:
        """What one connection to a local door moves bytes by; it closes it, its counts stay here."""
        transport = ShmTransport()
        with self._lock:
            self._forget_closed()
            self._maps.append(transport)
        return transport

    def statistics(self) -> dict[str, TransportStatistics]:
        """The counters of what is, or was, open, by scheme."""
        with self._lock:
            self._forget_closed()
            found = {scheme: transport.statistics() for scheme, transport in self._open.items()}
            mapped = [each.statistics() for each in self._maps]
            if self._past is not None:
                mapped.append(self._past)
        if mapped:
            found[ON_THIS_HOST] = sum_of(mapped)
        return found

    def _forget_closed(self) -> None:
        closed = [each for each in self._maps if each.closed]
        if closed:
            past = [each.statistics() for each in closed]
            self._past = sum_of(past if self._past is None else [self._past, *past])
            self._maps = [each for each in self._maps if each not in closed]

    def close(self) -> None:
        """Ends all; idempotent."""
        with self._lock:
            self._closed = True
            transports = list(self._open.values())
            self._open.clear()
        for transport in transports:
            transport.close()


def sum_of(statistics: Sequence[TransportStatistics]) -> TransportStatistics:
    """The counters of several transports as of one."""
    refused: Counter[str] = Counter()
    for each in statistics:
        refused.update(dict(each.refused_by_reason))
    numbers = {
        field.name: sum(getattr(each, field.name) for each in statistics)
        for field in fields(TransportStatistics)
        if field.name not in ("nbytes_by_traffic", "refused_by_reason")
    }
    by_traffic = zip(*(each.nbytes_by_traffic for each in statistics), strict=True)
    return TransportStatistics(
        nbytes_by_traffic=tuple(map(sum, by_traffic)),
        refused_by_reason=tuple(sorted(refused.items())),
        **numbers,
    )


def check_may_map(transports: ClientTransports, address: str) -> None:
    """Refuses a local door where another way was demanded: through it bytes go by shared memory only."""
    if not transports.may_map:
        raise TransportUnavailable(
            f"transport {transports.choice} was demanded, and {address} is a local door, which is shared memory",
            hint="name the node by its gRPC address, HOST:PORT, or use --transport auto",
        )


def check_may_crawl(transports: ClientTransports, node: str) -> None:
    """Refuses the slow path where another way was demanded."""
    if not transports.may_crawl:
        raise TransportUnavailable(
            f"transport {transports.choice} was demanded, and a lease of {node} came without it",
            hint="for shm name the node's local door, unix:/path; else use --transport auto",
        )
