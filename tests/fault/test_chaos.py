"""Requests without a pause while processes die and freeze at random, for minutes: the long form."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, field

import psutil
import pytest

from tests.support.engine_bench import prompt_tokens
from tests.support.up_process import SETTLE_S, assert_exact

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

SEED = 20_260_101
DURATION_S = 180.0
NUM_USERS = 3
VICTIMS = ("prefill-0", "decode-0", "decode-0", "prefill-0", "node-0", "conductor")
# A conductor that dies takes its users' connections along; without an engine it says so.
ALLOWED = {"", "no_instance_ready", "instance_lost", "node_unavailable"}


@dataclass
class Tally:
    """What became of the requests."""

    answers: list = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


async def keep_asking(up, user: int, until_s: float, tally: Tally) -> None:
    chance = random.Random(SEED + user)
    turn = 0
    while time.monotonic() < until_s:
        turn += 1
        # Every second prompt continues one of a few, so that there is something in the cache.
        shared = prompt_tokens(16 * chance.randint(4, 60), 70_000 + chance.randint(0, 3))
        prompt = [*shared, *prompt_tokens(chance.randint(1, 80), user * 10_000 + turn)]
        num_tokens = chance.randint(2, 60)
        use_cache = chance.random() < 0.8
        async with up.asking(prompt, num_tokens, use_cache=use_cache) as answer:
            if chance.random() < 0.1:
                await answer.until(lambda answer: answer.is_over or len(answer.token_ids) > 3)
                continue  # hangs up
            await answer.until(lambda answer: answer.is_over)
        if answer.is_whole:
            tally.answers.append((prompt, num_tokens, answer))
        else:
            code = (answer.error or {}).get("code", "")
            tally.failures[code] = tally.failures.get(code, 0) + 1
            await asyncio.sleep(0.2)


async def keep_breaking(up, until_s: float, tally: Tally) -> None:
    chance = random.Random(SEED)
    while time.monotonic() < until_s - 10.0:
        await asyncio.sleep(chance.uniform(0.5, 8.0))
        victim, frozen_s = chance.choice(VICTIMS), chance.uniform(0.1, 3.0)
        is_kill = chance.random() < 0.6
        tally.faults.append(f"{'kill' if is_kill else f'freeze {frozen_s:.1f} s'} {victim}")
        with contextlib.suppress(AssertionError, psutil.NoSuchProcess):  # it is just restarting
            if is_kill:
                up.kill(victim)
                continue
            child = up.child(victim)
            child.suspend()
            await asyncio.sleep(frozen_s)
            child.resume()


async def test_minutes_of_faults_cost_no_token_and_leave_nothing(up, before, monolith):
    tally = Tally()
    until_s = time.monotonic() + DURATION_S
    async with asyncio.TaskGroup() as tasks:
        for user in range(NUM_USERS):
            tasks.create_task(keep_asking(up, user, until_s, tally))
        tasks.create_task(keep_breaking(up, until_s, tally))
    print(f"{len(tally.answers)} answers, failures {tally.failures}, faults {tally.faults}")
    for prompt, num_tokens, answer in tally.answers:
        assert_exact(monolith, prompt, answer, num_tokens)
    assert set(tally.failures) <= ALLOWED, tally.failures
    assert len(tally.answers) > 2 * sum(tally.failures.values())
    await up.settled(60.0)
    await up.settles_at(before, SETTLE_S)
