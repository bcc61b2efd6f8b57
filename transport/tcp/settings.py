"""Settings of `tcp`: where it listens and is found, how much it lets peers have, how long it waits.

Rules kept here: bound and advertised addresses are apart; every wait has a limit; what cannot work is refused when the
settings are made and not when the first peer comes.
"""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, fields

from snowskin.transport.addresses import MAX_ADDRESSES, Address
from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.frames import (
    MAX_DATA_NBYTES,
    MAX_NAME_NBYTES,
    MAX_RANGES,
    MAX_TIMEOUT_MS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of one side; both sides prove who they are, under the same authority.

    Attributes:
        certificate: this side's, with its chain.
        key: belongs to the certificate.
        authority: who must have signed the peer's certificate.
        server_name: what the owner's certificate must name; empty: the host that the reader connects to.
    """

    certificate: str
    key: str
    authority: str
    server_name: str = ""

    def owner_context(self) -> ssl.SSLContext:
        """For accepting; asks readers for a certificate.

        Raises:
            TransportUnavailable: a file is missing, or is not what it should be.
        """
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def reader_context(self) -> ssl.SSLContext:
        """For connecting; checks the owner's certificate and its name.

        Raises:
            TransportUnavailable: a file is missing, or is not what it should be.
        """
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.authority)
        except (OSError, ssl.SSLError) as error:
            raise TransportUnavailable(
                f"TLS with {self.certificate}, {self.key} and {self.authority}: {error}",
                hint="all three are PEM files, and the key belongs to the certificate",
            ) from error
        return context


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpSettings:
    """Of one `tcp` transport; the owner's first, then both sides', then the reader's.

    Attributes:
        listen: where the owner binds, port 0 = any free one; empty: this side only reads.
        advertise: under which addresses peers find it, the preferred one first, port 0 = the one bound in
            the same place of `listen`, or in its last; empty: as bound.
        epoch: of this owner, told in WELCOME.
        backlog: connections that the kernel keeps until they are accepted.
        max_connections: open at once on the owner's side.
        max_connections_per_peer: of them from one address.
        num_serving_threads: over which the connections are dealt.
        chunk_nbytes: of one DATA frame at most; what is copied goes in smaller ones.
        max_ranges: of one PULL or PUSH.
        lend_from_nbytes: so much of one pull goes by reference or nothing, where memory was registered as `Lendable`
            and the reader says when it has all; less stays in the cache when it is copied.
        lend_to_this_host: by reference also to readers whose packets do not leave this host by hardware. They could
            keep hold of the pages, and see what is written there later: for processes that are trusted.
        hello_timeout_s: from connecting to the end of HELLO and WELCOME.
        idle_timeout_s: silence after which the owner closes an idle connection; 0 = never.
        frame_timeout_s: for the rest of a frame that has begun, and for payload to move on.
        keepalive_idle_s, keepalive_interval_s, keepalive_count: TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT.
        user_timeout_s: TCP_USER_TIMEOUT, for what was sent and is not acknowledged.
        send_buffer_nbytes, receive_buffer_nbytes: SO_SNDBUF, SO_RCVBUF; 0 = the kernel tunes them.
        congestion_control: TCP_CONGESTION; empty: the kernel's default.
        local_congestion_control: the same, to peers on this host; empty: as for others.
        tls: files to speak TLS with; None = plain.
        name: what this reader calls itself, for the owner's log.
        local_addresses: this host's addresses to connect from, a path each; empty = the kernel chooses.
        connect_timeout_s: for connecting, HELLO and WELCOME included.
        heartbeat_s: how often an idle connection says PING.
        pong_timeout_s: after so long without PONG the connection is given up.
        max_streams: connections that one request uses on one path.
        max_connections_to_peer: open at once to one owner, over all paths.
        max_idle_connections_to_peer: kept open for the next transfers.
        max_idle_s: after so long without a transfer a connection is closed.
        max_spare_idle_s: the same for those that no path is in use with any more: more than it is worth streams.
        max_nbytes_in_flight: asked of one owner at once.
        done_from_nbytes: pulls of so much end with DONE, so that their owner may send by reference.
        spin_s: how long a thread that waits for a short answer looks again before it sleeps.
    """

    listen: tuple[Address, ...] = ()
    advertise: tuple[Address, ...] = ()
    epoch: int = 0
    backlog: int = 1024
    max_connections: int = 1024
    max_connections_per_peer: int = 256
    num_serving_threads: int = 1
    chunk_nbytes: int = 16 << 20
    max_ranges: int = MAX_RANGES
    lend_from_nbytes: int = 8 << 20
    lend_to_this_host: bool = False
    hello_timeout_s: float = 2.0
    idle_timeout_s: float = 5.0
    frame_timeout_s: float = 3.0

    keepalive_idle_s: int = 1
    keepalive_interval_s: int = 1
    keepalive_count: int = 3
    user_timeout_s: float = 3.0
    send_buffer_nbytes: int = 0
    receive_buffer_nbytes: int = 0
    congestion_control: str = ""
    local_congestion_control: str = "reno"
    tls: TlsFiles | None = None

    name: str = ""
    local_addresses: tuple[str, ...] = ()
    connect_timeout_s: float = 2.0
    heartbeat_s: float = 1.5
    pong_timeout_s: float = 2.0
    max_streams: int = 4
    max_connections_to_peer: int = 16
    max_idle_connections_to_peer: int = 8
    max_idle_s: float = 60.0
    max_spare_idle_s: float = 3.0
    max_nbytes_in_flight: int = 256 << 20
    done_from_nbytes: int = 8 << 20
    spin_s: float = 50e-6

    def __post_init__(self) -> None:
        """Refuses what cannot work."""
        self._check_addresses()
        may_be_zero = {
            "epoch",
            "idle_timeout_s",
            "send_buffer_nbytes",
            "receive_buffer_nbytes",
            "spin_s",
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                continue
            if isinstance(value, (int, float)) and not (
                value > 0 or (value == 0 and field.name in may_be_zero)
            ):
                raise TransportUnavailable(f"tcp: {field.name} = {value} is out of range")
        for name, most in (
            ("epoch", (1 << 64) - 1),
            ("chunk_nbytes", MAX_DATA_NBYTES),
            ("max_ranges", MAX_RANGES),
            ("hello_timeout_s", MAX_TIMEOUT_MS / 1000),
            ("idle_timeout_s", MAX_TIMEOUT_MS / 1000),
            ("frame_timeout_s", MAX_TIMEOUT_MS / 1000),
            ("heartbeat_s", MAX_TIMEOUT_MS / 1000),
            ("user_timeout_s", MAX_TIMEOUT_MS / 1000),
        ):
            if getattr(self, name) > most:
                raise TransportUnavailable(
                    f"tcp: {name} = {getattr(self, name)} is more than {most}"
                )
        if len(self.name.encode()) > MAX_NAME_NBYTES:
            raise TransportUnavailable(f"tcp: a name has at most {MAX_NAME_NBYTES} bytes")

    def _check_addresses(self) -> None:
        if len(self.listen) > MAX_ADDRESSES or len(self.advertise) > MAX_ADDRESSES:
            raise TransportUnavailable(f"tcp: at most {MAX_ADDRESSES} addresses can be told")
        if self.advertise and not self.listen:
            raise TransportUnavailable("tcp: what is advertised must be listened on as well")
        for address in self.advertise or self.listen:
            if _is_wildcard(address.host):
                raise TransportUnavailable(
                    f"tcp: {address} is everywhere and nowhere: no peer can connect to it",
                    hint="say in `advertise` under which addresses this host is reached",
                )


def _is_wildcard(host: str) -> bool:
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False  # a name
