"""Where spans go: a collector by OTLP, or a file with one JSON object a line.

Rules kept here: without a setting nothing is imported and nothing runs; a library that is missing,
or a file that cannot be written, is said before the role serves. The file is for tests and small
sites: roles of one host may share it, because a line is appended in one piece. A span that cannot
be exported is lost, with a log line, and the request goes on.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.metrics import own_version
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.tracing import Tracer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

EXPORT_TIMEOUT_S = 2.0

log = get_logger(__name__)


@contextmanager
def open_tracer(
    *, role: str, instance_id: str, endpoint: str = "", file: str = "", ratio: float = 1.0
) -> Iterator[Tracer | None]:
    """The tracer of a process, closed behind the block; None where no setting wants spans.

    Args:
        role: of the process.
        instance_id: its name, for the resource.
        endpoint: of a collector, `http://host:port`, for OTLP over gRPC.
        file: that spans are appended to.
        ratio: share of the requests that are traced, of those whose caller does not say.

    Raises:
        BadSetting: the exporter is not installed, or the file cannot be written.
    """
    if not endpoint and not file:
        yield None
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    processors = []
    if file:
        processors.append(_to_file(file, role))
    if endpoint:
        processors.append(_to_collector(endpoint))
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(ratio)),
        resource=Resource(
            {
                "service.name": f"snowskin-{role}",
                "service.instance.id": instance_id,
                "service.version": own_version(),
            }
        ),
        shutdown_on_exit=False,  # the block does it
    )
    for processor in processors:
        provider.add_span_processor(processor)
    log.info("tracing", endpoint=endpoint, file=file, ratio=ratio)
    try:
        yield Tracer(provider)
    finally:
        provider.shutdown()


def _to_file(path: str, role: str) -> SpanProcessor:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    # Written at once: a role that is killed has told what it did.
    return SimpleSpanProcessor(_file_exporter(path, role))


def _to_collector(endpoint: str) -> SpanProcessor:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise BadSetting(
            f"trace_endpoint is {endpoint!r}, and the OTLP exporter is not installed",
            hint='install it: pip install "snowskin[otlp]"; or use --trace-file',
        ) from error
    exporter = OTLPSpanExporter(
        endpoint=endpoint,
        insecure=not endpoint.startswith("https://"),
        timeout=EXPORT_TIMEOUT_S,
    )
    return BatchSpanProcessor(exporter)


def _file_exporter(path: str, role: str) -> SpanExporter:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadSetting(
            f"trace_file {path} cannot be written: {error.strerror}",
            hint="choose a file in a folder of yours with --trace-file",
        ) from error

    class FileExporter(SpanExporter):
        """Appends spans to the file."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            lines = "".join(json.dumps(span_object(span, role)) + "\n" for span in spans)
            try:
                os.write(descriptor, lines.encode())
            except OSError as error:
                log.warning("spans lost", file=path, num_spans=len(spans), error=str(error))
                return SpanExportResult.FAILURE
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            os.close(descriptor)

    return FileExporter()


def span_object(span: ReadableSpan, role: str) -> dict[str, Any]:
    """A span as it stands in the file; docs/metrics.md names the fields."""
    about = span.get_span_context()
    assert about is not None, "a span that ended has its ids"
    began_ns, ended_ns = span.start_time or 0, span.end_time or 0
    return {
        "trace_id": f"{about.trace_id:032x}",
        "span_id": f"{about.span_id:016x}",
        "parent_id": f"{span.parent.span_id:016x}" if span.parent else "",
        "role": role,
        "instance": str(span.resource.attributes.get("service.instance.id", "")),
        "name": span.name,
        "began_at_s": began_ns / 1e9,
        "seconds": (ended_ns - began_ns) / 1e9,
        "error": span.status.description or "",
        "facts": {
            name.removeprefix("snowskin."): fact for name, fact in (span.attributes or {}).items()
        },
    }
