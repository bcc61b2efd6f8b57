"""What prefill left at the node for a decode that never reads it: freed at once, not when its lease ends."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest

from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.node.daemon import NodeSettings, serve_node
from snowskin.kvstore.wire import keys_from
from snowskin.v1 import common_pb2
from tests.support.clusters import SHAPE
from tests.support.conductors import conducting, events_of, make_tiny_model
from tests.support.engine_bench import until
from tests.support.fake_engines import FakeEngine
from tests.support.roles import running

PROMPT = "a prompt of two blocks and a few tokens"
NAMESPACE = SHAPE.namespaces[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-model")


class PublishingPrefill(FakeEngine):
    """Leaves at a node what a prefill instance would; its fake decode never reads it."""

    def __init__(self, client: StoreClient, script) -> None:
        super().__init__("prefill-0", script)
        self._client = client
        self._buffer = client.register(np.ones(4 * SHAPE.block_nbytes, dtype=np.uint8))
        self.has_published = asyncio.Event()

    async def Prefill(self, request, context):  # noqa: N802
        keys = keys_from(request.prompt.block_keys)
        is_off = request.prompt.cache_policy == common_pb2.CACHE_POLICY_OFF
        await self._client.publish(
            namespace=NAMESPACE,
            keys=keys,
            block_nbytes=SHAPE.block_nbytes,
            local=self._buffer,
            local_offsets=[index * SHAPE.block_nbytes for index in range(len(keys))],
            one_reader=is_off,
            timeout_s=5.0,
        )
        await self._client.publish_tail(
            namespace=NAMESPACE,
            tail_id=request.request_id,
            local=self._buffer,
            local_offset=0,
            nbytes=SHAPE.block_nbytes,
            timeout_s=5.0,
        )
        self.has_published.set()
        return await super().Prefill(request, context)


class LaterDecode(FakeEngine):
    """Does what its script says once there is something to leave; a prefill frees what comes later itself."""

    def __init__(self, script, has_published: asyncio.Event) -> None:
        super().__init__("decode-0", script)
        self._has_published = has_published

    async def Decode(self, requests, context):  # noqa: N802
        await self._has_published.wait()
        async for response in super().Decode(requests, context):
            yield response


@contextlib.asynccontextmanager
async def cluster_over_a_node(model, decode, prefill=()):
    """A conductor, a prefill that publishes to a real node, and a fake decode, with these scripts."""
    async with (
        running(serve_node, NodeSettings, dram_nbytes=4 << 20, grace_s=0.0) as role,
        await StoreClient.connect(role.facts["door"], client_name="prefill-0") as client,
    ):
        publisher = PublishingPrefill(client, prefill)
        engines = [publisher, LaterDecode(decode, publisher.has_published)]
        async with conducting(model, engines) as cluster:
            for engine in engines:
                await cluster.registrar.register(engine, node_address=role.facts["address"])

            async def free_nbytes():
                return (await client.stat()).pools[0].free_nbytes

            yield cluster, free_nbytes, publisher.has_published


async def freed(free_nbytes, wanted_nbytes):
    async with asyncio.timeout(5):
        while await free_nbytes() != wanted_nbytes:  # noqa: ASYNC110  another's memory
            await asyncio.sleep(0.005)


async def whole(cluster, **fields):
    response = await cluster.complete(PROMPT, max_tokens=9, **fields)
    return response.status_code


OFF = {"x-snowskin-cache": "off"}


@pytest.mark.parametrize(("headers", "num_kept"), [({}, 2), (OFF, 0)])
async def test_a_user_who_hangs_up_before_decode_has_read_leaves_no_unread_block(
    model, headers, num_kept
):
    async with cluster_over_a_node(model, ["hang"]) as (cluster, free_nbytes, has_published):
        empty_nbytes = await free_nbytes()
        asking = asyncio.create_task(whole(cluster, headers=headers))
        async with asyncio.timeout(5):
            await has_published.wait()
            await cluster["decode-0"].busy.wait()
        assert await free_nbytes() == empty_nbytes - 3 * SHAPE.block_nbytes
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await freed(free_nbytes, empty_nbytes - num_kept * SHAPE.block_nbytes)


@pytest.mark.parametrize(
    ("prefill", "decode", "status"),
    [
        # Decode fails when all is published, and before the hand-off, or after it.
        *(("hang", "refuse", 400), ("hang", "full", 429), ("hang", "lost", 503)),
        ("ok", "lost after 2", 503),
    ],
)
async def test_an_attempt_whose_decode_failed_leaves_no_unread_block(
    model, prefill, decode, status
):
    # There is no other decode to take it.
    async with cluster_over_a_node(model, [decode], [prefill]) as (cluster, free_nbytes, _):
        empty_nbytes = await free_nbytes()
        assert await whole(cluster, headers=OFF) == status
        await freed(free_nbytes, empty_nbytes)


async def test_an_attempt_that_decode_finished_is_not_swept(model):
    """It was read; where it was not, as by this fake, the node's own lease is what ends it."""
    async with cluster_over_a_node(model, []) as (cluster, free_nbytes, _):
        empty_nbytes = await free_nbytes()
        response = await cluster.complete(PROMPT, max_tokens=9, stream=True, headers=OFF)
        assert events_of(response.text)[-1] == "[DONE]"
        await until(lambda: cluster["decode-0"].num_active == 0)
        assert await free_nbytes() < empty_nbytes
