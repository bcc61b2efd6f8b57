"""Any process, at any moment, killed or frozen, with requests under way: rounds that follow from their seeds.

What must hold in each round: a request that somebody could still compute is answered, and every token is the
model's own; within lease and grace (counted from the end of the fault, for a frozen process from SIGCONT)
nothing is leased, reserved or in quarantine any more; then descriptors, memory files and processes are what
they were, and the next request is exact.

    pytest "tests/fault/test_random_kills.py::test_a_round[17]" -s      # one round again
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import asdict, dataclass

import psutil
import pytest

from snowskin.transport.errors import SnowskinError
from tests.support.engine_bench import prompt_tokens
from tests.support.results import write_result
from tests.support.up_process import (
    BLOCK_SIZE,
    FLAGS,
    GRACE_S,
    LEASE_S,
    SETTLE_S,
    SHORT_LEASES,
    Answer,
    Held,
    UpProcess,
    assert_exact,
    eventually,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

NUM_SHORT, NUM_LONG = 10, 100
# Beyond lease and grace: what a busy machine takes to look.
LOOK_MARGIN_S = 1.0
RESTART_S = 30.0
ROUNDS = [
    *(pytest.param(seed, id=str(seed)) for seed in range(NUM_SHORT)),
    *(
        pytest.param(seed, id=str(seed), marks=pytest.mark.soak)
        for seed in range(NUM_SHORT, NUM_LONG)
    ),
]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of a round."""

    prompt: list[int]
    num_tokens: int
    use_cache: bool
    hangs_up: bool


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What befalls one process."""

    victim: str
    after_s: float
    frozen_s: float  # 0: killed

    def __str__(self) -> str:
        act = f"frozen for {self.frozen_s:.2f} s" if self.frozen_s else "killed"
        return f"{self.victim} {act} after {self.after_s:.2f} s"


@dataclass(frozen=True, kw_only=True)
class Round:
    """All that chance decides; the same for the same seed."""

    asked: list[Asked]
    faults: list[Fault]

    def __str__(self) -> str:
        return f"{len(self.asked)} requests, {', '.join(map(str, self.faults))}"


def draw(seed: int, names: list[str]) -> Round:
    """Half of the prompts begin with one of a few prefixes, so that there is something in the cache."""
    chance = random.Random(seed)
    asked = []
    for number in range(chance.randint(2, 5)):
        shared = prompt_tokens(BLOCK_SIZE * chance.randint(4, 60), 70_000 + chance.randint(0, 3))
        own = prompt_tokens(chance.randint(1, 400), 1_000 * seed + number)
        asked.append(
            Asked(
                prompt=[*shared, *own] if chance.random() < 0.5 else own,
                num_tokens=chance.randint(1, 50),
                use_cache=chance.random() < 0.8,
                hangs_up=chance.random() < 0.1,
            )
        )
    faults = [
        Fault(
            victim=victim,
            after_s=chance.uniform(0.0, 1.0),
            frozen_s=chance.choice([0.0, chance.uniform(0.1, 3.0)]),
        )
        for victim in chance.sample(names, chance.choice([1, 1, 2]))
    ]
    return Round(asked=asked, faults=faults)


@pytest.fixture(scope="module")
def wide(model, tmp_path_factory):
    """Two nodes, and two engines of each kind."""
    with UpProcess(
        model,
        tmp_path_factory.mktemp("wide"),
        *FLAGS,
        settings=SHORT_LEASES,
        num_nodes=2,
        num_engines=2,
    ) as process:
        yield process


@pytest.fixture(scope="module")
def baseline(wide):
    """What it holds when nobody asks; every connection that will be is made."""

    async def warm() -> Held:
        await wide.settled()
        await asyncio.gather(*(wide.ask(prompt_tokens(300, 90 + seed), 8) for seed in range(8)))
        held: Held = await wide.settled()
        return held

    return asyncio.run(warm())


@dataclass(kw_only=True)
class Tally:
    """What became of all rounds."""

    num_rounds: int = 0
    num_kills: int = 0
    num_freezes: int = 0
    num_requests: int = 0
    num_exact: int = 0
    num_hung_up: int = 0
    num_broken_with_the_conductor: int = 0
    num_tokens: int = 0
    longest_until_clean_s: float = 0.0

    def count(self, asked: Asked, answer: Answer) -> None:
        self.num_requests += 1
        if answer.is_whole:
            self.num_exact += 1
            self.num_tokens += len(answer.token_ids)
        elif asked.hangs_up:
            self.num_hung_up += 1
        else:
            self.num_broken_with_the_conductor += 1


@pytest.fixture(scope="module")
def tally():
    """Written down where this is a nightly run of all rounds."""
    counts = Tally()
    yield counts
    if counts.num_rounds >= NUM_LONG:
        write_result("random_kills", **asdict(counts))


async def ask(up: UpProcess, asked: Asked) -> Answer:
    """One request to its end, whatever that is."""
    async with up.asking(asked.prompt, asked.num_tokens, use_cache=asked.use_cache) as answer:
        if asked.hangs_up:
            await answer.until(lambda answer: answer.is_over or len(answer.token_ids) > 3)
        else:
            await answer.until(lambda answer: answer.is_over)
    return answer


async def strike(up: UpProcess, fault: Fault) -> None:
    """Returns when the fault is over: the process is dead, or goes on."""
    await asyncio.sleep(fault.after_s)  # the moment is what the seed decides
    if not fault.frozen_s:
        up.kill(fault.victim)
        return
    child = up.child(fault.victim)
    child.suspend()
    try:
        await asyncio.sleep(fault.frozen_s)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # its supervisor did not wait for it
            child.resume()


async def books_are_clean(up: UpProcess) -> bool:
    """Nothing leased, reserved or in quarantine on any node that answers; a dead one holds nothing."""
    for index in range(len(up.node_addresses)):
        with contextlib.suppress(SnowskinError):
            async with up.observing(index) as node:
                stat = await node.stat()
            pools = stat.pools
            if stat.num_read_leases or stat.num_write_leases:
                return False
            if any(p.leased_nbytes or p.reserved_nbytes or p.quarantined_nbytes for p in pools):
                return False
    return True


@pytest.mark.parametrize("seed", ROUNDS)
async def test_a_round(wide, baseline, monolith, tally, seed):
    chosen = draw(seed, wide.names)
    print(f"seed {seed}: {chosen}")
    old_pids = {fault.victim: wide.child(fault.victim).pid for fault in chosen.faults}
    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(ask(wide, asked)) for asked in chosen.asked]
        for fault in chosen.faults:
            tasks.create_task(strike(wide, fault))
    answers = [task.result() for task in asking]
    began_s = time.monotonic()
    await eventually(
        lambda: books_are_clean(wide), LEASE_S + GRACE_S + LOOK_MARGIN_S, "the books are clean"
    )
    clean_s = time.monotonic() - began_s
    print(f"clean after {clean_s:.2f} s")
    # A conductor that dies takes its users' connections along, and nothing else does.
    killed = [fault.victim for fault in chosen.faults if not fault.frozen_s]
    may_break = "conductor" in killed
    for asked, answer in zip(chosen.asked, answers, strict=True):
        if answer.is_whole:
            assert_exact(monolith, asked.prompt, answer, asked.num_tokens)
        elif not asked.hangs_up:
            assert may_break, (answer.status, answer.error, answer.broke)
            assert answer.broke, answer.error
        tally.count(asked, answer)
    for victim in killed:
        await wide.restarted(victim, old_pids[victim], RESTART_S)
    await wide.settled()
    num_meetings = len(wide.engines) * (len(wide.node_addresses) - 1)
    await wide.settles_at(baseline, SETTLE_S, num_meetings=num_meetings)
    asked = chosen.asked[0]
    for use_cache in (True, False):
        answer = await wide.ask(asked.prompt, asked.num_tokens, use_cache=use_cache)
        assert_exact(monolith, asked.prompt, answer, asked.num_tokens)
    tally.num_rounds += 1
    tally.num_kills += len(killed)
    tally.num_freezes += len(chosen.faults) - len(killed)
    tally.longest_until_clean_s = max(tally.longest_until_clean_s, round(clean_s, 2))


async def test_every_byte_comes_back(wide, baseline):
    """After all rounds: what is evicted is free, so nothing lies there that nobody knows of."""
    await wide.settled()
    await wide.evict_all()
    for index in range(len(wide.node_addresses)):
        async with wide.observing(index) as node:
            (pool,) = (await node.stat()).pools
        assert pool.free_nbytes == pool.capacity_nbytes
