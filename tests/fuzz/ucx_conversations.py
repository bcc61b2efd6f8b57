"""Whole conversations with our `ucx` ends, without UCX: a peer's messages in, and what must hold whatever they are.

Rules kept here: as in `conversations.py`. UCX's own wire is not fuzzed here; what reaches it unchecked is its business.

A conversation is a stream of messages, each as 1 kind, 1 op, 1 position (in 8ths of CHUNK_NBYTES; the top bit asks for
one-sided), 1 length, payload.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from snowskin.transport.api import RegionDescriptor, TrafficClass
from snowskin.transport.errors import BadDescriptor, BadFrame, TransportError
from snowskin.transport.frames import (
    Ask,
    Clear,
    Done,
    Fail,
    Frame,
    Ping,
    Pong,
    Welcome,
    encode,
)
from snowskin.transport.grants import GrantTable
from snowskin.transport.memory import region_of
from snowskin.transport.ordered import Order
from snowskin.transport.ucp.api import Span
from snowskin.transport.ucx.owner import Owner
from snowskin.transport.ucx.progress import Timer
from snowskin.transport.ucx.reader import Mailbox, Reader
from snowskin.transport.ucx.settings import UcxSettings
from snowskin.transport.ucx.transport import UcxRegion
from snowskin.transport.ucx.wire import (
    ONE_SIDED,
    Hello,
    MessageHead,
    MessageKind,
    Reach,
    Slice,
    decode_frame,
)
from snowskin.transport.words import Range
from tests.fuzz.conversations import (
    CANARY,
    CAPABILITIES,
    GRANTED,
    NBYTES,
    PLAIN,
    WANTED,
    Ledger,
    granted_memory,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SESSION = b"s" * 16
SETTINGS = UcxSettings(name="fuzz")
HELLO = Hello(
    capability=CAPABILITIES[0],
    epoch=7,
    generation=3,
    heartbeat_ms=1000,
    name="reader",
    address=b"where the reader is",
)


class Endpoint:
    """Keeps what is said; all of it is taken at once."""

    def __init__(self) -> None:
        self.said: list[tuple[MessageHead, bytes]] = []

    def send(
        self,
        header: bytes,
        payload: Sequence[Span],
        done: Callable[[None], object],
        *,
        wants_reply: bool = False,
    ) -> None:
        gathered = b"".join(ctypes.string_at(*span) for span in payload)
        self.said.append((MessageHead.decode(header, len(gathered)), gathered))
        done(None)

    def close(self, done: Callable[[None], object]) -> None:
        done(None)


class Thread:
    """The progress thread and its worker, without UCX; no time passes."""

    def __init__(self) -> None:
        self.endpoint = Endpoint()
        self.worker = self
        self.address = b"where this side is"
        self.delays_s: list[float] = []  # of the calls that are to come

    def connect(self, _address: bytes, _on_failure: object) -> Endpoint:
        return self.endpoint

    def later(self, delay_s: float, call: Callable[[], object]) -> Timer:
        self.delays_s.append(delay_s)
        return Timer(call)


def messages(
    session: bytes, stream: bytes, *, by_owner: bool = False
) -> Iterator[tuple[MessageHead, bytes]]:
    """What a stream of the fuzzer says."""
    while len(stream) >= 4:
        kind, op, position, nbytes = stream[:4]
        payload, stream = stream[4 : 4 + nbytes], stream[4 + nbytes :]
        kind = MessageKind(kind % len(MessageKind) + 1)
        place = (position & 0x7F) * 8 | (ONE_SIDED if position & 0x80 else 0)
        yield MessageHead(session, kind, op, place, by_owner), payload


def told(*said: tuple[MessageKind, int, int, bytes]) -> bytes:
    """The other way round, for seeds."""
    return b"".join(
        bytes([kind - 1, op, position, len(payload)]) + payload
        for kind, op, position, payload in said
    )


def with_payload(payload: bytes, take: Callable[[Span], object]) -> None:
    buffer = ctypes.create_string_buffer(payload, len(payload))
    take(Span(ctypes.addressof(buffer), len(payload)))


def owner(data: bytes) -> None:
    """A reader that was greeted says these messages to an owner."""
    memory, is_canary = granted_memory()
    region, grants, ledger, thread = region_of(memory), GrantTable(), Ledger(), Thread()
    for capability in CAPABILITIES:
        described = RegionDescriptor(
            scheme="ucx",
            capability=capability,
            nbytes=NBYTES,
            epoch=7,
            generation=3,
            writable=capability == CAPABILITIES[1],
        )
        grants.add(described, region, GRANTED, now_s=0.0)
    ours = Owner(
        lambda: thread,  # type: ignore[arg-type,return-value]
        SETTINGS,
        grants,
        ledger,
        lambda: 1.0,
        lambda call: call(),
    )
    hello = MessageHead(SESSION, MessageKind.HELLO, 0, 0)
    with_payload(HELLO.encode(), lambda span: ours.arrive(hello, span))
    assert ours.num_sessions == 1
    num_asked = 0
    for head, payload in messages(SESSION, data):
        num_asked += head.kind is MessageKind.FRAME
        with_payload(payload, functools.partial(ours.arrive, head))
    ours.close()
    assert ours.num_sessions == 0
    assert (memory[is_canary] == CANARY).all(), "written where nothing was granted"
    given = b"".join(
        payload for head, payload in thread.endpoint.said if head.kind is MessageKind.DATA
    )
    untouched = np.array_equal(memory, np.where(is_canary, CANARY, PLAIN))
    assert not untouched or CANARY not in given, "given what was not granted"
    assert ledger.counts["served"] + ledger.counts["failed"] <= num_asked
    grants.close()  # would wait for ever for a piece that was not ended
    region.close()


def reader(data: bytes, *, is_push: bool) -> None:
    """An owner says these messages to a reader with one transfer under way, op 1."""
    target = np.full(NBYTES, CANARY, dtype=np.uint8)
    local = region_of(target)
    thread = Thread()
    links = Reader(lambda: thread, SETTINGS)  # type: ignore[arg-type,return-value]
    described = RegionDescriptor(
        scheme="ucx", capability=CAPABILITIES[1], nbytes=NBYTES, epoch=7, generation=3
    )
    reach = Reach(name="owner", address=b"where the owner is")
    remote = UcxRegion(
        described, reach, writable=True, expires_at_s=1e9, forget=lambda _region: None
    )
    order = Order(
        remote, local, WANTED, not is_push, 1e9, 64, None, TrafficClass.PREFETCH, b"", None
    )
    ask = Ask(
        is_push=is_push,
        op=1,
        capability=CAPABILITIES[1],
        epoch=7,
        generation=3,
        timeout_ms=1000,
        traffic=1,
        wants_done=False,
        note=b"",
        ranges=tuple(Range(run.remote_offset, run.nbytes) for run in WANTED),
    )
    mailbox = Mailbox(order, reach, ask, 0)
    links.attach(reach.address)
    links.begin(mailbox)
    session = thread.endpoint.said[0][0].session
    for head, payload in messages(session, data, by_owner=True):
        with_payload(payload, functools.partial(links.arrive, head))
    links.close(TransportError("over"))
    assert links.num_links == 0
    items = list(mailbox._items)
    came = sum(item[1] for item in items if isinstance(item, tuple))
    if not is_push:
        assert all(isinstance(item, tuple) for item in items), "a pull waits for chunks alone"
    if is_push and items:
        assert isinstance(items[0], Clear), "a push waits for CLEAR first"
    assert came <= mailbox.total_nbytes, "more than was asked for"
    assert (target == CANARY).all(), "the progress thread lands nothing"
    local.close()


def reader_pulls(data: bytes) -> None:
    reader(data, is_push=False)


def reader_pushes(data: bytes) -> None:
    reader(data, is_push=True)


def words(data: bytes) -> None:
    """Heads, first words and frames, each out of any bytes."""
    for parse in (
        lambda: MessageHead.decode(data[:32], len(data) * 4096),
        lambda: Hello.decode(data),
        lambda: decode_frame(data),
    ):
        try:
            found = parse()
        except BadFrame:
            continue
        if isinstance(found, MessageHead):
            assert found.encode() == data[:32]


def reach(data: bytes) -> None:
    """The extra part of a descriptor: only what its owner sealed is opened."""
    described = replace(SEALED, extra=data)
    try:
        found = Reach.open(described)
    except BadDescriptor:
        assert data != SEALED.extra
        return
    assert found.seal(described) == data == SEALED.extra


def _sealed() -> RegionDescriptor:
    described = RegionDescriptor(
        scheme="ucx", capability=CAPABILITIES[0], nbytes=NBYTES, epoch=7, generation=3
    )
    slices = (Slice(4096, 1000, b"key one"), Slice(8192, NBYTES - 1000, b"key two"))
    ours = Reach(name="owner", address=b"where it is", over_anything=True, slices=slices)
    return replace(described, extra=ours.seal(described))


SEALED = _sealed()


def frame(said: Frame, position: int = 0) -> tuple[MessageKind, int, int, bytes]:
    return (MessageKind.FRAME, 0, position, encode(said))


PULL = Ask(
    is_push=False,
    op=1,
    capability=CAPABILITIES[0],
    epoch=7,
    generation=3,
    timeout_ms=1000,
    traffic=1,
    wants_done=True,
    note=b"",
    ranges=GRANTED,
)
PUSH = PULL._replace(
    capability=CAPABILITIES[1], is_push=True, note=b"note", ranges=(Range(70, 80),)
)
WELCOME = Welcome(
    version=1,
    epoch=7,
    max_ranges=4096,
    max_data_nbytes=1 << 20,
    idle_timeout_ms=5000,
    ack_timeout_ms=2000,
)
TAKEN, DATA, STOP = MessageKind.TAKEN, MessageKind.DATA, MessageKind.STOP
OWNER_SEEDS = [
    told(frame(PULL), (TAKEN, 1, 44, b""), frame(Done(op=1, note=b"note")), frame(Ping(op=2))),
    told(frame(PULL), frame(PULL), (STOP, 1, 0, b"")),
    told(frame(PULL, 0x80), frame(Done(op=1, note=b""))),
    told(frame(PULL._replace(epoch=6)), frame(PULL._replace(ranges=(Range(63, 2),)))),
    told(frame(PUSH), (DATA, 1, 0, bytes(64)), (DATA, 1, 8, bytes(16))),
    told(frame(PUSH), (DATA, 1, 0, bytes(80)), (DATA, 1, 0, bytes(80))),
]
READER_SEEDS = [
    told(frame(WELCOME), (DATA, 1, 0, bytes(120)), (DATA, 1, 15, bytes(30))),
    told(frame(WELCOME), frame(Clear(op=1)), (TAKEN, 1, 8, b""), frame(Done(op=1, note=b""))),
    told(
        frame(WELCOME),
        frame(Fail(op=1, reason="GRANT_REFUSED", retry_after_ms=0, message="no such grant")),
        frame(Pong(op=1)),
    ),
]
WORDS_SEEDS = [
    MessageHead(SESSION, MessageKind.DATA, 1, 4096).encode(),
    HELLO.encode(),
    encode(PULL),
    encode(PUSH),
    encode(WELCOME),
]
