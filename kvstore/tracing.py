"""One request's way through all roles, as spans: W3C trace context in, OpenTelemetry out.

Rules kept here:
- A request that is not traced costs one look at a context variable; nothing of it is parsed, sent
  or kept. The SDK of OpenTelemetry is imported by a process that was told where spans go, only.
- A trace begins at the HTTP front, or with who asks there. Every other role continues one that
  comes to it with a call, and begins none; what is not sampled does not travel on.
- Nothing is global: the span of the running task knows the tracer that made it.
- Spans carry counts, sizes, seconds and names of instances; never text, tokens or keys.

    with tracing.span("schedule"):          # a child of the current span; nothing without one
        ...
    @tracing.traced("pull")                 # the same around a coroutine function
    async def pull(...): ...
    tracing.record("queue", seconds=0.2)    # a child that ended now
    tracing.annotate(num_blocks=3)          # facts of the current span
"""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import contextmanager, suppress
from contextvars import Context as TaskContext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from structlog.contextvars import bound_contextvars

from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

TRACEPARENT_HEADER = "traceparent"
TRACESTATE_HEADER = "tracestate"
MAX_TRACEPARENT = 256  # characters; the format has 55, a later one may have more
MAX_TRACESTATE = 512  # characters, as the recommendation says that all must carry

Fact = str | int | float | bool
P = ParamSpec("P")
T = TypeVar("T")

_W3C = TraceContextTextMapPropagator()


class Span:
    """A span under way, and how the next process can continue from it."""

    __slots__ = ("_otel", "_tracer", "traceparent", "tracestate")

    def __init__(self, span: otel.Span, tracer: otel.Tracer) -> None:
        """`tracer` made it, and makes its children."""
        self._otel = span
        self._tracer = tracer
        about = span.get_span_context()
        self.traceparent = f"00-{about.trace_id:032x}-{about.span_id:016x}-01"
        self.tracestate = about.trace_state.to_header()

    @property
    def trace_id(self) -> str:
        """32 hex digits, for log lines."""
        return self.traceparent[3:35]

    def child(self, name: str, facts: dict[str, Fact], *, began_ns: int | None = None) -> Span:
        """A span below this one; it began `began_ns` after 1970, or now."""
        made = self._tracer.start_span(
            name,
            context=otel.set_span_in_context(self._otel),
            attributes=_named(facts),
            start_time=began_ns,
        )
        return Span(made, self._tracer)

    def annotate(self, **facts: Fact) -> None:
        """Adds facts."""
        self._otel.set_attributes(_named(facts))

    def end(self, error: BaseException | None = None, *, ended_ns: int | None = None) -> None:
        """It is over, now or since `ended_ns` after 1970; of an error only its kind is kept."""
        if isinstance(error, asyncio.CancelledError):
            self._otel.set_attribute("snowskin.cancelled", True)
        elif error is not None:
            kind = error.reason if isinstance(error, SnowskinError) else type(error).__name__
            self._otel.set_status(StatusCode.ERROR, kind)
        self._otel.end(ended_ns)


_CURRENT: ContextVar[Span | None] = ContextVar("snowskin_span", default=None)


def _named(facts: dict[str, Fact]) -> dict[str, Fact]:
    return {f"snowskin.{name}": fact for name, fact in facts.items()}


# --- where work is done


def current() -> Span | None:
    """The span of this task; None where its request is not traced."""
    return _CURRENT.get()


def outgoing() -> tuple[tuple[str, str], ...]:
    """Headers that let the peer of a call continue the trace; none where there is none."""
    span = _CURRENT.get()
    if span is None:
        return ()
    parent = ((TRACEPARENT_HEADER, span.traceparent),)
    return (*parent, (TRACESTATE_HEADER, span.tracestate)) if span.tracestate else parent


def of_no_request() -> TaskContext:
    """The context for a task that is begun by one request and serves all that follow.

    Without it the task's lines would bear that request's id, and its calls be part of that
    request's trace, for as long as it runs.
    """
    return TaskContext()


def annotate(**facts: Fact) -> None:
    """Adds facts to the current span, if there is one."""
    span = _CURRENT.get()
    if span is not None:
        span.annotate(**facts)


def record(name: str, *, seconds: float, **facts: Fact) -> None:
    """A child of the current span, if there is one, that took `seconds` and ends now."""
    span = _CURRENT.get()
    if span is not None:
        now_ns = time.time_ns()
        span.child(name, facts, began_ns=now_ns - round(seconds * 1e9)).end(ended_ns=now_ns)


@contextmanager
def span(name: str, **facts: Fact) -> Iterator[None]:
    """A child of the current span around the block; nothing where there is no current one."""
    parent = _CURRENT.get()
    if parent is None:
        yield
        return
    with _current(parent.child(name, facts)):
        yield


def traced(
    name: str,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """As `span`, around every call of a coroutine function."""

    def decorate(
        function: Callable[P, Coroutine[Any, Any, T]],
    ) -> Callable[P, Coroutine[Any, Any, T]]:
        async def in_span(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return await function(*args, **kwargs)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
            traces = _CURRENT.get() is not None
            return in_span(*args, **kwargs) if traces else function(*args, **kwargs)

        return call

    return decorate


@contextmanager
def _current(span: Span) -> Iterator[Span]:
    """Makes it the current one in the block, and ends it."""
    token = _CURRENT.set(span)
    error: BaseException | None = None
    try:
        yield span
    except BaseException as raised:
        error = None if isinstance(raised, GeneratorExit) else raised
        raise
    finally:
        # A generator that nobody finished is closed by the loop, in a context of its own.
        with suppress(ValueError):
            _CURRENT.reset(token)
        span.end(error)


# --- where calls come in


class Tracer:
    """Makes the first span of a call in this process; `span_export.open_tracer` makes it."""

    def __init__(self, provider: otel.TracerProvider) -> None:
        """`provider` knows who samples, and where spans go."""
        self._tracer = provider.get_tracer("snowskin")

    def continued(self, name: str, traceparent: str, tracestate: str, **facts: Fact) -> Span | None:
        """A span below the caller's; None where the caller does not trace, or says nonsense."""
        parent = self._parent(traceparent, tracestate)
        if not otel.get_current_span(parent).get_span_context().trace_flags.sampled:
            return None
        return self._begin(name, parent, facts)

    @contextmanager
    def continuing(
        self, name: str, traceparent: str, tracestate: str, **facts: Fact
    ) -> Iterator[Span | None]:
        """`continued` as the current span of the block."""
        with self._serving(self.continued(name, traceparent, tracestate, **facts)) as begun:
            yield begun

    @contextmanager
    def beginning(
        self, name: str, traceparent: str, tracestate: str, **facts: Fact
    ) -> Iterator[Span | None]:
        """The span of a request from outside around the block; None where it is not sampled.

        A caller that traces has decided that already; for others the setting decides.
        """
        with self._serving(
            self._begin(name, self._parent(traceparent, tracestate), facts)
        ) as begun:
            yield begun

    def _parent(self, traceparent: str, tracestate: str) -> Context:
        carrier = {
            TRACEPARENT_HEADER: traceparent[:MAX_TRACEPARENT],
            TRACESTATE_HEADER: tracestate[:MAX_TRACESTATE],
        }
        # Not the context of this thread: what others traced in this process is none of ours.
        return _W3C.extract(carrier, context=Context())

    def _begin(self, name: str, parent: Context, facts: dict[str, Fact]) -> Span | None:
        made = self._tracer.start_span(
            name, context=parent, kind=SpanKind.SERVER, attributes=_named(facts)
        )
        return Span(made, self._tracer) if made.is_recording() else None

    @contextmanager
    def _serving(self, begun: Span | None) -> Iterator[Span | None]:
        if begun is None:
            yield None
            return
        with bound_contextvars(trace_id=begun.trace_id), _current(begun):
            yield begun
