"""Where an owner can be reached: the part of a `tcp` descriptor that is for this transport alone.

Rules kept here: an owner says where it is *advertised*, which may differ from where it is bound; parsing never crashes
and is bounded.

Layout: 1 version (1), 1 flags (1: TLS), 1 number of addresses, and for each 2 port, 1 length of the host, the host
(ASCII: a name, an IPv4 or an IPv6 address without brackets).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from snowskin.transport.errors import BadDescriptor

MAX_ADDRESSES = 16
_VERSION = 1
_TLS = 1
_HEAD = struct.Struct(">BBB")
_ADDRESS = struct.Struct(">HB")


class Address(NamedTuple):
    """A host, name or number, and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        """As people write it; IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """`host:port` or `[host]:port`; BadDescriptor for anything else."""
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise BadDescriptor(f"address {text!r}", hint="write IPv6 addresses in brackets")
        if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
            raise BadDescriptor(f"address {text!r} is not HOST:PORT")
        return cls(host, int(port))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reachability:
    """All addresses under which one owner serves, the preferred one first; and whether by TLS."""

    addresses: tuple[Address, ...]
    tls: bool = False

    def to_bytes(self) -> bytes:
        """The wire form."""
        if not 1 <= len(self.addresses) <= MAX_ADDRESSES:
            raise BadDescriptor(
                f"{len(self.addresses)} addresses; 1 to {MAX_ADDRESSES} can be told"
            )
        parts = [_HEAD.pack(_VERSION, _TLS if self.tls else 0, len(self.addresses))]
        for host, port in self.addresses:
            if not (host.isascii() and 0 < len(host) < 256 and 0 < port < 1 << 16):
                raise BadDescriptor(f"address {host!r}:{port} cannot be told")
            parts += [_ADDRESS.pack(port, len(host)), host.encode("ascii")]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Reachability:
        """Parses the wire form; anything else than exactly that is BadDescriptor."""
        try:
            version, flags, num_addresses = _HEAD.unpack_from(data)
            if version != _VERSION or flags & ~_TLS or not 1 <= num_addresses <= MAX_ADDRESSES:
                raise BadDescriptor(f"addresses of version {version}, {num_addresses} of them")
            position, addresses = _HEAD.size, []
            for _ in range(num_addresses):
                port, host_nbytes = _ADDRESS.unpack_from(data, position)
                position += _ADDRESS.size
                host = data[position : position + host_nbytes].decode("ascii")
                position += host_nbytes
                if not port or not host or len(host) != host_nbytes or not host.isprintable():
                    raise BadDescriptor("an address without host or port")
                addresses.append(Address(host, port))
        except (struct.error, UnicodeDecodeError) as error:
            raise BadDescriptor(f"addresses of {len(data)} bytes do not parse: {error}") from None
        if position != len(data):
            raise BadDescriptor(f"{len(data) - position} bytes behind the addresses")
        return cls(addresses=tuple(addresses), tls=bool(flags & _TLS))
