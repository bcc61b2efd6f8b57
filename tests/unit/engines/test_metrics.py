"""What an instance shows: its load as it is, what finished requests cost, and how its nodes answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from snowskin.engines.messages import DecodeStats, PrefillStats
from snowskin.engines.metrics import DecodeMetrics, PrefillMetrics
from snowskin.kvstore.client.guard import NodeGuard
from snowskin.kvstore.metrics import Metrics
from tests.support.clusters import load

PREFILLED = PrefillStats(
    num_prompt_tokens=100,
    num_cached_tokens=64,
    num_computed_tokens=36,
    num_blocks_pulled=4,
    pulled_nbytes=4096,
    num_blocks_published=2,
    published_nbytes=3072,
    num_blocks_corrupt=1,
    queue_s=0.5,
    pull_s=0.25,
    compute_s=1.0,
    publish_s=0.125,
)
DECODED = DecodeStats(
    num_blocks_pulled=6,
    pulled_nbytes=7168,
    pull_s=0.25,
    first_byte_s=0.0,
    handoff_s=1.5,
    num_blocks_published=1,
    published_nbytes=1024,
    num_blocks_corrupt=0,
    num_recomputed_tokens=16,
    num_generated_tokens=39,
)


class Stage:
    """One instance's metrics, and what it says of itself."""

    def __init__(self, role, kind):
        self.role = role
        self.load = load()
        self.instance = SimpleNamespace(
            load=lambda: self.load, num_pull_failures=3, num_publish_failures=2, draining=False
        )
        self.guard = NodeGuard("node", _never, budget_s=0.02)
        self.link = SimpleNamespace(connected=True, guard=self.guard)
        self.metrics = Metrics(role)
        self.counts = kind(self.metrics, self.instance, self.link)

    def __getitem__(self, key):
        name, *labels = key if isinstance(key, tuple) else (key,)
        text = self.metrics.exposition().decode()
        return next(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"snowskin_{self.role}_{name}"
            and list(sample.labels.values()) == labels
        )


async def _never():
    raise AssertionError


@pytest.fixture
def prefill():
    return Stage("prefill", PrefillMetrics)


@pytest.fixture
def decode():
    return Stage("decode", DecodeMetrics)


def test_the_load_is_read_at_the_scrape(prefill):
    prefill.load = load(
        num_waiting=2,
        num_running=1,
        num_waiting_tokens=300,
        num_kv_blocks=1000,
        num_kv_blocks_free=600,
        num_tokens_computed=77,
        num_nodes_silent=1,
        num_silences=5,
        num_calls_late=9,
    )
    assert prefill["requests", "waiting"] == 2
    assert prefill["requests", "running"] == 1
    assert prefill["waiting_tokens"] == 300
    assert prefill["kv_blocks", "free"] == 600
    assert prefill["kv_blocks", "held"] == 400
    assert prefill["tokens_computed_total"] == 77
    assert prefill["pull_failures_total"] == 3
    assert prefill["publish_failures_total"] == 2
    assert prefill["nodes_silent"] == 1
    assert prefill["node_silences_total"] == 5
    assert prefill["node_calls_late_total"] == 9
    prefill.instance.draining = True
    assert prefill["draining"] == 1


def test_what_prompts_cost_is_summed(prefill):
    prefill.counts.finished(PREFILLED)
    prefill.counts.finished(PREFILLED)
    assert prefill["prompt_tokens_total"] == 200
    assert prefill["tokens_cached_total"] == 128
    assert prefill["blocks_pulled_total"] == 8
    assert prefill["pull_bytes_total"] == 8192
    assert prefill["blocks_published_total"] == 4
    assert prefill["publish_bytes_total"] == 6144
    assert prefill["blocks_corrupt_total"] == 2
    for name, seconds in [("queue", 1.0), ("pull", 0.5), ("publish", 0.25)]:
        assert prefill[f"{name}_seconds_count"] == 2
        assert prefill[f"{name}_seconds_sum"] == seconds


def test_what_answers_cost_is_summed_and_no_first_byte_is_no_time(decode):
    decode.counts.finished(DECODED)
    assert decode["tokens_generated_total"] == 39
    assert decode["tokens_recomputed_total"] == 16
    assert decode["pull_bytes_total"] == 7168
    assert decode["handoff_seconds_sum"] == 1.5
    assert decode["first_byte_seconds_count"] == 0


def test_steps_are_observed_as_the_model_takes_them(decode):
    decode.counts.step_s.observe(0.002)
    assert decode["step_seconds_count"] == 1


def test_the_own_nodes_breaker_is_in_one_state(prefill):
    def states():
        return {state: prefill["node_breaker", state] for state in ("closed", "open", "half-open")}

    assert states() == {"closed": 1, "open": 0, "half-open": 0}
    for at_s in range(10):
        prefill.guard.breaker.on_failure(began_at_s=at_s / 10, now_s=at_s / 10 + 0.05)
    assert states() == {"closed": 0, "open": 1, "half-open": 0}
    prefill.guard.breaker.allows()
    assert prefill["node_calls_refused_total"] == 1
    prefill.link.connected = False
    assert prefill["node_connected"] == 0
