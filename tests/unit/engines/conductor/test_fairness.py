"""Who gets how much of a crowd's work: nobody is starved, and conversations stay where their cache is.

A small cluster in virtual time: the conductor's own state and policy, engines that compute as fast as they say and
report as late as real ones do, and users who answer.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import pytest

from snowskin.engines.conductor.policies.registry import make_policy
from snowskin.engines.conductor.request import CacheShape, Placement, Stage
from snowskin.engines.conductor.state import ConductorState, Outcome
from snowskin.kvstore.directory.presence import Presence
from tests.support.clusters import load, registration, request

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_CONVERSATIONS = 32
NUM_TURNS = 5
TOKENS_PER_S = 2_000.0
STEP_S = 0.02
REPORT_S = 0.5
# KV of a model of some size: a block from another host takes nearly as long as computing it.
SHAPE = CacheShape(namespaces=(b"n" * 32,), block_size=16, block_nbytes=2 << 20)
NODES = {
    "prefill-0": "host-a:1",
    "prefill-1": "host-b:1",
    "decode-0": "host-a:1",
    "decode-1": "host-b:1",
}


@dataclass
class Engine:
    """One instance; `queue` are placements of prompts still to compute, with what follows each."""

    name: str
    tokens_per_s: float = TOKENS_PER_S
    said_tokens_per_s: float = TOKENS_PER_S
    epoch: int = 0
    alive: bool = True
    queue: deque[tuple[Placement, Callable[[], None]]] = field(default_factory=deque)
    num_decoding: int = 0
    num_done: int = 0


class Town:
    """A conductor, two prefills and two decodes on two hosts, and users."""

    def __init__(self, policy: str, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now_s = 0.0
        self.state = ConductorState()
        self.policy = make_policy(policy)
        self.engines = {name: Engine(name) for name in NODES}
        self.placed: Counter[str] = Counter()
        self.stayed: Counter[bool] = Counter()
        self.num_over = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        for name in NODES:
            self._start(name)
            self._report(name)

    def at(self, delay_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._ids), do))

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self.now_s, _, do = heapq.heappop(self._events)
            assert self.now_s < 3600.0, "it ends"
            do()

    # --- engines

    def _start(self, name: str) -> None:
        engine = self.engines[name]
        engine.epoch += 1
        engine.alive = True
        about = registration(name, epoch=engine.epoch, node_address=NODES[name], shape=SHAPE)
        self.state.on_registered(about, self._load(engine), self.now_s)

    def _load(self, engine: Engine):
        waiting = [placement.num_new_tokens for placement, _ in engine.queue]
        return load(
            num_waiting=max(0, len(waiting) - 1),
            num_running=min(1, len(waiting)) + engine.num_decoding,
            num_waiting_tokens=sum(waiting),
            num_kv_blocks=100_000,
            num_kv_blocks_free=100_000,
            num_tokens_computed=1,
            prefill_tokens_per_s=engine.said_tokens_per_s,
            pull_bytes_per_s=1e9,
        )

    def _report(self, name: str) -> None:
        engine = self.engines[name]
        if engine.alive:
            known = self.state.on_reported(
                name, engine.epoch, self._load(engine), draining=False, now_s=self.now_s
            )
            assert known
        self.at(REPORT_S * self.chance.uniform(0.9, 1.1), lambda: self._report(name))

    def _compute(self, engine: Engine) -> None:
        placement, then = engine.queue[0]
        assert placement.estimate is not None
        epoch = engine.epoch

        def done() -> None:
            if engine.epoch != epoch or not engine.alive:
                return
            engine.queue.popleft()
            engine.said_tokens_per_s += 0.2 * (engine.tokens_per_s - engine.said_tokens_per_s)
            if engine.queue:
                self._compute(engine)
            then()

        compute_s = placement.num_new_tokens / engine.tokens_per_s
        self.at(placement.estimate.transfer_s + compute_s, done)

    def kill(self, name: str, back_after_s: float) -> None:
        engine = self.engines[name]
        engine.alive = False
        lost = [then for _, then in engine.queue]
        engine.queue.clear()
        self.state.on_failed(name, engine.epoch)
        for then in lost:
            then()  # computed by somebody else, of no matter here
        self.at(back_after_s, lambda: self._start(name))

    # --- users

    def talk(self, index: int) -> None:
        self._turn(index, num_turns=NUM_TURNS, num_tokens=0, holders={}, last="")

    def _turn(
        self, index: int, *, num_turns: int, num_tokens: int, holders: dict[str, int], last: str
    ) -> None:
        if num_turns == 0:
            self.num_over += 1
            return
        num_tokens += self.chance.randint(100, 400)
        name = f"{index}.{num_turns}"
        wanted = request(
            request_id=name,
            shape=SHAPE,
            num_tokens=num_tokens,
            max_tokens=64,
            presence=Presence.of_runs(holders),
        )
        self.state.on_request_started(name)
        prefill, decode = (
            self._place(name, wanted, Stage.PREFILL),
            self._place(name, wanted, Stage.DECODE),
        )
        if last:
            self.stayed[prefill.instance_id == last] += 1
        engine, other = self.engines[prefill.instance_id], self.engines[decode.instance_id]

        def prefilled() -> None:
            self.state.on_stage_ended(name, prefill)
            other.num_decoding += 1
            self.at(64 * STEP_S, answered)

        def answered() -> None:
            other.num_decoding -= 1
            self.state.on_stage_ended(name, decode)
            self.state.on_request_ended(name, Outcome.FINISHED)
            self.state.check()
            now_held = holders | {NODES[engine.name]: num_tokens // SHAPE.block_size}
            self.at(
                self.chance.expovariate(4.0),
                lambda: self._turn(
                    index,
                    num_turns=num_turns - 1,
                    num_tokens=num_tokens + 64,
                    holders=now_held,
                    last=engine.name,
                ),
            )

        engine.queue.append((prefill, prefilled))
        if len(engine.queue) == 1:
            self._compute(engine)

    def _place(self, name: str, wanted, stage: Stage) -> Placement:
        placement = self.policy.place(wanted, stage, self.state.view(self.now_s))
        assert isinstance(placement, Placement), placement
        self.state.on_placed(name, placement)
        self.placed[placement.instance_id] += 1
        return placement


def crowd(policy: str, seed: int) -> Town:
    town = Town(policy, seed)
    for index in range(NUM_CONVERSATIONS):
        town.at(town.chance.uniform(0.0, 1.0), partial(town.talk, index))
    return town


def shares(town: Town) -> dict[str, float]:
    """Of the placements of its role, how many each instance got."""
    of_role = Counter()
    for name, num in town.placed.items():
        of_role[name.split("-")[0]] += num
    return {name: town.placed[name] / of_role[name.split("-")[0]] for name in NODES}


@pytest.mark.parametrize("policy", ["least_ttft", "round_robin"])
@pytest.mark.parametrize("seed", range(5))
def test_a_crowd_is_spread_over_all_instances(policy, seed):
    town = crowd(policy, seed)
    town.run(lambda: town.num_over == NUM_CONVERSATIONS)
    assert all(share >= 0.3 for share in shares(town).values()), shares(town)
    assert all(not each.num_placed_requests for each in town.state.view(town.now_s).instances)


@pytest.mark.parametrize("seed", range(5))
def test_conversations_stay_where_their_cache_is(seed):
    town = crowd("least_ttft", seed)
    town.run(lambda: town.num_over == NUM_CONVERSATIONS)
    assert town.stayed[True] >= 2 * town.stayed[False], town.stayed


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", sorted(NODES))
def test_an_instance_that_died_in_the_crowd_gets_its_share_again(name, seed):
    town = crowd("least_ttft", seed)
    town.at(2.0, lambda: town.kill(name, 1.0))
    town.run(lambda: town.now_s > 4.0)
    town.placed.clear()
    town.run(lambda: town.num_over == NUM_CONVERSATIONS)
    assert shares(town)[name] >= 0.2, shares(town)


@pytest.mark.parametrize("name", sorted(NODES))
def test_an_instance_that_broke_off_some_calls_gets_its_share_again(name):
    town = crowd("least_ttft", 3)
    for at in range(20):
        town.at(0.1 * at, lambda: town.state.on_failed(name, town.engines[name].epoch))
    town.run(lambda: town.now_s > 3.0)
    town.placed.clear()
    town.run(lambda: town.num_over == NUM_CONVERSATIONS)
    assert shares(town)[name] >= 0.2, shares(town)


@pytest.mark.parametrize("name", ["prefill-0", "prefill-1"])
def test_an_instance_that_was_slow_once_is_not_forgotten_under_load(name):
    town = crowd("least_ttft", 7)
    town.engines[name].said_tokens_per_s = TOKENS_PER_S / 10
    town._report(name)
    town.run(lambda: town.num_over == NUM_CONVERSATIONS)
    assert shares(town)[name] >= 0.2, shares(town)
