"""gRPC as every role uses it: one server factory, one channel factory, one way that errors cross.

Rules kept here: a `SnowskinError` raised by a servicer reaches the caller as the same class (status, and an
`ErrorDetail` in the trailing metadata); anything else becomes INTERNAL and is logged. Every server answers the
gRPC health protocol and bounds messages and headers. Every channel notices a silent peer: keepalive pings alone
do not, only with `grpc.http2.ping_timeout_ms` (measured: 2 s instead of never).
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from snowskin.kvstore.errors import (
    AddressInUse,
    BadRequest,
    DeadlineExceeded,
    LimitExceeded,
    NodeUnavailable,
)
from snowskin.kvstore.metrics import CALL_S
from snowskin.kvstore.telemetry import bind_request, get_logger
from snowskin.kvstore.tracing import TRACEPARENT_HEADER, TRACESTATE_HEADER, outgoing
from snowskin.kvstore.wire import detail_to_error, error_to_detail
from snowskin.transport.errors import SnowskinError
from snowskin.v1 import common_pb2

if TYPE_CHECKING:
    from snowskin.kvstore.metrics import Histogram, Metrics
    from snowskin.kvstore.tracing import Tracer

REQUEST_ID_HEADER = "x-request-id"
CLIENT_HEADER = "x-snowskin-client"
ERROR_HEADER = "snowskin-error-bin"
STOP_GRACE_S = 2.0
RPC_HELP = "Seconds of gRPC calls to this role, from the first message in to the last one out."
RPC_LABELS = ("method", "status")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcLimits:
    """What a server accepts before it allocates anything."""

    max_message_nbytes: int = 8 << 20
    max_header_nbytes: int = 32 << 10
    max_concurrent_calls: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcServer:
    """A serving gRPC server and where it listens."""

    server: grpc.aio.Server
    host: str
    port: int
    checker: Any  # grpc_health's servicer; not in the stubs

    @property
    def address(self) -> str:
        """`host:port`, as a channel wants it."""
        return f"{self.host}:{self.port}"

    async def say_draining(self) -> None:
        """Answers the health protocol with NOT_SERVING from now on; calls are served still."""
        await self.checker.enter_graceful_shutdown()


def _keepalive() -> list[tuple[str, int]]:
    return [
        ("grpc.keepalive_time_ms", 5_000),
        ("grpc.keepalive_timeout_ms", 2_000),
        ("grpc.http2.ping_timeout_ms", 2_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ]


def channel_options(limits: RpcLimits | None = None) -> list[tuple[str, int]]:
    """Options of every channel; blocking clients need the same."""
    limits = limits or RpcLimits()
    return [
        *_keepalive(),
        ("grpc.max_receive_message_length", limits.max_message_nbytes),
        ("grpc.max_send_message_length", limits.max_message_nbytes),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Processes restart on the address they had; a shared subchannel would still be backing off.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def open_channel(address: str, limits: RpcLimits | None = None) -> grpc.aio.Channel:
    """A channel to `host:port`; connects lazily, the caller closes it."""
    return grpc.aio.insecure_channel(address, options=channel_options(limits))


def call_metadata(request_id: str, *, client: str = "") -> tuple[tuple[str, str], ...]:
    """Metadata that carries the request's id, who calls, and the trace that the call is part of; may be empty."""
    named = ((REQUEST_ID_HEADER, request_id),) if request_id else ()
    if client:
        named = (*named, (CLIENT_HEADER, client))
    return (*named, *outgoing())


def header_text(text: str) -> str:
    """`text` as a metadata value, which is printable ASCII."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text).strip()


def rpc_error_to_error(error: grpc.RpcError, peer: str) -> SnowskinError:
    """The typed error behind a failed call."""
    call = cast("grpc.aio.AioRpcError", error)
    trailing = cast("Iterable[tuple[str, str | bytes]]", call.trailing_metadata() or ())
    for key, value in trailing:
        if key == ERROR_HEADER and isinstance(value, bytes):
            detail = common_pb2.ErrorDetail()
            try:
                detail.ParseFromString(value)
            except Exception:  # noqa: BLE001  a peer's garbage must not hide the status
                break
            return detail_to_error(detail)
    code, text = call.code(), call.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{peer} did not answer in time: {text}")
    if code is grpc.StatusCode.UNAVAILABLE:
        return NodeUnavailable(
            f"{peer} cannot be reached: {text}", hint="check that it runs and its address is right"
        )
    kind = _BY_STATUS.get(code, SnowskinError)
    return kind(f"{peer} answered {code.name}: {text}")


_BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: BadRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,
}


@contextmanager
def translating(peer: str) -> Iterator[None]:
    """Turns a failed call inside the block into the error that the peer raised."""
    try:
        yield
    except grpc.RpcError as error:
        raise rpc_error_to_error(error, peer) from error


def _status(error: SnowskinError) -> grpc.StatusCode:
    return grpc.StatusCode.__members__.get(error.status, grpc.StatusCode.INTERNAL)


async def _abort(context: Any, error: Exception, method: str) -> None:
    if isinstance(error, SnowskinError):
        log.info("call refused", method=method, reason=error.reason, error=str(error))
        context.set_trailing_metadata(((ERROR_HEADER, error_to_detail(error).SerializeToString()),))
        await context.abort(_status(error), str(error))
    log.error("rpc failed unexpectedly", method=method, error=repr(error), exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"{method}: {type(error).__name__}")


Behaviour = Callable[[Any, Any], Any]


class _Border(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Binds the request's id to the logs, continues its trace, and turns errors into statuses."""

    def __init__(self, latency: Histogram | None, tracer: Tracer | None) -> None:
        self._latency = latency
        self._tracer = tracer

    async def intercept_service(  # type: ignore[override]  # the stubs' handler is narrower than grpc's
        self,
        continuation: Callable[..., Coroutine[Any, Any, Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata or ())
        request_id = str(metadata.get(REQUEST_ID_HEADER, ""))[:128]
        wrap = self._stream if handler.response_streaming else self._unary
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(getattr(handler, kind), method, request_id, metadata),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(
        self, behaviour: Behaviour, method: str, request_id: str, metadata: Mapping[str, Any]
    ) -> Behaviour:
        @functools.wraps(behaviour)
        async def call(request: Any, context: Any) -> Any:
            with bind_request(request_id):
                try:
                    with self._watched(method, metadata):
                        return await behaviour(request, context)
                except (asyncio.CancelledError, grpc.aio.AbortError):
                    raise
                except Exception as error:  # noqa: BLE001  the border: everything becomes a status
                    return await _abort(context, error, method)

        return call

    def _stream(
        self, behaviour: Behaviour, method: str, request_id: str, metadata: Mapping[str, Any]
    ) -> Behaviour:
        @functools.wraps(behaviour)
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            with bind_request(request_id):
                try:
                    with self._watched(method, metadata):
                        async for response in behaviour(request, context):
                            yield response
                except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
                    raise
                except Exception as error:  # noqa: BLE001  the border: everything becomes a status
                    await _abort(context, error, method)

        return call

    @contextmanager
    def _watched(self, method: str, metadata: Mapping[str, Any]) -> Iterator[None]:
        """Measures the call, and makes it a span of the caller's trace, if there is one."""
        name = method.rpartition(".")[2]  # of "/snowskin.v1.Store/Match" the end
        began_s, status = time.perf_counter(), "OK"
        parent = metadata.get(TRACEPARENT_HEADER) if self._tracer is not None else None
        state = str(metadata.get(TRACESTATE_HEADER, ""))
        try:
            if self._tracer is None or not parent:
                yield
            else:
                with self._tracer.continuing(name, str(parent), state):
                    yield
        except (asyncio.CancelledError, GeneratorExit):
            status = "CANCELLED"
            raise
        except SnowskinError as error:
            status = error.status
            raise
        except Exception:
            status = "INTERNAL"
            raise
        finally:
            if self._latency is not None:
                self._latency.observe(time.perf_counter() - began_s, name, status)


Registration = tuple[Callable[[Any, grpc.aio.Server], None], Any]


@asynccontextmanager
async def serving(
    services: Sequence[Registration],
    *,
    host: str,
    port: int,
    service_names: Sequence[str],
    role: str,
    limits: RpcLimits | None = None,
    metrics: Metrics | None = None,
    tracer: Tracer | None = None,
) -> AsyncIterator[RpcServer]:
    """Serves `services` until the block ends; port 0 takes a free one.

    Args:
        services: pairs of a generated `add_XServicer_to_server` and the servicer.
        host: address to listen on; the caller has checked that it may (`config.check_bind`).
        port: TCP port, or 0.
        service_names: full names that the health protocol answers for, besides "".
        role: for the messages.
        limits: sizes and counts accepted.
        metrics: get the calls' seconds.
        tracer: continues the traces of calls that are part of one.

    Raises:
        AddressInUse: another process listens there.
    """
    limits = limits or RpcLimits()
    latency = (
        metrics.histogram("rpc_seconds", RPC_HELP, RPC_LABELS, bounds=CALL_S) if metrics else None
    )
    server = grpc.aio.server(
        interceptors=[_Border(latency, tracer)],
        maximum_concurrent_rpcs=limits.max_concurrent_calls,
        options=[
            *_keepalive(),
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.max_message_nbytes),
            ("grpc.max_send_message_length", limits.max_message_nbytes),
            ("grpc.max_metadata_size", limits.max_header_nbytes),
            ("grpc.absolute_max_metadata_size", 2 * limits.max_header_nbytes),
        ],
    )
    for add, servicer in services:
        add(servicer, server)
    checker: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    for name in ("", *service_names):
        await checker.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        bound = 0
    if bound == 0:
        await server.stop(0)
        raise AddressInUse(
            f"{role}: port {port} on {host} cannot be taken",
            hint="stop what listens there, or choose another port with --port (0 takes a free one)",
        )
    await server.start()
    serving_server = RpcServer(server=server, host=host, port=bound, checker=checker)
    try:
        yield serving_server
    finally:
        await serving_server.say_draining()
        await server.stop(STOP_GRACE_S)
