"""Sampled output: reproducible, and what the model in one piece draws, but where the draw lies next to an edge.

A draw depends on the seed, the position and the logits. Logits of a cluster differ from those of one piece by rounding,
so a token may differ where so little would change it: within 1e-3 of an edge of the distribution. Such places are
counted, in the reference and in the answers, and are few.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import pytest

from snowskin.engines.model.sampler import SamplingParams
from tests.support.one_piece import agreement
from tests.support.sensitive_model import words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="session")]

SEED = 20250121
NUM_TOKENS = 64
NUM_EACH = 6
# From nearly greedy to so hot that the first token, which prefill draws, is often not the likeliest.
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 1.0},
    {"temperature": 2.0, "top_p": 1.0, "top_k": 3},
    {"temperature": 2.0, "top_p": 0.8, "top_k": 40},
]
MAX_UNDECIDED = 0.02  # of the reference's draws
MAX_ROUNDING = 1e-3  # of the tokens compared


async def test_sampled_answers_are_reproducible_and_those_of_the_model_in_one_piece(
    asker, one_piece
):
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    samplings = [
        SamplingParams(**way, seed=chance.getrandbits(64)) for way in WAYS for _ in range(NUM_EACH)
    ]
    prompts = [words(chance, chance.randint(1, 200)) for _ in samplings]

    async def ask(*, use_cache: bool, is_streamed: bool) -> list[tuple[int, ...]]:
        requests = [
            asker.complete(
                prompt,
                NUM_TOKENS,
                use_cache=use_cache,
                is_streamed=is_streamed,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
            )
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        return [answer.token_ids for answer in await asyncio.gather(*requests)]

    expected = one_piece.answers(prompts, NUM_TOKENS, samplings)
    draws = list(itertools.chain.from_iterable(expected))
    num_undecided = sum(draw.is_undecided for draw in draws)
    num_tokens = num_rounding = 0
    # Computed, from the cache, and without it.
    for use_cache, is_streamed in ((True, False), (True, True), (False, False)):
        agreed = agreement(await ask(use_cache=use_cache, is_streamed=is_streamed), expected)
        assert not agreed.wrong, agreed.wrong
        num_tokens += agreed.num_tokens
        num_rounding += agreed.num_rounding
    print(
        f"{num_tokens} tokens compared, {num_rounding} differ; "
        f"{num_undecided} of {len(draws)} draws lie next to an edge"
    )
    assert num_rounding <= MAX_ROUNDING * num_tokens
    assert num_undecided <= MAX_UNDECIDED * len(draws)
    # Chance had something to say everywhere: in the first tokens, and in every way of drawing.
    drawn = [[chosen.token_id for chosen in answer] for answer in expected]
    greedy = one_piece.answers(prompts, NUM_TOKENS)
    first_differs = [one[0] != other[0].token_id for one, other in zip(drawn, greedy, strict=True)]
    assert sum(first_differs) >= 3
    for at in range(0, len(samplings), NUM_EACH):
        some = slice(at, at + NUM_EACH)
        assert agreement(drawn[some], greedy[some]).wrong, WAYS[at // NUM_EACH]


async def test_a_seed_that_is_not_given_is_another_one_each_time(asker):
    chance = random.Random(SEED + 1)
    prompt = words(chance, 100)
    answers = [await asker.complete(prompt, 32, temperature=2.0) for _ in range(3)]
    assert len({answer.token_ids for answer in answers}) == 3
