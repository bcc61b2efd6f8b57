"""An engine's process from outside: its gRPC, its standing with the conductor, its drain."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest

from snowskin.engines import daemon, service
from snowskin.engines.daemon import EngineSettings, serve_engine
from snowskin.engines.errors import (
    BadPrompt,
    HandoffMissing,
    InstanceDraining,
    ModelMissing,
    PromptTooLong,
)
from snowskin.engines.model import weights
from snowskin.engines.model.sampler import SamplingParams
from snowskin.kvstore.blocks import block_hashes
from snowskin.kvstore.errors import (
    AddressInUse,
    BadKeyColumn,
    BadRequest,
    BadSetting,
    DeadlineExceeded,
    NamespaceMismatch,
)
from snowskin.kvstore.node.daemon import NodeSettings, serve_node
from snowskin.kvstore.role import Stop
from snowskin.kvstore.rpc import call_metadata, open_channel, serving, translating
from snowskin.v1 import common_pb2, conductor_pb2, conductor_pb2_grpc, engine_pb2, engine_pb2_grpc
from tests.support.engine_bench import BLOCK_SIZE, model_directory, prompt_tokens, straight, until
from tests.support.roles import running

GREEDY = SamplingParams(max_tokens=10)


class FakeConductor(conductor_pb2_grpc.ConductorServicer):
    """Notes who registers and reports; forgets everybody when told to."""

    def __init__(self):
        self.registered = {}
        self.num_registrations = 0
        self.reports = []

    async def Register(self, request, context):  # noqa: N802
        self.registered[request.instance_id] = request
        self.num_registrations += 1
        return conductor_pb2.RegisterResponse(report_interval_ms=20)

    async def Report(self, request, context):  # noqa: N802
        self.reports.append(request)
        return conductor_pb2.ReportResponse(known=request.instance_id in self.registered)


def serving_conductor(conductor, port=0):
    return serving(
        [(conductor_pb2_grpc.add_ConductorServicer_to_server, conductor)],
        host="127.0.0.1",
        port=port,
        service_names=[],
        role="conductor",
    )


def engine(role, node, **settings):
    values = {
        "role": role,
        "instance_id": f"{role}-0",
        "model": str(model_directory()),
        "node": node,
        "node_address": "127.0.0.1:1",
        "threads": 1,
        "block_size": BLOCK_SIZE,
        "chunk_tokens": 32,
        "kv_memory_nbytes": 1 << 20,
        "drain_s": 2.0,
    }
    return running(serve_engine, EngineSettings, **(values | settings))


@asynccontextmanager
async def stub_of(role):
    channel = open_channel(role.facts["address"])
    try:
        yield engine_pb2_grpc.EngineStub(channel)
    finally:
        await channel.close(None)


@asynccontextmanager
async def pair(**settings):
    """Node, conductor, prefill and decode; yields their stubs, the conductor and the node."""
    conductor = FakeConductor()
    async with (
        serving_conductor(conductor) as server,
        running(serve_node, NodeSettings, dram_nbytes=16 << 20, grace_s=0.0) as node,
        engine("prefill", node.facts["door"], conductor=server.address, **settings) as prefill,
        engine("decode", node.facts["door"], conductor=server.address, **settings) as decode,
        stub_of(prefill) as prefill_stub,
        stub_of(decode) as decode_stub,
    ):
        await until(lambda: len(conductor.registered) == 2)
        yield Pair(conductor, node, prefill, decode, prefill_stub, decode_stub)


class Pair:
    def __init__(self, conductor, node, prefill, decode, prefill_stub, decode_stub):
        self.conductor, self.node = conductor, node
        self.prefill, self.decode = prefill, decode
        self.prefill_stub, self.decode_stub = prefill_stub, decode_stub

    def prompt(self, tokens, **changes):
        fields = {
            "token_ids": np.asarray(tokens, dtype="<u4").tobytes(),
            "block_keys": common_pb2.KeyColumn(
                packed=b"".join(block_hashes(tokens, BLOCK_SIZE)), width=32
            ),
            "namespace": self.conductor.registered["prefill-0"].namespaces[0],
        }
        return engine_pb2.Prompt(**(fields | changes))

    async def run_prefill(self, prompt, sampling=None, request_id="r", timeout_ms=20_000):
        request = engine_pb2.PrefillRequest(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling or sampling_of(GREEDY),
            timeout_ms=timeout_ms,
        )
        with translating("prefill"):
            return await self.prefill_stub.Prefill(
                request, timeout=20, metadata=call_metadata(request_id)
            )

    async def run_decode(self, *requests, timeout_s=20.0, half_close=False):
        """All outputs of one Decode stream that sends `requests`."""
        with translating("decode"):
            call = self.decode_stub.Decode(timeout=timeout_s)
            for request in requests:
                await call.write(request)
            if half_close:
                await call.done_writing()
            return [output async for output in call]

    async def loads(self):
        status = engine_pb2.StatusRequest()
        return [
            (await stub.Status(status, timeout=5)).load
            for stub in (self.prefill_stub, self.decode_stub)
        ]

    async def nothing_is_held(self):
        async with asyncio.timeout(10):
            while True:
                loads = await self.loads()
                if all(
                    load.num_kv_blocks_free == load.num_kv_blocks
                    and load.num_running + load.num_waiting == 0
                    for load in loads
                ):
                    return


def sampling_of(params):
    return engine_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop_token_ids=params.stop_token_ids,
    )


def start_of(prompt, request_id="r", timeout_ms=20_000):
    start = engine_pb2.DecodeStart(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling_of(GREEDY),
        handoff_timeout_ms=timeout_ms,
    )
    return engine_pb2.DecodeRequest(start=start)


async def test_a_prompt_goes_through_both_processes_token_for_token():
    async with pair() as engines:
        for num_tokens in (3, 15, 16, 17, 65):
            token_ids = prompt_tokens(num_tokens, seed=num_tokens)
            prompt = engines.prompt(token_ids)
            call = engines.decode_stub.Decode(timeout=20)
            await call.write(start_of(prompt, f"r{num_tokens}"))
            prefilled = await engines.run_prefill(prompt, request_id=f"r{num_tokens}")
            await call.write(engine_pb2.DecodeRequest(handoff=prefilled.handoff))
            await call.done_writing()
            outputs = [output async for output in call]
            tokens = [prefilled.handoff.first_token_id]
            tokens += [token for output in outputs for token in output.token_ids]
            assert tokens == straight(token_ids, GREEDY)
            assert [output.finish_reason for output in outputs][-1] == "length"
            assert outputs[-1].stats.num_recomputed_tokens == 0
            assert outputs[-1].stats.num_generated_tokens == 9
            assert prefilled.stats.num_computed_tokens == num_tokens
            assert prefilled.handoff.node_address == "127.0.0.1:1"
        await engines.nothing_is_held()


async def test_what_an_instance_tells_the_conductor():
    async with pair() as engines:
        told = engines.conductor.registered["prefill-0"]
        assert told.role == "prefill"
        assert told.address == engines.prefill.facts["address"]
        assert told.model_name == model_directory().name
        assert (told.block_size, told.block_nbytes) == (BLOCK_SIZE, 2048)
        assert told.max_context_tokens == 512
        assert told.load.num_kv_blocks == 512
        # Warm-up is measured, and not counted.
        assert told.load.prefill_tokens_per_s > 0
        assert told.load.num_tokens_computed == 0
        assert engines.conductor.registered["decode-0"].load.decode_step_s > 0
        namespaces = {bytes(each.namespaces[0]) for each in engines.conductor.registered.values()}
        assert len(namespaces) == 1
        assert '"weights_revision"' in told.layout_json
        engines.conductor.registered.clear()
        await until(lambda: len(engines.conductor.registered) == 2)
        assert engines.conductor.num_registrations == 4


async def test_a_conductor_that_restarts_is_told_again():
    conductor = FakeConductor()
    async with running(serve_node, NodeSettings, dram_nbytes=4 << 20) as node:
        async with serving_conductor(conductor) as server:
            port = server.port
            starting = engine("prefill", node.facts["door"], conductor=server.address)
            role = await starting.__aenter__()
            await until(lambda: conductor.reports)
        try:
            again = FakeConductor()
            async with serving_conductor(again, port):
                await until(lambda: "prefill-0" in again.registered)
                role.stop.set("test")
                await role.task
            assert again.reports[-1].draining
        finally:
            await starting.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"token_ids": b"abc"}, BadRequest),
        ({"token_ids": b""}, BadPrompt),
        ({"namespace": b"x" * 32}, NamespaceMismatch),
        ({"block_keys": common_pb2.KeyColumn(packed=b"k" * 33, width=32)}, BadKeyColumn),
        ({"block_keys": common_pb2.KeyColumn(packed=b"k" * 32, width=4)}, BadKeyColumn),
        ({"block_keys": common_pb2.KeyColumn(packed=b"k" * 32, width=32)}, BadKeyColumn),
        ({"token_ids": np.full(512, 65, dtype="<u4").tobytes()}, PromptTooLong),
    ],
)
async def test_bad_input_is_refused_with_its_own_error(changes, error):
    async with pair() as engines:
        prompt = engines.prompt(prompt_tokens(9), **changes)
        with pytest.raises(error) as caught:
            await engines.run_prefill(prompt)
        assert caught.value.hint
        with pytest.raises(error):
            await engines.run_decode(start_of(prompt))
        await engines.nothing_is_held()


async def test_an_instance_refuses_the_other_role_and_a_stream_out_of_order(monkeypatch):
    monkeypatch.setattr(service, "START_TIMEOUT_S", 0.05)
    async with pair() as engines:
        with pytest.raises(DeadlineExceeded, match="without its start"):
            await engines.run_decode()
        prompt = engines.prompt(prompt_tokens(9))
        with pytest.raises(BadRequest, match="decode instance"), translating("decode"):
            await engines.decode_stub.Prefill(engine_pb2.PrefillRequest(), timeout=5)
        with pytest.raises(BadRequest, match="begin with start"):
            await engines.run_decode(engine_pb2.DecodeRequest(handoff=engine_pb2.Handoff()))
        with pytest.raises(HandoffMissing, match="stream ended"):
            await engines.run_decode(start_of(prompt), half_close=True)
        with pytest.raises(HandoffMissing, match="no hand-off within"):
            await engines.run_decode(start_of(prompt, timeout_ms=30))
        await engines.nothing_is_held()


async def test_a_prefill_that_takes_too_long_ends_with_its_deadline():
    async with pair() as engines:
        with pytest.raises(DeadlineExceeded):
            await engines.run_prefill(engines.prompt(prompt_tokens(400)), timeout_ms=1)
        await engines.nothing_is_held()


async def test_a_decode_has_as_long_as_its_caller_gives_it(monkeypatch):
    async with pair() as engines:
        monkeypatch.setattr("snowskin.engines.service.DEFAULT_TIMEOUT_S", 0.001)
        prompt = engines.prompt(prompt_tokens(30))
        prefilled = await engines.run_prefill(prompt)
        handoff = engine_pb2.DecodeRequest(handoff=prefilled.handoff)
        outputs = await engines.run_decode(start_of(prompt), handoff, timeout_s=20.0)
        assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("num_outputs", [0, 1, 4])
async def test_a_caller_that_goes_away_frees_everything(num_outputs):
    async with pair() as engines:
        prompt = engines.prompt(prompt_tokens(40))
        prefilled = await engines.run_prefill(prompt)
        call = engines.decode_stub.Decode(timeout=20)
        await call.write(start_of(prompt))
        if num_outputs:
            await call.write(engine_pb2.DecodeRequest(handoff=prefilled.handoff))
            for _ in range(num_outputs):
                await call.read()
        call.cancel()
        prefilling = engines.prefill_stub.Prefill(
            engine_pb2.PrefillRequest(
                request_id="gone",
                prompt=engines.prompt(prompt_tokens(300, seed=3)),
                sampling=sampling_of(GREEDY),
            ),
            timeout=20,
        )
        await until_running(engines.prefill_stub)
        prefilling.cancel()
        await engines.nothing_is_held()


async def test_a_drain_lets_running_work_finish_and_refuses_new_work():
    async with pair() as engines:
        prompt = engines.prompt(prompt_tokens(30))
        prefilled = await engines.run_prefill(prompt)
        call = engines.decode_stub.Decode(timeout=20)
        await call.write(start_of(prompt))
        await until_running(engines.decode_stub)
        engines.decode.stop.set("test")
        await until(lambda: any(report.draining for report in engines.conductor.reports))
        with pytest.raises(InstanceDraining):
            await engines.run_decode(start_of(prompt, "late"))
        await call.write(engine_pb2.DecodeRequest(handoff=prefilled.handoff))
        tokens = [token async for output in call for token in output.token_ids]
        assert tokens == straight(prompt_tokens(30), GREEDY)[1:]
        await engines.decode.task


async def until_running(stub):
    async with asyncio.timeout(5):
        while True:
            status = await stub.Status(engine_pb2.StatusRequest(), timeout=5)
            if status.load.num_waiting + status.load.num_running:
                return


async def test_health_says_who_it_is_and_whether_node_and_conductor_answer():
    async with pair() as engines, httpx.AsyncClient() as client:
        # Two reports later the first answer of the conductor has surely been read.
        await until(lambda: len(engines.conductor.reports) >= 4)
        answer = await client.get(f"http://{engines.prefill.facts['http_address']}/healthz")
        assert answer.status_code == 200
        assert answer.json() == {
            "ok": True,
            "role": "prefill",
            "id": "prefill-0",
            "node_connected": True,
            "node_breaker": "closed",
            "conductor_connected": True,
        }


async def test_what_cannot_start_says_why(tmp_path):
    node = f"unix:{tmp_path}/door"
    with pytest.raises(ModelMissing):
        await serve_engine(EngineSettings(model=f"{tmp_path}/none", node=node), Stop())
    with pytest.raises(BadSetting, match="no model"):
        EngineSettings(node=node)
    with pytest.raises(BadSetting, match="no node"):
        EngineSettings(model="m")
    with pytest.raises(BadSetting, match="chunk_tokens"):
        EngineSettings(model="m", node=node, chunk_tokens=100)
    model = str(model_directory())
    with pytest.raises(BadSetting, match="less than one chunk"):
        await serve_engine(EngineSettings(model=model, node=node, kv_memory_nbytes=4096), Stop())
    async with serving_conductor(FakeConductor()) as server:
        taken = EngineSettings(
            model=model, node=node, kv_memory_nbytes=1 << 24, port=server.port, threads=1
        )
        with pytest.raises(AddressInUse):
            await serve_engine(taken, Stop())


async def test_a_stop_during_the_start_ends_it_before_anything_is_promised(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "NODE_WAIT_S", 60.0)
    announced = []
    monkeypatch.setattr(daemon, "announce_ready", lambda *_, **facts: announced.append(facts))
    conductor, stop = FakeConductor(), Stop()
    warm_up = daemon._warm_up

    async def warm_up_and_stop(*arguments):
        await warm_up(*arguments)
        stop.set("test")

    monkeypatch.setattr(daemon, "_warm_up", warm_up_and_stop)
    async with serving_conductor(conductor) as server, asyncio.timeout(20):
        settings = EngineSettings(
            model=str(model_directory()), node=f"unix:{tmp_path}/none", threads=1,
            block_size=BLOCK_SIZE, chunk_tokens=32, kv_memory_nbytes=1 << 20,
            conductor=server.address,
        )  # fmt: skip
        await serve_engine(settings, stop)
    assert not announced
    assert not conductor.registered


class OneTensorAtATime:
    """Opens files of weights; when the third tensor is read somebody asks the process to end."""

    def __init__(self, opened, stop):
        self._opened, self._stop = opened, stop
        self.num_loaded = 0

    def __call__(self, path):
        self._file = self._opened(path)
        return self

    def __enter__(self):
        self._tensors = self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._tensors, name)

    def get_tensor(self, name):
        self.num_loaded += 1
        if self.num_loaded == 3:
            self._stop.set("SIGTERM")
        return self._tensors.get_tensor(name)


async def test_a_stop_while_the_model_loads_ends_the_load_at_the_next_tensor(tmp_path, monkeypatch):
    stop = Stop()
    opened = OneTensorAtATime(weights._opened, stop)
    monkeypatch.setattr(weights, "_opened", opened)
    node = f"unix:{tmp_path}/nobody"
    settings = EngineSettings(model=str(model_directory()), node=node, threads=1)
    async with asyncio.timeout(10):
        await serve_engine(settings, stop)
    assert opened.num_loaded == 3
