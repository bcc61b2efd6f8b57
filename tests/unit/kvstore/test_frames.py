"""Frames: any cut of the stream gives the same messages, and no length is believed unchecked."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from snowskin.kvstore.errors import ProtocolViolation
from snowskin.kvstore.frames import HEADER_NBYTES, MAX_FRAME_NBYTES, FrameReader, frame

MESSAGES = st.lists(st.binary(min_size=1, max_size=300), max_size=6)


@given(MESSAGES, st.lists(st.integers(0, 2000), max_size=10))
def test_messages_do_not_depend_on_how_the_stream_is_cut(messages, cuts):
    stream = b"".join(frame(message) for message in messages)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    reader = FrameReader()
    found = [m for a, b in itertools.pairwise(edges) for m in reader.feed(stream[a:b])]
    assert found == messages
    assert reader.num_pending == 0


@given(MESSAGES.filter(bool))
def test_stream_fed_byte_by_byte_gives_the_same(messages):
    stream = b"".join(frame(message) for message in messages)
    reader = FrameReader()
    found = [message for byte in stream for message in reader.feed(bytes([byte]))]
    assert found == messages


def test_unfinished_message_is_kept():
    reader = FrameReader()
    data = frame(b"message")
    assert list(reader.feed(data[:-1])) == []
    assert reader.num_pending == len(data) - 1
    assert list(reader.feed(data[-1:])) == [b"message"]


def test_longest_message_passes_and_a_longer_one_is_not_sent():
    longest = bytes(MAX_FRAME_NBYTES)
    assert list(FrameReader().feed(frame(longest))) == [longest]
    with pytest.raises(ProtocolViolation, match=f"{MAX_FRAME_NBYTES + 1} bytes"):
        frame(longest + b"x")


@pytest.mark.parametrize("length", [0, MAX_FRAME_NBYTES + 1, 0xFFFF_FFFF])
def test_length_that_is_forbidden_ends_the_stream_after_what_came_before(length):
    messages = FrameReader().feed(frame(b"good") + length.to_bytes(HEADER_NBYTES, "little"))
    assert next(messages) == b"good"
    with pytest.raises(ProtocolViolation, match=f"frame of {length} bytes"):
        next(messages)


def test_announced_length_takes_no_memory_before_its_bytes_come():
    reader = FrameReader()
    list(reader.feed(MAX_FRAME_NBYTES.to_bytes(HEADER_NBYTES, "little")))
    assert reader.num_pending == HEADER_NBYTES
