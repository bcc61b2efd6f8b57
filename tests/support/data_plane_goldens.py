"""Golden bytes of the data plane: every frame, address and descriptor as fields and as hex, and bytes to be refused.

Rules kept here: an entry that is in the file is never changed in a way that an older peer could not read; whoever means
to do so says `--break-wire`, raises the version and writes a line in the changelog.

    python -m tests.support.data_plane_goldens --write
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import struct
import sys
from pathlib import Path

from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.frames import (
    HEAD_NBYTES,
    MAX_DATA_NBYTES,
    Ask,
    Clear,
    Data,
    Done,
    Fail,
    Frame,
    Hello,
    Ping,
    Pong,
    Welcome,
    decode_body,
    decode_head,
    encode,
)
from snowskin.transport.words import Range

PATH = Path(__file__).resolve().parent.parent / "vectors" / "data_plane.json"

EPOCH, GENERATION = 0x1_2345_6789, 7
CAPABILITY = bytes(range(16))
PULL = Ask(
    is_push=False,
    op=1,
    capability=CAPABILITY,
    epoch=EPOCH,
    generation=GENERATION,
    timeout_ms=5000,
    traffic=0,
    wants_done=False,
    note=b"",
    ranges=(Range(4096, 65_536),),
)
REACHABILITY = Reachability(
    addresses=(Address("192.0.2.7", 4711), Address("2001:db8::7", 4711), Address("node-7", 1)),
    tls=True,
)
FRAMES: dict[str, Frame] = {
    "hello": Hello(min_version=1, max_version=2, heartbeat_ms=1500, name="décode-3"),
    "hello without a name": Hello(min_version=1, max_version=1, heartbeat_ms=0, name=""),
    "welcome": Welcome(
        version=1,
        epoch=EPOCH,
        max_ranges=4096,
        max_data_nbytes=1 << 20,
        idle_timeout_ms=5000,
        ack_timeout_ms=3000,
    ),
    "pull": PULL,
    "pull of three ranges, a DONE will follow": PULL._replace(
        op=2,
        traffic=1,
        wants_done=True,
        ranges=(Range(0, 1), Range(1 << 40, 1 << 20), Range(5, 16)),
    ),
    "push": PULL._replace(op=3, is_push=True, traffic=2),
    "push with a note": PULL._replace(op=4, is_push=True, note=b"\x00note\xff"),
    "clear": Clear(op=3),
    "data": Data(op=1, nbytes=65_536),
    "largest data": Data(op=0xFFFFFFFF, nbytes=MAX_DATA_NBYTES),
    "done": Done(op=3, note=b""),
    "done with a note": Done(op=2, note=b"thanks"),
    "fail of a transfer": Fail(
        op=1, reason="GRANT_REFUSED", retry_after_ms=0, message="no such grant"
    ),
    "fail of a connection": Fail(op=0, reason="PEER_BUSY", retry_after_ms=1000, message="später"),
    "ping": Ping(op=9),
    "pong": Pong(op=9),
}
DESCRIPTOR = RegionDescriptor(
    scheme="tcp",
    capability=CAPABILITY,
    nbytes=1 << 30,
    epoch=EPOCH,
    generation=GENERATION,
    expires_in_s=2.5,
    writable=True,
    extra=REACHABILITY.to_bytes(),
)


def plain(value):
    """A field as JSON has it; bytes are hex."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def fields_of(record):
    """The fields of a frame or of a descriptor, by name."""
    if isinstance(record, Ask):
        ranges = [{"offset": offset, "nbytes": nbytes} for offset, nbytes in record.ranges]
        return {**plain(record), "ranges": ranges}
    if dataclasses.is_dataclass(record):
        return {
            field.name: plain(getattr(record, field.name)) for field in dataclasses.fields(record)
        }
    return {
        name: plain(getattr(record, name))
        for name in RegionDescriptor.__slots__
        if not name.startswith("_")
    }


def damaged():
    """Frames that must be refused, and why."""
    pull, push = encode(PULL), encode(FRAMES["push with a note"])
    hello, fail = encode(FRAMES["hello"]), encode(FRAMES["fail of a transfer"])

    def put(data, at, code, value):
        changed = bytearray(data)
        struct.pack_into(code, changed, at, value)
        return bytes(changed)

    def grown(data, more):
        return put(data, 8, ">Q", len(data) - HEAD_NBYTES + len(more)) + more

    first = HEAD_NBYTES
    return {
        "kind 0": put(pull, 0, ">B", 0),
        "kind 11": put(pull, 0, ">B", 11),
        "a flag in the head": put(pull, 1, ">B", 1),
        "the zero in the head is one": put(pull, 2, ">H", 1),
        "op 0": put(pull, 4, ">I", 0),
        "a body longer than any": put(pull, 8, ">Q", 1 << 40),
        "a body of one byte more": grown(pull, b"\x00"),
        "a body without its last range": put(pull[:-16], 8, ">Q", len(pull) - 16 - first),
        "no timeout": put(pull, first + 32, ">I", 0),
        "a timeout of more than an hour": put(pull, first + 32, ">I", 3_600_001),
        "traffic class 3": put(pull, first + 36, ">B", 3),
        "a flag of the request": put(pull, first + 37, ">B", 2),
        "a pull with a note": put(push, 0, ">B", 3),
        "no range": put(pull[:-16], 8, ">Q", len(pull) - 16 - first)[: first + 40] + bytes(4),
        "more ranges than come": put(pull, first + 40, ">I", 2),
        "another magic": put(hello, first, ">B", ord("S")),
        "versions in disorder": put(hello, first + 8, ">H", 3),
        "a name shorter than said": put(hello, first + 16, ">H", 3),
        "data of nothing": encode(Data(op=1, nbytes=0)),
        "data of more than 16 MiB": encode(Data(op=1, nbytes=MAX_DATA_NBYTES + 1)),
        "a ping with a body": grown(encode(Ping(op=9)), b"x"),
        "a note of 257 bytes": encode(Done(op=1, note=bytes(257))),
        "a welcome of no range": put(encode(FRAMES["welcome"]), first + 10, ">I", 0),
        "a fail without a reason": encode(
            Fail(op=1, reason="", retry_after_ms=0, message="no reason")
        ),
        "a fail with a reason of 65 bytes": put(
            put(grown(fail[: first + 7], b"R" * 65), first + 4, ">B", 65), first + 5, ">H", 0
        ),
        "a push with a note of 257 bytes": encode(PULL._replace(is_push=True, note=bytes(257))),
        "a welcome of one byte more": grown(encode(FRAMES["welcome"]), b"x"),
    }


def goldens():
    """All of the file."""
    return {
        "about": "The frames of docs/wire.md. Integers are decimal, bytes are hex; of data the head "
        "alone. What is refused is BAD_FRAME.",
        "frames": [
            {
                "name": name,
                "kind": decode_head(encode(frame)).kind.name,
                "fields": fields_of(frame),
                "hex": encode(frame).hex(),
            }
            for name, frame in FRAMES.items()
        ],
        "refused": [{"name": name, "hex": data.hex()} for name, data in damaged().items()],
        "addresses": [{"fields": fields_of(REACHABILITY), "hex": REACHABILITY.to_bytes().hex()}],
        "descriptors": [{"fields": fields_of(DESCRIPTOR), "hex": DESCRIPTOR.to_bytes().hex()}],
    }


def frame_of(data: bytes):
    """The one frame that the bytes are."""
    head = decode_head(data)
    return decode_body(head, data[HEAD_NBYTES:])


def still_reads(old, new) -> bool:
    """Whether all frames of the past mean today what was written beside them."""
    known = {entry["hex"]: entry["fields"] for entry in new["frames"]}
    for entry in old["frames"]:
        fields = known.get(entry["hex"]) or fields_of(frame_of(bytes.fromhex(entry["hex"])))
        if any(fields.get(name) != value for name, value in entry["fields"].items()):
            return False
    return all(old[part] == new[part][: len(old[part])] for part in ("addresses", "descriptors"))


def as_text() -> str:
    """What the file holds."""
    return json.dumps(goldens(), indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Writes the file; 1 where that would change what older peers read."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--write", action="store_true", required=True)
    parser.add_argument("--break-wire", action="store_true")
    options = parser.parse_args(arguments)
    if PATH.exists() and not options.break_wire:
        old = json.loads(PATH.read_text(encoding="utf-8"))
        if not still_reads(old, goldens()):
            print("older peers could not read this; the file was left alone")
            return 1
    PATH.write_text(as_text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
