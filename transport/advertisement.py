"""What a node says of how its memory can be reached: small, versioned bytes, opaque to whoever carries them.

Rules kept here: parsing never crashes, and is bounded before anything is allocated; it says who
the host and the process are by digests, not by names; a scheme that a reader does not know is no
error. It is a hint and no proof: whoever acts on it still needs a capability.

Layout, big-endian, no padding, nothing behind it:

    4  magic "SNTA"          then for each scheme
    1  version (1)             1  length of its name, and the name (ASCII)
    16 host                    1  number of kinds, and for each: 1 length, the kind (ASCII)
    16 process                 1  number of addresses, and for each:
    8  PID namespace               2 port, 1 flags (1: preferred), 8 bytes/s (0: not known),
    8  network namespace           1 length of the host, the host (ASCII)
    1  number of schemes       4  length of the extra part, and that
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from snowskin.transport.addresses import Address
from snowskin.transport.errors import BadDescriptor

VERSION = 1
MAX_ADVERTISEMENT_NBYTES = 64 * 1024
MAX_SCHEMES = 16
MAX_KINDS = 16
MAX_ADDRESSES = 64
ID_NBYTES = 16
UNKNOWN_ID = bytes(ID_NBYTES)

_MAGIC = b"SNTA"
_HEAD = struct.Struct(f">4sB{ID_NBYTES}s{ID_NBYTES}sQQB")
_ADDRESS = struct.Struct(">HBQ")
_EXTRA = struct.Struct(">I")
_PREFERRED = 1
_UINT64_END = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HostIdentity:
    """Who is speaking; zeros are unknown and equal to nothing.

    Attributes:
        host: the same for all processes of one running kernel.
        process: the same within one process.
        pid_namespace, net_namespace: numbers of its namespaces, unique on its host.
    """

    host: bytes = UNKNOWN_ID
    process: bytes = UNKNOWN_ID
    pid_namespace: int = 0
    net_namespace: int = 0

    def __post_init__(self) -> None:
        """Refuses what could not be carried."""
        if len(self.host) != ID_NBYTES or len(self.process) != ID_NBYTES:
            raise BadDescriptor(f"ids of {len(self.host)} and {len(self.process)} bytes, not 16")
        if not all(0 <= id_ < _UINT64_END for id_ in (self.pid_namespace, self.net_namespace)):
            raise BadDescriptor("a namespace's number is no uint64")

    def same_host(self, other: HostIdentity) -> bool:
        """Whether both surely run on one kernel."""
        return self.host != UNKNOWN_ID and self.host == other.host

    def same_process(self, other: HostIdentity) -> bool:
        """Whether both surely are one process."""
        return self.process != UNKNOWN_ID and self.process == other.process

    def same_pids(self, other: HostIdentity) -> bool:
        """Whether both surely see the same process numbers."""
        return self.same_host(other) and 0 < self.pid_namespace == other.pid_namespace

    def same_network(self, other: HostIdentity) -> bool:
        """Whether both surely have the same interfaces, loopback among them."""
        return self.same_host(other) and 0 < self.net_namespace == other.net_namespace


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvertisedAddress:
    """Where a scheme is reached; preferred: near to the memory that is served."""

    address: Address
    speed_bytes_per_s: int = 0
    is_preferred: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeAdvertisement:
    """One scheme of a node.

    Attributes:
        scheme: as in the registry.
        kinds: what its hardware can do, e.g. `rdma:InfiniBand`, `gpudirect`, `cuda_ipc`.
        addresses: the preferred ones first; none where `extra` says it all.
        extra: for the transport itself, e.g. a UCX worker address; opaque to everybody else.
    """

    scheme: str
    kinds: tuple[str, ...] = ()
    addresses: tuple[AdvertisedAddress, ...] = ()
    extra: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advertisement:
    """All that a node tells of its transports."""

    identity: HostIdentity = HostIdentity()
    schemes: tuple[SchemeAdvertisement, ...] = ()

    def scheme(self, name: str) -> SchemeAdvertisement | None:
        """What is said of one scheme, or None."""
        return next((scheme for scheme in self.schemes if scheme.scheme == name), None)

    def to_bytes(self) -> bytes:
        """The wire form, at most 64 KiB; BadDescriptor where it would not fit its bounds."""
        names = {scheme.scheme for scheme in self.schemes}
        if len(self.schemes) > MAX_SCHEMES or len(names) != len(self.schemes):
            raise BadDescriptor(
                f"{len(self.schemes)} schemes, {len(names)} of them different; "
                f"at most {MAX_SCHEMES} can be told, each once"
            )
        who = self.identity
        head = _HEAD.pack(
            _MAGIC,
            VERSION,
            who.host,
            who.process,
            who.pid_namespace,
            who.net_namespace,
            len(self.schemes),
        )
        data = head + b"".join(_scheme_to(scheme) for scheme in self.schemes)
        if len(data) > MAX_ADVERTISEMENT_NBYTES:
            raise BadDescriptor(f"an advertisement of {len(data)} bytes is too long")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Advertisement:
        """Parses the wire form; anything else than exactly one advertisement is BadDescriptor."""
        if not _HEAD.size <= len(data) <= MAX_ADVERTISEMENT_NBYTES:
            raise BadDescriptor(f"an advertisement of {len(data)} bytes")
        magic, version, host, process, pids, net, num_schemes = _HEAD.unpack_from(data)
        if magic != _MAGIC or version != VERSION:
            raise BadDescriptor(
                f"not an advertisement of version {VERSION} (version {version})",
                hint="run the same release of Snowskin on both sides",
            )
        if num_schemes > MAX_SCHEMES:
            raise BadDescriptor(f"an advertisement of {num_schemes} schemes")
        reader = _Reader(bytes(data), _HEAD.size)
        schemes = tuple(_scheme_from(reader) for _ in range(num_schemes))
        reader.end()
        if len({scheme.scheme for scheme in schemes}) != num_schemes:
            raise BadDescriptor("an advertisement that tells of one scheme twice")
        return cls(
            identity=HostIdentity(
                host=host, process=process, pid_namespace=pids, net_namespace=net
            ),
            schemes=schemes,
        )


class _Reader:
    """Takes parts from bytes, front to back, never behind their end."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position

    def take(self, nbytes: int) -> bytes:
        end = self._position + nbytes
        if end > len(self._data):
            raise BadDescriptor(f"an advertisement of {len(self._data)} bytes ends too early")
        part = self._data[self._position : end]
        self._position = end
        return part

    def byte(self) -> int:
        return self.take(1)[0]

    def word(self) -> str:
        text = self.take(self.byte())
        if not text or not text.isascii() or not text.decode("ascii").isprintable():
            raise BadDescriptor(f"an advertisement with an unprintable word of {len(text)} bytes")
        return text.decode("ascii")

    def end(self) -> None:
        if self._position != len(self._data):
            raise BadDescriptor(f"{len(self._data) - self._position} bytes behind an advertisement")


def _word_to(text: str) -> bytes:
    if not (0 < len(text) < 256 and text.isascii() and text.isprintable()):
        raise BadDescriptor(f"the word {text[:40]!r} cannot be told: 1 to 255 printable ASCII")
    return bytes([len(text)]) + text.encode("ascii")


def _scheme_to(scheme: SchemeAdvertisement) -> bytes:
    if len(scheme.kinds) > MAX_KINDS or len(scheme.addresses) > MAX_ADDRESSES:
        raise BadDescriptor(
            f"scheme {scheme.scheme}: {len(scheme.kinds)} kinds and {len(scheme.addresses)} "
            f"addresses; at most {MAX_KINDS} and {MAX_ADDRESSES} can be told"
        )
    parts = [_word_to(scheme.scheme), bytes([len(scheme.kinds)])]
    parts += [_word_to(kind) for kind in scheme.kinds]
    parts.append(bytes([len(scheme.addresses)]))
    for told in scheme.addresses:
        if not (0 < told.address.port < 1 << 16 and 0 <= told.speed_bytes_per_s < _UINT64_END):
            raise BadDescriptor(f"address {told.address} at {told.speed_bytes_per_s} bytes/s")
        flags = _PREFERRED if told.is_preferred else 0
        parts.append(_ADDRESS.pack(told.address.port, flags, told.speed_bytes_per_s))
        parts.append(_word_to(told.address.host))
    parts += [_EXTRA.pack(len(scheme.extra)), scheme.extra]
    return b"".join(parts)


def _scheme_from(reader: _Reader) -> SchemeAdvertisement:
    name = reader.word()
    num_kinds = reader.byte()
    if num_kinds > MAX_KINDS:
        raise BadDescriptor(f"scheme {name}: {num_kinds} kinds")
    kinds = tuple(reader.word() for _ in range(num_kinds))
    num_addresses = reader.byte()
    if num_addresses > MAX_ADDRESSES:
        raise BadDescriptor(f"scheme {name}: {num_addresses} addresses")
    addresses = tuple(_address_from(reader) for _ in range(num_addresses))
    (extra_nbytes,) = _EXTRA.unpack(reader.take(_EXTRA.size))
    return SchemeAdvertisement(
        scheme=name, kinds=kinds, addresses=addresses, extra=reader.take(extra_nbytes)
    )


def _address_from(reader: _Reader) -> AdvertisedAddress:
    port, flags, speed_bytes_per_s = _ADDRESS.unpack(reader.take(_ADDRESS.size))
    if not port or flags & ~_PREFERRED:
        raise BadDescriptor(f"an advertised address with port {port} and flags {flags}")
    return AdvertisedAddress(
        address=Address(reader.word(), port),
        speed_bytes_per_s=speed_bytes_per_s,
        is_preferred=bool(flags & _PREFERRED),
    )
