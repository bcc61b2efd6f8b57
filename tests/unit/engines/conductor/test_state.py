"""The conductor's picture: who is ready when, and what counts as its load."""

from __future__ import annotations

import pytest

from snowskin.engines.conductor.request import Placement, Stage
from snowskin.engines.conductor.state import ConductorState, Outcome
from snowskin.engines.conductor.view import InstanceState, InstanceView
from tests.support.clusters import OTHER_SHAPE, SHAPE, load, registration


@pytest.fixture
def state():
    made = ConductorState(suspect_after_s=1.5, forget_after_s=60.0)
    yield made
    made.check()


def only(state: ConductorState, now_s: float) -> InstanceView:
    (instance,) = state.view(now_s).instances
    return instance


def test_a_registered_instance_is_ready_at_once(state):
    state.on_registered(registration("prefill-0"), load(num_running=2), now_s=10.0)
    found = only(state, 10.0)
    assert (found.state, found.load.num_running) == (InstanceState.READY, 2)


def test_three_missing_heartbeats_make_it_suspect_and_one_report_ready_again(state):
    state.on_registered(registration("prefill-0"), load(), now_s=10.0)
    assert only(state, 11.5).state is InstanceState.READY
    assert only(state, 11.6).state is InstanceState.SUSPECT
    version = state.version
    assert state.on_reported("prefill-0", 1, load(), draining=False, now_s=12.0)
    assert only(state, 12.0).state is InstanceState.READY
    assert state.version > version


def test_a_failed_call_makes_it_suspect_at_once_until_its_next_report(state):
    state.on_registered(registration("prefill-0"), load(), now_s=10.0)
    state.on_failed("prefill-0", 1)
    assert only(state, 10.0).state is InstanceState.SUSPECT
    state.on_reported("prefill-0", 1, load(), draining=False, now_s=10.5)
    assert only(state, 10.5).state is InstanceState.READY


def test_a_failure_of_the_earlier_process_does_not_blame_the_new_one(state):
    state.on_registered(registration("prefill-0"), load(), now_s=10.0)
    state.on_registered(registration("prefill-0", epoch=2), load(), now_s=11.0)
    state.on_failed("prefill-0", 1)
    assert only(state, 11.0).state is InstanceState.READY


def test_a_report_of_another_epoch_or_of_a_stranger_must_register_first(state):
    assert not state.on_reported("prefill-0", 1, load(), draining=False, now_s=1.0)
    state.on_registered(registration("prefill-0", epoch=2), load(), now_s=1.0)
    assert not state.on_reported("prefill-0", 1, load(num_running=9), draining=False, now_s=2.0)
    assert only(state, 2.0).load.num_running == 0


def test_a_draining_instance_is_not_ready(state):
    state.on_registered(registration("decode-0"), load(), now_s=1.0)
    state.on_reported("decode-0", 1, load(), draining=True, now_s=1.5)
    assert only(state, 1.5).state is InstanceState.DRAINING


def test_another_instance_at_the_same_address_replaces_the_dead_one(state):
    state.on_registered(registration("prefill-0", address="a:1"), load(), now_s=1.0)
    state.on_registered(registration("prefill-1", address="a:1"), load(), now_s=2.0)
    assert only(state, 2.0).instance_id == "prefill-1"


def test_long_silence_is_forgotten(state):
    state.on_registered(registration("prefill-0"), load(), now_s=1.0)
    assert state.forget_silent(61.0) == []
    assert state.forget_silent(61.1) == ["prefill-0"]
    assert state.view(61.1).instances == ()


def placement(stage: Stage = Stage.PREFILL, instance_id: str = "prefill-0") -> Placement:
    return Placement(stage=stage, instance_id=instance_id, num_new_tokens=70, num_kv_blocks=7)


def test_a_placement_counts_until_the_next_report(state):
    state.on_registered(registration("prefill-0"), load(num_kv_blocks_free=10), now_s=1.0)
    state.on_placed("r", placement())
    found = only(state, 1.0)
    assert (found.num_requests, found.num_waiting_tokens, found.num_free_blocks) == (1, 70, 3)
    state.on_reported("prefill-0", 1, load(num_waiting_tokens=65), draining=False, now_s=1.5)
    assert only(state, 1.5).num_waiting_tokens == 65


def test_a_placement_counts_no_more_when_its_stage_ends(state):
    state.on_registered(registration("prefill-0"), load(), now_s=1.0)
    state.on_placed("r", placement())
    state.on_placed("s", placement())
    state.on_stage_ended("r", placement())
    assert only(state, 1.0).num_placed_requests == 1
    assert state.view(1.0).num_placements[Stage.PREFILL] == 2


def test_requests_are_conserved(state):
    for index, outcome in enumerate(Outcome):
        state.on_request_started(f"r{index}")
        state.check()
        state.on_request_ended(f"r{index}", outcome)
    state.on_request_started("running")
    counts = state.counts()
    assert counts.num_arrived == len(Outcome) + 1
    assert (counts.num_running, counts.num_refused, counts.num_cancelled) == (1, 1, 1)


def test_the_shape_to_serve_needs_both_roles_ready(state):
    state.on_registered(registration("prefill-0", shape=OTHER_SHAPE), load(), now_s=1.0)
    state.on_registered(registration("prefill-1", shape=OTHER_SHAPE), load(), now_s=1.0)
    state.on_registered(registration("prefill-2"), load(), now_s=1.0)
    assert state.view(1.0).shape() is None
    assert state.view(1.0).missing_roles() == ("decode",)
    state.on_registered(registration("decode-0"), load(), now_s=1.0)
    assert state.view(1.0).shape() == SHAPE
    assert state.view(1.0).missing_roles() == ()
    state.on_registered(registration("decode-1", shape=OTHER_SHAPE), load(), now_s=1.0)
    assert state.view(1.0).shape() == OTHER_SHAPE, "the one with more instances"
