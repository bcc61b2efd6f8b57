"""Traces: one request is one tree over many processes, and a request that is not traced costs and tells nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import types

import pytest

from snowskin.engines.conductor.daemon import ConductorSettings
from snowskin.kvstore import tracing
from snowskin.kvstore.client.conversation import Conversation
from snowskin.kvstore.errors import BadSetting, PoolExhausted
from snowskin.kvstore.messages import StatRequest
from snowskin.kvstore.span_export import open_tracer
from snowskin.v1 import door_pb2

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = CALLER[:-2] + "00"
NONSENSE = [
    "",
    "x",
    CALLER[:-1],
    CALLER + "0" * 300,
    CALLER.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
    CALLER.replace("b7ad6b7169203331", "0" * 16),
    CALLER.upper().replace("00-", "ff-", 1),
    "00-ä-b-01",
    "\x00" * 55,
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "spans.jsonl"


@pytest.fixture
def tracer(path):
    with open_tracer(role="node", instance_id="node-0", file=str(path)) as opened:
        yield opened


def spans(path):
    """All that were written, by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {span["name"]: span for span in map(json.loads, lines)}


# --- where nothing is traced


def test_without_a_trace_nothing_is_sent_and_every_hook_does_nothing():
    assert tracing.current() is None
    assert tracing.outgoing() == ()
    tracing.annotate(num_blocks=1)
    tracing.record("queue", seconds=1.0)
    with tracing.span("pull"):
        assert tracing.current() is None


async def test_a_traced_function_without_a_trace_is_called_as_it_is():
    @tracing.traced("pull")
    async def pull(number: int, *, more: int) -> int:
        return number + more

    assert await pull(1, more=2) == 3


def test_without_a_setting_there_is_no_tracer():
    with open_tracer(role="node", instance_id="node-0") as opened:
        assert opened is None


def test_a_role_that_does_not_trace_does_not_load_the_sdk():
    code = (
        "import sys, snowskin.kvstore.node.daemon, snowskin.engines.conductor.daemon\n"
        "sys.exit('opentelemetry.sdk' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("said", [*NONSENSE, NOT_SAMPLED])
def test_a_caller_that_does_not_trace_or_says_nonsense_is_not_continued(tracer, path, said):
    assert tracer.continued("call", said, "") is None
    with tracer.continuing("call", said, "a=b") as span:
        assert span is None
        assert tracing.outgoing() == ()
    assert spans(path) == {}


# --- one tree


def test_a_call_is_a_span_below_its_callers_and_what_is_done_in_it_below_that(tracer, path):
    with tracer.continuing("call", CALLER, "", request_id="r"):
        with tracing.span("pull", num_blocks=3):
            tracing.annotate(nbytes=7)
        tracing.record("queue", seconds=0.5, num_waiting=2)
    found = spans(path)
    assert {span["trace_id"] for span in found.values()} == {CALLER[3:35]}
    call = found["call"]
    assert call["parent_id"] == CALLER[36:52]
    assert call["facts"] == {"request_id": "r"}
    assert (call["role"], call["instance"], call["error"]) == ("node", "node-0", "")
    assert found["pull"]["parent_id"] == call["span_id"] == found["queue"]["parent_id"]
    assert found["pull"]["facts"] == {"num_blocks": 3, "nbytes": 7}
    assert found["queue"]["seconds"] == pytest.approx(0.5)
    ended_at_s = found["queue"]["began_at_s"] + found["queue"]["seconds"]
    assert call["began_at_s"] <= ended_at_s <= call["began_at_s"] + call["seconds"]


def test_what_is_sent_on_names_the_current_span_and_keeps_the_state(tracer, path):
    with tracer.continuing("call", CALLER, "vendor=x") as span:
        sent = dict(tracing.outgoing())
        assert span.trace_id == CALLER[3:35]
    call = spans(path)["call"]
    assert sent == {
        "traceparent": f"00-{call['trace_id']}-{call['span_id']}-01",
        "tracestate": "vendor=x",
    }


def test_a_process_that_gets_it_goes_on_with_the_tree(tracer, path, tmp_path):
    other_path = tmp_path / "other.jsonl"
    with (
        open_tracer(role="prefill", instance_id="p", file=str(other_path)) as other,
        tracer.continuing("call", CALLER, ""),
    ):
        sent = dict(tracing.outgoing())
        with other.continuing("work", sent["traceparent"], ""):
            pass
    assert spans(other_path)["work"]["parent_id"] == spans(path)["call"]["span_id"]
    assert spans(other_path)["work"]["role"] == "prefill"


async def test_tasks_that_are_started_in_a_call_belong_to_it(tracer, path):
    @tracing.traced("publish")
    async def publish() -> None:
        await asyncio.sleep(0)

    with tracer.continuing("call", CALLER, ""):
        await asyncio.gather(publish(), publish())
        task = asyncio.create_task(publish())
    await task
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (call,) = [span for span in lines if span["name"] == "call"]
    assert [span["parent_id"] for span in lines if span is not call] == [call["span_id"]] * 3


def test_a_request_without_a_caller_begins_a_trace_at_the_front_only(tracer, path):
    with tracer.beginning("request", "", "") as span:
        assert span is not None
    assert spans(path)["request"]["parent_id"] == ""


@pytest.mark.parametrize(("said", "num_spans"), [("", 0), (CALLER, 1), (NOT_SAMPLED, 0)])
def test_the_ratio_decides_only_where_the_caller_did_not(path, said, num_spans):
    with (
        open_tracer(role="conductor", instance_id="c", file=str(path), ratio=0.0) as tracer,
        tracer.beginning("request", said, "") as span,
    ):
        assert (span is not None) == bool(num_spans)
    assert len(spans(path)) == num_spans


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_is_a_share(ratio):
    with pytest.raises(BadSetting, match="trace_ratio"):
        ConductorSettings(model="m", trace_ratio=ratio)


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (PoolExhausted("pool 0: the prompt was 'canary'"), "POOL_EXHAUSTED"),
        (ValueError("canary"), "ValueError"),
        (asyncio.CancelledError(), ""),
    ],
)
def test_of_an_error_the_kind_is_told_and_not_the_text(tracer, path, raised, error):
    with (
        pytest.raises(type(raised)),
        tracer.continuing("call", CALLER, ""),
        tracing.span("pull"),
    ):
        raise raised
    found = spans(path)
    assert found["pull"]["error"] == found["call"]["error"] == error
    assert found["pull"]["facts"] == ({} if error else {"cancelled": True})
    assert "canary" not in path.read_text()


async def test_a_stream_that_nobody_reads_to_its_end_ends_its_span(tracer, path):
    async def stream():
        with tracer.continuing("stream", CALLER, ""):
            yield 1
            yield 2

    reading = stream()
    assert await anext(reading) == 1
    await asyncio.create_task(reading.aclose())  # in another context, as the loop does
    assert spans(path)["stream"]["error"] == ""


# --- on the door


def test_a_call_on_the_door_carries_the_trace_where_there_is_one(tracer):
    def sent(trace):
        _, data = Conversation().call(StatRequest(), "r", trace)
        return door_pb2.DoorRequest.FromString(data[4:])

    with tracer.continuing("call", CALLER, "vendor=x") as span:
        traced = sent(tracing.outgoing())
    assert traced.traceparent == span.traceparent
    assert traced.tracestate == "vendor=x"
    plain = sent(tracing.outgoing())
    assert (plain.traceparent, plain.tracestate) == ("", "")
    assert len(plain.SerializeToString()) + 50 < len(traced.SerializeToString())


# --- where spans go


def test_roles_may_share_a_file(path):
    with (
        open_tracer(role="node", instance_id="n", file=str(path)) as one,
        open_tracer(role="decode", instance_id="d", file=str(path)) as other,
    ):
        for tracer in (one, other, one):
            tracer.continued("call", CALLER, "").end()
    roles = [json.loads(line)["role"] for line in path.read_text().splitlines()]
    assert roles == ["node", "decode", "node"]


def test_a_file_that_cannot_be_written_is_said_at_once(tmp_path):
    with (
        pytest.raises(BadSetting, match="trace_file"),
        open_tracer(role="node", instance_id="n", file=str(tmp_path)),
    ):
        raise AssertionError


def test_a_collector_without_its_library_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with (
        pytest.raises(BadSetting, match=r"snowskin\[otlp\]"),
        open_tracer(role="node", instance_id="n", endpoint="http://127.0.0.1:4317"),
    ):
        raise AssertionError


@pytest.mark.parametrize(
    ("endpoint", "insecure"), [("http://127.0.0.1:4317", True), ("https://c:4317", False)]
)
def test_a_collector_gets_what_ended(monkeypatch, endpoint, insecure):
    got, made = [], []

    class Exporter:
        def __init__(self, **settings):
            made.append(settings)

        def export(self, spans):
            got.extend(span.name for span in spans)

        def shutdown(self):
            got.append("shut down")

    name = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
    module = types.ModuleType(name)
    module.OTLPSpanExporter = Exporter  # type: ignore[attr-defined]
    parts = name.split(".")
    for end in range(2, len(parts)):
        parent = ".".join(parts[: end + 1])
        if parent != name:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    with open_tracer(role="node", instance_id="n", endpoint=endpoint) as tracer:
        tracer.continued("call", CALLER, "").end()
    assert got == ["call", "shut down"]
    assert (made[0]["endpoint"], made[0]["insecure"]) == (endpoint, insecure)
