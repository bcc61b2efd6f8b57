"""Where an owner can be reached: what cannot be told or does not parse is refused."""

from __future__ import annotations

import pytest

from snowskin.transport.addresses import MAX_ADDRESSES, Address, Reachability
from snowskin.transport.errors import BadDescriptor

HERE = Address("192.0.2.1", 4711)
TOLD = Reachability(addresses=(HERE,)).to_bytes()


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:x", "host:65536", "::1:80", "host:-1", "host:²"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(BadDescriptor):
        Address.parse(text)


def test_ipv6_addresses_stand_in_brackets():
    assert Address.parse("[2001:db8::1]:80") == Address("2001:db8::1", 80)
    assert str(Address("::1", 80)) == "[::1]:80"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        TOLD[:-1],
        TOLD + b"x",
        b"\x02" + TOLD[1:],  # version
        TOLD[:1] + b"\x02" + TOLD[2:],  # flag
        TOLD[:2] + b"\x00" + TOLD[3:],  # none
        TOLD[:2] + b"\x11" + TOLD[3:],  # seventeen
        TOLD[:3] + b"\x00\x00" + TOLD[5:],  # port
        TOLD[:5] + b"\x00",  # empty host
        TOLD[:-1] + b"\n",
        TOLD[:-1] + b"\xff",
    ],
)
def test_bytes_that_are_no_addresses_are_refused(data):
    with pytest.raises(BadDescriptor):
        Reachability.from_bytes(data)


@pytest.mark.parametrize(
    "addresses",
    [
        (),
        (HERE,) * (MAX_ADDRESSES + 1),
        (Address("", 1),),
        (Address("h" * 256, 1),),
        (Address("hü", 1),),
        (Address("h", 0),),
        (Address("h", 1 << 16),),
    ],
)
def test_what_cannot_be_told_is_refused(addresses):
    with pytest.raises(BadDescriptor):
        Reachability(addresses=addresses).to_bytes()
