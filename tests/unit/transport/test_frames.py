"""The data plane's frames: the examples of tests/vectors/data_plane.json, and what `docs/wire.md` says of them."""

from __future__ import annotations

import json
import struct

import pytest

from snowskin.transport.addresses import Reachability
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import BadFrame, PeerBusy
from snowskin.transport.frames import (
    HEAD_NBYTES,
    Ask,
    Data,
    Fail,
    Hello,
    Kind,
    Parser,
    Ping,
    decode_body,
    decode_head,
    encode,
    fail_of,
)
from tests.support import data_plane_goldens as goldens

VECTORS = json.loads(goldens.PATH.read_text(encoding="utf-8"))


def names(entries):
    return [entry["name"] for entry in entries]


@pytest.mark.parametrize("entry", VECTORS["frames"], ids=names(VECTORS["frames"]))
def test_golden_bytes_mean_what_stands_beside_them(entry):
    data = bytes.fromhex(entry["hex"])
    frame = goldens.frame_of(data)
    assert decode_head(data).kind.name == entry["kind"]
    assert goldens.fields_of(frame) == entry["fields"]
    assert encode(frame) == data


@pytest.mark.parametrize("entry", VECTORS["refused"], ids=names(VECTORS["refused"]))
def test_golden_nonsense_is_refused(entry):
    with pytest.raises(BadFrame):
        goldens.frame_of(bytes.fromhex(entry["hex"]))


def test_every_kind_has_an_example():
    assert {entry["kind"] for entry in VECTORS["frames"]} == set(Kind.__members__)


def test_the_file_is_what_the_code_says():
    assert goldens.PATH.read_text(encoding="utf-8") == goldens.as_text(), (
        "python -m tests.support.data_plane_goldens --write"
    )


def test_what_older_peers_could_not_read_is_noticed():
    changed = json.loads(goldens.as_text())
    assert goldens.still_reads(changed, goldens.goldens())
    changed["frames"][0]["fields"]["heartbeat_ms"] += 1
    assert not goldens.still_reads(changed, goldens.goldens())


def test_golden_addresses_and_descriptors_mean_what_stands_beside_them():
    for kind, part in ((Reachability, "addresses"), (RegionDescriptor, "descriptors")):
        for entry in VECTORS[part]:
            record = kind.from_bytes(bytes.fromhex(entry["hex"]))
            assert goldens.fields_of(record) == entry["fields"]
            assert record.to_bytes().hex() == entry["hex"]


def test_a_pull_is_laid_out_as_the_specification_says():
    spelled = struct.pack(">BBHIQ", 3, 0, 0, 17, 44 + 16) + struct.pack(
        ">16sQQIBBHIQQ", b"c" * 16, 5, 6, 1234, 1, 1, 0, 1, 4096, 99
    )
    ask = goldens.frame_of(spelled)
    assert isinstance(ask, Ask)
    assert (ask.op, ask.epoch, ask.generation, ask.timeout_ms) == (17, 5, 6, 1234)
    assert (ask.traffic, ask.wants_done, ask.ranges) == (1, True, ((4096, 99),))


def test_a_frame_is_refused_by_its_head_before_its_body_came():
    parser = Parser()
    parser.feed(struct.pack(">BBHIQ", Kind.PULL, 0, 0, 1, 1 << 20))
    with pytest.raises(BadFrame, match="1048576"):
        parser.next_frame()


def test_a_parser_says_how_much_it_wants():
    parser, data = Parser(), encode(goldens.FRAMES["done with a note"])
    assert parser.num_wanted == HEAD_NBYTES
    parser.feed(data[:10])
    assert parser.next_frame() is None
    assert parser.num_wanted == HEAD_NBYTES - 10
    parser.feed(data[10:-1])
    assert parser.next_frame() is None
    assert parser.num_wanted == 1


def test_payload_that_came_with_its_head_is_handed_out_apart():
    parser = Parser()
    parser.feed(encode(Data(op=1, nbytes=5)) + b"12345" + encode(Ping(op=2)))
    assert parser.next_frame() == Data(op=1, nbytes=5)
    assert parser.take_payload(5) == b"12345"
    assert parser.next_frame() == Ping(op=2)
    assert parser.num_buffered == 0


def test_an_error_crosses_with_its_reason_and_when_to_retry():
    error = PeerBusy("full " * 500, retry_after_s=0.25)
    fail = goldens.frame_of(encode(fail_of(4, error)))
    assert isinstance(fail, Fail)
    assert (fail.op, fail.reason, fail.retry_after_ms) == (4, "PEER_BUSY", 250)
    assert len(fail.message) == 1024


def test_texts_are_cut_where_a_character_ends():
    hello = Hello(min_version=1, max_version=1, heartbeat_ms=0, name="x" + "ä" * 100)
    assert goldens.frame_of(encode(hello)).name == "x" + "ä" * 63


def test_a_name_cannot_write_into_the_owners_log():
    data = bytearray(encode(goldens.FRAMES["hello"]))
    data[-1] = ord("\n")
    assert goldens.frame_of(bytes(data)).name.endswith("-?")


def test_a_body_that_is_not_all_there_is_refused():
    data = encode(goldens.FRAMES["pull"])
    for nbytes in range(len(data) - HEAD_NBYTES):
        with pytest.raises(BadFrame):
            decode_body(decode_head(data), data[HEAD_NBYTES : HEAD_NBYTES + nbytes])
