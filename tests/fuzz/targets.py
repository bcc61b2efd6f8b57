"""What a hostile peer can say to pure code, as functions of bytes: `python -m tests.fuzz` and hypothesis feed them.

Rules kept here: a target raises nothing for any bytes, but where there is a bug; what may be said is refused by a
`SnowskinError`, and everything else is a bug; what was taken can be said again and is the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.advertisement import (
    AdvertisedAddress,
    Advertisement,
    HostIdentity,
    SchemeAdvertisement,
)
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import BadDescriptor, BadFrame, OutOfBounds
from snowskin.transport.frames import (
    HEAD_NBYTES,
    MAX_BODY_NBYTES,
    Ask,
    Clear,
    Data,
    Done,
    Fail,
    Frame,
    Hello,
    Kind,
    Parser,
    Ping,
    Pong,
    Welcome,
    encode,
)
from snowskin.transport.grants import GrantedRanges
from snowskin.transport.words import Range
from tests.fuzz import conversations, ucx_conversations

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_FRAME_NBYTES = HEAD_NBYTES + MAX_BODY_NBYTES[Kind.PULL]


def descriptor(data: bytes) -> None:
    """Whatever carries descriptors may bring anything."""
    try:
        found = RegionDescriptor.from_bytes(data)
    except BadDescriptor:
        return
    assert found.to_bytes() == data


def addresses(data: bytes) -> None:
    """The part of a descriptor that says where its owner serves."""
    try:
        found = Reachability.from_bytes(data)
    except BadDescriptor:
        return
    assert found.to_bytes() == data


def advertisement(data: bytes) -> None:
    """What a node says of its transports, by whatever carries it."""
    try:
        found = Advertisement.from_bytes(data)
    except BadDescriptor:
        return
    assert found.to_bytes() == data


def frames(data: bytes) -> None:
    """A stream of frames says the same however it is cut; the first byte says into what parts."""
    part_nbytes, stream = (data[0] if data else 0) + 1, data[1:]
    whole, whole_error = parsed([stream])
    parts = [stream[at : at + part_nbytes] for at in range(0, len(stream), part_nbytes)]
    assert parsed(parts) == (whole, whole_error)
    # What was understood can be said; texts may come back shorter, because what is no UTF-8 was replaced.
    understood = [frame for frame in whole if not isinstance(frame, bytes)]
    again, error = parsed([b"".join(map(encode, understood))], with_payload=False)
    assert error == ""
    assert [without_text(frame) for frame in again] == [without_text(f) for f in understood]


def without_text(frame: Frame | bytes) -> Frame | bytes:
    if isinstance(frame, Hello):
        return replace(frame, name="")
    if isinstance(frame, Fail):
        return replace(frame, reason="", message="")
    return frame


def parsed(parts: list[bytes], *, with_payload: bool = True) -> tuple[list[Frame | bytes], str]:
    """All frames and payloads in a stream, and the error that ended it."""
    found: list[Frame | bytes] = []
    parser, missing_nbytes, payload = Parser(), 0, b""
    for part in parts:
        parser.feed(part)
        while True:
            if missing_nbytes:
                taken = parser.take_payload(missing_nbytes)
                payload += taken
                missing_nbytes -= len(taken)
                if missing_nbytes:
                    break
                found.append(payload)
                payload = b""
            try:
                frame = parser.next_frame()
            except BadFrame as error:
                return found, str(error)
            if frame is None:
                assert parser.num_wanted >= 1
                assert parser.num_buffered < MAX_FRAME_NBYTES
                break
            found.append(frame)
            if isinstance(frame, Data) and with_payload:
                missing_nbytes = frame.nbytes
    return found, ""


def grants(data: bytes) -> None:
    """Ranges of a grant and ranges that are asked for, against a byte-by-byte model; a region of 256 bytes."""
    num_granted = data[0] % 4 + 1 if data else 1
    pairs = [Range(*pair) for pair in zip(data[1::2], data[2::2], strict=False)]
    granted, asked = pairs[:num_granted], pairs[num_granted:]
    try:
        held = GrantedRanges(granted, 256)
    except OutOfBounds:
        assert not granted or any(n < 1 or at + n > 256 for at, n in granted)
        return
    may = {place for at, n in granted for place in range(at, at + n)}
    for at, n in asked:
        assert held.contain(at, n) == (n > 0 and may.issuperset(range(at, at + n)))


TARGETS: dict[str, Callable[[bytes], object]] = {
    "descriptor": descriptor,
    "addresses": addresses,
    "advertisement": advertisement,
    "frames": frames,
    "grants": grants,
    "owner": conversations.owner,
    "reader_pulls": conversations.reader_pulls,
    "reader_pushes": conversations.reader_pushes,
    "ucx_owner": ucx_conversations.owner,
    "ucx_reader_pulls": ucx_conversations.reader_pulls,
    "ucx_reader_pushes": ucx_conversations.reader_pushes,
    "ucx_words": ucx_conversations.words,
    "ucx_reach": ucx_conversations.reach,
}

ASK = Ask(
    is_push=False,
    op=1,
    capability=bytes(range(16)),
    epoch=7,
    generation=3,
    timeout_ms=1000,
    traffic=1,
    wants_done=True,
    note=b"",
    ranges=(Range(0, 4096), Range(8192, 1)),
)
PULL = ASK._replace(capability=conversations.CAPABILITIES[0], ranges=conversations.GRANTED)
PUSH = PULL._replace(
    capability=conversations.CAPABILITIES[1], is_push=True, note=b"note", ranges=(Range(70, 110),)
)
FRAMES: list[Frame] = [
    Hello(min_version=1, max_version=1, heartbeat_ms=1000, name="reader"),
    Welcome(
        version=1,
        epoch=7,
        max_ranges=4096,
        max_data_nbytes=1 << 20,
        idle_timeout_ms=5000,
        ack_timeout_ms=2000,
    ),
    ASK,
    ASK._replace(is_push=True, note=b"note"),
    Clear(op=1),
    Done(op=1, note=b"note"),
    Fail(op=1, reason="GRANT_REFUSED", retry_after_ms=0, message="no such grant"),
    Ping(op=2),
    Pong(op=2),
]
# What the fuzzer begins with: well-formed, so that it comes past the first check.
SEEDS: dict[str, list[bytes]] = {
    "descriptor": [
        RegionDescriptor(
            scheme="tcp", capability=bytes(16), nbytes=4096, writable=True, extra=b"\x01\x02"
        ).to_bytes()
    ],
    "addresses": [
        Reachability(addresses=(Address("10.77.0.1", 4711), Address("fd77::1", 4712))).to_bytes()
    ],
    "advertisement": [
        Advertisement(
            identity=HostIdentity(host=b"h" * 16, process=b"p" * 16, pid_namespace=7),
            schemes=(
                SchemeAdvertisement(scheme="shm"),
                SchemeAdvertisement(
                    scheme="tcp",
                    kinds=("rdma:InfiniBand",),
                    addresses=(AdvertisedAddress(address=Address("fd77::1", 4712)),),
                    extra=b"extra",
                ),
            ),
        ).to_bytes()
    ],
    "frames": [
        *(b"\x03" + encode(frame) for frame in FRAMES),
        b"\xff" + b"".join(map(encode, FRAMES)),
        b"\x05" + encode(Data(op=1, nbytes=20)) + bytes(20) + encode(Clear(op=1)),
    ],
    "owner": [
        bytes([parts]) + conversations.HELLO + asked
        for parts in (0x03, 0x0F, 0x8F, 0x25)
        for asked in (
            encode(PULL) + encode(Done(op=1, note=b"note")) + encode(Ping(op=2)),
            encode(PULL._replace(wants_done=False)) + encode(PULL._replace(op=2)),
            encode(PULL._replace(epoch=6)) + encode(PULL._replace(ranges=(Range(63, 2),))),
            encode(PUSH) + encode(Data(op=1, nbytes=60)) + bytes(60) + encode(Data(op=1, nbytes=2)),
            encode(PUSH)
            + encode(Data(op=1, nbytes=64))
            + bytes(64)
            + encode(Data(op=1, nbytes=46)),
        )
    ],
    "reader_pulls": conversations.READER_SEEDS,
    "reader_pushes": conversations.READER_SEEDS,
    "ucx_owner": ucx_conversations.OWNER_SEEDS,
    "ucx_reader_pulls": ucx_conversations.READER_SEEDS,
    "ucx_reader_pushes": ucx_conversations.READER_SEEDS,
    "ucx_words": ucx_conversations.WORDS_SEEDS,
    "ucx_reach": [ucx_conversations.SEALED.extra],
    "grants": [bytes([0, 0, 64, 64, 64, 10, 20]), bytes([1, 0, 10, 10, 10, 5, 10])],
}
