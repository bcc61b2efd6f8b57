"""The model in one piece, as a reference."""

from __future__ import annotations

import pytest

from snowskin.engines.model.random_model import make_random_model
from snowskin.tools.cluster.monolith import ComparisonCancelled, Difference, Monolith

PROMPT = list(b"The quick brown fox jumps over the lazy dog.")


@pytest.fixture(scope="module")
def monolith(tmp_path_factory):
    return Monolith(
        make_random_model(
            tmp_path_factory.mktemp("models") / "tiny",
            layers=2,
            hidden=64,
            heads=2,
            kv_heads=1,
            head_dim=32,
            intermediate=128,
        )
    )


@pytest.fixture(scope="module")
def greedy(monolith):
    """Greedy tokens, found by what the comparison says it would have chosen."""
    tokens = []
    for _ in range(20):
        found = monolith.compare(PROMPT, [*tokens, 0], stopped=False)
        tokens.append(found.differences[-1].expected_token_id)
    return tokens


def test_the_models_own_tokens_agree(monolith, greedy):
    agreement = monolith.compare(PROMPT, greedy, stopped=False)
    assert agreement.num_tokens == 20
    assert agreement.differences == ()


def test_one_wrong_token_is_found_where_it_is(monolith, greedy):
    wrong = [*greedy[:7], (greedy[7] + 1) % 128]
    (difference,) = monolith.compare(PROMPT, wrong, stopped=False).differences
    assert (difference.index, difference.expected_token_id) == (7, greedy[7])
    assert not difference.is_rounding


def test_another_prompt_does_not_agree(monolith, greedy):
    other = [*PROMPT[:10], PROMPT[10] ^ 1, *PROMPT[11:]]
    assert monolith.compare(other, greedy, stopped=False).num_wrong > 0


def test_a_stop_that_the_model_would_not_have_made_is_a_difference(monolith, greedy):
    assert monolith.compare(PROMPT, greedy[:5], stopped=True, end_token_ids=[0]).num_wrong == 1
    ends_there = monolith.compare(
        PROMPT, greedy[:5], stopped=True, end_token_ids=[greedy[5], greedy[4]]
    )
    assert ends_there.differences == ()
    assert (
        monolith.compare(PROMPT, greedy[:5], stopped=True, end_token_ids=greedy[5:6]).num_wrong == 0
    )


@pytest.mark.parametrize(("margin", "expected"), [(0.9e-3, True), (1e-3, False), (1.0, False)])
def test_a_difference_is_rounding_only_below_the_margin(margin, expected):
    difference = Difference(
        index=0, token_id=1, expected_token_id=2, margin=margin, margin_allowed=1e-3
    )
    assert difference.is_rounding is expected


def test_a_comparison_can_be_cancelled(monolith, greedy):
    with pytest.raises(ComparisonCancelled):
        monolith.compare(PROMPT, greedy, stopped=False, is_cancelled=lambda: True)
