"""What a hostile peer can say to pure code, as functions of bytes: `python -m tests.fuzz` and hypothesis feed them.

Rules kept here: a target raises nothing for any bytes, but where there is a bug; what may be said is refused by a
`SnowskinError`, and everything else is a bug; what was taken can be said again and is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import BadDescriptor

if TYPE_CHECKING:
    from collections.abc import Callable


def descriptor(data: bytes) -> None:
    """Whatever carries descriptors may bring anything."""
    try:
        found = RegionDescriptor.from_bytes(data)
    except BadDescriptor:
        return
    assert found.to_bytes() == data


TARGETS: dict[str, Callable[[bytes], None]] = {"descriptor": descriptor}

# What the fuzzer begins with: well-formed, so that it comes past the first check.
SEEDS: dict[str, list[bytes]] = {
    "descriptor": [
        RegionDescriptor(
            scheme="tcp", capability=bytes(16), nbytes=4096, writable=True, extra=b"\x01\x02"
        ).to_bytes()
    ]
}
