"""What an instance measures of itself."""

from __future__ import annotations

import pytest

from snowskin.engines.meter import MIN_TOKENS, WEIGHT, Meter


def test_a_warm_up_counts_until_the_first_real_work():
    meter = Meter()
    meter.warmed_up(num_tokens=100, prefill_s=1.0, decode_s=0.5)
    assert (meter.prefill_tokens_per_s.value, meter.decode_step_s.value) == (100.0, 0.5)
    meter.prefilled(num_tokens=600, seconds=1.0)
    meter.decoded(seconds=0.1)
    assert (meter.prefill_tokens_per_s.value, meter.decode_step_s.value) == (600.0, 0.1)
    meter.warmed_up(num_tokens=100, prefill_s=1.0)
    assert meter.prefill_tokens_per_s.value == 600.0


def test_later_work_moves_the_average():
    meter = Meter()
    meter.prefilled(num_tokens=100, seconds=1.0)
    meter.prefilled(num_tokens=200, seconds=1.0)
    assert meter.prefill_tokens_per_s.value == pytest.approx(100 + WEIGHT * 100)


def test_work_that_is_too_short_says_nothing():
    meter = Meter()
    meter.warmed_up(num_tokens=MIN_TOKENS - 1, prefill_s=1.0)
    meter.prefilled(num_tokens=MIN_TOKENS - 1, seconds=1.0)
    assert meter.prefill_tokens_per_s.value == 0.0
