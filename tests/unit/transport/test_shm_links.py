"""Links of `shm`: what either side says, sees of the other's end, and does with nonsense."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import resource
import socket
import struct
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from snowskin.kvstore.pool.arena import Arena
from snowskin.transport.api import Completion, Run
from snowskin.transport.errors import (
    BadDescriptor,
    GrantRefused,
    PeerLost,
    RegionReadOnly,
    TransferTimedOut,
    TransportClosed,
    TransportUnavailable,
)
from snowskin.transport.grant_board import BOARD_NBYTES
from snowskin.transport.memory import Memfd
from snowskin.transport.shm import MAX_NUM_RANGES, ShmTransport
from snowskin.transport.shm_link import MAX_PACKETS_A_TURN
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snowskin.transport.copying import AttachedMemory
    from snowskin.transport.descriptor import RegionDescriptor

NBYTES = 16 * 4096
FAR_S = 1e9
WAIT_S = 5.0


class Pair:
    """An owner and a reader, as two processes would have them."""

    def __init__(self) -> None:
        self.owner, self.reader = ShmTransport(), ShmTransport()
        self.arena = Arena(NBYTES, name="linked", tenant="t")
        self.fd = self.arena.open_read_write()
        self.owned = self.owner.register(Memfd(fd=self.fd))
        self.local = self.reader.register(bytearray(NBYTES))
        self.heard: list[Completion] = []

    def describe(self, **values: object) -> RegionDescriptor:
        return self.owner.describe(self.owned, on_done=self.heard.append, **values)  # type: ignore[arg-type]

    def attach(self, descriptor: RegionDescriptor, link_fd: int | None) -> AttachedMemory:
        return self.reader.attach(descriptor, fd=self.fd, link_fd=link_fd)

    def linked(self, **values: object) -> tuple[RegionDescriptor, AttachedMemory]:
        descriptor = self.describe(**values)
        link_fd = self.owner.link(descriptor)
        try:
            return descriptor, self.attach(descriptor, link_fd)
        finally:
            os.close(link_fd)

    def pull(self, remote: AttachedMemory, note: bytes = b"", deadline_s: float = FAR_S) -> None:
        self.reader.pull(remote, self.local, [Run(0, 0, 100)], deadline_s=deadline_s, note=note)

    def close(self) -> None:
        self.reader.close()
        self.owner.close()
        self.local.close()
        self.owned.close()
        os.close(self.fd)
        self.arena.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def link_threads() -> int:
    return sum(thread.name == "snowskin-shm-links" for thread in threading.enumerate())


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_link_for_which_no_descriptor_is_left_leaves_nothing_of_itself(pair: Pair) -> None:
    descriptor = pair.describe()  # what comes with the first one stays
    pair.owner.revoke(descriptor)
    before = [int(name) for name in os.listdir("/proc/self/fd")]
    tried = range(3, max(before) + 12)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    errors: list[str] = []
    try:
        for limit in tried:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
            try:
                pair.owner.revoke(pair.describe())
            except TransportUnavailable as error:
                errors.append(error.message)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all("Too many open files" in message for message in errors)
    assert 3 < len(errors) < len(tried)
    assert pair.owner.statistics().num_grants == 0
    assert pair.owner.statistics().num_connections == 0
    assert len(pair.owner._links._boards._boards) == 1
    assert len(pair.owner._links._boards._boards[0].free) == BOARD_NBYTES // 8
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= len(before), WAIT_S)


def test_no_thread_and_no_descriptor_without_links(pair: Pair) -> None:
    before = num_descriptors()
    plain = pair.owner.describe(pair.owned)
    pair.attach(plain, None)
    assert (link_threads(), num_descriptors()) == (0, before)
    descriptor, remote = pair.linked()
    assert link_threads() == 2
    assert pair.owner.statistics().num_connections == 1
    remote.close()
    pair.owner.revoke(descriptor)
    eventually(lambda: link_threads() == 0, WAIT_S)
    # One page of grants stays with the owner.
    eventually(lambda: num_descriptors() == before + 1, WAIT_S)


def test_idle_links_cost_no_time(pair: Pair) -> None:
    remotes = [pair.linked()[1] for _ in range(20)]
    before_s = time.process_time()
    threading.Event().wait(0.2)
    assert time.process_time() - before_s < 0.01
    assert len(remotes) == 20


def test_owner_notices_at_once_that_a_peer_died(pair: Pair) -> None:
    descriptor, remote = pair.linked()
    assert pair.owner.is_attached(descriptor)
    assert remote.link is not None
    died_s = time.monotonic()
    remote.link._end.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]  # as the kernel does
    eventually(lambda: pair.owner.statistics().num_peers_lost == 1, 1.0)
    assert time.monotonic() - died_s < 1.0
    assert not pair.owner.is_attached(descriptor)


def test_peer_that_says_bye_is_not_lost(pair: Pair) -> None:
    descriptor, remote = pair.linked()
    remote.close()
    eventually(lambda: not pair.owner.is_attached(descriptor), WAIT_S)
    assert pair.owner.statistics().num_peers_lost == 0


def test_peer_that_never_came_is_not_lost(pair: Pair) -> None:
    descriptor = pair.describe()
    os.close(pair.owner.link(descriptor))
    eventually(lambda: not pair.owner.is_attached(descriptor), WAIT_S)
    assert pair.owner.statistics().num_peers_lost == 0


def test_owner_that_takes_a_grant_back_is_not_lost(pair: Pair) -> None:
    descriptor, remote = pair.linked()
    pair.owner.revoke(descriptor)
    for _ in range(2):
        with pytest.raises(GrantRefused):
            pair.pull(remote, note=b"n")
    eventually(lambda: link_threads() == 0, WAIT_S)
    assert not remote.lost
    assert pair.reader.statistics().num_peers_lost == 0


def test_owner_that_closes_in_order_takes_its_grants_back(pair: Pair) -> None:
    _, remote = pair.linked()
    pair.owner.close()
    with pytest.raises(GrantRefused):
        pair.pull(remote)


def test_owner_that_dies_is_lost_for_transfers_and_notes(pair: Pair) -> None:
    descriptor, remote = pair.linked()
    link = pair.owner._links._links[descriptor.capability]
    watcher = pair.owner._watcher
    watcher.remove(link.end.fileno())
    for thread in watcher._ending:  # it may be hearing the greeting, and would take the grant back
        thread.join(WAIT_S)
    link.end.close()  # as the kernel does; the page of grants stays as it was
    eventually(lambda: remote.lost, WAIT_S)
    with pytest.raises(PeerLost, match=f"process {os.getpid()} on this host"):
        pair.pull(remote)
    assert pair.reader.statistics().num_peers_lost == 1
    assert remote.peer == f"process {os.getpid()} on this host"


def test_note_that_the_owner_takes_too_late_fails_its_transfer(pair: Pair) -> None:
    descriptor, remote = pair.linked()
    owners = pair.owner._links._links[descriptor.capability]

    def tell_until_full() -> None:
        for _ in range(10_000):
            pair.pull(remote, note=bytes(256), deadline_s=time.monotonic() + 0.2)

    with owners.lock:  # so it does not listen
        with pytest.raises(TransferTimedOut):
            tell_until_full()
        assert pair.reader.statistics().num_timed_out == 1
    eventually(lambda: len(pair.heard) == pair.reader.statistics().num_pulls, WAIT_S)


def test_many_notes_from_many_threads_are_all_heard_once(pair: Pair) -> None:
    _, remote = pair.linked()
    num_each = 4 * MAX_PACKETS_A_TURN

    def tell(thread: int) -> None:
        for number in range(num_each):
            pair.pull(remote, note=struct.pack("ii", thread, number))

    threads = [threading.Thread(target=tell, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    eventually(lambda: len(pair.heard) == 3 * num_each, WAIT_S)
    counts = Counter(completion.note for completion in pair.heard)
    assert set(counts.values()) == {1}
    assert pair.owner.statistics().num_served == 3 * num_each
    assert pair.owner.statistics().served_nbytes == 3 * num_each * 100


def test_link_is_for_one_peer_and_once(pair: Pair) -> None:
    descriptor = pair.describe()
    link_fd = pair.owner.link(descriptor)
    with pytest.raises(TransportUnavailable, match="for one peer"):
        pair.owner.link(descriptor)
    pair.attach(descriptor, link_fd)
    with pytest.raises(BadDescriptor, match="attached once"):
        pair.attach(descriptor, link_fd)
    os.close(link_fd)
    with pytest.raises(TransportUnavailable):
        pair.owner.link(pair.owner.describe(pair.owned))


def test_without_a_link_nobody_can_be_told(pair: Pair) -> None:
    remote = pair.attach(pair.owner.describe(pair.owned), None)
    with pytest.raises(TransportUnavailable, match="on_done"):
        pair.pull(remote, note=b"n")
    assert not any(pair.local.buffer)


def test_what_is_no_link_is_refused(pair: Pair) -> None:
    descriptor = pair.describe()
    before = num_descriptors()
    stream, _other = socket.socketpair()
    empty, _far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reading, writing = os.pipe()
    with stream, _other, empty, _far:
        for wrong in (stream.fileno(), empty.fileno(), reading, 1_000_000):
            with pytest.raises(BadDescriptor):
                pair.attach(descriptor, wrong)
    os.close(reading)
    os.close(writing)
    assert pair.reader.statistics().num_attached == 0
    eventually(lambda: num_descriptors() == before, WAIT_S)


WELCOME = struct.Struct(">cB16sQQIQ")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"kind": b"X"}, BadDescriptor),
        ({"version": 9}, BadDescriptor),
        ({"capability": bytes(16)}, GrantRefused),
        ({"slot": 512}, BadDescriptor),
        ({"serial": 0}, BadDescriptor),
        ({"serial": 7}, GrantRefused),
        ({"cut": 1}, BadDescriptor),
        ({"board": False}, BadDescriptor),
    ],
    ids=str,
)
def test_welcome_that_is_wrong_opens_nothing(
    pair: Pair, change: dict[str, object], error: type[Exception]
) -> None:
    descriptor = pair.owner.describe(pair.owned)
    board = os.memfd_create("board", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(board, 4096)
    fcntl.fcntl(board, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    os.pwrite(board, (5).to_bytes(8, "little"), 0)
    values = {"kind": b"L", "version": 1, "capability": descriptor.capability, "epoch": 0}
    values |= {"generation": 0, "slot": 0, "serial": 5}
    words = {**values, **{name: value for name, value in change.items() if name in values}}
    packet = WELCOME.pack(*words.values())[: -1 if "cut" in change else None]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = num_descriptors()
    with ours, theirs:
        socket.send_fds(ours, [packet], [board] if change.get("board", True) else [])
        with pytest.raises(error):
            pair.attach(descriptor, theirs.fileno())
    os.close(board)
    assert num_descriptors() == before - 3
    assert link_threads() == 0


def raw_peer(pair: Pair) -> tuple[RegionDescriptor, socket.socket]:
    """A peer's end in the hands of somebody who does not keep to the words."""
    descriptor = pair.describe()
    end = socket.socket(fileno=pair.owner.link(descriptor))
    end.settimeout(WAIT_S)
    _, fds, _, _ = socket.recv_fds(end, 64, 1)
    os.close(fds[0])
    return descriptor, end


NOTE = struct.Struct(">cBQ")


@pytest.mark.parametrize(
    "packets",
    [
        [b"X"],
        [b"H" * 2],
        [b"H", b"N"],
        [b"H", NOTE.pack(b"N", 2, 5)],
        [b"H", NOTE.pack(b"N", 0, 5) + bytes(257)],
        [b"H", bytes(5000)],
        [NOTE.pack(b"N", 0, 5)],
    ],
    ids=["unknown", "long hello", "short", "flags", "long note", "huge", "no hello"],
)
def test_nonsense_ends_its_link_and_no_other(pair: Pair, packets: list[bytes]) -> None:
    _, polite = pair.linked()
    descriptor, end = raw_peer(pair)
    with end:
        for packet in packets:
            end.send(packet)
        eventually(lambda: not pair.owner.is_attached(descriptor), WAIT_S)
        with contextlib.suppress(ConnectionError):
            assert end.recv(10) == b""
    assert pair.owner.statistics().refused_by_reason == (("BAD_FRAME", 1),)
    pair.pull(polite, note=b"still heard")
    eventually(lambda: [c.note for c in pair.heard] == [b"still heard"], WAIT_S)


def test_descriptors_that_a_peer_pushes_upon_the_owner_are_dropped(pair: Pair) -> None:
    _, end = raw_peer(pair)
    before = num_descriptors()
    with end:
        for _ in range(10):
            socket.send_fds(end, [b"H"], [end.fileno()] * 5)
        end.send(NOTE.pack(b"N", 1, (1 << 64) - 1) + b"end")
        eventually(lambda: pair.heard, WAIT_S)
        assert num_descriptors() == before
    assert pair.heard[0].nbytes == (1 << 64) - 1, "what a peer says it moved is what it says"


def test_peer_that_talks_without_end_keeps_nobody_else_waiting(pair: Pair) -> None:
    _, polite = pair.linked()
    _, end = raw_peer(pair)
    end.send(b"H")
    stop = threading.Event()

    def talk() -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                end.send(NOTE.pack(b"N", 0, 1) + b"noise")

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        pair.pull(polite, note=b"me too")
        eventually(lambda: any(c.note == b"me too" for c in list(pair.heard)), WAIT_S)
    finally:
        stop.set()
        talker.join(WAIT_S)
        end.close()


def test_more_grants_than_a_page_holds(pair: Pair) -> None:
    descriptors = [pair.linked() for _ in range(4)]
    many = [pair.describe() for _ in range(520)]
    late, remote = pair.linked()
    pair.pull(remote)
    for descriptor in many:
        pair.owner.revoke(descriptor)
    for _, early in descriptors:
        pair.pull(early)
    pair.owner.revoke(late)
    again = pair.linked()
    with pytest.raises(GrantRefused):
        pair.pull(remote)  # its place is another's now
    pair.pull(again[1])


def test_region_closed_while_its_note_waits_says_so(pair: Pair) -> None:
    _, remote = pair.linked()
    assert remote.link is not None
    remote.link.close()
    with pytest.raises(TransportClosed):
        remote.link.tell(1, is_push=False, note=b"n", deadline_s=FAR_S)


def test_reading_grant_cannot_be_attached_for_writing(pair: Pair) -> None:
    with pytest.raises(RegionReadOnly):
        pair.reader.attach(pair.owner.describe(pair.owned), fd=pair.fd, writable=True)


@pytest.mark.parametrize(
    "extra",
    [
        b"x",
        bytes(16),
        struct.pack(">QQ", 0, NBYTES + 1),
        struct.pack(">QQ", (1 << 64) - 1, 2),
        struct.pack(">QQ", 0, 1) * (MAX_NUM_RANGES + 1),
    ],
    ids=["cut", "empty range", "too long", "overflow", "too many"],
)
def test_descriptor_with_wrong_ranges_is_refused(pair: Pair, extra: bytes) -> None:
    descriptor = pair.owner.describe(pair.owned)
    with pytest.raises(BadDescriptor):
        pair.attach(dataclasses.replace(descriptor, extra=extra), None)


def test_place_that_is_given_anew_is_not_the_old_grant(pair: Pair) -> None:
    descriptor, remote = pair.linked()
    pair.owner.revoke(descriptor)
    _, again = pair.linked()
    with pytest.raises(GrantRefused):
        pair.pull(remote)
    pair.pull(again)


def test_peer_is_heard_for_so_many_packets_in_one_go(pair: Pair) -> None:
    descriptor, end = raw_peer(pair)
    link = pair.owner._links._links[descriptor.capability]
    pair.owner._watcher.remove(link.end.fileno())
    with end:
        end.send(b"H")
        for _ in range(2 * MAX_PACKETS_A_TURN):
            end.send(NOTE.pack(b"N", 0, 1))
        pair.owner._links._receive(link)
        assert len(pair.heard) == MAX_PACKETS_A_TURN - 1
