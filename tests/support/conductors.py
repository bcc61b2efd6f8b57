"""A real conductor over fake engines, on loopback, for tests of its HTTP and gRPC."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from snowskin.engines.conductor.daemon import ConductorSettings, Serving, serving_conductor
from snowskin.engines.model.random_model import make_random_model
from tests.support.fake_engines import FakeEngine, Registrar, registrar, serving_engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

MODEL_NAME = "tiny"


def make_tiny_model(directory: Path) -> Path:
    """A model directory whose tokenizer makes a byte a token; its weights are never used."""
    make_random_model(
        directory, layers=1, hidden=16, heads=1, kv_heads=1, head_dim=16, intermediate=16
    )
    return directory


@dataclass(kw_only=True)
class Cluster:
    """What a test holds."""

    served: Serving
    http: httpx.AsyncClient
    registrar: Registrar
    engines: dict[str, FakeEngine] = field(default_factory=dict)

    def __getitem__(self, instance_id: str) -> FakeEngine:
        return self.engines[instance_id]

    async def complete(self, prompt: object = "hello", **fields: Any) -> httpx.Response:
        """POST /v1/completions; `headers` goes to the request, everything else into its body."""
        headers = fields.pop("headers", {})
        body = {"model": MODEL_NAME, "prompt": prompt, "temperature": 0, **fields}
        return await self.http.post("/v1/completions", json=body, headers=headers)

    async def check(self) -> None:
        """When what clients have left is over, nothing is under way and nothing is lost."""
        await self.served.conductor.pipeline.drain(5.0)
        state = self.served.conductor.state
        state.check()
        assert state.counts().num_running == 0


@contextlib.asynccontextmanager
async def conducting(
    model: Path, engines: Sequence[FakeEngine] = (), **settings: Any
) -> AsyncIterator[Cluster]:
    """A conductor with these engines registered; suspicion by silence is off, failures are not."""
    values: dict[str, Any] = {
        "model": str(model),
        "model_name": MODEL_NAME,
        "report_interval_s": 30.0,
        "instance_wait_s": 0.2,
        "drain_s": 1.0,
    }
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(serving_engine(engine))
        served = await stack.enter_async_context(
            serving_conductor(ConductorSettings(**{**values, **settings}))
        )
        speaker = await stack.enter_async_context(registrar(served.address))
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://{served.http_address}", timeout=20.0)
        )
        cluster = Cluster(served=served, http=http, registrar=speaker)
        for engine in engines:
            cluster.engines[engine.instance_id] = engine
            await speaker.register(engine)
        yield cluster
        await cluster.check()


def events_of(text: str) -> list[Any]:
    """The data of a stream's events, parsed; the last is "[DONE]" where the stream is whole."""
    assert text.endswith("\n\n")
    data = [each.removeprefix("data: ") for each in text.split("\n\n")[:-1]]
    return [each if each == "[DONE]" else json.loads(each) for each in data]
