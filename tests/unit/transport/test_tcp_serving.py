"""What an owner says to one reader: every order, breach and time limit of docs/wire.md, without a socket."""

from __future__ import annotations

from collections import Counter

import pytest

from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.frames import (
    HEAD_NBYTES,
    Ask,
    Clear,
    Data,
    Done,
    Fail,
    Hello,
    Kind,
    Ping,
    Pong,
    Welcome,
    encode,
)
from snowskin.transport.grants import GrantTable
from snowskin.transport.memory import region_of
from snowskin.transport.tcp.served_transfer import MAX_VIEWS
from snowskin.transport.tcp.serving import MAX_PINGS, Phase, ServedConnection
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.words import Range
from tests.support.raw_tcp import frames_in, head

CHUNK_NBYTES = 100
SETTINGS = TcpSettings(
    chunk_nbytes=CHUNK_NBYTES,
    epoch=5,
    max_ranges=8,
    hello_timeout_s=2.0,
    idle_timeout_s=5.0,
    frame_timeout_s=3.0,
)
HELLO = Hello(min_version=1, max_version=1, heartbeat_ms=1500, name="reader")
MEMORY = bytes(range(250)) * 4


class Ledger:
    """Counts as a transport does."""

    def __init__(self):
        self.served_nbytes: list[int] = []
        self.num_failed = 0
        self.refused: Counter[str] = Counter()

    def count_served(self, nbytes):
        self.served_nbytes.append(nbytes)

    def count_served_failed(self):
        self.num_failed += 1

    def count_refused(self, reason):
        self.refused[reason] += 1


class Served:
    """One connection and all around it; what the peer says comes in whole unless told otherwise."""

    def __init__(self, *, writable=False, greeted=True, settings=SETTINGS):
        self.region = region_of(bytearray(MEMORY))
        self.grants = GrantTable()
        self.ledger = Ledger()
        self.told = []
        descriptor = RegionDescriptor(
            scheme="tcp",
            capability=b"c" * 16,
            nbytes=len(MEMORY),
            epoch=5,
            generation=1,
            writable=writable,
            expires_in_s=100.0,
        )
        self.grant = self.grants.add(
            descriptor, self.region, None, now_s=0.0, on_done=self.told.append
        )
        self.connection = ServedConnection(
            self.grants, settings, self.ledger, peer="peer", now_s=0.0
        )
        if greeted:
            self.hear(HELLO)
            self.said()

    @property
    def phase(self) -> Phase:
        return self.connection.phase

    def hear(self, *frames, now_s=0.0):
        self.hear_bytes(b"".join(map(encode, frames)), now_s=now_s)

    def hear_bytes(self, data, now_s=0.0):
        self.connection.receive(memoryview(data), now_s)

    def said(self):
        """What goes over the stream before payload."""
        frames = frames_in(bytes(self.connection.out))
        self.connection.out.clear()
        return frames

    def send(self, most=1 << 20, now_s=0.0):
        """What a stream that takes so much gets."""
        parts = self.connection.transfer.outgoing(self.region.view)
        data = b"".join(parts)[:most]
        self.connection.sent(len(data), now_s)
        return data

    def send_all(self):
        stream = b""
        while self.phase is Phase.SENDING:
            stream += self.send()
        return stream

    def land(self, data, now_s=0.0):
        """Payload and heads of a push come; what was not asked for is returned."""
        while data and self.phase is Phase.RECEIVING:
            num = 0
            for part in self.connection.transfer.incoming(self.region.view):
                taken = data[num : num + len(part)]
                part[: len(taken)] = taken
                num += len(taken)
            self.connection.landed(num, now_s)
            data = data[num:]
        return data

    def say_news(self):
        for grant, completion in self.connection.news:
            assert grant.on_done is not None
            grant.on_done(completion)
        return self.told


def ask(ranges=((0, 10),), **fields):
    return Ask(
        **{
            "is_push": False,
            "op": 1,
            "capability": b"c" * 16,
            "epoch": 5,
            "generation": 1,
            "timeout_ms": 10_000,
            "traffic": 0,
            "wants_done": False,
            "note": b"",
            "ranges": tuple(Range(*each) for each in ranges),
            **fields,
        }
    )


def push(ranges=((0, 10),), **fields):
    return ask(ranges, is_push=True, **fields)


def payload_of(stream):
    """The payload of the DATA in a stream, and how large each was."""
    payload, sizes = b"", []
    while stream:
        (frame,) = frames_in(stream[:HEAD_NBYTES])
        assert isinstance(frame, Data)
        sizes.append(frame.nbytes)
        payload += stream[HEAD_NBYTES : HEAD_NBYTES + frame.nbytes]
        stream = stream[HEAD_NBYTES + frame.nbytes :]
    return payload, sizes


def only_fail(frames):
    (fail,) = frames
    assert isinstance(fail, Fail)
    return fail


def test_a_hello_is_answered_with_what_this_owner_allows():
    served = Served(greeted=False)
    served.hear(HELLO)
    assert served.said() == [
        Welcome(
            version=1,
            epoch=5,
            max_ranges=8,
            max_data_nbytes=CHUNK_NBYTES,
            idle_timeout_ms=5000,
            ack_timeout_ms=3000,
        )
    ]
    assert served.phase is Phase.IDLE


@pytest.mark.parametrize("versions", [(0, 0), (2, 9)])
def test_a_reader_of_other_versions_is_told_so(versions):
    served = Served(greeted=False)
    served.hear(Hello(min_version=versions[0], max_version=versions[1], heartbeat_ms=0, name=""))
    fail = only_fail(served.said())
    assert (fail.op, fail.reason) == (0, "BAD_FRAME")
    assert served.phase is Phase.LEAVING


def test_a_pull_is_its_ranges_one_after_the_other_in_frames_of_a_chunk_at_most():
    served = Served()
    ranges = ((10, 50), (500, 120), (0, 1), (10, 79))
    served.hear(ask(ranges))
    payload, sizes = payload_of(served.send_all())
    assert payload == b"".join(MEMORY[at : at + size] for at, size in ranges)
    assert sizes == [100, 100, 50]
    assert served.phase is Phase.IDLE
    assert served.ledger.served_nbytes == [250]
    assert served.said() == []


def test_a_pull_is_the_same_when_the_stream_takes_one_byte_at_a_time():
    served = Served()
    served.hear(ask(((10, 50), (500, 120), (0, 1))))
    stream = b""
    while served.phase is Phase.SENDING:
        stream += served.send(most=1)
    payload, _ = payload_of(stream)
    assert payload == MEMORY[10:60] + MEMORY[500:620] + MEMORY[:1]


def test_a_piece_has_no_more_parts_than_the_kernel_takes():
    served = Served(settings=TcpSettings(chunk_nbytes=1 << 20))
    served.hear(ask([(index % 900, 2) for index in range(2500)]))
    parts = served.connection.transfer.outgoing(served.region.view)
    assert len(parts) == MAX_VIEWS + 1
    payload, sizes = payload_of(served.send_all())
    assert payload == b"".join(MEMORY[at % 900 : at % 900 + 2] for at in range(2500))
    assert sizes == [5000]


def test_a_pull_without_done_tells_nobody():
    served = Served()
    served.hear(ask())
    served.send_all()
    assert served.connection.news == []


def test_a_pull_with_done_is_served_when_it_came():
    served = Served()
    served.hear(ask(wants_done=True))
    served.send_all()
    assert served.phase.text == "awaiting done"
    assert served.ledger.served_nbytes == []
    done = encode(Done(op=1, note=b"thanks"))
    served.hear_bytes(done[:5])
    served.hear_bytes(done[5:])
    (completion,) = served.say_news()
    assert (completion.note, completion.nbytes, completion.is_push) == (b"thanks", 10, False)
    assert served.ledger.served_nbytes == [10]
    assert served.phase is Phase.IDLE


def test_a_push_lands_in_its_ranges_and_is_told_before_its_done():
    served = Served(writable=True)
    served.hear(push(((7, 60), (400, 90)), note=b"news"))
    assert served.said() == [Clear(op=1)]
    data = bytes(200 - index for index in range(150))
    stream = b"".join(
        encode(Data(op=1, nbytes=len(part))) + part for part in (data[:1], data[1:100], data[100:])
    )
    assert served.land(stream + b"more") == b"more"
    assert bytes(served.region.buffer[7:67]) == data[:60]
    assert bytes(served.region.buffer[400:490]) == data[60:]
    assert bytes(served.region.buffer[:7]) == MEMORY[:7]
    assert bytes(served.region.buffer[67:400]) == MEMORY[67:400]
    assert bytes(served.region.buffer[490:]) == MEMORY[490:]
    (completion,) = served.say_news()
    assert (completion.note, completion.nbytes, completion.is_push) == (b"news", 150, True)
    assert served.said() == [Done(op=1, note=b"")]
    assert served.phase is Phase.IDLE


def test_a_push_without_a_note_tells_nobody():
    served = Served(writable=True)
    served.hear(push())
    served.land(encode(Data(op=1, nbytes=10)) + bytes(10))
    assert served.connection.news == []
    assert served.ledger.served_nbytes == [10]


@pytest.mark.parametrize(
    "wrong",
    [
        head(Kind.DATA, op=2, nbytes=10),
        head(Kind.DATA, op=1, nbytes=11),
        head(Kind.DATA, op=1, nbytes=0),
        head(Kind.PING, op=1),
        head(Kind.DONE, op=1, nbytes=10),
        head(Kind.DATA, op=1, nbytes=10, flags=1),
        b"\xff" * 16,
    ],
)
def test_a_push_in_disorder_ends_the_connection_and_writes_nothing(wrong):
    served = Served(writable=True)
    served.hear(push())
    served.said()
    served.land(wrong + encode(Data(op=1, nbytes=10)) + b"x" * 10)
    fail = only_fail(served.said())
    assert (fail.op, fail.reason) == (0, "BAD_FRAME")
    assert served.phase is Phase.LEAVING
    assert bytes(served.region.buffer) == MEMORY
    assert served.ledger.num_failed == 1


def test_a_data_larger_than_a_chunk_is_refused():
    served = Served(writable=True)
    served.hear(push(((0, 300),)))
    served.said()
    served.land(head(Kind.DATA, op=1, nbytes=CHUNK_NBYTES + 1))
    assert only_fail(served.said()).reason == "BAD_FRAME"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"capability": b"x" * 16}, "GRANT_REFUSED"),
        ({"epoch": 4}, "GRANT_REFUSED"),
        ({"generation": 2}, "GRANT_REFUSED"),
        ({"is_push": True}, "REGION_READ_ONLY"),
        ({"ranges": (Range(0, 10), Range(995, 6))}, "OUT_OF_BOUNDS"),
        ({"ranges": (Range((1 << 64) - 1, 2),)}, "OUT_OF_BOUNDS"),
        ({"ranges": (Range(0, 0),)}, "OUT_OF_BOUNDS"),
    ],
)
def test_what_was_not_granted_is_refused_by_name_and_the_next_is_served(fields, reason):
    served = Served()
    served.hear(ask(**fields, op=9) if "ranges" in fields else ask(op=9, **fields))
    fail = only_fail(served.said())
    assert (fail.op, fail.reason, served.phase) == (9, reason, Phase.IDLE)
    assert served.ledger.refused == {reason: 1}
    assert served.ledger.num_failed == 0
    served.hear(ask())
    assert payload_of(served.send_all())[0] == MEMORY[:10]


def test_a_forged_request_is_refused_before_its_ranges_are_read():
    served = Served()
    for capability, reason in ((b"x" * 16, "GRANT_REFUSED"), (b"c" * 16, "BAD_FRAME")):
        data = bytearray(encode(ask(capability=capability)))
        data[-20:-16] = b"\xff" * 4  # the number of ranges
        served.hear_bytes(bytes(data))
        assert only_fail(served.said()).reason == reason


def test_a_request_of_op_0_or_too_short_to_name_a_grant_ends_the_connection():
    for data in (
        head(Kind.PULL, op=0, nbytes=60) + bytes(60),
        head(Kind.PULL, op=1, nbytes=9) + bytes(9),
    ):
        served = Served()
        served.hear_bytes(data)
        fail = only_fail(served.said())
        assert (fail.op, fail.reason) == (0, "BAD_FRAME")


def test_an_expired_grant_is_refused_by_name():
    served = Served()
    served.hear(ask(), now_s=100.0)
    assert only_fail(served.said()).reason == "REGION_EXPIRED"


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ((), ask()),
        ((), Ping(op=1)),
        ((HELLO,), HELLO),
        ((HELLO,), Data(op=1, nbytes=1)),
        ((HELLO,), Done(op=1, note=b"")),
        ((HELLO,), Clear(op=1)),
        ((HELLO,), Pong(op=1)),
        ((HELLO,), Fail(op=0, reason="NO", retry_after_ms=0, message="")),
        ((HELLO, ask()), Ping(op=1)),
        ((HELLO, ask()), ask(op=2)),
        ((HELLO, push()), Data(op=1, nbytes=10)),
        ((HELLO,), ask([(0, 1)] * 9)),
    ],
)
def test_what_the_order_does_not_allow_ends_the_connection(before, said):
    served = Served(greeted=False, writable=True)
    for frame in before:
        served.hear(frame)
    served.said()
    served.hear(said)
    fail = only_fail(served.said())
    assert (fail.op, fail.reason) == (0, "BAD_FRAME")
    assert served.phase is Phase.LEAVING
    assert served.ledger.refused == {"BAD_FRAME": 1}


def test_a_single_byte_during_a_pull_ends_the_connection_and_inside_a_frame_without_a_word():
    for most, num_said, phase in ((1 << 20, 1, Phase.LEAVING), (50, 0, Phase.OVER)):
        served = Served()
        served.hear(ask(((0, 250),)))
        served.send(most=most)
        served.hear_bytes(b"\x09")
        assert (len(served.said()), served.phase) == (num_said, phase)
        assert served.ledger.num_failed == 1


def test_a_request_behind_an_unanswered_one_ends_the_connection():
    served = Served()
    served.hear(ask(capability=b"x" * 16), ask())
    assert [frame.reason for frame in served.said()] == ["BAD_FRAME"]


def test_done_of_another_transfer_ends_the_connection():
    served = Served()
    served.hear(ask(wants_done=True))
    served.send_all()
    served.hear(Done(op=2, note=b""))
    assert only_fail(served.said()).reason == "BAD_FRAME"
    assert served.ledger.num_failed == 1
    assert served.ledger.served_nbytes == []


def test_a_frame_that_may_not_come_now_is_refused_by_its_head():
    served = Served(greeted=False)
    served.hear_bytes(head(Kind.PULL, op=1, nbytes=60_000))
    assert only_fail(served.said()).reason == "BAD_FRAME"


def test_pings_are_answered_in_order_and_a_flood_of_them_is_not():
    served = Served()
    served.hear(*(Ping(op=op) for op in range(MAX_PINGS)))
    assert served.said() == [Pong(op=op) for op in range(MAX_PINGS)]
    served.hear(*(Ping(op=op) for op in range(MAX_PINGS + 1)))
    assert served.said()[-1].reason == "BAD_FRAME"


def test_a_frame_comes_in_any_number_of_parts():
    served = Served(greeted=False)
    for value in encode(HELLO) + encode(Ping(op=3)) + encode(ask()):
        served.hear_bytes(bytes([value]))
    assert [type(frame) for frame in served.said()] == [Welcome, Pong]
    assert payload_of(served.send_all())[0] == MEMORY[:10]


def test_nothing_is_heard_after_the_last_words():
    served = Served()
    served.hear_bytes(b"\xff" * 20)
    served.said()
    served.hear(ask())
    assert served.said() == []
    assert served.connection.transfer is None


def test_a_grant_that_ends_between_two_frames_is_a_fail_and_the_next_is_served():
    served = Served()
    served.hear(ask(((0, 250),), op=4))
    assert len(served.send()) == HEAD_NBYTES + CHUNK_NBYTES
    refuse(served)
    fail = only_fail(served.said())
    assert (fail.op, fail.reason, served.phase) == (4, "GRANT_REFUSED", Phase.IDLE)
    assert served.ledger.num_failed == 1
    assert served.ledger.served_nbytes == []


def test_a_grant_that_ends_inside_a_frame_cuts_the_connection_without_a_word():
    served = Served()
    served.hear(ask(((0, 250),)))
    served.send(most=HEAD_NBYTES + 30)
    refuse(served)
    assert served.said() == []
    assert served.phase is Phase.OVER
    assert served.ledger.refused == {"GRANT_REFUSED": 1}


def test_a_grant_that_ends_during_a_push_ends_the_connection():
    served = Served(writable=True)
    served.hear(push(((0, 250),), op=4))
    served.said()
    served.land(encode(Data(op=4, nbytes=100)) + bytes(50))
    refuse(served)
    fail = only_fail(served.said())
    assert (fail.op, fail.reason, served.phase) == (4, "GRANT_REFUSED", Phase.LEAVING)


def refuse(served):
    """What the loop does when the grant carries no further piece."""
    served.grants.revoke(b"c" * 16)
    with pytest.raises(Exception, match="no such grant") as refusal:
        served.grant.begin_piece(0.0)
    served.connection.stop(refusal.value, 0.0)


def due(served, at_s):
    """Checks when time is up, and lets it be so."""
    assert served.connection.due_at_s() == at_s
    served.connection.on_due(at_s - 0.01)
    before = served.phase
    assert before is not Phase.OVER
    served.connection.on_due(at_s)
    return before


def test_a_hello_that_does_not_come_ends_the_connection():
    served = Served(greeted=False)
    served.hear_bytes(encode(HELLO)[:-1], now_s=1.9)
    due(served, 2.0)
    assert only_fail(served.said()).reason == "BAD_FRAME"
    assert due(served, 3.0) is Phase.LEAVING
    assert served.phase is Phase.OVER


def test_half_a_frame_ends_the_connection_however_slowly_it_drips():
    served = Served()
    for index, value in enumerate(encode(ask())[:4]):
        served.hear_bytes(bytes([value]), now_s=1.0 + index / 2)
    due(served, 4.0)
    assert only_fail(served.said()).reason == "BAD_FRAME"


def test_silence_ends_an_idle_connection_and_a_ping_is_none():
    served = Served()
    served.hear(Ping(op=1), now_s=4.0)
    assert due(served, 9.0) is Phase.IDLE
    assert served.phase is Phase.OVER
    assert served.ledger.refused == {}


def test_silence_counts_from_the_end_of_the_last_transfer():
    served = Served()
    served.hear(ask(((0, 250),)), now_s=1.0)
    for now_s in (2.0, 3.0, 4.0):
        served.send(now_s=now_s)
    assert due(served, 9.0) is Phase.IDLE


def test_an_owner_without_idle_limit_waits():
    served = Served(settings=TcpSettings(idle_timeout_s=0))
    assert served.connection.due_at_s() == float("inf")


def test_a_reader_that_takes_nothing_is_cut_and_one_that_takes_a_little_is_not():
    served = Served()
    served.hear(ask(((0, 250),)), now_s=0.0)
    served.send(most=20, now_s=2.0)
    assert served.connection.due_at_s() == 5.0
    served.send(most=20, now_s=4.0)
    due(served, 7.0)
    assert served.phase is Phase.OVER
    assert served.ledger.num_failed == 1


def test_a_transfer_whose_time_is_up_between_frames_is_told_and_cut():
    served = Served()
    served.hear(ask(((0, 250),), op=4, timeout_ms=2500), now_s=0.0)
    served.send(now_s=1.0)
    due(served, 2.5)
    fail = only_fail(served.said())
    assert (fail.op, fail.reason, served.phase) == (4, "TRANSFER_TIMED_OUT", Phase.LEAVING)


def test_a_writer_that_sends_nothing_is_cut():
    served = Served(writable=True)
    served.hear(push())
    served.said()
    due(served, 3.0)
    assert only_fail(served.said()).reason == "TRANSFER_TIMED_OUT"
    assert served.ledger.num_failed == 1


def test_a_done_that_was_announced_and_does_not_come_ends_the_connection():
    served = Served()
    served.hear(ask(wants_done=True, timeout_ms=3_600_000))
    served.send_all()
    assert due(served, 3.0) is Phase.AWAITING_DONE
    assert served.ledger.num_failed == 1
    assert only_fail(served.said()).reason == "TRANSFER_TIMED_OUT"


def test_each_transfer_that_a_peer_leaves_behind_is_counted_once():
    served = Served()
    served.hear(ask())
    served.connection.lose(0.0)
    served.connection.lose(0.0)
    assert served.ledger.num_failed == 1
    assert served.phase is Phase.OVER


def test_a_done_that_is_on_its_way_at_the_deadline_is_heard():
    served = Served()
    served.hear(ask(wants_done=True, timeout_ms=1))
    served.send_all()
    served.connection.on_due(0.5)
    served.hear(Done(op=1, note=b"in time"), now_s=0.5)
    assert served.phase is Phase.IDLE
    assert [told.note for told in served.say_news()] == [b"in time"]
    assert not served.said()
