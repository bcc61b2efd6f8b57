"""Greedy and drawn tokens: ties, nucleus, reproducibility, and distance from another outcome."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snowskin.engines.errors import BadSamplingParams, LogitsNotFinite
from snowskin.engines.model.sampler import SamplingParams, sample, uniform

GREEDY = SamplingParams()


def logits(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_greedy_takes_the_largest_and_says_by_how_much():
    chosen = sample(logits(1.0, 4.0, 3.5), GREEDY, 0)
    assert (chosen.token_id, chosen.top_two_margin, chosen.edge_distance) == (1, 0.5, 1.0)


def test_of_equal_logits_greedy_takes_the_lowest_id():
    chosen = sample(logits(0.0, 2.0, 2.0), GREEDY, 0)
    assert (chosen.token_id, chosen.top_two_margin) == (1, 0.0)


def test_a_vocabulary_of_one_has_an_infinite_margin():
    assert sample(logits(-3.0), GREEDY, 0).top_two_margin == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(bad, temperature):
    with pytest.raises(LogitsNotFinite):
        sample(logits(0.0, bad), SamplingParams(temperature=temperature), 0)


def test_forbidden_tokens_are_never_drawn():
    params = SamplingParams(temperature=1.0)
    drawn = {sample(logits(0.0, -math.inf, 0.0), params, at).token_id for at in range(100)}
    assert drawn == {0, 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"max_tokens": 0},
        {"stop_token_ids": (-1,)},
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(fields):
    with pytest.raises(BadSamplingParams, match=next(iter(fields))):
        SamplingParams(**fields)


def test_the_draw_is_the_same_in_another_process():
    code = (
        "from snowskin.engines.model.sampler import uniform;"
        "print([uniform(s, p) for s in (0, 1, 2**64 - 1) for p in (0, 1, 10**6)])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [uniform(s, p) for s in (0, 1, 2**64 - 1) for p in (0, 1, 10**6)]
    assert there.stdout.strip() == str(here)
    assert len(set(here)) == len(here)


def test_the_draw_never_changes_between_releases():
    assert uniform(7, 42) == 0.5935442115318413


def test_drawn_tokens_follow_the_distribution():
    params = SamplingParams(temperature=2.0, seed=5)
    values = logits(0.0, 1.0, 2.0, 3.0)
    counts = np.bincount([sample(values, params, at).token_id for at in range(4000)], minlength=4)
    expected = torch.softmax(values.double() / 2.0, -1).numpy() * 4000
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-square, 3 df, p = 0.001


def test_the_nucleus_is_the_shortest_beginning_that_reaches_top_p():
    values = logits(*np.log([0.1, 0.5, 0.15, 0.25]))
    drawn = {
        top_p: {
            sample(values, SamplingParams(temperature=1.0, top_p=top_p), at).token_id
            for at in range(300)
        }
        for top_p in (0.01, 0.45, 0.7, 0.85, 0.95)
    }
    assert drawn == {0.01: {1}, 0.45: {1}, 0.7: {1, 3}, 0.85: {1, 2, 3}, 0.95: {0, 1, 2, 3}}


def test_the_edge_distance_is_small_where_rounding_would_change_the_token():
    # Two tokens: the only edge between them lies at 0.9, and they change places where 0.8 moves.
    params = SamplingParams(temperature=1.0)
    values = torch.tensor([0.9, 0.1]).log()
    for at in range(50):
        chosen = sample(values, params, at)
        u = uniform(params.seed, at)
        assert chosen.token_id == int(u >= 0.9)
        assert chosen.edge_distance == pytest.approx(min(abs(u - 0.9), 0.8), abs=1e-6)


def test_tokens_that_rounding_would_put_in_another_order_are_near_an_edge():
    params = SamplingParams(temperature=1.0)
    for at in range(50):
        one = sample(logits(1.0, 1.00001, -9.0), params, at)
        other = sample(logits(1.00001, 1.0, -9.0), params, at)
        assert one.edge_distance < 1e-3
        assert {one.token_id, other.token_id} <= {0, 1, 2}
    u_is_low = [at for at in range(50) if uniform(0, at) < 0.49]
    assert any(
        sample(logits(1.0, 1.00001), params, at).token_id
        != sample(logits(1.00001, 1.0), params, at).token_id
        for at in u_is_low
    )


def test_top_k_draws_from_the_likeliest_alone_and_before_the_nucleus():
    values = logits(*np.log([0.1, 0.5, 0.15, 0.25]))

    def drawn(**fields):
        params = SamplingParams(temperature=1.0, **fields)
        return {sample(values, params, at).token_id for at in range(300)}

    assert drawn(top_k=1) == {1}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=3) == {1, 2, 3}
    assert drawn(top_k=0) == drawn(top_k=4) == drawn(top_k=99) == {0, 1, 2, 3}
    # Of two thirds and one third, 0.66 is reached by the first; of all four it needs the second.
    assert drawn(top_k=2, top_p=0.66) == {1}
    assert drawn(top_p=0.66) == {1, 3}


def test_the_last_of_top_k_is_near_an_edge_where_the_next_one_is_as_likely(monkeypatch):
    monkeypatch.setattr("snowskin.engines.model.sampler.uniform", lambda _seed, _position: 0.9)
    params = SamplingParams(temperature=1.0, top_k=2)
    assert sample(logits(2.0, 1.0, 0.99999), params, 0).edge_distance < 1e-3
    assert sample(logits(2.0, 1.0, -3.0), params, 0).edge_distance > 1e-2


def test_a_draw_on_an_edge_belongs_to_the_token_above_it(monkeypatch):
    monkeypatch.setattr("snowskin.engines.model.sampler.uniform", lambda _seed, _position: 0.5)
    chosen = sample(logits(1.0, 1.0), SamplingParams(temperature=1.0), 0)
    assert (chosen.token_id, chosen.edge_distance) == (1, 0.0)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40),
    st.floats(0.05, 5),
    st.floats(0.05, 1),
    st.integers(0, 6),
    st.integers(0, 2**64 - 1),
    st.integers(0, 10**6),
)
def test_a_nudge_below_the_edge_distance_never_changes_the_token(
    values, temperature, top_p, top_k, seed, position
):
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    row = np.array(values, dtype=np.float32)
    chosen = sample(row, params, position)
    if chosen.edge_distance < 1e-2:
        return
    nudge = np.float32(1e-5) * np.where(np.arange(len(row)) % 2, 1, -1).astype(np.float32)
    assert sample(row + nudge, params, position).token_id == chosen.token_id
