"""`tcp` between two hosts: shaped, cut and healed in the middle, striped over two cables, IPv6, PID namespaces."""

from __future__ import annotations

import time

import pytest

from tests.support.hosts import hosts_or_skip
from tests.support.raw_tcp import at, reachable
from tests.support.transfer_child import TestMemory, TransferChild
from tests.support.two_cables import addresses_of, owner_on_both_cables, pulled, reader_of
from tests.support.waiting import eventually

RATE_MBIT = 400
NBYTES = 64 << 20
SMALL = 1 << 20
GRACE_S = 0.5
IDLE_S = 5.0


@pytest.fixture(scope="module")
def hosts():
    with hosts_or_skip(num_cables=2, rate_mbit=RATE_MBIT) as made:
        yield made


@pytest.fixture(autouse=True)
def _healed(hosts):
    yield
    hosts.heal()


@pytest.fixture(scope="module")
def owned():
    with TestMemory(NBYTES, granted=[(0, NBYTES)], seed=8) as memory:
        yield memory


@pytest.fixture(scope="module")
def landing():
    with TestMemory(NBYTES) as memory:
        yield memory


@pytest.fixture(scope="module")
def owner(hosts, owned):
    with owner_on_both_cables(hosts, owned) as child:
        yield child


@pytest.fixture(scope="module")
def reader(hosts, landing):
    with reader_of(hosts, landing) as child:
        yield child


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_address_of_an_owner_is_reached_by_ipv4_and_ipv6(owner, reader, owned, landing, index):
    descriptor = owner.describe()
    only = at(descriptor, addresses_of(descriptor)[index])
    landing.fill()
    assert pulled(reader, only, SMALL)["nbytes"] == SMALL
    assert landing.bytes_at(0, SMALL) == owned.bytes_at(0, SMALL)


@pytest.mark.parametrize("silently", [False, True])
def test_a_pull_goes_on_when_its_only_cable_was_cut_and_healed(
    hosts, owner, reader, owned, landing, silently
):
    descriptor = owner.describe()
    only = at(descriptor, addresses_of(descriptor)[0])
    landing.fill()
    region = reader.attach(only)
    nbytes = 8 << 20
    reader.begin("pull", region=region, runs=[(0, 0, nbytes)], within_s=8.0)
    wait_for_bytes(landing, nbytes // 4)
    hosts.cables[0].cut(silently=silently)
    time.sleep(0.3)  # an outage; there is nothing to wait on
    hosts.cables[0].heal()
    answer = reader.answer()
    assert answer.get("nbytes") == nbytes, answer
    assert landing.bytes_at(0, nbytes) == owned.bytes_at(0, nbytes)
    reader.ask("detach", region=region)


def test_a_pull_over_a_cable_that_stays_cut_fails_at_its_deadline(hosts, owner, landing):
    descriptor = owner.describe()
    only = at(descriptor, addresses_of(descriptor)[0])
    landing.fill()
    with TransferChild("tcp", landing, command=hosts.a.command, listen=[]) as reader:
        before = owner.statistics()
        region = reader.attach(only)
        reader.begin("pull", region=region, runs=[(0, 0, NBYTES)], within_s=1.0)
        wait_for_bytes(landing, SMALL)
        hosts.cables[0].cut(silently=True)
        answer = reader.answer()
        assert answer["error"] in ("TRANSFER_TIMED_OUT", "PEER_LOST")
        assert hosts.b.address(0) in answer["message"]
        assert answer["took_s"] < 1.0 + GRACE_S
        # Both let go, though nothing comes through.
        assert reader.statistics()["num_connections"] == 0
        eventually(
            lambda: owner.statistics()["num_served_failed"] == before["num_served_failed"] + 1,
            IDLE_S + GRACE_S,
            "the owner gives the pull up",
        )
        assert owner.statistics()["num_connections"] <= before["num_connections"]
        hosts.heal()
        reader.ask("detach", region=region)
        assert pulled(reader, only, SMALL)["nbytes"] == SMALL


def wait_for_bytes(landing, nbytes):
    """Returns once about so much has landed: what was a canary there is none any more."""
    eventually(lambda: landing.array[nbytes] < 0x80, 5.0, "bytes land")


def test_a_pull_with_delay_is_exact(hosts, owner, reader, owned, landing):
    descriptor = owner.describe()
    target = tuple(addresses_of(descriptor)[0])
    landing.fill()
    with hosts.delayed(target, 0.02) as (address, by):
        print(f"delay by {by}")
        answer = pulled(reader, at(descriptor, address), SMALL)
        assert answer["nbytes"] == SMALL
        assert sum(answer["seconds"]) >= 0.04
    assert landing.bytes_at(0, SMALL) == owned.bytes_at(0, SMALL)


def test_tcp_pulls_between_pid_namespaces(hosts, owned, landing):
    def command(host):
        return lambda *arguments: host.command(*arguments, own_pids=True)

    with (
        TransferChild(
            "tcp", owned, command=command(hosts.b), listen=[f"{hosts.b.address()}:0"]
        ) as far,
        TransferChild("tcp", landing, command=command(hosts.a), listen=[]) as near,
    ):
        assert far.facts["pid"] == near.facts["pid"] == 1
        landing.fill()
        descriptor = far.describe()
        assert pulled(near, descriptor, SMALL)["nbytes"] == SMALL
        assert landing.bytes_at(0, SMALL) == owned.bytes_at(0, SMALL)
        far.kill()
        answer = pulled(near, descriptor, SMALL)
        assert answer["error"] == "PEER_LOST"
        assert str(reachable(descriptor)) in answer["message"]
        assert answer["took_s"] < 1.0
