"""The transports by which one process moves bytes to and from nodes: which may be used, opened when first wanted.

Rules kept here: a transport demanded by name is used or the demand fails (TransportUnavailable), never another in its
place; `auto` means shared memory where the node's local door is, else what node and client share, else the slow path
of gRPC. All connections of a process share one of each, and whoever made this closes them.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from dataclasses import fields
from typing import TYPE_CHECKING

from snowskin.transport.api import TransportStatistics
from snowskin.transport.errors import TransportClosed, TransportUnavailable
from snowskin.transport.registry import open_transport
from snowskin.transport.shm import ShmTransport
from snowskin.transport.tcp import TcpTransport
from snowskin.transport.tcp_settings import TcpSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from snowskin.transport.api import Transport
    from snowskin.transport.tcp_settings import TlsFiles

MAX_CLIENT_NAME = 32  # in UTF-8 at most what the data plane takes
ON_THIS_HOST = "shm"
SLOW_PATH = "grpc"


class ClientTransports:
    """What one process may move bytes by.

    Attributes:
        choice: what was asked for.
        schemes: of the data plane, the preferred one first; empty where bytes never go by it.
    """

    def __init__(
        self,
        choice: str = "auto",
        *,
        name: str = "",
        tls: TlsFiles | None = None,
        factories: Mapping[str, Callable[[], Transport]] | None = None,
        auto: Sequence[str] = ("tcp",),
    ) -> None:
        """Opens nothing yet.

        Args:
            choice: `auto`, or the one that is demanded: a scheme, or `grpc`, which is the slow path.
            name: what this process calls itself, for the logs of nodes.
            tls: to prove who this process is, where nodes want that.
            factories: what opens a transport, by scheme, in place of the usual.
            auto: the schemes of `auto`, the preferred one first.
        """
        self.choice = choice
        self.schemes: tuple[str, ...] = ()
        if choice == "auto":
            self.schemes = tuple(auto)
        elif choice not in (ON_THIS_HOST, SLOW_PATH):
            self.schemes = (choice,)
        settings = TcpSettings(name=name[:MAX_CLIENT_NAME], tls=tls)
        self._factories: dict[str, Callable[[], Transport]] = {
            "tcp": functools.partial(TcpTransport, settings),
            **(factories or {}),
        }
        self._open: dict[str, Transport] = {}
        self._maps: list[ShmTransport] = []
        self._past: TransportStatistics | None = None  # of the maps that were closed
        self._lock = threading.Lock()
        self._closed = False

    @property
    def is_demanded(self) -> bool:
        """Whether bytes may go by nothing else than `choice`."""
        return self.choice != "auto"

    @property
    def may_map(self) -> bool:
        """Whether a node's local door may be used."""
        return self.choice in ("auto", ON_THIS_HOST)

    @property
    def may_crawl(self) -> bool:
        """Whether bytes may go by the slow path."""
        return self.choice in ("auto", SLOW_PATH)

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

    def chosen(self, served: Sequence[str], *, node: str) -> tuple[str, ...]:
        """The schemes by which a node's bytes can be had, the preferred one first.

        Args:
            served: what its data plane serves.
            node: for the error.

        Raises:
            TransportUnavailable: it does not serve the one that was demanded.
        """
        shared = tuple(scheme for scheme in self.schemes if scheme in served)
        if self.schemes and self.is_demanded and not shared:
            raise TransportUnavailable(
                f"transport {self.choice} was demanded, and {node} serves {', '.join(served) or 'none'}",
                hint=f"start the node with --transports {self.choice}, or use --transport auto",
            )
        return shared

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
