"""A writer and a reader stopped in the middle of a copy, beyond their leases, while others take all the room there is.

Whatever the two do when they go on, every block of the others is as it was written, the two are told, and what they
held comes back. (Each of the two alone, and within its lease, is in test_store_faults.py.)
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.support.node_process import NodeProcess
from tests.support.store_child import StoreChild, Task
from tests.support.store_drivers import DRIVERS, WAYS, connected
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(60)

# Four blocks are more than is copied in one go, and more than a stream keeps under way: who stops is in the middle.
BLOCK_NBYTES = {"door": 512 << 10, "address": 2 << 20}
NUM_BLOCKS = 24
LEASES = {"read_lease_s": 1.0, "write_lease_s": 1.0, "grace_s": 0.5}
OVER_S = 5.0
PATIENCE_S = 10.0
# A session that maps no memory is forgotten after its grace, a stream that brings nothing is ended, and so is a
# connection whose pings nobody answers.
TOO_LATE = {
    "door": ("LEASE_EXPIRED",),
    "address": ("LEASE_EXPIRED", "LEASE_UNKNOWN", "DEADLINE_EXCEEDED", "NODE_UNAVAILABLE"),
}


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    return request.param


@pytest.fixture(scope="module")
def node(way):
    settings = {"dram_nbytes": NUM_BLOCKS * BLOCK_NBYTES[way], "log_level": "error", **LEASES}
    with NodeProcess(settings) as process:
        yield process


@pytest.fixture
def task_of(way):
    """Blocks and bytes by seed, for one to publish or to pull."""

    def make(address: str, seed: int, num_blocks: int, **changes) -> Task:
        wanted = {"do": "pull", "block_nbytes": BLOCK_NBYTES[way], **changes}
        return Task(address=address, seed=seed, num_blocks=num_blocks, **wanted)

    return make


def publish(client, task: Task) -> None:
    """Queues for room, as a writer does whose blocks are wanted."""
    local = client.register(task.data)
    published = client.publish(**task.call, local=local, timeout_s=PATIENCE_S)
    assert published.num_blocks == task.num_blocks


def present(client, task: Task) -> list[bool]:
    probed = client.probe(namespaces=[task.call["namespace"]], keys=task.keys)
    bits = int.from_bytes(probed.present_bitmap, "little")
    return [bool(bits >> index & 1) for index in range(task.num_blocks)]


def assert_untouched(client, tasks: list[Task]) -> int:
    """Each block that is here, pulled by itself, has the bytes that were written; how many there are."""
    num_here = 0
    for task in tasks:
        data, nbytes = task.data, task.block_nbytes
        for index, is_here in enumerate(present(client, task)):
            if not is_here:
                continue
            landing = np.zeros(nbytes, np.uint8)
            pulled = client.pull(
                namespace=task.call["namespace"],
                keys=task.keys[index : index + 1],
                block_nbytes=nbytes,
                local=client.register(landing),
                local_offsets=[0],
            )
            assert (pulled.num_blocks, pulled.corrupt_blocks) == (1, ())
            assert np.array_equal(landing, data[index * nbytes : (index + 1) * nbytes])
            num_here += 1
    return num_here


def pool_bytes(node: NodeProcess) -> np.ndarray:
    """The pool's memory, by the node's own descriptor."""
    for entry in Path(f"/proc/{node.pid}/fd").iterdir():
        if "memfd:snowskin-dram" in os.readlink(entry):
            return np.fromfile(entry, np.uint8)
    raise AssertionError("no pool found")


def test_frozen_clients_harm_nobody_are_told_and_leave_nothing(node, task_of, way):
    """A reader and a writer of each driver, all stopped at once."""
    reads = [
        task_of(node.facts[way], 100 + n, 4, driver=driver, stop_after=3)
        for n, driver in enumerate(DRIVERS)
    ]
    writes = [
        task_of(node.facts[way], 200 + n, 4, do="publish", driver=driver, stop_after=3)
        for n, driver in enumerate(DRIVERS)
    ]
    others = [task_of(node.door, 300 + n, 4) for n in range(10)]
    # What a writer that maps memory may still reach; of another one the node takes no more bytes.
    num_late = 4 * len(writes) if way == "door" else 0
    with connected("blocking", node.door) as client, ExitStack() as stack:
        for task in reads:
            publish(client, task)
        readers, writers = (
            [stack.enter_context(StoreChild(task)) for task in tasks] for tasks in (reads, writes)
        )
        for child in (*readers, *writers):
            child.wait_stopped()
        for task in others[:2]:  # while their leases last: around them
            publish(client, task)
        assert all(all(present(client, task)) for task in reads), "a leased block was evicted"
        eventually(lambda: node.held().num_read_leases == 0, OVER_S)
        eventually(lambda: node.held().reserved_nbytes == 0, OVER_S)
        assert node.held().quarantined_nbytes == num_late * BLOCK_NBYTES[way]
        for task in others[2:]:  # more than a pool full: nothing of the old stays
            publish(client, task)
        assert not any(any(present(client, task)) for task in reads)
        num_here = sum(sum(present(client, task)) for task in others)
        assert num_here == NUM_BLOCKS - num_late
        before = pool_bytes(node)
        lates, tolds = ([child.thaw() for child in children] for children in (writers, readers))
        changed = (before != pool_bytes(node)).reshape(NUM_BLOCKS, -1).any(axis=1)
        for late in lates:
            assert late.get("error") in TOO_LATE[way], late
        for told in tolds:
            # What the node had sent while the lease lasted is right, also if it is all.
            is_cut = told.get("num_blocks", 0) < 4 or way == "address"
            assert told.get("error") in TOO_LATE[way] or (told["right"] and is_cut), told
        # The late writers went on in what is quarantined, and nowhere else.
        assert changed.sum() <= num_late
        assert not any(any(present(client, task)) for task in writes)
        assert assert_untouched(client, others) == num_here
        eventually(lambda: node.held().quarantined_nbytes == 0, OVER_S)
        publish(client, task_of(node.door, 400, NUM_BLOCKS))  # all room is there again
    held = node.held()
    assert (held.reserved_nbytes, held.leased_nbytes) == (0, 0)
    assert (held.num_write_leases, held.num_waiting, held.num_sessions) == (0, 0, 2)
    eventually(lambda: node.held().num_read_leases == 0, OVER_S)
