"""Golden messages: every message of the wire with every field set, as bytes and as JSON, kept in files.

Rules kept here: a field's value follows from its name and number alone, so the bytes are the same on every machine; a
message with a `oneof` has one file a case. A file that exists is never changed in a way that an older peer could not
read: that needs `--break-wire`, and a line in the changelog.

    python -m tests.support.goldens --write        # adds what is missing, extends what has grown
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from google.protobuf import json_format, message_factory
from google.protobuf.message import DecodeError

from snowskin.v1 import admin_pb2, common_pb2, conductor_pb2, door_pb2, engine_pb2, store_pb2

FOLDER = Path(__file__).resolve().parent.parent / "vectors" / "wire"
MODULES = (common_pb2, store_pb2, door_pb2, engine_pb2, conductor_pb2, admin_pb2)


def message_kinds():
    """Every message class of the wire by name; map entries are no messages of their own."""
    return {
        name: message_factory.GetMessageClass(descriptor)
        for module in MODULES
        for name, descriptor in module.DESCRIPTOR.message_types_by_name.items()
    }


def cases_of(descriptor):
    """Names of the cases of the message's own oneof, or one nameless case; `optional` is no choice."""
    choices = [oneof for oneof in descriptor.oneofs if not oneof.name.startswith("_")]
    assert len(choices) <= 1, f"{descriptor.name} has two oneofs: make a case of each pair"
    return [field.name for field in choices[0].fields] if choices else [""]


def fill(message, case=""):
    """Sets every field; of a oneof the named case, or the last one."""
    cases = cases_of(message.DESCRIPTOR)
    case = case or cases[-1]
    for field in message.DESCRIPTOR.fields:
        if cases != [""] and field.name in cases and field.name != case:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for number in (1, 2):
                getattr(message, field.name)[f"{field.name}_{number}"] = (
                    1000 * field.number + number
                )
        elif field.is_repeated:
            for number in (1, 2):
                add(getattr(message, field.name), field, number)
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            fill(getattr(message, field.name))
        else:
            setattr(message, field.name, value_of(field, 1))
    return message


def add(container, field, number):
    """One element of a repeated field."""
    if field.message_type is not None:
        fill(container.add())
    else:
        container.append(value_of(field, number))


def value_of(field, number):
    """A value that no other field of the message has."""
    match field.cpp_type:
        case field.CPPTYPE_STRING if field.type == field.TYPE_BYTES:
            return f"{field.name}-{number}".encode()
        case field.CPPTYPE_STRING:
            return f"{field.name}-{number}-ä"
        case field.CPPTYPE_BOOL:
            return True
        case field.CPPTYPE_DOUBLE:
            return field.number + number / 4
        case field.CPPTYPE_ENUM:
            return field.enum_type.values[-1].number
        case field.CPPTYPE_UINT64:
            return (1 << 40) + 100 * field.number + number
        case field.CPPTYPE_UINT32:
            return 100 * field.number + number
    raise AssertionError(f"{field.full_name}: say here what a {field.type} is filled with")


def goldens():
    """(file's stem, message) of all, as the protos are now."""
    for name, kind in sorted(message_kinds().items()):
        for case in cases_of(kind.DESCRIPTOR):
            yield f"{name}.{case}" if case else name, fill(kind(), case)


def as_json(message) -> str:
    """For people, and as the second opinion on the bytes."""
    values = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def as_bytes(message) -> bytes:
    """The same on every machine, maps included."""
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def still_reads(kind, data: bytes, text: str) -> bool:
    """Whether bytes of the past have today the meaning that was written beside them."""
    try:
        return as_json(kind.FromString(data)) == text
    except DecodeError:
        return False


def main(arguments: list[str]) -> int:
    """Writes the files; 1 where that would change what older peers read."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--write", action="store_true", required=True)
    parser.add_argument("--break-wire", action="store_true")
    options = parser.parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    broken = []
    for stem, message in goldens():
        data_path, text_path = FOLDER / f"{stem}.binpb", FOLDER / f"{stem}.json"
        if data_path.exists() and not options.break_wire:
            data, text = data_path.read_bytes(), text_path.read_text(encoding="utf-8")
            if not still_reads(type(message), data, text):
                broken.append(stem)
                continue
        data_path.write_bytes(as_bytes(message))
        text_path.write_text(as_json(message), encoding="utf-8")
    if broken:
        print(f"older peers could not read these any more, and they were left alone: {broken}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
