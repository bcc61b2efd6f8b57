"""What an owner tells a peer about a region: small, versioned, opaque to whoever carries it.

Rules kept here: parsing never crashes and allocates nothing before the length is checked; the
capability is unguessable and never printed; expiry is relative, because two hosts share no clock.

Layout, big-endian, no padding, nothing behind it:

    4  magic "SNRD"           8  nbytes of the region     2  length s of the scheme
    1  version (2)            8  epoch of the owner       4  length e of the extra part
    1  flags (1: writable)    8  generation               s  scheme, ASCII
    16 capability             8  seconds to live (float)  e  extra, for the transport itself

An unknown flag is refused. Which ranges of the region are granted stays with the owner.
"""

from __future__ import annotations

import math
import secrets
import struct
from dataclasses import dataclass, field

from snowskin.transport.errors import BadDescriptor

VERSION = 2
CAPABILITY_NBYTES = 16
MAX_DESCRIPTOR_NBYTES = 64 * 1024

_MAGIC = b"SNRD"
_HEAD = struct.Struct(f">4sBB{CAPABILITY_NBYTES}sQQQdHI")
_WRITABLE = 1
_MAX_SCHEME_NBYTES = 32
_UINT64_END = 1 << 64


def new_capability() -> bytes:
    """16 bytes that nobody can guess."""
    return secrets.token_bytes(CAPABILITY_NBYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionDescriptor:
    """A peer's right to a region, and what it needs to reach it.

    Attributes:
        scheme: the transport that made it, e.g. `shm`.
        capability: what proves the right; 16 bytes, not part of the repr.
        nbytes: size of the region, at least 1.
        epoch: the owner's life; a restarted owner has another.
        generation: how often this memory was given anew within the epoch.
        expires_in_s: life from when the peer asked for it; infinity where it has no end.
        writable: whether the peer may push.
        extra: what the transport itself needs (addresses, keys), opaque to everybody else.
    """

    scheme: str
    capability: bytes = field(repr=False)
    nbytes: int
    epoch: int = 0
    generation: int = 0
    expires_in_s: float = math.inf
    writable: bool = False
    extra: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        """Refuses what `to_bytes` could not carry."""
        if not (0 < len(self.scheme) <= _MAX_SCHEME_NBYTES and self.scheme.isascii()):
            raise BadDescriptor(f"scheme of {len(self.scheme)} characters, or not ASCII")
        if len(self.capability) != CAPABILITY_NBYTES:
            raise BadDescriptor(f"capability of {len(self.capability)} bytes, not 16")
        if not 0 < self.nbytes < _UINT64_END:
            raise BadDescriptor(f"region of {self.nbytes} bytes")
        if not (0 <= self.epoch < _UINT64_END and 0 <= self.generation < _UINT64_END):
            raise BadDescriptor(f"epoch {self.epoch} or generation {self.generation} is no uint64")
        if not self.expires_in_s >= 0:  # also refuses NaN
            raise BadDescriptor(f"expires in {self.expires_in_s} s")
        if _HEAD.size + len(self.scheme) + len(self.extra) > MAX_DESCRIPTOR_NBYTES:
            raise BadDescriptor(f"{len(self.extra)} bytes of extra are too many")

    def to_bytes(self) -> bytes:
        """The wire form, at most 64 KiB."""
        scheme = self.scheme.encode("ascii")
        head = _HEAD.pack(
            _MAGIC,
            VERSION,
            _WRITABLE if self.writable else 0,
            self.capability,
            self.nbytes,
            self.epoch,
            self.generation,
            self.expires_in_s,
            len(scheme),
            len(self.extra),
        )
        return head + scheme + self.extra

    @classmethod
    def from_bytes(cls, data: bytes) -> RegionDescriptor:
        """Parses the wire form; anything else than exactly one descriptor is BadDescriptor."""
        if not _HEAD.size <= len(data) <= MAX_DESCRIPTOR_NBYTES:
            raise BadDescriptor(f"a region descriptor of {len(data)} bytes")
        magic, version, flags, capability, nbytes, epoch, generation, expires_in_s, s, e = (
            _HEAD.unpack_from(data)
        )
        if magic != _MAGIC or version != VERSION:
            raise BadDescriptor(
                f"not a region descriptor of version {VERSION} (version {version})",
                hint="run the same release of Snowskin on both sides",
            )
        if flags & ~_WRITABLE:
            raise BadDescriptor(f"a region descriptor with unknown flags {flags:#x}")
        if _HEAD.size + s + e != len(data):
            raise BadDescriptor(f"descriptor of {len(data)} bytes declares {_HEAD.size + s + e}")
        scheme = bytes(data[_HEAD.size : _HEAD.size + s])
        return cls(
            scheme=scheme.decode("ascii", "replace"),
            capability=capability,
            nbytes=nbytes,
            epoch=epoch,
            generation=generation,
            expires_in_s=expires_in_s,
            writable=bool(flags & _WRITABLE),
            extra=bytes(data[_HEAD.size + s :]),
        )
