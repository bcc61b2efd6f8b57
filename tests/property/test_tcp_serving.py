"""Pulls and pushes against plain slices: any ranges, any size of frame, any part of it at once."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from snowskin.transport.frames import HEAD_NBYTES, Ask, Data, Kind, decode_head, encode
from snowskin.transport.tcp.serving import ServedTransfer

MEMORY = bytes(index * 7 % 251 for index in range(300))


@st.composite
def ranges(draw):
    offset = draw(st.integers(0, len(MEMORY) - 1))
    return offset, draw(st.integers(1, len(MEMORY) - offset))


RANGES = st.lists(ranges(), min_size=1, max_size=8)
CHUNKS = st.integers(1, 400)
TAKEN = st.lists(st.integers(1, 500), min_size=1, max_size=20)


def transfer_of(asked, chunk_nbytes, *, is_push):
    ask = Ask(is_push, 9, b"c" * 16, 0, 0, 1000, 0, False, b"", tuple(asked))
    nbytes = sum(size for _, size in asked)
    return ServedTransfer(ask, None, nbytes, chunk_nbytes=chunk_nbytes, now_s=0.0)  # type: ignore[arg-type]


@given(asked=RANGES, chunk_nbytes=CHUNKS, taken=TAKEN)
def test_a_pull_is_its_ranges_however_much_the_stream_takes(asked, chunk_nbytes, taken):
    transfer = transfer_of(asked, chunk_nbytes, is_push=False)
    stream, is_last, turn = b"", False, 0
    while not is_last:
        offered = b"".join(transfer.outgoing(memoryview(MEMORY)))
        part = offered[: taken[turn % len(taken)]]
        stream, is_last, turn = stream + part, transfer.sent(len(part)), turn + 1
    payload = b""
    while stream:
        head = decode_head(stream)
        assert (head.kind, head.op) == (Kind.DATA, 9)
        assert head.nbytes <= chunk_nbytes
        payload += stream[HEAD_NBYTES : HEAD_NBYTES + head.nbytes]
        stream = stream[HEAD_NBYTES + head.nbytes :]
    assert payload == b"".join(MEMORY[at : at + size] for at, size in asked)


@given(asked=RANGES, chunk_nbytes=CHUNKS, frames=TAKEN, taken=TAKEN)
def test_a_push_lands_in_its_ranges_however_it_comes(asked, chunk_nbytes, frames, taken):
    transfer = transfer_of(asked, chunk_nbytes, is_push=True)
    payload = bytes(index % 256 for index in range(transfer.nbytes))
    stream, at, turn = b"", 0, 0
    while at < len(payload):
        size = min(frames[turn % len(frames)], chunk_nbytes, len(payload) - at)
        stream += encode(Data(op=9, nbytes=size)) + payload[at : at + size]
        at, turn = at + size, turn + 1
    expected, at = bytearray(MEMORY), 0
    for offset, size in asked:
        expected[offset : offset + size] = payload[at : at + size]
        at += size
    memory, is_last, turn = bytearray(MEMORY), False, 0
    while not is_last:
        left = min(taken[turn % len(taken)], len(stream))
        came = 0
        for part in transfer.incoming(memoryview(memory)):
            size = min(len(part), left - came)
            part[:size] = stream[came : came + size]
            came += size
        stream, is_last, turn = stream[came:], transfer.landed(came), turn + 1
    assert memory == expected
    assert not stream
