"""A pool of a quarter of what its users want in it, thirty-two conversations at once, for as long as it takes.

What must hold at every moment: each byte of the pool is free, committed, reserved or quarantined; what a
reader has leased stays, byte for byte; nobody's request fails; every token is the model's own. And the
cache is of use all the while, whoever asks what is in it, and however often.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.client.blocking import BlockingStoreClient
from snowskin.v1 import common_pb2, store_pb2, store_pb2_grpc
from tests.support.engine_bench import prompt_tokens
from tests.support.one_piece import OnePiece
from tests.support.results import write_result
from tests.support.up_process import (
    BLOCK_SIZE,
    LOOK_S,
    REQUEST_S,
    SETTLE_S,
    SHORT_LEASES,
    UpProcess,
)

pytestmark = [pytest.mark.slow]

NUM_USERS = 32
# Each conversation begins with the same instructions and grows turn by turn; then its user begins another one.
INSTRUCTIONS = prompt_tokens(8 * BLOCK_SIZE, 424_242)
FIRST_TOKENS, TURN_TOKENS, ANSWER_TOKENS, MOST_TOKENS = 160, 48, 12, 640
BLOCK_NBYTES = 144 << 10  # of the model in conftest.py
WORKING_SET_NBYTES = NUM_USERS * (MOST_TOKENS // BLOCK_SIZE) * BLOCK_NBYTES
POOL_NBYTES = WORKING_SET_NBYTES // 4
HELD, PROBED = b"h" * 32, b"p" * 32
NUM_HELD = 8
LOOK_UPS_PER_READ, KEYS_PER_PROBE = 100, 1_000
SEED = 2_026
SHORT_S, LONG_S = 45.0, 180.0
SHORT_FORM = pytest.param(SHORT_S, marks=pytest.mark.timeout(150), id="short")
LONG_FORM = pytest.param(
    LONG_S, marks=[pytest.mark.soak, pytest.mark.timeout(600)], id="three-minutes"
)


@pytest.fixture(scope="module")
def crowded(model, tmp_path_factory):
    """Two prefill and two decode engines over one small pool."""
    flags = (
        *("--dram-nbytes", str(POOL_NBYTES), "--kv-memory-nbytes", "256MiB", "--threads", "1"),
        *("--block-size", str(BLOCK_SIZE), "--chunk-tokens", str(4 * BLOCK_SIZE)),
    )
    directory = tmp_path_factory.mktemp("crowded")
    with UpProcess(model, directory, *flags, settings=SHORT_LEASES, num_engines=2) as process:
        yield process


@dataclass
class Conversation:
    """All of its tokens, and which of them the cluster generated."""

    token_ids: list[int]
    generated: list[range] = field(default_factory=list)


@dataclass
class Tally:
    """What came of it all."""

    conversations: list[Conversation] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_turns: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_samples: int = 0
    num_looked_up: int = 0
    were_probed_blocks_evicted: bool = False


async def talk(up: UpProcess, user: int, until_s: float, tally: Tally) -> None:
    """Conversation after conversation, without a pause."""
    chance = random.Random(SEED + user)
    for number in itertools.count():
        first = prompt_tokens(FIRST_TOKENS + user, 1_000 * user + number)
        conversation = Conversation([*INSTRUCTIONS, *first])
        tally.conversations.append(conversation)
        while len(conversation.token_ids) + TURN_TOKENS + ANSWER_TOKENS < MOST_TOKENS:
            if time.monotonic() > until_s:
                return
            async with up.asking(list(conversation.token_ids), ANSWER_TOKENS) as answer:
                with contextlib.suppress(TimeoutError):
                    await answer.until(lambda answer: answer.is_over)
            if not answer.is_whole:
                tally.failures.append(f"HTTP {answer.status}: {answer.error or answer.broke}")
                return
            tally.num_turns += 1
            tally.num_cached_tokens += answer.num_cached_tokens
            tally.num_prompt_tokens += len(conversation.token_ids)
            start = len(conversation.token_ids)
            conversation.token_ids += answer.token_ids
            conversation.generated.append(range(start, len(conversation.token_ids)))
            conversation.token_ids += prompt_tokens(
                chance.randint(1, TURN_TOKENS), chance.getrandbits(20)
            )


async def watch_the_books(up: UpProcess, tally: Tally) -> None:
    """Every byte of the pool is in one of four states, at every look."""
    async with up.observing() as node:
        while True:
            (pool,) = (await node.stat()).pools
            accounted = (
                pool.free_nbytes
                + pool.committed_nbytes
                + pool.reserved_nbytes
                + pool.quarantined_nbytes
            )
            assert accounted == pool.capacity_nbytes, pool
            assert pool.leased_nbytes <= pool.committed_nbytes, pool
            tally.num_samples += 1
            await asyncio.sleep(LOOK_S)


async def probe_without_end(up: UpProcess, tally: Tally) -> None:
    """Looks blocks up, ours that nobody reads first, a hundred times as often as all readers together."""
    chance = random.Random(SEED)
    ours = await asyncio.to_thread(publish, up, namespace=PROBED, num_blocks=4, seed=8)
    others = chance.randbytes(32 * (KEYS_PER_PROBE - len(ours)))
    keys = KeyColumn(packed=ours.packed + others, width=32)
    async with up.observing() as node:
        while True:
            num_read = (await node.stat()).counters.get("blocks_matched", 0)
            while tally.num_looked_up <= LOOK_UPS_PER_READ * num_read:
                probed = await node.probe(namespaces=[PROBED], keys=keys)
                tally.num_looked_up += len(keys)
                tally.were_probed_blocks_evicted = probed.num_blocks == 0
            await asyncio.sleep(LOOK_S)


def publish(up: UpProcess, *, namespace: bytes, num_blocks: int, seed: int) -> KeyColumn:
    """Blocks of random bytes; the same for the same seed. Blocks: for a thread."""
    keys = KeyColumn(packed=random.Random(seed).randbytes(32 * num_blocks), width=32)
    data = np.frombuffer(random_bytes(num_blocks, seed), np.uint8).copy()
    with BlockingStoreClient.connect(
        up.node_addresses[0], client_name="publisher", call_timeout_s=REQUEST_S
    ) as client:
        client.publish(
            namespace=namespace,
            keys=keys,
            block_nbytes=BLOCK_NBYTES,
            local=client.register(data),
            local_offsets=range(0, data.nbytes, BLOCK_NBYTES),
            timeout_s=REQUEST_S,
        )
    return keys


def random_bytes(num_blocks: int, seed: int) -> bytes:
    return random.Random(-seed).randbytes(num_blocks * BLOCK_NBYTES)


@contextlib.asynccontextmanager
async def holding(up: UpProcess):
    """Eight blocks under read leases that are prolonged all the while; their bytes are compared at each lease's end."""
    # A thread: the loop of 32 users may stand still for longer than a lease.
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="holder")
    is_over = threading.Event()
    began_s = time.monotonic()
    held = asyncio.get_running_loop().run_in_executor(thread, hold, up, is_over)
    try:
        yield
        is_over.set()
        held_s = await held
        print(f"held {NUM_HELD} blocks for {held_s:.1f} s")
        assert held_s > (time.monotonic() - began_s) / 2
    finally:
        is_over.set()
        thread.shutdown()


def hold(up: UpProcess, is_over: threading.Event) -> float:
    """Lease after lease until `is_over`; the seconds in which blocks were held."""
    held_s = 0.0
    with grpc.insecure_channel(up.node_addresses[0]) as channel:
        store = store_pb2_grpc.StoreStub(channel)
        for seed in itertools.count(1_000):
            keys = publish(up, namespace=HELD, num_blocks=NUM_HELD, seed=seed)
            held_s += hold_once(store, keys, random_bytes(NUM_HELD, seed), is_over)
            if is_over.is_set():
                return held_s
    raise AssertionError("unreachable")


def hold_once(store, keys: KeyColumn, data: bytes, is_over: threading.Event) -> float:
    """One lease, until `is_over`, or until this thread came too late to prolong it; how long it was held."""
    column = common_pb2.KeyColumn(packed=keys.packed, width=keys.width)
    began_s = asked_at_s = time.monotonic()
    matched = store.Match(store_pb2.MatchRequest(namespaces=[HELD], keys=column), timeout=REQUEST_S)
    ref = common_pb2.LeaseRef(id=matched.lease.id, capability=matched.lease.capability)
    ttl_s = matched.lease.ttl_ms / 1e3
    if matched.num_blocks < NUM_HELD:  # some went before they were matched
        store.Release(store_pb2.ReleaseRequest(leases=[ref]), timeout=REQUEST_S)
        return 0.0
    while not is_over.wait(ttl_s / 5):
        before_s, asked_at_s = asked_at_s, time.monotonic()
        renewed = store.Renew(store_pb2.RenewRequest(leases=[ref]), timeout=REQUEST_S)
        if not renewed.ttl_ms[0]:
            late_s = time.monotonic() - before_s
            assert late_s > ttl_s, f"a lease of {ttl_s} s was gone after {late_s:.2f} s"
            return before_s - began_s
    chunks = store.Read(store_pb2.ReadRequest(lease=ref), timeout=REQUEST_S)
    assert b"".join(chunk.data for chunk in chunks) == data
    store.Release(store_pb2.ReleaseRequest(leases=[ref]), timeout=REQUEST_S)
    return time.monotonic() - began_s


@pytest.mark.parametrize("duration_s", [SHORT_FORM, LONG_FORM])
async def test_a_crowd_in_a_small_pool_gets_every_token_right(crowded, model, duration_s):
    await crowded.settled()
    # Every connection that will be is made: to each engine.
    await asyncio.gather(*(crowded.ask(prompt_tokens(300, seed), 8) for seed in range(8)))
    before = await crowded.settled()
    tally = Tally()
    until_s = time.monotonic() + duration_s
    async with holding(crowded):
        looking = [
            asyncio.create_task(watch_the_books(crowded, tally)),
            asyncio.create_task(probe_without_end(crowded, tally)),
        ]
        await asyncio.gather(*(talk(crowded, user, until_s, tally) for user in range(NUM_USERS)))
        for task in looking:
            task.cancel()
        for outcome in await asyncio.gather(*looking, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError), outcome
    async with crowded.observing() as node:
        counters = (await node.stat()).counters
    print(f"{tally.num_turns} turns, {tally.num_cached_tokens} cached tokens, {counters}")
    assert tally.failures == []
    assert tally.num_turns > 2 * NUM_USERS
    assert tally.num_cached_tokens > 0
    assert counters["blocks_evicted"] > 0
    assert tally.num_looked_up >= LOOK_UPS_PER_READ * counters["blocks_matched"]
    assert tally.were_probed_blocks_evicted
    assert tally.num_samples > duration_s
    spoken = [(each.token_ids, each.generated) for each in tally.conversations if each.generated]
    agreement = OnePiece(model).follow(spoken)
    assert agreement.num_tokens == ANSWER_TOKENS * tally.num_turns
    assert agreement.wrong == ()
    assert agreement.num_rounding <= agreement.num_tokens // 1_000
    await crowded.settles_at(before, SETTLE_S)
    if duration_s == LONG_S:
        write_result(
            "pressure",
            seconds=duration_s,
            num_users=NUM_USERS,
            pool_nbytes=POOL_NBYTES,
            working_set_nbytes=WORKING_SET_NBYTES,
            num_turns=tally.num_turns,
            num_failures=len(tally.failures),
            num_tokens_compared=agreement.num_tokens,
            num_wrong=len(agreement.wrong),
            num_rounding=agreement.num_rounding,
            num_cached_tokens=tally.num_cached_tokens,
            num_prompt_tokens=tally.num_prompt_tokens,
            num_looked_up=tally.num_looked_up,
            num_samples_of_the_books=tally.num_samples,
            counters=dict(counters),
        )
