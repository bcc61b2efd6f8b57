"""Whole conversations with our `tcp` ends, without a network: a peer's bytes in, and what must hold whatever they are.

Rules kept here: a canary is a byte that was not granted, or not asked for: none is ever said, none is ever overwritten;
nothing but the errors of the transport comes out; each conversation ends.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from snowskin.transport.api import PIECE_NBYTES, RegionDescriptor, Run, TrafficClass
from snowskin.transport.errors import TransportError
from snowskin.transport.frames import (
    HEAD_NBYTES,
    Clear,
    Data,
    Done,
    Fail,
    Hello,
    Kind,
    Pong,
    Welcome,
    encode,
)
from snowskin.transport.grants import GrantTable
from snowskin.transport.memory import region_of
from snowskin.transport.ordered import AttachedRegion, Order
from snowskin.transport.paths import Path
from snowskin.transport.tcp.connection import Connection
from snowskin.transport.tcp.reader import Job, pull, push
from snowskin.transport.tcp.serving import Phase, ServedConnection
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.words import Range

if TYPE_CHECKING:
    from collections.abc import Iterator

NBYTES = 1024
GRANTED = (Range(64, 256), Range(512, 100))
CAPABILITIES = (b"r" * 16, b"w" * 16)  # for reading; for writing too
CANARY, PLAIN = 0xC5, 0x11
CHUNK_NBYTES = 64
WANTED = (Run(64, 128, 100), Run(512, 700, 50))  # what the reader asks for, and where it lands
TAKEN_NBYTES = 50  # by the stream at once, of what an owner sends
TURNS = 10_000


class Ledger:
    """Counts as a transport does."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count_served(self, nbytes: int) -> None:
        self.counts["served"] += 1

    def count_served_failed(self) -> None:
        self.counts["failed"] += 1

    def count_refused(self, reason: str) -> None:
        self.counts[reason] += 1


def granted_memory() -> tuple[np.ndarray, np.ndarray]:
    """Memory with canaries where nothing is granted, and where those are."""
    is_canary = np.ones(NBYTES, dtype=bool)
    for offset, nbytes in GRANTED:
        is_canary[offset : offset + nbytes] = False
    memory = np.where(is_canary, CANARY, PLAIN).astype(np.uint8)
    return memory, is_canary


def owner(data: bytes) -> Counter[str]:
    """A reader says these bytes to an owner; the first one says in what parts, and after which of them time passes.

    What the owner counted, for those who look at a single conversation.
    """
    first, stream = (data[0] if data else 0), data[1:]
    part_nbytes, waits_at, is_rude = (first & 15) * 7 + 1, first >> 4 & 7, bool(first & 0x80)
    memory, is_canary = granted_memory()
    region, grants, ledger = region_of(memory), GrantTable(), Ledger()
    for capability in CAPABILITIES:
        described = RegionDescriptor(
            scheme="tcp",
            capability=capability,
            nbytes=NBYTES,
            epoch=7,
            generation=3,
            writable=capability == CAPABILITIES[1],
        )
        grants.add(described, region, GRANTED, now_s=0.0)
    settings = TcpSettings(chunk_nbytes=CHUNK_NBYTES)
    served = ServedConnection(grants, settings, ledger, peer="fuzz", now_s=0.0)
    parts = list(parts_of(stream, part_nbytes, is_rude=is_rude))
    said, num_heard = serve(served, parts, waits_at=waits_at)
    assert (memory[is_canary] == CANARY).all(), "written where nothing was granted"
    assert served.phase is Phase.OVER, f"it never ends: {served.phase}"
    assert served.transfer is None, "a transfer is left"
    payload = payload_of(said)
    assert CANARY not in payload or (memory != np.where(is_canary, CANARY, PLAIN)).any(), "given"
    assert ledger.counts["served"] + ledger.counts["failed"] <= num_heard
    region.close()
    return ledger.counts


def parts_of(stream: bytes, part_nbytes: int, *, is_rude: bool) -> Iterator[bytes]:
    """What comes at once: at most so much, and, unless it is rude, never more than one frame."""
    position, frame_end = 0, 0
    while position < len(stream):
        if position >= frame_end:
            head = stream[position : position + HEAD_NBYTES]
            frame_end = position + HEAD_NBYTES + int.from_bytes(head[8:16])
        end = min(position + part_nbytes, len(stream) if is_rude else frame_end)
        yield stream[position:end]
        position = end


def serve(served: ServedConnection, parts: list[bytes], *, waits_at: int) -> tuple[bytes, int]:
    """Drives a connection as its loop does: bytes to it while it listens, payload to memory; what it said."""
    said, now_s, num_heard, come = bytearray(), 0.0, 0, b""
    parts.reverse()
    for turn in range(TURNS):
        now_s += 10.0 if turn == waits_at and waits_at else 1e-4
        if served.due_at_s() <= now_s:
            served.on_due(now_s)
        said += served.out
        served.out.clear()
        served.news.clear()
        if served.phase in (Phase.OVER, Phase.LEAVING):
            break
        transfer = served.transfer
        if served.phase is Phase.SENDING:
            assert transfer is not None
            sent = b"".join(transfer.outgoing(transfer.grant.region.view))[:TAKEN_NBYTES]
            said += sent
            served.sent(len(sent), now_s)
            continue
        come = come or (parts.pop() if parts else b"")
        if not come:
            served.lose(now_s)
        elif served.phase is Phase.RECEIVING:
            assert transfer is not None
            num_left = len(come)
            for view in transfer.incoming(transfer.grant.region.view):
                taken = min(len(view), len(come))
                view[:taken] = come[:taken]
                come = come[taken:]
            served.landed(num_left - len(come), now_s)
        else:
            served.receive(memoryview(come), now_s)
            come = b""
            num_heard += 1
    if served.phase is Phase.LEAVING:
        served.lose(now_s)
    return bytes(said), num_heard


def payload_of(said: bytes) -> bytes:
    """The payload of all whole DATA that an owner said."""
    payload, position = bytearray(), 0
    while position + HEAD_NBYTES <= len(said):
        kind = said[position]
        assert kind in (Kind.WELCOME, Kind.CLEAR, Kind.DATA, Kind.DONE, Kind.FAIL, Kind.PONG), kind
        nbytes = int.from_bytes(said[position + 8 : position + 16])
        position += HEAD_NBYTES
        if kind == Kind.DATA:
            payload += said[position : position + nbytes]
        position += nbytes
    return bytes(payload)


def reader_pulls(data: bytes) -> str:
    """An owner says these bytes to a reader that pulls."""
    return converse(data, is_pull=True)


def reader_pushes(data: bytes) -> str:
    """An owner says these bytes to a reader that pushes."""
    return converse(data, is_pull=False)


def converse(data: bytes, *, is_pull: bool) -> str:
    """A transfer with an owner that has said everything before it was asked, and then ended; the error, if one came."""
    outcome = ""
    memory = np.full(NBYTES, CANARY, dtype=np.uint8)
    near, far = socket.socketpair()
    connection = Connection(near, peer="fuzz", path=Path(name="fuzz", remote_address="fuzz:1"))
    region = region_of(memory)
    try:
        far.sendall(data[: 64 * 1024])
        far.shutdown(socket.SHUT_WR)
        connection.set_mood(polling=True)
        exhaust(connection.greet(TcpSettings()))
        job = Job(order_of(region, is_pull=is_pull), WANTED)
        exhaust((pull if is_pull else push)(connection, job, WANTED))
    except TransportError as error:
        outcome = error.reason
    finally:
        connection.close()
        far.close()
        region.close()
    asked_for = np.zeros(NBYTES, dtype=bool)
    for _, offset, nbytes in WANTED if is_pull else ():
        asked_for[offset : offset + nbytes] = True
    assert (memory[~asked_for] == CANARY).all(), "landed where nobody asked for it"
    return outcome


def exhaust(steps: Iterator[None]) -> None:
    """Goes on until it ends: everything that will come is there, so that it waits for nothing."""
    for turn, _ in enumerate(steps):
        assert turn < TURNS, "it waits for ever"


def order_of(region, *, is_pull: bool) -> Order:
    descriptor = RegionDescriptor(
        scheme="tcp", capability=CAPABILITIES[1], nbytes=NBYTES, writable=True
    )
    remote = AttachedRegion(
        descriptor,
        peer="fuzz",
        writable=True,
        expires_at_s=float("inf"),
        forget=lambda _region: None,
    )
    return Order(
        remote,
        region,
        WANTED,
        is_pull,
        time.monotonic() + 60.0,
        PIECE_NBYTES,
        None,
        TrafficClass.DECODE_CRITICAL,
        b"" if is_pull else b"note",  # an owner that has ended hears no note of a pull
        None,
    )


HELLO = encode(Hello(min_version=1, max_version=1, heartbeat_ms=1000, name="fuzz"))
WELCOME = encode(
    Welcome(
        version=1,
        epoch=7,
        max_ranges=4096,
        max_data_nbytes=1 << 20,
        idle_timeout_ms=5000,
        ack_timeout_ms=3000,
    )
)
ANSWERS = {
    "whole": encode(Data(op=1, nbytes=150)) + bytes(150),
    "in two": encode(Data(op=1, nbytes=90)) + bytes(90) + encode(Data(op=1, nbytes=60)) + bytes(60),
    "refused": encode(Fail(op=1, reason="GRANT_REFUSED", retry_after_ms=5, message="no")),
    "broken": encode(Fail(op=0, reason="BAD_FRAME", retry_after_ms=0, message="no")),
    "pushed": encode(Clear(op=1)) + encode(Done(op=1, note=b"")),
    "pong": encode(Pong(op=1)),
}
READER_SEEDS = [WELCOME + answer for answer in ANSWERS.values()]
