"""Refusals: which limit, with which numbers, and when to come back."""

from __future__ import annotations

import pytest

from snowskin.engines.conductor.admission import (
    MAX_RETRY_S,
    MIN_RETRY_S,
    AdmissionLimits,
    admit,
    check_context,
)
from snowskin.engines.conductor.cost_model import CostModel
from snowskin.engines.conductor.request import Accept, Defer, Refusal, RefusalReason
from snowskin.engines.conductor.view import InstanceState
from snowskin.engines.errors import PromptTooLong
from tests.support.clusters import SHAPE, instance, load, request, view

COST = CostModel(prefill_tokens_per_s=100.0)
DECODE = instance("decode-0")


def decided(cluster, wanted=None, **limits):
    return admit(wanted or request(), cluster, limits=AdmissionLimits(**limits), cost_model=COST)


def test_an_idle_cluster_accepts():
    assert decided(view(instance("prefill-0"), DECODE)) == Accept()


def test_one_request_more_than_the_limit_is_refused():
    cluster = (instance("prefill-0"), DECODE)
    assert decided(view(*cluster, num_requests=4), max_requests=4) == Accept()
    refusal = decided(view(*cluster, num_requests=5), max_requests=4)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is RefusalReason.TOO_MANY_REQUESTS
    assert "4 requests are in flight" in refusal.message
    assert refusal.retry_after_s >= MIN_RETRY_S


def test_a_long_queue_refuses_and_says_when_it_is_done():
    busy = instance("prefill-0", load=load(num_waiting_tokens=500))
    refusal = decided(view(busy, DECODE), max_waiting_tokens=599)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is RefusalReason.QUEUE_TOO_LONG
    assert "500" in refusal.message
    assert refusal.retry_after_s == pytest.approx(5.0)
    assert decided(view(busy, DECODE), max_waiting_tokens=600) == Accept()


def test_an_empty_queue_refuses_no_prompt_for_its_length_alone():
    long = request(num_tokens=10_000)
    assert (
        decided(view(instance("prefill-0"), DECODE), long, max_waiting_tokens=10, max_ttft_s=1e9)
        == Accept()
    )


def test_the_best_instances_estimate_decides_about_ttft():
    busy = instance("prefill-0", load=load(num_waiting_tokens=10_000))
    idle = instance("prefill-1")
    assert decided(view(busy, idle, DECODE), max_ttft_s=1.0) == Accept()
    refusal = decided(view(busy, DECODE), max_ttft_s=1.0)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is RefusalReason.TTFT_TOO_LONG
    assert "101.0 s" in refusal.message
    assert refusal.retry_after_s == MAX_RETRY_S


@pytest.mark.parametrize("state", [InstanceState.SUSPECT, InstanceState.DRAINING])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_role_without_a_ready_instance_defers(role, state):
    cluster = {each: instance(f"{each}-0") for each in ("prefill", "decode")}
    cluster[role] = instance(f"{role}-0", state=state)
    assert decided(view(*cluster.values())) == Defer(message=f"no {role} instance is ready")


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({"max_context_tokens": 109}, {}),
        ({}, {"max_context_tokens": 109}),
        ({}, {"load": load(num_kv_blocks=6)}),
        ({"load": load(num_kv_blocks=6)}, {}),
    ],
)
def test_what_no_instance_can_hold_is_too_long(prefill, decode):
    cluster = view(instance("prefill-0", **prefill), instance("decode-0", **decode))
    with pytest.raises(PromptTooLong, match="100 tokens"):
        check_context(100, 10, cluster, SHAPE)


def test_exactly_the_limit_fits():
    cluster = view(
        instance("prefill-0", max_context_tokens=110, load=load(num_kv_blocks=7)),
        instance("decode-0", load=load(num_kv_blocks=7)),
    )
    check_context(100, 10, cluster, SHAPE)
