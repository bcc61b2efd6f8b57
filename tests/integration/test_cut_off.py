"""A client that the node cuts off while it lives: what it may still write into is nobody's, until it closes."""

from __future__ import annotations

import numpy as np
import pytest

from snowskin.kvstore import errors
from snowskin.kvstore.frames import frame
from snowskin.kvstore.messages import AbortRequest, ReserveRequest
from snowskin.v1 import door_pb2
from tests.support.node_process import NodeProcess
from tests.support.raw_door import RawDoor
from tests.support.store_drivers import connected, keys_of, namespace_of
from tests.support.waiting import eventually

MIB = 1 << 20
# The grace is long: what comes back comes because the client has closed.
NODE = {"dram_nbytes": 4 * MIB, "log_level": "error", "grace_s": 30.0, "max_extent_nbytes": MIB}
NAMESPACE = namespace_of(1)
HELLO = door_pb2.DoorRequest(call_id=1)
HELLO.hello.wire_version = 1
STAT = door_pb2.DoorRequest(call_id=1)
STAT.stat.SetInParent()


@pytest.fixture(scope="module")
def node():
    with NodeProcess(dict(NODE)) as process:
        yield process


@pytest.fixture(autouse=True)
def unharmed(node):
    before = node.held()
    yield
    node.settles_at(before)


def reserve(keys, **changes):
    return ReserveRequest(namespace=NAMESPACE, keys=keys, block_nbytes=MIB, **changes)


# Ways to be cut off with the pools still mapped, and what is said to it.
CUT_OFF = {
    "a broken frame": (lambda door: door.send(bytes([255] * 4)), "the limit is"),
    "a second hello": (lambda door: door.say(HELLO), "hello came twice"),
    "nobody to answer": (lambda door: (door.read_no_more(), door.say(STAT)), ""),
}


@pytest.mark.parametrize("how", CUT_OFF)
def test_where_a_client_that_was_cut_off_may_still_write_is_nobodys_until_it_closes(node, how):
    def blocks(first, count, **changes):
        return reserve(keys_of(1, 8)[first : first + count], **changes)

    def ask(request):
        return other._connection.call(request, timeout_s=5.0, lease=None, request_id="")

    cut_off, words = CUT_OFF[how]
    data = np.full(MIB, 7, np.uint8)
    with connected("blocking", node.door) as other, RawDoor(node.door) as door:
        door.hello(maps=True)
        runs = door.ask(2, blocks(0, 3)).reserve.runs
        cut_off(door)
        if words:
            assert words in str(door.error())
        assert door.response() is None
        door.say(STAT)  # says what nobody hears
        eventually(lambda: node.held().quarantined_nbytes == 3 * MIB, 5.0)
        assert (node.held().free_nbytes, node.held().reserved_nbytes) == (MIB, 0)

        local = other.register(data)
        call = {"namespace": NAMESPACE, "keys": keys_of(2, 1), "local": local}
        call |= {"block_nbytes": MIB, "local_offsets": [0]}
        other.publish(**call, one_reader=True)
        assert door.pool is not None
        for run in runs:  # a copy that is late
            start, nbytes = run.extent.offset, run.extent.nbytes
            door.pool[start : start + nbytes] = b"\xff" * nbytes
        data[:] = 0
        assert other.pull(**call).num_blocks == 1
        assert (data == 7).all(), "the late copy landed in another client's block"
        with pytest.raises(errors.PoolExhausted, match="raw 3145728 bytes"):
            ask(blocks(4, 2))

        door.__exit__()
        assert ask(AbortRequest(lease_id=ask(blocks(0, 4, timeout_s=5.0)).lease.id))
    door.pool.close()


def test_answers_that_nobody_reads_do_not_pile_up(node):
    def is_fenced():
        return node.held().quarantined_nbytes == MIB

    with RawDoor(node.door) as door:
        door.hello()
        assert door.ask(2, reserve(keys_of(1, 1))).reserve.runs, "it has room, which it keeps"
        data = frame(STAT.SerializeToString()) * 1000
        # An answer has over 100 bytes: long before these are all out, the limit of 16 MiB is passed.
        for number in range(400):
            door.send(data)
            if number % 20 == 0 and is_fenced():
                break
        assert is_fenced()
        assert not door.ended, "what it says is taken, and not heard"
