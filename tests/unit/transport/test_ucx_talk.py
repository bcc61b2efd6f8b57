"""What owners of `ucx` answer to each lie, without UCX: the ends of `tests/fuzz/ucx_conversations.py`."""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from snowskin.transport.api import RegionDescriptor
from snowskin.transport.frames import Clear, Done, Fail, Frame, Ping, Pong, Welcome, encode
from snowskin.transport.grants import GrantTable
from snowskin.transport.memory import region_of
from snowskin.transport.ucx.conversation import MAX_UNTAKEN
from snowskin.transport.ucx.owner import Owner
from snowskin.transport.ucx.settings import CHUNK_NBYTES, MAX_HEARTBEAT_S, UcxSettings
from snowskin.transport.ucx.wire import (
    ONE_SIDED,
    WINDOW_NBYTES,
    MessageHead,
    MessageKind,
    decode_frame,
)
from snowskin.transport.words import Completion, Range
from tests.fuzz.conversations import CAPABILITIES, Ledger
from tests.fuzz.ucx_conversations import (
    HELLO,
    PULL,
    PUSH,
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


class OwnerStage:
    """An owner with 16 MiB, granted whole for reading and writing, and one greeted reader."""

    nbytes = 16 << 20

    def __init__(self, settings: UcxSettings = SETTINGS) -> None:
        self.memory = np.arange(self.nbytes, dtype=np.uint32).astype(np.uint8)
        self.region = region_of(self.memory)
        self.grants, self.ledger, self.thread = GrantTable(), Ledger(), Thread()
        self.completions: list[Completion] = []
        for capability in CAPABILITIES:
            described = RegionDescriptor(
                scheme="ucx",
                capability=capability,
                nbytes=self.nbytes,
                epoch=7,
                generation=3,
                writable=capability == CAPABILITIES[1],
            )
            self.grants.add(
                described, self.region, None, now_s=0.0, on_done=self.completions.append
            )
        thread: Any = self.thread
        self.owner = Owner(
            lambda: thread, settings, self.grants, self.ledger, lambda: 1.0, lambda call: call()
        )

    def greet(self, session: bytes = SESSION, hello: Any = HELLO) -> None:
        self.hear(MessageKind.HELLO, payload=hello.encode(), session=session)

    def hear(
        self,
        kind: MessageKind,
        op: int = 0,
        position: int = 0,
        payload: bytes = b"",
        session: bytes = SESSION,
    ) -> None:
        head = MessageHead(session, kind, op, position)
        with_payload(payload, functools.partial(self.owner.arrive, head))

    def frame(self, frame: Frame, position: int = 0) -> None:
        self.hear(FRAME, position=position, payload=encode(frame))

    def frames(self) -> list[Frame]:
        """What the owner said in frames since it was asked last."""
        said, self.thread.endpoint.said = self.thread.endpoint.said, []
        return [decode_frame(payload) for head, payload in said if head.kind is FRAME]

    def num_data(self) -> int:
        return sum(head.kind is DATA for head, _ in self.thread.endpoint.said)


@pytest.fixture
def stage() -> OwnerStage:
    made = OwnerStage()
    made.greet()
    assert isinstance(made.frames()[0], Welcome)
    return made


def test_whoever_has_no_living_grant_is_refused_without_using_its_address() -> None:
    stage = OwnerStage()
    replies: list[tuple[bytes, bytes]] = []
    for hello in (
        replace(HELLO, capability=b"?" * 16),
        replace(HELLO, epoch=6),
        replace(HELLO, generation=4),
    ):
        stage.greet(hello=hello)
        with_payload(
            hello.encode(),
            lambda span: stage.owner.arrive(
                MessageHead(SESSION, MessageKind.HELLO, 0, 0),
                span,
                lambda *said: replies.append(said),
            ),
        )
    assert not stage.thread.endpoint.said
    for header, payload in replies:
        head, fail = MessageHead.decode(header, 0), decode_frame(payload)
        assert (head.session, head.kind, head.by_owner) == (SESSION, FRAME, True)
        assert isinstance(fail, Fail)
        assert (fail.op, fail.reason) == (0, "GRANT_REFUSED")
    assert stage.owner.num_sessions == 0
    assert stage.ledger.counts == {"GRANT_REFUSED": 6}


def test_grant_whose_life_is_over_greets_nobody() -> None:
    stage = OwnerStage()
    stage.grants.renew(CAPABILITIES[0], expires_in_s=1.0, now_s=0.0)
    stage.greet()
    assert not stage.thread.endpoint.said
    assert stage.ledger.counts == {"REGION_EXPIRED": 1}


def test_peers_beyond_the_limit_are_not_answered() -> None:
    stage = OwnerStage(replace(SETTINGS, max_sessions=2))
    for number in range(5):
        stage.greet(session=bytes([number]) * 16)
    assert stage.owner.num_sessions == 2
    assert stage.ledger.counts == {"PEER_BUSY": 3}


def test_messages_of_an_unknown_session_are_dropped(stage: OwnerStage) -> None:
    stage.hear(FRAME, payload=encode(PULL), session=b"another session!")
    assert not stage.thread.endpoint.said


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (PULL._replace(capability=b"?" * 16), "GRANT_REFUSED"),
        (PULL._replace(epoch=8), "GRANT_REFUSED"),
        (PULL._replace(generation=2), "GRANT_REFUSED"),
        (PULL._replace(ranges=(Range(OwnerStage.nbytes - 1, 2),)), "OUT_OF_BOUNDS"),
        (PUSH._replace(capability=CAPABILITIES[0]), "REGION_READ_ONLY"),
    ],
)
def test_what_was_not_granted_is_refused_and_the_session_lives(
    stage: OwnerStage, ask: Any, reason: str
) -> None:
    stage.frame(ask)
    (fail,) = stage.frames()
    assert isinstance(fail, Fail)
    assert (fail.op, fail.reason) == (1, reason)
    assert stage.ledger.counts == {reason: 1}
    stage.frame(Ping(op=9))
    assert stage.frames() == [Pong(op=9)]


def test_pull_sends_no_more_than_the_peer_has_room_for(stage: OwnerStage) -> None:
    window = WINDOW_NBYTES // CHUNK_NBYTES
    stage.frame(PULL._replace(ranges=(Range(0, stage.nbytes),), wants_done=False))
    assert stage.num_data() == window
    stage.hear(TAKEN, 1, 2 * CHUNK_NBYTES)
    assert stage.num_data() == window + 2


def test_pull_is_served_once_the_peer_took_all_and_its_note_is_told_once(stage: OwnerStage) -> None:
    stage.frame(PULL._replace(ranges=(Range(5, 300), Range(1000, 50))))
    ((_, data),) = [each for each in stage.thread.endpoint.said if each[0].kind is DATA]
    assert data == stage.memory[5:305].tobytes() + stage.memory[1000:1050].tobytes()
    stage.hear(TAKEN, 1, 350)
    assert stage.ledger.counts["served"] == 0, "DONE was promised"
    stage.frame(Done(op=1, note=b"mine"))
    stage.frame(Done(op=1, note=b"again"))
    assert stage.ledger.counts == {"served": 1}
    assert [(c.note, c.nbytes, c.is_push) for c in stage.completions] == [(b"mine", 350, False)]


def test_push_lands_where_it_was_granted_and_is_acknowledged(stage: OwnerStage) -> None:
    stage.frame(PUSH._replace(ranges=(Range(10, 4), Range(100, 6))))
    stage.hear(DATA, 1, 0, b"abcde")
    stage.hear(DATA, 1, 5, b"fghij")
    assert stage.memory[10:14].tobytes() + stage.memory[100:106].tobytes() == b"abcdefghij"
    assert stage.frames() == [Clear(op=1), Done(op=1, note=b"")]
    assert [(c.note, c.nbytes, c.is_push) for c in stage.completions] == [(b"note", 10, True)]
    assert stage.ledger.counts == {"served": 1}


@pytest.mark.parametrize(
    "lie",
    [
        (DATA, 1, 80, b"behind the end"),
        (DATA, 1, 1 << 63, b"far behind it"),
        (DATA, 1, 0, bytes(200)),
        (DATA, 1, 0, b""),
        (TAKEN, 1, 4, b""),
        (FRAME, 0, 0, encode(PUSH)),
        (FRAME, 0, 0, encode(Done(op=1, note=b""))),
        (FRAME, 0, 0, encode(WELCOME)),
        (FRAME, 0, 0, b"no frame at all, but long enough for a head"),
        (MessageKind.HELLO, 0, 0, HELLO.encode()),
    ],
)
def test_breach_during_a_push_ends_the_session_and_moves_nothing(
    stage: OwnerStage, lie: Any
) -> None:
    before = stage.memory.copy()
    stage.frame(PUSH)
    stage.hear(*lie)
    assert stage.owner.num_sessions == 0
    assert np.array_equal(stage.memory, before)
    assert stage.ledger.counts == {"BAD_FRAME": 1, "failed": 1}
    stage.hear(DATA, 1, 0, b"late")
    assert np.array_equal(stage.memory, before)


@pytest.mark.parametrize("position", [0, 301, 1 << 40])
def test_peer_that_took_what_was_never_sent_breaks_the_protocol(
    stage: OwnerStage, position: int
) -> None:
    stage.frame(PULL._replace(ranges=(Range(0, 300),)))
    stage.hear(TAKEN, 1, position)
    assert stage.owner.num_sessions == 0


def test_push_whose_parts_overtake_each_other_lands_where_it_belongs(stage: OwnerStage) -> None:
    stage.frame(PUSH._replace(ranges=(Range(10, 4), Range(100, 6))))
    stage.hear(DATA, 1, 5, b"fghij")
    assert stage.ledger.counts["served"] == 0
    assert stage.memory[101:106].tobytes() == b"fghij"
    stage.hear(DATA, 1, 0, b"abcde")
    assert stage.memory[10:14].tobytes() + stage.memory[100:106].tobytes() == b"abcdefghij"
    assert stage.ledger.counts == {"served": 1}


@pytest.mark.parametrize("position", [0, 5])
def test_part_of_a_push_that_comes_twice_ends_the_session(stage: OwnerStage, position: int) -> None:
    stage.frame(PUSH)
    stage.hear(DATA, 1, position, b"fghij")
    stage.hear(DATA, 1, position, b"fghij")
    assert stage.owner.num_sessions == 0


def test_push_sends_no_further_than_it_may(stage: OwnerStage) -> None:
    stage.frame(PUSH._replace(ranges=(Range(0, stage.nbytes),)))
    stage.hear(DATA, 1, WINDOW_NBYTES - 1, b"x")
    assert stage.owner.num_sessions == 1
    stage.hear(DATA, 1, WINDOW_NBYTES, b"x")
    assert stage.owner.num_sessions == 0


def test_done_and_taken_may_overtake_what_was_taken_before(stage: OwnerStage) -> None:
    window = WINDOW_NBYTES // CHUNK_NBYTES
    stage.frame(PULL._replace(ranges=(Range(0, 5 * CHUNK_NBYTES),)))
    stage.hear(TAKEN, 1, 3 * CHUNK_NBYTES)
    stage.hear(TAKEN, 1, 2 * CHUNK_NBYTES)
    assert stage.num_data() == window + 1
    stage.frame(Done(op=1, note=b"mine"))
    assert stage.ledger.counts == {"served": 1}
    stage.hear(TAKEN, 1, 5 * CHUNK_NBYTES)
    assert stage.owner.num_sessions == 1


def test_pull_whose_stop_overtook_it_is_not_begun(stage: OwnerStage) -> None:
    stage.hear(STOP, 1)
    stage.frame(PULL)
    assert not stage.num_data()
    stage.frame(PULL._replace(op=2))
    assert stage.num_data() == 1


def test_revoked_grant_stops_a_pull_at_its_next_chunk(stage: OwnerStage) -> None:
    stage.frame(PULL._replace(ranges=(Range(0, stage.nbytes),)))
    stage.frames()
    stage.grants.revoke(CAPABILITIES[0])
    stage.hear(TAKEN, 1, CHUNK_NBYTES)
    (fail,) = stage.frames()
    assert isinstance(fail, Fail)
    assert fail.reason == "GRANT_REFUSED"
    assert stage.ledger.counts == {"failed": 1}


def held_chunks(stage: OwnerStage) -> list[tuple[MessageHead, Any, Any]]:
    """What UCX has in its hands from now on, since the peer takes nothing: head, spans, and what ends it."""
    held: list[tuple[MessageHead, Any, Any]] = []

    def send(header: bytes, payload: Any, done: Any, **_: Any) -> None:
        head = MessageHead.decode(header, 0)
        if head.kind is DATA:
            held.append((head, payload, done))
        else:
            done(None)

    stage.thread.endpoint.send = send  # type: ignore[method-assign]
    return held


def test_whoever_revokes_does_not_wait_for_chunks_that_ucx_still_holds(stage: OwnerStage) -> None:
    held = held_chunks(stage)
    stage.frame(PULL._replace(ranges=(Range(5, 1000), Range(4000, 7))))
    ((_, spans, done),) = held
    revoking = threading.Thread(
        target=stage.grants.revoke, args=(CAPABILITIES[0],), name="revoking", daemon=True
    )
    revoking.start()
    revoking.join(2.0)
    was_waiting = revoking.is_alive()
    granted = stage.memory[5:1005].tobytes() + stage.memory[4000:4007].tobytes()
    stage.memory[:] = 0xA5  # another's by now
    sent = b"".join(ctypes.string_at(span.address, span.nbytes) for span in spans)
    done(None)
    revoking.join(2.0)
    assert not was_waiting
    assert sent == granted, "nor do the new owner's bytes go out"


def test_peer_that_takes_nothing_leaves_room_for_others(stage: OwnerStage) -> None:
    held = held_chunks(stage)
    whole = PULL._replace(ranges=(Range(0, stage.nbytes),))
    for op in range(1, 20):
        stage.frame(whole._replace(op=op))
    assert len(held) == SETTINGS.max_chunks_a_peer < SETTINGS.max_chunks_posted
    other = b"another reader.."
    stage.greet(other)
    stage.hear(FRAME, payload=encode(whole), session=other)
    assert held[-1][0].session == other
    others = len(held)
    for _, _, done in held[:4]:
        done(None)
    assert [head.op for head, _, _ in held[others:] if head.session == SESSION] == [1, 2]


def test_pull_that_is_given_up_sends_no_more(stage: OwnerStage) -> None:
    stage.frame(PULL._replace(ranges=(Range(0, stage.nbytes),)))
    stage.hear(STOP, 1)
    stage.thread.endpoint.said.clear()
    stage.hear(TAKEN, 1, CHUNK_NBYTES)
    assert not stage.thread.endpoint.said
    assert stage.ledger.counts == {"failed": 1}


def test_reader_that_leaves_is_forgotten_with_all_that_it_asked(stage: OwnerStage) -> None:
    stage.frame(PULL._replace(ranges=(Range(0, stage.nbytes),)))
    stage.hear(STOP, 0)
    assert stage.owner.num_sessions == 0
    assert stage.ledger.counts == {"failed": 1}


def test_peer_that_asks_and_does_not_listen_is_kept_few_answers(stage: OwnerStage) -> None:
    held: list[Any] = []
    stage.thread.endpoint.send = lambda _header, _payload, done, **_: held.append(done)  # type: ignore[method-assign]
    for _ in range(2 * MAX_UNTAKEN):
        stage.frame(Ping(op=1))
    assert len(held) == MAX_UNTAKEN
    assert stage.owner.num_sessions == 0
    assert stage.owner.num_lost == 1


def test_peer_cannot_ask_to_be_remembered_for_days() -> None:
    stage = OwnerStage()
    stage.greet(hello=replace(HELLO, heartbeat_ms=2**32 - 1))
    (welcome,) = stage.frames()
    assert isinstance(welcome, Welcome)
    assert welcome.idle_timeout_ms == 3 * MAX_HEARTBEAT_S * 1000


def test_idle_owner_looks_when_somebody_could_be_lost_and_not_before() -> None:
    stage = OwnerStage()
    stage.greet()
    (first_s,) = stage.thread.delays_s
    assert first_s == min(SETTINGS.stall_s, SETTINGS.silence_s)  # who greets next could be by then
    stage.owner._tick()
    (session,) = stage.owner._sessions.values()
    session.conversation.heard_at_s -= SETTINGS.silence_s - 1.0
    stage.owner._tick()
    assert stage.thread.delays_s[-1] <= 1.0
    session.conversation.heard_at_s -= 1.0
    stage.owner._tick()
    assert stage.owner.num_sessions == 0


def test_owner_that_closes_says_so() -> None:
    stage = OwnerStage()
    stage.greet()
    stage.frames()
    stage.owner.close()
    assert [(head.kind, head.op) for head, _ in stage.thread.endpoint.said] == [(STOP, 0)]


def test_owner_that_offers_no_one_sided_access_clears_none(stage: OwnerStage) -> None:
    stage.frame(PULL, ONE_SIDED)
    (fail,) = stage.frames()
    assert isinstance(fail, Fail)
    assert fail.reason == "TRANSPORT_UNAVAILABLE"
    trusting = OwnerStage(replace(SETTINGS, trusted_network=True))
    trusting.greet()
    trusting.frame(PULL, ONE_SIDED | 1000)
    assert trusting.frames()[1:] == [Clear(op=1)]
    assert not trusting.num_data()
    trusting.frame(Done(op=1, note=b"mine"))
    assert [each.nbytes for each in trusting.completions] == [1000 + 356]


def test_push_that_goes_one_sided_takes_no_bytes_by_message() -> None:
    stage = OwnerStage(replace(SETTINGS, trusted_network=True))
    stage.greet()
    stage.frame(PUSH, ONE_SIDED)
    stage.hear(DATA, 1, 0, b"abc")
    assert stage.owner.num_sessions == 0


def test_more_urgent_pulls_send_first() -> None:
    stage = OwnerStage(replace(SETTINGS, max_chunks_posted=1))
    stage.greet()
    held: list[Any] = []
    stage.thread.endpoint.send = lambda header, payload, done, **_: (  # type: ignore[method-assign]
        held.append((MessageHead.decode(header, 0), done))
    )
    for op, traffic in ((1, 2), (2, 2), (3, 0), (4, 1)):
        whole = (Range(0, CHUNK_NBYTES),)
        stage.frame(PULL._replace(op=op, traffic=traffic, ranges=whole, wants_done=False))
    order = []
    while held:
        head, done = held.pop(0)
        if head.kind is DATA:
            order.append(head.op)
        done(None)
    assert order == [1, 3, 4, 2], "the first one was on its way already"
