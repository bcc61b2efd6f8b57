"""Estimates: each term from what the instance reports, or from a stated default."""

from __future__ import annotations

import pytest

from snowskin.engines.conductor.cost_model import CostModel
from tests.support.clusters import SHAPE, instance, load, request

MODEL = CostModel(prefill_tokens_per_s=1000.0, pull_bytes_per_s=1e9, pull_fixed_s=0.5)


def test_an_unmeasured_idle_instance_costs_the_default_prefill():
    found = MODEL.estimate(request(num_tokens=100), instance("prefill-0"))
    assert (found.transfer_s, found.queue_s) == (0.0, 0.0)
    assert found.ttft_s == found.prefill_s == pytest.approx(0.1)


def test_measured_rates_replace_the_defaults():
    measured = instance(
        "prefill-0",
        load=load(prefill_tokens_per_s=200.0, pull_bytes_per_s=SHAPE.block_nbytes * 4.0),
    )
    found = MODEL.estimate(request(num_tokens=100, cached_blocks={"node-0:1": 2}), measured)
    assert found.transfer_s == pytest.approx(0.5 + 2 / 4)
    assert found.prefill_s == pytest.approx((100 - 32) / 200)


def test_reported_and_placed_tokens_stand_in_the_queue():
    busy = instance("prefill-0", load=load(num_waiting_tokens=300), num_placed_tokens=200)
    assert MODEL.estimate(request(), busy).queue_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("num_tokens", "num_found", "num_cached"),
    [(16, 1, 0), (17, 1, 1), (32, 2, 1), (33, 2, 2), (33, 9, 2), (1, 3, 0), (100, 0, 0)],
)
def test_cached_blocks_never_cover_the_last_token(num_tokens, num_found, num_cached):
    wanted = request(num_tokens=num_tokens, cached_blocks={"node-0:1": num_found})
    assert MODEL.num_cached_blocks(wanted, instance("prefill-0")) == num_cached


def test_blocks_of_another_node_are_worth_nothing():
    wanted = request(cached_blocks={"node-1:1": 5})
    assert MODEL.num_cached_blocks(wanted, instance("prefill-0")) == 0
