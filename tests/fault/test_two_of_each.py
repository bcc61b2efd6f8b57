"""Two prefill and two decode processes: what one of them leaves unfinished the other one takes over.

What must hold: the tokens are those of an undisturbed answer, greedy and sampled, and came from the other one; what
hangs is ended by `snowskin up` as if it had died; a conductor that is restarted tells streams that it cannot finish
why, and finds every engine again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal

import pytest

from tests.support.engine_bench import prompt_tokens
from tests.support.up_process import FLAGS, SHORT_LEASES, UpProcess, assert_exact, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

LONG, SHORT = 1_610, 300
NUM_TOKENS = 200
HANG_S, DRAIN_S = 2.0, 1.0
REGISTER_S = 4.0
SAMPLED = {"temperature": 1.5, "top_p": 0.95, "seed": 42, "ignore_eos": True}
PAIRS = {"prefill-0": "prefill-1", "prefill-1": "prefill-0"}
PAIRS |= {"decode-0": "decode-1", "decode-1": "decode-0"}


@pytest.fixture(scope="module")
def up(model, tmp_path_factory):
    """Of each two; a hang is noticed within seconds."""
    flags = (*FLAGS, "--hang-s", str(HANG_S), "--drain-s", str(DRAIN_S))
    directory = tmp_path_factory.mktemp("up-two")
    with UpProcess(model, directory, *flags, settings=SHORT_LEASES, num_engines=2) as process:
        yield process
        process.resume_all()


async def placed_on(up: UpProcess, request_id: str, stage: str):
    """The instance that a request under way was given to, as the conductor's log says."""

    def look() -> str:
        asked_for = ("placed", request_id, stage)
        for event in up.events("conductor"):
            if (event["event"], event.get("request_id"), event.get("stage")) == asked_for:
                return str(event["instance"])
        return ""

    return await eventually(look, 10.0, f"{stage} of {request_id} is placed")


async def assert_well(up, monolith, seeds) -> None:
    await up.settled()
    prompt = prompt_tokens(SHORT, next(seeds))
    assert_exact(monolith, prompt, await up.ask(prompt, 20), 20)


# Greedy by night: by day the hanging decode's answer is greedy too, and goes to the other one likewise.
@pytest.mark.parametrize(
    "fields",
    [pytest.param({}, id="greedy", marks=pytest.mark.soak), pytest.param(SAMPLED, id="sampled")],
)
async def test_a_decode_that_dies_is_replaced_by_the_other_one_in_the_middle_of_its_text(
    up, monolith, seeds, fields
):
    await up.settled()
    prompt = prompt_tokens(SHORT, next(seeds))
    undisturbed = await up.ask(prompt, NUM_TOKENS, **fields)
    request_id = f"dies-{len(fields)}"
    async with up.asking(prompt, NUM_TOKENS, request_id=request_id, **fields) as answer:
        victim = await placed_on(up, request_id, "decode")
        await answer.until(lambda answer: len(answer.token_ids) >= 20)
        old_pid = up.kill(victim)
        assert not answer.is_over
        await answer.whole()
    assert answer.token_ids == undisturbed.token_ids
    assert answer.stats["num_decode_retries"] == 1
    assert answer.stats["decode_instance_id"] == PAIRS[victim]
    await up.restarted(victim, old_pid)
    await assert_well(up, monolith, seeds)


async def test_a_prefill_that_dies_is_replaced_by_the_other_one(up, monolith, seeds):
    await up.settled()
    prompt = prompt_tokens(LONG, next(seeds))
    async with up.asking(prompt, 20, request_id="prefill-dies") as answer:
        victim = await placed_on(up, "prefill-dies", "prefill")
        old_pid = up.kill(victim)
        await answer.whole()
    assert_exact(monolith, prompt, answer, 20)
    assert answer.stats["num_prefill_retries"] == 1
    assert answer.stats["prefill_instance_id"] == PAIRS[victim]
    await up.restarted(victim, old_pid)
    await assert_well(up, monolith, seeds)


# A prefill that hangs by night: who ends it knows no roles, and what a prefill that dies leaves is above.
@pytest.mark.parametrize("stage", [pytest.param("prefill", marks=pytest.mark.soak), "decode"])
async def test_an_engine_that_hangs_is_ended_and_its_requests_go_to_the_other_one(
    up, monolith, seeds, stage
):
    await up.settled()
    length = LONG if stage == "prefill" else SHORT
    prompt = prompt_tokens(length, next(seeds))
    request_id = f"hangs-{stage}"
    num_tokens = 20 if stage == "prefill" else NUM_TOKENS
    async with up.asking(prompt, num_tokens, request_id=request_id) as answer:
        victim = await placed_on(up, request_id, stage)
        if stage == "decode":
            await answer.until(lambda answer: len(answer.token_ids) >= 20)
        child = up.child(victim)
        child.suspend()
        assert not answer.is_over
        await answer.whole()
    assert_exact(monolith, prompt, answer, num_tokens)
    assert answer.stats[f"{stage}_instance_id"] == PAIRS[victim]
    await up.restarted(victim, child.pid)
    hung = [event["child"] for event in up.events() if event["event"] == "child hangs"]
    assert hung.count(victim) == 1
    await assert_well(up, monolith, seeds)


# A conductor that is killed is in test_engines_killed.py and in the rounds of test_random_kills.py by day.
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)]
)
async def test_a_conductor_that_is_restarted_finds_every_engine_again(up, monolith, seeds, number):
    await up.settled()
    prompts = [prompt_tokens(SHORT, next(seeds)) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        answers = [await stack.enter_async_context(up.asking(prompt, 1_500)) for prompt in prompts]
        for answer in answers:
            await answer.until(lambda answer: len(answer.token_ids) >= 5)
        conductor = up.child("conductor")
        conductor.send_signal(number)
        for answer in answers:
            await answer.until(lambda answer: answer.is_over)
    for answer in answers:
        assert not answer.is_whole
        if number == signal.SIGTERM:  # who is killed can tell nobody why
            assert answer.error is not None, answer.broke
            assert answer.error["code"] == "conductor_draining"
    await up.restarted("conductor", conductor.pid)
    async with asyncio.timeout(REGISTER_S):
        await up.settled(REGISTER_S)
    await assert_well(up, monolith, seeds)
