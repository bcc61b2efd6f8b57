"""`shm` peers in processes of their own that are killed or stopped: seen at once, or of no consequence."""

from __future__ import annotations

import os
import time

import pytest

from snowskin.transport.memory import Memfd
from snowskin.transport.shm import ShmTransport
from tests.support.transfer_child import TestMemory, TransferChild
from tests.support.waiting import eventually

NBYTES = 1 << 20
KILLED_S = 1.0


@pytest.fixture(scope="module")
def memories():
    with TestMemory(NBYTES, granted=[(0, NBYTES)]) as owned, TestMemory(NBYTES) as landing:
        yield owned, landing


@pytest.fixture
def owner(memories):
    transport = ShmTransport()
    region = transport.register(Memfd(fd=memories[0].fd))
    yield transport, region
    transport.close()
    region.close()


def linked_reader(owner, memories, heard):
    """A child that attached by a link; the owner's descriptor, the child, the number of its region."""
    transport, region = owner
    owned, landing = memories
    descriptor = transport.describe(region, on_done=heard.append)
    link_fd = transport.link(descriptor)
    try:
        child = TransferChild("shm", landing, lent=[owned.fd, link_fd])
    finally:
        os.close(link_fd)
    number = child.attach(descriptor, fd=owned.fd, link_fd=link_fd)
    return descriptor, child, number


def test_killed_reader_is_noticed_within_a_second_and_its_grant_is_free(owner, memories):
    transport, _ = owner
    heard = []
    descriptor, child, number = linked_reader(owner, memories, heard)
    with child:
        run = {"region": number, "runs": [(0, 0, NBYTES)], "within_s": 5}
        child.ask("pull", note="all of it", **run)
        eventually(lambda: [done.note for done in heard] == [b"all of it"], 5)
        # It goes on mapping while it is stopped, and the owner knows that it does.
        child.begin("pull", stop_after=2, piece_nbytes=1 << 12, **run)
        child.wait_stopped()
        assert transport.is_attached(descriptor)
        child.kill()
        killed_s = time.monotonic()
        eventually(lambda: not transport.is_attached(descriptor), KILLED_S)
        assert time.monotonic() - killed_s < KILLED_S
    assert transport.statistics().num_peers_lost == 1
    assert [done.note for done in heard] == [b"all of it"]


def test_revoked_while_the_reader_stands_still_it_fails_when_it_goes_on(owner, memories):
    transport, _ = owner
    descriptor, child, number = linked_reader(owner, memories, [])
    with child:
        child.begin(
            "pull", region=number, runs=[(0, 0, NBYTES)], within_s=5, stop_after=2,
            piece_nbytes=1 << 12,
        )  # fmt: skip
        child.wait_stopped()
        began_s = time.monotonic()
        transport.revoke(descriptor)
        assert time.monotonic() - began_s < 0.5, "the owner waits for no reader"
        child.go_on()
        assert child.answer()["error"] == "GRANT_REFUSED"
