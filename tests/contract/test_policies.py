"""The laws of a conductor policy (engines/conductor/policies/api.py), on every policy."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowskin.engines.conductor.policies.registry import POLICIES, make_policy
from snowskin.engines.conductor.request import (
    Accept,
    Defer,
    Placement,
    Refusal,
    RefusalReason,
    Stage,
)
from snowskin.engines.conductor.view import InstanceState
from snowskin.kvstore.directory.presence import Presence
from snowskin.kvstore.errors import BadSetting
from tests.support.clusters import OTHER_SHAPE, SHAPE, instance, load, request, view

NODES = ("node-0:1", "node-1:1")

loads = st.builds(
    load,
    num_waiting=st.integers(0, 5),
    num_running=st.integers(0, 5),
    num_waiting_tokens=st.integers(0, 5000),
    num_kv_blocks_free=st.integers(0, 1000),
    prefill_tokens_per_s=st.sampled_from([0.0, 10.0, 5000.0]),
    pull_bytes_per_s=st.sampled_from([0.0, 1e6, 1e10]),
)


@st.composite
def instances(draw):
    role = draw(st.sampled_from(["prefill", "decode", "encode"]))
    return instance(
        f"{role}-{draw(st.integers(0, 6))}",
        role=role,
        state=draw(st.sampled_from(list(InstanceState))),
        shape=draw(st.sampled_from([SHAPE, OTHER_SHAPE])),
        node_address=draw(st.sampled_from(NODES)),
        load=draw(loads),
        num_placed_requests=draw(st.integers(0, 3)),
        num_placed_tokens=draw(st.integers(0, 500)),
    )


views = st.builds(
    lambda found, count, turn: view(
        *found, num_requests=count, num_placements=dict.fromkeys(Stage, turn)
    ),
    st.lists(instances(), max_size=8, unique_by=lambda each: each.instance_id),
    st.integers(1, 300),
    st.integers(0, 20),
)
requests = st.builds(
    request,
    num_tokens=st.integers(1, 2000),
    max_tokens=st.integers(1, 500),
    presence=st.builds(
        Presence, bitmaps=st.dictionaries(st.sampled_from(NODES), st.integers(1, 1 << 130))
    ),
    excluded=st.frozensets(st.sampled_from(["prefill-0", "decode-1", "decode-2"])),
)
stages = st.sampled_from(list(Stage))


@pytest.fixture(scope="module", params=sorted(POLICIES))
def policy(request):
    return make_policy(request.param)


@given(wanted=requests, stage=stages, cluster=views)
def test_only_a_fitting_ready_instance_is_chosen_and_one_is_where_there_is_any(
    policy, wanted, stage, cluster
):
    answer = policy.place(wanted, stage, cluster)
    fitting = {
        each.instance_id
        for each in cluster.instances
        if each.state is InstanceState.READY
        and each.role == stage.value
        and each.shape == SHAPE
        and each.instance_id not in wanted.excluded
    }
    if fitting:
        assert isinstance(answer, Placement)
        assert answer.instance_id in fitting
        assert answer.stage is stage
    else:
        assert isinstance(answer, Refusal)
        assert answer.reason is RefusalReason.NO_INSTANCE


@given(wanted=requests, stage=stages, cluster=views)
def test_equal_questions_have_equal_answers(policy, wanted, stage, cluster):
    before = copy.deepcopy((wanted, cluster))
    first = (policy.admit(wanted, cluster), policy.place(wanted, stage, cluster))
    assert (policy.admit(wanted, cluster), policy.place(wanted, stage, cluster)) == first
    assert (wanted, cluster) == before
    again = make_policy(policy.name)
    assert (again.admit(wanted, cluster), again.place(wanted, stage, cluster)) == first


@given(wanted=requests, cluster=views)
def test_admission_defers_exactly_while_a_role_has_no_candidate(policy, wanted, cluster):
    answer = policy.admit(wanted, cluster)
    if cluster.num_requests > policy.limits.max_requests:
        assert isinstance(answer, Refusal)
        return
    placed = [policy.place(wanted, stage, cluster) for stage in Stage]
    placeable = all(isinstance(each, Placement) for each in placed)
    assert isinstance(answer, Defer) is not placeable
    if isinstance(answer, Accept):
        assert placeable


@given(wanted=requests, cluster=views)
def test_a_prefill_placement_accounts_for_every_prompt_token(policy, wanted, cluster):
    answer = policy.place(wanted, Stage.PREFILL, cluster)
    if isinstance(answer, Placement):
        cached_tokens = answer.num_cached_blocks * SHAPE.block_size
        assert answer.num_new_tokens + cached_tokens == wanted.num_tokens
        assert answer.num_new_tokens >= 1
        assert answer.estimate is not None


def test_an_unknown_policy_lists_the_known_ones():
    with pytest.raises(BadSetting, match="least_ttft, round_robin"):
        make_policy("best")
