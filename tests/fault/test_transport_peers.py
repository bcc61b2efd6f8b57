"""`tcp` peers that are killed, stopped, cut off or reset, at every stage of a pull and of a push.

What must hold: a typed error that names the peer, a killed one within 1 s and any other by the deadline; nothing of the
other side stays connected, running or landing; the next transfer works again, by itself.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest

from snowskin.transport.errors import GrantRefused, LandingQuarantined, PeerLost, TransferTimedOut
from tests.support.raw_tcp import reachable
from tests.support.relay import Relay
from tests.support.tcp_pair import NOTE, PULL_STAGES, PUSH_STAGES, Reader, stages, through
from tests.support.transfer_child import TestMemory, TransferChild
from tests.support.waiting import eventually

MOVED = 16 << 20  # more than all buffers on the way hold
NBYTES = 20 << 20
KILLED_S = 1.0
DEADLINE_S = 0.25
IDLE_S = 5.0
IMPATIENT: dict[str, Any] = {"hello_timeout_s": 0.5, "frame_timeout_s": 0.5, "idle_timeout_s": 0.8}
LEAVES_S = 0.8 + 1.0  # what a peer is given to hear why
GRACE_S = 0.5  # how much later than it should a busy machine may be
SETTLE_S = 5.0


def by_night(way_and_stage):
    """Marks for what costs a time-out: one stage each way by day, all of them by night."""
    return [] if way_and_stage[1] == "in the middle" else pytest.mark.soak


EVERY_STAGE = [(False, stage) for stage in PULL_STAGES[:3]] + [(True, s) for s in PUSH_STAGES]


@pytest.fixture(scope="module")
def owned():
    with TestMemory(NBYTES, granted=[(0, MOVED)], seed=3) as memory:
        yield memory


@pytest.fixture(scope="module")
def landing():
    with TestMemory(NBYTES) as memory:
        yield memory


@pytest.fixture(scope="module")
def lasting_owner(owned):
    """One that is stopped and cut off, never killed."""
    with TransferChild("tcp", owned, **IMPATIENT) as child:
        yield child


@pytest.fixture(scope="module")
def at_stage(lasting_owner, landing):
    return {
        is_push: stages(lasting_owner, landing, MOVED, is_push=is_push) for is_push in (False, True)
    }


def held_at(relay, stage):
    relay.command("hold", direction=stage.direction, at=stage.at)


@contextlib.contextmanager
def transfer_held(relay, stage, reader, descriptor, *, is_push, within_s):
    """A transfer in a thread, standing at a stage; afterwards its error and how long it took are in the result."""
    result: dict[str, Any] = {}

    def run():
        began_s = time.monotonic()
        try:
            reader.move(
                through(relay, descriptor), MOVED, is_push=is_push, within_s=within_s, note=NOTE
            )
        except BaseException as error:  # noqa: BLE001  looked at by the test
            result["error"] = error
        result["ended_s"] = time.monotonic()
        result["took_s"] = result["ended_s"] - began_s

    held_at(relay, stage)
    thread = threading.Thread(target=run, name="transfer")
    thread.start()
    try:
        relay.wait_held()
        yield result
    finally:
        thread.join(within_s + SETTLE_S)
        assert not thread.is_alive(), "the transfer never ends"


def names(error, relay):
    return f"{relay.address[0]}:{relay.address[1]}" in str(error)


@pytest.mark.parametrize(("is_push", "stage"), EVERY_STAGE)
def test_a_killed_owner_is_noticed_within_a_second(owned, landing, at_stage, is_push, stage):
    with TransferChild("tcp", owned) as owner, Reader(landing) as reader:
        descriptor = owner.describe(writable=True)
        with Relay(reachable(descriptor)) as relay:
            where = at_stage[is_push][stage]
            with transfer_held(
                relay, where, reader, descriptor, is_push=is_push, within_s=8.0
            ) as result:
                owner.kill()
                killed_s = time.monotonic()
                # What it said last may be lost with it, and is where it was all that was missing.
                if stage == "before the answer":
                    relay.command("reset")
                relay.command("let_go")
            assert isinstance(result["error"], PeerLost), repr(result["error"])
            assert names(result["error"], relay)
            assert result["ended_s"] - killed_s < KILLED_S
            statistics = reader.transport.statistics()
            assert (statistics.num_connections, statistics.num_attached) == (0, 0)
            assert statistics.num_lost == 1
            with TransferChild("tcp", owned) as again:
                assert (
                    reader.move(through(relay, again.describe()), MOVED, note=NOTE).nbytes == MOVED
                )


@pytest.mark.parametrize(
    ("is_push", "stage", "how"),
    [
        *((is_push, stage, "stopped") for is_push, stage in EVERY_STAGE),
        *(pytest.param(*each, "cut off", marks=by_night(each)) for each in EVERY_STAGE),
    ],
)
def test_a_silent_owner_costs_the_deadline_and_is_reached_again(
    owned, landing, lasting_owner, at_stage, is_push, stage, how
):
    with Reader(landing) as reader:
        descriptor = lasting_owner.describe(writable=True)
        with Relay(reachable(descriptor)) as relay:
            where = at_stage[is_push][stage]
            with transfer_held(
                relay, where, reader, descriptor, is_push=is_push, within_s=DEADLINE_S
            ) as result:
                if how == "cut off":
                    relay.command("cut")
                else:
                    lasting_owner.stop()
                    if stage != "before the answer":  # that has been said
                        relay.command("let_go")
            try:
                assert isinstance(result["error"], TransferTimedOut | PeerLost), result["error"]
                assert names(result["error"], relay)
                assert result["took_s"] < DEADLINE_S + GRACE_S
                if not is_push:
                    # Nothing lands any more, whatever still comes.
                    landing.fill()
            finally:
                if how == "stopped":
                    lasting_owner.go_on()
                relay.command("let_go")
                relay.command("heal")

            def again():
                try:
                    return reader.move(
                        through(relay, descriptor), MOVED, is_push=is_push, note=NOTE
                    )
                except LandingQuarantined:  # until its owner has ended the push that was given up
                    assert is_push
                    return None

            report = eventually(again, SETTLE_S, "the range of the given-up push comes free")
            assert report.nbytes == MOVED
            assert landing.bytes_at(0, MOVED) == owned.bytes_at(0, MOVED) or is_push
        if is_push:
            owned.fill()
    eventually(lambda: lasting_owner.statistics()["num_connections"] == 0, SETTLE_S, "closed")


def test_before_connecting_a_killed_a_stopped_and_a_cut_off_owner_are_told_apart_by_time(
    owned, landing
):
    with TransferChild("tcp", owned) as owner, Reader(landing) as reader:
        descriptor = owner.describe()
        with Relay(reachable(descriptor)) as relay:
            for how in ("stopped", "cut off"):
                owner.stop() if how == "stopped" else relay.command("cut")
                began_s = time.monotonic()
                with pytest.raises((TransferTimedOut, PeerLost)) as caught:
                    reader.move(through(relay, descriptor), MOVED, within_s=DEADLINE_S)
                assert time.monotonic() - began_s < DEADLINE_S + GRACE_S
                assert names(caught.value, relay)
                owner.go_on()
                relay.command("heal")
            owner.kill()
            began_s = time.monotonic()
            with pytest.raises(PeerLost) as caught:
                reader.move(through(relay, descriptor), MOVED, within_s=8.0)
            assert names(caught.value, relay)
            assert time.monotonic() - began_s < KILLED_S


def test_an_owner_that_comes_back_on_its_port_is_reached_without_being_told(owned, landing):
    with Reader(landing) as reader:
        with TransferChild("tcp", owned) as owner:
            descriptor = owner.describe()
            host, port = reachable(descriptor)
            reader.move(descriptor, MOVED)
        with TransferChild("tcp", owned, listen=[f"{host}:{port}"]) as owner:
            with pytest.raises(GrantRefused):  # of the life before
                reader.move(descriptor, MOVED)
            assert reader.move(owner.describe(), MOVED).nbytes == MOVED
        assert reader.transport.statistics().num_connected >= 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("owner_settings", "reader_settings", "within_s"),
    [
        pytest.param(
            {"idle_timeout_s": 1.2},
            {"heartbeat_s": 0.6, "pong_timeout_s": 0.4},
            1.2,
            id="soon",
        ),
        pytest.param({}, {}, IDLE_S, marks=pytest.mark.soak, id="as shipped"),
    ],
)
def test_idle_peers_that_were_killed_stopped_or_cut_off_are_noticed(
    owned, landing, owner_settings, reader_settings, within_s
):
    num = 4
    with contextlib.ExitStack() as stack:
        owners = [
            stack.enter_context(TransferChild("tcp", owned, **owner_settings)) for _ in range(num)
        ]
        reader = stack.enter_context(Reader(landing, **reader_settings))
        grants = [owner.describe() for owner in owners]
        relays = [stack.enter_context(Relay(reachable(grant))) for grant in grants]
        for relay, grant in zip(relays, grants, strict=True):
            reader.move(through(relay, grant), 4096)
        killed, stopped, cut, _living = range(num)

        def statistics():
            return reader.transport.statistics()

        assert statistics().num_connections == num
        began_s = time.monotonic()
        owners[killed].kill()
        owners[stopped].stop()
        relays[cut].command("cut")
        # At once, not when it is pinged the next time.
        eventually(lambda: statistics().num_connections < num, 0.3, "killed")
        eventually(lambda: statistics().num_connections == 1, within_s + GRACE_S, "silent")
        assert statistics().num_peers_lost >= 2  # the killed one said goodbye
        # The other side of the cut: the owner hears nothing more of its reader.
        remaining_s = began_s + within_s + GRACE_S - time.monotonic()
        eventually(
            lambda: owners[cut].statistics()["num_connections"] == 0,
            max(remaining_s, 0.1),
            "the owner notices as well",
        )
        owners[stopped].go_on()
        eventually(lambda: owners[stopped].statistics()["num_connections"] == 0, SETTLE_S, "thawed")
        relays[cut].command("heal")
        for index in (stopped, cut):
            assert reader.move(through(relays[index], grants[index]), 4096).nbytes == 4096
        assert statistics().num_connected == num + 2, "the living one was never left"


@pytest.mark.parametrize(
    ("is_push", "stage", "how"),
    [
        *((is_push, stage, "killed") for is_push, stage in EVERY_STAGE),
        (False, "before the notice", "killed"),
        *(pytest.param(*each, "stopped", marks=by_night(each)) for each in EVERY_STAGE),
        pytest.param(False, "before the notice", "stopped", marks=pytest.mark.soak),
    ],
)
def test_a_reader_that_dies_or_stops_leaves_nothing_with_the_owner(
    owned, landing, lasting_owner, at_stage, is_push, stage, how
):
    descriptor = lasting_owner.describe(writable=True, notify=True)
    before = lasting_owner.statistics()
    num_threads, num_sockets = lasting_owner.threads(), lasting_owner.sockets()
    num_told = len(lasting_owner.ask("completions")["completions"])
    with TransferChild("tcp", landing, listen=[]) as reader, Relay(reachable(descriptor)) as relay:
        region = reader.attach(through(relay, descriptor), writable=is_push)
        held_at(relay, at_stage[is_push][stage])
        reader.begin(
            "push" if is_push else "pull",
            region=region,
            runs=[(0, 0, MOVED)],
            within_s=1.0,
            note=NOTE.decode(),
        )
        relay.wait_held()
        if how == "killed":
            reader.kill()
            if stage == "before the notice":  # else its last word would come through after all
                relay.command("reset")
            relay.command("let_go")
        else:
            reader.stop()
            relay.command("let_go")
        eventually(
            lambda: lasting_owner.statistics()["num_connections"] == before["num_connections"],
            (KILLED_S if how == "killed" else LEAVES_S) + GRACE_S,
            "the owner lets go",
        )
    after = lasting_owner.statistics()
    assert after["num_grants"] == before["num_grants"]
    ends_half_way = stage in ("after the request", "in the middle")
    if ends_half_way or (stage == "before the notice" and how == "killed"):
        assert after["num_served_failed"] == before["num_served_failed"] + 1
        told = lasting_owner.ask("completions")["completions"]
        assert len(told) == num_told, "a transfer that failed was told of as done"
    assert lasting_owner.sockets() <= num_sockets
    assert lasting_owner.threads() <= num_threads + 1
    # What the dead peer was doing holds nobody who comes after it.
    lasting_owner.ask("revoke", descriptor=descriptor.to_bytes().hex(), patience_s=2.0)
    if is_push:
        owned.fill()
