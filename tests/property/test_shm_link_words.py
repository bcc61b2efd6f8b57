"""Whatever comes over a link, its reader survives, and says a `TransportError` at most."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, event, example, given, settings

from snowskin.transport.errors import TransportError
from snowskin.transport.memory import Memfd
from snowskin.transport.shm import ShmTransport
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

NBYTES = 4096
packets = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=400),
        st.sampled_from([b"H", b"B", b"N" + bytes(9), b"N\x01" + bytes(8) + b"note"]),
    ),
    max_size=12,
)

renewals = st.builds(lambda seconds: struct.pack(">cd", b"R", seconds), st.floats())
SERIAL = 5
GOOD = struct.pack(">IQ", 0, SERIAL)  # slot and serial number


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("words", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, NBYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    os.pwrite(fd, SERIAL.to_bytes(8, sys.byteorder), 0)  # a page of grants, too
    yield fd
    os.close(fd)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packets)
def test_owner_survives_what_any_peer_says(
    memfd: int, caplog: pytest.LogCaptureFixture, said: list[bytes]
) -> None:
    owner = ShmTransport()
    region = owner.register(Memfd(fd=memfd))
    heard: list[bytes] = []
    try:
        descriptor = owner.describe(region, on_done=lambda done: heard.append(done.note))
        with socket.socket(fileno=owner.link(descriptor)) as end:
            with contextlib.suppress(OSError):
                for packet in said:
                    end.send(packet)
            end.shutdown(socket.SHUT_WR)
            eventually(lambda: not owner.is_attached(descriptor), 5.0)
        greeted = [i for i, packet in enumerate(said) if packet == b"H"][:1]
        assert len(heard) <= (len(said) - greeted[0] if greeted else 0)
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    finally:
        owner.close()
        region.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    welcome=st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda head, tail: b"L\x01" + head + tail,
            st.binary(min_size=32, max_size=32),
            st.one_of(st.just(GOOD), st.binary(min_size=12, max_size=12)),
        ),
    ),
    more=st.lists(st.one_of(st.binary(min_size=1, max_size=20), renewals), max_size=12),
    board=st.sampled_from(["the memory", "none", "a socket"]),
)
@example(welcome=b"L\x01" + bytes(32) + GOOD, more=[b"R" + bytes(8)], board="the memory")
def test_peer_survives_what_any_owner_says(
    memfd: int, welcome: bytes, more: list[bytes], board: str
) -> None:
    owner, reader = ShmTransport(), ShmTransport()
    region = owner.register(Memfd(fd=memfd))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        descriptor = owner.describe(region)
        # The welcome is right where it can be, so that what comes behind it is looked at too.
        welcome = welcome[:2] + descriptor.capability + bytes(16) + welcome[34:]
        lent = {"none": [], "the memory": [memfd], "a socket": [ours.fileno()]}[board]
        socket.send_fds(ours, [welcome], lent)
        for packet in more:
            ours.send(packet)
        with contextlib.suppress(TransportError):
            remote = reader.attach(descriptor, fd=memfd, link_fd=theirs.fileno())
            ours.close()
            eventually(lambda: remote.lost, 5.0)
            assert remote.expires_at_s >= 0
            event("attached")
    finally:
        ours.close()
        theirs.close()
        reader.close()
        owner.close()
        region.close()
