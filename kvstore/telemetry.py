"""What a process says about itself: one-line logs with the request's id, `/healthz`, `/metrics`.

Rules kept here: one fact is one line on stderr, with time (UTC), role, level, event and fields; the
request's id is bound once and is on every line of its context; prompts and secrets are never
written; nothing here takes signals, and a server's socket is gone when its block is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, TextIO, get_args

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from snowskin.kvstore.config import LogLevel, check_bind
from snowskin.kvstore.errors import AddressInUse, BadSetting
from snowskin.kvstore.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from types import TracebackType

    from starlette.requests import Request
    from starlette.types import ASGIApp
    from structlog.typing import EventDict, Processor, WrappedLogger

    from snowskin.kvstore.metrics import Metrics

LEVELS: tuple[str, ...] = get_args(LogLevel)
FIRST_FIELDS = ("time", "role", "level", "event", "request_id")
# What a user said or proved with; as field names, so that a line can still say how many tokens.
NEVER_WRITTEN = frozenset(
    {"authorization", "capability", "messages", "password", "prompt", "salt", "secret", "text"}
    | {"api_key", "cache_salt", "token", "token_ids"}
)
# Libraries that log a line per connection at INFO.
CHATTY = ("uvicorn", "grpc", "asyncio", "httpx", "httpcore")
HEALTH_GRACE_S = 1.0
BACKLOG = 1024
DATE_INTERVAL_S = 1.0
STOP_LOOK_S = 0.005

Logger = structlog.stdlib.BoundLogger
HealthCheck = Callable[[], tuple[bool, Mapping[str, object]]]


def _without_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key in NEVER_WRITTEN.intersection(event):
        event[key] = "[not logged]"
    return event


def _printable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escapes what could break a line or steer a terminal; the renderer escapes newlines itself."""
    for key, value in event.items():
        if isinstance(value, bool | int | float | None):
            continue
        text = str(value)
        if not text.isprintable():
            text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
        event[key] = text
    return event


def _shared_processors(role: str) -> list[Processor]:
    def with_role(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["role"] = role
        return event

    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        with_role,
        structlog.processors.format_exc_info,
        _without_secrets,
    ]


def _route_through_logging() -> None:
    """Sends structlog through the standard library, so that there is one handler and one level."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


# At import: a process that never configures logging (a library user, kvctl) must not find our lines
# on stdout, which is where structlog prints by default.
_route_through_logging()


def configure_logging(
    role: str, level: str = "info", *, json: bool = False, stream: TextIO | None = None
) -> None:
    """Makes every logger of the process write one line per fact to `stream` (stderr).

    Raises:
        BadSetting: an unknown level.
    """
    if level not in LEVELS:
        raise BadSetting(f"log level {level!r} is unknown", hint=f"one of {', '.join(LEVELS)}")
    renderer: Processor
    if json:
        renderer = structlog.processors.JSONRenderer(default=str)
    else:
        renderer = structlog.processors.LogfmtRenderer(
            key_order=FIRST_FIELDS, drop_missing=True, bool_as_flag=False
        )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
            processors=[
                *_shared_processors(role),
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *([] if json else [_printable]),
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in CHATTY:
        logging.getLogger(name).setLevel("DEBUG" if level == "debug" else "WARNING")


def get_logger(name: str) -> Logger:
    """The logger of a module: `log.warning("lease expired", lease=..., extent=...)`."""
    logger: Logger = structlog.stdlib.get_logger(name)
    return logger


@contextlib.contextmanager
def bind_request(request_id: str) -> Iterator[None]:
    """Puts `request_id` on every line logged in this context and in the tasks started from it."""
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        yield


def bound_request() -> str:
    """The id that `bind_request` has put on lines of this context; "" where it has not."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


class _QuietServer(uvicorn.Server):
    """uvicorn without signal handlers, which starts and stops by events instead of looking ten times a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Stops accepting and lets what is under way finish."""
        self.should_exit = True
        self._ending.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # 0: the tick that renews the Date header, once a second
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DATE_INTERVAL_S):
                    await self._ending.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()  # at once where it is idle, after its answer where it is not
        try:
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                # There is no event for the last connection; it has none to wait for in most cases.
                while state.connections or state.tasks:  # noqa: ASYNC110
                    await asyncio.sleep(STOP_LOOK_S)
        except TimeoutError:
            for task in state.tasks:
                task.cancel()


async def listen(host: str, port: int) -> socket.socket:
    """A TCP socket that listens on `host`:`port`; port 0 takes a free one.

    Raises:
        AddressInUse: another process listens there.
        BadSetting: the address is not this host's, unknown, or not allowed.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BadSetting(
            f"{host!r} is not an address: {error}", hint="give an IP address"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"{host}:{port} is taken", hint="stop who listens there, or choose another port"
            ) from error
        raise BadSetting(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint="give an address of this host and a port that this user may open",
        ) from error
    return listener


@asynccontextmanager
async def serve_app(
    app: ASGIApp, host: str, port: int, *, insecure: bool = False, grace_s: float = 5.0
) -> AsyncIterator[int]:
    """Serves an ASGI app inside the running loop while the block lasts; yields the port.

    On leaving, no new connection is taken, and requests under way get `grace_s` seconds before they
    are cancelled. The app's lifespan is not run: what it needs is opened by whoever serves it.

    Raises:
        InsecureAddress: beyond loopback without `insecure`.
        AddressInUse, BadSetting: as `listen`.
    """
    check_bind(host, insecure=insecure)
    listener = await listen(host, port)
    server = _QuietServer(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,  # ours: see configure_logging
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(grace_s),
        )
    )
    bound_port: int = listener.getsockname()[1]
    serving = asyncio.create_task(server.serve(sockets=[listener]), name=f"http:{bound_port}")
    serving.add_done_callback(lambda _task: server.accepting.set())
    try:
        await server.accepting.wait()
        if serving.done():
            serving.result()  # raises what stopped it
        yield bound_port
    finally:
        server.end()
        try:
            await asyncio.wait([serving], timeout=math.ceil(grace_s) + 1.0)
        finally:
            # Only after a second cancellation, or if uvicorn overruns: no socket stays behind.
            serving.cancel()
            for inner in getattr(server, "servers", []):
                inner.close()
            listener.close()
    await asyncio.wait([serving], timeout=1.0)
    if serving.done() and not serving.cancelled():
        serving.result()


def metrics_response(metrics: Metrics) -> Response:
    """The answer to a scrape."""
    return Response(metrics.exposition(), media_type=CONTENT_TYPE)


class HealthServer:
    """`/healthz` of a process: 200 while `check` says true, else 503; the facts as JSON.

    Beside it `/metrics`, where there are some. `check` is called in the loop and must not wait.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        check: HealthCheck,
        metrics: Metrics | None = None,
        insecure: bool = False,
    ) -> None:
        self._host = host
        self._port = port
        self._check = check
        self._metrics = metrics
        self._insecure = insecure
        self._stack = AsyncExitStack()

    @property
    def port(self) -> int:
        """The port that it listens on; known inside the block."""
        return self._port

    async def __aenter__(self) -> HealthServer:
        """Listens; raises as `serve_app`."""
        routes = [Route("/healthz", self._answer, methods=["GET"])]
        if (metrics := self._metrics) is not None:

            async def scrape(_request: Request) -> Response:
                return metrics_response(metrics)

            routes.append(Route("/metrics", scrape, methods=["GET"]))
        app = Starlette(routes=routes)
        self._port = await self._stack.enter_async_context(
            serve_app(app, self._host, self._port, insecure=self._insecure, grace_s=HEALTH_GRACE_S)
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops listening."""
        await self._stack.aclose()

    async def _answer(self, _request: Request) -> JSONResponse:
        healthy, facts = self._check()
        return JSONResponse({"ok": healthy, **facts}, status_code=200 if healthy else 503)
