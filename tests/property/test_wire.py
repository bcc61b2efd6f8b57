"""The border, fed with anything: what cannot be understood is a SnowskinError, what was said is what is heard."""

from __future__ import annotations

import math

import grpc
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snowskin.kvstore import errors
from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.checksum import CHECKSUM_NBYTES
from snowskin.kvstore.client.conversation import Conversation
from snowskin.kvstore.extent import Extent
from snowskin.kvstore.frames import HEADER_NBYTES, MAX_FRAME_NBYTES, FrameReader, frame
from snowskin.kvstore.messages import (
    WIRE_VERSION,
    Aborted,
    AbortRequest,
    CommitRequest,
    Committed,
    Complaint,
    GrantedRegion,
    Greeting,
    Lease,
    Matched,
    MatchRequest,
    NodeStat,
    PoolGrant,
    PoolStat,
    Probed,
    ProbeRequest,
    Released,
    ReleaseRequest,
    Renewed,
    RenewRequest,
    Reserved,
    ReserveRequest,
    Run,
    SessionId,
    StatRequest,
    TailSpec,
    WakeReason,
)
from snowskin.kvstore.rpc import ERROR_HEADER, rpc_error_to_error
from snowskin.kvstore.wire import (
    detail_to_error,
    error_to_detail,
    greeting_from,
    greeting_to,
    parse,
    reply_from,
    reply_to,
    request_from,
    request_to,
)
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import SnowskinError
from snowskin.v1 import common_pb2, door_pb2, store_pb2

NODE_ID = "n"
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
SMALL = st.integers(0, 5)
BYTES = st.binary(max_size=70)
TEXT = st.text(max_size=40)
# Times cross as whole milliseconds, so only those come back as they went.
SECONDS = st.integers(0, 2**31 - 1).map(lambda ms: ms / 1000)
LEASE_IDS = st.lists(U64, max_size=4).map(tuple)


@st.composite
def key_columns(draw, min_keys=0):
    width = draw(st.integers(8, 64))
    keys = draw(st.lists(st.binary(min_size=width, max_size=width), min_size=min_keys, max_size=5))
    return KeyColumn.of(keys, width=width if keys else 32)  # an empty column has no width


extents = st.builds(
    Extent,
    node_id=st.just(NODE_ID),
    tier=st.sampled_from(["hbm", "dram", "nvme"]),
    pool_id=U32,
    offset=st.integers(0, 2**40),
    nbytes=st.integers(1, 2**40),
    generation=st.integers(1, 2**40),
)
runs = st.lists(
    st.builds(
        Run, extent=extents, first_block_index=U32, num_blocks=st.integers(1, 9), shard_index=U32
    ),
    max_size=4,
).map(tuple)
regions = st.lists(
    st.builds(GrantedRegion, pool_id=U32, descriptors=st.lists(BYTES, max_size=2).map(tuple)),
    max_size=2,
).map(tuple)
# By the local door a lease has neither capability nor regions.
leases = (
    st.none()
    | st.builds(Lease, id=U64, ttl_s=SECONDS)
    | st.builds(Lease, id=U64, ttl_s=SECONDS, capability=st.binary(min_size=1), regions=regions)
)
SCHEMES = st.lists(TEXT, max_size=3).map(tuple)
requests = st.one_of(
    st.builds(
        ReserveRequest,
        namespace=BYTES,
        keys=key_columns(),
        parent_key=BYTES,
        block_nbytes=U64,
        tail=st.none() | st.builds(TailSpec, request_id=TEXT, nbytes=U64),
        one_reader=st.booleans(),
        ttl_s=SECONDS,
        timeout_s=SECONDS,
        schemes=SCHEMES,
    ),
    st.builds(CommitRequest, lease_id=U64, num_blocks=U32, checksums=BYTES, schemes=SCHEMES),
    st.builds(AbortRequest, lease_id=U64),
    st.builds(ProbeRequest, namespaces=st.lists(BYTES, max_size=3).map(tuple), keys=key_columns()),
    st.builds(
        MatchRequest,
        namespaces=st.lists(BYTES, max_size=3).map(tuple),
        keys=key_columns(),
        max_blocks=U32,
        ttl_s=SECONDS,
        wait_blocks=U32,
        timeout_s=SECONDS,
        tail_request_id=TEXT,
        schemes=SCHEMES,
    ),
    st.builds(RenewRequest, lease_ids=LEASE_IDS, ttl_s=SECONDS),
    st.builds(
        ReleaseRequest,
        lease_ids=LEASE_IDS,
        complaints=st.lists(
            st.builds(Complaint, lease_id=U64, block_indices=st.lists(U32, max_size=3).map(tuple)),
            max_size=3,
        ).map(tuple),
    ),
    st.just(StatRequest()),
)
pool_stats = st.builds(
    PoolStat,
    pool_id=U32,
    tier=st.sampled_from(["hbm", "dram", "nvme"]),
    tenant=TEXT,
    **dict.fromkeys(
        [
            "capacity_nbytes",
            "free_nbytes",
            "committed_nbytes",
            "reserved_nbytes",
            "quarantined_nbytes",
            "largest_hole_nbytes",
            "leased_nbytes",
        ],
        U64,
    ),
)
replies = st.one_of(
    st.tuples(st.just("reserve"), st.builds(Reserved, lease=leases, runs=runs)),
    st.tuples(
        st.just("commit"),
        st.builds(
            Committed,
            existing_block_indices=st.lists(U32).map(tuple),
            num_blocks_left=U32,
            regions=regions,
        ),
    ),
    st.tuples(st.just("abort"), st.builds(Aborted, freed_nbytes=U64)),
    st.tuples(
        st.just("probe"), st.builds(Probed, num_blocks=U32, present_bitmap=BYTES, node_epoch=U64)
    ),
    st.tuples(
        st.just("match"),
        st.builds(
            Matched,
            num_blocks=U32,
            lease=leases,
            runs=runs,
            checksums=st.lists(BYTES, max_size=3).map(tuple),
            wake_reason=st.sampled_from(WakeReason),
            node_epoch=U64,
        ),
    ),
    st.tuples(st.just("renew"), st.builds(Renewed, ttl_s=st.lists(SECONDS, max_size=4).map(tuple))),
    st.tuples(st.just("release"), st.builds(Released, num_unknown=U32)),
    st.tuples(
        st.just("stat"),
        st.builds(
            NodeStat,
            node_id=TEXT,
            node_epoch=U64,
            pools=st.lists(pool_stats, max_size=3).map(tuple),
            num_blocks=U64,
            num_read_leases=U32,
            num_write_leases=U32,
            num_sessions=U32,
            num_waiting_matches=U32,
            num_waiting_reserves=U32,
            counters=st.dictionaries(TEXT, U64, max_size=3),
            draining=st.booleans(),
            door=TEXT,
            transports=SCHEMES,
            advertisement=st.binary(max_size=99),
        ),
    ),
)


def through_bytes(message):
    return type(message).FromString(message.SerializeToString())


def as_door_request(request):
    name, message = request_to(request)
    envelope = door_pb2.DoorRequest(call_id=1)
    getattr(envelope, name).CopyFrom(message)
    getattr(envelope, name).SetInParent()
    return envelope


# --- what was said is what is heard


@given(requests)
def test_a_request_arrives_as_it_was_made(request):
    arrived = through_bytes(as_door_request(request))
    name = arrived.WhichOneof("request")
    assert request_from(name, getattr(arrived, name)) == request


@given(requests, BYTES)
def test_a_request_carries_its_capability_with_each_lease(request, capability):
    _, message = request_to(request, capability)
    refs = list(getattr(message, "leases", []))
    if "lease" in message.DESCRIPTOR.fields_by_name:
        refs.append(getattr(message, "lease"))  # noqa: B009  not every request has one
    assert all(ref.capability == capability for ref in refs)


@given(replies)
def test_a_reply_arrives_as_it_was_made(named):
    name, reply = named
    envelope = door_pb2.DoorResponse(call_id=7)
    reply_to(reply, getattr(envelope, name))
    arrived = through_bytes(envelope)
    assert arrived.WhichOneof("response") == name
    heard = reply_from(name, getattr(arrived, name), NODE_ID)
    assert type(heard) is type(reply)
    for field in type(reply).__dataclass_fields__:
        said, got = getattr(reply, field), getattr(heard, field)
        if field in ("lease", "ttl_s"):
            assert_never_longer(said, got)
        else:
            assert got == said


def assert_never_longer(said, heard):
    """A lease's life may lose a millisecond on the way, and never gains one."""
    if said is None:
        assert heard is None
    elif isinstance(said, Lease):
        assert (heard.id, heard.capability) == (said.id, said.capability)
        assert_never_longer((said.ttl_s,), (heard.ttl_s,))
    else:
        for mine, theirs in zip(said, heard, strict=True):
            assert mine - 0.0011 < theirs <= mine


@given(st.floats(0, 1e9) | st.floats(), st.sampled_from(["ttl_s", "timeout_s"]))
def test_a_wait_is_never_shortened_to_nothing(seconds, field):
    if math.isnan(seconds):
        return
    request = MatchRequest(namespaces=(), keys=KeyColumn(packed=b""), **{field: seconds})
    heard = getattr(request_from(*request_to(request)), field)
    assert (heard > 0) == (seconds > 0)
    assert heard >= min(seconds, 2**31 / 1000 - 1)


@given(
    st.builds(
        Greeting,
        node_id=TEXT,
        node_epoch=U64,
        session_id=U64.map(SessionId),
        pools=st.lists(
            st.builds(
                PoolGrant,
                pool_id=U32,
                tier=st.sampled_from(["hbm", "dram", "nvme"]),
                nbytes=U64,
                region=BYTES,
            ),
            max_size=3,
        ).map(tuple),
        max_keys=U32,
        max_extent_nbytes=U64,
    )
)
def test_a_greeting_arrives_as_it_was_made(greeting):
    message = door_pb2.HelloResponse()
    greeting_to(greeting, message, WIRE_VERSION)
    assert greeting_from(through_bytes(message)) == greeting


ERROR_KINDS = sorted(errors._classes(SnowskinError).values(), key=lambda kind: kind.reason)


@given(st.sampled_from(ERROR_KINDS), TEXT, TEXT, st.none() | st.floats(0.001, 1000))
def test_an_error_arrives_as_it_was_raised(kind, message, hint, retry_after_s):
    error = SnowskinError.__new__(kind)
    SnowskinError.__init__(error, message, hint=hint, retry_after_s=retry_after_s)
    heard = detail_to_error(through_bytes(error_to_detail(error)))
    assert type(heard) is kind
    assert (heard.message, heard.hint, heard.status) == (message, hint, kind.status)
    if retry_after_s is None:
        assert heard.retry_after_s is None
    else:
        assert heard.retry_after_s == pytest.approx(retry_after_s, abs=0.001)


def test_no_two_errors_share_a_reason():
    """Nor could a second class of the same name take over what the first one's peers say."""

    def all_of(kind):
        yield kind
        for child in kind.__subclasses__():
            yield from all_of(child)

    ours = [kind for kind in all_of(SnowskinError) if kind.__module__.startswith("snowskin.")]
    assert len({kind.reason for kind in ours}) == len({*ours})


# --- anything at all


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=6), st.data())
def test_frames_come_out_whole_however_they_come_in(payloads, data):
    stream = b"".join(frame(payload) for payload in payloads)
    assert list(FrameReader().feed(stream)) == payloads
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader, heard = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        heard += reader.feed(stream[start:end])
    assert heard == payloads
    assert reader.num_pending == 0


def fed(pieces):
    """What a reader makes of these pieces: its messages, and whether it refused to read on."""
    reader, heard = FrameReader(), []
    try:
        for piece in pieces:
            for payload in reader.feed(piece):
                heard.append(payload)  # noqa: PERF402  those before a violation count
    except errors.ProtocolViolation:
        return heard, True
    return heard, False


@given(st.binary(max_size=300) | st.lists(BYTES, max_size=4).map(lambda p: b"".join(map(frame, p))))
@example(frame(b"good") + b"\xff\xff\xff\xff" + b"bad")
@example(frame(b"good") + b"\0\0\0\0")
@example(frame(b"good")[:-1])
def test_a_stream_means_the_same_whole_and_byte_by_byte(stream):
    assert fed([stream]) == fed([stream[i : i + 1] for i in range(len(stream))])


@pytest.mark.parametrize("nbytes", [0, MAX_FRAME_NBYTES + 1, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_before_its_bytes_come(nbytes):
    assert fed([nbytes.to_bytes(HEADER_NBYTES, "little")]) == ([], True)


def test_the_longest_frame_passes_and_one_byte_more_is_not_sent():
    payload = bytes(MAX_FRAME_NBYTES)
    assert list(FrameReader().feed(frame(payload))) == [payload]
    with pytest.raises(errors.ProtocolViolation, match="fewer keys"):
        frame(payload + b"x")


def refusal_of(understand):
    """Status of the SnowskinError that `understand` ends with, if it does; anything else is a crash."""
    try:
        understand()
    except SnowskinError as error:
        return error.status
    return None


def like(strategy):
    """Bytes that begin as good messages do."""
    return st.binary(max_size=200) | st.tuples(strategy, st.binary(max_size=6)).map(
        lambda pair: pair[0].SerializeToString() + pair[1]
    )


def as_door_response(named):
    response = door_pb2.DoorResponse(call_id=1)
    reply_to(named[1], getattr(response, named[0]))
    return response


@given(like(requests.map(as_door_request)))
def test_a_node_understands_or_refuses_any_bytes(data):
    def understand():
        message = parse(door_pb2.DoorRequest, data)
        name = message.WhichOneof("request")
        if name is not None and name != "hello":
            request_from(name, getattr(message, name))

    assert refusal_of(understand) in (None, "INVALID_ARGUMENT")


@given(
    st.sampled_from(["Reserve", "Commit", "Abort", "Probe", "Match", "Renew", "Release"]),
    st.binary(max_size=100),
)
def test_each_request_understands_or_refuses_any_bytes(method, data):
    def understand():
        request_from(method.lower(), parse(getattr(store_pb2, f"{method}Request"), data))

    assert refusal_of(understand) in (None, "INVALID_ARGUMENT")


@given(like(replies.map(as_door_response)))
@example(door_pb2.DoorResponse(call_id=1, match={"wake_reason": 99}).SerializeToString())
def test_a_client_understands_or_refuses_any_bytes(data):
    conversation = Conversation()
    conversation.call(StatRequest())
    refusal_of(lambda: conversation.receive(frame(data)))


@given(BYTES, U32)
def test_a_key_column_is_whole_or_refused(packed, width):
    columns = []
    refusal = refusal_of(lambda: columns.append(KeyColumn(packed=packed, width=width)))
    assert refusal == (None if columns else "INVALID_ARGUMENT")
    for column in columns:
        assert b"".join(column) == packed
        assert len(column) * width == len(packed)


@given(st.binary(max_size=200))
def test_a_region_descriptor_is_whole_or_refused(data):
    descriptors = []
    refusal = refusal_of(lambda: descriptors.append(RegionDescriptor.from_bytes(data)))
    assert refusal == (None if descriptors else "INVALID_ARGUMENT")
    assert all(descriptor.to_bytes() == data for descriptor in descriptors)


class FailedCall(grpc.RpcError):
    """As grpc raises it, with a peer's trailing metadata."""

    def __init__(self, trailing, code=grpc.StatusCode.UNKNOWN):
        self._trailing, self._code = trailing, code

    def trailing_metadata(self):
        return self._trailing

    def code(self):
        return self._code

    def details(self):
        return None


@given(st.binary(max_size=100), st.sampled_from(grpc.StatusCode))
def test_any_error_of_any_peer_becomes_one_of_ours(data, code):
    error = rpc_error_to_error(FailedCall(((ERROR_HEADER, data),), code), "peer")
    assert isinstance(error, SnowskinError)


def test_an_error_of_a_newer_peer_keeps_its_words():
    detail = common_pb2.ErrorDetail(
        reason="FROM_THE_FUTURE", status="ABORTED", message="what", hint="do"
    )
    error = detail_to_error(detail)
    assert (error.message, error.hint) == ("what", "do")


def test_checksum_columns_of_an_unknown_algorithm_are_refused():
    message = store_pb2.CommitRequest(num_blocks=1)
    message.checksums.packed = bytes(CHECKSUM_NBYTES)
    with pytest.raises(errors.BadRequest, match="CRC32C_KEYED"):
        request_from("commit", message)
