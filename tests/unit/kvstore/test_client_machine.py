"""The client without I/O: flows driven by hand against a node's state, and the conversation with a door."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from snowskin.kvstore.checksum import checksum
from snowskin.kvstore.client.conversation import Conversation, giving_back
from snowskin.kvstore.client.machine import Call, Published, PullBounds, Pulled
from snowskin.kvstore.errors import (
    BadRequest,
    ChecksumMismatch,
    DeadlineExceeded,
    LeaseExpired,
    NamespaceMismatch,
    NodeUnavailable,
    PoolExhausted,
    ProtocolViolation,
    TailUnknown,
    WireVersionMismatch,
)
from snowskin.kvstore.frames import FrameReader, frame
from snowskin.kvstore.messages import (
    WIRE_VERSION,
    AbortRequest,
    Access,
    CommitRequest,
    Greeting,
    Lease,
    LeaseId,
    Matched,
    Released,
    ReleaseRequest,
    Reserved,
    ReserveRequest,
    SessionId,
    StatRequest,
    WakeReason,
)
from snowskin.kvstore.wire import error_to_detail, greeting_to, reply_to
from snowskin.transport.errors import SnowskinError, TransferTimedOut
from snowskin.v1 import door_pb2
from tests.support.client_stage import NUM_BLOCKS, SETTINGS, Stage
from tests.support.node_driver import BLOCK, NAMESPACE, NodeDriver, key, lease_of


@pytest.fixture
def stage() -> Stage:
    return Stage()


# --- publish


def test_published_blocks_come_back_by_a_pull(stage):
    published = stage.run(stage.publish("a b c"))
    assert published == Published(
        num_blocks=3, num_blocks_existing=0, nbytes=3 * BLOCK, seconds=0.0
    )
    assert stage.kinds() == ["Reserve", "Move", "Commit"]
    pulled = stage.run(stage.pull("a b c d"))
    assert stage.kinds() == ["Match", "Move", "Release"]
    assert (pulled.num_blocks, pulled.nbytes, pulled.num_extents) == (3, 3 * BLOCK, 2)
    assert (pulled.corrupt_blocks, pulled.wake_reason) == ((), WakeReason.SATISFIED)
    assert (stage.landing[: 3 * BLOCK] == stage.memory[: 3 * BLOCK]).all()
    stage.assert_nothing_is_held()


def test_blocks_that_are_here_move_nothing(stage):
    stage.run(stage.publish("a b"))
    published = stage.run(stage.publish("a b"))
    assert (published.num_blocks, published.num_blocks_existing, published.nbytes) == (0, 2, 0)
    assert stage.kinds() == ["Reserve"]


def test_only_new_blocks_are_copied_each_from_its_own_place(stage):
    stage.run(stage.publish("b", first=1))
    published = stage.run(stage.publish("a b c"))
    assert (published.num_blocks, published.num_blocks_existing) == (2, 1)
    assert published.nbytes == 2 * BLOCK
    stage.run(stage.pull("a b c"))
    assert (stage.landing[: 3 * BLOCK] == stage.memory[: 3 * BLOCK]).all()


def test_blocks_may_lie_anywhere_in_local_memory(stage):
    stage.run(stage.publish("a b c", local_offsets=[5 * BLOCK, 0, 2 * BLOCK]))
    pulled = stage.run(stage.pull("a b c", local_offsets=[4 * BLOCK, 3 * BLOCK, 7 * BLOCK]))
    assert pulled.num_blocks == 3
    for source, target in ((5, 4), (0, 3), (2, 7)):
        found = stage.landing[target * BLOCK : (target + 1) * BLOCK]
        assert (found == stage.memory[source * BLOCK : (source + 1) * BLOCK]).all()


def test_block_that_another_writer_committed_meanwhile_is_counted_as_existing(stage):
    other = stage.node.session("other")
    stage.before_move = lambda: stage.node.publish(other, "b")
    published = stage.run(stage.publish("a b c"))
    assert (published.num_blocks, published.num_blocks_existing) == (2, 1)
    stage.assert_nothing_is_held()


def test_reserve_is_given_the_time_that_it_may_queue(stage):
    stage.run(stage.publish("a", timeout_s=5.0, parent_key=key("z"), one_reader=True))
    call = stage.steps[0]
    assert isinstance(call, Call)
    assert call.timeout_s == SETTINGS.call_timeout_s + 5.0
    request = call.request
    assert isinstance(request, ReserveRequest)
    assert (request.timeout_s, request.ttl_s, request.one_reader) == (5.0, 30.0, True)
    assert request.parent_key == key("z")


def test_wrong_arguments_are_refused_before_anything_is_asked(stage):
    for flow in (
        stage.publish("a b", local_offsets=[0]),
        stage.pull("a b", local_offsets=[]),
        stage.publish_tail(""),
        stage.pull_tail(""),
    ):
        with pytest.raises(BadRequest):
            stage.run(flow)
    assert stage.node.answers == {}


# --- pull


def test_pull_of_nothing_moves_nothing(stage):
    pulled = stage.run(stage.pull("a"))
    assert (pulled.num_blocks, pulled.nbytes, pulled.first_byte_s) == (0, 0, None)
    assert stage.kinds() == ["Match"]


def test_pull_takes_no_more_blocks_than_it_has_places_for(stage):
    stage.run(stage.publish("a b c"))
    pulled = stage.run(stage.pull("a b c", local_offsets=range(0, 2 * BLOCK, BLOCK)))
    assert pulled.num_blocks == 2
    assert not stage.landing[2 * BLOCK :].any()


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_corrupt_block_ends_the_run_and_is_reported(stage, wrong):
    stage.run(stage.publish("a b c"))
    stage.pool[wrong * BLOCK + 77] ^= 1
    pulled = stage.run(stage.pull("a b c"))
    assert (pulled.num_blocks, pulled.corrupt_blocks) == (wrong, (wrong,))
    assert stage.node.probe(stage.session, "a b c") == "".join(
        "." if index == wrong else "x" for index in range(3)
    )
    stage.assert_nothing_is_held()


def test_right_bytes_under_a_wrong_key_are_corrupt(stage):
    stage.run(stage.publish("a b"))
    stage.pool[: 2 * BLOCK] = np.roll(stage.pool[: 2 * BLOCK], BLOCK)
    assert stage.run(stage.pull("a b")).corrupt_blocks == (0, 1)


def test_without_verification_wrong_bytes_pass(stage):
    stage.run(stage.publish("a"))
    stage.pool[0] ^= 1
    pulled = stage.run(stage.pull("a", replace(SETTINGS, verify=False)))
    assert (pulled.num_blocks, pulled.corrupt_blocks) == (1, ())


def test_copy_that_outlived_its_lease_counts_only_where_it_is_verified(stage):
    stage.run(stage.publish("a"))
    stage.before_move = lambda: stage.node.wait(10.5)
    assert stage.run(stage.pull("a")).num_blocks == 1
    with pytest.raises(LeaseExpired):
        stage.run(stage.pull("a", replace(SETTINGS, verify=False)))
    stage.assert_nothing_is_held()


def test_pull_with_another_layout_is_refused_and_gives_the_lease_back(stage):
    stage.run(stage.publish("a"))
    with pytest.raises(NamespaceMismatch, match="4096 bytes for 1 blocks of 512"):
        stage.run(stage.pull("a", block_nbytes=512))
    assert stage.kinds() == ["Match", "Release"]
    stage.assert_nothing_is_held()


@pytest.mark.parametrize("spoil", ["fewer", "order", "beyond", "checksums"])
def test_answer_that_contradicts_itself_is_refused_and_its_lease_given_back(stage, spoil):
    stage.run(stage.publish("a b c"))
    carry_out = stage.carry_out

    def spoiled(step):
        reply = carry_out(step)
        if not isinstance(reply, Matched):
            return reply
        first, second = reply.runs
        match spoil:
            case "fewer":
                return replace(reply, runs=(first,))
            case "order":
                return replace(reply, runs=(second, first))
            case "beyond":
                return replace(reply, runs=(first, replace(second, first_block_index=3)))
        return replace(reply, checksums=())

    stage.carry_out = spoiled
    with pytest.raises(ProtocolViolation):
        stage.run(stage.pull("a b c"))
    stage.assert_nothing_is_held()


# --- tails


def test_tail_goes_over_and_leaves_nothing(stage):
    assert stage.run(stage.publish_tail()).num_blocks == 1
    assert stage.run(stage.pull_tail()).num_blocks == 1
    found = stage.landing[2 * BLOCK : 3 * BLOCK]
    assert (found == stage.memory[BLOCK : 2 * BLOCK]).all()
    assert stage.node.books() == {"free": NUM_BLOCKS}


def test_tail_that_is_not_there_is_unknown(stage):
    with pytest.raises(TailUnknown):
        stage.run(stage.pull_tail())


def test_corrupt_tail_is_an_error_and_gone(stage):
    stage.run(stage.publish_tail())
    stage.pool[5] ^= 1
    with pytest.raises(ChecksumMismatch, match="'r1'"):
        stage.run(stage.pull_tail())
    assert stage.node.books() == {"free": NUM_BLOCKS}


# --- whatever ends a flow, its lease is given back

ERRORS = [
    NodeUnavailable("cut"),
    DeadlineExceeded("late"),
    PoolExhausted("full"),
    KeyboardInterrupt(),
    ZeroDivisionError(),
]


@pytest.mark.parametrize("is_carried_out_first", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("flow", "fail_at", "last"),
    [
        ("publish", 1, "Abort"),
        ("publish", 2, "Abort"),
        ("publish_tail", 1, "Abort"),
        ("publish_tail", 2, "Abort"),
        ("pull", 1, "Release"),
        ("pull_tail", 1, "Release"),
    ],
)
def test_failing_step_gives_the_lease_back(stage, flow, fail_at, last, error, is_carried_out_first):
    if flow == "pull":
        stage.run(stage.publish("a b c"))
    if flow == "pull_tail":
        stage.run(stage.publish_tail())
    stage.fail_at, stage.fail_with = fail_at, error
    stage.is_carried_out_first = is_carried_out_first
    started = getattr(stage, flow)(*(["a b c"] if flow in ("publish", "pull") else []))
    if last == "Release" and is_carried_out_first and isinstance(error, SnowskinError):
        assert stage.run(started).broken_by is error  # all had landed, and is as good as ever
    else:
        with pytest.raises(type(error)) as raised:
            stage.run(started)
        assert raised.value is error
    assert stage.kinds()[-1] == last
    stage.assert_nothing_is_held()


@pytest.mark.parametrize(
    "error", [NodeUnavailable("cut"), TransferTimedOut("late")], ids=["cut", "late"]
)
@pytest.mark.parametrize(("num_pieces", "num_good"), [(2, 2), (3, 3), (5, 5)])
def test_what_landed_before_a_copy_broke_off_is_kept(stage, error, num_pieces, num_good):
    for name in "abcdef":  # extents of their own: two pieces a block
        stage.run(stage.publish(name, first="abcdef".index(name)))
    stage.cut_after_pieces, stage.fail_with = 2 * num_pieces, error
    pulled = stage.run(stage.pull("a b c d e f"))
    assert (pulled.num_blocks, pulled.broken_by) == (num_good, error)
    assert (pulled.nbytes, pulled.corrupt_blocks) == (num_good * BLOCK, ())
    assert (stage.landing[: num_good * BLOCK] == stage.memory[: num_good * BLOCK]).all()
    assert not stage.steps[-1].request.complaints, "what did not land is not broken"
    stage.assert_nothing_is_held()


def test_half_a_block_is_none_when_a_copy_breaks_off(stage):
    for name in "abc":
        stage.run(stage.publish(name, first="abc".index(name)))
    stage.cut_after_pieces = 3
    assert stage.run(stage.pull("a b c")).num_blocks == 1
    stage.cut_after_pieces = 1
    with pytest.raises(NodeUnavailable):
        stage.run(stage.pull("a b c"))
    stage.assert_nothing_is_held()


def test_a_corrupt_block_before_a_copy_broke_off_is_told(stage):
    for name in "abcd":
        stage.run(stage.publish(name, first="abcd".index(name)))
    stage.pool[stage.steps[1].runs[0][1][0].remote_offset - 2 * BLOCK] ^= 1  # of block b
    stage.cut_after_pieces = 6
    pulled = stage.run(stage.pull("a b c d"))
    assert (pulled.num_blocks, pulled.corrupt_blocks) == (1, (1,))
    assert isinstance(pulled.broken_by, NodeUnavailable)
    assert stage.steps[-1].request.complaints[0].block_indices == (1,)


def test_bytes_that_nobody_checks_are_not_kept_when_a_copy_breaks_off(stage):
    stage.run(stage.publish("a"))
    stage.fail_at, stage.is_carried_out_first = 1, True
    with pytest.raises(NodeUnavailable):
        stage.run(stage.pull("a", settings=replace(SETTINGS, verify=False)))
    stage.assert_nothing_is_held()


def test_a_pull_has_bounds_of_its_own_for_look_up_and_copy(stage):
    stage.run(stage.publish("a"))
    found = []
    bounds = PullBounds(
        lookup_timeout_s=0.02, move_timeout_s=0.5, on_found=lambda: found.append(stage.kinds())
    )
    stage.run(stage.pull("a", bounds=bounds, timeout_s=0.25))
    assert [step.timeout_s for step in stage.steps[:2]] == [0.27, 0.5]
    assert found == [["Match"]]
    stage.run(stage.pull("b", bounds=bounds))
    assert len(found) == 1, "nothing was found"


@pytest.mark.parametrize("flow", ["publish", "pull"])
def test_flow_without_a_lease_has_nothing_to_give_back(stage, flow):
    stage.fail_at = 0
    with pytest.raises(NodeUnavailable):
        stage.run(getattr(stage, flow)("a"))
    assert len(stage.steps) == 1


def test_commit_that_came_too_late_is_aborted(stage):
    stage.before_move = lambda: stage.node.wait(31)
    with pytest.raises(LeaseExpired):
        stage.run(stage.publish("a"))
    assert stage.kinds() == ["Reserve", "Move", "Commit", "Abort"]
    stage.assert_nothing_is_held()


# --- the conversation with a door


def response(call_id: int, field: str, reply: Any) -> bytes:
    """What a node sends."""
    message = door_pb2.DoorResponse(call_id=call_id)
    if isinstance(reply, SnowskinError):
        message.error.CopyFrom(error_to_detail(reply))
    else:
        reply_to(reply, getattr(message, field))
    return frame(message.SerializeToString())


def said(data: bytes) -> list[door_pb2.DoorRequest]:
    """What a node hears."""
    return [door_pb2.DoorRequest.FromString(payload) for payload in FrameReader().feed(data)]


RELEASED = Released(num_unknown=3)
GREETING = Greeting(
    node_id="n7",
    node_epoch=5,
    session_id=SessionId(9),
    pools=(),
    max_keys=8192,
    max_extent_nbytes=1 << 20,
)


def hello_response(call_id: int) -> bytes:
    message = door_pb2.DoorResponse(call_id=call_id)
    greeting_to(GREETING, message.hello, WIRE_VERSION)
    return frame(message.SerializeToString())


def test_client_says_who_it_is_and_what_it_wants_and_is_greeted():
    conversation = Conversation()
    (hello,) = said(conversation.hello("decode-0", Access.READ))
    assert (hello.hello.client_name, hello.hello.wire_version) == ("decode-0", WIRE_VERSION)
    assert hello.hello.access == door_pb2.POOL_ACCESS_READ
    data = hello_response(hello.call_id)
    assert conversation.greeted(data[:7]) is None
    assert conversation.greeted(data[7:]) == GREETING


@pytest.mark.parametrize("call_id", [0, 1])
def test_session_that_is_refused_says_why(call_id):
    conversation = Conversation()
    conversation.hello("decode-0", Access.WRITE)
    with pytest.raises(WireVersionMismatch, match="upgrade"):
        conversation.greeted(
            response(call_id, "", WireVersionMismatch("client speaks 2", hint="upgrade it"))
        )


def test_answers_find_their_calls_in_any_order_and_any_pieces():
    conversation = Conversation()
    calls = [conversation.call(StatRequest(), "req")[0] for _ in range(3)]
    assert len(set(calls)) == 3
    data = response(calls[2], "release", RELEASED)
    data += response(calls[0], "", PoolExhausted("full", retry_after_s=0.5))
    answers = []
    for byte in data:
        found, replies = conversation.receive(bytes([byte]))
        answers += found
        assert replies == []
    assert answers[0] == (calls[2], RELEASED)
    call_id, error = answers[1]
    assert call_id == calls[0]
    assert isinstance(error, PoolExhausted)
    assert error.retry_after_s == 0.5


def test_request_id_travels_with_each_call():
    conversation = Conversation()
    _, data = conversation.call(StatRequest(), "req-1")
    data += conversation.tell(AbortRequest(lease_id=LeaseId(4)), "req-2")
    called, told = said(data)
    assert (called.request_id, called.WhichOneof("request")) == ("req-1", "stat")
    assert (told.request_id, told.call_id, told.abort.lease.id) == ("req-2", 0, 4)


def late_answers() -> list[tuple[str, Any, Any]]:
    node = NodeDriver()
    writer = node.session()
    reserved = node.reserve(writer, "a")
    node.commit(writer, lease_of(reserved), "a")
    matched = node.match(writer, "a")
    return [
        ("match", matched, ReleaseRequest(lease_ids=(lease_of(matched),))),
        ("reserve", reserved, AbortRequest(lease_id=lease_of(reserved))),
    ]


@pytest.mark.parametrize(("field", "reply", "given_back"), late_answers(), ids=["match", "reserve"])
def test_lease_that_comes_when_nobody_waits_is_given_back(field, reply, given_back):
    assert giving_back(reply) == given_back
    conversation = Conversation()
    call_id, _ = conversation.call(StatRequest())
    conversation.forget(call_id)
    answers, replies = conversation.receive(response(call_id, field, reply))
    assert answers == []
    (told,) = said(b"".join(replies))
    assert told.call_id == 0
    sent = told.release.leases[0].id if field == "match" else told.abort.lease.id
    assert sent == reply.lease.id


def test_late_answer_without_a_lease_is_dropped():
    conversation = Conversation()
    call_id, _ = conversation.call(StatRequest())
    conversation.forget(call_id)
    empty = Reserved(lease=None, runs=())
    assert giving_back(empty) is None
    assert conversation.receive(response(call_id, "reserve", empty)) == ([], [])
    assert conversation.receive(response(call_id, "", NodeUnavailable("x"))) == ([], [])


def test_error_to_no_call_ends_the_conversation():
    conversation = Conversation()
    with pytest.raises(ProtocolViolation, match="hello came twice"):
        conversation.receive(response(0, "", ProtocolViolation("hello came twice")))


def test_answer_of_an_unknown_kind_is_a_violation():
    with pytest.raises(ProtocolViolation):
        Conversation().receive(frame(door_pb2.DoorResponse(call_id=1).SerializeToString()))
    with pytest.raises(SnowskinError):
        Conversation().receive(frame(b"\xff\xff\xff\xff"))


def test_publish_computes_the_checksums_that_the_wire_defines(stage):
    stage.run(stage.publish("a b"))
    commit = stage.steps[2]
    assert isinstance(commit, Call)
    assert isinstance(commit.request, CommitRequest)
    assert commit.request.checksums == checksum(
        NAMESPACE, key("a"), stage.memory[:BLOCK]
    ) + checksum(NAMESPACE, key("b"), stage.memory[BLOCK : 2 * BLOCK])
    assert commit.lease == Lease(id=commit.request.lease_id, ttl_s=30.0)


def test_pulled_is_what_it_says(stage):
    stage.run(stage.publish("a"))
    stage.before_move = lambda: stage.node.wait(0.25)
    assert stage.run(stage.pull("a")) == Pulled(
        num_blocks=1,
        nbytes=BLOCK,
        num_extents=1,
        corrupt_blocks=(),
        wake_reason=WakeReason.SATISFIED,
        seconds=0.25,
        first_byte_s=0.0,
    )
