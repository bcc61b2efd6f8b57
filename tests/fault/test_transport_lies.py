"""A `tcp` reader against owners that lie, stall and talk nonsense: typed errors in time, nothing lands elsewhere."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.api import RegionDescriptor, Run
from snowskin.transport.errors import (
    BadFrame,
    GrantRefused,
    OutOfBounds,
    PeerBusy,
    PeerLost,
    RegionExpired,
    RegionReadOnly,
    TransferTimedOut,
    TransportClosed,
    TransportError,
)
from snowskin.transport.frames import Clear, Data, Done, Fail, Hello, Kind, Ping, Pong, encode
from snowskin.transport.memory import Memfd
from snowskin.transport.registry import open_transport
from tests.support.raw_tcp import HELLO, WELCOME, RawOwner, greeted, head, next_ask
from tests.support.transfer_child import TestMemory

NBYTES = 256 * 1024
WANTED = 100_000
AT = 4096  # where it lands
WITHIN_S = 0.4  # a pull's deadline
GRACE_S = 0.5  # how much later its error may come on a busy machine
BYTES = bytes(range(100)) * (WANTED // 100)


@pytest.fixture
def landing():
    with TestMemory(NBYTES) as memory:
        yield memory


@pytest.fixture
def reader():
    transport = open_transport("tcp", listen=())
    yield transport
    transport.close()
    assert transport.statistics().num_connections == 0


def moved(reader, owner, landing, *, is_push=False, within_s=WITHIN_S, landed=b""):
    """One transfer with the lying owner: its error, and that it was in time and landed nowhere else."""
    remote = reader.attach(owner.descriptor(NBYTES, writable=is_push), writable=is_push)
    local = reader.register(Memfd(fd=landing.fd))
    runs = [Run(0, AT, WANTED)]
    began_s = time.monotonic()
    error = None
    try:
        if is_push:
            reader.push(local, remote, runs, deadline_s=began_s + within_s)
        else:
            reader.pull(remote, local, runs, deadline_s=began_s + within_s)
    except TransportError as caught:
        error = caught
    took_s = time.monotonic() - began_s
    assert took_s < within_s + GRACE_S, f"{took_s:.2f} s"
    remote.close()
    local.close()
    if landed:
        assert landing.bytes_at(AT, WANTED) == landed
    after = landing.array.copy()
    landing.fill()
    after[AT : AT + WANTED] = landing.array[AT : AT + WANTED]
    assert (after == landing.array).all(), "something landed where nobody asked for it"
    if isinstance(error, PeerLost):
        host, port = owner.address
        assert f"{host}:{port}" in str(error), f"names no peer: {error}"
    return error


def after_hello(*frames_or_bytes):
    """An owner that answers HELLO with these and stays silent."""

    def serve(stream):
        assert isinstance(stream.hear(), Hello)
        tell(stream, frames_or_bytes)
        stream.is_over(5.0)

    return serve


def after_ask(*frames_or_bytes, ends=""):
    """An owner that answers the request with these, and then stays silent, ends, or resets."""

    def serve(stream):
        if greeted(stream) is not None:
            tell(stream, frames_or_bytes)
            if ends == "reset":
                stream.reset()
            elif not ends:
                stream.is_over(5.0)

    return serve


def frame_of(nbytes, **promised):
    """An owner that promises something and then sends one frame of `nbytes`."""

    def serve(stream):
        if greeted(stream, replace(WELCOME, **promised)) is not None:
            tell(stream, [Data(op=1, nbytes=nbytes), bytes(nbytes)])
            stream.is_over(5.0)

    return serve


def tell(stream, frames_or_bytes):
    stream.send(b"".join(x if isinstance(x, bytes) else encode(x) for x in frames_or_bytes))


def fail(reason, op=1):
    return Fail(op=op, reason=reason, retry_after_ms=20, message="as it is told")


HALF = (Data(op=1, nbytes=WANTED // 2), BYTES[: WANTED // 2])
QUARTER = (Data(op=1, nbytes=WANTED // 4), BYTES[: WANTED // 4])
LOST = (PeerLost, TransferTimedOut)
BROKEN = (BadFrame, PeerLost)
PULLS: dict[str, Any] = {
    "ends at once": (lambda stream: None, PeerLost),
    "resets at once": (lambda stream: stream.reset(), PeerLost),
    "ends after the hello": (lambda stream: stream.hear(), PeerLost),
    "never welcomes": (after_hello(), LOST),
    "half a welcome": (after_hello(encode(WELCOME)[:20]), LOST),
    "another hello": (after_hello(HELLO), BROKEN),
    "a version to come": (after_hello(replace(WELCOME, version=2)), BROKEN),
    "version 0": (after_hello(replace(WELCOME, version=0)), BROKEN),
    "room for no range": (after_hello(replace(WELCOME, max_ranges=0)), BROKEN),
    "frames of no byte": (after_hello(replace(WELCOME, max_data_nbytes=0)), BROKEN),
    "frames of 4 GiB": (after_hello(replace(WELCOME, max_data_nbytes=(1 << 32) - 1)), BROKEN),
    "busy": (after_hello(fail("PEER_BUSY", 0)), PeerBusy),
    "not one of ours": (after_hello(b"HTTP/1.1 400 Bad Request\r\n\r\n"), BROKEN),
    "silence": (after_ask(), TransferTimedOut),
    "half, and silence": (after_ask(*HALF), TransferTimedOut),
    "a quarter, and the end": (after_ask(*QUARTER, ends="end"), PeerLost),
    "a quarter, and a reset": (after_ask(*QUARTER, ends="reset"), PeerLost),
    "half a head, and the end": (after_ask(encode(HALF[0])[:9], ends="end"), PeerLost),
    "more than was asked for": (
        after_ask(Data(op=1, nbytes=WANTED + 1), BYTES + b"x"),
        BROKEN,
    ),
    "more, in a second frame": (
        after_ask(*HALF, Data(op=1, nbytes=WANTED), BYTES),
        BROKEN,
    ),
    "more than it said at most": (frame_of(1001, max_data_nbytes=1000), BROKEN),
    "of another transfer": (after_ask(Data(op=7, nbytes=WANTED), BYTES), BROKEN),
    "empty payload": (after_ask(head(Kind.DATA, op=1)), BROKEN),
    "payload of 2**63": (after_ask(head(Kind.DATA, op=1, nbytes=1 << 63)), BROKEN),
    "done, and it is not": (after_ask(*HALF, Done(op=1, note=b"")), BROKEN),
    "clear, and it is no push": (after_ask(Clear(op=1)), BROKEN),
    "a request of its own": (after_ask(head(Kind.PULL, op=1, nbytes=56) + bytes(56)), BROKEN),
    "a pong that nobody asked for": (after_ask(Pong(op=1)), BROKEN),
    "junk": (after_ask(b"\xee" * 64), BROKEN),
    "refused": (after_ask(fail("GRANT_REFUSED")), GrantRefused),
    "expired": (after_ask(fail("REGION_EXPIRED")), RegionExpired),
    "out of bounds": (after_ask(fail("OUT_OF_BOUNDS")), OutOfBounds),
    "taken back half-way": (after_ask(*HALF, fail("GRANT_REFUSED")), GrantRefused),
    "closing": (after_ask(fail("TRANSPORT_CLOSED")), (PeerLost, TransportClosed)),
    "too late": (after_ask(fail("TRANSFER_TIMED_OUT")), TransferTimedOut),
    "a reason that nobody knows": (after_ask(fail("NO_MOOD")), TransportError),
    "a reason that is no word": (after_ask(fail("../../x")), BROKEN),
    "the refusal of another transfer": (after_ask(fail("GRANT_REFUSED", 9)), BROKEN),
    "the end of the connection": (after_ask(fail("BAD_FRAME", 0)), BROKEN),
}
PUSHES: dict[str, Any] = {
    "never clears": (after_ask(), TransferTimedOut),
    "clears another": (after_ask(Clear(op=9)), BROKEN),
    "done before the payload": (after_ask(Done(op=1, note=b"")), BROKEN),
    "payload instead": (after_ask(*HALF), BROKEN),
    "read-only": (after_ask(fail("REGION_READ_ONLY")), RegionReadOnly),
    "ends after the clear": (after_ask(Clear(op=1), ends="end"), PeerLost),
    "never done": (after_ask(Clear(op=1)), TransferTimedOut),
    "refuses half-way": (after_ask(Clear(op=1), fail("GRANT_REFUSED")), GrantRefused),
}


@pytest.mark.parametrize("what", PULLS)
def test_a_pull_from_an_owner_that_lies_fails_by_name_in_time(reader, landing, what):
    serve, expected = PULLS[what]
    with RawOwner(serve) as owner:
        error = moved(reader, owner, landing)
    assert isinstance(error, expected), repr(error)


@pytest.mark.parametrize("what", PUSHES)
def test_a_push_to_an_owner_that_lies_fails_by_name_in_time(reader, landing, what):
    serve, expected = PUSHES[what]
    with RawOwner(serve) as owner:
        error = moved(reader, owner, landing, is_push=True)
    assert isinstance(error, expected), repr(error)


@pytest.mark.parametrize("ends", ["end", "reset"])
def test_a_pull_that_broke_half_way_goes_on_where_it_was_and_only_once(reader, landing, ends):
    with RawOwner(after_ask(*HALF, ends=ends)) as owner:
        assert moved(reader, owner, landing, landed=BYTES) is None
        assert owner.num_connections == 2


def test_an_owner_that_drips_is_left_at_the_deadline(reader, landing):
    def serve(stream):
        if greeted(stream) is not None:
            stream.send(encode(Data(op=1, nbytes=WANTED)))
            while not stream.is_over(0.01):
                stream.send(b"x")

    with RawOwner(serve) as owner:
        assert isinstance(moved(reader, owner, landing), TransferTimedOut)


def test_an_owner_that_pings_for_ever_holds_nobody(reader, landing):
    def serve(stream):
        if greeted(stream) is not None:
            while not stream.is_over(0.001):
                stream.say(Ping(op=1))

    with RawOwner(serve) as owner:
        assert isinstance(moved(reader, owner, landing), (*BROKEN, TransferTimedOut))


def test_a_name_that_nobody_resolves_costs_no_more_than_the_deadline(reader, landing, monkeypatch):
    is_over = threading.Event()

    def resolve(*_arguments, **_values):
        is_over.wait(10 * WITHIN_S)
        raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    extra = Reachability(addresses=(Address("owner.example", 4711),)).to_bytes()
    descriptor = RegionDescriptor(scheme="tcp", capability=bytes(16), nbytes=NBYTES, extra=extra)
    with reader.register(Memfd(fd=landing.fd)) as local:
        remote = reader.attach(descriptor)
        began_s = time.monotonic()
        with pytest.raises((PeerLost, TransferTimedOut), match=r"owner\.example:4711"):
            reader.pull(remote, local, [Run(0, AT, WANTED)], deadline_s=began_s + WITHIN_S)
        assert time.monotonic() - began_s < WITHIN_S + GRACE_S
        is_over.set()


def test_what_an_owner_says_to_people_is_short_and_plain(reader, landing):
    said = Fail(op=1, reason="OUT_OF_BOUNDS", retry_after_ms=0, message="\x1b[2J\n\x00" + "x" * 900)
    with RawOwner(after_ask(said)) as owner:
        error = moved(reader, owner, landing)
    assert isinstance(error, OutOfBounds)
    assert str(error).isprintable(), "it goes into logs and onto terminals"


def test_an_honest_owner_is_heard_after_a_lying_one_on_the_same_address(reader, landing):
    asked = []

    def serve(stream):
        ask = greeted(stream)
        asked.append(ask)
        if len(asked) == 1:
            stream.send(b"\xee" * 64)
            return
        while ask is not None:
            stream.send(encode(Data(op=ask.op, nbytes=WANTED)) + BYTES)
            ask = next_ask(stream)

    with RawOwner(serve) as owner:
        assert isinstance(moved(reader, owner, landing), BROKEN)
        assert moved(reader, owner, landing, within_s=2.0) is None
    assert reader.statistics().num_pulls == 1
