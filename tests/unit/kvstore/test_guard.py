"""Requests and a node that may be silent: what they lose, who looks at it, and when it is trusted again."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from snowskin.kvstore.client import guard as guard_module
from snowskin.kvstore.client.breaker import BreakerRules, BreakerState, LookupBudget
from snowskin.kvstore.client.guard import NodeGuard
from snowskin.kvstore.errors import DeadlineExceeded, NodeSilent, NodeUnavailable, PoolExhausted

BUDGET_S = 0.01
# Long enough for a host that is busy; a test that waits so long has failed.
AT_LAST_S = 10.0


class Node:
    """Answers a probe while `answers` is set."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.answers.set()
        self.num_probes = 0
        self.error: Exception | None = None

    async def probe(self) -> None:
        self.num_probes += 1
        if self.error:
            raise self.error
        await self.answers.wait()


@pytest.fixture
def node():
    return Node()


@pytest.fixture
async def guard(node, monkeypatch):
    monkeypatch.setattr(guard_module, "PROBE_S", 0.02)
    rules = BreakerRules(min_pause_s=0.005, max_pause_s=0.02, look_s=0.002)
    made = NodeGuard("node a", node.probe, budget_s=BUDGET_S, rules=rules)
    yield made
    await made.close()


def late(guard, began_at_s=None):
    """A call of a request that was not answered in time."""
    with contextlib.suppress(DeadlineExceeded), guard.asking() as asking:
        asking.began_at_s = began_at_s or time.monotonic() - asking.timeout_s
        raise DeadlineExceeded("late")


async def until(condition):
    async with asyncio.timeout(AT_LAST_S):
        while not condition():  # noqa: ASYNC110  the guard has no event for it
            await asyncio.sleep(0.001)


async def test_a_node_that_is_late_once_is_looked_at_and_stays_in_use_when_it_answers(guard, node):
    late(guard)
    assert guard.breaker.is_suspect
    await until(lambda: not guard.breaker.is_suspect)
    assert node.num_probes
    assert guard.usable
    assert guard.breaker.num_opened == 0


async def test_a_silent_node_is_given_up_by_probes_after_one_late_request_and_comes_back(
    guard, node
):
    node.answers.clear()
    late(guard)
    await until(lambda: not guard.usable)
    with pytest.raises(NodeSilent, match="node a did not answer"), guard.asking():
        raise AssertionError("nobody asks it")
    assert guard.breaker.num_refused == 1
    node.answers.set()
    await until(lambda: guard.usable)
    assert not guard.breaker.is_suspect
    assert guard.breaker.num_opened == 1


async def test_a_request_costs_a_node_that_is_left_alone_nothing(guard, node):
    node.answers.clear()
    late(guard)
    await until(lambda: not guard.usable)
    budget = LookupBudget(BUDGET_S)
    began_s = time.perf_counter()
    for _ in range(1000):
        with pytest.raises(NodeSilent):
            await guard.ask(budget)
    assert budget.left_s == BUDGET_S
    assert (time.perf_counter() - began_s) / 1000 < 0.001


async def test_a_question_to_a_silent_node_costs_the_budget_and_the_next_one_nothing_of_it(
    guard, node
):
    node.answers.clear()
    budget = LookupBudget(BUDGET_S)
    with pytest.raises(DeadlineExceeded):
        await guard.ask(budget)
    assert budget.left_s == 0.0
    with guard.asking(budget) as asking:
        assert asking.timeout_s == guard.lookups.expected_s


async def test_time_in_which_this_process_did_not_run_is_not_held_against_the_node(guard, node):
    for _ in range(10):
        late(guard, began_at_s=time.monotonic() - 1.0)
    assert guard.num_late == 10
    assert not guard.breaker.is_suspect
    assert node.num_probes == 0


async def test_waiting_inside_the_node_is_neither_late_nor_a_measure(guard):
    budget = LookupBudget(BUDGET_S)
    expected_s = guard.lookups.expected_s
    with guard.asking(budget, waits_s=5.0) as asking:
        assert asking.timeout_s == pytest.approx(5.0 + expected_s + BUDGET_S)
        asking.began_at_s -= 4.9
    assert budget.left_s == BUDGET_S
    assert guard.lookups.expected_s == expected_s


async def test_a_copy_behind_the_answer_is_not_the_nodes_time(guard):
    budget = LookupBudget(BUDGET_S)
    with guard.asking(budget) as asking:
        asking.answered()
        asking.began_at_s -= 1.0  # the copy took a second
    assert budget.left_s == BUDGET_S
    assert guard.lookups.expected_s < 0.1


async def test_a_copy_that_the_node_did_not_bring_in_time_is_late(guard):
    with contextlib.suppress(DeadlineExceeded), guard.asking() as asking:
        asking.answered()
        asking.began_at_s -= 2.0
        raise DeadlineExceeded("the stream stood still")
    assert guard.breaker.num_failures == 1


async def test_a_refusal_is_an_answer(guard):
    for _ in range(5):
        with pytest.raises(PoolExhausted), guard.asking():
            raise PoolExhausted("full")
    assert not guard.breaker.is_suspect


async def test_a_broken_connection_is_no_silence(guard, node):
    for _ in range(5):
        with pytest.raises(NodeUnavailable), guard.asking():
            raise NodeUnavailable("cut")
    assert not guard.breaker.is_suspect
    assert node.num_probes == 0


async def test_another_connection_has_no_past(guard, node):
    node.answers.clear()
    late(guard)
    await until(lambda: not guard.usable)
    guard.forget()
    assert guard.usable
    probes = node.num_probes
    await until(lambda: guard._checking is None)
    assert node.num_probes <= probes + 1


async def test_a_node_that_cannot_be_looked_at_is_looked_at_again(guard, node):
    node.error = NodeUnavailable("cut")
    late(guard)
    await until(lambda: node.num_probes > 3)
    node.error = None
    await until(lambda: not guard.breaker.is_suspect)


async def test_an_answer_slower_than_requests_wait_does_not_close_it(guard, node, monkeypatch):
    node.answers.clear()
    late(guard)
    await until(lambda: not guard.usable)
    monkeypatch.setattr(guard_module, "PROBE_S", AT_LAST_S)

    async def slow():
        node.num_probes += 1
        await asyncio.sleep(2 * (guard.lookups.expected_s + BUDGET_S))

    monkeypatch.setattr(guard, "_probe", slow)
    probes = node.num_probes
    await until(lambda: node.num_probes > probes + 2)
    assert guard.breaker.state in (BreakerState.OPEN, BreakerState.HALF_OPEN)


async def test_closing_it_ends_the_looking(guard, node):
    node.answers.clear()
    late(guard)
    await guard.close()
    assert guard._checking is None
    await guard.close()


async def test_a_call_that_is_late_behind_the_close_begins_no_looking_that_nobody_would_end(
    guard, node
):
    with contextlib.suppress(DeadlineExceeded), guard.asking() as asking:
        await guard.close()
        asking.began_at_s = time.monotonic() - asking.timeout_s
        raise DeadlineExceeded("late")
    assert guard._checking is None
    assert not guard.breaker.is_suspect
    assert node.num_probes == 0
