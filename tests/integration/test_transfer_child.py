"""Two processes and a transport between them: bytes, canaries, deaths, and PID namespaces, by `shm`."""

from __future__ import annotations

import signal

import pytest

from tests.support.hosts import hosts_or_skip
from tests.support.transfer_child import TestMemory, TransferChild, has_canaries

NBYTES = 1 << 20
GRANTED = (4096, 128 * 1024)


@pytest.fixture
def memories():
    with TestMemory(NBYTES, granted=[GRANTED], seed=1) as owned, TestMemory(NBYTES) as landing:
        yield owned, landing


def test_what_was_not_granted_is_a_canary(memories):
    owned, _ = memories
    offset, nbytes = GRANTED
    assert not has_canaries(owned.bytes_at(offset, nbytes))
    assert all(
        has_canaries(owned.bytes_at(at, 1)) for at in (0, offset - 1, offset + nbytes, NBYTES - 1)
    )
    assert owned.canaries_are_intact
    owned.array[offset] ^= 1
    assert owned.canaries_are_intact
    owned.array[offset + nbytes] ^= 1
    assert not owned.canaries_are_intact


@pytest.mark.parametrize("own_pids", [False, True])
def test_shm_pulls_from_another_process_also_in_another_pid_namespace(memories, own_pids):
    owned, landing = memories
    offset, nbytes = GRANTED
    with hosts_or_skip() as hosts:

        def command(*arguments):
            return hosts.a.command(*arguments, own_pids=own_pids)

        with (
            TransferChild("shm", owned, command=command) as owner,
            TransferChild("shm", landing, command=command, lent=[owned.fd]) as reader,
        ):
            region = reader.attach(owner.describe(), fd=owned.fd)
            report = reader.ask("pull", region=region, runs=[(offset, 0, nbytes)], within_s=5)
            assert report["nbytes"] == nbytes
            assert landing.bytes_at(0, nbytes) == owned.bytes_at(offset, nbytes)
            assert reader.statistics()["num_pulls"] == 1
            assert (reader.facts["pid"] == 1) is own_pids


def test_a_child_says_errors_by_name(memories):
    owned, _ = memories
    with TransferChild("loopback", owned) as child:
        region = child.attach(child.describe(ranges=[GRANTED]))
        answer = child.ask("pull", region=region, runs=[(0, 0, 1)], within_s=5)
        assert answer["error"] == "OUT_OF_BOUNDS"
        assert child.statistics()["refused_by_reason"] == {"OUT_OF_BOUNDS": 1}


def test_a_child_stops_itself_in_the_middle_and_can_be_stopped_and_killed(memories):
    owned, landing = memories
    with TransferChild("shm", landing, lent=[owned.fd]) as reader:
        with TransferChild("shm", owned) as owner:
            region = reader.attach(owner.describe(), fd=owned.fd)
            owner.stop()
            owner.go_on()
            assert owner.ask("statistics")["num_grants"] == 1
        reader.begin(
            "pull",
            region=region,
            runs=[(0, 0, 1 << 16)],
            within_s=5,
            stop_after=2,
            piece_nbytes=1 << 12,
        )
        reader.wait_stopped()
        assert landing.bytes_at(0, 2 << 12) == owned.bytes_at(0, 2 << 12)
        assert landing.bytes_at(2 << 12, 1 << 12) != owned.bytes_at(2 << 12, 1 << 12)
        reader.go_on()
        assert reader.answer()["nbytes"] == 1 << 16
        assert (reader.mappings(), reader.sockets()) == (2, 0)
        reader.ask("detach", region=region)
        assert reader.mappings() == 1
        reader.kill()
        assert reader.process.returncode == -signal.SIGKILL


def test_a_child_ends_when_nobody_speaks_to_it_any_more(memories):
    with TransferChild("loopback", memories[0]) as child:
        child.process.stdin.close()
        assert child.process.wait(5) == 0
