"""A node continues the trace of a call, by both of its doors, from both clients; of other calls it tells nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import numpy as np
import pytest

from snowskin.kvstore import tracing
from snowskin.kvstore.client.blocking import BlockingStoreClient
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.errors import LimitExceeded
from snowskin.kvstore.metrics import Metrics
from snowskin.kvstore.node.daemon import NodeSettings, make_shell, serve_node
from snowskin.kvstore.node.door import LocalDoor
from snowskin.kvstore.span_export import open_tracer
from tests.support.roles import running
from tests.support.store_drivers import keys_of, namespace_of, noise

CALLER = "00-" + "5e" * 16 + "-" + "7a" * 8 + "-01"
CALL = re.compile("^(node |Store/)")
NAMESPACE = namespace_of(7)
BLOCK_NBYTES = 1024
NUM_BLOCKS = 3
SOON_S = 5.0


def work_of(client):
    """What to call to publish some blocks and to pull them back."""
    data = noise(1, NUM_BLOCKS * BLOCK_NBYTES)
    where = {
        "namespace": NAMESPACE,
        "keys": keys_of(1, NUM_BLOCKS),
        "block_nbytes": BLOCK_NBYTES,
        "local_offsets": range(0, data.nbytes, BLOCK_NBYTES),
        "request_id": "story",
    }
    landing = np.zeros(data.nbytes, np.uint8)
    yield lambda: client.publish(local=client.register(data), **where)
    yield lambda: client.pull(local=client.register(landing), **where)


async def asyncio_client(address):
    async with await StoreClient.connect(address, client_name="one") as client:
        for call in work_of(client):
            await call()


async def blocking_client(address):
    def work():
        with BlockingStoreClient.connect(address, client_name="one") as client:
            for call in work_of(client):
                call()

    await asyncio.to_thread(work)  # which is given the context


@pytest.fixture
def path(tmp_path):
    return tmp_path / "spans.jsonl"


@pytest.fixture
def caller(path):
    """The tracer of another process, whose spans go to the same file."""
    with open_tracer(role="prefill", instance_id="p", file=str(path)) as tracer:
        yield tracer


@pytest.fixture
async def node(path):
    async with running(serve_node, NodeSettings, dram_nbytes=1 << 20, trace_file=str(path)) as one:
        yield one


def spans(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("way", ["door", "address"])
@pytest.mark.parametrize("work", [asyncio_client, blocking_client])
async def test_every_call_of_a_traced_request_is_a_span_on_the_node(
    node, caller, path, way, work, caplog
):
    with caplog.at_level(logging.INFO), caller.continuing("publish", CALLER, ""):
        await work(node.facts[way])
        await node.end()  # everything is answered, and told
    found = {span["span_id"]: span for span in spans(path)}
    asked = ["reserve", "commit", "match"]
    calls = {
        name: span
        for span in found.values()
        if span["role"] == "node" and (name := CALL.sub("", span["name"]).lower()) in asked
    }
    assert sorted(calls) == sorted(asked)
    for name, span in calls.items():
        assert span["trace_id"] == CALLER[3:35]
        parent = found[span["parent_id"]]
        assert (parent["role"], parent["name"]) == ("prefill", f"store {name}")
        assert parent["began_at_s"] <= span["began_at_s"]
    copies = {
        span["name"]: span["facts"]["nbytes"] for span in found.values() if "copy" in span["name"]
    }
    assert copies == dict.fromkeys(("copy in", "copy out"), NUM_BLOCKS * BLOCK_NBYTES)
    for span in calls.values():
        assert "num_blocks" in span["facts"] or "num_blocks_left" in span["facts"]
    told = [record.msg for record in caplog.records if "call answered" in str(record.msg)]
    assert len(told) >= len(asked)


async def test_calls_of_other_requests_leave_nothing(node, path, caplog):
    with caplog.at_level(logging.INFO):
        await asyncio_client(node.facts["door"])
        await asyncio_client(node.facts["address"])
    assert spans(path) == []
    assert "call answered" not in caplog.text


async def test_a_refused_call_is_told_with_its_reason(node, caller, path):
    async with await StoreClient.connect(node.facts["door"], client_name="one") as client:
        large = np.zeros(2 << 20, np.uint8)
        with caller.continuing("publish", CALLER, ""), pytest.raises(LimitExceeded):
            await client.publish(
                namespace=NAMESPACE,
                keys=keys_of(1, 2),
                block_nbytes=1 << 20,
                local=client.register(large),
                local_offsets=[0, 1 << 20],
            )
    await node.end()
    (call,) = [span for span in spans(path) if span["name"] == "node reserve"]
    assert call["error"] == "LIMIT_EXCEEDED"


async def test_a_client_that_goes_ends_the_spans_of_what_it_waits_for(tmp_path, path):
    with open_tracer(role="node", instance_id="n", file=str(path)) as tracer:
        shell = make_shell(NodeSettings(dram_nbytes=1 << 20))
        door = LocalDoor(shell, tmp_path / "door", tracer=tracer)
        door.open()
        try:
            client = await StoreClient.connect(f"unix:{door.path}", client_name="one")
            landing = client.register(np.zeros(BLOCK_NBYTES, np.uint8))
            with tracer.continuing("pull", CALLER, ""):
                waiting = asyncio.create_task(
                    client.pull(
                        namespace=NAMESPACE,
                        keys=keys_of(9, 1),
                        block_nbytes=BLOCK_NBYTES,
                        local=landing,
                        local_offsets=[0],
                        wait_blocks=1,
                        timeout_s=60.0,
                    )
                )
            async with asyncio.timeout(SOON_S):
                while not shell.state.stat().num_waiting_matches:  # noqa: ASYNC110  no event tells
                    await asyncio.sleep(0)
                await client.close()
                await asyncio.wait([waiting])
                while shell.state.stat().num_sessions:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            assert waiting.exception() is not None
        finally:
            door.close()
            shell.close()
    (call,) = [span for span in spans(path) if span["name"] == "node match"]
    assert call["facts"]["cancelled"] is True
    assert tracing.current() is None


async def test_a_part_of_the_calls_is_measured_and_every_kind_of_them(tmp_path):
    shell = make_shell(NodeSettings(dram_nbytes=1 << 20))
    door = LocalDoor(shell, tmp_path / "door")
    metrics = Metrics("node")
    metrics.read(door.meter.seconds.collect)
    door.open()
    try:
        async with await StoreClient.connect(f"unix:{door.path}", client_name="one") as client:
            data = client.register(noise(1, BLOCK_NBYTES))
            for number in range(100):  # a Reserve and a Commit each, always in turn
                await client.publish(
                    namespace=NAMESPACE,
                    keys=keys_of(number, 1),
                    block_nbytes=BLOCK_NBYTES,
                    local=data,
                    local_offsets=[0],
                )
    finally:
        door.close()
        shell.close()
    assert door.meter.num_calls == 201  # and the Hello
    shown = metrics.exposition().decode()
    for method in ("reserve", "commit"):
        (line,) = [
            line
            for line in shown.splitlines()
            if line.startswith(f'snowskin_node_door_seconds_count{{method="{method}"}}')
        ]
        assert 3 <= float(line.rpartition(" ")[2]) <= 10
