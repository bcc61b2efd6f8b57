"""`ucx` peers that are killed and stopped, in the middle of a transfer and idle.

What must hold: a typed error that names the peer, a killed one within 1 s and a stopped one by the deadline, or within
the silence that is allowed when idle; nothing lands afterwards; the owner's memory comes free; the next transfer works.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from snowskin.transport.api import Run
from snowskin.transport.errors import PeerLost, TransferTimedOut, TransportError
from snowskin.transport.ucp.binding import why_unavailable
from snowskin.transport.ucx.settings import UcxSettings
from snowskin.transport.ucx.transport import UcxTransport
from tests.support.transfer_child import TestMemory, TransferChild
from tests.support.waiting import eventually

NO_UCX = why_unavailable()
pytestmark = pytest.mark.skipif(NO_UCX is not None, reason=f"NO UCX HERE: {NO_UCX}")

NBYTES = 10 << 20  # more than is under way at once
PIECE_NBYTES = 64 * 1024
KILLED_S = 1.0
DEADLINE_S = 0.3
GRACE_S = 0.5  # how much later than it should a busy machine may be
IMPATIENT: dict[str, Any] = {
    "net_devices": "lo",
    "heartbeat_s": 0.2,
    "silence_s": 0.7,
    "stall_s": 0.4,
}
SILENT_S = 0.7 + 0.25 + GRACE_S  # silence_s, and how late a tick may see it


@pytest.fixture(scope="module")
def owned():
    with TestMemory(NBYTES, granted=[(0, NBYTES)], seed=5) as memory:
        yield memory


@pytest.fixture(scope="module")
def long_lived(owned):
    with TransferChild("ucx", owned, name="lasting-owner", **IMPATIENT) as child:
        yield child


@pytest.fixture
def lasting_owner(long_lived):
    """One that is stopped, never killed."""
    yield long_lived
    long_lived.go_on()


class Reader:
    """A transport of this process with memory to land in."""

    def __init__(self, **settings):
        self.transport = UcxTransport(UcxSettings(**IMPATIENT | settings))
        self.target = np.zeros(NBYTES, dtype=np.uint8)
        self.local = self.transport.register(self.target)

    def pull(self, remote, *, within_s=5.0, nbytes=NBYTES, landed=None):
        self.transport.pull(
            remote,
            self.local,
            [Run(0, 0, nbytes)],
            deadline_s=time.monotonic() + within_s,
            piece_nbytes=PIECE_NBYTES,
            landed=landed,
        )

    def push(self, remote, *, within_s=5.0, landed=None):
        self.transport.push(
            self.local,
            remote,
            [Run(0, 0, NBYTES)],
            deadline_s=time.monotonic() + within_s,
            piece_nbytes=PIECE_NBYTES,
            landed=landed,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.transport.close()
        self.local.close()


class After:
    """A `landed` that does something once, in the middle of the transfer, and says when."""

    def __init__(self, do, num_pieces=20):
        self.do = do
        self.left = num_pieces
        self.done_s = 0.0

    def __call__(self, _offset, _nbytes):
        self.left -= 1
        if not self.left:
            self.do()
            self.done_s = time.monotonic()


@pytest.mark.parametrize(
    ("one_sided", "is_push"),
    [
        pytest.param(False, False, id="pull"),
        pytest.param(False, True, id="push"),
        pytest.param(True, False, id="one-sided pull"),
        pytest.param(True, True, id="one-sided push", marks=pytest.mark.soak),
    ],
)
def test_killed_owner_is_noticed_within_a_second(owned, one_sided, is_push):
    settings: dict[str, Any] = {
        "trusted_network": one_sided,
        "heartbeat_s": 10.0,
        "silence_s": 30.0,
    }
    with (
        TransferChild("ucx", owned, **IMPATIENT | settings | {"name": "the-victim"}) as owner,
        Reader(**settings) as reader,
    ):
        remote = reader.transport.attach(owner.describe(writable=True), writable=True)
        after = After(owner.kill)
        move = reader.push if is_push else reader.pull
        with pytest.raises(PeerLost, match="the-victim"):
            move(remote, within_s=20.0, landed=after)
        assert time.monotonic() - after.done_s < KILLED_S + GRACE_S
        with pytest.raises(PeerLost, match="the-victim"):
            move(remote, within_s=20.0)
        assert reader.transport.statistics().num_lost == 2
        assert not reader.local.quarantined_nbytes
    if is_push:
        owned.fill()


def test_killed_idle_owner_is_noticed_within_a_second(owned):
    patient: dict[str, Any] = {"heartbeat_s": 10.0, "silence_s": 30.0}
    with (
        TransferChild("ucx", owned, **IMPATIENT | patient) as owner,
        Reader(**patient) as reader,
    ):
        remote = reader.transport.attach(owner.describe())
        reader.pull(remote, nbytes=10)
        owner.kill()
        eventually(lambda: reader.transport.statistics().num_peers_lost == 1, KILLED_S + GRACE_S)


def test_stopped_owner_costs_a_pull_no_more_than_its_deadline_and_nothing_lands_later(
    lasting_owner,
):
    with Reader() as reader:
        remote = reader.transport.attach(lasting_owner.describe())
        after = After(lasting_owner.stop)
        with pytest.raises(TransferTimedOut, match="lasting-owner"):
            reader.pull(remote, within_s=DEADLINE_S, landed=after)
        assert time.monotonic() - after.done_s < DEADLINE_S + GRACE_S
        assert not reader.local.quarantined_nbytes, "what arrives for it is dropped"
        reader.target[:] = 0
        lasting_owner.go_on()
        reader.pull(remote, nbytes=10)
        assert not reader.target[10:].any()


def test_stopped_idle_owner_is_noticed_and_reached_again_once_it_goes_on(lasting_owner, owned):
    with Reader() as reader:
        remote = reader.transport.attach(lasting_owner.describe())
        reader.pull(remote, nbytes=10)
        lasting_owner.stop()
        eventually(lambda: reader.transport.statistics().num_peers_lost == 1, SILENT_S)
        lasting_owner.go_on()

        def pulled():
            try:
                reader.pull(remote, within_s=1.0, nbytes=1000)
            except TransportError:
                return False
            return True

        eventually(pulled, 5.0)
        assert reader.target[:1000].tobytes() == owned.bytes_at(0, 1000)


def test_owner_forgets_a_killed_reader_and_its_memory_comes_free(lasting_owner, owned):
    descriptor = lasting_owner.describe()
    before = lasting_owner.statistics()
    with TestMemory(NBYTES) as landing, TransferChild("ucx", landing, **IMPATIENT) as child:
        region = child.attach(descriptor)
        child.begin("pull", region=region, runs=[[0, 0, NBYTES]], within_s=30, stop_after=3,
                    piece_nbytes=PIECE_NBYTES)  # fmt: skip
        child.wait_stopped()
        assert lasting_owner.statistics()["num_connections"] == 1
        child.kill()
    began_s = time.monotonic()
    lasting_owner.ask("revoke", descriptor=descriptor.to_bytes().hex())
    assert time.monotonic() - began_s < KILLED_S
    eventually(lambda: lasting_owner.statistics()["num_connections"] == 0, KILLED_S + GRACE_S)
    after = lasting_owner.statistics()
    assert after["num_served_failed"] == before["num_served_failed"] + 1


def test_reader_that_takes_nothing_cannot_keep_the_owners_memory(lasting_owner):
    """It is stopped with chunks on their way to it, which UCX keeps; `revoke`, a node's loop mostly, waits for none."""
    descriptor = lasting_owner.describe()
    with TestMemory(NBYTES) as landing, TransferChild("ucx", landing, **IMPATIENT) as child:
        region = child.attach(descriptor)
        child.begin("pull", region=region, runs=[[0, 0, NBYTES]], within_s=30, stop_after=3,
                    piece_nbytes=PIECE_NBYTES)  # fmt: skip
        child.wait_stopped()
        began_s = time.monotonic()
        lasting_owner.ask("revoke", descriptor=descriptor.to_bytes().hex())
        assert time.monotonic() - began_s < IMPATIENT["stall_s"] / 2
        eventually(lambda: lasting_owner.statistics()["num_connections"] == 0, SILENT_S)


def test_stopped_owner_does_not_keep_the_landing_region_of_a_one_sided_pull(owned):
    patient: dict[str, Any] = {"trusted_network": True, "heartbeat_s": 10.0, "silence_s": 30.0}
    with TransferChild("ucx", owned, **IMPATIENT | patient) as owner, Reader(**patient) as reader:
        remote = reader.transport.attach(owner.describe())
        result = []

        def pull():
            with pytest.raises(TransferTimedOut) as caught:
                reader.pull(remote, within_s=DEADLINE_S, landed=After(owner.stop))
            result.append(caught.value)

        thread = threading.Thread(target=pull)
        thread.start()
        thread.join(DEADLINE_S + 2 * GRACE_S)
        assert result, "it does not end by its deadline"
        eventually(lambda: not reader.local.quarantined_nbytes, GRACE_S)
        reader.local.close()
        reader.target[:] = 0
        owner.go_on()
        time.sleep(0)  # it may send what it likes now
        assert owner.statistics()["num_grants"] == 1
        assert not reader.target.any()
