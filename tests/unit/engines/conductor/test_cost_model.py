"""Estimates: each term from what the instance reports, or from a stated default."""

from __future__ import annotations

import pytest

from snowskin.engines.conductor.cost_model import CostModel
from snowskin.kvstore.directory.presence import PlannedPull, Presence
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
    found = MODEL.estimate(
        request(num_tokens=100, presence=Presence.of_runs({"node-0:1": 2})), measured
    )
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
    wanted = request(num_tokens=num_tokens, presence=Presence.of_runs({"node-0:1": num_found}))
    assert MODEL.num_cached_blocks(wanted, instance("prefill-0")) == num_cached


QUICK = CostModel(
    prefill_tokens_per_s=1000.0,
    pull_bytes_per_s=SHAPE.block_nbytes * 1000.0,
    remote_pull_bytes_per_s=SHAPE.block_nbytes * 100.0,
    pull_fixed_s=0.001,
)


def test_blocks_of_another_host_cost_their_way():
    wanted = request(num_tokens=100, presence=Presence.of_runs({"node-1:1": 5}))
    found = QUICK.estimate(wanted, instance("prefill-0"))
    assert found.transfer_s == pytest.approx(2 * 0.001 + 5 / 100)
    assert found.prefill_s == pytest.approx((100 - 80) / 1000)


def test_blocks_of_another_node_of_the_host_cost_little_more_than_those_of_the_own_one():
    near = request(num_tokens=100, presence=Presence.of_runs({"node-0:2": 5}))
    own = request(num_tokens=100, presence=Presence.of_runs({"node-0:1": 5}))
    more_s = (
        QUICK.estimate(near, instance("prefill-0")).ttft_s
        - QUICK.estimate(own, instance("prefill-0")).ttft_s
    )
    assert more_s == pytest.approx(QUICK.pull_fixed_s)


def test_a_slow_own_rate_is_no_faster_over_the_wire():
    slow = instance("prefill-0", load=load(pull_bytes_per_s=SHAPE.block_nbytes * 10.0))
    wanted = request(num_tokens=100, presence=Presence.of_runs({"node-1:1": 1}))
    assert QUICK.pulls(wanted, slow) == (), "16 tokens are computed in 16 ms, pulled in 100"


def test_a_prefix_is_taken_from_node_after_node_as_far_as_that_pays():
    presence = Presence(bitmaps={"node-0:1": 0b000011, "node-1:1": 0b111110, "node-2:1": 0b100000})
    wanted = request(num_tokens=100, presence=presence)
    assert QUICK.pulls(wanted, instance("prefill-0")) == (
        PlannedPull(address="node-0:1", first_block=0, num_blocks=2),
        PlannedPull(address="node-1:1", first_block=2, num_blocks=4),
    )


def test_a_pull_that_does_not_pay_is_made_for_one_behind_it_that_does():
    quick = CostModel(
        prefill_tokens_per_s=1000.0, pull_bytes_per_s=1e12, pull_fixed_s=0.009
    )  # a block saves 16 ms, asking another node costs 18
    presence = Presence(bitmaps={"node-1:1": 0b000001, "node-2:1": 0b111110})
    pays = request(num_tokens=100, presence=presence)
    assert quick.num_cached_blocks(pays, instance("prefill-0")) == 6
    alone = request(num_tokens=100, presence=Presence.of_runs({"node-1:1": 1}))
    assert quick.num_cached_blocks(alone, instance("prefill-0")) == 0
