"""Advertisements come back as they were, and survive any input."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from snowskin.transport.addresses import Address
from snowskin.transport.advertisement import (
    MAX_ADVERTISEMENT_NBYTES,
    AdvertisedAddress,
    Advertisement,
    HostIdentity,
    SchemeAdvertisement,
)
from snowskin.transport.errors import BadDescriptor

uint64s = st.integers(0, 2**64 - 1)
ids = st.binary(min_size=16, max_size=16)
words = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=20)
addresses = st.builds(
    AdvertisedAddress,
    address=st.builds(Address, words, st.integers(1, 65535)),
    speed_bytes_per_s=uint64s,
    is_preferred=st.booleans(),
)
schemes = st.builds(
    SchemeAdvertisement,
    scheme=words,
    kinds=st.lists(words, max_size=3).map(tuple),
    addresses=st.lists(addresses, max_size=3).map(tuple),
    extra=st.binary(max_size=40),
)
advertisements = st.builds(
    Advertisement,
    identity=st.builds(
        HostIdentity, host=ids, process=ids, pid_namespace=uint64s, net_namespace=uint64s
    ),
    schemes=st.lists(schemes, max_size=4, unique_by=lambda scheme: scheme.scheme).map(tuple),
)
VALID = Advertisement(
    identity=HostIdentity(host=b"h" * 16, process=b"p" * 16, pid_namespace=7, net_namespace=8),
    schemes=(
        SchemeAdvertisement(scheme="shm"),
        SchemeAdvertisement(
            scheme="tcp",
            addresses=(
                AdvertisedAddress(address=Address("10.0.0.7", 7200), speed_bytes_per_s=25 * 10**9),
                AdvertisedAddress(address=Address("fd00::7", 7200), is_preferred=False),
            ),
        ),
        SchemeAdvertisement(scheme="ucx", kinds=("rdma:InfiniBand",), extra=b"worker address"),
    ),
)
# What older readers must still read; see the layout in the module.
GOLDEN = bytes.fromhex(
    "534e5441 01 68686868686868686868686868686868 70707070707070707070707070707070"
    "0000000000000007 0000000000000008 03"
    "03 73686d 00 00 00000000"
    "03 746370 00 02 1c20 01 00000005d21dba00 08 31302e302e302e37"
    "1c20 00 0000000000000000 07 666430303a3a37 00000000"
    "03 756378 01 0f 72646d613a496e66696e6942616e64 00 0000000e 776f726b65722061646472657373"
)


def test_layout_is_the_one_that_is_written_down() -> None:
    assert VALID.to_bytes() == GOLDEN
    assert Advertisement.from_bytes(GOLDEN) == VALID


@given(advertisements)
def test_advertisement_comes_back_as_it_was(advertisement: Advertisement) -> None:
    data = advertisement.to_bytes()
    assert len(data) <= MAX_ADVERTISEMENT_NBYTES
    assert Advertisement.from_bytes(data) == advertisement


@given(
    st.one_of(st.binary(max_size=120), st.binary(max_size=80).map(lambda tail: GOLDEN[:54] + tail))
)
def test_any_bytes_are_an_advertisement_or_refused(data: bytes) -> None:
    try:
        advertisement = Advertisement.from_bytes(data)
    except BadDescriptor:
        return
    assert advertisement.to_bytes() == data


@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255)), max_size=4),
    end=st.integers(0, len(GOLDEN)),
    behind=st.binary(max_size=3),
)
@example(edits=[], end=len(GOLDEN), behind=b"x")
def test_damaged_advertisement_is_another_or_refused(
    edits: list[tuple[int, int]], end: int, behind: bytes
) -> None:
    data = bytearray(GOLDEN)
    for at, value in edits:
        data[at] = value
    damaged = bytes(data[:end]) + behind
    try:
        advertisement = Advertisement.from_bytes(damaged)
    except BadDescriptor:
        return
    assert advertisement.to_bytes() == damaged


def test_every_beginning_is_refused() -> None:
    for end in range(len(GOLDEN)):
        with pytest.raises(BadDescriptor):
            Advertisement.from_bytes(GOLDEN[:end])


@pytest.mark.parametrize(
    "schemes",
    [
        (SchemeAdvertisement(scheme="tcp"), SchemeAdvertisement(scheme="tcp")),
        (SchemeAdvertisement(scheme=""),),
        (SchemeAdvertisement(scheme="tcp", kinds=("ä",)),),
        (SchemeAdvertisement(scheme="tcp", kinds=("k",) * 17),),
        (SchemeAdvertisement(scheme="tcp", extra=bytes(MAX_ADVERTISEMENT_NBYTES)),),
        (
            SchemeAdvertisement(
                scheme="tcp", addresses=(AdvertisedAddress(address=Address("a", 0)),)
            ),
        ),
        tuple(SchemeAdvertisement(scheme=f"s{number}") for number in range(17)),
    ],
)
def test_what_could_not_be_read_is_not_written(schemes: tuple[SchemeAdvertisement, ...]) -> None:
    with pytest.raises(BadDescriptor):
        Advertisement(schemes=schemes).to_bytes()


def test_unknown_hosts_are_not_the_same() -> None:
    unknown = HostIdentity()
    assert not unknown.same_host(unknown)
    assert not unknown.same_process(unknown)
    one = HostIdentity(host=b"h" * 16, pid_namespace=4, net_namespace=5)
    assert one.same_host(one)
    assert one.same_pids(one)
    assert not one.same_pids(HostIdentity(host=b"i" * 16, pid_namespace=4))
    assert not one.same_network(HostIdentity(host=b"h" * 16, net_namespace=6))
    assert not HostIdentity(host=b"h" * 16).same_pids(HostIdentity(host=b"h" * 16))
