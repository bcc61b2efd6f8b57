"""A `tcp` owner against peers that forge, replay, lie and talk nonsense: it refuses, counts, gives nothing, lives on.

One owner in a process of its own serves all of these. Whatever a test did, at its end the owner still serves who asks
well, holds no connection of the test, and no byte that was not granted was given or written.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from snowskin.transport.api import Range, RegionDescriptor
from snowskin.transport.errors import TransportError
from snowskin.transport.frames import (
    MAX_DATA_NBYTES,
    MAX_RANGES,
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
from tests.fuzz.targets import parsed
from tests.support.raw_tcp import HELLO, WELCOME, RawReader, ask_of, changed, head, reachable
from tests.support.tcp_pair import Reader
from tests.support.transfer_child import TestMemory, TransferChild, has_canaries
from tests.support.waiting import eventually

NBYTES = 1 << 20
FIRST, SECOND = Range(4096, 65_536), Range(200_000, 1_000)
GRANTED = (FIRST, SECOND)
EPOCH, GENERATION = 5, 3
SETTLE_S = 5.0
LAST = (1 << 64) - 1


@pytest.fixture(scope="module")
def memory():
    with TestMemory(NBYTES, granted=GRANTED, seed=11) as made:
        yield made


@pytest.fixture(scope="module")
def owner(memory):
    with TransferChild("tcp", memory) as child:
        yield child


def granted(owner, **values):
    return owner.describe(**{"ranges": GRANTED, "epoch": EPOCH, "generation": GENERATION, **values})


@pytest.fixture
def grant(owner):
    """For reading; the tests of this file have each their own."""
    descriptor = granted(owner)
    yield descriptor
    owner.ask("revoke", descriptor=descriptor.to_bytes().hex())


@pytest.fixture(autouse=True)
def _unharmed(owner, memory):
    before = owner.statistics()
    num_threads, num_sockets = owner.threads(), owner.sockets()
    yield
    assert memory.canaries_are_intact
    descriptor = granted(owner)
    with RawReader(reachable(descriptor)) as reader:
        data, fail = reader.pull(descriptor, GRANTED)
    assert fail is None
    assert data == b"".join(memory.pattern(*each).tobytes() for each in GRANTED)
    owner.ask("revoke", descriptor=descriptor.to_bytes().hex())
    eventually(
        lambda: owner.statistics()["num_connections"] == before["num_connections"],
        SETTLE_S,
        "connections end",
    )
    eventually(lambda: owner.sockets() <= num_sockets, SETTLE_S, "descriptors are closed")
    eventually(lambda: owner.threads() <= num_threads + 1, SETTLE_S, "threads end")


def refusals(owner, before, reason):
    """How many more of a kind the owner counted."""
    now, old = owner.statistics()["refused_by_reason"], before["refused_by_reason"]
    return now.get(reason, 0) - old.get(reason, 0)


def flipped(data: bytes, at: int, mask: int = 1) -> bytes:
    changed_data = bytearray(data)
    changed_data[at] ^= mask
    return bytes(changed_data)


FORGED = {
    "first bit": lambda grant: changed(grant, capability=flipped(grant.capability, 0)),
    "last bit": lambda grant: changed(grant, capability=flipped(grant.capability, 15)),
    "zeros": lambda grant: changed(grant, capability=bytes(16)),
    "half": lambda grant: changed(grant, capability=grant.capability[:8] + bytes(8)),
    "the epoch before": lambda grant: changed(grant, epoch=EPOCH - 1),
    "an epoch to come": lambda grant: changed(grant, epoch=LAST),
    "the generation before": lambda grant: changed(grant, generation=GENERATION - 1),
    "a generation to come": lambda grant: changed(grant, generation=GENERATION + 1),
}


@pytest.mark.parametrize("is_push", [False, True])
def test_forged_grants_are_refused_and_say_no_more_than_unknown_ones(owner, grant, is_push):
    answers = set()
    before = owner.statistics()
    revoked = granted(owner, writable=True)
    owner.ask("revoke", descriptor=revoked.to_bytes().hex())
    with RawReader(reachable(grant)) as reader:
        for forged in [*(forge(grant) for forge in FORGED.values()), revoked]:
            data, fail = reader.pull(forged, [FIRST], is_push=is_push)
            assert data == b""
            answers.add(fail)
        if not is_push:
            assert reader.pull(grant, [FIRST])[1] is None, "the connection lives"
    (answer,) = answers
    assert answer.reason == "GRANT_REFUSED"
    assert refusals(owner, before, "GRANT_REFUSED") == len(FORGED) + 1


OUT_OF_BOUNDS: list[list[tuple[int, int]]] = [
    [(FIRST.offset - 1, 2)],
    [(FIRST.offset + FIRST.nbytes - 1, 2)],
    [(FIRST.offset, SECOND.offset + SECOND.nbytes - FIRST.offset)],  # over the gap
    [(0, 1)],
    [(NBYTES - 1, 1)],
    [(NBYTES, 1)],
    [(0, NBYTES)],
    [(LAST, 1)],
    [(LAST, LAST)],
    [(FIRST.offset, LAST)],
    [(FIRST.offset, (1 << 64) - FIRST.offset)],  # its end is 2**64
    [(FIRST.offset, 0)],
    [FIRST, (SECOND.offset + SECOND.nbytes, 1)],  # a good one first
    [*[SECOND] * 100, (0, 1)],
]


@pytest.mark.parametrize("is_push", [False, True])
def test_ranges_that_were_not_granted_are_refused_before_a_byte_moves(owner, memory, is_push):
    before = owner.statistics()
    descriptor = granted(owner, writable=is_push)
    with RawReader(reachable(descriptor)) as reader:
        for ranges in OUT_OF_BOUNDS:
            reader.say(ask_of(descriptor, ranges, is_push=is_push))
            answer = reader.hear()
            assert isinstance(answer, Fail), (ranges, answer)
            assert (answer.reason, answer.op) == ("OUT_OF_BOUNDS", 1), ranges
        assert refusals(owner, before, "OUT_OF_BOUNDS") == len(OUT_OF_BOUNDS)
        if not is_push:
            assert reader.pull(descriptor, [FIRST], op=9) == (
                memory.pattern(*FIRST).tobytes(),
                None,
            )


def test_a_push_into_a_grant_for_reading_is_refused(owner, grant, memory):
    before = owner.statistics()
    with RawReader(reachable(grant)) as reader:
        for descriptor in (grant, changed(grant, writable=True)):  # what it says is not what counts
            reader.say(ask_of(descriptor, [FIRST], is_push=True))
            assert reader.hear().reason == "REGION_READ_ONLY"
    assert refusals(owner, before, "REGION_READ_ONLY") == 2
    assert memory.bytes_at(*FIRST) == memory.pattern(*FIRST).tobytes()


def test_a_replayed_request_is_worth_what_the_grant_still_is(owner, memory):
    descriptor = granted(owner)
    said = encode(HELLO) + encode(ask_of(descriptor, [FIRST]))
    for _ in range(2):
        with RawReader(reachable(descriptor), hello=False) as reader:
            reader.send(said)
            assert isinstance(reader.hear(), Welcome)
            assert reader.transfer(FIRST.nbytes) == (memory.pattern(*FIRST).tobytes(), None)
    owner.ask("revoke", descriptor=descriptor.to_bytes().hex())
    with RawReader(reachable(descriptor), hello=False) as reader:
        reader.send(said)
        assert isinstance(reader.hear(), Welcome)
        assert reader.hear().reason == "GRANT_REFUSED"


def test_an_expired_grant_is_refused_and_a_renewed_one_is_not(owner):
    before = owner.statistics()
    expired, renewed = (granted(owner, expires_in_s=0.2) for _ in range(2))
    owner.ask("renew", descriptor=renewed.to_bytes().hex(), expires_in_s=60.0)
    with RawReader(reachable(expired)) as reader:

        def has_expired():
            return reader.pull(expired, [SECOND])[1]

        assert eventually(has_expired, 2.0).reason in ("REGION_EXPIRED", "GRANT_REFUSED")
        assert reader.pull(renewed, [SECOND])[1] is None
        forged = changed(expired, expires_in_s=1e9)  # the life that it says is not the one it has
        assert reader.pull(forged, [SECOND])[1].reason in ("REGION_EXPIRED", "GRANT_REFUSED")
    counted = refusals(owner, before, "REGION_EXPIRED") + refusals(owner, before, "GRANT_REFUSED")
    assert counted == 2


def test_overlapping_ranges_are_read_in_order_and_written_nowhere_else(owner, memory):
    descriptor = granted(owner, writable=True)
    overlapping = [(4096, 3000), (5000, 3000), (4096, 3000), (4097, 1)]
    with RawReader(reachable(descriptor)) as reader:
        data, fail = reader.pull(descriptor, overlapping)
        assert fail is None
        assert data == b"".join(memory.pattern(*each).tobytes() for each in overlapping)
        nbytes = sum(size for _, size in overlapping)
        reader.say(ask_of(descriptor, overlapping, is_push=True, op=2))
        assert reader.hear() == Clear(op=2)
        reader.send(encode(Data(op=2, nbytes=nbytes)) + bytes(nbytes))
        assert reader.hear() == Done(op=2, note=b"")
    try:
        assert memory.bytes_at(4096, 3904) == bytes(3904)
        after = memory.pattern(*FIRST).tobytes()[3904:]
        assert memory.bytes_at(8000, len(after)) == after
        assert memory.canaries_are_intact
    finally:
        memory.fill()


@pytest.mark.parametrize("is_push", [False, True])
def test_a_request_cut_anywhere_is_no_request(owner, grant, is_push):
    said = encode(HELLO) + encode(ask_of(grant, GRANTED, is_push=is_push))
    hello_nbytes = len(encode(HELLO))
    ends = [0, 1, 15, 16, 17, hello_nbytes - 1, hello_nbytes, hello_nbytes + 15]
    for end in [*ends, *range(hello_nbytes + 16, len(said), 7), len(said) - 1]:
        with RawReader(reachable(grant), hello=False) as reader:
            reader.send(said[:end])
            reader.socket.shutdown(1)
            heard = reader.rest()
        assert len(heard) <= len(encode(WELCOME)) + 16 + 1200, f"an answer to {end} bytes"


def body_of(frame, changes=(), cut=0, behind=b""):
    """A frame with bytes of its body replaced, cut or lengthened, its head made to fit."""
    data = bytearray(encode(frame))
    for at, value in changes:
        data[16 + at] = value
    body = bytes(data[16 : len(data) - cut]) + behind
    return head(data[0], op=struct.unpack_from(">I", data, 4)[0], nbytes=len(body)) + body


def nonsense(grant) -> dict[str, tuple[bool, bytes]]:
    """What breaks the protocol: after a hello or instead of one."""
    pull = ask_of(grant, [FIRST])
    push = pull._replace(is_push=True)
    ranges_at = 16 + 8 + 8 + 4 + 1 + 1 + 2
    return {
        "nothing of ours": (False, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"),
        "TLS": (False, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)),
        "zeros": (False, bytes(64)),
        "another magic": (False, body_of(HELLO, [(0, ord("S"))])),
        "only versions to come": (False, encode(replace(HELLO, min_version=2, max_version=9))),
        "only versions that were": (False, encode(replace(HELLO, min_version=0, max_version=0))),
        "versions in disorder": (False, body_of(HELLO, [(9, 9)])),
        "a name that is not all there": (False, body_of(HELLO, cut=1)),
        "more than a name": (False, body_of(HELLO, behind=b"x")),
        "a name too long": (False, head(1, nbytes=18 + 129) + encode(HELLO)[16:]),
        "a pull first": (False, encode(pull)),
        "a ping first": (False, encode(Ping(op=1))),
        "payload first": (False, encode(Data(op=1, nbytes=5)) + b"12345"),
        "a second hello": (True, encode(HELLO)),
        "a welcome": (True, encode(WELCOME)),
        "a clear": (True, encode(Clear(op=1))),
        "a fail": (True, encode(Fail(op=1, reason="X", retry_after_ms=0, message=""))),
        "payload for nothing": (True, encode(Data(op=1, nbytes=5)) + b"12345"),
        "done with nothing": (True, encode(Done(op=1, note=b""))),
        "kind 0": (True, head(0)),
        "kind 11": (True, head(11)),
        "kind 255": (True, head(255)),
        "a flag": (True, head(Kind.PING, flags=1)),
        "what is zero is not": (True, head(Kind.PING, zero=1)),
        "a ping with a body": (True, head(Kind.PING, nbytes=1) + b"x"),
        "a frame of 2**64": (True, head(Kind.PULL, op=1, nbytes=LAST)),
        "payload of 2**63": (True, head(Kind.DATA, op=1, nbytes=1 << 63)),
        "payload over the most": (True, head(Kind.DATA, op=1, nbytes=MAX_DATA_NBYTES + 1)),
        "empty payload": (True, head(Kind.DATA, op=1)),
        "op 0": (True, body_of(pull._replace(op=0))),
        "no ranges": (True, body_of(pull._replace(ranges=()))),
        "too many ranges": (True, body_of(pull._replace(ranges=(SECOND,) * (MAX_RANGES + 1)))),
        "fewer ranges than it says": (True, body_of(pull, [(ranges_at + 3, 2)])),
        "more ranges than it says": (True, body_of(pull, behind=bytes(16))),
        "a billion ranges": (True, body_of(pull, [(ranges_at, 0x40)])),
        "half a range": (True, body_of(pull, cut=8)),
        "a pull with a note": (True, body_of(pull._replace(note=b"note"))),
        "a note too long": (True, body_of(push._replace(note=bytes(257)))),
        "no time": (True, body_of(pull._replace(timeout_ms=0))),
        "too much time": (True, body_of(pull._replace(timeout_ms=3_600_001))),
        "a class that is none": (True, body_of(pull._replace(traffic=3))),
        "an unknown flag in it": (True, body_of(pull, [(16 + 8 + 8 + 4 + 1, 0x82)])),
        "an empty request": (True, head(Kind.PULL, op=1)),
    }


def test_what_breaks_the_protocol_ends_the_connection_and_nothing_else(owner, grant):
    with RawReader(reachable(grant)) as bystander:
        for what, (greets, data) in nonsense(grant).items():
            before = owner.statistics()
            with RawReader(reachable(grant), hello=greets) as reader:
                reader.send(data)
                answer = reader.hear(1.0)  # at once, not when a time-out comes
                if answer is not None:
                    assert isinstance(answer, Fail), (what, answer)
                    assert (answer.op, answer.reason) == (0, "BAD_FRAME"), what
                assert reader.rest() == b"", what
            assert refusals(owner, before, "BAD_FRAME") == 1, f"not counted: {what}"
            assert bystander.pull(grant, [SECOND])[1] is None, what


def disorder(grant) -> dict[str, bytes]:
    """What breaks the protocol in the middle of a push, after its CLEAR; FIRST is pushed as op 1."""
    return {
        "payload of another op": encode(Data(op=2, nbytes=5)) + b"12345",
        "more payload than was asked for": encode(Data(op=1, nbytes=FIRST.nbytes + 1))
        + bytes(FIRST.nbytes + 1),
        "done, and it is not": encode(Done(op=1, note=b"")),
        "another push": encode(ask_of(grant, [FIRST], is_push=True, op=2)),
        "a pull": encode(ask_of(grant, [FIRST], op=2)),
        "a hello": encode(HELLO),
        "no frame": b"\xff" * 64,
    }


def test_a_push_in_disorder_writes_nothing_that_was_not_granted(owner, memory):
    descriptor = granted(owner, writable=True)
    for what, data in disorder(descriptor).items():
        before = owner.statistics()
        with RawReader(reachable(descriptor)) as reader:
            reader.say(ask_of(descriptor, [FIRST], is_push=True))
            assert reader.hear() == Clear(op=1)
            reader.send(data)
            answer = reader.hear()
            assert answer is None or (isinstance(answer, Fail) and answer.reason == "BAD_FRAME"), (
                what
            )
            assert reader.is_over(SETTLE_S), what
        assert memory.canaries_are_intact, what
        assert refusals(owner, before, "BAD_FRAME") == 1, f"not counted: {what}"
        eventually(lambda b=before: failed(owner, b) == 1, SETTLE_S, f"failed: {what}")
    memory.fill()


def failed(owner, before):
    return owner.statistics()["num_served_failed"] - before["num_served_failed"]


def test_a_second_request_before_the_first_is_through_is_refused_or_waits_its_turn(
    owner, grant, memory
):
    with RawReader(reachable(grant)) as reader:
        reader.send(encode(ask_of(grant, [FIRST], op=1)) + encode(ask_of(grant, [SECOND], op=2)))
        data, fail = reader.transfer(FIRST.nbytes)
        assert not has_canaries(data)
        if fail is None and data == memory.pattern(*FIRST).tobytes():
            frame = reader.hear()
            assert frame is None or isinstance(frame, Data | Fail)
            if isinstance(frame, Data):
                assert reader.payload(frame.nbytes) == memory.pattern(*SECOND).tobytes()


def test_pings_are_answered_while_idle(owner, grant):
    with RawReader(reachable(grant)) as reader:
        for op in (0, 1, (1 << 32) - 1):
            reader.say(Ping(op=op))
            assert reader.hear() == Pong(op=op)


def test_a_descriptor_with_any_bit_flipped_opens_nothing_else(owner, memory, grant):
    told = grant.to_bytes()
    host_at = told.index(b"127.0.0.1")
    of_its_region = memory.pattern(*SECOND).tobytes()
    with TestMemory(NBYTES) as landing, Reader(landing, connect_timeout_s=0.2) as reader:
        for at in range(len(told) * 8):
            if host_at <= at // 8 < host_at + len("127.0.0.1"):
                continue  # a name that has to be looked up
            landing.fill()
            try:
                damaged = RegionDescriptor.from_bytes(flipped(told, at // 8, 1 << at % 8))
                reader.move(damaged, SECOND.nbytes, remote_offset=SECOND.offset, within_s=0.5)
            except TransportError:
                assert landing.canaries_are_intact, f"bit {at}"
            else:
                assert landing.bytes_at(0, SECOND.nbytes) == of_its_region, f"bit {at}"


@st.composite
def hostile_streams(draw):
    """Frames of all kinds, damaged in places, cut, in any order."""
    return draw(
        st.lists(
            st.tuples(
                st.sampled_from(["hello", "pull", "push", "data", "done", "ping", "junk"]),
                st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=3),
                st.integers(0, 20),
                st.sampled_from(
                    [tuple(FIRST), tuple(SECOND), (0, NBYTES), (4095, 2), (LAST, LAST), (4096, 0)]
                ),
            ),
            max_size=6,
        )
    )


def spelled(descriptor, part) -> bytes:
    kind, edits, cut, where = part
    data = bytearray(
        {
            "hello": encode(HELLO),
            "pull": encode(ask_of(descriptor, [FIRST, where], timeout_ms=300)),
            "push": encode(ask_of(descriptor, [where], is_push=True, timeout_ms=300)),
            "data": encode(Data(op=1, nbytes=100)) + bytes(100),
            "done": encode(Done(op=1, note=b"note")),
            "ping": encode(Ping(op=3)),
            "junk": bytes(40),
        }[kind]
    )
    for at, value in edits:
        data[at % len(data)] = value
    return bytes(data[: max(len(data) - cut, 1)]) if edits else bytes(data)


@pytest.mark.timeout(600)  # by night ten thousand examples
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(parts=hostile_streams(), greets=st.booleans())
def test_no_stream_of_frames_gets_a_byte_that_was_not_granted(owner, memory, grant, parts, greets):
    with RawReader(reachable(grant), hello=greets) as reader:
        reader.send(b"".join(spelled(grant, part) for part in parts))
        reader.socket.shutdown(1)
        heard = reader.rest()
    found, _ = parsed([heard])
    assert not any(has_canaries(part) for part in found if isinstance(part, bytes))
    for at in (0, FIRST.offset - 16, SECOND.offset - 16, SECOND.offset + SECOND.nbytes):
        assert memory.bytes_at(at, 16) not in heard  # nor in what was cut off
