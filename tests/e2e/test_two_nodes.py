"""Two nodes, as if on two hosts: prefixes spread over them, held by both, lost with one; a conductor that forgot all.

Which of the two a test's prefix came to is asked of the nodes, and blocks are moved between them as an operator or
another engine would: published to one, evicted from the other.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from snowskin.kvstore.blocks import KeyColumn, block_hashes
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.rpc import open_channel
from snowskin.tools.kvctl.admin import AdminClient
from snowskin.v1 import admin_pb2, admin_pb2_grpc
from tests.support.completions import asking
from tests.support.e2e_cluster import BLOCK_SIZE, exact_cluster
from tests.support.sensitive_model import block_nbytes, words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90), pytest.mark.asyncio(loop_scope="session")]

SEED = 20250611
NUM_TOKENS = 12
NUM_KILLS = 3
BLOCK_NBYTES = block_nbytes(BLOCK_SIZE)
LOOK_S = 0.01
WITHIN_S = 15.0


@pytest_asyncio.fixture(loop_scope="session")
async def asker(two_nodes):
    async with asking(two_nodes.http_address) as one:
        yield one


@pytest.fixture
def conductor(two_nodes):
    return Conductor(two_nodes)


class Conductor:
    """Asked by a channel of its own each time: one that pytest still knew of would count as left behind."""

    def __init__(self, cluster):
        self._cluster = cluster

    async def nodes(self):
        async with AdminClient(self._cluster.conductor_address, timeout_s=5.0) as admin:
            return await admin.nodes()

    async def match_prompt(self, prompt):
        async with AdminClient(self._cluster.conductor_address, timeout_s=5.0) as admin:
            return await admin.match_prompt(prompt)


@dataclass(frozen=True)
class Prefix:
    """A prompt whose blocks are all of use: one token more than they have."""

    prompt: list[int]
    keys: KeyColumn

    @classmethod
    def drawn(cls, chance: random.Random, num_blocks: int) -> Prefix:
        prompt = words(chance, num_blocks * BLOCK_SIZE + 1)
        return cls(prompt, KeyColumn.of(block_hashes(prompt, BLOCK_SIZE)))

    @property
    def num_cached_tokens(self) -> int:
        return len(self.keys) * BLOCK_SIZE


async def eventually(is_so):
    """Waits until `is_so()` is true; another process has no event that we could wait on."""
    async with asyncio.timeout(WITHIN_S):
        while not await is_so():  # noqa: ASYNC110  not in this process
            await asyncio.sleep(LOOK_S)


async def conductor_knows(conductor):
    """Returns once the conductor's directory has what the nodes have."""

    async def knows() -> bool:
        for node in await conductor.nodes():
            known = node.knowledge
            if known.state != "in sync" or known.num_blocks != await num_visible(node.address):
                return False
        return True

    await eventually(knows)


async def held(conductor, prefix: Prefix) -> dict[str, int]:
    """Blocks of the prefix on each node, by address."""
    match = await conductor.match_prompt(prefix.prompt)
    return {node.address: node.num_blocks_present for node in match.nodes}


@asynccontextmanager
async def operating(address: str):
    channel = open_channel(address)
    try:
        yield admin_pb2_grpc.NodeAdminStub(channel)
    finally:
        await channel.close(None)


async def num_visible(address: str) -> int:
    """Blocks that anybody may match; a tail whose reader did not come is none."""
    async with operating(address) as node:
        listed = await node.ListBlocks(admin_pb2.ListBlocksRequest(page_size=1000), timeout=5)
    assert not listed.next_page_token
    return sum(not block.one_reader for block in listed.blocks)


async def namespace_of(address: str) -> bytes:
    async with operating(address) as node:
        listed = await node.ListBlocks(admin_pb2.ListBlocksRequest(page_size=1), timeout=5)
    return bytes(listed.blocks[0].namespace)


async def evict(address: str, keys: KeyColumn) -> None:
    """Returns when the node has none of them; who reads one holds it a moment."""
    request = admin_pb2.EvictRequest(keys={"packed": keys.packed, "width": keys.width})

    async def is_gone() -> bool:
        async with operating(address) as node:
            return not (await node.Evict(request, timeout=5)).num_held

    await eventually(is_gone)


async def copy(cluster, source: str, target: str, keys: KeyColumn, parent: bytes = b"") -> None:
    """Publishes to one node what another one has, as an engine there would."""
    doors = {node.address: node.door for node in cluster.nodes}
    memory = np.zeros(len(keys) * BLOCK_NBYTES, np.uint8)
    where = range(0, memory.nbytes, BLOCK_NBYTES)
    namespace = await namespace_of(source)
    async with await StoreClient.connect(doors[source], client_name="copy") as client:
        with client.register(memory) as region:
            pulled = await client.pull(
                namespace=namespace, keys=keys, block_nbytes=BLOCK_NBYTES, local=region,
                local_offsets=where,
            )  # fmt: skip
    assert pulled.num_blocks == len(keys)
    async with await StoreClient.connect(doors[target], client_name="copy") as client:
        with client.register(memory) as region:
            await client.publish(
                namespace=namespace, keys=keys, block_nbytes=BLOCK_NBYTES, local=region,
                local_offsets=where, parent_key=parent,
            )  # fmt: skip


async def where_it_is(cluster, conductor, prefix: Prefix) -> tuple[str, str]:
    """The node that holds the whole prefix, and the other one."""
    counts = await held(conductor, prefix)
    (here, *_) = [address for address, count in counts.items() if count == len(prefix.keys)]
    (there,) = [node.address for node in cluster.nodes if node.address != here]
    return here, there


async def test_a_prefix_spread_over_two_nodes_hits_whole(two_nodes, asker, conductor, one_piece):
    chance = random.Random(SEED)
    prefix = Prefix.drawn(chance, 40)
    first = await asker.complete(prefix.prompt, NUM_TOKENS)
    assert [each.token_id for each in one_piece.answer(prefix.prompt, NUM_TOKENS)] == list(
        first.token_ids
    )
    here, there = await where_it_is(two_nodes, conductor, prefix)
    for parts in ([(0, 15)], [(0, 8), (20, 33)]):  # what stays; the rest is moved
        await copy(two_nodes, here, there, prefix.keys)
        stays = {at for first_block, end in parts for at in range(first_block, end)}
        moved = [key for at, key in enumerate(prefix.keys) if at not in stays]
        await evict(here, KeyColumn.of(moved))
        await evict(there, KeyColumn.of([prefix.keys[at] for at in stays]))
        counts = await held(conductor, prefix)
        assert (counts[here], counts[there]) == (len(stays), len(moved))
        await conductor_knows(conductor)
        again = await asker.complete(prefix.prompt, NUM_TOKENS)
        assert again.token_ids == first.token_ids
        assert again.num_cached_tokens == prefix.num_cached_tokens
        assert again.stats["decode"]["num_recomputed_tokens"] == 0
        here, there = await where_it_is(two_nodes, conductor, prefix)


async def test_evicted_blocks_that_were_still_hoped_for_are_computed(two_nodes, asker, conductor):
    chance = random.Random(SEED + 1)
    prefix = Prefix.drawn(chance, 20)
    first = await asker.complete(prefix.prompt, NUM_TOKENS)
    await conductor_knows(conductor)
    for _ in range(5):
        for node in two_nodes.nodes:
            await evict(node.address, prefix.keys[12:])
        again = await asker.complete(prefix.prompt, NUM_TOKENS)  # before or after the node told
        assert again.token_ids == first.token_ids
        assert again.num_cached_tokens == 12 * BLOCK_SIZE
        await conductor_knows(conductor)


async def test_all_of_that_went_by_the_data_plane_and_none_by_grpc(two_nodes, asker):
    prefix = Prefix.drawn(random.Random(SEED + 3), 4)
    await asker.complete(prefix.prompt, NUM_TOKENS)
    served = slow = 0.0
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as http:
        for node in two_nodes.nodes:
            shown = (await http.get(f"http://{node.http_address}/metrics")).text
            served += total(shown, "transport_bytes_total", direction="served", scheme="tcp")
            slow += total(shown, "slow_path_bytes_total")
    assert served >= len(prefix.keys) * BLOCK_NBYTES  # at the least, what was just published
    assert slow == 0


def total(text: str, thing: str, **labels: str) -> float:
    """Sum of a node's metric over all samples with these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"snowskin_node_{thing}" and labels.items() <= sample.labels.items()
    )


async def test_what_dies_costs_little_where_somebody_else_has_it(sensitive_model):
    """The node that is pulled from, where another holds the prefix; then the conductor, which is told all again.

    Prefill is on the first node, so that is where it pulls from; a decode on each, so that both are watched.
    """
    chance = random.Random(SEED + 2)
    print(f"seed {SEED + 2}")
    async with (
        exact_cluster(sensitive_model, nodes=2, prefill=1, transport="tcp") as own,
        asking(own.http_address) as asker,
    ):
        for _ in range(NUM_KILLS):
            await kill_the_node_that_is_pulled_from(own, asker, chance)
        await kill_the_conductor(own, asker, chance)


async def kill_the_node_that_is_pulled_from(cluster, asker, chance: random.Random) -> None:
    conductor, victim = Conductor(cluster), "node-0"
    here, there = (node.address for node in cluster.nodes)
    prefix = Prefix.drawn(chance, 160)
    first = await published(asker, conductor, prefix, here)
    await copy(cluster, here, there, prefix.keys)
    await conductor_knows(conductor)
    asked = asyncio.create_task(asker.complete(prefix.prompt, NUM_TOKENS))
    after_s = chance.uniform(0.0, 0.02)
    await asyncio.sleep(after_s)
    cluster.kill(victim)
    again = await asked
    what = f"{victim} killed after {1000 * after_s:.1f} ms: {again.stats}"
    print(what)
    assert again.token_ids == first.token_ids, what
    assert again.num_cached_tokens >= prefix.num_cached_tokens // 2, what
    await cluster.restarted(victim)
    await cluster.wait_ready(timeout_s=WITHIN_S)
    await conductor_knows(conductor)


async def published(asker, conductor, prefix: Prefix, address: str):
    """An answer after which that node holds the whole prefix; before its engine's link is back it gets none of it."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            answer = await asker.complete(prefix.prompt, NUM_TOKENS)
            if (await held(conductor, prefix))[address] == len(prefix.keys):
                return answer


async def kill_the_conductor(cluster, asker, chance: random.Random) -> None:
    conductor = Conductor(cluster)
    prefix = Prefix.drawn(chance, 10)
    first = await published(asker, conductor, prefix, cluster.nodes[0].address)
    await conductor_knows(conductor)
    before = {node.address: node.knowledge for node in await conductor.nodes()}
    cluster.kill("conductor")
    await cluster.restarted("conductor")
    await cluster.wait_ready(timeout_s=WITHIN_S)
    await conductor_knows(conductor)
    for node in await conductor.nodes():
        known = before[node.address]
        assert (node.knowledge.node_epoch, node.knowledge.num_blocks) == (
            known.node_epoch,
            known.num_blocks,
        )
    again = await asker.complete(prefix.prompt, NUM_TOKENS)
    assert again.token_ids == first.token_ids
    assert again.num_cached_tokens == prefix.num_cached_tokens
