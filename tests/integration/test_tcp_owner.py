"""A `tcp` owner with real sockets, and readers that are none of ours."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import termios
import threading
import time
from collections import Counter

import numpy as np
import pytest

from snowskin.transport.addresses import Address
from snowskin.transport.descriptor import RegionDescriptor, new_capability
from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.frames import (
    HEAD_NBYTES,
    Clear,
    Data,
    Done,
    Fail,
    Kind,
    Ping,
    Pong,
    Welcome,
    encode,
)
from snowskin.transport.grants import GrantTable
from snowskin.transport.memory import region_of
from snowskin.transport.runs import Run
from snowskin.transport.tcp.owner import PAUSE_S, TcpOwner
from snowskin.transport.tcp.served_transfer import COPIED_FRAME_NBYTES
from snowskin.transport.tcp.serving import FAREWELL_S
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.transport import TcpTransport
from tests.support.raw_tcp import HELLO, RawReader, ask_of, reachable
from tests.support.tls_files import Authority
from tests.support.waiting import eventually

LOCALHOST = (Address("127.0.0.1", 0),)
NBYTES = 8 << 20
PATIENCE_S = 5.0


class Ledger:
    """Counts as a transport does."""

    def __init__(self):
        self.counts = Counter()

    def count_served(self, nbytes):
        self.counts["served"] += 1
        self.counts["nbytes"] += nbytes

    def count_served_failed(self):
        self.counts["failed"] += 1

    def count_refused(self, reason):
        self.counts[reason] += 1


class Owned:
    """An owner, its memory, and grants of all of it."""

    def __init__(self, **settings):
        self.memory = np.random.default_rng(3).integers(0, 256, NBYTES, dtype=np.uint8)
        self.region = region_of(self.memory)
        self.grants = GrantTable()
        self.ledger = Ledger()
        self.owner = TcpOwner(
            self.grants, TcpSettings(**{"listen": LOCALHOST, **settings}), self.ledger
        )

    def grant(self, *, on_done=None, writable=False):
        descriptor = RegionDescriptor(
            scheme="tcp",
            capability=new_capability(),
            nbytes=NBYTES,
            writable=writable,
            extra=self.owner.reachability.to_bytes(),
        )
        self.grants.add(descriptor, self.region, None, now_s=time.monotonic(), on_done=on_done)
        return descriptor

    def reader(self, **how):
        return RawReader(self.owner.reachability.addresses[0], **how)

    def bytes_of(self, *ranges):
        return b"".join(self.memory[at : at + size].tobytes() for at, size in ranges)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.owner.close()
        self.region.close()


def read_little(reader):
    """A buffer so small that the owner has to wait, and not so small that the kernel dawdles."""
    reader.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 << 10)


def wait_for_bytes(reader):
    """Until its buffer holds something, and the owner has had to wait."""

    def waiting_nbytes():
        (nbytes,) = struct.unpack("i", fcntl.ioctl(reader.socket, termios.FIONREAD, bytes(4)))
        return nbytes

    eventually(lambda: waiting_nbytes() > 100_000, PATIENCE_S, "bytes came")


def clock_of_owner():
    """How long the only serving thread has worked."""
    (thread,) = (each for each in threading.enumerate() if "tcp-owner" in each.name)
    assert thread.ident is not None
    return time.pthread_getcpuclockid(thread.ident)


@pytest.fixture
def owned():
    with Owned() as made:
        yield made


def test_readers_at_once_get_each_their_own_bytes():
    wrong = []

    def read(owned, descriptor, index):
        ranges = [(index * 1000 + step * 300_000, 100_000 + index) for step in range(20)]
        with owned.reader() as reader:
            for op in range(1, 6):
                data, fail = reader.pull(descriptor, ranges, op=op, traffic=index % 3)
                if fail is not None or data != owned.bytes_of(*ranges):
                    wrong.append((index, op, fail))

    with Owned(num_serving_threads=2) as owned:
        descriptor = owned.grant()
        threads = [
            threading.Thread(target=read, args=(owned, descriptor, index)) for index in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not wrong
        eventually(lambda: owned.ledger.counts["served"] == 30, PATIENCE_S, "all are counted")


def test_a_reader_that_stands_still_does_not_hold_up_the_others(owned):
    descriptor = owned.grant()
    with owned.reader() as still, owned.reader() as reader:
        read_little(still)
        still.say(ask_of(descriptor, [(0, NBYTES)], traffic=0))
        wait_for_bytes(still)
        for op in range(1, 20):
            assert reader.pull(descriptor, [(op, 100_000)], op=op, traffic=2)[1] is None


def test_a_reader_that_takes_nothing_is_cut_after_the_frame_timeout():
    with Owned(frame_timeout_s=0.2) as owned, owned.reader() as still:
        still.read_nothing()
        still.say(ask_of(owned.grant(), [(0, NBYTES)]))
        eventually(lambda: owned.ledger.counts["failed"], PATIENCE_S, "the reader was cut")
        eventually(lambda: not owned.owner.num_connections, PATIENCE_S, "its place is free")


def test_a_grant_taken_back_in_the_middle_of_a_pull_ends_it_and_no_byte_comes_afterwards(owned):
    descriptor = owned.grant()
    with owned.reader() as reader:
        read_little(reader)
        reader.say(ask_of(descriptor, [(0, NBYTES)]))
        wait_for_bytes(reader)
        owned.grants.revoke(descriptor.capability)
        before = owned.memory.copy()
        owned.memory[:] = 0  # given to somebody else
        stream = reader.rest()
    frame_nbytes = HEAD_NBYTES + COPIED_FRAME_NBYTES
    frames = [stream[at : at + frame_nbytes] for at in range(0, len(stream), frame_nbytes)]
    payload = b"".join(each[HEAD_NBYTES:] for each in frames if each[0] == Kind.DATA)
    assert len(payload) < NBYTES
    assert payload == before[: len(payload)].tobytes()
    assert owned.ledger.counts["failed"] == 1
    assert owned.ledger.counts["GRANT_REFUSED"] == 1


def test_who_is_told_and_fails_harms_nobody(owned):
    def fail(completion):
        raise RuntimeError(f"cannot take {completion.note!r}")

    descriptor = owned.grant(on_done=fail)
    with owned.reader() as reader:
        reader.say(ask_of(descriptor, [(0, 10)], wants_done=True, op=1))
        assert reader.transfer(10)[1] is None
        reader.say(Done(op=1, note=b"news"))
        assert reader.pull(descriptor, [(0, 10)], op=2) == (owned.bytes_of((0, 10)), None)
    assert owned.owner.num_errors == 1
    eventually(lambda: owned.ledger.counts["served"] == 2, PATIENCE_S, "both are counted")


def test_a_bug_met_by_one_reader_ends_its_connection_and_no_other(owned, monkeypatch):
    descriptor = owned.grant()
    with owned.reader() as unlucky, owned.reader() as reader:
        with monkeypatch.context() as patch:
            patch.setattr(GrantTable, "find", lambda *_, **__: 1 / 0)
            unlucky.say(ask_of(descriptor, [(0, 10)]))
            assert unlucky.hear() is None
        assert reader.pull(descriptor, [(0, 10)])[1] is None
    assert owned.owner.num_errors == 1


def test_a_push_is_whole_and_told_when_its_writer_hears_done(owned):
    told = []
    descriptor = owned.grant(on_done=told.append, writable=True)
    ranges, data = [(5, 300_000), (4 << 20, 700_001)], os.urandom(1_000_001)
    with owned.reader() as writer:
        writer.say(ask_of(descriptor, ranges, is_push=True, note=b"mine"))
        assert writer.hear() == Clear(op=1)
        for at in range(0, len(data), 123_456):
            part = data[at : at + 123_456]
            writer.say(Data(op=1, nbytes=len(part)))
            writer.send(part)
        assert writer.hear() == Done(op=1, note=b"")
    assert owned.bytes_of(*ranges) == data
    assert [each.note for each in told] == [b"mine"]


def test_a_done_that_comes_in_two_parts_is_one(owned):
    told = []
    descriptor = owned.grant(on_done=told.append)
    with owned.reader() as reader:
        reader.say(ask_of(descriptor, [(0, 10)], wants_done=True))
        reader.transfer(10)
        reader.send(bytes([7, 0, 0, 0, 0, 0, 0, 1]))
        assert not reader.is_over(0.05)
        reader.send(bytes(7) + bytes([1]) + b"n")
        reader.say(Ping(op=1))
        assert reader.hear() == Pong(op=1)
    assert [completion.note for completion in told] == [b"n"]


def test_a_done_without_a_note_is_counted_and_tells_nobody(owned):
    told = []
    descriptor = owned.grant(on_done=told.append)
    with owned.reader() as reader:
        reader.say(ask_of(descriptor, [(0, 10)], wants_done=True))
        reader.transfer(10)
        reader.say(Done(op=1, note=b""), Ping(op=1))
        assert reader.hear() == Pong(op=1)
    assert owned.ledger.counts["served"] == 1
    assert not told


def test_a_full_owner_drops_who_only_waits_and_refuses_when_all_have_worked():
    with Owned(max_connections=2) as owned:
        descriptor = owned.grant()
        with owned.reader() as idle, owned.reader() as first, owned.reader() as second:
            assert first.pull(descriptor, [(0, 10)])[1] is None
            assert second.pull(descriptor, [(0, 10)])[1] is None
            told = idle.hear()
            assert isinstance(told, Fail)
            assert (told.op, told.reason) == (0, "PEER_BUSY")
            assert idle.hear(within_s=FAREWELL_S / 2) is None
            with owned.reader(hello=False) as late:
                assert late.hear().reason == "PEER_BUSY"
            first.socket.close()
            eventually(lambda: owned.owner.num_connections == 1, PATIENCE_S, "a place is free")
            with owned.reader() as late:
                assert late.pull(descriptor, [(0, 10)])[1] is None
        assert owned.ledger.counts["PEER_BUSY"] == 2


def test_an_owner_without_descriptors_makes_room_and_goes_on(owned, monkeypatch):
    accept, num_failures = socket.socket.accept, iter([errno.EMFILE, errno.ENFILE, errno.ENOMEM])

    def scarce(listener):
        code = next(num_failures, None)
        if code is not None:
            raise OSError(code, os.strerror(code))
        return accept(listener)

    descriptor = owned.grant()
    with owned.reader() as idle:
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "accept", scarce)
            began_s = time.monotonic()
            with owned.reader() as reader:  # waits until the owner listens again
                assert reader.pull(descriptor, [(0, 10)])[1] is None
        assert time.monotonic() - began_s > 1.5 * PAUSE_S
        assert idle.hear().reason == "PEER_BUSY"
    assert owned.ledger.counts["PEER_BUSY"] == 1
    assert owned.owner.num_errors == 0


def test_a_crowd_that_took_all_descriptors_makes_room_at_once(owned, monkeypatch):
    accept, num_most = socket.socket.accept, 20

    def scarce(listener):
        if owned.owner.num_connections >= num_most:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", scarce)
    descriptor = owned.grant()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(owned.reader(hello=False))
        began_s = time.monotonic()
        with owned.reader() as reader:
            assert reader.pull(descriptor, [(0, 10)])[1] is None
        assert time.monotonic() - began_s < 0.5
        assert owned.owner.num_connections <= num_most


def test_an_owner_costs_nothing_while_nothing_is_asked(owned):
    clock = clock_of_owner()
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(owned.reader()) for _ in range(20)]
        assert readers[-1].pull(owned.grant(), [(0, NBYTES)])[1] is None
        before_s = time.clock_gettime(clock)
        assert not readers[0].is_over(0.5)
        assert time.clock_gettime(clock) - before_s < 0.0005


def test_a_reader_that_pinged_and_then_fell_silent_is_dropped_in_its_time():
    with Owned(idle_timeout_s=0.2) as owned, owned.reader() as reader:
        began_s = time.monotonic()
        for op in range(3):
            assert not reader.is_over(0.1)
            reader.say(Ping(op=op))
            assert reader.hear() == Pong(op=op)
        assert reader.is_over(1.0)
        assert time.monotonic() - began_s > 0.45


def test_timers_do_not_pile_up(owned):
    descriptor = owned.grant()
    with owned.reader() as reader:
        for op in range(1, 200):
            assert reader.pull(descriptor, [(0, 10)], op=op)[1] is None
        assert len(owned.owner._loops[0]._timers) < 10


def test_closing_tells_who_waits_for_bytes_and_leaves_nothing():
    owned = Owned()
    descriptor = owned.grant()
    with owned.reader() as idle, owned.reader() as busy:
        busy.say(ask_of(descriptor, [(0, 10)], wants_done=True))
        assert busy.transfer(10)[1] is None
        owned.owner.close()
        assert busy.hear().reason == "TRANSPORT_CLOSED"
        assert busy.hear() is None
        assert idle.hear() is None
    assert not any("tcp-owner" in thread.name for thread in threading.enumerate())
    assert len(owned.grants) == 0
    owned.owner.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(reachable(descriptor), PATIENCE_S)
    owned.region.close()


def test_who_is_told_of_a_transfer_may_close_the_owner(owned):
    descriptor = owned.grant(on_done=lambda _: owned.owner.close(), writable=True)
    with owned.reader() as writer:
        writer.say(ask_of(descriptor, [(0, 10)], is_push=True, note=b"the last one"))
        assert writer.hear() == Clear(op=1)
        writer.say(Data(op=1, nbytes=10))
        writer.send(bytes(10))
        assert writer.hear() in (Done(op=1, note=b""), None)
        assert writer.hear() is None
    assert owned.owner.num_errors == 0


def test_a_forked_child_does_not_keep_connections_alive(owned):
    release, hold = os.pipe()
    with owned.reader() as reader:
        child = os.fork()
        if not child:
            os.close(hold)
            os.read(release, 1)
            os._exit(0)
        try:
            owned.owner.close()
            assert reader.hear() is None
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(owned.owner.reachability.addresses[0], PATIENCE_S)
        finally:
            os.close(hold)
            os.waitpid(child, 0)
            os.close(release)


def test_an_owner_listens_on_several_addresses_and_says_others():
    listen = (Address("127.0.0.1", 0), Address("::1", 0), Address("0.0.0.0", 0))
    told = (Address("localhost", 0), Address("::1", 0), Address("node-7", 4711))
    with Owned(listen=listen, advertise=told) as owned:
        first, second, third = owned.owner.reachability.addresses
        assert (first.host, second.host, third) == ("localhost", "::1", told[2])
        assert first.port
        assert second.port
        for address in (("127.0.0.1", first.port), second):
            with RawReader(address) as reader:
                assert isinstance(reader.welcome, Welcome)


def test_one_port_is_listened_on_by_ipv4_and_ipv6_apart():
    everywhere = {"advertise": (Address("node-7", 0),)}
    for attempt in range(9):
        with Owned(listen=(Address("::", 0),), **everywhere) as first:
            port = first.owner.reachability.addresses[0].port
            try:
                second = Owned(listen=(Address("0.0.0.0", port),), **everywhere)
            except TransportUnavailable:
                assert attempt < 8, "not by chance"
                continue  # somebody else on this host may have that one
            with second, RawReader(("127.0.0.1", port)) as reader:
                assert isinstance(reader.welcome, Welcome)
                return


def test_an_address_that_is_taken_or_unknown_is_refused_and_nothing_stays(owned):
    taken = owned.owner.reachability.addresses[0]
    for address in (taken, Address("no-such-host.invalid", 0)):
        with pytest.raises(TransportUnavailable, match="cannot listen on"):
            Owned(listen=(*LOCALHOST, address))


def test_a_congestion_control_that_is_not_there_is_refused():
    for name in ("congestion_control", "local_congestion_control"):
        with pytest.raises(TransportUnavailable, match="no-such-thing"):
            Owned(**{name: "no-such-thing"})


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"))


def greet_by_tls(owned, files):
    """A raw reader with TLS; ConnectionError or ssl.SSLError where the owner does not want it."""
    reader = owned.reader(hello=False)
    try:
        reader.socket = files.reader_context().wrap_socket(
            reader.socket, server_hostname="127.0.0.1"
        )
        reader.say(HELLO)
        assert isinstance(reader.hear(), Welcome)
    except BaseException:
        reader.socket.close()
        raise
    return reader


def test_by_tls_the_same_bytes_come_and_go(authority):
    told = []
    with Owned(tls=authority.sign("owner")) as owned:
        assert owned.owner.reachability.tls
        descriptor, clock = owned.grant(on_done=told.append, writable=True), clock_of_owner()
        with greet_by_tls(owned, authority.sign("reader")) as reader:
            ranges = [(0, 3 << 20), *((at * 1000, 700) for at in range(500)), (9, 40_000)]
            data, fail = reader.pull(descriptor, ranges)
            assert fail is None
            assert data == owned.bytes_of(*ranges)
            data = os.urandom(2_000_000)
            reader.say(ask_of(descriptor, [(7, 2_000_000)], is_push=True, op=2, note=b"mine"))
            assert reader.hear() == Clear(op=2)
            for at in range(0, len(data), 300_000):
                part = data[at : at + 300_000]
                reader.say(Data(op=2, nbytes=len(part)))
                reader.send(part)
            assert reader.hear() == Done(op=2, note=b"")
            assert owned.bytes_of((7, 2_000_000)) == data
            reader.say(ask_of(descriptor, [(0, 10)], is_push=True, op=5))
            assert reader.hear() == Clear(op=5)
            before_s = time.clock_gettime(clock)
            assert not reader.is_over(0.1)
            assert time.clock_gettime(clock) - before_s < 0.01  # it waits, and does not ask again
            reader.send(encode(Data(op=5, nbytes=10)) + b"one record")
            assert reader.hear() == Done(op=5, note=b"")
            reader.say(ask_of(descriptor, [(0, 10)], wants_done=True, op=3))
            assert reader.transfer(10) == (b"one record", None)
            reader.say(Done(op=3, note=b"read"), Ping(op=4))
            assert reader.hear() == Pong(op=4)
        assert [each.note for each in told] == [b"mine", b"read"]


def test_by_tls_a_slow_reader_gets_the_same_bytes(authority):
    ranges = [(at * 2000, 1990) for at in range(4000)]
    with (
        Owned(tls=authority.sign("owner")) as owned,
        greet_by_tls(owned, authority.sign("reader")) as reader,
    ):
        read_little(reader)
        reader.say(ask_of(owned.grant(), ranges))
        wait_for_bytes(reader)
        data, fail = reader.transfer(4000 * 1990)
        assert fail is None
        assert data == owned.bytes_of(*ranges)


def test_without_tls_or_with_a_certificate_of_others_nobody_gets_in(authority, tmp_path):
    stranger = Authority(tmp_path, "stranger").sign("s", authority=authority.certificate)
    with Owned(tls=authority.sign("owner")) as owned:
        with owned.reader(hello=False) as plain:
            plain.say(HELLO)
            assert plain.is_over(PATIENCE_S)
        with pytest.raises((OSError, AssertionError)):
            greet_by_tls(owned, stranger)
        with greet_by_tls(owned, authority.sign("reader")) as reader:
            assert reader.pull(owned.grant(), [(0, 10)])[1] is None
        assert owned.owner.num_errors == 0


def test_two_transports_speak_tls_with_each_other(authority):
    source, target = np.random.default_rng(1).bytes(NBYTES), bytearray(NBYTES)
    owner = TcpTransport(TcpSettings(listen=LOCALHOST, tls=authority.sign("owner")))
    reader = TcpTransport(TcpSettings(tls=authority.sign("reader")))
    try:
        remote = reader.attach(owner.describe(owner.register(source, writable=False)))
        local = reader.register(target)
        reader.pull(remote, local, [Run(0, 0, NBYTES)], deadline_s=time.monotonic() + PATIENCE_S)
        assert target == source
    finally:
        reader.close()
        owner.close()
