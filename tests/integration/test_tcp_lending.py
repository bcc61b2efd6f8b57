"""A `tcp` owner that sends by reference, and readers that take it, leave it, or let it lie."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
import time

import numpy as np
import psutil
import pytest

from snowskin.kvstore.pool.arena import Arena
from snowskin.transport.addresses import Address
from snowskin.transport.frames import HEAD_NBYTES, Done, Ping, Pong
from snowskin.transport.lending import Lending
from snowskin.transport.memory import Lendable, Memfd
from snowskin.transport.runs import Run
from snowskin.transport.tcp import egress
from snowskin.transport.tcp.connection import Connection
from snowskin.transport.tcp.serving import Phase
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.transport import TcpTransport
from tests.support.raw_tcp import RawReader, ask_of, reachable
from tests.support.tls_files import Authority
from tests.support.waiting import eventually

NBYTES = 32 << 20
LARGE_NBYTES = TcpSettings().lend_from_nbytes
PATIENCE_S = 5.0
CANARY = 0xEE


class Owned:
    """An owner whose memory is lendable; all of it is granted, and no byte of it is the canary."""

    def __init__(self, **settings):
        self.arena = Arena(NBYTES, name="lends", tenant="t", huge_pages="never")
        self.fd = self.arena.open_read_write()
        self.lending = Lending(self.fd, NBYTES, unit_nbytes=mmap.PAGESIZE)
        self.transport = TcpTransport(
            TcpSettings(
                **{"listen": (Address("127.0.0.1", 0),), "lend_to_this_host": True, **settings}
            )
        )
        self.region = self.transport.register(
            Lendable(memory=Memfd(fd=self.fd), lending=self.lending)
        )
        self.memory = self.region.buffer
        self.memory[:] = np.random.default_rng(5).integers(0, CANARY, NBYTES, dtype=np.uint8)
        self.descriptor = self.transport.describe(self.region)

    def reader(self):
        return RawReader(reachable(self.descriptor))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.transport.close()
        self.region.close()
        self.lending.close()
        os.close(self.fd)
        self.arena.close()


@pytest.fixture(scope="module")
def owned():
    with Owned(frame_timeout_s=0.5) as made:
        yield made


@pytest.fixture
def lent_nbytes(monkeypatch):
    """What went by reference, call by call."""
    sizes = []
    sendfile = os.sendfile

    def counted(out, source, offset, nbytes):
        sizes.append(sendfile(out, source, offset, nbytes))
        return sizes[-1]

    monkeypatch.setattr(os, "sendfile", counted)
    return sizes


RUNS = {
    "one range": [Run(0, 0, LARGE_NBYTES)],
    "no page's edge": [Run(4096 + 17, 3, LARGE_NBYTES + 2 * mmap.PAGESIZE + 101)],
    "large and small": [
        Run(16 << 20, 0, LARGE_NBYTES - 4096),
        Run(100, LARGE_NBYTES, 50),
        Run(1 << 20, LARGE_NBYTES + 1000, 1 << 20),
        Run(12 << 20, 20 << 20, 4096),
    ],
}


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("is_looked_at", [False, True], ids=["", "piece by piece"])
def test_what_goes_by_reference_is_what_was_asked_for(owned, lent_nbytes, runs, is_looked_at):
    target = np.zeros(NBYTES, np.uint8)
    with contextlib.closing(TcpTransport()) as reader, reader.register(target) as local:
        remote = reader.attach(owned.descriptor)
        for _ in range(2):  # on the same connection: the first was in order to its end
            target[:] = 0
            landed = (lambda offset, nbytes: None) if is_looked_at else None
            reader.pull(remote, local, runs, deadline_s=time.monotonic() + 5, landed=landed)
            for run in runs:
                expected = owned.memory[run.remote_offset : run.remote_offset + run.nbytes]
                landing = target[run.local_offset : run.local_offset + run.nbytes]
                assert np.array_equal(landing, expected)
        assert reader.statistics().num_connections == 1
    assert sum(lent_nbytes) > LARGE_NBYTES
    eventually(lambda: not owned.lending.lent_nbytes, PATIENCE_S, "the reader's DONE came")
    assert not owned.lending.forsaken_nbytes


def test_who_does_not_say_that_it_will_say_done_gets_copies(owned, lent_nbytes):
    with owned.reader() as reader:
        reader.say(ask_of(owned.descriptor, [(0, LARGE_NBYTES)], wants_done=False))
        payload, fail = reader.transfer(LARGE_NBYTES)
    assert fail is None
    assert payload == owned.memory[:LARGE_NBYTES].tobytes()
    assert not lent_nbytes


def test_readers_on_this_host_get_copies_unless_they_are_trusted(lent_nbytes):
    with Owned(lend_to_this_host=False) as owned, owned.reader() as reader:
        reader.say(ask_of(owned.descriptor, [(0, LARGE_NBYTES)], wants_done=True))
        assert reader.transfer(LARGE_NBYTES)[1] is None
        reader.say(Done(op=1, note=b""))
    assert not lent_nbytes


@pytest.mark.parametrize(
    ("device", "bus", "leaves"),
    [
        ("eth0", "0000:00:03.0", True),
        ("eth0", "virtio3", True),
        ("veth17", "", False),
        ("docker0", "N/A", False),
        ("", "", False),
    ],
)
def test_only_a_device_that_is_plugged_in_takes_packets_off_this_host(
    monkeypatch, device, bus, leaves
):
    monkeypatch.setattr(egress, "_device_to", {"192.0.2.7": device}.__getitem__)
    monkeypatch.setattr(egress, "_bus_of", {device: bus}.__getitem__)
    assert egress.leaves_by_hardware("192.0.2.7") is leaves


def test_what_is_sent_to_an_address_of_this_host_does_not_leave_it():
    own = [
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    ]
    assert not any(map(egress.leaves_by_hardware, ["127.0.0.1", "::1", "127.8.8.8", *own]))
    assert not any(map(egress.leaves_by_hardware, ["nonsense", "", "fe80::1%nowhere"]))


def test_a_small_pull_is_copied(owned, lent_nbytes):
    with owned.reader() as reader:
        reader.say(ask_of(owned.descriptor, [(0, LARGE_NBYTES - 1)], wants_done=True))
        assert reader.transfer(LARGE_NBYTES - 1)[1] is None
        reader.say(Done(op=1, note=b""))
    assert not lent_nbytes


def test_with_tls_everything_is_copied_whatever_a_reader_announces(
    tmp_path, lent_nbytes, monkeypatch
):
    greet = Connection.greet

    def greet_and_announce(self, settings):
        yield from greet(self, settings)
        self.done_from_nbytes = 1

    monkeypatch.setattr(Connection, "greet", greet_and_announce)
    monkeypatch.setattr(Connection, "acknowledge", lambda self, op: False)
    authority = Authority(tmp_path)
    tls = authority.sign("both")
    target = np.zeros(LARGE_NBYTES, np.uint8)
    with (
        Owned(tls=tls) as owned,
        contextlib.closing(TcpTransport(TcpSettings(tls=tls))) as reader,
        reader.register(target) as local,
    ):
        remote = reader.attach(owned.descriptor)
        runs = [Run(0, 0, LARGE_NBYTES)]
        reader.pull(remote, local, runs, deadline_s=time.monotonic() + PATIENCE_S)
        assert np.array_equal(target, owned.memory[:LARGE_NBYTES])
    assert not lent_nbytes


def test_a_reader_that_lets_it_lie_gets_what_it_was_granted_and_never_what_came_later(lent_nbytes):
    with Owned() as owned, owned.reader() as reader:
        before = owned.memory.tobytes()
        reader.say(ask_of(owned.descriptor, [(0, NBYTES)], wants_done=True))
        eventually(lambda: lent_nbytes, PATIENCE_S, "pages went by reference")
        owned.transport.revoke(owned.descriptor)  # the lease is over: its room is another's
        assert owned.lending.reclaim(0, NBYTES, lambda offset, nbytes: True)
        owned.memory[:] = CANARY
        payload = b""
        while len(payload) < NBYTES and (frame := reader.hear()) is not None:
            if not hasattr(frame, "nbytes"):
                break
            payload += reader.payload(frame.nbytes)
        assert len(payload) > 100_000, "what was on its way came"
        assert payload == before[: len(payload)]
        assert owned.memory.min() == CANARY
        assert not owned.lending.forsaken_nbytes


def test_who_says_done_before_it_has_all_is_not_believed(lent_nbytes):
    with Owned(send_buffer_nbytes=2 << 20) as owned, owned.reader() as reader:
        reader.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 << 10)
        reader.say(ask_of(owned.descriptor, [(0, LARGE_NBYTES)], wants_done=True))
        payload = b""
        while not all_is_with_the_kernel(owned):
            payload += reader.socket.recv(64 << 10)
        before = owned.memory[:LARGE_NBYTES].tobytes()
        reader.say(Done(op=1, note=b""))
        eventually(lambda: not owned.lending.lent_nbytes, PATIENCE_S, "it was heard")
        assert owned.lending.forsaken_nbytes == LARGE_NBYTES
        owned.transport.revoke(owned.descriptor)
        assert owned.lending.reclaim(0, NBYTES, lambda offset, nbytes: True)
        owned.memory[:] = CANARY
        num_frames = -(-LARGE_NBYTES // TcpSettings().chunk_nbytes)
        while len(payload) < LARGE_NBYTES + num_frames * HEAD_NBYTES:
            payload += reader.socket.recv(1 << 20)
    frame_nbytes = HEAD_NBYTES + TcpSettings().chunk_nbytes
    assert before == b"".join(
        payload[at + HEAD_NBYTES : at + frame_nbytes] for at in range(0, len(payload), frame_nbytes)
    )


def all_is_with_the_kernel(owned):
    """Whether the owner waits for DONE alone; each look takes a while, so that it moves on meanwhile."""
    looked = threading.Event()
    phases = []
    (loop,) = owned.transport._owner._loops

    def look():
        phases.extend(link.served.phase for link in loop._links.values())
        looked.set()

    loop.call(look)
    assert looked.wait(PATIENCE_S)
    return Phase.AWAITING_DONE in phases


def test_who_drains_for_ever_is_waited_for_until_its_own_deadline(owned):
    with owned.reader() as reader:
        reader.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 << 10)
        reader.say(ask_of(owned.descriptor, [(0, LARGE_NBYTES)], wants_done=True, timeout_ms=1000))
        began_s = time.monotonic()
        while not all_is_with_the_kernel(owned):
            reader.socket.recv(256 << 10)
        while owned.lending.lent_nbytes:  # a little all the time
            assert time.monotonic() < began_s + 3.0, "it is held for as long as it likes"
            reader.socket.recv(4096)
            time.sleep(0.02)
    assert owned.lending.reclaim(0, NBYTES, lambda offset, nbytes: True)


def test_who_drains_slowly_is_waited_for_and_who_stands_still_is_not(owned):
    num_served = owned.transport.statistics().num_served
    ask = ask_of(owned.descriptor, [(0, LARGE_NBYTES)], wants_done=True, timeout_ms=60_000)
    with owned.reader() as reader:
        reader.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 << 10)
        reader.say(ask)
        payload = bytearray()
        began_s = time.monotonic()
        assert reader.hear().nbytes == LARGE_NBYTES
        while len(payload) < LARGE_NBYTES:  # three times as long as an owner waits for a DONE
            payload += reader.payload(1 << 20)
            time.sleep(0.2)
        assert time.monotonic() - began_s > 1.5
        reader.say(Done(op=1, note=b""), Ping(op=1))
        assert reader.hear() == Pong(op=1)
    assert payload == owned.memory[:LARGE_NBYTES].tobytes()
    assert owned.transport.statistics().num_served == num_served + 1
    with owned.reader() as reader:
        reader.say(ask)
        assert reader.transfer(LARGE_NBYTES)[1] is None
        assert reader.is_over(2.0), "it has all, and says nothing: nothing moves any more"
    assert not owned.lending.lent_nbytes
    assert owned.lending.forsaken_nbytes == LARGE_NBYTES
    assert owned.lending.reclaim(0, NBYTES, lambda offset, nbytes: True)
