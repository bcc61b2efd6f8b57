"""A `tcp` owner and peers that waste its time: half a word, no reading, thousands of connections with nothing to say.

All that must run into a time-out does so at once, in one test, so that it costs the time-out once.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import statistics
import threading
import time

import pytest

from snowskin.transport.frames import Clear, Data, Welcome, encode
from tests.support.raw_tcp import HELLO, RawReader, ask_of, changed, reachable
from tests.support.results import write_result
from tests.support.tcp_pair import Reader
from tests.support.transfer_child import TestMemory, TransferChild
from tests.support.waiting import eventually

NBYTES = 32 << 20
GRANTED = (4096, 24 << 20)  # more than the buffers on the way hold
HELLO_TIMEOUT_S, FRAME_TIMEOUT_S, IDLE_TIMEOUT_S = 0.5, 0.6, 1.0
GRACE_S = 1.5
SETTLE_S = 5.0
SMALL = 65_536


@pytest.fixture(scope="module")
def memory():
    with TestMemory(NBYTES, granted=[GRANTED], seed=2) as made:
        yield made


@pytest.fixture(scope="module")
def owner(memory):
    with TransferChild(
        "tcp",
        memory,
        hello_timeout_s=HELLO_TIMEOUT_S,
        frame_timeout_s=FRAME_TIMEOUT_S,
        idle_timeout_s=IDLE_TIMEOUT_S,
    ) as child:
        yield child


@pytest.fixture
def grant(owner):
    return owner.describe(ranges=[GRANTED], writable=True)


def half_a_hello(reader, grant):
    reader.send(encode(HELLO)[:20])


def a_hello_in_drops(reader, grant):
    reader.send_slowly(encode(HELLO), each_s=0.1, until_s=HELLO_TIMEOUT_S + GRACE_S)


def a_hello_and_silence(reader, grant):
    reader.send(encode(HELLO))


def half_a_request(reader, grant):
    reader.send(encode(HELLO) + encode(ask_of(grant, [GRANTED]))[:50])


def a_request_in_drops(reader, grant):
    reader.send(encode(HELLO))
    assert isinstance(reader.hear(), Welcome)
    ask = encode(ask_of(grant, [(4096, 1)] * 100))
    reader.send_slowly(ask, each_s=0.1, until_s=FRAME_TIMEOUT_S + GRACE_S)


def a_pull_that_nobody_reads(reader, grant):
    reader.read_nothing()
    reader.send(encode(HELLO) + encode(ask_of(grant, [GRANTED], timeout_ms=60_000)))


def a_pull_whose_time_is_over(reader, grant):
    reader.read_nothing()
    reader.send(encode(HELLO) + encode(ask_of(grant, [GRANTED], timeout_ms=200)))


def a_push_without_payload(reader, grant):
    reader.send(encode(HELLO) + encode(ask_of(grant, [GRANTED], is_push=True, timeout_ms=60_000)))
    assert isinstance(reader.hear(), Welcome)
    assert reader.hear() == Clear(op=1)


def a_push_of_half_its_payload(reader, grant):
    a_push_without_payload(reader, grant)
    reader.send(encode(Data(op=1, nbytes=1 << 20)) + bytes(1 << 19))


def a_pull_without_its_done(reader, grant):
    reader.send(
        encode(HELLO) + encode(ask_of(grant, [(4096, 10)], wants_done=True, timeout_ms=60_000))
    )
    assert isinstance(reader.hear(), Welcome)
    assert reader.transfer(10)[1] is None


SLOW = [
    half_a_hello,
    a_hello_in_drops,
    a_hello_and_silence,
    half_a_request,
    a_request_in_drops,
    a_pull_that_nobody_reads,
    a_pull_whose_time_is_over,
    a_push_without_payload,
    a_push_of_half_its_payload,
    a_pull_without_its_done,
]
# These cannot see that they were left: they read nothing.
BLIND = [a_pull_that_nobody_reads, a_pull_whose_time_is_over]


def pull_times(reader, grant, num):
    times = []
    for _ in range(num):
        began_s = time.monotonic()
        reader.move(grant, SMALL, remote_offset=GRANTED[0])
        times.append(time.monotonic() - began_s)
    return times


def test_who_is_slow_is_left_in_time_and_holds_up_nobody(owner, memory, grant):
    before = owner.statistics()
    num_sockets, num_threads = owner.sockets(), owner.threads()
    failures = []
    released = threading.Event()
    limit_s = max(HELLO_TIMEOUT_S, FRAME_TIMEOUT_S, IDLE_TIMEOUT_S) + GRACE_S

    def be_slow(behave):
        try:
            with RawReader(reachable(grant), hello=False) as reader:
                behave(reader, grant)
                if behave in BLIND:
                    released.wait(2 * limit_s + SETTLE_S)
                else:
                    assert reader.is_over(limit_s), "it was not left"
        except BaseException as error:  # noqa: BLE001  told below
            failures.append(f"{behave.__name__}: {error!r}")

    with TestMemory(SMALL) as landing, Reader(landing) as reader:
        pull_times(reader, grant, 1)
        threads = [threading.Thread(target=be_slow, args=[behave]) for behave in SLOW]
        for thread in threads:
            thread.start()
        times = pull_times(reader, grant, 50)
        assert landing.bytes_at(0, SMALL) == memory.bytes_at(GRANTED[0], SMALL)
    try:
        eventually(
            lambda: owner.statistics()["num_connections"] == before["num_connections"],
            limit_s + SETTLE_S,
            "all are left, those that read nothing too",
        )
        assert owner.sockets() <= num_sockets
        assert owner.threads() <= num_threads + 1
    finally:
        released.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert max(times) < HELLO_TIMEOUT_S, "a pull waited for somebody slow"
    assert memory.canaries_are_intact
    # Two pulls nobody read, two pushes without their payload.
    assert owner.statistics()["num_served_failed"] - before["num_served_failed"] >= 4
    memory.fill()


@pytest.mark.parametrize("is_push", [False, True])
def test_revoking_does_not_wait_for_a_peer_that_stands_still(owner, memory, is_push):
    descriptor = owner.describe(ranges=[GRANTED], writable=True)
    with RawReader(reachable(descriptor)) as reader:
        reader.read_nothing()
        reader.say(ask_of(descriptor, [GRANTED], is_push=is_push, timeout_ms=60_000))
        if is_push:
            assert reader.hear() == Clear(op=1)
            reader.send(encode(Data(op=1, nbytes=1 << 20)) + bytes(1 << 19))
        else:
            eventually(lambda: owner.statistics()["num_connections"] > 0, SETTLE_S)
        took_s = owner.ask("revoke", descriptor=descriptor.to_bytes().hex())["took_s"]
        assert took_s < FRAME_TIMEOUT_S + GRACE_S
        if is_push:
            # What comes now lands nowhere.
            memory.fill()
            reader.send(bytes(1 << 19))
            reader.is_over(SETTLE_S)
            assert memory.bytes_at(*GRANTED) == memory.pattern(*GRANTED).tobytes()


def test_closing_a_region_does_not_wait_for_a_peer_that_stands_still():
    with (
        TestMemory(NBYTES, granted=[GRANTED]) as owned,
        TransferChild("tcp", owned, frame_timeout_s=FRAME_TIMEOUT_S) as short_lived,
    ):
        descriptor = short_lived.describe()
        with RawReader(reachable(descriptor)) as reader:
            reader.read_nothing()
            reader.say(ask_of(descriptor, [GRANTED], timeout_ms=60_000))
            eventually(lambda: short_lived.statistics()["num_connections"] > 0, SETTLE_S)
            for do in ("close_region", "close"):
                assert short_lived.ask(do)["took_s"] < FRAME_TIMEOUT_S + GRACE_S, do
        assert short_lived.sockets() == 0
        eventually(lambda: short_lived.threads() == 1, SETTLE_S, "its threads are joined")


# --- connections with nothing to say


@contextlib.contextmanager
def crowd(address, num, *, hello, from_hosts=1):
    """`num` connections from a number of addresses that all say hello or nothing."""
    held = []
    try:
        for index in range(num):
            connection = socket.socket()
            held.append(connection)
            connection.settimeout(2.0)
            connection.bind((f"127.0.1.{1 + index % from_hosts}", 0))
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.connect((address[0], address[1]))
                if hello:
                    connection.sendall(encode(HELLO))
        yield held
    finally:
        for connection in held:
            connection.close()


def few_and_many(owner_settings, num, *, from_hosts):
    """Median seconds of a pull over a standing connection alone, in a crowd; and of a first pull in the crowd."""
    with (
        TestMemory(NBYTES, granted=[GRANTED]) as owned,
        TestMemory(SMALL) as landing,
        TransferChild("tcp", owned, **owner_settings) as owner,
        Reader(landing) as reader,
    ):
        grant = owner.describe(ranges=[GRANTED])
        pull_times(reader, grant, 20)
        alone = pull_times(reader, grant, 100)
        with crowd(reachable(grant), num, hello=True, from_hosts=from_hosts):
            pull_times(reader, grant, 5)
            crowded = pull_times(reader, grant, 100)
            with Reader(landing) as late:
                (first_s,) = pull_times(late, grant, 1)
            num_connections = owner.statistics()["num_connections"]
            idle_s = owner.cpu_s()
            wait_s = 0.5
            threading.Event().wait(wait_s)
            idle_ratio = (owner.cpu_s() - idle_s) / wait_s
        eventually(lambda: owner.statistics()["num_connections"] <= 1, SETTLE_S, "the crowd left")
        assert owned.canaries_are_intact
        return (
            statistics.median(alone),
            statistics.median(crowded),
            first_s,
            num_connections,
            idle_ratio,
        )


def test_a_crowd_from_one_host_leaves_room_for_others():
    alone_s, crowded_s, first_s, num_connections, _ = few_and_many({}, 1_500, from_hosts=1)
    assert num_connections < 1_000
    assert crowded_s < 2 * alone_s + 0.001
    assert first_s < 1.0


WOKEN_S = 100e-6  # that an owner is woken, which one that is asked back to back by one reader alone is spared


@pytest.mark.parametrize("num", [2_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_a_pull_beside_thousands_of_idle_connections_takes_at_most_twice_as_long(num):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < num + 1_000:
        pytest.skip(f"NOT TESTED: {num} CONNECTIONS, only {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        alone_s, crowded_s, first_s, num_connections, idle_ratio = few_and_many(
            {
                "max_connections": num + 100,
                "max_connections_per_peer": num,
                "idle_timeout_s": 60.0,
            },
            num,
            from_hosts=50,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    write_result(
        f"transport_{num}_idle_connections",
        pull_alone_s=alone_s,
        pull_in_the_crowd_s=crowded_s,
        pull_on_a_new_connection_s=first_s,
        owner_idle_cpu_ratio=idle_ratio,
    )
    assert num_connections >= num
    assert crowded_s < 2 * alone_s + WOKEN_S
    assert first_s < 1.0
    assert idle_ratio < 0.1


def test_a_forged_request_costs_the_owner_no_more_for_its_thousands_of_ranges(owner, grant):
    forged = changed(grant, capability=bytes(16))
    num, spent_s, before_nbytes = 300, {}, owner.resident_nbytes()
    for ranges in ([GRANTED], [GRANTED] * 4_000):
        began_s = owner.cpu_s()
        with RawReader(reachable(grant)) as reader:
            for op in range(1, num):
                reader.say(ask_of(forged, ranges, op=op))
                if getattr(reader.hear(), "op", 0) != op:
                    break  # it may be tired of us
        spent_s[len(ranges)] = (owner.cpu_s() - began_s) / op
    assert spent_s[4_000] < spent_s[1] + 0.0005
    assert owner.resident_nbytes() - before_nbytes < 32 << 20
