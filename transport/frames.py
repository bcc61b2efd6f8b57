"""The frames of the data plane: what goes over a stream between a reader and an owner. No I/O.

Rules kept here: nothing is allocated before its declared size was compared with its bound; every field is checked; what
does not parse is BadFrame and never anything else. `docs/wire.md` is the specification, and
`tests/vectors/data_plane.json` holds its examples.

All integers are big-endian. A frame is a head of 16 bytes and `nbytes` of body behind it:

    1 kind   1 flags   2 zero   4 op   8 nbytes

The body of DATA is payload: whoever receives it takes its bytes from the stream straight to where they belong, and
`Parser` hands out its head alone.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import NamedTuple

from snowskin.transport.errors import BadFrame, SnowskinError
from snowskin.transport.words import MAX_NOTE_NBYTES

WIRE_VERSION = 1
MAGIC = b"snowskin"
HEAD_NBYTES = 16
MAX_RANGES = 4096
MAX_DATA_NBYTES = 16 << 20  # of one DATA frame
MAX_NAME_NBYTES = 128
MAX_MESSAGE_NBYTES = 1024
MAX_TIMEOUT_MS = 3_600_000

_HEAD = struct.Struct(">BBHIQ")
_HELLO = struct.Struct(">8sHHIH")
_WELCOME = struct.Struct(">HQIIII")
_ASK = struct.Struct(">16sQQIBBHI")
_GRANT = struct.Struct(">16sQQ")  # what it begins with
_RANGE = struct.Struct(">QQ")
_FAIL = struct.Struct(">IBH")
_MAX_REASON_NBYTES = 64


class Kind(enum.IntEnum):
    """What a frame is; the number on the wire."""

    HELLO = 1
    WELCOME = 2
    PULL = 3
    PUSH = 4
    CLEAR = 5
    DATA = 6
    DONE = 7
    FAIL = 8
    PING = 9
    PONG = 10


_MAX_ASK_NBYTES = _ASK.size + MAX_RANGES * _RANGE.size + MAX_NOTE_NBYTES
MAX_BODY_NBYTES = {
    Kind.HELLO: _HELLO.size + MAX_NAME_NBYTES,
    Kind.WELCOME: _WELCOME.size,
    Kind.PULL: _MAX_ASK_NBYTES,
    Kind.PUSH: _MAX_ASK_NBYTES,
    Kind.CLEAR: 0,
    Kind.DATA: MAX_DATA_NBYTES,
    Kind.DONE: MAX_NOTE_NBYTES,
    Kind.FAIL: _FAIL.size + _MAX_REASON_NBYTES + MAX_MESSAGE_NBYTES,
    Kind.PING: 0,
    Kind.PONG: 0,
}
_BOUNDS = {int(kind): (kind, nbytes) for kind, nbytes in MAX_BODY_NBYTES.items()}


class Head(NamedTuple):
    """The first 16 bytes of a frame."""

    kind: Kind
    op: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The reader's first words.

    Attributes:
        min_version: the oldest version of this protocol that it speaks.
        max_version: the newest.
        heartbeat_ms: when idle, it says something at least this often.
        name: who it is, for the owner's log; not a proof of anything.
    """

    min_version: int
    max_version: int
    heartbeat_ms: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The owner's answer to HELLO.

    Attributes:
        version: what is spoken from here on.
        epoch: of this owner.
        max_ranges: of one PULL or PUSH.
        max_data_nbytes: of one DATA frame, in both directions.
        idle_timeout_ms: a connection that says nothing for so long is closed; 0 = never.
        ack_timeout_ms: how long the owner waits for one frame of a transfer under way.
    """

    version: int
    epoch: int
    max_ranges: int
    max_data_nbytes: int
    idle_timeout_ms: int
    ack_timeout_ms: int


class Ask(NamedTuple):
    """PULL or PUSH: the ranges of one grant, in the order in which their bytes go over the stream.

    A tuple, because a frozen dataclass of ten fields takes 1 µs to make, of the 10 that a small transfer may take.

    Attributes:
        is_push: whether the asking side writes.
        op: number of the transfer, above 0; all frames of it carry it.
        capability, epoch, generation: from the descriptor.
        timeout_ms: after so long the asking side gives up; the owner then stops as well.
        traffic: TrafficClass.
        wants_done: a PULL after whose last byte a DONE comes.
        note: of a PUSH, for the owner's `on_done`; a PULL brings its note with DONE.
        ranges: offset and size in the region; plain tuples, because they take half as long to make as a `Range`.
    """

    is_push: bool
    op: int
    capability: bytes
    epoch: int
    generation: int
    timeout_ms: int
    traffic: int
    wants_done: bool
    note: bytes
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clear:
    """Owner to writer: the push was checked, send its DATA."""

    op: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The head of a DATA frame; `nbytes` of payload follow in the stream."""

    op: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A transfer is complete: reader to owner after a PULL that asked for it, owner to writer after a PUSH."""

    op: int
    note: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """Owner to peer: a transfer ended, or with op 0 the connection will.

    Attributes:
        reason: `SnowskinError.reason`.
        retry_after_ms: 0 where a retry is useless.
        message: for people.
    """

    op: int
    reason: str
    retry_after_ms: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Are you there? `op` is any number."""

    op: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """Yes; `op` as in the PING."""

    op: int


Frame = Hello | Welcome | Ask | Clear | Data | Done | Fail | Ping | Pong


def encode(frame: Frame) -> bytes:
    """The frame's bytes; of a Data its head alone."""
    match frame:
        case Hello():
            name = _text(frame.name, MAX_NAME_NBYTES)
            body = _HELLO.pack(
                MAGIC, frame.min_version, frame.max_version, frame.heartbeat_ms, len(name)
            )
            return _head(Kind.HELLO, 0, len(body) + len(name)) + body + name
        case Welcome():
            body = _WELCOME.pack(
                frame.version,
                frame.epoch,
                frame.max_ranges,
                frame.max_data_nbytes,
                frame.idle_timeout_ms,
                frame.ack_timeout_ms,
            )
            return _head(Kind.WELCOME, 0, len(body)) + body
        case Ask():
            return _encode_ask(frame)
        case Clear():
            return _head(Kind.CLEAR, frame.op, 0)
        case Data():
            return _head(Kind.DATA, frame.op, frame.nbytes)
        case Done():
            return _head(Kind.DONE, frame.op, len(frame.note)) + frame.note
        case Fail():
            reason = _text(frame.reason, _MAX_REASON_NBYTES)
            message = _text(frame.message, MAX_MESSAGE_NBYTES)
            body = _FAIL.pack(frame.retry_after_ms, len(reason), len(message)) + reason + message
            return _head(Kind.FAIL, frame.op, len(body)) + body
        case Ping():
            return _head(Kind.PING, frame.op, 0)
        case Pong():
            return _head(Kind.PONG, frame.op, 0)


def fail_of(op: int, error: SnowskinError) -> Fail:
    """What says an error to the peer."""
    return Fail(
        op=op,
        reason=error.reason,
        retry_after_ms=round(1000 * (error.retry_after_s or 0.0)),
        message=error.message,
    )


def decode_head(data: bytes | bytearray | memoryview) -> Head:
    """The first 16 bytes of `data` as a frame's head.

    Raises:
        BadFrame: no such kind, a flag or a reserved bit is set, or a body larger than its bound.
    """
    number, flags, zero, op, nbytes = _HEAD.unpack_from(data)
    bound = _BOUNDS.get(number)  # by number: an enum's own hash costs more than all else here
    if bound is None:
        raise BadFrame(f"a frame of unknown kind {number}")
    kind, max_nbytes = bound
    if flags or zero:
        raise BadFrame(f"{kind.name} with unknown flags {flags:#x} or {zero:#x}")
    if nbytes > max_nbytes:
        raise BadFrame(f"{kind.name} declares {nbytes} bytes, {max_nbytes} are the most")
    return Head(kind, op, nbytes)


def decode_body(head: Head, body: bytes) -> Frame:
    """The frame of a head and its whole body; of DATA the body is empty here.

    Raises:
        BadFrame: the body is not exactly what the head's kind says.
    """
    kind, op, _ = head
    try:
        match kind:  # the frames of a small transfer first
            case Kind.PULL | Kind.PUSH:
                return decode_ask(head, body)
            case Kind.DATA:
                if not head.nbytes:
                    raise BadFrame("DATA without payload")
                return Data(op=op, nbytes=head.nbytes)
            case Kind.DONE:
                return Done(op=op, note=body)
            case Kind.HELLO:
                return _decode_hello(body)
            case Kind.WELCOME:
                return _decode_welcome(body)
            case Kind.FAIL:
                return _decode_fail(op, body)
    except struct.error:
        raise BadFrame(f"{kind.name} of {len(body)} bytes is too short") from None
    if body:
        raise BadFrame(f"{kind.name} carries nothing, and {len(body)} bytes came")
    if kind is Kind.CLEAR:
        return Clear(op=op)
    return Ping(op=op) if kind is Kind.PING else Pong(op=op)


def decode_ask(head: Head, body: bytes) -> Ask:
    """The PULL or PUSH of a head and its whole body.

    Raises:
        BadFrame: the body is not exactly what the head's kind says.
    """
    kind, op, _ = head
    is_push = kind is Kind.PUSH
    try:
        capability, epoch, generation, timeout_ms, traffic, flags, note_nbytes, num_ranges = (
            _ASK.unpack_from(body)
        )
    except struct.error:
        raise BadFrame(f"{kind.name} of {len(body)} bytes is too short") from None
    if note_nbytes > MAX_NOTE_NBYTES or not 1 <= num_ranges <= MAX_RANGES:
        raise BadFrame(f"{kind.name} with a note of {note_nbytes} bytes and {num_ranges} ranges")
    if len(body) != _ASK.size + note_nbytes + num_ranges * _RANGE.size:
        raise BadFrame(f"{kind.name} of {len(body)} bytes declares {num_ranges} ranges")
    if not op or flags > 1 or traffic > 2 or not 1 <= timeout_ms <= MAX_TIMEOUT_MS:
        raise BadFrame(
            f"{kind.name} with op {op}, flags {flags:#x}, class {traffic}, {timeout_ms} ms to live"
        )
    if note_nbytes and not is_push:
        raise BadFrame("PULL with a note: it comes with DONE")
    first = _ASK.size + note_nbytes
    return Ask(
        is_push,
        op,
        capability,
        epoch,
        generation,
        timeout_ms,
        traffic,
        flags == 1,
        body[_ASK.size : first],
        tuple(_RANGE.iter_unpack(body[first:])),
    )


def named_grant(body: bytes | bytearray | memoryview) -> tuple[bytes, int, int]:
    """Capability, epoch and generation out of the body of a PULL or PUSH, before its ranges are read.

    So a forged request of 4,096 ranges costs its owner no more than one of a single range.

    Raises:
        BadFrame: the body is too short.
    """
    try:
        capability, epoch, generation = _GRANT.unpack_from(body)
    except struct.error:
        raise BadFrame(f"a request of {len(body)} bytes is too short") from None
    return capability, epoch, generation


class Parser:
    """Frames out of a stream of bytes, however it is cut.

    After a `Data` the next `nbytes` of the stream are payload: what of it came already is taken with `take_payload`,
    the rest from the stream; only then are there further frames.
    """

    def __init__(self) -> None:
        """At the beginning of a stream."""
        self._buffer = bytearray()
        self._head: Head | None = None

    @property
    def num_buffered(self) -> int:
        """Bytes that came and were not handed out."""
        return len(self._buffer)

    @property
    def num_wanted(self) -> int:
        """Bytes that are missing to the next frame, or to knowing its size; at least 1 after `next_frame` was None."""
        whole = HEAD_NBYTES if self._head is None else self._body_nbytes(self._head)
        return max(0, whole - len(self._buffer))

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes bytes from the stream."""
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next whole frame, None where bytes are missing; raises BadFrame, and then the stream is useless."""
        if self._head is None:
            if len(self._buffer) < HEAD_NBYTES:
                return None
            self._head = decode_head(self._buffer)
            del self._buffer[:HEAD_NBYTES]
        nbytes = self._body_nbytes(self._head)
        if len(self._buffer) < nbytes:
            return None
        head, self._head = self._head, None
        body = bytes(self._buffer[:nbytes])
        del self._buffer[:nbytes]
        return decode_body(head, body)

    def take_payload(self, nbytes: int) -> bytes:
        """At most `nbytes` of payload that came together with its head."""
        payload = bytes(self._buffer[:nbytes])
        del self._buffer[:nbytes]
        return payload

    @staticmethod
    def _body_nbytes(head: Head) -> int:
        return 0 if head.kind is Kind.DATA else head.nbytes


def _head(kind: Kind, op: int, nbytes: int) -> bytes:
    return _HEAD.pack(kind, 0, 0, op, nbytes)


def _encode_ask(ask: Ask) -> bytes:
    body = bytearray(
        _ASK.pack(
            ask.capability,
            ask.epoch,
            ask.generation,
            ask.timeout_ms,
            ask.traffic,
            1 if ask.wants_done else 0,
            len(ask.note),
            len(ask.ranges),
        )
    )
    body += ask.note
    for offset, nbytes in ask.ranges:
        body += _RANGE.pack(offset, nbytes)
    return _head(Kind.PUSH if ask.is_push else Kind.PULL, ask.op, len(body)) + bytes(body)


def _decode_hello(body: bytes) -> Hello:
    magic, min_version, max_version, heartbeat_ms, name_nbytes = _HELLO.unpack_from(body)
    if magic != MAGIC:
        raise BadFrame("this is not a Snowskin peer", hint="check the port")
    if len(body) != _HELLO.size + name_nbytes:
        raise BadFrame(f"HELLO of {len(body)} bytes declares a name of {name_nbytes}")
    if min_version > max_version:
        raise BadFrame(f"HELLO speaks versions {min_version} to {max_version}")
    name = body[_HELLO.size :].decode("utf-8", "replace")
    return Hello(
        min_version=min_version,
        max_version=max_version,
        heartbeat_ms=heartbeat_ms,
        name="".join(sign if sign.isprintable() else "?" for sign in name),
    )


def _decode_welcome(body: bytes) -> Welcome:
    if len(body) != _WELCOME.size:
        raise BadFrame(f"WELCOME of {len(body)} bytes")
    version, epoch, max_ranges, max_data_nbytes, idle_timeout_ms, ack_timeout_ms = (
        _WELCOME.unpack_from(body)
    )
    if not (1 <= max_ranges <= MAX_RANGES and 1 <= max_data_nbytes <= MAX_DATA_NBYTES):
        raise BadFrame(f"WELCOME allows {max_ranges} ranges and {max_data_nbytes} bytes a frame")
    return Welcome(
        version=version,
        epoch=epoch,
        max_ranges=max_ranges,
        max_data_nbytes=max_data_nbytes,
        idle_timeout_ms=idle_timeout_ms,
        ack_timeout_ms=ack_timeout_ms,
    )


def _decode_fail(op: int, body: bytes) -> Fail:
    retry_after_ms, reason_nbytes, message_nbytes = _FAIL.unpack_from(body)
    if reason_nbytes > _MAX_REASON_NBYTES or message_nbytes > MAX_MESSAGE_NBYTES:
        raise BadFrame(f"FAIL with a reason of {reason_nbytes} bytes and {message_nbytes} more")
    if len(body) != _FAIL.size + reason_nbytes + message_nbytes:
        raise BadFrame(f"FAIL of {len(body)} bytes")
    reason_end = _FAIL.size + reason_nbytes
    reason = body[_FAIL.size : reason_end].decode("ascii", "replace")
    if not reason.replace("_", "").isalnum():
        raise BadFrame("FAIL without a reason")
    return Fail(
        op=op,
        reason=reason,
        retry_after_ms=retry_after_ms,
        message=body[reason_end:].decode("utf-8", "replace"),
    )


def _text(text: str, max_nbytes: int) -> bytes:
    """UTF-8, cut at a character's end."""
    return text.encode()[:max_nbytes].decode("utf-8", "ignore").encode()
