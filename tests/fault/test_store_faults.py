"""Clients and nodes that are killed, stopped, late or lied to: room comes back, no wrong byte passes for right."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.errors import (
    ChecksumMismatch,
    DeadlineExceeded,
    NodeDraining,
    NodeUnavailable,
    TailUnknown,
)
from snowskin.kvstore.messages import MatchRequest, ReleaseRequest
from tests.support.node_process import NodeProcess
from tests.support.store_child import StoreChild, Task
from tests.support.store_drivers import DRIVERS, WAYS, connected, noise
from tests.support.waiting import eventually

BLOCK_NBYTES = 256 << 10
POOL_NBYTES = 4 << 20
SHORT = {"read_lease_s": 0.5, "write_lease_s": 0.5, "grace_s": 0.2}
AT_ONCE_S = 2.0  # against leases of ten seconds and more, on a busy machine


def pytest_generate_tests(metafunc):
    """Every test that names a way or a driver runs with each; one that costs time-outs with half of them by day."""
    names = metafunc.fixturenames
    if metafunc.function is test_a_stopped_node_fails_calls_in_time_and_late_answers_hold_nothing:
        pairs = zip(DRIVERS, WAYS, strict=True)
        others = zip(DRIVERS, reversed(WAYS), strict=True)
        by_night = (pytest.param(*each, marks=pytest.mark.soak) for each in others)
        metafunc.parametrize(("driver", "way"), [*pairs, *by_night])
        return
    if "way" in names:
        metafunc.parametrize("way", WAYS)
    if "driver" in names:
        metafunc.parametrize("driver", DRIVERS)


def make_node(**settings):
    return NodeProcess({"dram_nbytes": POOL_NBYTES, "log_level": "error", **settings})


@pytest.fixture(scope="module")
def patient_node():
    """Leases of 10 and 30 seconds: what comes back here did not wait for a lease to run out."""
    with make_node() as node:
        yield node


@pytest.fixture(scope="module")
def hasty_node():
    with make_node(**SHORT) as node:
        yield node


def task_of(address, seed, num_blocks=8, *, do="pull", **changes):
    return Task(
        do=do,
        address=address,
        seed=seed,
        num_blocks=num_blocks,
        block_nbytes=BLOCK_NBYTES,
        **changes,
    )


def publish(client, task):
    return client.publish(**task.call, local=client.register(task.data))


def pull(client, task):
    landing = np.zeros_like(task.data)
    pulled = client.pull(**task.call, local=client.register(landing))
    good_nbytes = pulled.num_blocks * task.block_nbytes
    assert (landing[:good_nbytes] == task.data[:good_nbytes]).all(), "wrong bytes passed as good"
    return pulled


# --- clients that are killed


@pytest.mark.parametrize("stop_after", [1, 5], ids=["after the first piece", "in the middle"])
def test_a_killed_writers_room_is_free_at_once(patient_node, stop_after):
    task = task_of(patient_node.door, 1, do="publish", stop_after=stop_after)
    before = patient_node.held()
    with StoreChild(task) as writer:
        writer.wait_stopped()
        assert patient_node.held().reserved_nbytes == task.data.nbytes
        writer.kill()
        patient_node.settles_at(before, AT_ONCE_S)
    with connected("blocking", patient_node.door) as client:
        assert client.probe(namespaces=[task.call["namespace"]], keys=task.keys).num_blocks == 0


def test_who_waits_for_a_killed_writer_is_told_at_once(patient_node):
    task = task_of(patient_node.door, 2, do="publish", stop_after=1)
    with StoreChild(task) as writer, connected("blocking", patient_node.door) as reader:
        writer.wait_stopped()
        results = []

        def wait():
            landing = reader.register(np.zeros_like(task.data))
            results.append(reader.pull(**task.call, local=landing, wait_blocks=8, timeout_s=30.0))

        waiting = threading.Thread(target=wait)
        waiting.start()
        eventually(lambda: patient_node.stat().num_waiting_matches, 5.0)
        killed_at_s = time.monotonic()
        writer.kill()
        waiting.join(10.0)
        assert time.monotonic() - killed_at_s < AT_ONCE_S
        assert results[0].num_blocks == 0
        assert results[0].wake_reason.name == "WRITER_GONE"


def test_a_killed_readers_lease_is_gone_at_once(patient_node):
    task = task_of(patient_node.door, 3, stop_after=2)
    with connected("blocking", patient_node.door) as client:
        publish(client, task)
        before = patient_node.held()
        with StoreChild(task) as reader:
            reader.wait_stopped()
            held = patient_node.held()
            assert held.num_read_leases == 1
            assert held.leased_nbytes == task.data.nbytes
            reader.kill()
            patient_node.settles_at(before, AT_ONCE_S)
        assert pull(client, task).num_blocks == 8


# --- clients that are stopped for longer than their lease


def test_a_stopped_writer_can_harm_nobody_and_commits_nothing(hasty_node):
    task = task_of(hasty_node.door, 4, 4, do="publish", stop_after=2)
    before = hasty_node.held()
    with StoreChild(task) as writer, connected("blocking", hasty_node.door) as client:
        writer.wait_stopped()
        eventually(lambda: hasty_node.held().quarantined_nbytes == task.data.nbytes, 5.0)
        # All that is left of the pool is written; the writer's own place is not among it.
        others = task_of(hasty_node.door, 5, 12)
        assert publish(client, others).num_blocks == 12
        assert writer.thaw() == {"error": "LEASE_EXPIRED"}
        eventually(lambda: hasty_node.held().quarantined_nbytes == 0, AT_ONCE_S)
        assert pull(client, others).num_blocks == 12
        held = hasty_node.held()
        assert held.free_nbytes == POOL_NBYTES - others.data.nbytes
        assert publish(client, dataclasses.replace(task, stop_after=0)).num_blocks == 4
        evict_all(client, hasty_node)
    hasty_node.settles_at(before)


def evict_all(client, node):
    """Leaves the pool empty: a block for one reader takes all room, and goes with it."""
    task = Task(do="pull", address=node.door, seed=99, num_blocks=4, block_nbytes=POOL_NBYTES // 4)
    client.publish(**task.call, local=client.register(task.data), one_reader=True)
    assert pull(client, task).num_blocks == 4


def test_a_stopped_readers_bytes_are_never_taken_for_right(hasty_node, driver):
    task = task_of(hasty_node.door, 6, driver=driver, stop_after=3)
    with connected("blocking", hasty_node.door) as client:
        publish(client, task)
        with StoreChild(task) as reader:
            reader.wait_stopped()
            eventually(lambda: not hasty_node.stat().num_read_leases, 5.0)
            others = task_of(hasty_node.door, 7, 16)  # all the pool: nothing of the old stays
            assert publish(client, others).num_blocks == 16
            outcome = reader.thaw()
        assert outcome == {
            "num_blocks": 3,
            "corrupt_blocks": list(range(3, 8)),
            "right": True,
        }
        # Its complaints were about a lease that is gone: nobody else's blocks suffer.
        assert pull(client, others).num_blocks == 16
        evict_all(client, hasty_node)


def test_a_stopped_reader_that_does_not_verify_trusts_its_clock(hasty_node):
    task = task_of(hasty_node.door, 8, stop_after=3, verify=False)
    with connected("blocking", hasty_node.door) as client:
        publish(client, task)
        with StoreChild(task) as reader:
            reader.wait_stopped()
            eventually(lambda: not hasty_node.stat().num_read_leases, 5.0)
            assert reader.thaw() == {"error": "LEASE_EXPIRED"}
        evict_all(client, hasty_node)


def test_within_its_lease_and_grace_a_stopped_reader_loses_nothing(patient_node):
    task = task_of(patient_node.door, 9, stop_after=3)
    with connected("blocking", patient_node.door) as client:
        publish(client, task)
        with StoreChild(task) as reader:
            reader.wait_stopped()
            for seed in range(10, 14):  # twice the room that is not leased
                publish(client, task_of(patient_node.door, seed, 4))
            outcome = reader.thaw()
        assert outcome == {"num_blocks": 8, "corrupt_blocks": [], "right": True}


# --- nodes that are killed, stopped, drained


def test_a_killed_node_is_noticed_at_once_and_found_again(driver, way):
    with make_node() as node:
        task = task_of(node.facts[way], 20, 4)
        with connected(driver, node.facts[way]) as client:
            publish(client, task)
            epoch = client.node_epoch
            killed_at_s: list[float] = []
            killer = threading.Thread(target=kill_when_somebody_waits, args=(node, killed_at_s))
            killer.start()
            missing = dataclasses.replace(task, seed=21)
            with pytest.raises(NodeUnavailable) as caught:
                client.pull(
                    **missing.call,
                    local=client.register(np.zeros_like(task.data)),
                    wait_blocks=1,
                    timeout_s=30.0,
                )
            noticed_at_s = time.monotonic()
            killer.join()
            assert noticed_at_s - killed_at_s[0] < 1.0
            assert caught.value.hint
            called_s = time.monotonic()
            with pytest.raises(NodeUnavailable):
                client.stat()
            assert time.monotonic() - called_s < 1.0
            assert client.connected == (way == "address")
        node.restart()
        with connected(driver, node.facts[way]) as client:
            assert client.node_epoch != epoch
            assert pull(client, task).num_blocks == 0
            assert publish(client, task).num_blocks == 4
            assert pull(client, task).num_blocks == 4


def kill_when_somebody_waits(node, killed_at_s):
    eventually(lambda: node.stat().num_waiting_matches, 10.0)
    killed_at_s.append(time.monotonic())
    node.kill()


def test_a_stopped_node_fails_calls_in_time_and_late_answers_hold_nothing(driver, way):
    with make_node(**SHORT) as node:
        task = task_of(node.facts[way], 22, 4)
        new = task_of(node.facts[way], 23, 4)
        with connected(driver, node.facts[way], call_timeout_s=0.2) as client:
            publish(client, task)
            before = node.held()
            node.signal(signal.SIGSTOP)
            for call in (
                client.stat,
                lambda: pull(client, task),
                lambda: publish(client, new),
                lambda: client.probe(namespaces=[b"x" * 32], keys=task.keys),
            ):
                began_at_s = time.monotonic()
                with pytest.raises(DeadlineExceeded):
                    call()
                assert 0.19 < time.monotonic() - began_at_s < 0.2 + AT_ONCE_S
            with (
                pytest.raises((NodeUnavailable, DeadlineExceeded)),
                connected(driver, node.facts[way], timeout_s=0.2),
            ):
                pass
            node.signal(signal.SIGCONT)
            eventually(lambda: succeeds(client.stat), 5.0)
            node.settles_at(before, 5.0)
            assert pull(client, task).num_blocks == 4
            assert publish(client, new).num_blocks == 4


def succeeds(call):
    try:
        call()
    except (DeadlineExceeded, NodeUnavailable):
        return False
    return True


async def test_a_full_queue_of_a_stopped_node_does_not_hold_the_loop():
    with make_node() as node:
        node.signal(signal.SIGSTOP)
        try:
            # Whoever connects and gives up leaves a place taken in the queue, 128 of them at most.
            attempts = [
                StoreClient.connect(node.door, client_name="c", timeout_s=0.3) for _ in range(140)
            ]
            async with longest_hold() as holds:
                results = await asyncio.gather(*attempts, return_exceptions=True)
            assert {type(result) for result in results} == {NodeUnavailable}
            assert max(holds) < 0.25
        finally:
            node.signal(signal.SIGCONT)
        async with await StoreClient.connect(node.door, client_name="c", timeout_s=5.0) as client:
            assert (await client.stat()).node_id


@asynccontextmanager
async def longest_hold():
    """How long the loop was held by others, each time it was asked."""
    holds = [0.0]

    async def measure():
        while True:
            began_at_s = time.monotonic()
            await asyncio.sleep(0.01)
            holds.append(time.monotonic() - began_at_s)

    measuring = asyncio.create_task(measure())
    try:
        yield holds
    finally:
        measuring.cancel()
        await asyncio.wait([measuring])


def health_of(node):
    """What the gRPC health protocol says of the node's store."""
    with grpc.insecure_channel(node.address) as channel:
        request = HealthCheckRequest(service="snowskin.v1.Store")
        return HealthStub(channel).Check(request, timeout=5.0).status


def test_a_node_that_is_asked_to_end_lets_readers_finish(way):
    with make_node() as node:
        task = task_of(node.facts[way], 24, 4)
        match = MatchRequest(namespaces=(task.call["namespace"],), keys=task.keys)
        with connected("blocking", node.facts[way]) as client:
            publish(client, task)
            call = client._connection.call
            lease = call(match, timeout_s=5.0, lease=None, request_id="").lease
            assert health_of(node) == HealthCheckResponse.SERVING
            node.signal(signal.SIGTERM)
            eventually(lambda: client.stat().draining, 5.0)
            assert health_of(node) == HealthCheckResponse.NOT_SERVING
            with pytest.raises(NodeDraining) as caught:
                pull(client, task)
            assert caught.value.status == "UNAVAILABLE"
            with pytest.raises(NodeDraining):
                publish(client, dataclasses.replace(task, seed=25))
            assert client.stat().num_read_leases == 1
            release = ReleaseRequest(lease_ids=(lease.id,))
            call(release, timeout_s=5.0, lease=lease, request_id="")
            assert node.process.wait(10.0) == 0


def test_a_node_does_not_wait_for_readers_for_ever():
    with make_node(drain_s=0.2) as node:
        task = task_of(node.door, 26, stop_after=1)
        with connected("blocking", node.door) as client:
            publish(client, task)
        with StoreChild(task) as reader:
            reader.wait_stopped()
            began_at_s = time.monotonic()
            assert node.end() == 0
            assert time.monotonic() - began_at_s < 5.0


# --- bytes that are not what was committed


def pool_memory(node):
    """The node's own memfd, opened behind its back."""
    folder = Path(f"/proc/{node.pid}/fd")
    for entry in folder.iterdir():
        if "memfd:snowskin-dram" in os.readlink(entry):
            return os.open(entry, os.O_RDWR)
    raise AssertionError("no pool found")


def block_offsets(client, task):
    """Where the node says that the blocks lie."""
    match = MatchRequest(namespaces=(task.call["namespace"],), keys=task.keys)
    call = client._connection.call
    matched = call(match, timeout_s=5.0, lease=None, request_id="")
    release = ReleaseRequest(lease_ids=(matched.lease.id,))
    call(release, timeout_s=5.0, lease=matched.lease, request_id="")
    return [
        run.extent.offset + index * task.block_nbytes
        for run in matched.runs
        for index in range(run.num_blocks)
    ]


@pytest.fixture
def lied_to(patient_node):
    """(client on the blocking door, file of the pool): to lay down blocks and to spoil them."""
    descriptor = pool_memory(patient_node)
    with connected("blocking", patient_node.door) as client:
        yield client, descriptor
        evict_all(client, patient_node)
    os.close(descriptor)


@pytest.mark.parametrize("where", [0, BLOCK_NBYTES // 2 + 3, BLOCK_NBYTES - 1])
def test_a_flipped_bit_is_found_reported_and_mended(patient_node, lied_to, driver, way, where):
    owner, descriptor = lied_to
    task = task_of(patient_node.facts[way], 30, 5)
    publish(owner, task)
    at = block_offsets(owner, task)[2] + where
    (byte,) = os.pread(descriptor, 1, at)
    os.pwrite(descriptor, bytes([byte ^ 0x10]), at)
    with connected(driver, patient_node.facts[way]) as client:
        pulled = pull(client, task)
        assert (pulled.num_blocks, pulled.corrupt_blocks) == (2, (2,))
        probed = owner.probe(namespaces=[task.call["namespace"]], keys=task.keys)
        assert probed.present_bitmap == bytes([0b11011])
        assert pull(client, task).num_blocks == 2
        published = publish(client, task)
        assert (published.num_blocks, published.num_blocks_existing) == (1, 4)
        pulled = pull(client, task)
        assert (pulled.num_blocks, pulled.corrupt_blocks) == (5, ())


def test_right_bytes_under_the_wrong_key_are_found(patient_node, lied_to, driver, way):
    owner, descriptor = lied_to
    task = task_of(patient_node.facts[way], 31, 4)
    publish(owner, task)
    offsets = block_offsets(owner, task)
    first, last = (os.pread(descriptor, BLOCK_NBYTES, offsets[i]) for i in (0, 3))
    os.pwrite(descriptor, last, offsets[0])
    os.pwrite(descriptor, first, offsets[3])
    with connected(driver, patient_node.facts[way]) as client:
        pulled = pull(client, task)
        assert (pulled.num_blocks, pulled.corrupt_blocks) == (0, (0, 3))


def test_a_spoilt_tail_is_an_error_and_gone(patient_node, lied_to, driver, way):
    _, descriptor = lied_to
    data = noise(32, 1000)
    tail = {"namespace": b"t" * 32, "tail_id": f"spoilt-{driver}-{way}", "nbytes": 1000}
    with connected(driver, patient_node.facts[way]) as client:
        local = client.register(data.copy())
        client.publish_tail(**tail, local=local, local_offset=0)
        pool = os.pread(descriptor, POOL_NBYTES, 0)
        at = pool.find(data.tobytes())
        os.pwrite(descriptor, bytes([data[500] ^ 1]), at + 500)
        with pytest.raises(ChecksumMismatch) as caught:
            client.pull_tail(**tail, local=local, local_offset=0)
        assert caught.value.status == "DATA_LOSS"
        with pytest.raises(TailUnknown):
            client.pull_tail(**tail, local=local, local_offset=0)
    held = patient_node.held()
    assert (held.num_read_leases, held.reserved_nbytes) == (0, 0)
