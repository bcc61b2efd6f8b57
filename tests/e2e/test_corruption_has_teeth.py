"""One wrong KV block changes the text, and checksums never let one through.

Between two requests with the same prefix the test writes into the node's pool. Without verification nearly every text
becomes another one, so that "tokens are exact" means something; with it each fault is found, computed again, and the
text right. Two blocks of one sequence that are swapped change no text (K is stored rotated, and attention has no other
order), but they are found too: what lies under a key must be what was committed under it.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import pytest_asyncio

from snowskin.engines.model.weights import fingerprint
from snowskin.kvstore.blocks import KeyColumn, block_hashes
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.layout import Layout
from snowskin.kvstore.messages import Access
from tests.support.completions import asking
from tests.support.e2e_cluster import BLOCK_SIZE, UNVERIFIED_ENGINE, exact_cluster
from tests.support.one_piece import agreement
from tests.support.pool_tamper import Place, Pool, find, opened_pool
from tests.support.sensitive_model import (
    HEAD_DIM,
    ITEM_NBYTES,
    NUM_KV_HEADS,
    NUM_LAYERS,
    block_nbytes,
    words,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="session")]

SEED = 77_001
NUM_UNVERIFIED = 24  # conversations of each kind
NUM_VERIFIED = 8
MIN_CHANGED_RATIO = 0.95
NUM_TOKENS = 64
BLOCK_NBYTES = block_nbytes(BLOCK_SIZE)
ROW_NBYTES = HEAD_DIM * ITEM_NBYTES


@dataclass(frozen=True)
class Prefilled:
    """A conversation whose prefix is in the cache, and what is asked next."""

    prompt: list[int]
    place: Place

    def read(self, pool: Pool, index: int) -> np.ndarray:
        return pool.read(self.place.offsets[index], BLOCK_NBYTES)

    def write(self, pool: Pool, index: int, block: np.ndarray) -> None:
        assert block.nbytes == BLOCK_NBYTES
        pool.write(self.place.offsets[index], block)


# --- the faults: each gets a block that chance chose, and says which is the first wrong one

Fault = Callable[[Pool, Prefilled, Prefilled, int, random.Random], int]


def zeroed(pool: Pool, mine: Prefilled, other: Prefilled, index: int, chance: random.Random) -> int:
    mine.write(pool, index, np.zeros(BLOCK_NBYTES, np.uint8))
    return index


def anothers(
    pool: Pool, mine: Prefilled, other: Prefilled, index: int, chance: random.Random
) -> int:
    mine.write(pool, index, other.read(pool, index))
    return index


def late_by_a_row(
    pool: Pool, mine: Prefilled, other: Prefilled, index: int, chance: random.Random
) -> int:
    segment = mine.place.segment_of(index)
    begin = mine.place.offsets[segment.start]
    pool.write(begin, pool.read(begin + ROW_NBYTES, len(segment) * BLOCK_NBYTES))
    return segment.start


def k_and_v_exchanged(
    pool: Pool, mine: Prefilled, other: Prefilled, index: int, chance: random.Random
) -> int:
    shape = (NUM_LAYERS, 2, NUM_KV_HEADS * BLOCK_SIZE * ROW_NBYTES)
    kv = mine.read(pool, index).reshape(shape).copy()
    layer = chance.randrange(NUM_LAYERS)
    kv[layer] = kv[layer, ::-1].copy()
    mine.write(pool, index, kv)
    return index


def two_swapped(
    pool: Pool, mine: Prefilled, other: Prefilled, index: int, chance: random.Random
) -> int:
    num_blocks = len(mine.place.offsets)
    second = (index + chance.randrange(1, num_blocks)) % num_blocks
    one, two = mine.read(pool, index), mine.read(pool, second)
    mine.write(pool, index, two)
    mine.write(pool, second, one)
    return min(index, second)


FAULTS = [zeroed, anothers, late_by_a_row, k_and_v_exchanged]


# --- the story: fill the cache, write into the pool, ask again


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def unverified(sensitive_model):
    async with exact_cluster(sensitive_model, engine_module=UNVERIFIED_ENGINE) as running:
        yield running


def namespace_of(model) -> bytes:
    return Layout(
        model=model.name,
        weights_revision=fingerprint(model).hex(),
        dtype="float32",
        byte_order=sys.byteorder,
        block_size=BLOCK_SIZE,
        num_layers=NUM_LAYERS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
    ).namespace


async def prefill(cluster, asker, model, chance, num_conversations, *, may_repeat: bool):
    """Half of the conversations are asked again as they are, half go on; or all go on."""

    async def one(index: int, prefix: list[int], more: list[int]) -> Prefilled:
        await asker.complete(prefix, 1)
        keys = KeyColumn.of(block_hashes(prefix, BLOCK_SIZE))
        place = await find(cluster.nodes[0].door, namespace_of(model), keys)
        is_repeat = may_repeat and index % 2 == 0
        return Prefilled(prefix if is_repeat else prefix + more, place)

    texts = [
        (words(chance, chance.randint(8, 16) * BLOCK_SIZE), words(chance, chance.randint(1, 40)))
        for _ in range(num_conversations)
    ]
    return await asyncio.gather(*(one(index, *each) for index, each in enumerate(texts)))


def spoil(cluster, conversations, fault: Fault, chance: random.Random) -> list[int]:
    """Commits the fault in one block of each; the first wrong block of each."""
    firsts = []
    with opened_pool(cluster.processes["node-0"].pid) as pool:
        for index, mine in enumerate(conversations):
            other = conversations[index - 1]
            common = min(len(mine.place.offsets), len(other.place.offsets))
            firsts.append(fault(pool, mine, other, chance.randrange(common), chance))
    return firsts


async def ask_all(asker, conversations):
    return await asyncio.gather(
        *(asker.complete(each.prompt, NUM_TOKENS) for each in conversations)
    )


@pytest.mark.parametrize("fault", FAULTS)
async def test_without_verification_one_wrong_block_changes_the_text(
    unverified, one_piece, sensitive_model, fault
):
    chance = random.Random(f"{SEED} {fault.__name__}")
    async with asking(unverified.http_address) as asker:
        conversations = await prefill(
            unverified, asker, sensitive_model, chance, NUM_UNVERIFIED, may_repeat=True
        )
        spoil(unverified, conversations, fault, chance)
        answers = await ask_all(asker, conversations)
    expected = one_piece.answers([each.prompt for each in conversations], NUM_TOKENS)
    changed = [
        answer.token_ids != tuple(chosen.token_id for chosen in reference)
        for answer, reference in zip(answers, expected, strict=True)
    ]
    what = f"{fault.__name__}: {sum(changed)} of {len(changed)} texts changed (seed {SEED})"
    print(what)
    assert sum(changed) >= MIN_CHANGED_RATIO * len(changed), what


async def test_without_verification_two_swapped_blocks_change_no_text(
    unverified, one_piece, sensitive_model
):
    chance = random.Random(f"{SEED} swapped")
    async with asking(unverified.http_address) as asker:
        conversations = await prefill(
            unverified, asker, sensitive_model, chance, NUM_VERIFIED, may_repeat=False
        )
        spoil(unverified, conversations, two_swapped, chance)
        answers = await ask_all(asker, conversations)
    expected = one_piece.answers([each.prompt for each in conversations], NUM_TOKENS)
    assert not agreement([each.token_ids for each in answers], expected).wrong


@pytest.mark.parametrize("fault", [*FAULTS, two_swapped])
async def test_with_verification_it_is_found_and_computed_again_and_the_text_is_right(
    cluster, asker, one_piece, sensitive_model, fault
):
    chance = random.Random(f"{SEED} {fault.__name__} verified")
    conversations = await prefill(
        cluster, asker, sensitive_model, chance, NUM_VERIFIED, may_repeat=True
    )
    first_wrong = spoil(cluster, conversations, fault, chance)
    before = await num_corrupt(cluster)
    answers = await ask_all(asker, conversations)

    expected = one_piece.answers([each.prompt for each in conversations], NUM_TOKENS)
    assert not agreement([each.token_ids for each in answers], expected).wrong, f"seed {SEED}"
    for conversation, answer, first in zip(conversations, answers, first_wrong, strict=True):
        found = answer.prefill["num_blocks_corrupt"] + answer.decode["num_blocks_corrupt"]
        assert found >= 1, f"block {first} was wrong and nobody said so (seed {SEED})"
        usable = min(first, (len(conversation.prompt) - 1) // BLOCK_SIZE)
        assert answer.num_cached_tokens == usable * BLOCK_SIZE, "only what lies before is believed"
    assert await num_corrupt(cluster) - before >= len(conversations)

    # What was thrown out has been published again, by whoever computed it.
    again = await ask_all(asker, conversations)
    assert not agreement([each.token_ids for each in again], expected).wrong
    for answer in again:
        assert answer.prefill["num_blocks_corrupt"] + answer.decode["num_blocks_corrupt"] == 0
        assert answer.num_cached_tokens == (answer.num_prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE


async def num_corrupt(cluster) -> int:
    """Blocks that readers found corrupt and the node took out, as the node counts them."""
    client = await StoreClient.connect(
        cluster.nodes[0].door, client_name="observer", access=Access.READ
    )
    async with client:
        return (await client.stat()).counters.get("blocks_corrupt", 0)
