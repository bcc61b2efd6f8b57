"""Pulls and pushes against plain slices: any ranges, any size of frame, any part of it at once, copied or lent."""

from __future__ import annotations

from types import SimpleNamespace

import hypothesis.strategies as st
from hypothesis import given

from snowskin.transport.frames import HEAD_NBYTES, Ask, Data, Kind, decode_head, encode
from snowskin.transport.tcp.served_transfer import ServedTransfer

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


class Pages:
    """Lends whole pages of `unit_nbytes`."""

    def __init__(self, unit_nbytes):
        self.unit_nbytes = unit_nbytes

    def lendable(self, offset, nbytes):
        start = -(-offset // self.unit_nbytes) * self.unit_nbytes
        return start, max(0, (offset + nbytes) // self.unit_nbytes * self.unit_nbytes - start)

    def lend(self, ranges):
        assert all(at % self.unit_nbytes == size % self.unit_nbytes == 0 for at, size in ranges)
        return SimpleNamespace(ranges=tuple(ranges))


@given(asked=RANGES, chunk_nbytes=CHUNKS, taken=TAKEN, unit_nbytes=st.integers(1, 64))
def test_what_is_lent_and_what_is_copied_are_the_ranges_together(
    asked, chunk_nbytes, taken, unit_nbytes
):
    transfer = transfer_of(asked, chunk_nbytes, is_push=False)
    pages = Pages(unit_nbytes)
    transfer.borrow(pages, least_nbytes=1)
    whole_nbytes = sum(pages.lendable(*each)[1] for each in asked)
    assert (transfer.loan is not None) is (whole_nbytes > 0)
    stream, is_last, turn, lent_nbytes = b"", False, 0, 0
    while not is_last:
        copied = b"".join(transfer.outgoing(memoryview(MEMORY)))
        at, size = transfer.lent(is_alone=turn % 2 == 0)
        assert size == 0 or any(
            start <= at < at + size <= start + whole
            for start, whole in (pages.lendable(*each) for each in asked)
        )
        part = (copied + MEMORY[at : at + size])[: taken[turn % len(taken)]]
        lent_nbytes += max(0, len(part) - len(copied))
        stream, is_last, turn = stream + part, transfer.sent(len(part)), turn + 1
    payload = b""
    while stream:
        head = decode_head(stream)
        assert 0 < head.nbytes <= chunk_nbytes
        payload += stream[HEAD_NBYTES : HEAD_NBYTES + head.nbytes]
        stream = stream[HEAD_NBYTES + head.nbytes :]
    assert payload == b"".join(MEMORY[at : at + size] for at, size in asked)
    assert lent_nbytes == whole_nbytes


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
