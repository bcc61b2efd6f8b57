"""What the conductor counts is what its users saw: TTFT, TBT and TPOT by their definitions, refusals by why."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from snowskin.engines.conductor.errors import InstanceLost, NoInstanceReady, RequestRefused
from snowskin.engines.conductor.job import JobReport
from snowskin.engines.conductor.metrics import ConductorMetrics
from snowskin.engines.conductor.request import Refusal, RefusalReason
from snowskin.engines.conductor.state import ConductorState, Outcome
from snowskin.kvstore.clock import ManualClock
from snowskin.kvstore.directory.view import DirectoryView
from snowskin.kvstore.messages import Watched
from snowskin.kvstore.metrics import Metrics
from tests.support.clusters import load, registration


class Stage:
    """A conductor's metrics, its clock, and a scrape."""

    def __init__(self):
        self.clock = ManualClock(100.0)
        self.state = ConductorState(suspect_after_s=1.0)
        self.metrics = Metrics("conductor")
        self.directory = DirectoryView()
        self.counts = ConductorMetrics(
            self.metrics,
            self.state,
            lambda: self.state.view(self.clock.now_s()),
            lambda address: self.directory.knowledge(address, self.clock.now_s()),
        )

    def __getitem__(self, key):
        name, *labels = key if isinstance(key, tuple) else (key,)
        text = self.metrics.exposition().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"snowskin_conductor_{name}" and (
                    list(sample.labels.values()) == labels
                ):
                    return sample.value
        raise KeyError(key)


@pytest.fixture
def stage():
    return Stage()


def report(**fields):
    return JobReport(**{"num_prompt_tokens": 100, "num_cached_tokens": 64, **fields})


def test_ttft_counts_from_the_arrival_and_tbt_between_tokens(stage):
    meter = stage.counts.request(stage.clock, arrived_at_s=99.0)
    stage.clock.advance(0.5)
    meter.emitted(1)
    for gap_s in (0.1, 0.3):
        stage.clock.advance(gap_s)
        meter.emitted(1)
    stage.clock.advance(1.0)  # the end of the stream is no token
    meter.ended(Outcome.FINISHED, report(), None)
    assert stage["ttft_seconds_count"] == 1
    assert stage["ttft_seconds_sum"] == pytest.approx(1.5)
    assert stage["tbt_seconds_count"] == 2
    assert stage["tbt_seconds_sum"] == pytest.approx(0.4)
    assert stage["tpot_seconds_sum"] == pytest.approx(0.2)
    assert stage["request_seconds_sum", "finished"] == pytest.approx(2.9)
    assert stage["tokens_generated_total"] == 3


def test_tokens_that_come_together_share_their_gap(stage):
    meter = stage.counts.request(stage.clock, arrived_at_s=100.0)
    meter.emitted(1)
    stage.clock.advance(0.4)
    meter.emitted(4)
    assert stage["tbt_seconds_count"] == 4
    assert stage["tbt_seconds_sum"] == pytest.approx(0.4)
    assert stage["tbt_seconds_bucket", "0.05"] == 0
    assert stage["tbt_seconds_bucket", "0.25"] == 4


def test_an_answer_of_one_token_has_no_tpot(stage):
    meter = stage.counts.request(stage.clock, arrived_at_s=100.0)
    meter.emitted(1)
    meter.ended(Outcome.FINISHED, report(), None)
    assert stage["tpot_seconds_count"] == 0


def test_a_request_that_was_never_prefilled_counts_no_prompt(stage):
    meter = stage.counts.request(stage.clock, arrived_at_s=100.0)
    meter.ended(Outcome.FAILED, report(num_cached_tokens=None), InstanceLost("gone"))
    assert stage["prompt_tokens_total"] == 0
    assert stage["ttft_seconds_count"] == 0
    assert stage["request_seconds_count", "failed"] == 1


def test_prompt_and_cached_tokens_and_retries_are_summed_over_requests(stage):
    for num_cached_tokens in (64, 0):
        meter = stage.counts.request(stage.clock, arrived_at_s=100.0)
        each = report(num_cached_tokens=num_cached_tokens, num_decode_retries=1)
        meter.ended(Outcome.FINISHED, each, None)
    assert stage["prompt_tokens_total"] == 200
    assert stage["tokens_cached_total"] == 64
    assert stage["retries_total", "decode"] == 2
    assert stage["retries_total", "prefill"] == 0


@pytest.mark.parametrize("reason", RefusalReason)
def test_a_refusal_is_counted_by_its_reason(stage, reason):
    assert stage["refusals_total", reason.value] == 0
    refusal = Refusal(reason=reason, message="no", hint="later", retry_after_s=1.0)
    stage.counts.refused(RequestRefused.because(refusal))
    assert stage["refusals_total", reason.value] == 1


def test_nobody_there_is_a_refusal_and_a_lost_instance_is_none(stage):
    stage.counts.refused(NoInstanceReady("none"))
    stage.counts.refused(InstanceLost("gone"))
    assert stage["refusals_total", "no_instance"] == 1


def test_instances_are_counted_by_role_and_state_as_they_are_now(stage):
    for name in ("prefill-0", "prefill-1"):
        stage.state.on_registered(registration(name, address=name), load(), stage.clock.now_s())
    assert stage["instances", "prefill", "ready"] == 2
    assert stage["instances", "decode", "ready"] == 0
    stage.clock.advance(2.0)
    assert stage["instances", "prefill", "ready"] == 0
    assert stage["instances", "prefill", "suspect"] == 2


def test_nodes_are_counted_by_what_the_directory_knows_of_them(stage):
    for name, node in [
        ("prefill-0", "node-0:1"),
        ("prefill-1", "node-1:1"),
        ("decode-0", "node-0:1"),
    ]:
        about = registration(name, address=name, node_address=node)
        stage.state.on_registered(about, load(), stage.clock.now_s())
    assert stage["nodes", "unknown"] == 2
    assert stage["directory_age_seconds"] == 0
    empty = Watched(node_epoch=1, sequence=0, snapshot_begins=True, in_sync=True)
    stage.directory.take("node-0:1", empty, stage.clock.now_s())
    stage.clock.advance(0.5)
    assert stage["nodes", "in_sync"] == 1
    assert stage["nodes", "unknown"] == 1
    assert stage["directory_blocks"] == 0
    assert stage["directory_age_seconds"] == 0.5


async def test_answers_are_counted_by_endpoint_and_a_path_that_users_make_up_is_no_label(stage):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": scope["status"], "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ignore(message):
        pass

    counted = stage.counts.counted(app)
    for path, status in [("/v1/completions", 200), ("/v1/completions", 429), ("/x/y", 404)]:
        await counted({"type": "http", "path": path, "status": status}, None, ignore)
    assert stage["http_responses_total", "/v1/completions", "200"] == 1
    assert stage["http_responses_total", "/v1/completions", "429"] == 1
    assert stage["http_responses_total", "other", "404"] == 1
