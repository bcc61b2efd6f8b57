"""What tells the policies apart; their common laws are in tests/contract/test_policies.py."""

from __future__ import annotations

from snowskin.engines.conductor.policies.registry import make_policy
from snowskin.engines.conductor.request import Placement, Stage
from snowskin.kvstore.directory.presence import Presence
from tests.support.clusters import instance, load, request, view

LEAST = make_policy("least_ttft")


def chosen(policy, stage, cluster, wanted=None):
    answer = policy.place(wanted or request(), stage, cluster)
    assert isinstance(answer, Placement)
    return answer.instance_id


def test_round_robin_takes_turns():
    cluster = [instance(f"prefill-{index}") for index in range(3)]
    policy = make_policy("round_robin")
    turns = [
        chosen(policy, Stage.PREFILL, view(*cluster, num_placements={Stage.PREFILL: turn}))
        for turn in range(4)
    ]
    assert turns == ["prefill-0", "prefill-1", "prefill-2", "prefill-0"]


def test_prefill_goes_where_the_prefix_is_cached():
    cluster = view(instance("prefill-0"), instance("prefill-1", node_address="node-1:1"))
    cached = request(num_tokens=1000, presence=Presence.of_runs({"node-1:1": 60}))
    assert chosen(LEAST, Stage.PREFILL, cluster, cached) == "prefill-1"


def test_a_long_queue_outweighs_a_cached_prefix():
    cluster = view(
        instance("prefill-0"),
        instance("prefill-1", node_address="node-1:1", load=load(num_waiting_tokens=961)),
    )
    cached = request(num_tokens=1000, presence=Presence.of_runs({"node-1:1": 60}))
    assert chosen(LEAST, Stage.PREFILL, cluster, cached) == "prefill-0"


def test_placements_since_the_last_report_keep_requests_from_herding():
    cluster = view(instance("prefill-0", num_placed_tokens=1), instance("prefill-1"))
    assert chosen(LEAST, Stage.PREFILL, cluster) == "prefill-1"
    cluster = view(instance("decode-0", num_placed_requests=1), instance("decode-1"))
    assert chosen(LEAST, Stage.DECODE, cluster) == "decode-1"


def test_decode_goes_where_there_is_room_before_where_it_is_quiet():
    cluster = view(
        instance("decode-0", load=load(num_kv_blocks_free=6)),
        instance("decode-1", load=load(num_running=9, num_kv_blocks_free=7)),
    )
    assert chosen(LEAST, Stage.DECODE, cluster) == "decode-1"


def test_ties_go_to_the_lowest_id():
    for stage in Stage:
        cluster = view(instance(f"{stage}-1"), instance(f"{stage}-0"))
        assert chosen(LEAST, stage, cluster) == f"{stage}-0"


def test_a_slow_warm_up_does_not_keep_work_from_an_instance_for_good():
    proven = load(prefill_tokens_per_s=600.0, num_tokens_computed=5000, num_waiting_tokens=200)
    fresh = load(prefill_tokens_per_s=100.0, num_tokens_computed=0)
    cluster = view(instance("prefill-0", load=proven), instance("prefill-1", load=fresh))
    assert chosen(LEAST, Stage.PREFILL, cluster) == "prefill-1"
    slow = load(prefill_tokens_per_s=100.0, num_tokens_computed=5000)
    cluster = view(instance("prefill-0", load=proven), instance("prefill-1", load=slow))
    assert chosen(LEAST, Stage.PREFILL, cluster) == "prefill-0"


def test_a_plan_names_who_else_holds_the_blocks_should_a_node_fail():
    presence = Presence(
        bitmaps={"node-0:1": 0b1111, "node-1:1": 0b0110, "node-2:1": 0b1110, "node-3:1": 0b10000}
    )
    cluster = view(instance("prefill-0"), instance("decode-0"))
    for stage in Stage:
        answer = LEAST.place(request(num_tokens=70, presence=presence), stage, cluster)
        assert isinstance(answer, Placement)
        assert answer.node_addresses == ("node-0:1", "node-2:1", "node-1:1")
