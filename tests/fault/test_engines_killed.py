"""Processes of a cluster under `snowskin up` are killed and frozen in the middle of a request.

What must hold each time: the tokens are those of the model in one piece, none twice and none missing, or
the request fails with its reason; what was killed is back within its start-up time; nothing that the dead
one held stays held; the next request is exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.engine_bench import prompt_tokens
from tests.support.up_process import (
    BLOCK_SIZE,
    GRACE_S,
    LEASE_S,
    LOOK_S,
    SETTLE_S,
    Answer,
    Held,
    UpProcess,
    assert_exact,
    eventually,
)

if TYPE_CHECKING:
    from snowskin.kvstore.messages import NodeStat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

RESTART_S = 5.0
REGISTER_S = 2.0
# A chunk or step under way is not cut short, nor is a transfer.
HANG_UP_S = 3.0
# Its prefill takes a second on one core, in 50 chunks: something to be killed in.
LONG, SHORT = 1_610, 300
NUM_TOKENS = 40


async def assert_well(up, monolith, before: Held, seeds) -> None:
    """All is given back, and the next request is exact, as is the one after it, from the cache."""
    await up.settled()
    await up.settles_at(before, SETTLE_S)
    prompt = prompt_tokens(SHORT, next(seeds))
    assert_exact(monolith, prompt, await up.ask(prompt, NUM_TOKENS), NUM_TOKENS)
    again = await up.ask(prompt, NUM_TOKENS)
    assert_exact(monolith, prompt, again, NUM_TOKENS)
    assert again.num_cached_tokens == (SHORT - 1) // BLOCK_SIZE * BLOCK_SIZE


def start_up_s(up: UpProcess, name: str, pid: int) -> float:
    """Seconds from the death before this start to its readiness, less those that it waited for a core."""

    def when(event: dict) -> float:
        return datetime.datetime.fromisoformat(event["time"]).timestamp()

    events = [event for event in up.events() if event.get("child") == name]
    ready = next(e for e in events if e["event"] == "child ready" and e["pid"] == pid)
    died = [e for e in events if e["event"] == "child died" and when(e) < when(ready)][-1]
    waited_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ended; a kernel without this account
            waited_ns += int((task / "schedstat").read_text().split()[1])
    return when(ready) - when(died) - waited_ns / 1e9


async def assert_restarted(up: UpProcess, name: str, old_pid: int) -> None:
    pid = await up.restarted(name, old_pid)
    assert start_up_s(up, name, pid) <= RESTART_S


def is_publishing(stat: NodeStat) -> bool:
    return stat.pools[0].reserved_nbytes > 0


def is_pulling(stat: NodeStat) -> bool:
    return stat.num_read_leases > 0


async def committing(up, num_blocks: int, answer: Answer) -> None:
    """Waits until a request under way has made so many blocks visible."""
    async with up.observing() as node:
        first = (await node.stat()).num_blocks
        while (await node.stat()).num_blocks < first + num_blocks:
            assert not answer.is_over, answer
            await asyncio.sleep(LOOK_S)


async def test_a_prefill_killed_in_the_middle_of_a_publish(up, monolith, before, seeds):
    prompt = prompt_tokens(LONG, next(seeds))
    async with up.asking(prompt, NUM_TOKENS) as answer:
        await committing(up, 10, answer)
        await up.caught("prefill-0", is_publishing, answer)
        assert answer.token_ids == []
        old_pid = up.kill("prefill-0")
        await answer.whole()
    assert_exact(monolith, prompt, answer, NUM_TOKENS)
    assert answer.stats["num_prefill_retries"] == 1
    # What the dead one had committed was not computed again.
    assert answer.num_cached_tokens >= 10 * BLOCK_SIZE
    await assert_restarted(up, "prefill-0", old_pid)
    await assert_well(up, monolith, before, seeds)


async def test_a_decode_killed_in_the_middle_of_a_pull(up, monolith, before, seeds):
    prompt = prompt_tokens(LONG, next(seeds))
    async with up.asking(prompt, NUM_TOKENS) as answer:
        await up.caught("decode-0", is_pulling, answer)
        assert answer.token_ids == []
        old_pid = up.kill("decode-0")
        await answer.whole()
    assert_exact(monolith, prompt, answer, NUM_TOKENS)
    assert answer.stats["num_decode_retries"] == 1
    await assert_restarted(up, "decode-0", old_pid)
    await assert_well(up, monolith, before, seeds)


async def test_a_decode_killed_while_it_generates(up, monolith, before, seeds):
    prompt = prompt_tokens(SHORT, next(seeds))
    num_tokens = 200
    async with up.asking(prompt, num_tokens) as answer:
        await answer.until(lambda answer: len(answer.token_ids) >= 20)
        old_pid = up.kill("decode-0")
        assert not answer.is_over
        await answer.whole()
    assert_exact(monolith, prompt, answer, num_tokens)
    await assert_restarted(up, "decode-0", old_pid)
    await assert_well(up, monolith, before, seeds)


async def test_a_node_killed_while_it_is_written_and_read(up, monolith, before, seeds):
    prompt = prompt_tokens(LONG, next(seeds))
    async with up.asking(prompt, NUM_TOKENS) as answer:
        await committing(up, 10, answer)
        old_pid = up.kill("node-0")
        await answer.whole()
    assert_exact(monolith, prompt, answer, NUM_TOKENS)
    await up.restarted("node-0", old_pid)
    await assert_well(up, monolith, before, seeds)


async def test_a_conductor_killed_while_a_request_runs(up, monolith, before, seeds):
    prompt = prompt_tokens(LONG, next(seeds))
    async with up.asking(prompt, NUM_TOKENS) as answer:
        await committing(up, 10, answer)
        old_pid = up.kill("conductor")
        await answer.until(lambda answer: answer.is_over)
    assert answer.broke
    await up.restarted("conductor", old_pid)
    async with asyncio.timeout(REGISTER_S):
        await up.settled(REGISTER_S)
    await assert_well(up, monolith, before, seeds)


async def test_a_prefill_frozen_for_longer_than_its_lease(up, monolith, before, seeds):
    prompt = prompt_tokens(LONG, next(seeds))
    async with up.asking(prompt, NUM_TOKENS) as answer:
        await committing(up, 10, answer)
        await up.caught("prefill-0", is_publishing, answer)
        async with up.observing() as node:

            async def is_fenced():
                return (await node.stat()).pools[0].quarantined_nbytes > 0

            await eventually(is_fenced, LEASE_S + 2.0, "the frozen writer is fenced")
            # The grace runs out too: its bytes stay out of reach as long as it may write them.
            await asyncio.sleep(GRACE_S + 0.5)
            assert (await node.stat()).pools[0].quarantined_nbytes > 0
        up.child("prefill-0").resume()
        await answer.whole()
    assert_exact(monolith, prompt, answer, NUM_TOKENS)
    assert answer.stats["num_prefill_retries"] == 0
    await assert_well(up, monolith, before, seeds)


# After the first token is the hand-off: by day in tests/integration/test_conductor_leftovers.py.
@pytest.mark.parametrize("num_tokens", [0, pytest.param(1, marks=pytest.mark.soak), 8])
async def test_a_client_that_hangs_up_frees_everything(up, monolith, before, seeds, num_tokens):
    prompt = prompt_tokens(LONG, next(seeds))
    # Nine seconds of decoding, if it were not stopped.
    async with up.asking(prompt, 1_500) as answer:
        await committing(up, 10, answer)
        await answer.until(lambda answer: len(answer.token_ids) >= num_tokens)
        assert not answer.is_over
    await up.settled(HANG_UP_S)
    await assert_well(up, monolith, before, seeds)


@pytest.mark.soak  # by day each by itself is above, and both at once in test_random_kills.py (seed 8)
async def test_requests_under_way_survive_whoever_dies(up, monolith, before, seeds):
    """Four at once; prefill and decode are killed while they are spread over both."""
    num_tokens = 60
    prompts = [prompt_tokens(SHORT + 7 * index, next(seeds)) for index in range(4)]
    async with contextlib.AsyncExitStack() as stack:
        answers = [
            await stack.enter_async_context(up.asking(prompt, num_tokens)) for prompt in prompts
        ]
        await answers[0].until(lambda answer: len(answer.token_ids) >= 5)
        old_pids = {name: up.kill(name) for name in ("prefill-0", "decode-0")}
        await asyncio.gather(*(answer.whole() for answer in answers))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_exact(monolith, prompt, answer, num_tokens)
    for name, old_pid in old_pids.items():
        await up.restarted(name, old_pid)
    await assert_well(up, monolith, before, seeds)
