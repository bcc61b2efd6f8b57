"""The Engine service: protobuf to messages and back, deadlines, cancellation.

Rules kept here: a message that cannot be understood is refused before anything is done; a call that
ends, however it ends, ends its work; milliseconds become seconds here. The work of a Decode runs in
a task of its own and not in the generator that gRPC iterates, because a generator that nobody
iterates any more is not told.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from snowskin.engines.cancellation import outlast
from snowskin.engines.errors import HandoffMissing
from snowskin.engines.messages import (
    CachePolicy,
    DecodeOutput,
    DecodeStart,
    Handoff,
    InstanceLoad,
    PrefillRequest,
    Prompt,
)
from snowskin.engines.model.sampler import SamplingParams
from snowskin.kvstore.errors import BadRequest, DeadlineExceeded
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.wire import keys_from
from snowskin.v1 import common_pb2, engine_pb2, engine_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from snowskin.engines.decode import DecodeInstance, Emit
    from snowskin.engines.messages import DecodeStats, PrefillStats
    from snowskin.engines.prefill import PrefillInstance

SERVICE_NAME = "snowskin.v1.Engine"
DEFAULT_TIMEOUT_S = 600.0  # for callers that name none
START_TIMEOUT_S = 10.0  # for the first message of a stream, which is one of a bounded number

T = TypeVar("T")
log = get_logger(__name__)


class Instance(Protocol):
    """What both kinds of instance tell."""

    draining: bool

    def load(self) -> InstanceLoad:
        """What the instance is doing now."""


def token_ids_from(packed: bytes) -> tuple[int, ...]:
    """Tokens of a packed column; raises BadRequest where it is not a whole number of them."""
    if len(packed) % 4:
        raise BadRequest(
            f"token_ids has {len(packed)} bytes", hint="pack each token in 4 bytes, little-endian"
        )
    return tuple(np.frombuffer(packed, dtype="<u4").tolist())


def prompt_from(message: engine_pb2.Prompt) -> Prompt:
    """A prompt; raises BadRequest, BadKeyColumn."""
    is_off = message.cache_policy == common_pb2.CACHE_POLICY_OFF
    return Prompt(
        token_ids=token_ids_from(message.token_ids),
        block_keys=keys_from(message.block_keys),
        namespace=message.namespace,
        cache_policy=CachePolicy.OFF if is_off else CachePolicy.READ_WRITE,
        node_addresses=tuple(message.node_addresses),
    )


def sampling_from(message: engine_pb2.SamplingParams) -> SamplingParams:
    """Sampling parameters; raises BadSamplingParams."""
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        max_tokens=message.max_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
    )


def load_to(load: InstanceLoad) -> engine_pb2.InstanceLoad:
    """The load as it travels."""
    return engine_pb2.InstanceLoad(**asdict(load))


def _handoff_from(message: engine_pb2.Handoff) -> Handoff:
    return Handoff(
        first_token_id=message.first_token_id,
        position=message.position,
        tail_nbytes=message.tail_nbytes,
        node_address=message.node_address,
        finish_reason=message.finish_reason,
    )


def _output_to(output: DecodeOutput) -> engine_pb2.DecodeResponse:
    return engine_pb2.DecodeResponse(
        token_ids=output.token_ids,
        finish_reason=output.finish_reason,
        stats=engine_pb2.DecodeStats(**asdict(output.stats)) if output.stats else None,
    )


class EngineService(engine_pb2_grpc.EngineServicer):
    """One instance's service; it prefills or decodes, and refuses the other."""

    def __init__(
        self,
        instance_id: str,
        *,
        prefill: PrefillInstance | None = None,
        decode: DecodeInstance | None = None,
        is_node_connected: Callable[[], bool],
        on_finished: Callable[[PrefillStats | DecodeStats], None] | None = None,
    ) -> None:
        """Exactly one of `prefill` and `decode`; `on_finished` is told what a request cost."""
        assert (prefill is None) != (decode is None), "an instance has one role"
        self._instance_id = instance_id
        self._prefill = prefill
        self._decode = decode
        self._is_node_connected = is_node_connected
        self._on_finished = on_finished
        self._decodes: set[asyncio.Task[None]] = set()

    async def Prefill(  # noqa: N802  named by the wire
        self, request: engine_pb2.PrefillRequest, context: Any
    ) -> engine_pb2.PrefillResponse:
        """Computes a prompt; gRPC cancels this call's task when the caller is gone."""
        if self._prefill is None:
            raise self._wrong_role("prefill")
        work = self._prefill.prefill(
            PrefillRequest(
                request_id=request.request_id,
                prompt=prompt_from(request.prompt),
                sampling=sampling_from(request.sampling),
            )
        )
        response = await _within(work, request.timeout_ms / 1000 or DEFAULT_TIMEOUT_S)
        log.info("prompt computed", **_facts(response.stats))
        if self._on_finished is not None:
            self._on_finished(response.stats)
        return engine_pb2.PrefillResponse(
            handoff=engine_pb2.Handoff(**asdict(response.handoff)),
            stats=engine_pb2.PrefillStats(**asdict(response.stats)),
        )

    async def Decode(  # noqa: N802  named by the wire
        self, request_iterator: AsyncIterator[engine_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[engine_pb2.DecodeResponse]:
        """Generates; the first message is `start`, the second `handoff`."""
        if self._decode is None:
            raise self._wrong_role("decode")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                start = await _read_start(request_iterator)
        except TimeoutError:
            raise DeadlineExceeded(
                f"a Decode stream without its start for {START_TIMEOUT_S:.0f} s",
                hint="send start as soon as the stream is open",
            ) from None
        # Bounded by the answer's length: a caller that reads slowly delays nobody else.
        outputs: asyncio.Queue[DecodeOutput | None] = asyncio.Queue()
        left_s = context.time_remaining()
        timeout_s = DEFAULT_TIMEOUT_S if left_s is None else left_s
        work = asyncio.create_task(
            self._run_decode(self._decode, start, request_iterator, outputs, timeout_s),
            name=f"decode {start.request_id}",
        )
        self._decodes.add(work)
        work.add_done_callback(self._decodes.discard)
        context.add_done_callback(lambda _context: work.cancel())
        try:
            while (output := await outputs.get()) is not None:
                if output.stats is not None:
                    self._note_decoded(output.stats, output.finish_reason)
                yield _output_to(output)
            await work  # raises what went wrong
        finally:
            work.cancel()
            await outlast(asyncio.wait([work]))

    async def Status(  # noqa: N802  named by the wire
        self, request: engine_pb2.StatusRequest, context: Any
    ) -> engine_pb2.StatusResponse:
        """What the instance is doing."""
        instance = self._instance
        return engine_pb2.StatusResponse(
            instance_id=self._instance_id,
            role=self._role,
            load=load_to(instance.load()),
            draining=instance.draining,
            node_connected=self._is_node_connected(),
        )

    async def close(self) -> None:
        """Ends decodes whose callers were not told yet; after the server has stopped."""
        works = list(self._decodes)
        for work in works:
            work.cancel()
        if works:
            await outlast(asyncio.wait(works))

    def _note_decoded(self, stats: DecodeStats, finish_reason: str) -> None:
        log.info("answer finished", finish_reason=finish_reason, **_facts(stats))
        if self._on_finished is not None:
            self._on_finished(stats)

    @property
    def _role(self) -> str:
        return "prefill" if self._prefill is not None else "decode"

    @property
    def _instance(self) -> Instance:
        instance = self._prefill or self._decode
        assert instance is not None, "an instance has one role"
        return instance

    def _wrong_role(self, asked: str) -> BadRequest:
        return BadRequest(
            f"{self._instance_id} is a {self._role} instance, asked to {asked}",
            hint=f"send this to a {asked} instance",
        )

    async def _run_decode(
        self,
        decode: DecodeInstance,
        start: DecodeStart,
        requests: AsyncIterator[engine_pb2.DecodeRequest],
        outputs: asyncio.Queue[DecodeOutput | None],
        timeout_s: float,
    ) -> None:
        handoff: asyncio.Future[Handoff] = asyncio.get_running_loop().create_future()
        reading = asyncio.create_task(_read_handoff(requests, handoff))
        emit: Emit = outputs.put
        try:
            await _within(decode.decode(start, handoff, emit), timeout_s)
        finally:
            reading.cancel()
            await outlast(asyncio.wait([reading]))
            handoff.cancel()
            outputs.put_nowait(None)


def _facts(stats: PrefillStats | DecodeStats) -> dict[str, int | float]:
    """What a request cost, for its log line."""
    return {name: round(fact, 4) for name, fact in asdict(stats).items()}


async def _within(work: Awaitable[T], timeout_s: float) -> T:
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            return await work
    except TimeoutError:
        if not deadline.expired():
            raise
        raise DeadlineExceeded(
            f"not done within {timeout_s:.3f} s", hint="send it with a longer timeout, or elsewhere"
        ) from None


async def _read_start(requests: AsyncIterator[engine_pb2.DecodeRequest]) -> DecodeStart:
    async for request in requests:
        if request.WhichOneof("message") != "start":
            break
        start = request.start
        return DecodeStart(
            request_id=start.request_id,
            prompt=prompt_from(start.prompt),
            sampling=sampling_from(start.sampling),
            handoff_timeout_s=start.handoff_timeout_ms / 1000 or DEFAULT_TIMEOUT_S,
        )
    raise BadRequest("a Decode stream that does not begin with start", hint="send start first")


async def _read_handoff(
    requests: AsyncIterator[engine_pb2.DecodeRequest], handoff: asyncio.Future[Handoff]
) -> None:
    async for request in requests:
        if request.WhichOneof("message") != "handoff":
            break
        handoff.set_result(_handoff_from(request.handoff))
        return
    handoff.set_exception(
        HandoffMissing("the Decode stream ended before its hand-off", hint="send it after start")
    )
