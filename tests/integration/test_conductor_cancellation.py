"""Each public await of the conductor, cancelled at each point where it waits: no call, load or task is left."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from snowskin.engines.conductor.errors import ConductorDraining
from snowskin.engines.conductor.job import Finished, FirstToken, Job, Sampling, Tokens
from snowskin.engines.conductor.nodes import Nodes
from snowskin.engines.conductor.request import Stage
from snowskin.engines.conductor.run import Run, RunLimits
from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.clock import SystemClock
from snowskin.kvstore.errors import NodeUnavailable
from snowskin.kvstore.node.daemon import NodeSettings, serve_node
from snowskin.transport.errors import SnowskinError
from tests.support.conductors import conducting, make_tiny_model
from tests.support.fake_engines import FakeEngine, continuation
from tests.support.roles import running
from tests.support.suspension import at_each_suspension

PROMPT = list(b"The quick brown fox jumps over the lazy dog")
NUM_TOKENS = 6
ROOT = Path(__file__).resolve().parents[2]
SETTLE_S = 5.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class Watched:
    """A conductor over one prefill and one decode, and what it holds."""

    def __init__(self, cluster) -> None:
        self.cluster = cluster
        self.conductor = cluster.served.conductor
        self.scheduler = self.conductor.scheduler
        self.engines = self.conductor.pipeline._engines
        self.numbers = itertools.count(1)
        self.tasks = asyncio.all_tasks()

    def job(self) -> Job:
        return Job(
            request_id=f"job-{next(self.numbers)}",
            token_ids=PROMPT,
            sampling=Sampling(temperature=0.0, max_tokens=NUM_TOKENS),
            max_tokens=NUM_TOKENS,
        )

    async def prepared(self):
        return await self.scheduler.prepare(
            f"job-{next(self.numbers)}", PROMPT, max_tokens=NUM_TOKENS
        )

    def left(self) -> str:
        """What is held that was not held before, in words; the engines' sides of calls included."""
        state = self.conductor.state
        state.check()
        found = {
            "running": state.counts().num_running,
            "calls": sum(engine.num_active for engine in self.cluster.engines.values()),
            "lines in use": sum(line.num_calls for line in self.engines._lines.values()),
            "placed": [
                each.instance_id
                for each in self.scheduler.view().instances
                if each.num_placed_requests
            ],
            "tasks": [task.get_name() for task in ours(asyncio.all_tasks() - self.tasks)],
        }
        return ", ".join(f"{name}: {value}" for name, value in found.items() if value)

    async def nothing(self) -> None:
        """Fails unless all of that is over soon: the other side of a call is another task."""
        deadline_s = asyncio.get_running_loop().time() + SETTLE_S
        while self.left():
            assert asyncio.get_running_loop().time() < deadline_s, self.left()
            await asyncio.sleep(0.001)


def ours(tasks) -> list[asyncio.Task]:
    """Those that run code of this repository; gRPC and uvicorn have tasks of their own, which come and go."""
    return [task for task in tasks if task is not asyncio.current_task() and _is_ours(task)]


def _is_ours(task) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    if code is None or ".venv" in code.co_filename:
        return False
    return Path(code.co_filename).is_relative_to(ROOT)


@asynccontextmanager
async def watched(model, **settings):
    engines = [FakeEngine("prefill-0"), FakeEngine("decode-0")]
    async with conducting(model, engines, **settings) as cluster:
        found = Watched(cluster)
        await tokens_of(found.conductor.pipeline, found.job())
        await found.nothing()
        found.tasks = asyncio.all_tasks()
        yield found


async def tokens_of(pipeline, job) -> list[int]:
    tokens: list[int] = []
    async with pipeline.run(job) as run:
        async for event in run:
            match event:
                case FirstToken(token_id):
                    tokens.append(token_id)
                case Tokens(token_ids):
                    tokens.extend(token_ids)
                case Finished():
                    pass
    return tokens


async def test_a_job_whose_reader_is_cancelled(model):
    async with watched(model) as found:
        pipeline = found.conductor.pipeline
        num_points = await at_each_suspension(
            lambda: tokens_of(pipeline, found.job()), found.nothing
        )
        assert num_points >= 3
        assert await tokens_of(pipeline, found.job()) == continuation(PROMPT, NUM_TOKENS)


async def test_the_work_of_a_job_and_each_stage_of_it(model):
    async with watched(model) as found:
        pipeline = found.conductor.pipeline

        def new_run() -> Run:
            job = found.job()
            return Run(
                job,
                job.request_id,
                scheduler=found.scheduler,
                engines=found.engines,
                sweeper=pipeline._sweeper,
                clock=SystemClock(),
                limits=RunLimits(),
            )

        async def work():
            run = new_run()
            found.conductor.state.on_request_started(run.id)
            try:
                await run.work()
            finally:
                found.conductor.state.on_request_ended(run.id, run.outcome)

        assert await at_each_suspension(work, found.nothing) >= 2

        async def prefill():
            prepared = await found.prepared()
            async with found.scheduler.placed(prepared.request, Stage.PREFILL) as placed:
                response = await found.engines.prefill(
                    placed.instance,
                    request_id=prepared.request.request_id,
                    log_id="log",
                    prompt=prepared.prompt,
                    sampling=Sampling(max_tokens=NUM_TOKENS),
                    timeout_s=5.0,
                )
            return prepared, response

        async def both_by_hand():
            prepared, response = await prefill()
            async with (
                found.scheduler.placed(prepared.request, Stage.DECODE) as placed,
                found.engines.decode(placed.instance, log_id="log", timeout_s=5.0) as call,
            ):
                await call.start(
                    prepared.request.request_id,
                    prepared.prompt,
                    Sampling(max_tokens=NUM_TOKENS),
                    5.0,
                )
                await call.hand_off(response.handoff)
                while not (await call.read()).finish_reason:
                    pass

        assert await at_each_suspension(both_by_hand, found.nothing) >= 4


async def test_what_waits_for_an_instance(model):
    """Nothing decodes here: who asks waits, until there is an instance or no time left."""
    async with conducting(model, [FakeEngine("prefill-0")], instance_wait_s=0.005) as cluster:
        found = Watched(cluster)
        scheduler = found.scheduler

        async def shape():
            await scheduler.shape()

        async def prepare():
            await found.prepared()

        for make in (shape, prepare):
            assert await at_each_suspension(make, found.nothing, may_raise=(SnowskinError,)) >= 1


async def test_what_the_scheduler_waits_for(model):
    async with watched(model) as found:
        scheduler = found.scheduler
        prepared = await found.prepared()
        shape = prepared.request.shape
        keys = prepared.prompt.block_keys

        async def place():
            async with scheduler.placed(prepared.request, Stage.PREFILL):
                await asyncio.sleep(0)

        calls = {
            "prepare": found.prepared,
            "block_keys": lambda: scheduler.block_keys(PROMPT * 100, shape),
            "locate": lambda: scheduler.locate(shape, keys),
            "probe": lambda: scheduler.probe(shape, keys, timeout_s=0.1),
            "admit": lambda: scheduler.admit(prepared.request),
            "placed": place,
        }
        for name, make in calls.items():
            try:
                await at_each_suspension(make, found.nothing)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


async def test_the_conductors_connections_to_nodes():
    async with running(serve_node, NodeSettings, dram_nbytes=1 << 20, log_level="error") as role:
        address, numbers = role.facts["address"], itertools.count(1)
        tasks = asyncio.all_tasks()
        nodes = Nodes(lambda address: StoreClient.connect(address, client_name="c"), SystemClock())
        keys = KeyColumn.of([bytes([at]) * 32 for at in range(1, 4)])
        namespace = bytes(32)

        async def a_life():
            """Connects, asks in every way, lets go."""
            made = Nodes(
                lambda address: StoreClient.connect(address, client_name=f"c{next(numbers)}"),
                SystemClock(),
            )
            try:
                made.want(address)
                await made.probe([address], namespaces=[namespace], keys=keys, timeout_s=5.0)
                await made.keep_only([])
            finally:
                await asyncio.shield(made.close())

        async def nothing():
            async with asyncio.timeout(SETTLE_S):
                # Whoever lets go shields it: what is closed behind a cancellation ends soon.
                while ours(asyncio.all_tasks() - tasks):  # noqa: ASYNC110  of many tasks
                    await asyncio.sleep(0.001)

        try:
            hit = await nodes.probe([address], namespaces=[namespace], keys=keys, timeout_s=5.0)
            assert not hit[0].error
            tasks = asyncio.all_tasks()
            calls = {
                "probe": lambda: nodes.probe(
                    [address], namespaces=[namespace], keys=keys, timeout_s=5.0
                ),
                "probe for a request": lambda: nodes.probe(
                    [address, "127.0.0.1:1"], namespaces=[namespace], keys=keys
                ),
                "stat": lambda: nodes.stat(address, timeout_s=5.0),
                "discard": lambda: nodes.discard(
                    address, namespace=namespace, keys=keys, tail_id="t", timeout_s=5.0
                ),
            }
            for name, make in calls.items():
                await make()
                num_points = await at_each_suspension(
                    make, nothing_left_of(nodes), may_raise=(NodeUnavailable,)
                )
                assert num_points >= 1, name
        finally:
            await nodes.close()
        tasks = asyncio.all_tasks()
        await at_each_suspension(a_life, nothing)


def nothing_left_of(nodes):
    """A check that its connection still answers, and nobody is kept waiting by an attempt."""

    async def check():
        for address in list(nodes._nodes):
            assert nodes._nodes[address].connecting is None or nodes._nodes[address].client is None

    return check


async def test_a_drain(model):
    async with watched(model) as found:
        pipeline = found.conductor.pipeline
        found.cluster["decode-0"].script.steps.append("hang")
        answering = asyncio.create_task(tokens_of(pipeline, found.job()))
        await found.cluster["decode-0"].busy.wait()

        async def drain():
            await pipeline.drain(0.01)

        async def after():
            assert pipeline.is_draining

        assert await at_each_suspension(drain, after) >= 1
        answering.cancel()
        await asyncio.wait([answering])
        with pytest.raises(ConductorDraining):
            await tokens_of(pipeline, found.job())
        await found.nothing()
