"""The work of every request is accounted for: tokens, blocks, bytes, and when they moved.

What the test expects it computes itself, from the prompts and the answers. What is claimed of others is asked of a
third: tokens that passed layer 0 of the model (`Engine.Status`), blocks of the node (`Store.Stat`), bytes on TCP of
the kernel.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.messages import Access, NodeStat
from snowskin.kvstore.rpc import open_channel
from snowskin.v1 import engine_pb2, engine_pb2_grpc
from tests.support.completions import Answer, asking
from tests.support.e2e_cluster import BLOCK_SIZE, CHUNK_TOKENS, exact_cluster
from tests.support.one_piece import agreement
from tests.support.sensitive_model import block_nbytes, words
from tests.support.tcp_bytes import is_counted, since, tcp_nbytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="session")]

SEED = 31_337
NUM_TOKENS = 64
BLOCK_NBYTES = block_nbytes(BLOCK_SIZE)
MAX_GRPC_RATIO = 0.02
MAX_RESERVED_NBYTES = 2 * CHUNK_TOKENS // BLOCK_SIZE * BLOCK_NBYTES
LONG_PROMPT_TOKENS = 2_005
SETTLE_S = 10.0
LOOK_S = 0.01


# --- what others say


async def num_tokens_computed(cluster, name: str) -> int:
    """Tokens that passed layer 0 of this engine's model, since it started."""
    async with open_channel(cluster.processes[name].facts.address) as channel:
        status = await engine_pb2_grpc.EngineStub(channel).Status(
            engine_pb2.StatusRequest(), timeout=5.0
        )
    assert status.instance_id == name
    return int(status.load.num_tokens_computed)


@asynccontextmanager
async def observing(cluster):
    """A session with the cluster's node that only looks."""
    client = await StoreClient.connect(
        cluster.nodes[0].door, client_name="observer", access=Access.READ
    )
    async with client:
        yield client


async def quiet_stat(observer: StoreClient) -> NodeStat:
    """The node's account once nobody holds anything there: releases travel without an answer."""
    async with asyncio.timeout(SETTLE_S):
        while True:
            stat = await observer.stat()
            (pool,) = stat.pools
            if not (stat.num_read_leases or stat.num_write_leases or pool.leased_nbytes):
                return stat
            await asyncio.sleep(LOOK_S)


def grpc_ports(cluster) -> set[int]:
    """Ports on which a process of the cluster serves gRPC."""
    return {
        int(process.facts.address.rpartition(":")[2])
        for process in cluster.processes.values()
        if process.state == "ready"
    }


# --- what must be so


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one request should cost, from nothing but lengths.

    Attributes:
        num_tokens: of the prompt.
        num_blocks_before: blocks of the prompt and of what will be answered that are in the store already.
    """

    num_tokens: int
    num_blocks_before: int = 0

    @property
    def num_full_blocks(self) -> int:
        return self.num_tokens // BLOCK_SIZE

    @property
    def num_tails(self) -> int:
        return int(self.num_tokens % BLOCK_SIZE > 0)

    @property
    def num_cached_blocks(self) -> int:
        """One token at least must be computed, or there are no logits."""
        return min(self.num_blocks_before, (self.num_tokens - 1) // BLOCK_SIZE)

    @property
    def num_prefilled_blocks(self) -> int:
        """New ones, of the prompt."""
        return max(0, self.num_full_blocks - self.num_blocks_before)

    @property
    def num_generated_blocks(self) -> int:
        """New ones that end within the answer."""
        return self.num_blocks_after - max(self.num_full_blocks, self.num_blocks_before)

    @property
    def num_blocks_after(self) -> int:
        """The last token of an answer is never computed."""
        return (self.num_tokens + NUM_TOKENS - 1) // BLOCK_SIZE


def check(answer: Answer, work: Work) -> None:
    """The answer's own account, number for number."""
    prefill, decode = answer.prefill, answer.decode
    num_cached_tokens = work.num_cached_blocks * BLOCK_SIZE
    assert answer.num_prompt_tokens == work.num_tokens
    assert answer.num_cached_tokens == num_cached_tokens
    assert prefill["num_cached_tokens"] == num_cached_tokens
    assert prefill["num_computed_tokens"] == work.num_tokens - num_cached_tokens
    assert prefill["num_blocks_pulled"] == work.num_cached_blocks
    assert prefill["pulled_nbytes"] == work.num_cached_blocks * BLOCK_NBYTES
    assert prefill["num_blocks_published"] == work.num_prefilled_blocks
    # A tail travels as its whole block.
    num_pushed = work.num_prefilled_blocks + work.num_tails
    assert prefill["published_nbytes"] == num_pushed * BLOCK_NBYTES
    assert decode["num_blocks_pulled"] == work.num_full_blocks
    assert decode["pulled_nbytes"] == (work.num_full_blocks + work.num_tails) * BLOCK_NBYTES
    assert decode["num_recomputed_tokens"] == 0
    assert decode["num_blocks_published"] == work.num_generated_blocks
    assert decode["published_nbytes"] == work.num_generated_blocks * BLOCK_NBYTES


def check_blocks(before: NodeStat, after: NodeStat, work: Work) -> None:
    """The same as the node counts it: what was committed, what was matched, what stayed."""
    grown = Counter(after.counters)
    grown.subtract(before.counters)
    num_kept = work.num_blocks_after - work.num_blocks_before
    num_matched = work.num_cached_blocks + work.num_full_blocks + work.num_tails
    assert grown["blocks_committed"] == num_kept + work.num_tails
    assert grown["blocks_matched"] == num_matched
    assert after.num_blocks - before.num_blocks == num_kept
    committed = [stat.pools[0].committed_nbytes for stat in (before, after)]
    assert committed[1] - committed[0] == num_kept * BLOCK_NBYTES


# --- tokens, blocks and bytes


async def test_a_prefill_started_after_turn_one_computes_only_what_is_not_cached(
    sensitive_model, one_piece
):
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    prompts, answers = [], []
    async with (
        exact_cluster(sensitive_model, prefill=1, decode=1) as own,
        asking(own.http_address) as asker,
        observing(own) as observer,
    ):

        async def ask(prompt: list[int], *, num_blocks_before: int, by: str) -> Work:
            """Asks, and holds what everybody says of it against what it should be."""
            work = Work(num_tokens=len(prompt), num_blocks_before=num_blocks_before)
            before = await quiet_stat(observer)
            computed = [await num_tokens_computed(own, name) for name in (by, "decode-0")]
            answer = await asker.complete(prompt, NUM_TOKENS)
            assert answer.stats["prefill_instance_id"] == by
            check(answer, work)
            check_blocks(before, await quiet_stat(observer), work)
            computed[0] += len(prompt) - work.num_cached_blocks * BLOCK_SIZE
            computed[1] += NUM_TOKENS - 1
            assert [await num_tokens_computed(own, name) for name in (by, "decode-0")] == computed
            prompts.append(prompt)
            answers.append(answer.token_ids)
            return work

        first = words(chance, 333)
        work = await ask(first, num_blocks_before=0, by="prefill-0")

        await own.start_engine("prefill", name="prefill-late")
        await own.wait_ready(timeout_s=SETTLE_S)
        await own.stop_process("prefill-0")
        assert await num_tokens_computed(own, "prefill-late") == 0

        # The answer is in the store too, but for its last token, which was never computed.
        second = [*first, *answers[0], *words(chance, 77)]
        await ask(second, num_blocks_before=work.num_blocks_after, by="prefill-late")

        # Around the edge of a block, where (n - 1) // B and n // B part; new, and then repeated.
        for num_tokens in (BLOCK_SIZE - 1, 6 * BLOCK_SIZE - 1, 6 * BLOCK_SIZE, 6 * BLOCK_SIZE + 1):
            prompt = words(chance, num_tokens)
            work = await ask(prompt, num_blocks_before=0, by="prefill-late")
            await ask(prompt, num_blocks_before=work.num_blocks_after, by="prefill-late")
    agreed = agreement(answers, one_piece.answers(prompts, NUM_TOKENS))
    assert not agreed.wrong, agreed.wrong


@pytest.mark.skipif(not is_counted(), reason="this kernel counts no TCP bytes (no tcp_diag)")
@pytest.mark.parametrize("num_tokens", [1_000, 1_777])
async def test_bytes_over_grpc_are_below_two_percent_of_the_kv_bytes(cluster, asker, num_tokens):
    prompt = words(random.Random(f"{SEED} {num_tokens}"), num_tokens)
    ports = grpc_ports(cluster)
    assert len(ports) == 6, "node, conductor, two prefill and two decode engines"
    # Counted high and low: requests and answers, reports and probes, both directions; and of the KV bytes only
    # those of one way.
    kv_nbytes = num_tokens * BLOCK_NBYTES // BLOCK_SIZE
    for _ in range(2):
        before = tcp_nbytes(ports)
        answer = await asker.complete(prompt, NUM_TOKENS)
        grpc_nbytes = since(before, tcp_nbytes(ports))
        ratio = grpc_nbytes / kv_nbytes
        print(f"{num_tokens} tokens: {grpc_nbytes} bytes by gRPC, {ratio:.2%} of {kv_nbytes}")
        assert answer.decode["pulled_nbytes"] >= kv_nbytes
        assert grpc_nbytes > 2 * 4 * num_tokens, "both stages got the token ids, by what is counted"
        assert ratio < MAX_GRPC_RATIO


# --- when


@dataclass(frozen=True)
class Sample:
    """The node at one moment."""

    at_s: float
    reserved_nbytes: int
    num_committed: int
    num_matched: int


async def sample_until(observer: StoreClient, done: asyncio.Task) -> list[Sample]:
    """As often as the node answers."""
    samples = []
    while not done.done():
        stat = await observer.stat()
        samples.append(
            Sample(
                time.monotonic(),
                stat.pools[0].reserved_nbytes,
                stat.counters.get("blocks_committed", 0),
                stat.counters.get("blocks_matched", 0),
            )
        )
    return samples


async def test_a_long_prompt_moves_while_it_is_computed_and_reserves_no_more_than_two_chunks(
    cluster, asker
):
    prompt = words(random.Random(f"{SEED} long"), LONG_PROMPT_TOKENS)
    num_blocks = LONG_PROMPT_TOKENS // BLOCK_SIZE
    async with observing(cluster) as observer:
        before = await quiet_stat(observer)
        task = asyncio.create_task(asker.complete(prompt, 2))
        samples = await sample_until(observer, task)
    answer = task.result()
    num_committed = before.counters.get("blocks_committed", 0)
    num_matched = before.counters.get("blocks_matched", 0)

    reserved = [each.reserved_nbytes for each in samples]
    print(f"{len(samples)} samples, at most {max(reserved)} bytes reserved")
    assert max(reserved) > 0, "no sample saw a chunk under way"
    assert max(reserved) <= MAX_RESERVED_NBYTES

    # Nothing of this prompt was cached, so what is matched is matched by decode.
    assert answer.num_cached_tokens == 0
    first = next(each for each in samples if each.num_matched > num_matched)
    assert first.num_committed - num_committed < num_blocks / 2
    assert samples[-1].num_committed - num_committed == num_blocks + 1  # and the tail
    # The engines say the same: prefill was still computing.
    assert 0.0 < answer.decode["first_byte_s"] < answer.prefill["compute_s"]
    assert answer.decode["first_byte_s"] < answer.decode["handoff_s"]


# --- without a trace, and by chance


async def test_a_request_with_the_cache_off_leaves_no_trace_and_finds_none(
    cluster, asker, one_piece
):
    chance = random.Random(f"{SEED} off")
    cached = words(chance, 20 * BLOCK_SIZE + 5)
    await asker.complete(cached, NUM_TOKENS)
    prompts = [cached, words(chance, 12 * BLOCK_SIZE), words(chance, 150), words(chance, 9)]
    async with observing(cluster) as observer:
        before = await quiet_stat(observer)
        answers = []
        for prompt in prompts:
            answer = await asker.complete(prompt, NUM_TOKENS, use_cache=False)
            answers.append(answer.token_ids)
            assert answer.num_cached_tokens == 0
            assert answer.prefill["num_computed_tokens"] == len(prompt)
            # It went through the store all the same.
            assert answer.decode["num_blocks_pulled"] == len(prompt) // BLOCK_SIZE
            assert answer.decode["num_recomputed_tokens"] == 0
            assert answer.decode["num_blocks_published"] == 0
        after = await quiet_stat(observer)
    assert after.num_blocks == before.num_blocks
    assert after.pools == before.pools
    assert not agreement(answers, one_piece.answers(prompts, NUM_TOKENS)).wrong
