"""The conductor's books under events in any order: what is counted is what was placed and has not ended.

A load that is counted and never given back would starve its instance for ever, so at the end of every run all counts
must be at nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from snowskin.engines.conductor.policies.least_ttft import LeastTtft
from snowskin.engines.conductor.request import Placement, Stage
from snowskin.engines.conductor.state import ConductorState, Outcome
from snowskin.engines.conductor.view import InstanceState
from tests.support.clusters import SHAPE, load, registration, request

if TYPE_CHECKING:
    from snowskin.engines.conductor.view import InstanceView

SUSPECT_AFTER_S, FORGET_AFTER_S = 1.5, 10.0
INSTANCES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
instance_ids = st.sampled_from(INSTANCES)


@dataclass
class Known:
    """What a test knows of an instance that the conductor should know."""

    epoch: int
    reported_at_s: float
    failed: bool = False
    draining: bool = False
    placed: dict[tuple[str, Stage], Placement] = field(default_factory=dict)


class ConductorBooks(RuleBasedStateMachine):
    """Registrations, reports, requests and failures, as they may come."""

    requests = Bundle("requests")
    stages = Bundle("stages")

    def __init__(self) -> None:
        super().__init__()
        self.state = ConductorState(suspect_after_s=SUSPECT_AFTER_S, forget_after_s=FORGET_AFTER_S)
        self.policy = LeastTtft()
        self.now_s = 0.0
        self.num_names = 0
        self.last_epoch = dict.fromkeys(INSTANCES, 0)
        self.known: dict[str, Known] = {}
        self.running: set[str] = set()
        self.open: dict[tuple[str, Stage], Placement] = {}
        self.num_arrived = 0

    # --- instances

    @rule(instance_id=instance_ids)
    def starts(self, instance_id: str) -> None:
        self.last_epoch[instance_id] += 1
        epoch = self.last_epoch[instance_id]
        self.state.on_registered(registration(instance_id, epoch=epoch), load(), self.now_s)
        self.known[instance_id] = Known(epoch, self.now_s)

    @rule(instance_id=instance_ids, is_late=st.booleans(), draining=st.booleans())
    def reports(self, instance_id: str, is_late: bool, draining: bool) -> None:
        epoch = self.last_epoch[instance_id] - is_late
        known = self.known.get(instance_id)
        is_known = self.state.on_reported(
            instance_id, epoch, load(), draining=draining, now_s=self.now_s
        )
        assert is_known == (known is not None and known.epoch == epoch)
        if is_known:
            self.known[instance_id] = Known(epoch, self.now_s, draining=draining)

    @rule(instance_id=instance_ids, is_late=st.booleans())
    def fails_a_call(self, instance_id: str, is_late: bool) -> None:
        epoch = self.last_epoch[instance_id] - is_late
        self.state.on_failed(instance_id, epoch)
        known = self.known.get(instance_id)
        if known is not None and known.epoch == epoch:
            known.failed = True

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        gone = self.state.forget_silent(self.now_s)
        silent = [
            name
            for name, known in self.known.items()
            if self.now_s - known.reported_at_s > FORGET_AFTER_S
        ]
        assert sorted(gone) == sorted(silent)
        for name in silent:
            del self.known[name]

    # --- requests

    @rule(target=requests)
    def a_request_comes(self) -> str:
        self.num_names += 1
        name = f"r{self.num_names}"
        self.state.on_request_started(name)
        self.running.add(name)
        self.num_arrived += 1
        return name

    @rule()
    def a_request_is_turned_away(self) -> None:
        self.state.on_request_turned_away()
        self.num_arrived += 1

    @rule(target=stages, name=requests, stage=st.sampled_from(Stage), num_tokens=st.integers(1, 99))
    def a_stage_is_placed(self, name: str, stage: Stage, num_tokens: int):
        if name not in self.running or (name, stage) in self.open:
            return multiple()  # one instance at a time
        wanted = request(request_id=name, num_tokens=num_tokens)
        placement = self.policy.place(wanted, stage, self.state.view(self.now_s))
        if not isinstance(placement, Placement):
            return multiple()
        self._place(name, placement)
        self.open[name, stage] = placement
        return name, stage

    @rule(stage=st.sampled_from(Stage))
    def a_router_is_given_a_plan(self, stage: Stage) -> None:
        """Its end is told to nobody: it counts until the instance's next report."""
        self.num_names += 1
        placement = self.policy.place(request(), stage, self.state.view(self.now_s))
        if isinstance(placement, Placement):
            self._place(f"s{self.num_names}", placement)

    def _place(self, name: str, placement: Placement) -> None:
        assert placement.instance_id in self.known, "only who is known is given work"
        self.state.on_placed(name, placement)
        self.known[placement.instance_id].placed[name, placement.stage] = placement

    @rule(key=consumes(stages))
    def a_stage_ends(self, key: tuple[str, Stage]) -> None:
        placement = self.open.pop(key, None)
        if placement is None:
            return
        self.state.on_stage_ended(key[0], placement)
        if placement.instance_id in self.known:
            self.known[placement.instance_id].placed.pop(key, None)

    @rule(name=consumes(requests), outcome=st.sampled_from(Outcome), backwards=st.booleans())
    def a_request_ends(self, name: str, outcome: Outcome, backwards: bool) -> None:
        stages = [key for key in self.open if key[0] == name]
        for key in reversed(stages) if backwards else stages:
            self.a_stage_ends(key)
        self.state.on_request_ended(name, outcome)
        self.running.remove(name)

    # --- what holds

    @invariant()
    def every_count_is_what_was_placed_and_has_not_ended(self) -> None:
        self.state.check()
        view = self.state.view(self.now_s)
        assert {each.instance_id for each in view.instances} == set(self.known)
        for each in view.instances:
            known = self.known[each.instance_id]
            assert each.num_placed_requests == len(known.placed)
            assert each.num_placed_tokens == sum(p.num_new_tokens for p in known.placed.values())
            assert each.num_placed_blocks == sum(p.num_kv_blocks for p in known.placed.values())
            assert each.num_free_blocks >= 0
            assert each.num_waiting_tokens >= 0
            assert each.state is self._state_of(each, known)
        counts = self.state.counts()
        assert (counts.num_running, counts.num_arrived) == (len(self.running), self.num_arrived)

    def _state_of(self, each: InstanceView, known: Known) -> InstanceState:
        if known.failed or self.now_s - known.reported_at_s > SUSPECT_AFTER_S:
            return InstanceState.SUSPECT
        return InstanceState.DRAINING if known.draining else InstanceState.READY

    def teardown(self) -> None:
        for name in sorted(self.running):
            self.a_request_ends(name, Outcome.FINISHED, backwards=True)
        left = [key for known in self.known.values() for key in known.placed]
        assert all(name.startswith("s") for name, _stage in left), "plans of routers alone"
        self.every_count_is_what_was_placed_and_has_not_ended()
        for instance_id in INSTANCES:
            if instance_id in self.known:
                self.reports(instance_id, is_late=False, draining=False)
        view = self.state.view(self.now_s)
        assert view.num_requests == 0
        for each in view.instances:
            assert (each.num_requests, each.num_waiting_tokens) == (0, 0)
            assert each.num_free_blocks == each.load.num_kv_blocks_free
            assert each.state is InstanceState.READY
        assert all(each.shape == SHAPE for each in view.instances)


TestConductorBooks = ConductorBooks.TestCase
