"""What a client gets wrong is refused by name, with what to do, by both doors; and costs the node nothing."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

from snowskin.kvstore import errors
from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.client import conversation
from snowskin.kvstore.frames import MAX_FRAME_NBYTES
from snowskin.kvstore.messages import (
    AbortRequest,
    CommitRequest,
    Complaint,
    Lease,
    LeaseId,
    MatchRequest,
    ProbeRequest,
    ReleaseRequest,
    RenewRequest,
    ReserveRequest,
    TailSpec,
)
from snowskin.kvstore.node.daemon import NodeSettings, make_shell
from snowskin.kvstore.node.door import LocalDoor
from snowskin.kvstore.rpc import RpcLimits, rpc_error_to_error
from snowskin.kvstore.wire import EMPTY_KEYS
from snowskin.tools.cluster.main import cli
from snowskin.transport.errors import SnowskinError
from snowskin.v1 import door_pb2, store_pb2, store_pb2_grpc
from tests.support.node_process import NodeProcess
from tests.support.raw_door import RawDoor
from tests.support.store_drivers import DRIVERS, WAYS, connected, keys_of, namespace_of
from tests.support.waiting import eventually

# The grace is long, so that what ran out can be looked at before it is gone; every test gives it back.
NODE = {"dram_nbytes": 4 << 20, "log_level": "error", "grace_s": 30.0, "max_extent_nbytes": 1 << 20}
NAMESPACE = namespace_of(1)
KEYS = keys_of(1, 4)
CHECKSUM = bytes(4)


def pytest_generate_tests(metafunc):
    """Every test that names a way or a driver runs with each."""
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", WAYS)
    if "driver" in metafunc.fixturenames:
        metafunc.parametrize("driver", DRIVERS)


@pytest.fixture(scope="module")
def node():
    with NodeProcess(dict(NODE)) as process:
        with connected("blocking", process.address) as client:
            client.stat()  # gRPC opens what it keeps with the first call
        yield process


@pytest.fixture(autouse=True)
def unharmed(request):
    """The node holds afterwards what it held before, and still answers."""
    if "node" not in request.fixturenames:
        yield
        return
    node = request.getfixturevalue("node")
    before = node.held()
    yield
    node.settles_at(before)


@pytest.fixture
def ask(node, way):
    """Asks by one door, without a client's own checks."""
    with connected("blocking", node.facts[way]) as client:

        def call(request, lease=None):
            return client._connection.call(request, timeout_s=5.0, lease=lease, request_id="")

        yield call


def reserve(keys=KEYS, **changes):
    values = {"namespace": NAMESPACE, "keys": keys, "block_nbytes": 1000} | changes
    return ReserveRequest(**values)


def match(keys=KEYS, **changes):
    return MatchRequest(**({"namespaces": (NAMESPACE,), "keys": keys} | changes))


def tail(request_id="r", nbytes=10, **changes):
    return reserve(EMPTY_KEYS, tail=TailSpec(request_id=request_id, nbytes=nbytes), **changes)


@dataclass(frozen=True)
class Bad:
    """A request, and what is said to it."""

    name: str
    request: object
    kind: type[SnowskinError]
    status: str
    words: str


INVALID, EXHAUSTED, FAILED = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"
TWICE = KeyColumn(packed=KEYS.packed + KEYS.packed[:32])
MANY = keys_of(2, 8193)
BAD = [
    Bad("short namespace", reserve(namespace=b"x" * 31), errors.NamespaceMismatch, FAILED, "32"),
    Bad("no namespace", reserve(namespace=b""), errors.NamespaceMismatch, FAILED, "digest"),
    Bad("no keys", reserve(EMPTY_KEYS), errors.BadRequest, INVALID, "at least one key"),
    Bad("too many keys", reserve(MANY, block_nbytes=1), errors.LimitExceeded, EXHAUSTED, "8192"),
    Bad("a key twice", reserve(TWICE), errors.BadRequest, INVALID, "each block once"),
    Bad("no block size", reserve(block_nbytes=0), errors.BadRequest, INVALID, "block size"),
    Bad("long block", reserve(block_nbytes=2 << 20), errors.LimitExceeded, EXHAUSTED, "smaller"),
    Bad(
        "more than the pool",
        reserve(keys_of(3, 5), block_nbytes=1 << 20),
        errors.LimitExceeded,
        EXHAUSTED,
        "dram_nbytes",
    ),
    Bad("narrow parent", reserve(parent_key=b"12345678"), errors.BadRequest, INVALID, "8 bytes"),
    Bad("nameless tail", tail(""), errors.BadRequest, INVALID, "1 to 128"),
    Bad("tail with a long name", tail("ä" * 65), errors.BadRequest, INVALID, "130 bytes"),
    Bad("empty tail", tail(nbytes=0), errors.BadRequest, INVALID, "no tail"),
    Bad("long tail", tail(nbytes=2 << 20), errors.LimitExceeded, EXHAUSTED, "extent"),
    Bad("tail and keys", reserve(tail=TailSpec(request_id="r", nbytes=1)), errors.BadRequest, INVALID, "not of both"),
    Bad("match nowhere", match(namespaces=()), errors.BadRequest, INVALID, "at least one layout"),
    Bad("match in part of a namespace", match(namespaces=(b"x",)), errors.NamespaceMismatch, FAILED, "32"),
    Bad(
        "match everywhere",
        match(namespaces=tuple(namespace_of(i) for i in range(65))),
        errors.LimitExceeded,
        EXHAUSTED,
        "64",
    ),
    Bad("match too many keys", match(MANY), errors.LimitExceeded, EXHAUSTED, "8192"),
    Bad(
        "match too many blocks in all",
        match(MANY[:8192], namespaces=tuple(namespace_of(i) for i in range(9))),
        errors.LimitExceeded,
        EXHAUSTED,
        "65536",
    ),
    Bad("wait for more than is asked", match(wait_blocks=5), errors.BadRequest, INVALID, "4 keys"),
    Bad("match keys and a tail", match(tail_request_id="r"), errors.BadRequest, INVALID, "not for both"),
    Bad("match no tail", match(EMPTY_KEYS, tail_request_id="r"), errors.TailUnknown, "NOT_FOUND", "compute"),
    Bad("probe nowhere", ProbeRequest(namespaces=(), keys=KEYS), errors.BadRequest, INVALID, "layout"),
    Bad("probe too much", ProbeRequest(namespaces=(NAMESPACE,), keys=MANY), errors.LimitExceeded, EXHAUSTED, "8192"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_wrong_request_is_refused_by_name(ask, bad):
    with pytest.raises(SnowskinError) as caught:
        ask(bad.request)
    assert type(caught.value) is bad.kind
    assert caught.value.status == bad.status
    assert bad.words in str(caught.value)


def test_two_layouts_need_two_namespaces(driver, node, way):
    data = np.zeros(4000, np.uint8)
    with connected(driver, node.facts[way]) as client:
        local = client.register(data)
        call = {"namespace": namespace_of(2), "keys": KEYS[:1], "local": local}
        try:
            client.publish(**call, block_nbytes=1000, local_offsets=[0], one_reader=True)
            with pytest.raises(errors.NamespaceMismatch, match="two namespaces") as caught:
                client.publish(**call, block_nbytes=2000, local_offsets=[0])
            assert caught.value.status == FAILED
        finally:
            with pytest.raises(errors.NamespaceMismatch, match="two namespaces"):
                client.pull(**call, block_nbytes=2000, local_offsets=[0])
        # The reader that was wrong took the block for one reader with it: nothing stays.


# --- leases


def test_a_lease_that_nobody_granted_is_unknown(ask, way):
    lease = Lease(id=LeaseId(4711), ttl_s=1.0, capability=bytes(16))
    commit = CommitRequest(lease_id=lease.id, num_blocks=1, checksums=CHECKSUM)
    for request in (commit, AbortRequest(lease_id=lease.id)):
        with pytest.raises(errors.LeaseUnknown) as caught:
            ask(request, lease)
        assert caught.value.status == "NOT_FOUND"
        assert caught.value.hint
    if way == "door":
        assert ask(ReleaseRequest(lease_ids=(lease.id,)), lease).num_unknown == 1
        assert ask(RenewRequest(lease_ids=(lease.id,), ttl_s=1.0), lease).ttl_s == (0.0,)


def test_a_lease_of_another_session_is_unknown(ask, node, way):
    granted = ask(reserve()).lease
    stolen = Lease(id=granted.id, ttl_s=1.0, capability=granted.capability[::-1])
    with connected("blocking", node.facts[way]) as thief:
        for request in (
            CommitRequest(lease_id=granted.id, num_blocks=4, checksums=CHECKSUM * 4),
            AbortRequest(lease_id=granted.id),
        ):
            with pytest.raises(errors.LeaseUnknown):
                thief._connection.call(request, timeout_s=5.0, lease=stolen, request_id="")
    assert ask(AbortRequest(lease_id=granted.id), granted).freed_nbytes == 4000


@pytest.mark.parametrize("what", ["Commit", "Abort", "Renew", "Release", "Write", "Read"])
def test_a_forged_capability_opens_nothing(node, what):
    with connected("blocking", node.address) as client:
        stub = client._connection._stub
        granted = client._connection.call(reserve(), timeout_s=5.0, lease=None, request_id="").lease
        for forged in (b"", bytes(16), granted.capability[:-1], granted.capability + b"x"):
            ref = {"id": granted.id, "capability": forged}
            calls = {
                "Commit": lambda: stub.Commit(store_pb2.CommitRequest(lease=ref)),  # noqa: B023
                "Abort": lambda: stub.Abort(store_pb2.AbortRequest(lease=ref)),  # noqa: B023
                "Renew": lambda: stub.Renew(store_pb2.RenewRequest(leases=[ref])),  # noqa: B023
                "Release": lambda: stub.Release(store_pb2.ReleaseRequest(leases=[ref])),  # noqa: B023
                "Write": lambda: stub.Write(iter([store_pb2.WriteRequest(lease=ref, data=b"x")])),  # noqa: B023
                "Read": lambda: list(stub.Read(store_pb2.ReadRequest(lease=ref))),  # noqa: B023
            }
            with pytest.raises(grpc.RpcError) as caught:
                calls[what]()
            error = rpc_error_to_error(caught.value, "node")
            assert type(error) is errors.LeaseUnknown
            assert "capability" in error.message
        abort = AbortRequest(lease_id=granted.id)
        client._connection.call(abort, timeout_s=5.0, lease=granted, request_id="")


def test_more_than_was_reserved_is_not_committed(ask):
    granted = ask(reserve()).lease
    too_many = CommitRequest(lease_id=granted.id, num_blocks=5, checksums=CHECKSUM * 5)
    with pytest.raises(errors.CommitRefused, match="only 4") as caught:
        ask(too_many, granted)
    assert caught.value.status == FAILED
    for num_blocks, checksums in ((0, b""), (2, CHECKSUM), (1, CHECKSUM * 2), (1, b"123")):
        commit = CommitRequest(lease_id=granted.id, num_blocks=num_blocks, checksums=checksums)
        with pytest.raises(errors.BadRequest):
            ask(commit, granted)
    assert ask(AbortRequest(lease_id=granted.id), granted).freed_nbytes == 4000


def test_nothing_is_committed_under_a_lease_that_ran_out(ask):
    granted = ask(reserve(ttl_s=0.02)).lease
    renew = RenewRequest(lease_ids=(granted.id,), ttl_s=0.001)
    eventually(lambda: ask(renew, granted).ttl_s == (0.0,), 5.0)
    time.sleep(2 * renew.ttl_s)  # what has less than a millisecond left says 0 as well
    # At the door its room is kept for a grace; by the data plane it is another's by now, and the lease is no more.
    with pytest.raises((errors.LeaseExpired, errors.LeaseUnknown), match="reserve again") as caught:
        ask(CommitRequest(lease_id=granted.id, num_blocks=4, checksums=CHECKSUM * 4), granted)
    if isinstance(caught.value, errors.LeaseExpired):
        assert caught.value.status == FAILED
        assert ask(AbortRequest(lease_id=granted.id), granted).freed_nbytes == 4000


def test_the_slow_path_moves_nothing_outside_its_lease(node):
    with connected("blocking", node.address) as client:

        def call(request, lease=None):
            return client._connection.call(request, timeout_s=5.0, lease=lease, request_id="")

        def refusal(move):
            with pytest.raises(grpc.RpcError) as caught:
                move()
            return rpc_error_to_error(caught.value, "node")

        stub = client._connection._stub
        granted = call(reserve(one_reader=True)).lease
        ref = {"id": granted.id, "capability": granted.capability}

        def write(offset, nbytes):
            return stub.Write(
                iter([store_pb2.WriteRequest(lease=ref, offset=offset, data=bytes(nbytes))])
            )

        assert type(refusal(lambda: write(3999, 2))) is errors.BadRequest
        assert type(refusal(lambda: write(2**63, 1))) is errors.BadRequest
        assert type(refusal(lambda: write(0, (1 << 20) + 1))) is errors.BadRequest
        call(CommitRequest(lease_id=granted.id, num_blocks=2, checksums=CHECKSUM * 2), granted)
        assert type(refusal(lambda: write(1999, 1))) is errors.CommitRefused
        assert write(2000, 2000).nbytes == 2000
        call(CommitRequest(lease_id=granted.id, num_blocks=2, checksums=CHECKSUM * 2), granted)

        matched = call(match())
        ref = {"id": matched.lease.id, "capability": matched.lease.capability}

        def read(**changes):
            return b"".join(
                chunk.data for chunk in stub.Read(store_pb2.ReadRequest(lease=ref, **changes))
            )

        assert len(read(offset=3000)) == len(read(nbytes=1000)) == 1000
        assert read(offset=4000) == b""
        assert type(refusal(lambda: read(offset=4001))) is errors.BadRequest
        assert type(refusal(lambda: read(offset=3999, nbytes=2))) is errors.BadRequest
        assert type(refusal(lambda: read(shard_index=1))) is errors.BadRequest
        foreign = Complaint(lease_id=granted.id, block_indices=(0,))
        with pytest.raises(errors.BadRequest, match="does not release"):
            call(
                ReleaseRequest(lease_ids=(matched.lease.id,), complaints=(foreign,)), matched.lease
            )
        call(ReleaseRequest(lease_ids=(matched.lease.id,)), matched.lease)


def test_keys_of_no_width_are_refused(node, way):
    for packed, width in ((b"1234567", 7), (bytes(65), 65), (bytes(33), 32), (b"x" * 32, 0)):
        request = store_pb2.MatchRequest(namespaces=[NAMESPACE])
        request.keys.packed, request.keys.width = packed, width
        if way == "address":
            with (
                grpc.insecure_channel(node.address) as channel,
                pytest.raises(grpc.RpcError) as caught,
            ):
                store_pb2_grpc.StoreStub(channel).Match(request)
            error = rpc_error_to_error(caught.value, "node")
        else:
            with RawDoor(node.door) as door:
                door.hello()
                door.say(door_pb2.DoorRequest(call_id=2, match=request))
                error = door.error()
                door.say(door_pb2.DoorRequest(call_id=3, stat=store_pb2.StatRequest()))
                assert door.response().call_id == 3  # a wrong request is no broken stream
        assert type(error) is errors.BadKeyColumn
        assert error.status == INVALID


# --- what is no request at all


def as_frame(nbytes, payload=b""):
    return nbytes.to_bytes(4, "little") + payload


HELLO = door_pb2.DoorRequest(call_id=1)
HELLO.hello.wire_version = 1
STAT = door_pb2.DoorRequest(call_id=1)
STAT.stat.SetInParent()
GARBAGE = {
    "a huge frame announced": (as_frame(0xFFFF_FFFF), "the limit is"),
    "one byte more than the limit": (as_frame(MAX_FRAME_NBYTES + 1), "the limit is"),
    "an empty frame": (as_frame(0), "a frame of 0 bytes"),
    "a frame of garbage": (as_frame(4, b"\xff\xff\xff\xff"), "are not a DoorRequest"),
    "a request of no kind": (as_frame(2, b"\x08\x01"), "does not know"),
    "text": (b"GET / HTTP/1.1\r\n\r\n", "the limit is"),
}


@pytest.mark.parametrize("greeted", [False, True], ids=["at first", "in a session"])
@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_frame_ends_the_connection(node, name, greeted):
    data, words = GARBAGE[name]
    with RawDoor(node.door) as door:
        if greeted:
            door.hello()
        door.send(data)
        error = door.error()
        assert type(error) is errors.ProtocolViolation
        assert words in str(error)
        assert door.response() is None


def test_a_session_begins_with_one_hello(node):
    with RawDoor(node.door) as door:
        door.say(STAT)
        assert "must be hello" in str(door.error())
        assert door.response() is None
    with RawDoor(node.door) as door:
        assert door.hello().hello.node_id
        door.say(HELLO)
        assert "hello came twice" in str(door.error())
        assert door.response() is None


@pytest.mark.parametrize("name", ["reserve", "commit", "probe", "match", "stat"])
def test_a_call_that_nobody_could_be_answered_is_no_call(node, name):
    with RawDoor(node.door) as door:
        door.hello()
        request = door_pb2.DoorRequest()
        getattr(request, name).SetInParent()
        door.say(request)
        assert f"a {name} without a call id" in str(door.error())
        assert door.response() is None


def test_cancelling_what_does_not_wait_changes_nothing(node):
    with RawDoor(node.door) as door:
        door.hello()
        for call_id in (0, 1, 4711):
            door.say(door_pb2.DoorRequest(cancel={"call_id": call_id}))
        door.say(door_pb2.DoorRequest(call_id=2, stat={}))
        assert door.response().call_id == 2


def test_a_frame_that_never_ends_holds_nothing_once_its_sender_is_gone(node):
    for data in (b"\x05", as_frame(1000, b"x" * 999), as_frame(MAX_FRAME_NBYTES, bytes(1 << 20))):
        with RawDoor(node.door) as door:
            door.hello()
            door.send(data)


async def test_who_does_not_say_hello_is_not_waited_for(tmp_path):
    shell = make_shell(NodeSettings(dram_nbytes=1 << 20))
    door = LocalDoor(shell, tmp_path / "door", hello_timeout_s=0.05)
    door.open()
    try:
        ended = []

        def connect():
            with RawDoor(f"{tmp_path}/door") as silent:
                ended.append(silent.response())

        thread = threading.Thread(target=connect)
        thread.start()
        async with asyncio.timeout(5.0):
            await asyncio.to_thread(thread.join)
        assert ended == [None]
    finally:
        door.close()
        shell.close()


def test_another_wire_version_is_named(driver, node, monkeypatch):
    monkeypatch.setattr(conversation, "WIRE_VERSION", 2)
    with (
        pytest.raises(errors.WireVersionMismatch, match="wire version 2") as caught,
        connected(driver, node.door),
    ):
        pass
    assert caught.value.status == FAILED
    assert "upgrade" in caught.value.hint


def test_a_message_over_the_limit_is_not_taken(node):
    nbytes = RpcLimits().max_message_nbytes + 1
    request = store_pb2.ProbeRequest(namespaces=[bytes(nbytes)])
    with grpc.insecure_channel(node.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            store_pb2_grpc.StoreStub(channel).Probe(request, timeout=5.0)
        error = rpc_error_to_error(caught.value, "node")
        assert error.status == EXHAUSTED
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/snowskin.v1.Store/NoSuchMethod", None, None)(b"", timeout=5.0)


# --- nodes that are not there, and nodes that cannot start


def test_a_node_that_is_not_there_is_unavailable(driver, way, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets this port
        address = (
            f"unix:{tmp_path}/none" if way == "door" else f"127.0.0.1:{taken.getsockname()[1]}"
        )
        with (
            pytest.raises(errors.NodeUnavailable) as caught,
            connected(driver, address, timeout_s=1.0),
        ):
            pass
    assert caught.value.status == "UNAVAILABLE"
    assert "check" in caught.value.hint


def test_a_door_with_an_endless_name_is_a_wrong_setting(driver):
    with (
        pytest.raises(errors.BadSetting, match="shorter"),
        connected(driver, "unix:/tmp/" + "x" * 120),
    ):
        pass


def started(*arguments):
    """Runs `snowskin node`, which is to fail, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "snowskin.tools.cluster.main", "node", "--dram-nbytes", "1MiB"]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_node_that_cannot_start_says_why_in_one_line(node, tmp_path):
    port = node.address.rpartition(":")[2]
    file = tmp_path / "file"
    file.touch()
    for arguments, words in (
        (("--door", node.door.removeprefix("unix:")), "listens on"),
        (("--port", port), "cannot be taken"),
        (("--door", tmp_path / ("x" * 100)), "at most 107"),
        (("--door", file), "cannot be opened"),
        (("--door", file / "door"), "cannot be opened"),
    ):
        ended = started(*arguments)
        assert ended.returncode == 2, ended
        assert words in ended.stderr, ended
        assert "Traceback" not in ended.stderr
    assert node.stat().node_id, "the node whose door and port they wanted is as it was"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "--insecure"),
        (("--port", "70000"), "port is 70000"),
        (("--http-port=-1",), "http_port is -1"),
        (("--drain-s=-1",), "drain_s is -1"),
        (("--log-level", "loud"), "'loud' is not one of"),
        (("--max-keys", "0"), "max_keys is 0"),
        (("--read-lease-s", "1e10"), "at most 86400"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_opened(arguments, words):
    ran = CliRunner().invoke(cli, ["node", *arguments])
    assert ran.exit_code == 2
    assert words in ran.stderr


def test_a_door_left_behind_by_a_killed_node_is_taken_over(tmp_path):
    path = tmp_path / "door"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    with NodeProcess(NODE | {"door": os.fspath(path)}) as process:
        assert process.stat().num_sessions >= 1
        assert process.end() == 0
    assert not path.exists()


def test_a_refused_call_is_logged_with_its_requests_id(capfd, way):
    with NodeProcess(NODE | {"log_level": "info"}) as node:
        with connected("blocking", getattr(node, way)) as client:
            landing = np.zeros(100, np.uint8)
            with client.register(landing) as local, pytest.raises(errors.TailUnknown):
                client.pull_tail(
                    namespace=NAMESPACE, tail_id="t", nbytes=100, local=local, local_offset=0,
                    request_id="chat-17",
                )  # fmt: skip
        node.end()
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "call refused" in line)
    assert "request_id=chat-17 " in line
    assert "reason=TAIL_UNKNOWN" in line


def test_a_stream_that_brings_nothing_is_ended():
    with (
        NodeProcess(NODE | {"write_lease_s": 0.2}) as node,
        grpc.insecure_channel(node.address) as channel,
    ):
        never = threading.Event()

        def chunks():
            never.wait(20.0)
            yield from ()

        with pytest.raises(grpc.RpcError) as caught:
            store_pb2_grpc.StoreStub(channel).Write(chunks(), timeout=10.0)
        never.set()
        error = rpc_error_to_error(caught.value, "node")
        assert type(error) is errors.DeadlineExceeded
        assert "no chunk came for 0.2 s" in str(error)
