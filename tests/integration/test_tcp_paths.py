"""The ways from a `tcp` reader to a real owner: IPv6, TLS, several paths, several streams."""

from __future__ import annotations

import errno
import os
import socket
import time

import numpy as np
import pytest

from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.api import Run, TransferControl
from snowskin.transport.errors import PeerLost, TransportUnavailable
from snowskin.transport.frames import Data, encode
from snowskin.transport.paths import Path
from snowskin.transport.stripes import Stripes
from snowskin.transport.tcp import transport as tcp
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.transport import TcpTransport
from tests.support.raw_tcp import RawOwner, at, greeted, next_ask
from tests.support.tls_files import Authority
from tests.support.waiting import eventually

NBYTES = 1 << 20
LARGE = 48 << 20
WITHIN_S = 5.0


def real_pair(**settings):
    listen = settings.pop("listen", (Address("127.0.0.1", 0),))
    reader = settings.pop("reader", {})
    return TcpTransport(TcpSettings(listen=listen, **settings)), TcpTransport(TcpSettings(**reader))


class Pair:
    """A real owner and a reader of it; `source` is granted whole."""

    def __init__(self, nbytes=NBYTES, **settings):
        self.owner, self.reader = real_pair(**settings)
        self.source = np.random.default_rng(6).integers(0, 256, nbytes, dtype=np.uint8)
        self.target = np.zeros(nbytes, np.uint8)
        self.owned = self.owner.register(self.source)
        self.local = self.reader.register(self.target)

    def attach(self):
        return self.reader.attach(self.owner.describe(self.owned))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.reader.close()
        self.owner.close()
        self.local.close()
        self.owned.close()


def test_ipv6_works():
    with Pair(listen=(Address("::1", 0),)) as pair:
        remote = pair.attach()
        assert remote.peer.startswith("tcp://[::1]:")
        pair.reader.pull(remote, pair.local, [Run(0, 0, NBYTES)], deadline_s=time.monotonic() + 5)
        assert np.array_equal(pair.source, pair.target)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"))


async def test_by_tls_the_same_bytes_come_by_thread_and_by_loop(authority):
    with Pair(tls=authority.sign("owner"), reader={"tls": authority.sign("reader")}) as pair:
        remote = pair.attach()
        deadline_s = time.monotonic() + WITHIN_S
        pair.reader.pull(remote, pair.local, [Run(0, 0, NBYTES)], deadline_s=deadline_s)
        assert np.array_equal(pair.source, pair.target)
        pair.target[:] = 0
        runs = [Run(index * 2000, index * 2000, 1999) for index in range(100)]
        await pair.reader.pull_async(remote, pair.local, runs, deadline_s=deadline_s)
        for offset, _, nbytes in runs:
            assert np.array_equal(
                pair.source[offset : offset + nbytes], pair.target[offset : offset + nbytes]
            )
        assert pair.reader.statistics().num_connections == 1


def test_an_owner_with_a_certificate_of_somebody_else_is_not_read_from(authority, tmp_path):
    stranger = Authority(tmp_path, "stranger").sign("owner", authority=authority.certificate)
    with Pair(tls=stranger, reader={"tls": authority.sign("reader")}) as pair:
        remote = pair.attach()
        with pytest.raises(PeerLost, match="no TLS with"):
            pair.reader.pull(remote, pair.local, [Run(0, 0, 9)], deadline_s=time.monotonic() + 5)


def test_who_speaks_tls_and_who_does_not_never_meet_in_the_clear(authority):
    with Pair(tls=authority.sign("owner")) as pair, pytest.raises(TransportUnavailable):
        pair.attach()
    with (
        Pair(reader={"tls": authority.sign("reader")}) as pair,
        pytest.raises(TransportUnavailable),
    ):
        pair.attach()


def test_a_reader_alone_describes_nothing():
    reader = TcpTransport()
    region = reader.register(bytearray(10))
    with pytest.raises(TransportUnavailable, match="listen"):
        reader.describe(region)
    region.close()
    reader.close()


# Several paths and streams.


@pytest.fixture
def two_paths():
    listen = (Address("127.0.0.1", 0), Address("127.0.0.2", 0))
    with Pair(LARGE, listen=listen) as pair:
        yield pair


def addresses_of(descriptor):
    return Reachability.from_bytes(descriptor.extra).addresses


def test_a_large_pull_goes_over_all_paths_and_its_pieces_are_told_in_order(two_paths):
    remote = two_paths.attach()
    told = []

    def landed(offset, nbytes):
        assert np.array_equal(
            two_paths.target[offset : offset + nbytes],
            two_paths.source[source_of[offset] : source_of[offset] + nbytes],
        ), "told before it landed"
        told.append((offset, nbytes))

    runs = [Run(index * 300_000, (99 - index) * 300_000, 250_000) for index in range(100)]
    source_of = {
        here + start: there + start
        for there, here, nbytes in runs
        for start in range(0, nbytes, 100_000)
    }
    control = TransferControl()
    two_paths.reader.pull(
        remote,
        two_paths.local,
        runs,
        deadline_s=time.monotonic() + 20,
        piece_nbytes=100_000,
        landed=landed,
        control=control,
    )
    wanted = [
        (here + start, min(100_000, nbytes - start))
        for _, here, nbytes in runs
        for start in range(0, nbytes, 100_000)
    ]
    assert told == wanted
    assert control.moved_nbytes == 25_000_000
    rows = remote.link.paths.statistics(time.monotonic())
    assert len(rows) == 2
    assert all(row.moved_nbytes > 0 for row in rows), rows


def test_a_note_of_a_large_pull_is_told_once_and_last(two_paths):
    completions = []
    descriptor = two_paths.owner.describe(two_paths.owned, on_done=completions.append)
    remote = two_paths.reader.attach(descriptor)
    two_paths.reader.pull(
        remote,
        two_paths.local,
        [Run(0, 0, LARGE)],
        deadline_s=time.monotonic() + 20,
        note=b"all of it",
    )
    assert np.array_equal(two_paths.source, two_paths.target)
    eventually(lambda: completions, WITHIN_S)
    assert [each.note for each in completions] == [b"all of it"]


def test_an_error_in_landed_ends_all_lanes(two_paths):
    remote = two_paths.attach()
    told = []

    def landed(offset, nbytes):
        told.append(offset)
        if len(told) == 5:
            raise ArithmeticError("bad checksum")

    with pytest.raises(ArithmeticError):
        two_paths.reader.pull(
            remote,
            two_paths.local,
            [Run(0, 0, LARGE)],
            deadline_s=time.monotonic() + 20,
            landed=landed,
        )
    assert len(told) == 5
    assert not remote.link.busy
    two_paths.target[:] = 0
    assert not two_paths.target.any()


@pytest.mark.parametrize("nbytes", [1000, LARGE])
def test_a_path_that_cannot_be_reached_is_gone_round(two_paths, nbytes):
    descriptor = two_paths.owner.describe(two_paths.owned)
    living = addresses_of(descriptor)[1]
    remote = two_paths.reader.attach(at(descriptor, ("127.0.0.3", 9), living))
    two_paths.reader.pull(
        remote, two_paths.local, [Run(0, 0, nbytes)], deadline_s=time.monotonic() + 20
    )
    assert np.array_equal(two_paths.source[:nbytes], two_paths.target[:nbytes])


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_small_pull_that_stands_still_goes_on_by_another_path(monkeypatch, is_async):
    monkeypatch.setattr(tcp, "STALL_S", 0.1)
    monkeypatch.setattr(tcp, "LOOP_WAIT_S", 0.05)
    payload, asked = bytes(range(250)) * 400, []

    def serve_half(stream):
        ask = greeted(stream)
        stream.send(encode(Data(op=ask.op, nbytes=100_000)) + payload[:40_000])
        stream.is_over(WITHIN_S)

    def serve(stream):
        asked.append(ask := greeted(stream))
        ((offset, nbytes),) = ask.ranges
        stream.send(encode(Data(op=ask.op, nbytes=nbytes)) + payload[offset : offset + nbytes])
        next_ask(stream)

    def paths_to(found):
        return [Path(name=str(each), remote_address=str(each)) for each in found.addresses]

    reader, target = TcpTransport(paths_to=paths_to), bytearray(100_000)
    local = reader.register(target)
    with RawOwner(serve_half) as stuck, RawOwner(serve) as living:
        descriptor = at(stuck.descriptor(100_000), stuck.address, living.address)
        remote, runs = reader.attach(descriptor), [Run(0, 0, 100_000)]
        deadline_s = time.monotonic() + WITHIN_S
        if is_async:
            await reader.pull_async(remote, local, runs, deadline_s=deadline_s)
        else:
            reader.pull(remote, local, runs, deadline_s=deadline_s)
        reader.close()
    local.close()
    assert bytes(target) == payload
    assert asked[0].ranges == ((40_000, 60_000),)


def test_where_no_path_leads_anywhere_the_peer_is_lost_by_name(two_paths):
    descriptor = two_paths.owner.describe(two_paths.owned)
    remote = two_paths.reader.attach(at(descriptor, ("127.0.0.3", 9), ("127.0.0.4", 9)))
    for nbytes in (1000, LARGE):
        with pytest.raises(PeerLost, match=r"tcp://127.0.0.3:9"):
            two_paths.reader.pull(
                remote, two_paths.local, [Run(0, 0, nbytes)], deadline_s=time.monotonic() + 20
            )


def test_one_path_is_tried_with_several_streams_and_the_bytes_are_right():
    with Pair(LARGE) as pair:
        remote = pair.attach()
        for _ in range(9):  # the eighth tries another number of streams
            pair.target[::4096] = 0
            pair.reader.pull(
                remote, pair.local, [Run(0, 0, LARGE)], deadline_s=time.monotonic() + 20
            )
            assert np.array_equal(pair.source, pair.target)
        assert pair.reader.statistics().num_connected > 1


def test_only_a_handshake_proves_a_path_and_not_a_connection_that_was_kept(two_paths, monkeypatch):
    proven = []
    reached = Stripes.reached

    def told(stripes, lane, now_s):
        proven.append(lane.path)
        reached(stripes, lane, now_s)

    monkeypatch.setattr(Stripes, "reached", told)
    remote = two_paths.attach()
    for _ in range(2):
        two_paths.reader.pull(
            remote, two_paths.local, [Run(0, 0, LARGE)], deadline_s=time.monotonic() + 20
        )
    connections = two_paths.reader.statistics().num_connected
    assert len(proven) == connections


# From which address and NIC.


def pulled_by(path_of):
    """Who connected, as the owner saw it, and by which NIC; after one pull."""
    with Pair() as pair:
        reader = TcpTransport(paths_to=lambda found: [path_of(str(found.addresses[0]))])
        try:
            remote = reader.attach(pair.owner.describe(pair.owned))
            reader.pull(remote, pair.local, [Run(0, 0, 9)], deadline_s=time.monotonic() + 5)
            ((connection,),) = [list(link.all_idle()) for link in reader._connections.links()]
            made = socket.socket(fileno=os.dup(connection.fd))
            with made:
                device = made.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
                return made.getsockname()[0], device.rstrip(b"\0").decode()
        finally:
            reader.close()


def test_a_path_connects_from_its_own_address_and_nic(monkeypatch):
    def path(remote):
        return Path(name="p", local_address="127.0.0.9", local_device="lo", remote_address=remote)

    assert pulled_by(path) == ("127.0.0.9", "lo")

    class Forbidding(socket.socket):
        def setsockopt(self, *option):
            if option[1] == socket.SO_BINDTODEVICE:
                raise PermissionError(errno.EPERM, "not permitted")
            super().setsockopt(*option)

    monkeypatch.setattr(socket, "socket", Forbidding)
    assert pulled_by(path)[0] == "127.0.0.9"


@pytest.mark.parametrize(
    "gone", [{"local_address": "192.0.2.200"}, {"local_device": "gone0"}], ids=str
)
def test_a_path_whose_address_or_nic_is_gone_cannot_be_reached(gone):
    with pytest.raises(PeerLost, match="cannot be reached"):
        pulled_by(lambda remote: Path(name="p", remote_address=remote, **gone))
