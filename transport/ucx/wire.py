"""What `ucx` peers say to each other: descriptors' extra part, and messages. No I/O.

Rules kept here: nothing is allocated before its size was compared with its bound; what does not parse is BadFrame or
BadDescriptor and never anything else; addresses and keys reach UCX only under a digest that is keyed with the grant's
capability, so what was damaged on its way is refused here (UCX can crash on it).

Messages may overtake each other. A message is a head and a payload. All integers are big-endian:

    16 session   1 kind   1 side (1: the owner speaks)   2 zero   4 op   8 position

| kind | who | payload |
| 1 HELLO | reader | what `Hello` says: a right, and where to answer |
| 2 FRAME | both | one frame of `docs/wire.md`: WELCOME, PULL, PUSH, CLEAR, DONE, FAIL, PING, PONG |
| 3 DATA | both | bytes of transfer `op`, from `position` of its stream on |
| 4 TAKEN | both | none: `position` bytes of `op` are where they belong, send more |
| 5 STOP | both | none: `op` is given up; 0: whoever says it leaves, and all is given up |

The position of a PULL's or PUSH's message says how much of the same transfer moved before it (a transfer of more ranges
than one PULL can name is several), and by its top bit that the bytes will be moved one-sidedly: then CLEAR answers it
and DONE ends it.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from snowskin.transport.descriptor import CAPABILITY_NBYTES
from snowskin.transport.errors import BadDescriptor, BadFrame
from snowskin.transport.frames import (
    HEAD_NBYTES,
    MAX_BODY_NBYTES,
    MAX_NAME_NBYTES,
    Frame,
    Kind,
    decode_body,
    decode_head,
    encode,
)
from snowskin.transport.ucp.api import MAX_PEER_BYTES
from snowskin.transport.ucx.settings import CHUNK_NBYTES, RECEIVE_SEGMENT_NBYTES

if TYPE_CHECKING:
    from snowskin.transport.descriptor import RegionDescriptor

VERSION = 1
SESSION_NBYTES = 16
MAX_SLICES = 1024
MAX_DATA_NBYTES = RECEIVE_SEGMENT_NBYTES
WINDOW_NBYTES = 4 * CHUNK_NBYTES  # DATA of one transfer begins less than this behind what is TAKEN
LEAVING = 0  # the op of a STOP that ends the conversation
ONE_SIDED = 1 << 63  # in the position of a PULL's or PUSH's message

_HEAD = struct.Struct(f">{SESSION_NBYTES}sBBHIQ")
_HELLO = struct.Struct(f">4sH{CAPABILITY_NBYTES}sQQIBI")
_MAGIC = b"SNUX"
_DIGEST_NBYTES = 16
_REACH = struct.Struct(f">BB{_DIGEST_NBYTES}sBIH")
_SLICE = struct.Struct(">QQH")
_SEALED = struct.Struct(">QQQB")
_OFFERS_ONE_SIDED = 1
_OVER_ANYTHING = 2
HEADER_NBYTES = _HEAD.size


class MessageKind(enum.IntEnum):
    """What a message is; the number on the wire."""

    HELLO = 1
    FRAME = 2
    DATA = 3
    TAKEN = 4
    STOP = 5


MAX_PAYLOAD_NBYTES = {
    MessageKind.HELLO: _HELLO.size + MAX_NAME_NBYTES + MAX_PEER_BYTES,
    MessageKind.FRAME: HEAD_NBYTES
    + max(nbytes for kind, nbytes in MAX_BODY_NBYTES.items() if kind is not Kind.DATA),
    MessageKind.DATA: MAX_DATA_NBYTES,
    MessageKind.TAKEN: 0,
    MessageKind.STOP: 0,
}


class MessageHead(NamedTuple):
    """What every message begins with."""

    session: bytes
    kind: MessageKind
    op: int
    position: int
    by_owner: bool = False

    def encode(self) -> bytes:
        """Its 32 bytes."""
        return _HEAD.pack(self.session, self.kind, self.by_owner, 0, self.op, self.position)

    @classmethod
    def decode(cls, header: bytes, payload_nbytes: int) -> MessageHead:
        """Raises BadFrame: another size, an unknown kind, or a payload larger than its bound."""
        if len(header) != _HEAD.size:
            raise BadFrame(f"a message with a head of {len(header)} bytes")
        session, number, side, zero, op, position = _HEAD.unpack(header)
        try:
            kind = MessageKind(number)
        except ValueError:
            raise BadFrame(f"a message of unknown kind {number}") from None
        if side > 1 or zero:
            raise BadFrame(f"{kind.name} of side {side}, with {zero:#x} where nothing belongs")
        if payload_nbytes > MAX_PAYLOAD_NBYTES[kind]:
            raise BadFrame(f"{kind.name} with {payload_nbytes} bytes")
        return cls(session, kind, op, position, bool(side))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A reader's first words.

    Attributes:
        capability, epoch, generation: of any living grant of this owner; whoever has none is not answered.
        heartbeat_ms: when idle, the reader says something at least this often.
        name: who it is, for the owner's log; not a proof of anything.
        address: its worker's.
    """

    capability: bytes
    epoch: int
    generation: int
    heartbeat_ms: int
    name: str
    address: bytes

    def encode(self) -> bytes:
        """The payload of HELLO."""
        name = self.name.encode()
        return (
            _HELLO.pack(
                _MAGIC,
                VERSION,
                self.capability,
                self.epoch,
                self.generation,
                self.heartbeat_ms,
                len(name),
                len(self.address),
            )
            + name
            + self.address
        )

    @classmethod
    def decode(cls, payload: bytes) -> Hello:
        """Raises BadFrame."""
        if len(payload) < _HELLO.size:
            raise BadFrame(f"HELLO of {len(payload)} bytes")
        magic, version, capability, epoch, generation, heartbeat_ms, name_nbytes, nbytes = (
            _HELLO.unpack_from(payload)
        )
        if magic != _MAGIC or version != VERSION:
            raise BadFrame(f"HELLO of another protocol, or of version {version}, not {VERSION}")
        if not 0 < nbytes <= MAX_PEER_BYTES or name_nbytes > MAX_NAME_NBYTES:
            raise BadFrame(f"HELLO with a name of {name_nbytes} and an address of {nbytes} bytes")
        if len(payload) != _HELLO.size + name_nbytes + nbytes:
            raise BadFrame(f"HELLO of {len(payload)} bytes declares {name_nbytes} + {nbytes}")
        end = _HELLO.size + name_nbytes
        return cls(
            capability=capability,
            epoch=epoch,
            generation=generation,
            heartbeat_ms=heartbeat_ms,
            name=printable(payload[_HELLO.size : end]),
            address=payload[end:],
        )


def encode_frame(frame: Frame) -> bytes:
    """The payload of FRAME."""
    return encode(frame)


def decode_frame(payload: bytes) -> Frame:
    """The frame that is all of `payload`; raises BadFrame."""
    if len(payload) < HEAD_NBYTES:
        raise BadFrame(f"a frame of {len(payload)} bytes")
    head = decode_head(payload)
    if head.kind in (Kind.DATA, Kind.HELLO) or len(payload) != HEAD_NBYTES + head.nbytes:
        raise BadFrame(f"{head.kind.name} of {len(payload)} bytes in a message")
    return decode_body(head, payload[HEAD_NBYTES:])


class Slice(NamedTuple):
    """One registration of a region: consecutive slices are its memory from the first byte on."""

    address: int
    nbytes: int
    key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How to reach an owner: the extra part of a `ucx` descriptor.

    Attributes:
        name: the owner's, for errors.
        address: its worker's.
        over_anything: whether its memory may be fetched one-sidedly whatever UCX uses.
        slices: the registrations of the region, where it offers one-sided access; else none.
    """

    name: str
    address: bytes
    over_anything: bool = False
    slices: tuple[Slice, ...] = ()

    def seal(self, descriptor: RegionDescriptor) -> bytes:
        """The extra part for `descriptor`, bound to its capability, size, epoch, generation and right to write."""
        body = self._body()
        flags = (_OFFERS_ONE_SIDED if self.slices else 0) | (
            _OVER_ANYTHING if self.over_anything else 0
        )
        name = self.name.encode()
        lengths = (len(name), len(self.address), len(self.slices))
        digest = _digest(descriptor, flags, lengths, body)
        return _REACH.pack(VERSION, flags, digest, *lengths) + body

    @classmethod
    def open(cls, descriptor: RegionDescriptor) -> Reach:
        """What `seal` made; BadDescriptor where anything of it, or of the descriptor, was changed."""
        extra = descriptor.extra
        if len(extra) < _REACH.size:
            raise BadDescriptor(f"a descriptor of ucx with {len(extra)} bytes of its own")
        version, flags, digest, *lengths = _REACH.unpack_from(extra)
        if version != VERSION or flags > _OFFERS_ONE_SIDED | _OVER_ANYTHING:
            raise BadDescriptor(f"a descriptor of ucx of version {version}, flags {flags:#x}")
        body = extra[_REACH.size :]
        if not hmac.compare_digest(digest, _digest(descriptor, flags, tuple(lengths), body)):
            raise BadDescriptor(
                "this descriptor of ucx is not as its owner made it",
                hint="carry it unchanged; keys that came damaged could crash UCX",
            )
        return cls._parse(body, *lengths, flags=flags, nbytes=descriptor.nbytes)

    def _body(self) -> bytes:
        parts = [self.name.encode(), self.address]
        for address, nbytes, key in self.slices:
            parts += [_SLICE.pack(address, nbytes, len(key)), key]
        return b"".join(parts)

    @classmethod
    def _parse(
        cls,
        body: bytes,
        name_nbytes: int,
        address_nbytes: int,
        num_slices: int,
        *,
        flags: int,
        nbytes: int,
    ) -> Reach:
        start = name_nbytes + address_nbytes
        if not 0 < address_nbytes <= MAX_PEER_BYTES or start > len(body) or num_slices > MAX_SLICES:
            raise BadDescriptor(
                f"an address of {address_nbytes} bytes and {num_slices} slices in {len(body)} bytes"
            )
        slices: list[Slice] = []
        end = start
        for _ in range(num_slices):
            if len(body) < end + _SLICE.size:
                raise BadDescriptor(f"slice {len(slices)} of {num_slices} is cut off")
            address, slice_nbytes, key_nbytes = _SLICE.unpack_from(body, end)
            end += _SLICE.size
            if not 0 < key_nbytes <= len(body) - end:
                raise BadDescriptor(f"slice {len(slices)} has a key of {key_nbytes} bytes")
            slices.append(Slice(address, slice_nbytes, body[end : end + key_nbytes]))
            end += key_nbytes
        if end != len(body):
            raise BadDescriptor(f"{len(body) - end} bytes behind the last slice")
        if bool(slices) != bool(flags & _OFFERS_ONE_SIDED) or (
            slices and sum(each.nbytes for each in slices) != nbytes
        ):
            raise BadDescriptor("the slices are not the region")
        return cls(
            name=printable(body[:name_nbytes]),
            address=body[name_nbytes:start],
            over_anything=bool(flags & _OVER_ANYTHING),
            slices=tuple(slices),
        )


def printable(name: bytes) -> str:
    """A peer's name as it may stand in a log."""
    text = name.decode("utf-8", "replace")
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def _digest(
    descriptor: RegionDescriptor, flags: int, lengths: tuple[int, ...], body: bytes
) -> bytes:
    sealed = _SEALED.pack(
        descriptor.nbytes, descriptor.epoch, descriptor.generation, descriptor.writable
    )
    what = _REACH.pack(VERSION, flags, bytes(_DIGEST_NBYTES), *lengths)
    return hashlib.blake2s(
        sealed + what + body, digest_size=_DIGEST_NBYTES, key=descriptor.capability
    ).digest()
