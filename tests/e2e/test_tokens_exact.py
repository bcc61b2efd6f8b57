"""Tokens are exact: what two prefill and two decode processes answer is what the model in one piece answers.

Conversations share prefixes, run at once, are as long as a block or a chunk and one token more or less, and go on for
a second turn that finds the first in the cache. That the model would show one wrong block is measured in
`test_corruption_has_teeth.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass, field

import pytest

from snowskin.engines.model.tokenizer import Tokenizer
from tests.support.completions import asking
from tests.support.e2e_cluster import BLOCK_SIZE, CHUNK_TOKENS, MAX_AT_ONCE
from tests.support.one_piece import agreement
from tests.support.sensitive_model import words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="session")]

SEED = 20250117
NUM_FAMILIES = 10
NUM_CONVERSATIONS = 80
NUM_CHATS = 8
NUM_ON_TWO_NODES = 24
NUM_TOKENS = 64
MAX_ROUNDING = 1 / 10_000  # of the tokens
EDGES = (-1, 0, 1)


@dataclass
class Conversation:
    """A prompt, how long the second one is, and the answers to both."""

    prompt: list[int]
    next_length: int
    more: list[int]
    answers: list[tuple[int, ...]] = field(default_factory=list)
    stats: list = field(default_factory=list)

    def second_prompt(self) -> list[int]:
        text = [*self.prompt, *self.answers[0], *self.more]
        return text[: self.next_length]


def lengths_at_edges(chance: random.Random) -> list[int]:
    """Around every small number of blocks, around chunks' edges, around both of some larger ones."""
    blocks = [chance.randint(4, 28) * BLOCK_SIZE for _ in range(6)]
    edges = [BLOCK_SIZE, 2 * BLOCK_SIZE, 3 * BLOCK_SIZE, *blocks]
    edges += [num_chunks * CHUNK_TOKENS for num_chunks in (1, 2, 3, 5, 6, 7)]
    lengths = [edge + offset for edge in edges for offset in EDGES]
    return [1, 2, *lengths, *(chance.randint(40, 460) for _ in range(33))]


def make_conversations(chance: random.Random) -> list[Conversation]:
    """Each begins with a part of its family's text, cut at any token or at a block."""
    families = [words(chance, 480) for _ in range(NUM_FAMILIES)]
    found = []
    for index, length in enumerate(lengths_at_edges(chance)[:NUM_CONVERSATIONS]):
        num_shared = chance.randint(0, length)
        if index % 2:
            num_shared -= num_shared % BLOCK_SIZE
        prompt = chance.choice(families)[:num_shared]
        prompt += words(chance, length - len(prompt))
        # The second prompt ends at an edge too, counted in blocks or in chunks of what is not cached.
        shortest = length + NUM_TOKENS + 1
        edge = (BLOCK_SIZE, CHUNK_TOKENS)[index % 2]
        next_length = -(-shortest // edge) * edge + edge + EDGES[index % 3]
        found.append(Conversation(prompt, next_length, words(chance, 2 * CHUNK_TOKENS + 1)))
    return found


async def hold(conversation: Conversation, asker, gate, *, is_streamed: bool) -> None:
    for _ in range(2):
        prompt = conversation.second_prompt() if conversation.answers else conversation.prompt
        async with gate:
            answer = await asker.complete(prompt, NUM_TOKENS, is_streamed=is_streamed)
        assert answer.num_prompt_tokens == len(prompt)
        conversation.answers.append(answer.token_ids)
        conversation.stats.append(answer.stats)


def judge(agreed) -> None:
    print(f"{agreed.num_tokens} tokens compared, {agreed.num_rounding} differ by rounding")
    assert not agreed.wrong, agreed.wrong[:10]
    assert agreed.num_rounding <= MAX_ROUNDING * agreed.num_tokens


async def answers_are_those_of_the_model_in_one_piece(
    conversations: list[Conversation], asker, one_piece, chance: random.Random
) -> None:
    in_any_order = chance.sample(conversations, len(conversations))
    gate = asyncio.Semaphore(MAX_AT_ONCE)
    async with asyncio.TaskGroup() as tasks:
        for index, each in enumerate(in_any_order):
            tasks.create_task(hold(each, asker, gate, is_streamed=index % 2 == 0))

    answers = list(itertools.chain.from_iterable(each.answers for each in conversations))
    prompts = [prompt for each in conversations for prompt in (each.prompt, each.second_prompt())]
    judge(agreement(answers, one_piece.answers(prompts, NUM_TOKENS)))

    stats = list(itertools.chain.from_iterable(each.stats for each in conversations))
    pairs = {(each["prefill_instance_id"], each["decode_instance_id"]) for each in stats}
    assert len(pairs) == 4, "every prefill instance handed off to every decode instance"
    assert any(each.stats[0]["num_cached_tokens"] for each in conversations), "shared prefixes"
    # The KV itself was handed over; nothing was quietly computed a second time.
    assert sum(each["decode"]["num_recomputed_tokens"] for each in stats) == 0
    assert sum(each["num_prefill_retries"] + each["num_decode_retries"] for each in stats) == 0


async def test_two_prefill_and_two_decode_processes_answer_as_the_model_in_one_piece(
    asker, one_piece
):
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    conversations = make_conversations(chance)
    assert len(conversations) == NUM_CONVERSATIONS
    await answers_are_those_of_the_model_in_one_piece(conversations, asker, one_piece, chance)
    assert all(each.stats[1]["num_cached_tokens"] for each in conversations), "first turns"


async def test_so_do_they_where_half_of_the_hand_offs_go_from_node_to_node(two_nodes, one_piece):
    chance = random.Random(SEED + 2)
    print(f"seed {SEED + 2}")
    conversations = chance.sample(make_conversations(chance), NUM_ON_TWO_NODES)
    async with asking(two_nodes.http_address) as asker:
        await answers_are_those_of_the_model_in_one_piece(conversations, asker, one_piece, chance)


async def test_chats_of_two_turns_answer_as_the_model_in_one_piece(
    asker, one_piece, sensitive_model
):
    chance = random.Random(SEED + 1)
    print(f"seed {SEED + 1}")
    tokenizer = Tokenizer(sensitive_model)
    system = {"role": "system", "content": bytes(words(chance, 130)).decode()}
    prompts, answers = [], []

    async def chat(index: int) -> None:
        messages = [system]
        for length in (chance.randint(1, 200), chance.randint(1, 40)):
            messages.append({"role": "user", "content": bytes(words(chance, length)).decode()})
            answer = await asker.chat(messages, NUM_TOKENS, is_streamed=index % 2 == 0)
            prompts.append(tokenizer.encode_chat(messages))
            answers.append(answer.token_ids)
            messages.append({"role": "assistant", "content": answer.text})
            assert answer.num_prompt_tokens == len(prompts[-1])

    async with asyncio.TaskGroup() as tasks:
        for index in range(NUM_CHATS):
            tasks.create_task(chat(index))
    judge(agreement(answers, one_piece.answers(prompts, NUM_TOKENS)))
