"""Frames and addresses: what is said is understood, however the stream is cut."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
from hypothesis import given

from snowskin.transport.addresses import MAX_ADDRESSES, Address, Reachability
from snowskin.transport.frames import (
    MAX_DATA_NBYTES,
    MAX_TIMEOUT_MS,
    Ask,
    Clear,
    Data,
    Done,
    Fail,
    Hello,
    Parser,
    Ping,
    Pong,
    Welcome,
    encode,
)
from snowskin.transport.words import MAX_NOTE_NBYTES, Range

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
OP = st.integers(1, (1 << 32) - 1)
NOTE = st.binary(max_size=MAX_NOTE_NBYTES)
RANGES = st.lists(st.builds(Range, U64, U64), min_size=1, max_size=20).map(tuple)
PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=100)


@st.composite
def asks(draw):
    is_push = draw(st.booleans())
    return Ask(
        is_push=is_push,
        op=draw(OP),
        capability=draw(st.binary(min_size=16, max_size=16)),
        epoch=draw(U64),
        generation=draw(U64),
        timeout_ms=draw(st.integers(1, MAX_TIMEOUT_MS)),
        traffic=draw(st.integers(0, 2)),
        wants_done=draw(st.booleans()),
        note=draw(NOTE) if is_push else b"",
        ranges=draw(RANGES),
    )


@st.composite
def hellos(draw):
    versions = sorted(draw(st.tuples(U16, U16)))
    return Hello(
        min_version=versions[0],
        max_version=versions[1],
        heartbeat_ms=draw(U32),
        name=draw(PLAIN),
    )


FRAMES = st.one_of(
    asks(),
    hellos(),
    st.builds(
        Welcome,
        version=U16,
        epoch=U64,
        max_ranges=st.integers(1, 4096),
        max_data_nbytes=st.integers(1, MAX_DATA_NBYTES),
        idle_timeout_ms=U32,
        ack_timeout_ms=U32,
    ),
    st.builds(Clear, op=U32),
    st.builds(Data, op=U32, nbytes=st.integers(1, 100)),
    st.builds(Done, op=U32, note=NOTE),
    st.builds(
        Fail,
        op=U32,
        reason=st.from_regex(r"[A-Z]+(_[A-Z]+)*", fullmatch=True).filter(
            lambda text: len(text) < 65
        ),
        retry_after_ms=U32,
        message=PLAIN,
    ),
    st.builds(Ping, op=U32),
    st.builds(Pong, op=U32),
)


@given(frames=st.lists(FRAMES, max_size=5), cuts=st.lists(st.integers(0, 2000), max_size=20))
def test_frames_come_out_of_a_stream_as_they_went_in_however_it_is_cut(frames, cuts):
    parts = []
    for frame in frames:
        payload = b"p" * frame.nbytes if isinstance(frame, Data) else b""
        parts.append(encode(frame) + payload)
    stream = b"".join(parts)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    parser, heard, payload_left = Parser(), [], 0
    for start, end in itertools.pairwise(edges):
        parser.feed(stream[start:end])
        while True:
            if payload_left:
                payload = parser.take_payload(payload_left)
                assert payload == b"p" * len(payload)
                payload_left -= len(payload)
                if payload_left:
                    break
            frame = parser.next_frame()
            if frame is None:
                assert parser.num_wanted
                break
            heard.append(frame)
            payload_left = frame.nbytes if isinstance(frame, Data) else 0
    assert heard == frames
    assert not parser.num_buffered
    assert not payload_left


HOSTS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=255)
ADDRESSES = st.lists(
    st.builds(Address, HOSTS, st.integers(1, (1 << 16) - 1)), min_size=1, max_size=MAX_ADDRESSES
)


@given(addresses=ADDRESSES, tls=st.booleans())
def test_addresses_come_back_as_they_were_told(addresses, tls):
    told = Reachability(addresses=tuple(addresses), tls=tls)
    assert Reachability.from_bytes(told.to_bytes()) == told


@given(
    address=st.builds(
        Address,
        st.one_of(
            st.ip_addresses(v=4).map(str),
            st.ip_addresses(v=6).map(str),
            st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True),
        ),
        st.integers(0, (1 << 16) - 1),
    )
)
def test_an_address_is_read_as_it_is_written(address):
    assert Address.parse(str(address)) == address
