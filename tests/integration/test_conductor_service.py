"""The conductor's gRPC: registration, plans, and what operators are told."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from snowskin.engines.conductor.errors import ModelMismatch, NoInstanceReady, RequestRefused
from snowskin.engines.errors import PromptTooLong
from snowskin.kvstore.blocks import block_hashes
from snowskin.kvstore.errors import BadRequest, NamespaceMismatch
from snowskin.kvstore.rpc import open_channel, translating
from snowskin.v1 import admin_pb2, admin_pb2_grpc, conductor_pb2, conductor_pb2_grpc
from tests.support.conductors import conducting, make_tiny_model
from tests.support.fake_engines import FakeEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-model")


def pair():
    return [FakeEngine("prefill-0"), FakeEngine("decode-0")]


@contextlib.asynccontextmanager
async def stubs(cluster):
    channel = open_channel(cluster.served.address)
    try:
        yield conductor_pb2_grpc.ConductorStub(channel), admin_pb2_grpc.AdminStub(channel)
    finally:
        await channel.close(None)


def packed(tokens) -> bytes:
    return np.asarray(tokens, dtype="<u4").tobytes()


async def test_a_plan_names_instances_and_brings_the_prompt_with_its_keys(model):
    async with conducting(model, pair()) as cluster, stubs(cluster) as (conductor, _):
        tokens = list(range(100, 140))
        plan = await conductor.Schedule(
            conductor_pb2.ScheduleRequest(request_id="r", token_ids=packed(tokens), max_tokens=5),
            timeout=5,
        )
        assert (plan.prefill_instance_id, plan.decode_instance_id) == ("prefill-0", "decode-0")
        assert plan.prefill_address == cluster["prefill-0"].address
        assert plan.ttft_s == pytest.approx(plan.transfer_s + plan.queue_s + plan.prefill_s)
        assert plan.prompt.block_keys.packed == b"".join(block_hashes(tokens, 16))
        # Nothing runs, and the placement is load until the next report.
        assert cluster.served.conductor.state.counts().num_arrived == 0
        (prefill,) = [
            each
            for each in cluster.served.conductor.scheduler.view().instances
            if each.role == "prefill"
        ]
        assert prefill.num_placed_tokens == 40


async def test_plans_are_refused_with_the_type_that_says_why(model):
    async with (
        conducting(model, pair(), max_ttft_s=0.05) as cluster,
        stubs(cluster) as (conductor, _),
    ):
        for tokens, max_tokens, error in [
            ([], 5, BadRequest),
            ([1], 0, BadRequest),
            ([10**6], 5, BadRequest),
            ([1], 5000, PromptTooLong),
            ([1] * 200, 5, RequestRefused),
        ]:
            request = conductor_pb2.ScheduleRequest(token_ids=packed(tokens), max_tokens=max_tokens)
            with pytest.raises(error), translating("conductor"):
                await conductor.Schedule(request, timeout=5)
        await cluster.registrar.report("decode-0", draining=True)
        request = conductor_pb2.ScheduleRequest(token_ids=packed([1]), max_tokens=5)
        with pytest.raises(NoInstanceReady, match="decode"), translating("conductor"):
            await conductor.Schedule(request, timeout=5)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"role": "encode"}, BadRequest),
        ({"instance_id": ""}, BadRequest),
        ({"block_size": 0}, BadRequest),
        ({"namespaces": []}, NamespaceMismatch),
        ({"namespaces": [b"short"]}, NamespaceMismatch),
        ({"model_name": "other"}, ModelMismatch),
    ],
)
async def test_an_instance_that_cannot_serve_is_refused_at_registration(model, fields, error):
    async with conducting(model) as cluster:
        engine = FakeEngine("prefill-0")
        engine.address = "127.0.0.1:1"
        with pytest.raises(error), translating("conductor"):
            await cluster.registrar.register(engine, **fields)
        assert cluster.served.conductor.scheduler.view().instances == ()


async def test_a_stranger_is_told_to_register(model):
    async with conducting(model) as cluster:
        assert not await cluster.registrar.report("prefill-7")


async def test_operators_see_instances_and_requests(model):
    async with conducting(model, pair()) as cluster, stubs(cluster) as (_, admin):
        await cluster.complete("hello", max_tokens=2)
        await cluster.registrar.report("decode-0", draining=True, num_running=3)
        status = await admin.ClusterStatus(admin_pb2.ClusterStatusRequest(), timeout=5)
        assert status.model_name == "tiny"
        assert (status.num_requests_finished, status.num_requests_running) == (1, 0)
        assert [(each.instance_id, each.state) for each in status.instances] == [
            ("decode-0", "draining"),
            ("prefill-0", "ready"),
        ]
        assert status.instances[0].load.num_running == 3
        assert status.instances[0].block_size == 16


async def test_a_node_that_does_not_answer_is_a_line_and_no_error(model):
    engines = pair()
    async with conducting(model, engines) as cluster, stubs(cluster) as (_, admin):
        for engine in engines:
            await cluster.registrar.register(engine, node_address="127.0.0.1:1")
        nodes = await admin.Nodes(admin_pb2.NodesRequest(), timeout=5)
        assert [each.address for each in nodes.nodes] == ["127.0.0.1:1"]
        assert nodes.nodes[0].error
        assert not nodes.nodes[0].HasField("stat")
        match = await admin.MatchPrompt(admin_pb2.MatchPromptRequest(text="x" * 40), timeout=5)
        assert (match.num_tokens, match.num_blocks, match.block_size) == (40, 2, 16)
        assert match.nodes[0].error
        # Requests are placed all the same, without hits.
        assert (await cluster.complete("hello", max_tokens=2)).status_code == 200


async def test_a_prompt_cannot_be_matched_before_anyone_has_registered(model):
    async with conducting(model) as cluster, stubs(cluster) as (_, admin):
        with pytest.raises(NoInstanceReady, match="registered"), translating("conductor"):
            await admin.MatchPrompt(admin_pb2.MatchPromptRequest(text="x"), timeout=5)
