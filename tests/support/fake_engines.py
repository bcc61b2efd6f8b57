"""Engines without a model: real gRPC servers whose text follows from the tokens, and that fail on demand.

The "model": the token at a position depends on every token before it, so an answer that lost,
repeated or changed one token continues with other text. `Script` says what the next calls do.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from snowskin.engines.errors import InstanceOverloaded
from snowskin.engines.messages import InstanceLoad
from snowskin.kvstore.errors import BadRequest, NodeUnavailable
from snowskin.kvstore.rpc import open_channel, serving
from snowskin.v1 import conductor_pb2, conductor_pb2_grpc, engine_pb2, engine_pb2_grpc
from tests.support.clusters import SHAPE, load

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

LETTERS = b"abcdefghijklmnopqrstuvwxyz"


def next_token(token_ids: Sequence[int]) -> int:
    """What the model says after `token_ids`: a lower-case letter, a byte a token."""
    mixed = 0
    for token_id in token_ids:
        mixed = (mixed * 31 + token_id + 7) % 1_000_003
    return LETTERS[mixed % 26]


def continuation(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The answer of an undisturbed model."""
    tokens = list(token_ids)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(token_ids) :]


@dataclass
class Script:
    """What calls do, one entry a call; when it is empty they do what they should.

    Prefill: "ok", "lost", "full", "refuse", "crash", "hang". Decode: these (before the hand-off),
    and "lost after N", "cut after N" (the stream ends without a finish), "hang after N", "no end"
    (all tokens, then lost).
    """

    steps: deque[str] = field(default_factory=deque)

    def next(self) -> str:
        return self.steps.popleft() if self.steps else "ok"


def _fail(step: str) -> None:
    if step == "lost":
        raise NodeUnavailable("the fake is lost")
    if step == "full":
        raise InstanceOverloaded("the fake is full", retry_after_s=3.0)
    if step == "refuse":
        raise BadRequest("the fake refuses")
    if step == "crash":
        raise RuntimeError("the fake broke")


class FakeEngine(engine_pb2_grpc.EngineServicer):
    """One instance; remembers what it was asked, and whether calls are still under way."""

    def __init__(self, instance_id: str, script: Sequence[str] = ()) -> None:
        self.instance_id = instance_id
        self.role = instance_id.split("-")[0]
        self.script = Script(deque(script))
        self.prefills: list[engine_pb2.PrefillRequest] = []
        self.starts: list[engine_pb2.DecodeStart] = []
        self.num_cached_tokens = 0
        self.num_active = 0
        self.num_cancelled = 0
        self.busy = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.step_s = 0.0
        self.burst = 1  # tokens of one message
        self.end_after: int | None = None  # decode says an end token as that token of the answer
        self.address = ""

    @contextlib.asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        self.num_active += 1
        self.busy.set()
        self.idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_active -= 1
            if not self.num_active:
                self.idle.set()

    async def Prefill(self, request, context):  # noqa: N802
        self.prefills.append(request)
        async with self._call():
            step = self.script.next()
            _fail(step)
            if step == "hang":
                await asyncio.Event().wait()
            tokens = tokens_of(request.prompt)
            first = next_token(tokens)
            return engine_pb2.PrefillResponse(
                handoff=engine_pb2.Handoff(
                    first_token_id=first,
                    position=len(tokens),
                    finish_reason=self._reason(request.sampling, first, 1),
                ),
                stats=engine_pb2.PrefillStats(
                    num_prompt_tokens=len(tokens),
                    num_cached_tokens=self.num_cached_tokens,
                    num_computed_tokens=len(tokens) - self.num_cached_tokens,
                ),
            )

    async def Decode(self, requests, context):  # noqa: N802
        async with self._call():
            message = await anext(requests, None)
            if message is None:  # the caller has gone away
                return
            start = message.start
            self.starts.append(start)
            step = self.script.next()
            _fail(step)
            if step == "hang":
                await asyncio.Event().wait()
            message = await anext(requests, None)
            if message is None:
                return
            handoff = message.handoff
            tokens = [*tokens_of(start.prompt), handoff.first_token_id]
            what, _, after = step.partition(" after ")
            num_left = int(after) if after else -1
            num, reason, unsent = 1, "", []
            while not reason:
                if num_left == 0:
                    _fail(what)
                    if what == "hang":
                        await asyncio.Event().wait()
                    return  # cut
                num_left -= 1
                if self.step_s:
                    await asyncio.sleep(self.step_s)
                num += 1
                token = next_token(tokens)
                if num == self.end_after:
                    token = start.sampling.stop_token_ids[0]
                tokens.append(token)
                reason = self._reason(start.sampling, token, num)
                unsent.append(token)
                if reason or len(unsent) == self.burst:
                    yield engine_pb2.DecodeResponse(token_ids=unsent)
                    unsent.clear()
            if step == "no end":
                _fail("lost")
            yield engine_pb2.DecodeResponse(
                finish_reason=reason,
                stats=engine_pb2.DecodeStats(num_generated_tokens=num - 1),
            )

    def _reason(self, sampling: engine_pb2.SamplingParams, token: int, num: int) -> str:
        if token in sampling.stop_token_ids:
            return "stop"
        return "length" if num >= sampling.max_tokens else ""


def tokens_of(prompt: engine_pb2.Prompt) -> list[int]:
    """Tokens of a prompt on the wire."""
    return list(np.frombuffer(prompt.token_ids, dtype="<u4").tolist())


@contextlib.asynccontextmanager
async def serving_engine(engine: FakeEngine) -> AsyncIterator[FakeEngine]:
    """The fake, on a port of its own."""
    async with serving(
        [(engine_pb2_grpc.add_EngineServicer_to_server, engine)],
        host="127.0.0.1",
        port=0,
        service_names=["snowskin.v1.Engine"],
        role=engine.role,
    ) as server:
        engine.address = server.address
        yield engine


class Registrar:
    """Speaks to a conductor for all fakes: registers, reports."""

    def __init__(self, stub: conductor_pb2_grpc.ConductorStub) -> None:
        self._stub = stub

    async def register(self, engine: FakeEngine, **fields: Any) -> None:
        values: dict[str, Any] = {
            "instance_id": engine.instance_id,
            "instance_epoch": 1,
            "role": engine.role,
            "address": engine.address,
            "namespaces": SHAPE.namespaces,
            "block_size": SHAPE.block_size,
            "block_nbytes": SHAPE.block_nbytes,
            "model_name": "tiny",
            "max_context_tokens": 4096,
            "load": load_message(load()),
        }
        await self._stub.Register(conductor_pb2.RegisterRequest(**{**values, **fields}), timeout=5)

    async def report(self, instance_id: str, *, draining: bool = False, **fields: Any) -> bool:
        response = await self._stub.Report(
            conductor_pb2.ReportRequest(
                instance_id=instance_id,
                instance_epoch=1,
                load=load_message(load(**fields)),
                draining=draining,
            ),
            timeout=5,
        )
        return bool(response.known)


def load_message(values: InstanceLoad) -> engine_pb2.InstanceLoad:
    """An instance's load on the wire."""
    names = InstanceLoad.__dataclass_fields__
    return engine_pb2.InstanceLoad(**{name: getattr(values, name) for name in names})


@contextlib.asynccontextmanager
async def registrar(conductor_address: str) -> AsyncIterator[Registrar]:
    """A registrar for the conductor at this address."""
    channel = open_channel(conductor_address)
    try:
        yield Registrar(conductor_pb2_grpc.ConductorStub(channel))
    finally:
        await channel.close(None)
