"""Calls to instances: one channel for each process, messages in, our own values out.

Rules kept here: a channel belongs to one start of an instance (id and epoch), so that a restarted
one is never reached through a connection that is still backing off; a channel that is in use stays
open until its last call has ended. Whatever ends a call without an answer is `InstanceLost` or the
error that the instance raised; a cancelled call is awaited until gRPC says that it is over.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import numpy as np

from snowskin.engines.conductor.errors import InstanceLost
from snowskin.engines.messages import (
    CachePolicy,
    DecodeOutput,
    DecodeStats,
    Handoff,
    PrefillResponse,
    PrefillStats,
    Prompt,
)
from snowskin.kvstore import tracing
from snowskin.kvstore.rpc import ERROR_HEADER, call_metadata, open_channel, rpc_error_to_error
from snowskin.kvstore.wire import to_ms
from snowskin.v1 import common_pb2, engine_pb2, engine_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator

    from snowskin.engines.conductor.job import Sampling
    from snowskin.engines.conductor.view import InstanceView

_DROPPED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_END: object = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it
_PREFILL_STATS = tuple(PrefillStats.__dataclass_fields__)
_DECODE_STATS = tuple(DecodeStats.__dataclass_fields__)
_HANDOFF = tuple(Handoff.__dataclass_fields__)


def prompt_to(prompt: Prompt) -> engine_pb2.Prompt:
    """The prompt as it travels."""
    return engine_pb2.Prompt(
        token_ids=np.asarray(prompt.token_ids, dtype="<u4").tobytes(),
        block_keys=common_pb2.KeyColumn(
            packed=prompt.block_keys.packed, width=prompt.block_keys.width
        ),
        namespace=prompt.namespace,
        cache_policy=(
            common_pb2.CACHE_POLICY_OFF
            if prompt.cache_policy is CachePolicy.OFF
            else common_pb2.CACHE_POLICY_READ_WRITE
        ),
        node_addresses=prompt.node_addresses,
    )


def _sampling_to(sampling: Sampling) -> engine_pb2.SamplingParams:
    return engine_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=sampling.stop_token_ids,
    )


def _fields(message: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names}


@contextmanager
def _instance_errors(peer: str, is_masked: Callable[[], bool] = bool) -> Iterator[None]:
    """Turns a failed call into what the instance raised; a call that it dropped into InstanceLost.

    A write that meets the end of its call makes gRPC say INTERNAL, whatever the instance said, to a read that waits as
    well: where `is_masked` that is a lost call, too. An asyncio.CancelledError is our own cancellation and passes.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        metadata: Any = error.trailing_metadata()  # pairs; the stubs do not know
        said_why = any(key == ERROR_HEADER for key, _ in metadata or ())
        dropped = (*_DROPPED, grpc.StatusCode.INTERNAL) if is_masked() else _DROPPED
        if error.code() in dropped and not said_why:
            raise InstanceLost(
                f"the call to {peer} broke off ({error.code().name}): {error.details()}",
                hint="look at its log: it may have died, and is tried again when it reports",
            ) from error
        raise rpc_error_to_error(error, peer) from error
    except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
        raise InstanceLost(f"{peer}: the call is over already: {error}") from error


@dataclass(slots=True, kw_only=True)
class _Line:
    """One instance's channel and how many calls use it."""

    channel: grpc.aio.Channel
    num_calls: int = 0
    stub: engine_pb2_grpc.EngineStub = field(init=False)

    def __post_init__(self) -> None:
        self.stub = engine_pb2_grpc.EngineStub(self.channel)


class DecodeCall:
    """One Decode stream: start it, hand off, read outputs until the one with a finish reason."""

    def __init__(self, call: Any, peer: str) -> None:
        """Wraps an open gRPC call to `peer`."""
        self._call = call
        self._peer = peer
        self._write_failed = False

    async def start(
        self, request_id: str, prompt: Prompt, sampling: Sampling, handoff_timeout_s: float
    ) -> None:
        """Lets the instance make room and pull what prefill publishes."""
        start = engine_pb2.DecodeStart(
            request_id=request_id,
            prompt=prompt_to(prompt),
            sampling=_sampling_to(sampling),
            handoff_timeout_ms=to_ms(handoff_timeout_s),
        )
        await self._write(engine_pb2.DecodeRequest(start=start))

    async def hand_off(self, handoff: Handoff) -> None:
        """Lets it generate."""
        message = engine_pb2.Handoff(**_fields(handoff, _HANDOFF))
        await self._write(engine_pb2.DecodeRequest(handoff=message))

    async def read(self) -> DecodeOutput:
        """The next output.

        Raises:
            InstanceLost: the stream ended; or the error that the instance raised.
        """
        with _instance_errors(self._peer, lambda: self._write_failed):
            message = await self._call.read()
        if message is _END:
            raise InstanceLost(f"{self._peer} ended the stream before its finish reason")
        stats = None
        if message.HasField("stats"):
            stats = DecodeStats(**_fields(message.stats, _DECODE_STATS))
        return DecodeOutput(
            token_ids=tuple(message.token_ids), finish_reason=message.finish_reason, stats=stats
        )

    async def _write(self, message: engine_pb2.DecodeRequest) -> None:
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            # The call is over; why, the next read says, where gRPC still knows.
            self._write_failed = True


class EngineClients:
    """All instances that this conductor talks to."""

    def __init__(self) -> None:
        """Connected to none."""
        self._lines: dict[tuple[str, int], _Line] = {}

    async def prefill(
        self,
        instance: InstanceView,
        *,
        request_id: str,
        log_id: str,
        prompt: Prompt,
        sampling: Sampling,
        timeout_s: float,
    ) -> PrefillResponse:
        """Has the instance compute and publish the prompt's KV.

        Args:
            instance: where.
            request_id: of this attempt; names the tail.
            log_id: the user's id of the request, for logs.
            prompt: the whole prompt.
            sampling: how to choose the first token.
            timeout_s: the whole call's budget.
        """
        request = engine_pb2.PrefillRequest(
            request_id=request_id,
            prompt=prompt_to(prompt),
            sampling=_sampling_to(sampling),
            timeout_ms=to_ms(timeout_s),
        )
        async with self._line(instance) as line:
            with tracing.span("prefill", instance=instance.instance_id):
                call = line.stub.Prefill(request, timeout=timeout_s, metadata=call_metadata(log_id))
                with _instance_errors(instance.instance_id):
                    response = await call  # cancelling the wait cancels the call
        return PrefillResponse(
            handoff=Handoff(**_fields(response.handoff, _HANDOFF)),
            stats=PrefillStats(**_fields(response.stats, _PREFILL_STATS)),
        )

    @asynccontextmanager
    async def decode(
        self, instance: InstanceView, *, log_id: str, timeout_s: float
    ) -> AsyncIterator[DecodeCall]:
        """An open Decode stream; leaving the block cancels what is still under way."""
        async with self._line(instance) as line:
            with tracing.span("decode", instance=instance.instance_id):
                call = line.stub.Decode(timeout=timeout_s, metadata=call_metadata(log_id))
                try:
                    yield DecodeCall(call, instance.instance_id)
                finally:
                    await _over(call)

    async def close_all_but(self, known: Collection[tuple[str, int]]) -> None:
        """Closes channels to processes that are gone, unless a call still uses them."""
        for key in [key for key, line in self._lines.items() if not line.num_calls]:
            if key not in known:
                await self._lines.pop(key).channel.close(None)

    async def close(self) -> None:
        """Closes every channel, and with them every call."""
        for key in list(self._lines):
            await self._lines.pop(key).channel.close(None)

    @asynccontextmanager
    async def _line(self, instance: InstanceView) -> AsyncIterator[_Line]:
        key = (instance.instance_id, instance.epoch)
        if key not in self._lines:
            self._lines[key] = _Line(channel=open_channel(instance.address))
        line = self._lines[key]
        line.num_calls += 1
        try:
            yield line
        finally:
            line.num_calls -= 1


async def _over(call: Any) -> None:
    """Cancels a call that is still under way and waits until gRPC is done with it."""
    call.cancel()
    # `code` answers at once after a cancellation: the wait for the instance is not ours.
    await call.code()
