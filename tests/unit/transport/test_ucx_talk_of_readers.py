"""What readers of `ucx` make of each owner's lie, without UCX: as `test_ucx_talk.py`, from the other end."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from snowskin.transport.api import TrafficClass
from snowskin.transport.errors import GrantRefused, PeerLost, TransportClosed
from snowskin.transport.frames import Clear, Done, Fail, encode
from snowskin.transport.memory import region_of
from snowskin.transport.ordered import Order
from snowskin.transport.ucp.api import UcpFailure
from snowskin.transport.ucx.conversation import Conversation
from snowskin.transport.ucx.reader import Mailbox, Reader
from snowskin.transport.ucx.transport import UcxRegion
from snowskin.transport.ucx.wire import (
    ONE_SIDED,
    MessageHead,
    MessageKind,
    Reach,
)
from snowskin.transport.words import Range
from tests.fuzz.conversations import WANTED
from tests.fuzz.ucx_conversations import (
    PULL,
    PUSH,
    SEALED,
    SESSION,
    SETTINGS,
    WELCOME,
    Thread,
    with_payload,
)

FRAME, DATA, TAKEN, STOP = (
    MessageKind.FRAME,
    MessageKind.DATA,
    MessageKind.TAKEN,
    MessageKind.STOP,
)


class ReaderStage:
    """A reader with one transfer under way, op 1, whose owner has said WELCOME."""

    def __init__(self, *, is_push: bool = False, position: int = 0, welcome: bool = True) -> None:
        self.local = region_of(np.zeros(1024, dtype=np.uint8))
        self.thread = Thread()
        thread: Any = self.thread
        self.reader = Reader(lambda: thread, SETTINGS)
        reach = Reach(name="the-owner", address=b"where it is")
        remote = UcxRegion(
            SEALED, reach, writable=True, expires_at_s=1e9, forget=lambda _region: None
        )
        order = Order(
            remote, self.local, WANTED, not is_push, 1e9, 64, None, TrafficClass.PREFETCH, b"", None
        )
        ranges = tuple(Range(run.remote_offset, run.nbytes) for run in WANTED)
        ask = (PUSH if is_push else PULL)._replace(ranges=ranges)
        self.mailbox = Mailbox(order, reach, ask, position)
        self.reader.attach(reach.address)
        self.reader.begin(self.mailbox)
        self.session = self.thread.endpoint.said[0][0].session
        if welcome:
            self.hear(FRAME, payload=encode(WELCOME))

    def hear(self, kind: MessageKind, op: int = 0, position: int = 0, payload: bytes = b"") -> None:
        head = MessageHead(self.session, kind, op, position, by_owner=True)
        with_payload(payload, functools.partial(self.reader.arrive, head))

    def next(self) -> object:
        return self.mailbox.next(lambda: 0.0)


PULL_LIES = [
    (DATA, 1, 150, b"behind the end"),
    (DATA, 1, 0, bytes(151)),
    (DATA, 1, 0, b""),
    (TAKEN, 1, 5, b""),
    (FRAME, 0, 0, encode(Clear(op=1))),
    (FRAME, 0, 0, encode(Done(op=1, note=b""))),
    (FRAME, 0, 0, encode(PULL)),
    (STOP, 1, 0, b""),  # it may leave altogether, but not stop one
]


@pytest.mark.parametrize("lie", PULL_LIES)
def test_owner_that_breaks_the_protocol_is_lost(lie: Any) -> None:
    stage = ReaderStage()
    stage.hear(*lie)
    with pytest.raises(PeerLost, match="the-owner breaks the protocol"):
        stage.next()
    assert stage.reader.num_links == 0


@pytest.mark.parametrize("taken", [0, 11, 150, 1 << 63])
def test_owner_that_took_of_a_push_what_was_not_sent_is_lost(taken: int) -> None:
    stage = ReaderStage(is_push=True)
    stage.hear(FRAME, payload=encode(Clear(op=1)))
    assert stage.next() == Clear(op=1)
    stage.mailbox.sent = 10
    stage.hear(TAKEN, 1, taken)
    with pytest.raises(PeerLost, match="the-owner"):
        stage.next()


def test_parts_of_a_pull_that_overtake_each_other_are_told_in_order() -> None:
    stage = ReaderStage()
    stage.hear(DATA, 1, 100, b"z" * 50)
    stage.hear(DATA, 1, 60, b"y" * 40)
    glances = iter([0.0])
    with pytest.raises(StopIteration):  # it looked, found nothing, and looks again
        stage.mailbox.next(lambda: next(glances))
    stage.hear(DATA, 1, 0, b"x" * 60)
    told: list[Any] = [stage.next(), stage.next(), stage.next()]
    assert b"".join(buffer[:nbytes].tobytes() for buffer, nbytes in told) == (
        b"x" * 60 + b"y" * 40 + b"z" * 50
    )


@pytest.mark.parametrize("position", [0, 60])
def test_part_of_a_pull_that_comes_twice_costs_its_owner_the_link(position: int) -> None:
    stage = ReaderStage()
    for _ in range(2):
        stage.hear(DATA, 1, position, b"y" * 40)
    assert stage.reader.num_links == 0


def test_done_of_a_push_may_overtake_the_last_taken() -> None:
    stage = ReaderStage(is_push=True)
    stage.hear(FRAME, payload=encode(Clear(op=1)))
    stage.mailbox.sent = 150
    stage.hear(TAKEN, 1, 100)
    stage.hear(TAKEN, 1, 60)
    stage.hear(FRAME, payload=encode(Done(op=1, note=b"")))
    stage.hear(TAKEN, 1, 150)
    assert [stage.next() for _ in range(4)] == [Clear(op=1), 100, 150, Done(op=1, note=b"")]
    assert stage.reader.num_links == 1


def test_one_sided_transfer_takes_no_bytes_by_message() -> None:
    stage = ReaderStage(position=ONE_SIDED)
    stage.hear(FRAME, payload=encode(Clear(op=1)))
    assert stage.next() == Clear(op=1)
    stage.hear(DATA, 1, 0, b"abc")
    with pytest.raises(PeerLost):
        stage.next()


def test_refusal_comes_back_as_the_owners_error() -> None:
    stage = ReaderStage()
    fail = Fail(op=1, reason="REGION_EXPIRED", retry_after_ms=0, message="it ran out")
    stage.hear(FRAME, payload=encode(fail))
    with pytest.raises(Exception, match="the-owner refused it: it ran out") as caught:
        stage.next()
    assert type(caught.value).__name__ == "RegionExpired"
    assert stage.reader.num_links == 1


def test_right_that_is_refused_at_the_first_word_does_not_spoil_the_others() -> None:
    """Two transfers wait for the owner's first answer; only the one whose grant it does not know fails."""
    stage = ReaderStage(welcome=False)
    other = replace(SEALED, capability=b"another, living!")
    order = stage.mailbox.order._replace(
        remote=UcxRegion(
            other,
            stage.mailbox.reach,
            writable=True,
            expires_at_s=1e9,
            forget=lambda _region: None,
        )
    )
    ask = stage.mailbox.ask._replace(op=2, capability=other.capability)
    second = Mailbox(order, stage.mailbox.reach, ask, 0)
    stage.reader.begin(second)
    fail = Fail(op=0, reason="GRANT_REFUSED", retry_after_ms=0, message="no such grant")
    stage.hear(FRAME, payload=encode(fail))
    with pytest.raises(GrantRefused, match="the-owner refused it"):
        stage.next()
    greetings = [
        (head.session, payload)
        for head, payload in stage.thread.endpoint.said
        if head.kind is MessageKind.HELLO
    ]
    assert len(greetings) == 2
    assert other.capability in greetings[1][1]
    stage.session = greetings[1][0]
    stage.hear(FRAME, payload=encode(WELCOME))
    stage.hear(DATA, 2, 0, b"abc")
    item: Any = second.next(lambda: 0.0)
    assert item[1] == 3


def test_lost_owner_is_asked_again_only_after_a_pause() -> None:
    stage = ReaderStage()
    stage.hear(*PULL_LIES[0])
    again = Mailbox(stage.mailbox.order, stage.mailbox.reach, stage.mailbox.ask, 0)
    stage.reader.begin(again)
    with pytest.raises(PeerLost, match="a moment ago") as caught:
        again.next(lambda: 0.0)
    assert 0 < (caught.value.retry_after_s or 0) <= SETTINGS.reconnect_s
    stage.reader.detach(
        stage.mailbox.reach.address
    )  # its lease is over; the next one's must wait as well
    stage.reader.attach(stage.mailbox.reach.address)
    third = Mailbox(stage.mailbox.order, stage.mailbox.reach, stage.mailbox.ask, 0)
    stage.reader.begin(third)
    with pytest.raises(PeerLost, match="a moment ago"):
        third.next(lambda: 0.0)


def test_peer_that_takes_nothing_is_lost_and_lets_go_of_the_memory() -> None:
    thread: Any = Thread()
    ends: list[Any] = []
    thread.endpoint.send = lambda _header, _payload, done, **_: ends.append(done)
    thread.endpoint.close = lambda _done: [end(UcpFailure("CANCELED", "send")) for end in ends]
    lost: list[PeerLost] = []
    let_go: list[str] = []
    talk = Conversation(thread, b"where", SESSION, "slow", is_owner=True, on_lost=lost.append)
    talk.send_data(1, 0, (), lambda: let_go.append("memory"))
    began_s = talk.said_at_s
    talk.check(began_s + 2.9, silence_s=100.0, stall_s=3.0)
    assert not lost
    assert talk.due_at_s(silence_s=100.0, stall_s=3.0) == pytest.approx(began_s + 3.0, abs=0.1)
    talk.check(began_s + 3.1, silence_s=100.0, stall_s=3.0)
    assert "slow took nothing for 3.1 s" in str(lost[0])
    assert let_go == ["memory"]
    assert len(lost) == 1


def test_idle_reader_looks_when_it_has_to_say_something_and_not_before() -> None:
    stage = ReaderStage()
    (first_s,) = stage.thread.delays_s
    assert 0.5 < first_s <= SETTINGS.heartbeat_s
    (link,) = stage.reader._links.values()
    link.conversation.said_at_s -= SETTINGS.heartbeat_s - 0.5
    stage.reader._tick()
    assert stage.thread.delays_s[-1] <= 0.5
    link.conversation.said_at_s -= 0.5
    num_said = len(stage.thread.endpoint.said)
    stage.reader._tick()
    assert len(stage.thread.endpoint.said) == num_said + 1  # PING
    assert stage.thread.delays_s[-1] > 0.5


def test_unused_link_is_left_when_it_lingered_long_enough() -> None:
    stage = ReaderStage()
    (link,) = stage.reader._links.values()
    stage.reader.detach(stage.mailbox.reach.address)
    link.unused_since_s -= SETTINGS.linger_s - 0.5
    stage.reader._tick()
    assert stage.thread.delays_s[-1] <= 0.5
    link.unused_since_s -= 0.5
    stage.reader._tick()
    assert stage.reader.num_links == 0


def test_owner_that_is_lost_with_the_first_word_leaves_nothing_behind() -> None:
    thread: Any = Thread()

    def fails(_header: bytes, _payload: object, done: Any, **_: Any) -> None:
        done(UcpFailure("UNREACHABLE", "send"))

    thread.endpoint.send = fails
    reader = Reader(lambda: thread, SETTINGS)
    healthy = ReaderStage().mailbox
    mailbox = Mailbox(healthy.order, healthy.reach, healthy.ask, 0)
    reader.attach(healthy.reach.address)
    reader.begin(mailbox)
    with pytest.raises(PeerLost, match="first word"):
        mailbox.next(lambda: 0.0)
    assert reader.num_links == 0
    assert not thread.delays_s, "it looks after a link that is over"


def test_reader_that_closes_says_so() -> None:
    stage = ReaderStage()
    stage.reader.close(TransportClosed("closed"))
    head, _ = stage.thread.endpoint.said[-1]
    assert (head.kind, head.op) == (STOP, 0)
    assert stage.reader.num_links == 0


def test_owner_that_has_closed_is_lost() -> None:
    reader = ReaderStage()
    reader.hear(STOP, 0)
    with pytest.raises(PeerLost, match="the-owner has closed"):
        reader.next()
