"""Where a node's data plane listens and is found, and by what: settings, and the transports that they open.

Rules kept here: bound and told addresses are apart; beyond loopback it listens only with `--insecure`, as every port; a
transport that was named and cannot be had ends the start.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.kvstore.config import check_bind, setting
from snowskin.kvstore.data_settings import DataSettings
from snowskin.kvstore.errors import AddressInUse, BadSetting
from snowskin.kvstore.pool.arena import LendPages  # noqa: TC001  settings look their types up
from snowskin.kvstore.role import MAX_PORT
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.addresses import MAX_ADDRESSES, Address
from snowskin.transport.choice import SHM, TCP, UCX
from snowskin.transport.errors import BadDescriptor, TransportUnavailable
from snowskin.transport.host_probe import read_host
from snowskin.transport.routes import advertised, is_everywhere
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.transport import TcpTransport
from snowskin.transport.ucx.transport import UcxTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.transport.api import Transport
    from snowskin.transport.topology import HostFacts

TRANSPORTS = (SHM, TCP, UCX)

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataPlaneSettings(DataSettings):
    """How a node's blocks can be reached."""

    transports: tuple[str, ...] = setting(
        (SHM, TCP),
        help="How bytes may go: shm by the local door; tcp, ucx between hosts. Repeat for each.",
    )
    data_host: str = setting(
        "", help="Address that the data plane listens on; that of --host if empty."
    )
    data_port: int = setting(0, help="Port of the data plane; 0 takes a free one.")
    data_advertise: tuple[str, ...] = setting(
        (),
        help="HOST or HOST:PORT under which other hosts reach the data plane, the best one first; "
        "as bound if none, and every NIC's address if bound everywhere.",
    )
    lend_pages: LendPages = setting(
        "auto",
        help="The pool's pages to sockets, without a copy: to readers that a hardware NIC leads to, "
        "to those on this host as well (trusted), or never.",
    )

    def __post_init__(self) -> None:
        """Refuses what cannot work, before anything is opened."""
        super().__post_init__()
        check_bind(self.data_address, insecure=self.insecure)
        if not 0 <= self.data_port <= MAX_PORT:
            raise BadSetting(f"data_port is {self.data_port}", hint=f"give 0 to {MAX_PORT}")
        for name in self.transports:
            if name not in TRANSPORTS:
                raise BadSetting(
                    f"transports names {name!r}", hint=f"known are {', '.join(TRANSPORTS)}"
                )
        self.told()
        if UCX in self.transports:
            self.check_ucx(self.data_address)

    @property
    def data_address(self) -> str:
        """What the data plane listens on."""
        return self.data_host or self.host

    def told(self) -> tuple[Address, ...]:
        """What the operator says of where others reach the data plane, port 0 for the bound one."""
        return tuple(_address(each, self.data_port) for each in self.data_advertise)

    def advertised(self, facts: HostFacts) -> tuple[Address, ...]:
        """Where others reach the data plane, port 0 for the bound one; none: as bound.

        Bound everywhere and nothing told, these are the addresses of the host's NICs, the fast ones first; of a host
        without, its name.
        """
        told = self.told()
        if told or not is_everywhere(self.data_address):
            return told
        bound = Address(self.data_address, self.data_port or 1)
        rows = advertised([bound], (), facts)[:MAX_ADDRESSES]
        hosts = [row.address.host for row in rows] or [socket.gethostname()]
        return tuple(Address(host, self.data_port) for host in hosts)


def open_transports(settings: DataPlaneSettings, *, epoch: int) -> list[Transport]:
    """What the data plane serves by, listening already; the caller closes them.

    Raises:
        AddressInUse: the data port is taken. TransportUnavailable: a transport cannot be had here.
    """
    opened: list[Transport] = []
    try:
        if TCP in settings.transports:
            opened.append(_open_tcp(settings, epoch))
        if UCX in settings.transports:
            opened.append(_open_ucx(settings))
    except BaseException:
        for transport in opened:
            transport.close()
        raise
    return opened


def _open_tcp(settings: DataPlaneSettings, epoch: int) -> TcpTransport:
    bound = Address(settings.data_address, settings.data_port)
    try:
        return TcpTransport(
            TcpSettings(
                listen=(bound,),
                advertise=settings.advertised(read_host()),
                epoch=epoch,
                tls=settings.tls_files(),
                lend_to_this_host=settings.lend_pages == "trusted",
            )
        )
    except TransportUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"the data plane cannot listen on {bound}: another process does",
                hint="choose another --data-port, or 0 for a free one",
            ) from error
        raise


def _open_ucx(settings: DataPlaneSettings) -> UcxTransport:
    opened = UcxTransport(settings.ucx_settings(settings.data_address))
    devices = settings.ucx_devices(settings.data_address) or "all"
    log.info("ucx listens", interfaces=devices, trusted_network=settings.trusted_network)
    return opened


def shown_addresses(transports: Sequence[Transport]) -> str:
    """Where the data plane is found, for the log and the supervisor; empty where nobody needs to."""
    return ",".join(
        str(address)
        for transport in transports
        if isinstance(transport, TcpTransport) and transport.reachability is not None
        for address in transport.reachability.addresses
    )


def _address(text: str, port: int) -> Address:
    """HOST, HOST:PORT, [IPv6] or [IPv6]:PORT; `port` where none is said."""
    has_port = ":" in text.rpartition("]")[2]
    try:
        return Address.parse(text if has_port else f"{text}:{port}")
    except BadDescriptor as error:
        raise BadSetting(
            f"data_advertise: {error.message}", hint="give HOST or HOST:PORT, IPv6 in brackets"
        ) from error
